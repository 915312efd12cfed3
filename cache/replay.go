package cache

import (
	"errors"
	"fmt"
	"os"
)

// Replay calls fn for each record after the sequence `after`, in order. It
// needs no segment whose records all lie at or below it. Call it before the
// first Append. fn must not keep meta.
//
// Errors: ErrCorrupt (a *CorruptError) when records are missing, out of order or
// do not verify: Open found the end of the journal, so all up to LastSeq must
// be there; fn's error as it is.
func (s *Store) Replay(after uint64, fn func(seq uint64, meta []byte) error) error {
	s.mu.RLock()
	last, broken := s.last, s.broken
	s.mu.RUnlock()
	if broken != nil && !errors.Is(broken, ErrReadOnly) {
		return broken
	}
	if after > last.Seq {
		return &CorruptError{Op: "replay", Segment: last.Segment, Offset: last.Offset,
			Reason: fmt.Sprintf("the journal ends with record %d, record %d was applied", last.Seq, after)}
	}
	next, known := after+1, chain{}
	hasChain := after == 0
	for _, info := range s.Segments() {
		if info.LastSeq <= after {
			continue
		}
		if info.FirstSeq > next {
			return &CorruptError{Op: "replay", Segment: info.ID, Offset: dataStart,
				Reason: fmt.Sprintf("records %d to %d before it are missing", next, info.FirstSeq-1)}
		}
		end, err := s.replaySegment(info, next, known, hasChain, fn)
		if err != nil {
			return err
		}
		next, known, hasChain = end.Seq+1, end.Chain, true
	}
	if next <= last.Seq {
		return &CorruptError{Op: "replay", Segment: last.Segment, Offset: last.Offset,
			Reason: fmt.Sprintf("records %d to %d are missing", next, last.Seq)}
	}
	return nil
}

// replaySegment walks the segment's frames, up to info.LastSeq, and calls fn
// from the record next on. prev is the chain before its first frame, if known.
func (s *Store) replaySegment(info SegmentInfo, next uint64, prev chain, hasPrev bool, fn func(uint64, []byte) error) (end position, err error) {
	s.mu.RLock()
	seg := s.segments[info.ID]
	s.mu.RUnlock()
	off := int64(dataStart)
	corrupt := func(reason string) (position, error) {
		return end, &CorruptError{Op: "replay", Segment: info.ID, Offset: off, Reason: reason}
	}
	if seg == nil {
		return corrupt("the segment was evicted")
	}
	file, err := s.files.acquire(s.segmentPath(info.ID), os.O_RDWR)
	if err != nil {
		return end, fmt.Errorf("cache: replay segment %d: %w", info.ID, err)
	}
	defer s.files.release(file)
	r := newFrameReader(file.File, seg)
	for seq := info.FirstSeq; seq <= info.LastSeq; seq++ {
		h, err := r.header(off)
		if err != nil {
			return r.failed(corrupt, err)
		}
		if h.Seq != seq {
			return corrupt(fmt.Sprintf("record %d where %d belongs", h.Seq, seq))
		}
		if hasPrev && h.Prev != prev {
			return corrupt(fmt.Sprintf("record %d does not follow the one before", seq))
		}
		if seq >= next {
			meta, err := r.meta(off, h)
			if err != nil {
				return r.failed(corrupt, err)
			}
			if err := fn(seq, meta); err != nil {
				return end, err
			}
		}
		off = h.end(off)
		prev, hasPrev = h.Chain, true
		end = position{Seq: seq, Segment: info.ID, Offset: off, Chain: h.Chain}
	}
	return end, nil
}
