package volume

import (
	"context"

	"github.com/defs-fs/defs/metastore"
)

// extentsPerRecord bounds the extents that one record of a truncation, a range copy or a removal touches, so that
// neither the record nor the time under v.mu grows with the file.
const extentsPerRecord = 2048

// mapExtent adds an extent where nothing is mapped.
func (t *tx) mapExtent(ino Ino, n *metastore.Inode, e metastore.Extent) {
	t.AddExtent(ino, e)
	n.Allocated += uint64(e.Len)
	t.bytes += int64(e.Len)
}

// unmap makes [from, to) a hole: extents inside go, those across an edge are cut, those around it split.
func (t *tx) unmap(ino Ino, n *metastore.Inode, from, to uint64) error {
	// No extent reaches past the end of the file.
	if from >= n.Size || from >= to || n.Allocated == 0 {
		return nil
	}
	return t.v.extents.overlapping(ino, from, to, func(e metastore.Extent) bool {
		t.DeleteExtent(ino, e)
		n.Allocated -= uint64(e.Len)
		t.bytes -= int64(e.Len)
		if e.Off < from {
			t.mapExtent(ino, n, slice(e, e.Off, from))
		}
		if e.End() > to {
			t.mapExtent(ino, n, slice(e, to, e.End()))
		}
		return true
	})
}

// slice returns the part [from, to) of an extent, which must lie inside it.
func slice(e metastore.Extent, from, to uint64) metastore.Extent {
	skip := uint32(from - e.Off)
	e.Off = from
	e.Len = uint32(to - from)
	e.LocalOff += skip
	e.Remote.Off += skip
	if !e.HasLocal() {
		e.LocalOff = 0
	}
	if !e.HasRemote {
		e.Remote = metastore.Remote{}
	}
	return e
}

// truncate sets the size; what was past it reads as zeros if the file grows again.
func (t *tx) truncate(ino Ino, n *metastore.Inode, size uint64) error {
	if err := checkRegular(n); err != nil {
		return err
	}
	if size < n.Size {
		if err := t.unmap(ino, n, size, n.Size); err != nil {
			return err
		}
	}
	n.Size = size
	return nil
}

// shrink takes most of a long cut off in steps from the end, each a shorter file, so that what is left for one last
// record is bounded. It does nothing to a file with few extents past size.
func (v *Volume) shrink(ino Ino, size uint64) error {
	var steps []uint64 // sizes with extentsPerRecord extents between each two
	count := 0
	n, err := v.existing(ino)
	if err != nil || !isRegular(n.Mode) || size >= n.Size || n.Allocated == 0 {
		return err
	}
	if err := v.db.Extents(ino, size, n.Size, func(e metastore.Extent) bool {
		if count++; count%extentsPerRecord == 0 {
			steps = append(steps, e.Off)
		}
		return true
	}); err != nil {
		return err
	}
	for i := len(steps) - 1; i >= 0; i-- {
		if err := v.update(ino, func(t *tx, n *metastore.Inode) error {
			if steps[i] >= n.Size || steps[i] < size {
				return errUnchanged
			}
			n.Mtime, n.Ctime = t.now, t.now
			return t.truncate(ino, n, steps[i])
		}); err != nil {
			return err
		}
	}
	return nil
}

// update commits a change of one file's inode.
func (v *Volume) update(ino Ino, change func(*tx, *metastore.Inode) error) error {
	_, err := v.commit(func(t *tx) error {
		n, err := t.file(ino)
		if err != nil {
			return err
		}
		if err := change(t, &n); err != nil {
			return err
		}
		t.putInode(ino, n)
		return nil
	})
	return err
}

// Modes of Fallocate (FALLOC_FL_*).
const (
	FallocKeepSize  = 0x01
	FallocPunchHole = 0x02
	FallocZeroRange = 0x10
)

// Fallocate changes the space of [off, off+n): mode 0 makes the file reach that far, FallocPunchHole (with
// FallocKeepSize) makes a hole, FallocZeroRange zeros. Space is not reserved: the journal takes every write or says
// NoSpace.
func (v *Volume) Fallocate(ctx context.Context, ino Ino, mode uint32, off, n int64, f WriteFlags) error {
	return wrap("fallocate", ino, v.fallocate(ctx, ino, mode, off, n, f))
}

func (v *Volume) fallocate(ctx context.Context, ino Ino, mode uint32, off, n int64, f WriteFlags) error {
	v.foreground.begin()
	defer v.foreground.end()
	switch mode {
	case 0, FallocKeepSize, FallocPunchHole | FallocKeepSize, FallocZeroRange, FallocZeroRange | FallocKeepSize:
	default:
		return NotSupported
	}
	switch {
	case off < 0 || n <= 0:
		return Invalid
	case n > fileMaxBytes-off:
		return FileTooLarge
	}
	from, to := uint64(off), uint64(off)+uint64(n)
	if err := v.waitRoom(ctx, recordBytes); err != nil {
		return err
	}
	if mode&(FallocPunchHole|FallocZeroRange) == 0 {
		return v.extend(ctx, ino, to, mode, f)
	}
	for at := from; ; {
		next, err := v.stepEnd(ino, at, to)
		if err != nil {
			return err
		}
		if err := v.update(ino, func(t *tx, n *metastore.Inode) error {
			if err := t.unmap(ino, n, at, next); err != nil {
				return err
			}
			end := n.Size
			if mode&FallocKeepSize == 0 && next == to {
				end = to
			}
			return t.modified(ino, n, end, f.KillPriv)
		}); err != nil {
			return err
		}
		if next == to {
			return nil
		}
		at = next
	}
}

