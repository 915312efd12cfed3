package volume

import (
	"context"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
)

const (
	// fileMaxBytes is the largest size of a file: 8 EiB - 1.
	fileMaxBytes = math.MaxInt64
	// writeMaxBytes is the most that one journal record carries; a longer write takes several.
	writeMaxBytes = 1 << 20
	// recordBytes is what a change without content is counted as against the journal's cap.
	recordBytes = 512
	// remoteReadsMax bounds the slices that one Read fetches at a time.
	remoteReadsMax = 4
	// evictionRetriesMax bounds how often a Read looks up extents again because a segment went meanwhile.
	evictionRetriesMax = 4
)

// errLost: the only copy of bytes was on this disk, and is damaged or gone.
var errLost = errors.New("the only copy of these bytes was on this disk and cannot be read any more; defs fsck lists the files")

// WriteFlags modify a write, a fallocate or a range copy.
type WriteFlags struct {
	KillPriv bool // a caller without CAP_FSETID: clear setuid, and setgid where the group may execute
	Append   bool // write at the end of the file, whatever the offset
}

// file returns an inode that has content.
func (t *tx) file(ino Ino) (metastore.Inode, error) {
	n, err := t.inode(ino)
	if err == NotExist {
		err = Stale
	}
	if err != nil {
		return n, err
	}
	return n, checkRegular(&n)
}

func checkRegular(n *metastore.Inode) error {
	switch {
	case isDir(n.Mode):
		return IsDir
	case !isRegular(n.Mode):
		return Invalid
	}
	return nil
}

// Read fills dst from offset off and returns the count; fewer than len(dst) only at the end of the file.
// It sees each concurrent write of up to 1 MiB, and each truncation, wholly or not at all.
func (v *Volume) Read(ctx context.Context, ino Ino, off int64, dst []byte) (int, error) {
	v.foreground.begin()
	defer v.foreground.end()
	if off < 0 {
		return 0, wrap("read", ino, Invalid)
	}
	var err error
	for range evictionRetriesMax {
		var n metastore.Inode
		var extents []metastore.Extent
		if n, extents, err = v.view(ino, uint64(off), len(dst)); err != nil {
			break
		}
		if uint64(off) >= n.Size {
			return 0, nil
		}
		part := dst[:min(uint64(len(dst)), n.Size-uint64(off))]
		if err = v.readExtents(ctx, extents, uint64(off), part); err == nil {
			v.accessed(ino, &n)
			v.readAhead(ino, extents, uint64(off), uint64(off)+uint64(len(part)))
			return len(part), nil
		}
		if !errors.Is(err, cache.ErrEvicted) {
			break
		}
	}
	if errors.Is(err, cache.ErrEvicted) {
		err = fmt.Errorf("%w: %w", errLost, err)
	}
	return 0, wrap("read", ino, err)
}

// view returns an inode and its extents over a range as of one moment.
func (v *Volume) view(ino Ino, off uint64, length int) (metastore.Inode, []metastore.Extent, error) {
	l := v.inodes.lock(ino)
	l.RLock()
	defer l.RUnlock()
	n, err := v.inodes.load(ino)
	if err == NotExist {
		err = Stale
	}
	if err != nil {
		return n, nil, err
	}
	if err := checkRegular(&n); err != nil {
		return n, nil, err
	}
	if off >= n.Size || n.Allocated == 0 {
		return n, nil, nil
	}
	var extents []metastore.Extent
	err = v.extents.overlapping(ino, off, off+min(uint64(length), n.Size-off), func(e metastore.Extent) bool {
		extents = append(extents, e)
		return true
	})
	return n, extents, err
}

