package cache

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"time"
)

// flushEach is the longest time that an appended frame stays unflushed, and the
// idle time after which the tail is written alone.
const flushEach = time.Second

// Sync returns when a flush that covers the record seq has returned. All who
// wait share one flush.
//
// Errors: ErrReadOnly when a flush failed, now or earlier; ctx's error (the
// flush goes on); ErrClosed. Records that were durable before stay so.
func (s *Store) Sync(ctx context.Context, seq uint64) error {
	for {
		s.mu.RLock()
		acked, last, broken, flushed := s.acked, s.last.Seq, s.broken, s.flushed
		s.mu.RUnlock()
		switch {
		case seq <= acked:
			return nil
		case broken != nil:
			return broken
		case seq > last:
			return fmt.Errorf("cache: sync: record %d was never appended, the newest is %d", seq, last)
		}
		kick(s.flushKick)
		select {
		case <-flushed:
		case <-ctx.Done():
			return fmt.Errorf("cache: sync: %w", ctx.Err())
		}
	}
}

// flusher runs until Close: flushes on demand and each second, and writes the
// tail alone after a second without a commit.
func (s *Store) flusher() {
	defer close(s.flusherDone)
	ticker := time.NewTicker(flushEach)
	defer ticker.Stop()
	committed := false // since the last tick
	for {
		select {
		case <-s.flushKick:
			committed = s.flush() || committed
		case <-ticker.C:
			switch {
			case s.flush():
				committed = true
			case committed:
				committed = false
			default:
				s.settleTail()
			}
		case <-s.stop:
			s.flush()
			s.closeTail()
			return
		}
	}
}

// flush makes every appended frame durable: a group commit. It reports whether
// there was something to do. Failures are sticky.
//
// The tail slot goes into the newest segment and under the same flush. Slot and
// frames reach the disk in any order, so the slot names the position of the
// flush before. A segment's first flush also makes its name durable and enters
// it in the tail file, so that its loss would be noticed.
func (s *Store) flush() bool {
	s.mu.Lock()
	target, durable, segs, retired := s.last, s.durable, s.unflushed, s.retired
	if s.broken != nil || len(segs) == 0 && len(retired) == 0 {
		s.mu.Unlock()
		return false
	}
	s.unflushed, s.retired, s.unflushedBytes = nil, nil, 0
	s.mu.Unlock()

	if len(segs) > 0 {
		if err := s.flushSegments(segs, target, durable); err != nil {
			s.fail("flush", err)
			return true
		}
	}
	for _, seg := range retired {
		s.trim(seg)
	}
	return true
}

func (s *Store) flushSegments(segs []*segment, target, durable position) error {
	newest := segs[len(segs)-1]
	slot := tailSlot{Generation: newest.slots + 1, position: durable}
	page, err := slot.encode(newest.keys.aead, makeNonce(purposeSlot, newest.keys.take(1)), newest.id)
	if err != nil {
		return err
	}
	newest.slots++
	if _, err := newest.handle.WriteAt(page, slotAt+int64(slot.Generation%2)*pageBytes); err != nil {
		return err
	}
	fresh := false
	for _, seg := range segs {
		if err := seg.handle.Sync(); err != nil {
			return err
		}
		fresh = fresh || !seg.registered
	}
	if fresh {
		if err := s.opts.FS.SyncDir(s.opts.Dir); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.durable = target
	for _, seg := range segs {
		seg.registered = true
	}
	s.mu.Unlock()
	if fresh {
		if err := s.writeTail(false); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.acked = target.Seq
	close(s.flushed)
	s.flushed = make(chan struct{})
	s.mu.Unlock()
	return nil
}

// trim gives back the preallocated rest of a segment that takes no more frames.
// All its frames have been flushed.
func (s *Store) trim(seg *segment) {
	if err := seg.handle.Truncate(seg.end); err != nil {
		s.opts.Logger.Warn("could not trim a segment to its end; it keeps its preallocated size", "segment", seg.id, "err", err)
	}
	s.files.release(seg.handle)
	s.mu.Lock()
	seg.handle = nil
	s.mu.Unlock()
}

// settleTail writes the tail file if it is behind.
func (s *Store) settleTail() {
	s.tailMu.Lock()
	s.mu.RLock()
	behind := s.broken == nil && s.tail.Seq < s.durable.Seq
	for _, seg := range s.segments {
		behind = behind || s.broken == nil && seg.state == Clean && seg.dirtyOnDisk
	}
	s.mu.RUnlock()
	s.tailMu.Unlock()
	if behind {
		if err := s.writeTail(false); err != nil {
			s.fail("write tail", err)
		}
	}
}

// closeTail says in the tail file that the journal ends here: should a later
// open miss the newest segment, it knows what was in it.
func (s *Store) closeTail() {
	s.mu.RLock()
	broken := s.broken
	s.mu.RUnlock()
	if broken == nil {
		if err := s.writeTail(true); err != nil {
			s.fail("write tail", err)
		}
	}
}

// writeTail writes the durable position and the set of dirty segments to the
// older slot of the tail file and flushes it. closed: nothing is appended any
// more.
func (s *Store) writeTail(closed bool) error {
	s.tailMu.Lock()
	defer s.tailMu.Unlock()
	s.mu.RLock()
	if s.broken != nil {
		defer s.mu.RUnlock()
		return s.broken
	}
	slot := tailSlot{Generation: s.tail.Generation + 1, position: s.durable, Closed: closed}
	var listed []*segment
	for _, seg := range s.segments {
		if seg.state == Dirty && seg.registered {
			listed = append(listed, seg)
		}
	}
	for _, lost := range s.lost {
		slot.Dirty = append(slot.Dirty, lost.ID)
	}
	s.mu.RUnlock()
	for _, seg := range listed {
		slot.Dirty = append(slot.Dirty, seg.id)
	}
	slices.Sort(slot.Dirty)
	if err := s.putTail(slot); err != nil {
		return err
	}
	s.mu.Lock()
	for _, seg := range s.segments {
		seg.dirtyOnDisk = false
	}
	for _, seg := range listed {
		seg.dirtyOnDisk = true
	}
	s.mu.Unlock()
	return nil
}

// putTail writes one slot of the tail file and flushes it. Called under tailMu,
// or before the store is shared.
func (s *Store) putTail(slot tailSlot) error {
	var n nonce
	if _, err := rand.Read(n[:]); err != nil {
		return err
	}
	page, err := slot.encode(s.device.tail, n, 0)
	if err != nil {
		return err
	}
	if _, err := s.tailFile.WriteAt(page, int64(slot.Generation%2)*pageBytes); err != nil {
		return err
	}
	if err := s.tailFile.Sync(); err != nil {
		return err
	}
	s.tail = slot
	return nil
}
