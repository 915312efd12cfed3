package cache

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"
)

const (
	// flushEachBytes starts a flush before the next second is over.
	flushEachBytes = 64 << 20
	// metaReserveBytes is the room a segment keeps for the meta of its last
	// frame. Longer meta lets the file grow past its preallocated size.
	metaReserveBytes = 4 << 10
	// metaKeepBytes is the largest scratch buffer kept between appends.
	metaKeepBytes = 64 << 10
)

// Append adds one record: the sealed data (nil for metadata only) and the meta
// that build returns for the record's sequence and for the place of its data.
// build runs exactly once, under a lock of the store, and must not call it. When
// build fails nothing is appended and the sequence is not used up.
//
// When Append returns, the record is in the operating system's page cache: it
// survives the death of the process; Sync makes it survive power loss. Append
// waits for no flush. It takes over sd, also when it fails.
//
// Errors: build's error as it is; ErrTooLarge; ErrNoSpace when the disk is full
// even without clean files (nothing is appended, later calls may succeed);
// ErrReadOnly; ErrClosed.
func (s *Store) Append(sd *Sealed, build func(seq uint64, ref Ref) (meta []byte, err error)) (seq uint64, err error) {
	var data []byte
	var h frameHeader
	if sd != nil {
		defer s.buffers.put(sd.buf)
		data, h.DataNonce, h.DataLength = *sd.buf, sd.nonce, uint32(sd.length)
	}
	s.appendMu.Lock()
	defer s.appendMu.Unlock()
	s.mu.RLock()
	seg, last, broken := s.active, s.last, s.broken
	s.mu.RUnlock()
	if broken != nil {
		return 0, broken
	}
	fresh := seg == nil || seg.end > dataStart && seg.end+frameBytes+int64(len(data))+metaReserveBytes > s.opts.SegmentBytes
	// Data stays out of the reserve: what follows from it, and what deletes it,
	// still has to be noted.
	fresh = fresh || sd != nil && seg.reserve
	if fresh {
		if seg, err = s.createSegment(sd != nil); err != nil {
			return 0, err
		}
		defer func() {
			if err != nil {
				s.discardSegment(seg.handle, seg.path)
			}
		}()
	}

	h.Seq, h.Prev = last.Seq+1, last.Chain
	off := seg.end
	meta, err := build(h.Seq, Ref{
		Segment: seg.id, Offset: uint32(h.dataOffset(off)), Length: h.DataLength, Nonce: h.DataNonce,
	})
	if err != nil {
		return 0, err
	}
	if len(meta) > MaxMetaBytes {
		return 0, fmt.Errorf("cache: append: %w: meta of %d bytes, at most %d", ErrTooLarge, len(meta), MaxMetaBytes)
	}
	h.MetaLength, h.MetaNonce = uint32(len(meta)), s.session.take(1)
	var header [frameBytes]byte
	sealedMeta := s.sealMeta(&h, meta)
	h.encode(s.session.aead, seg.id, off, header[:])

	bufs := make([][]byte, 0, 3)
	for _, b := range [][]byte{header[:], data, sealedMeta} {
		if len(b) > 0 {
			bufs = append(bufs, b)
		}
	}
	if err := seg.handle.Writev(bufs, off); err != nil {
		// What was written of the frame is dead: it lies beyond the tail and
		// the next append overwrites its header under a nonce of its own.
		if isNoSpace(err) {
			return 0, fmt.Errorf("cache: append: %w: %w", ErrNoSpace, err)
		}
		return 0, s.fail("append", err)
	}
	s.appended(seg, position{Seq: h.Seq, Segment: seg.id, Offset: h.end(off), Chain: h.Chain}, fresh)
	return h.Seq, nil
}

// sealMeta sets the tag in h and returns the ciphertext, valid until the next call.
func (s *Store) sealMeta(h *frameHeader, meta []byte) []byte {
	n, aad := makeNonce(purposeMeta, h.MetaNonce), metaAAD(h.Seq)
	out := s.session.aead.Seal(s.metaBuf[:0], n[:], meta, aad[:])
	if cap(out) <= metaKeepBytes {
		s.metaBuf = out
	}
	copy(h.MetaTag[:], out[len(meta):])
	return out[:len(meta)]
}

