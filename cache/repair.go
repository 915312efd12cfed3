package cache

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// lose notes a segment whose records cannot be read. It stays in the tail
// file's list until ForgetLost. Only while opening.
func (s *Store) lose(id uint64, reason string) {
	s.lost = append(s.lost, LostSegment{id, reason})
	slices.SortFunc(s.lost, func(a, b LostSegment) int { return cmp.Compare(a.ID, b.ID) })
	s.opts.Logger.Error("local state: a segment is lost; unmount and run defs fsck", "segment", id, "reason", reason)
}

// ForgetLost ends the list of lost segments and sets their files aside. The
// caller has seen to it that nothing refers to them.
func (s *Store) ForgetLost() error {
	names, err := s.opts.FS.ReadDir(s.opts.Dir)
	if err != nil {
		return fmt.Errorf("cache: forget lost segments: %w", err)
	}
	s.mu.Lock()
	lost := s.lost
	s.lost = nil
	s.mu.Unlock()
	// The list first: a segment that is listed and missing is lost.
	if err := s.writeTail(false); err != nil {
		return fmt.Errorf("cache: forget lost segments: %w", err)
	}
	for _, l := range lost {
		if name := segmentName(l.ID); slices.Contains(names, name) {
			if err := s.setAside(name); err != nil {
				return fmt.Errorf("cache: forget lost segments: %w", err)
			}
		}
	}
	return nil
}

// SkipTo makes the next record follow the sequence seq, where the journal has
// lost its end and the metastore has it. It may only be called before the
// first Append.
func (s *Store) SkipTo(seq uint64) error {
	s.mu.Lock()
	s.last.Seq, s.durable.Seq, s.acked = max(s.last.Seq, seq), max(s.durable.Seq, seq), max(s.acked, seq)
	s.mu.Unlock()
	return s.writeTail(false)
}

// setAside gives a damaged file a name that nobody looks for.
func (s *Store) setAside(name string) error {
	aside := fmt.Sprintf("%s.damaged-%d", name, time.Now().UnixNano())
	if err := s.opts.FS.Rename(s.path(name), s.path(aside)); err != nil {
		return err
	}
	s.files.forget(s.path(name))
	return s.opts.FS.SyncDir(s.opts.Dir)
}

// putBack renames segments to the names that their headers say, where no file
// is that segment under its own name. It returns the names of all files.
func (s *Store) putBack(names []string) ([]string, error) {
	const moving = ".moving" // two may have changed places
	names = slices.Clone(names)
	rename := func(from, to string) error {
		names = append(slices.DeleteFunc(names, func(n string) bool { return n == from }), to)
		return s.opts.FS.Rename(s.path(from), s.path(to))
	}
	right := make(map[string]bool)   // names under which the right file is, or will be
	wrong := make(map[string]string) // file → the name that its header says
	for _, name := range names {
		if _, ok := parseName(name, segmentPrefix); !ok {
			continue
		}
		switch belongs, err := s.nameInHeader(name); {
		case err != nil:
			return nil, err
		case belongs == name:
			right[name] = true
		case belongs != "":
			wrong[name] = belongs
		}
	}
	for name, belongs := range wrong {
		if right[belongs] {
			continue // a copy
		}
		right[belongs] = true
		if err := rename(name, belongs+moving); err != nil {
			return nil, err
		}
	}
	// Also those whose move was interrupted.
	for _, name := range slices.Clone(names) {
		to, ok := strings.CutSuffix(name, moving)
		if !ok {
			continue
		}
		if slices.Contains(names, to) {
			if err := s.setAside(to); err != nil {
				return nil, err
			}
		}
		if err := rename(name, to); err != nil {
			return nil, err
		}
		s.note("%s was under another name", to)
	}
	slices.Sort(names)
	return names, s.opts.FS.SyncDir(s.opts.Dir)
}

// nameInHeader returns the name that a segment's header gives it, "" where the
// header does not verify.
func (s *Store) nameInHeader(name string) (string, error) {
	f, err := s.files.acquire(s.path(name), os.O_RDWR)
	if err != nil {
		return "", err
	}
	head := make([]byte, pageBytes)
	err = readFull(f, head, 0)
	s.files.release(f)
	s.files.forget(s.path(name))
	if err != nil {
		return "", err
	}
	h, err := decodeSegmentHeader(s.device.header, head)
	if err != nil {
		return "", nil
	}
	return segmentName(h.ID), nil
}
