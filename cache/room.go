package cache

import (
	"context"
	"fmt"
	"time"
)

// What WaitRoom does as the journal fills up.
const (
	slowFrom = 0.75                  // share of MaxJournalBytes above which writers are slowed
	slowMax  = 20 * time.Millisecond // delay of one write just below the cap
	stallMax = 20 * time.Second      // longest wait at the cap without progress
)

// WaitRoom waits until the journal has room for n more bytes. Above three
// quarters of MaxJournalBytes it slows the caller, up to 20 ms; at the cap it
// blocks until a segment turns clean. The active segment counts too: Rotate it
// when its records are placed. Call WaitRoom before taking the order lock.
//
// Errors: ErrNoSpace when nothing turned clean for 20 s or n can never fit;
// ctx's error; the sticky error.
func (s *Store) WaitRoom(ctx context.Context, n int64) error {
	limit := s.opts.MaxJournalBytes
	if n > limit {
		return fmt.Errorf("cache: wait for room: %w: %d bytes are more than the journal's cap of %d", ErrNoSpace, n, limit)
	}
	for {
		s.mu.RLock()
		full, room, broken := s.journalBytes+n, s.room, s.broken
		s.mu.RUnlock()
		if broken != nil {
			return broken
		}
		slow := int64(slowFrom * float64(limit))
		if full <= slow {
			return nil
		}
		blocked := full > limit
		wait := stallMax
		if !blocked {
			wait = time.Duration(float64(slowMax) * float64(full-slow) / float64(limit-slow))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("cache: wait for room: %w", ctx.Err())
		case <-room: // the journal shrank: look again, with a fresh timer
			timer.Stop()
		case <-timer.C:
			if !blocked {
				return nil
			}
			return fmt.Errorf("cache: wait for room: %w: the journal holds %d of %d bytes and nothing was placed for %v; check that peers are reachable",
				ErrNoSpace, full-n, limit, stallMax)
		}
	}
}