// appended publishes a frame that has been written.
func (s *Store) appended(seg *segment, end position, fresh bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if fresh {
		s.retireLocked()
		s.active = seg
		s.segments[seg.id] = seg
		seg.firstSeq = end.Seq
		s.journalBytes += dataStart
	}
	if n := len(s.unflushed); n == 0 || s.unflushed[n-1] != seg {
		s.unflushed = append(s.unflushed, seg)
	}
	grown := end.Offset - seg.end
	seg.end, seg.lastSeq = end.Offset, end.Seq
	seg.lastUse.Store(s.uses.Add(1))
	s.last = end
	s.journalBytes += grown
	s.unflushedBytes += grown
	if s.unflushedBytes >= flushEachBytes {
		kick(s.flushKick)
	}
}

// reserveSegments is how many segments' worth of disk data leaves free: for the
// records with which the journal is published and deleted, and the metastore.
const reserveSegments = 2

// createSegment makes the next segment file, with its header. On a full disk
// clean files give way. A segment for data is made only where reserveSegments
// more would fit; others may take that space.
func (s *Store) createSegment(data bool) (*segment, error) {
	s.mu.Lock()
	id := s.nextID
	s.nextID++ // also when the creation fails: no id is used twice
	s.mu.Unlock()
	var n nonce
	if _, err := rand.Read(n[:]); err != nil {
		return nil, fmt.Errorf("cache: create segment %d: %w", id, err)
	}
	header := segmentHeader{ID: id, CreatedNs: time.Now().UnixNano(), Key: s.session.key}
	page := header.encode(s.device.header, n)

	name := s.segmentPath(id)
	h, err := s.files.acquire(name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err == nil {
		err = s.makeRoom((1 + reserveSegments) * s.opts.SegmentBytes)
		s.noSpace.Store(isNoSpace(err))
		reserve := isNoSpace(err) && !data
		if err == nil || reserve {
			for err = h.Allocate(s.opts.SegmentBytes); isNoSpace(err) && s.evictSome(); err = h.Allocate(s.opts.SegmentBytes) {
			}
		}
		if err == nil {
			_, err = h.WriteAt(page, 0)
		}
		if err == nil {
			return &segment{id: id, path: name, keys: s.session, end: dataStart, handle: h, reserve: reserve}, nil
		}
		s.discardSegment(h, name)
	}
	if isNoSpace(err) {
		return nil, fmt.Errorf("cache: create segment %d: %w: %w", id, ErrNoSpace, err)
	}
	return nil, s.fail("create segment", err)
}

// makeRoom removes clean files until so many bytes are free on the disk. It only
// looks: others need the disk too, and must not find it full meanwhile.
func (s *Store) makeRoom(bytes int64) error {
	for {
		free, err := s.opts.FS.Free(s.opts.Dir)
		if err != nil || free >= bytes {
			return err
		}
		if !s.evictSome() {
			return fmt.Errorf("%d of %d bytes are free: %w", free, bytes, syscall.ENOSPC)
		}
	}
}

// evictSome removes about a segment of clean files, and says whether there were any.
func (s *Store) evictSome() bool {
	freed, err := s.evict(max(0, s.cleanSize()-s.opts.SegmentBytes))
	if err != nil {
		s.opts.Logger.Warn("clean files could not be removed from a full disk", "err", err)
	}
	return freed > 0
}

// discardSegment undoes createSegment when the first frame did not come about.
// A file that stays would end the journal at the next open, so that is fatal.
func (s *Store) discardSegment(h *handle, name string) {
	s.files.release(h)
	if err := s.removeFile(name); err != nil {
		s.fail("remove unused segment", err)
	}
}

// removeFile unlinks a file. A reader that opened it just before keeps it until
// it is done; nobody else does.
func (s *Store) removeFile(name string) error {
	err := s.opts.FS.Remove(name)
	s.files.forget(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Rotate ends the active segment, so that it can be marked clean: the next
// Append starts a new one. Each segment costs a file and 12 KiB, so rotate when
// there is much to gain: before DropClean, or when the journal is near its cap.
func (s *Store) Rotate() error {
	s.appendMu.Lock()
	defer s.appendMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	s.retireLocked()
	return nil
}

// retireLocked ends the active segment; the flusher trims it to its end.
func (s *Store) retireLocked() {
	if s.active != nil {
		s.retired = append(s.retired, s.active)
		s.active = nil
	}
}