// readExtents fills dst, which starts at off: zeros where no extent is, local bytes, and what is no longer local
// or cannot be read from the network, several slices at a time. ErrEvicted means that the extents were looked up too early.
func (v *Volume) readExtents(ctx context.Context, extents []metastore.Extent, off uint64, dst []byte) error {
	end := off + uint64(len(dst))
	at := off
	var fetch *errgroup.Group
	var fetchCtx context.Context
	var failed error
	for _, e := range extents {
		from, to := max(e.Off, off), min(e.End(), end)
		clear(dst[at-off : from-off])
		at = to
		part, skip := dst[from-off:to-off], int(from-e.Off)
		err := errLost
		if e.HasLocal() {
			err = v.store.ReadAt(e.Local, int(e.LocalOff)+skip, part)
		}
		if err != nil && e.HasRemote && v.remote != nil {
			if fetch == nil {
				fetch, fetchCtx = errgroup.WithContext(ctx)
				fetch.SetLimit(remoteReadsMax)
			}
			fetch.Go(func() error { return v.remote.ReadSlice(fetchCtx, e.Remote, skip, part) })
			continue
		}
		if err != nil {
			failed = err
			break
		}
	}
	if fetch != nil {
		if err := fetch.Wait(); err != nil && failed == nil {
			failed = err
		}
	}
	if failed == nil {
		clear(dst[at-off:])
	}
	return failed
}

// Write stores data at offset off, or at the end of the file, and returns the count. The bytes survive SIGKILL when
// it returns. Up to 1 MiB is one change, seen by readers and crashes wholly or not at all; more is written in such steps.
func (v *Volume) Write(ctx context.Context, ino Ino, off int64, data []byte, f WriteFlags) (int, error) {
	v.foreground.begin()
	defer v.foreground.end()
	if off < 0 {
		return 0, wrap("write", ino, Invalid)
	}
	done := 0
	for done < len(data) {
		part := data[done:min(len(data), done+writeMaxBytes)]
		if err := wrap("write", ino, v.writePart(ctx, ino, uint64(off)+uint64(done), part, f)); err != nil {
			if done > 0 && KindOf(err) != IO {
				return done, nil
			}
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

func (v *Volume) writePart(ctx context.Context, ino Ino, off uint64, data []byte, f WriteFlags) error {
	if err := v.waitRoom(ctx, recordBytes+len(data)); err != nil {
		return err
	}
	sealed, err := v.store.Seal(data)
	if err != nil {
		return err
	}
	_, err = v.commitData(sealed, func(t *tx, seq uint64, ref cache.Ref) error {
		n, err := t.file(ino)
		if err != nil {
			return err
		}
		if f.Append {
			off = n.Size
		}
		end := off + uint64(len(data))
		if end > fileMaxBytes {
			return FileTooLarge
		}
		if n.Allocated == 0 && end <= windowBytes {
			v.extents.noteEmpty(ino)
		}
		if err := t.unmap(ino, &n, off, end); err != nil {
			return err
		}
		t.mapExtent(ino, &n, metastore.Extent{Off: off, Len: uint32(len(data)), Seq: seq, Local: ref})
		return t.modified(ino, &n, end, f.KillPriv)
	})
	if err == errRecordTooLarge && len(data) > 1 {
		// Over ten thousand tiny extents are to be replaced: half of them at a time.
		half := len(data) / 2
		if err := v.writePart(ctx, ino, off, data[:half], f); err != nil {
			return err
		}
		return v.writePart(ctx, ino, off+uint64(half), data[half:], f)
	}
	return err
}

// modified finishes a change of content that reaches to end.
func (t *tx) modified(ino Ino, n *metastore.Inode, end uint64, killPriv bool) error {
	n.Size = max(n.Size, end)
	n.Mtime, n.Ctime = t.now, t.now
	if err := t.dropPrivileges(ino, n, killPriv); err != nil {
		return err
	}
	t.putInode(ino, *n)
	return nil
}

// waitRoom takes bytes from the journal's room: it slows and blocks the caller as the journal fills.
func (v *Volume) waitRoom(ctx context.Context, n int) error { return v.store.WaitRoom(ctx, int64(n)) }
