package shardstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sys/unix"
)

// Catching up has two passes. The first reads record headers only and finds
// `flushed`, the highest sequence that some record knows to have reached the
// device. The second applies records: up to flushed an invalid record is
// corruption, is reported, and the rest stays; beyond it payloads are verified
// and the first invalid record is the torn tail of the crash: the log ends
// there.

const (
	scanBytes       = 1 << 20
	batchRecordsMax = 4096
)

func (s *Store) packPath(id uint64) string {
	return filepath.Join(s.opts.Dir, "packs", fmt.Sprintf("%016x.pack", id))
}

// listPacks returns the ids of the pack files in ascending order.
func (s *Store) listPacks() ([]uint64, error) {
	entries, err := os.ReadDir(filepath.Join(s.opts.Dir, "packs"))
	if err != nil {
		return nil, err
	}
	var ids []uint64
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".pack")
		id, err := strconv.ParseUint(name, 16, 64)
		if ok && err == nil && len(name) == 16 {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// storeID finds the store's random id in the first pack header that is whole.
func (s *Store) storeID(packs []uint64) (id [8]byte, found bool) {
	for _, p := range packs {
		f, err := s.files.acquire(p)
		if err != nil {
			continue
		}
		b := make([]byte, packHeaderBytes)
		_, err = f.ReadAt(b, 0)
		s.files.release(f)
		if err != nil {
			continue
		}
		if id, _, err := decodePackHeader(b); err == nil {
			return id, true
		}
	}
	return id, false
}

// scanner walks record headers through the packs.
type scanner struct {
	s     *Store
	packs []uint64 // ascending
	next  location // where the next record is expected; Seq is its least sequence
	buf   []byte
}

// found is a record header, or a gap that ends at one or at the end of all
// packs.
type found struct {
	header recordHeader
	loc    location
	gap    bool // the record expected at loc is not valid
	end    bool
}

// step returns the next record, or a gap.
func (c *scanner) step() (found, error) {
	for len(c.packs) > 0 {
		if c.packs[0] != c.next.Pack {
			c.next.Pack, c.next.Offset = c.packs[0], packHeaderBytes
		}
		f, err := c.s.files.acquire(c.next.Pack)
		if err != nil {
			return found{}, err
		}
		got, more, err := c.stepIn(f)
		c.s.files.release(f)
		if err != nil || more {
			return got, err
		}
		c.packs = c.packs[1:]
	}
	return found{end: true}, nil
}

// stepIn is step within one pack; more is false at its end.
func (c *scanner) stepIn(f File) (got found, more bool, err error) {
	size, err := f.Size()
	if err != nil {
		return found{}, false, err
	}
	at := c.next
	if at.Offset >= size {
		return found{}, false, nil
	}
	b := make([]byte, recordHeaderBytes)
	if size-at.Offset >= recordHeaderBytes {
		if _, err := f.ReadAt(b, at.Offset); err != nil {
			return found{}, false, err
		}
	}
	h, err := decodeRecordHeader(b, c.s.id)
	// A sequence that is not the next one is as wrong as a bad checksum.
	if err == nil && h.Seq == at.Seq && at.Offset+h.bytes() <= size {
		at.Meta, at.Data = h.Meta, h.Data
		c.next.Offset += h.bytes()
		c.next.Seq++
		return found{header: h, loc: at}, true, nil
	}
	if err == nil && h.Seq > at.Seq && at.Offset+h.bytes() <= size {
		c.next.Seq = h.Seq // the gap ended with the pack before
		return found{loc: at, gap: true}, true, nil
	}
	if err := c.resync(f, size); err != nil {
		return found{}, false, err
	}
	return found{loc: at, gap: true}, true, nil
}

// resync moves next to the next valid header in the pack, or to its end.
func (c *scanner) resync(f File, size int64) error {
	if c.buf == nil {
		c.buf = make([]byte, scanBytes)
	}
	for off := c.next.Offset + recordAlign; off < size; {
		n, err := f.ReadAt(c.buf, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for i := 0; i+recordHeaderBytes <= n; i += recordAlign {
			h, err := decodeRecordHeader(c.buf[i:n], c.s.id)
			if err == nil && h.Seq > c.next.Seq && off+int64(i)+h.bytes() <= size {
				c.next.Offset, c.next.Seq = off+int64(i), h.Seq
				return nil
			}
		}
		off += int64(n) &^ (recordAlign - 1)
		if n < len(c.buf) {
			break
		}
	}
	c.next.Offset = size
	return nil
}

// catchUp brings the index from its stored position to the end of the packs
// and sets where the next record goes.
func (s *Store) catchUp(state indexState) error {
	packs, err := s.listPacks()
	if err != nil {
		return err
	}
	i, ok := slices.BinarySearch(packs, state.Pack)
	if state.Pack != 0 && !ok {
		return fmt.Errorf("%w: it stands in pack %d, which is missing", errIndex, state.Pack)
	}
	packs = packs[i:]
	start := location{Pack: state.Pack, Offset: state.Offset, Seq: state.Seq}
	if start.Seq == 0 {
		start.Seq = 1
	}
	if state.Pack != 0 {
		if size, err := s.packSize(state.Pack); err != nil || size < state.Offset {
			return fmt.Errorf("%w: it stands at %d of pack %d, which has %d bytes (%v)", errIndex, state.Offset, state.Pack, size, err)
		}
	}

	flushed := start.Seq - 1
	first := &scanner{s: s, packs: packs, next: start}
	for {
		r, err := first.step()
		if err != nil {
			return fmt.Errorf("scan packs: %w", err)
		}
		if r.end {
			break
		}
		if !r.gap {
			flushed = max(flushed, r.header.Flushed)
		}
	}

	x := &indexer{batch: s.index.NewIndexedBatch(), state: &state, keep: s.opts.TombstoneAge}
	second := &scanner{s: s, packs: packs, next: start}
	for {
		r, err := second.step()
		if err != nil {
			return fmt.Errorf("scan packs: %w", err)
		}
		if r.end {
			break
		}
		if r.gap {
			if r.loc.Seq > flushed {
				err = s.cutTail(packs, r.loc)
				if err != nil {
					return err
				}
				break
			}
			s.log.Error("shard store: a record is damaged; the others stay; partners and parity restore it",
				"pack", r.loc.Pack, "offset", r.loc.Offset, "sequence", r.loc.Seq)
			s.corruptRecords.Add(1)
			continue
		}
		m, err := s.readMeta(r.loc, r.header, r.header.Seq > flushed)
		if errors.Is(err, ErrCorrupt) {
			if r.header.Seq > flushed {
				if err := s.cutTail(packs, r.loc); err != nil {
					return err
				}
				break
			}
			s.log.Error("shard store: a record is damaged; the others stay; partners and parity restore it",
				"pack", r.loc.Pack, "offset", r.loc.Offset, "sequence", r.loc.Seq)
			s.corruptRecords.Add(1)
			continue
		}
		if err != nil {
			return fmt.Errorf("scan packs: %w", err)
		}
		if err := x.apply(logged{header: r.header, meta: m, loc: r.loc}); err != nil {
			return err
		}
		if x.batch.Count() >= batchRecordsMax {
			if err := x.commit(); err != nil {
				return err
			}
			x.batch = s.index.NewIndexedBatch()
		}
	}
	// A damaged record at the very end has been skipped, not applied.
	state.Seq = max(state.Seq, start.Seq, flushed+1)
	return s.resume(x)
}

// resume opens the last pack for appending after the last record.
func (s *Store) resume(x *indexer) error {
	packs, err := s.listPacks()
	if err != nil {
		return err
	}
	s.state = *x.state
	s.lastSeq = s.state.Seq - 1
	if len(packs) == 0 {
		if err := s.beginPack(1); err != nil {
			return err
		}
	} else {
		id := packs[len(packs)-1]
		f, err := s.opts.OpenFile(s.packPath(id), false)
		if err != nil {
			return err
		}
		size, err := f.Size()
		if err != nil {
			return errors.Join(err, f.Close())
		}
		if err := repairPackHeader(f, encodePackHeader(s.id, id)); err != nil {
			return errors.Join(err, f.Close())
		}
		// What was read from the page cache may not be on the device yet.
		if err := f.Sync(); err != nil {
			return errors.Join(err, f.Close())
		}
		s.pack = &openPack{File: f, id: id}
		s.packOffset = max(packHeaderBytes, (size+recordAlign-1)&^(recordAlign-1))
	}
	s.state.Pack, s.state.Offset = s.pack.id, s.packOffset
	s.flushed = s.lastSeq
	return x.commitAs(s.state)
}

// repairPackHeader writes the header that a crash or a bad block took.
func repairPackHeader(f File, want []byte) error {
	have := make([]byte, packHeaderBytes)
	if _, err := f.ReadAt(have, 0); err == nil && bytes.Equal(have, want) {
		return nil
	}
	return f.WriteVecAt([][]byte{want}, 0)
}

func (x *indexer) commitAs(state indexState) error {
	*x.state = state
	return x.commit()
}

// cutTail ends the log before loc: nothing from there on was ever answered.
func (s *Store) cutTail(packs []uint64, loc location) error {
	s.log.Info("shard store: end of log torn by a crash, cut", "pack", loc.Pack, "offset", loc.Offset, "sequence", loc.Seq)
	for _, id := range slices.Backward(packs) {
		if id > loc.Pack {
			s.files.forget(id)
			if err := os.Remove(s.packPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	f, err := s.files.acquire(loc.Pack)
	if err != nil {
		return err
	}
	defer s.files.release(f)
	if err := f.Truncate(loc.Offset); err != nil {
		return err
	}
	return errors.Join(f.Sync(), syncDir(filepath.Dir(s.packPath(loc.Pack))))
}

func (s *Store) packSize(id uint64) (int64, error) {
	f, err := s.files.acquire(id)
	if err != nil {
		return 0, err
	}
	defer s.files.release(f)
	return f.Size()
}

// readMeta reads and verifies the meta of the record at loc, and with whole
// set its data.
func (s *Store) readMeta(loc location, h recordHeader, whole bool) (meta, error) {
	f, err := s.files.acquire(loc.Pack)
	if err != nil {
		return meta{}, err
	}
	defer s.files.release(f)
	n := int64(h.Meta)
	if whole {
		n += int64(h.Data)
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, loc.Offset+recordHeaderBytes); err != nil {
		return meta{}, err
	}
	m, sums, err := verifyMeta(h, b[:h.Meta])
	if err != nil {
		return meta{}, err
	}
	if whole && !checkSums(sums, b[h.Meta:]) {
		return meta{}, ErrCorrupt
	}
	return m, nil
}

// openOrRebuild opens the index and catches it up; a damaged index is
// discarded and built anew.
func (s *Store) openOrRebuild() error {
	dir := filepath.Join(s.opts.Dir, "index")
	err := s.openAndCatchUp(dir)
	if err == nil || !rebuildable(err) {
		return err
	}
	s.log.Error("shard store: index is damaged, building it anew from the packs", "err", err)
	if s.index != nil {
		s.index.Close() // its state is being discarded
		s.index = nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return s.openAndCatchUp(dir)
}

func rebuildable(err error) bool {
	if errors.Is(err, errIndex) || pebble.IsCorruptionError(err) {
		return true
	}
	// Pebble marks only some damage as such. A missing file is damage; other
	// errors of the operating system (no memory, no descriptors) are not.
	var errno syscall.Errno
	return errors.Is(err, errIndexOpen) && (errors.Is(err, fs.ErrNotExist) || !errors.As(err, &errno))
}

var errIndexOpen = errors.New("open shard index")

func (s *Store) openAndCatchUp(dir string) (err error) {
	s.index, err = openIndex(dir, s.opts.IndexCacheBytes, s.indexFS)
	if err != nil {
		return fmt.Errorf("%w: %w", errIndexOpen, err)
	}
	state, _, err := get(s.index, stateKey, decodeIndexState)
	if err != nil {
		return err
	}
	return s.catchUp(state)
}

// beginPack creates the pack and makes it the one that is appended to. The
// flusher syncs file and directory before anything in it is answered.
func (s *Store) beginPack(id uint64) error {
	f, err := s.opts.OpenFile(s.packPath(id), true)
	if err != nil {
		return err
	}
	if err := f.WriteVecAt([][]byte{encodePackHeader(s.id, id)}, 0); err != nil {
		return errors.Join(err, f.Close(), os.Remove(s.packPath(id)))
	}
	if s.pack != nil {
		s.fullPacks = append(s.fullPacks, s.pack)
	}
	s.pack, s.packOffset, s.dirDirty = &openPack{File: f, id: id}, packHeaderBytes, true
	return nil
}

// loadID reads the store's id, or draws it for a new store.
func (s *Store) loadID(rand io.Reader) error {
	path := filepath.Join(s.opts.Dir, "store.id")
	packs, err := s.listPacks()
	if err != nil {
		return err
	}
	if b, err := os.ReadFile(path); err == nil {
		id, mark, err := decodePackHeader(b)
		if err == nil && mark == 0 {
			s.id = id
			return nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	id, ok := s.storeID(packs)
	if !ok {
		if len(packs) > 0 {
			return fmt.Errorf("%w: store.id and all %d pack headers are damaged: restore store.id", ErrCorrupt, len(packs))
		}
		if _, err := io.ReadFull(rand, id[:]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint64(id[:]) == 0 {
			id[0] = 1
		}
	}
	s.id = id
	return writeFileSync(path, encodePackHeader(id, 0))
}

// writeFileSync replaces the file durably.
func writeFileSync(path string, b []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(path+".new", path), syncDir(filepath.Dir(path)))
}

// lockDir takes the store's directory for this process.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s is in use by another process: %w", dir, err), f.Close())
	}
	return f, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
