package cache

import (
	"fmt"
	"slices"
)

// MarkClean makes a segment evictable. The caller proves that everything in it
// is placed and published, that a flushed state of the metastore no longer
// needs it for replay, and that no extent has its only copy there. A segment
// that is gone already is not an error. The state is entered in the tail file
// within seconds; a crash before that makes the segment dirty again.
//
// Errors: ErrActive for the segment that takes appends; ErrReadOnly; ErrClosed.
func (s *Store) MarkClean(id uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	seg := s.segments[id]
	switch {
	case s.broken != nil:
		return s.broken
	case seg == nil || seg.state == Clean:
		return nil
	case seg == s.active:
		return fmt.Errorf("cache: mark segment %d clean: %w", id, ErrActive)
	case seg.lastSeq > s.acked:
		return fmt.Errorf("cache: mark segment %d clean: its records up to %d are not durable yet (%d are)", id, seg.lastSeq, s.acked)
	}
	seg.state = Clean
	s.journalBytes -= seg.end
	s.cleanBytes += seg.end
	close(s.room)
	s.room = make(chan struct{})
	if s.cleanBytes > s.opts.MaxCleanBytes {
		kick(s.cleanKick)
	}
	return nil
}

// DropClean removes every clean byte, on disk and in memory, and returns how
// many bytes of disk that freed. The segment that takes appends stays, as do
// the segments and the fetched slices of the stripes that are to be kept, with
// what lies in the same files.
func (s *Store) DropClean(segments map[uint64]bool, stripes map[[16]byte]bool) (bytes int64, err error) {
	if len(stripes) > 0 {
		<-s.slices.indexed
	}
	s.mu.RLock()
	broken := s.broken
	s.mu.RUnlock()
	if broken != nil {
		return 0, broken
	}
	s.cleanMu.Lock()
	defer s.cleanMu.Unlock()
	s.slices.dropMemory(stripes)
	return s.evictLocked(0, func(seg *segment) bool { return segments[seg.id] }, func(file *sliceFile) bool {
		return len(stripes) > 0 && slices.ContainsFunc(file.keys, func(key sliceKey) bool { return stripes[key.stripe] })
	})
}

func (s *Store) cleanSize() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.cleanBytes
}

// evict removes the least recently used clean files until at most limit clean
// bytes are left.
func (s *Store) evict(limit int64) (freed int64, err error) {
	s.cleanMu.Lock()
	defer s.cleanMu.Unlock()
	return s.evictLocked(limit, func(*segment) bool { return false }, func(*sliceFile) bool { return false })
}

// evictLocked is evict for callers that hold cleanMu. It leaves what it is told to keep.
func (s *Store) evictLocked(limit int64, keepSegment func(*segment) bool, keepFile func(*sliceFile) bool) (freed int64, err error) {
	for s.cleanSize() > limit {
		seg := s.oldestClean(keepSegment)
		file := s.slices.oldest(keepFile)
		switch {
		case seg == nil && file == nil:
			return freed, nil
		case seg == nil || file != nil && file.lastUse.Load() < seg.lastUse.Load():
			freed += file.bytes
			err = s.removeSliceFile(file)
		default:
			freed += seg.end
			err = s.removeSegment(seg)
		}
		if err != nil {
			return freed, fmt.Errorf("cache: evict: %w", err)
		}
	}
	return freed, nil
}

func (s *Store) oldestClean(keep func(*segment) bool) (oldest *segment) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, seg := range s.segments {
		if seg.state == Clean && (oldest == nil || seg.lastUse.Load() < oldest.lastUse.Load()) && !keep(seg) {
			oldest = seg
		}
	}
	return oldest
}

// removeSegment removes a clean segment. The tail file stops listing it first:
// a segment that is listed and missing is corruption.
func (s *Store) removeSegment(seg *segment) error {
	s.mu.RLock()
	listed := seg.dirtyOnDisk
	s.mu.RUnlock()
	if listed {
		if err := s.writeTail(false); err != nil {
			return s.fail("write tail", err)
		}
	}
	s.mu.Lock()
	delete(s.segments, seg.id)
	s.cleanBytes -= seg.end
	s.mu.Unlock()
	return s.removeFile(seg.path)
}

// cleaner runs until Close: indexes the slice files of earlier opens, writes
// fetched slices to disk and keeps the clean bytes within their cap. The clean
// cache is optional: failures are logged and cost a fetch later.
func (s *Store) cleaner() {
	defer close(s.cleanerDone)
	s.indexSliceFiles()
	for {
		select {
		case item := <-s.slices.queue:
			s.storeSlice(item)
		case <-s.cleanKick:
		case <-s.stop:
			for {
				select {
				case item := <-s.slices.queue:
					s.storeSlice(item)
				default:
					s.endSliceFile()
					return
				}
			}
		}
		if _, err := s.evict(s.opts.MaxCleanBytes); err != nil {
			s.opts.Logger.Warn("could not shrink the clean cache", "err", err)
		}
	}
}
