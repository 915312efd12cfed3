package cache

import (
	"errors"
	"fmt"
)

// Kinds of error. Every error of the package wraps one of these or an error
// of the file system.
var (
	// ErrReadOnly: a write or flush failed earlier. The failure is sticky:
	// what the store holds can still be read, nothing is accepted any more.
	ErrReadOnly = errors.New("local store is read-only after a failed write or flush")
	// ErrCorrupt: bytes that were once safely on disk no longer verify.
	ErrCorrupt = errors.New("local store is corrupt")
	// ErrEvicted: the segment of a Ref was clean and has been removed; its
	// bytes must be fetched from the peers.
	ErrEvicted = errors.New("segment is no longer in the local store")
	// ErrNoSpace: the disk is full, or the journal is at its cap and did not
	// shrink for 20 s.
	ErrNoSpace = errors.New("no space in the local store")
	// ErrTooLarge: a run of data or a record's meta is over the format's limit.
	ErrTooLarge = errors.New("record is too large")
	// ErrActive: the segment still takes appends (see Rotate).
	ErrActive = errors.New("segment is still being appended to")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("local store is closed")
)

// CorruptError says where bytes failed to verify. It unwraps to ErrCorrupt.
type CorruptError struct {
	Op      string // the operation that found it: "open", "replay", "read"
	Segment uint64 // 0: the tail file
	Offset  int64  // in the segment file
	Reason  string
}

func (e *CorruptError) Error() string {
	place := fmt.Sprintf("segment %d", e.Segment)
	if e.Segment == 0 {
		place = "tail file"
	}
	return fmt.Sprintf("cache: %s: %s, offset %d: %s: %v", e.Op, place, e.Offset, e.Reason, ErrCorrupt)
}

func (e *CorruptError) Unwrap() error { return ErrCorrupt }