// extend is fallocate without a change of what is there.
func (v *Volume) extend(ctx context.Context, ino Ino, to uint64, mode uint32, f WriteFlags) error {
	st, err := v.StatFS(ctx)
	if err != nil {
		return err
	}
	return v.update(ino, func(t *tx, n *metastore.Inode) error {
		if to > n.Size && (to-n.Size)/uint64(st.BlockBytes) > st.Avail {
			return NoSpace
		}
		end := n.Size
		if mode&FallocKeepSize == 0 {
			end = max(end, to)
		}
		return t.modified(ino, n, end, f.KillPriv)
	})
}

// stepEnd returns how far a change of [from, to) may reach in one record.
func (v *Volume) stepEnd(ino Ino, from, to uint64) (uint64, error) {
	count := 0
	end := to
	err := v.db.Extents(ino, from, to, func(e metastore.Extent) bool {
		if count++; count <= extentsPerRecord {
			return true
		}
		end = e.Off
		return false
	})
	return end, err
}

// Values of Seek's whence.
const (
	SeekData = 3 // SEEK_DATA
	SeekHole = 4 // SEEK_HOLE
)

// Seek finds the next data or hole at or after off; the end of the file counts as a hole. NoData where off is at
// or past the end, or no data follows.
func (v *Volume) Seek(ctx context.Context, ino Ino, off int64, whence int) (int64, error) {
	at, err := v.seek(ino, off, whence)
	return at, wrap("seek", ino, err)
}

func (v *Volume) seek(ino Ino, off int64, whence int) (int64, error) {
	if whence != SeekData && whence != SeekHole {
		return 0, Invalid
	}
	l := v.inodes.lock(ino)
	l.RLock()
	defer l.RUnlock()
	n, err := v.inodes.load(ino)
	if err == NotExist {
		err = Stale
	}
	if err != nil {
		return 0, err
	}
	if err := checkRegular(&n); err != nil {
		return 0, err
	}
	if off < 0 || uint64(off) >= n.Size {
		return 0, NoData
	}
	at, found := uint64(off), false
	if err := v.db.Extents(ino, at, n.Size, func(e metastore.Extent) bool {
		if whence == SeekData {
			at, found = max(at, e.Off), true
			return false
		}
		if e.Off > at {
			return false
		}
		at = e.End()
		return true
	}); err != nil {
		return 0, err
	}
	if whence == SeekData && !found {
		return 0, NoData
	}
	return int64(min(at, n.Size)), nil
}

// CopyRange makes [dstOff, dstOff+n) of dst equal to the source's range, holes included, by sharing extents: no byte
// is moved. It returns how much was copied: less than n at the end of the source, or where the range has very many
// extents; 0 at the end. Overlapping ranges of one file are Invalid.
func (v *Volume) CopyRange(ctx context.Context, src Ino, srcOff int64, dst Ino, dstOff, n int64, f WriteFlags) (int64, error) {
	done, err := v.copyRange(ctx, src, srcOff, dst, dstOff, n, f)
	return done, wrap("copy range", dst, err)
}

func (v *Volume) copyRange(ctx context.Context, src Ino, srcOff int64, dst Ino, dstOff, length int64, f WriteFlags) (int64, error) {
	v.foreground.begin()
	defer v.foreground.end()
	if srcOff < 0 || dstOff < 0 || length < 0 {
		return 0, Invalid
	}
	if err := v.waitRoom(ctx, recordBytes); err != nil {
		return 0, err
	}
	var done uint64
	_, err := v.commit(func(t *tx) error {
		from, err := t.file(src)
		if err != nil {
			return err
		}
		n, err := t.file(dst)
		if err != nil {
			return err
		}
		at, to := uint64(srcOff), uint64(dstOff)
		if at >= from.Size || length == 0 {
			return errUnchanged
		}
		done = min(uint64(length), from.Size-at)
		if done > fileMaxBytes-to {
			return FileTooLarge
		}
		if src == dst && at < to+done && to < at+done {
			return Invalid
		}
		// Both sides bound the record. A step may end inside a hole or a run of either.
		if done, err = t.boundStep(src, at, done); err != nil {
			return err
		}
		if done, err = t.boundStep(dst, to, done); err != nil {
			return err
		}
		if err := t.unmap(dst, &n, to, to+done); err != nil {
			return err
		}
		if err := t.v.db.Extents(src, at, at+done, func(e metastore.Extent) bool {
			part := slice(e, max(e.Off, at), min(e.End(), at+done))
			// The copy is a change of its own: a flush of an earlier cut must not take it for that cut's bytes.
			part.Off, part.Seq = part.Off-at+to, t.seq
			t.mapExtent(dst, &n, part)
			return true
		}); err != nil {
			return err
		}
		return t.modified(dst, &n, to+done, f.KillPriv)
	})
	if err != nil {
		return 0, err
	}
	return int64(done), nil
}

// boundStep shortens a range so that one record can hold its extents.
func (t *tx) boundStep(ino Ino, from, length uint64) (uint64, error) {
	end, err := t.v.stepEnd(ino, from, from+length)
	return end - from, err
}
