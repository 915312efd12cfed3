package metastore

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// failState stops all writing after the first failed write, for good: what is
// on disk is unknown from then on, and only a new start finds out.
//
// Pebble retries a failed flush at once and without end. So once failed, a
// further write waits until Close instead of returning: the goroutine that
// retries comes to rest.
type failState struct {
	failed   chan struct{} // closed by the first failure
	released chan struct{} // closed by Close: waiting writes return

	mu      sync.Mutex // guards what follows
	err     error
	parking bool // failed writes wait; off while Open runs
	done    bool
	full    chan struct{} // closed while a write waits for room on the disk
	waiting int           // such writes
}

// roomRetry is how long a write waits for room on a full disk before the next try.
const roomRetry = time.Second

func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func newFailState() *failState {
	return &failState{failed: make(chan struct{}), released: make(chan struct{}), full: make(chan struct{})}
}

// waitRoom waits a while for room on a full disk. It returns false where that
// makes no sense: while the store is opened or closed, or has failed.
func (s *failState) waitRoom() bool {
	s.mu.Lock()
	if !s.parking || s.err != nil {
		s.mu.Unlock()
		return false
	}
	if s.waiting++; s.waiting == 1 {
		close(s.full)
	}
	s.mu.Unlock()
	retry := time.NewTimer(roomRetry)
	defer retry.Stop()
	again := false
	select {
	case <-retry.C:
		again = true
	case <-s.failed:
	case <-s.released:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting--; s.waiting == 0 {
		s.full = make(chan struct{})
	}
	return again
}

// noRoom is closed while a write waits for room on the disk.
func (s *failState) noRoom() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.full
}

// fail records the first failure and returns err.
func (s *failState) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = fmt.Errorf("%w: %w", ErrFailed, err)
		close(s.failed)
	}
}

func (s *failState) error() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// check is called before each write. After a failure it returns that failure;
// where the caller may park, only once the store is being closed.
func (s *failState) check(mayPark bool) error {
	s.mu.Lock()
	err, parking := s.err, s.parking
	s.mu.Unlock()
	if err != nil && parking && mayPark {
		<-s.released
	}
	return err
}

func (s *failState) park() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parking = !s.done
}

func (s *failState) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.done {
		s.done = true
		s.parking = false
		close(s.released)
	}
}
