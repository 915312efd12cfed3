package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// headBytes is what open reads of each segment: header, slots, first frame header.
const headBytes = dataStart + frameBytes

// opened is a segment file as found at open.
type opened struct {
	*segment
	handle *handle
	size   int64
	slot   tailSlot
	hasPos bool     // slot is valid
	before position // of the frame before the first one, which this file's follows; Segment and Offset are 0
	torn   bool     // slots are written, none is valid
	err    error    // why the file cannot be used, wraps errInvalid; nil: it can
	fault  int64    // offset of err
}

// recover reads the tail, the segments' heads and the frames after the newest
// slot, and makes what it keeps durable. Nobody else uses s yet.
func (s *Store) recover() error {
	if err := s.opts.FS.MkdirAll(s.opts.Dir); err != nil {
		return err
	}
	names, err := s.opts.FS.ReadDir(s.opts.Dir)
	if err != nil {
		return err
	}
	if err := s.openTail(names); err != nil {
		return err
	}
	if s.opts.Repair {
		if names, err = s.putBack(names); err != nil {
			return err
		}
	}
	found, err := s.openSegments(names)
	defer func() {
		for _, o := range found {
			s.files.release(o.handle)
		}
	}()
	if err != nil {
		return err
	}
	usable, useless, err := s.classify(found)
	if err != nil {
		return err
	}
	tail, err := s.newestPosition(usable)
	if err != nil {
		return err
	}
	kept, dropped, end, err := s.scan(usable, tail)
	if err != nil {
		return err
	}
	if s.tailLost {
		for _, o := range dropped {
			s.lose(o.id, o.err.Error())
		}
		dropped = nil
		s.note("the tail file was damaged and is made anew; the segments end with record %d. Whether newer segments were lost cannot be known", end.Seq)
	}
	s.adopt(kept, end)
	if err := s.settle(kept, tail, end); err != nil {
		return err
	}
	for _, o := range append(useless, dropped...) {
		s.opts.Logger.Warn("removed a segment that holds nothing recoverable", "segment", o.id, "state", stateName(o.state), "reason", o.err)
		if err := s.removeFile(s.segmentPath(o.id)); err != nil {
			return err
		}
	}
	if len(useless)+len(dropped) > 0 {
		if err := s.opts.FS.SyncDir(s.opts.Dir); err != nil {
			return err
		}
	}
	return s.findSliceFiles(names)
}

func stateName(st State) string {
	if st == Clean {
		return "clean"
	}
	return "dirty"
}

// parseName returns the number in a file name such as "segment-000000000000002a".
func parseName(name, prefix string) (id uint64, ok bool) {
	digits, ok := strings.CutPrefix(name, prefix)
	if !ok || len(digits) != 16 {
		return 0, false
	}
	id, err := strconv.ParseUint(digits, 16, 64)
	return id, err == nil && id > 0
}

// openTail opens the tail file and reads the newest slot, or makes a new file:
// under a temporary name, so that a tail file is never half there.
func (s *Store) openTail(names []string) error {
	exists := slices.Contains(names, tailName)
	if !exists {
		for _, name := range names {
			if id, ok := parseName(name, segmentPrefix); ok {
				if s.opts.Repair {
					s.tailLost = true
					break
				}
				return &CorruptError{Op: "open", Reason: fmt.Sprintf("missing, but there is segment %d", id)}
			}
		}
		if err := s.createTail(); err != nil {
			return err
		}
	}
	f, err := s.opts.FS.OpenFile(s.path(tailName), os.O_RDWR)
	if err != nil {
		return err
	}
	s.tailFile = f
	pages := make([]byte, 2*pageBytes)
	if err := readFull(f, pages, 0); err != nil {
		return err
	}
	slot, ok, _ := newestSlot(s.device.tail, 0, pages)
	switch {
	case !ok && s.opts.Repair:
		s.tailLost = true
	case !ok:
		return &CorruptError{Op: "open", Reason: "no valid slot; wrong device key, or damaged"}
	case slot.Generation > 0:
		other := pages[(slot.Generation+1)%2*pageBytes:][:pageBytes]
		if _, err := decodeTailSlot(s.device.tail, 0, other); err != nil {
			s.note("one of the two slots of the tail file is damaged, or was torn by a power cut; the other one says that record %d was flushed", slot.Seq)
		}
	}
	s.tail = slot
	return nil
}

func (s *Store) createTail() error {
	f, err := s.opts.FS.OpenFile(s.path(tailTempName), os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(2 * pageBytes); err != nil {
		return err
	}
	s.tailFile = f
	defer func() { s.tailFile = nil }()
	if err := s.putTail(tailSlot{}); err != nil {
		return err
	}
	if err := s.opts.FS.Rename(s.path(tailTempName), s.path(tailName)); err != nil {
		return err
	}
	return s.opts.FS.SyncDir(s.opts.Dir)
}

// readFull reads len(p) bytes; what lies beyond the end of the file is zero.
func readFull(f File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	return err
}

// openSegments reads the heads of all segment files, by ascending id.
func (s *Store) openSegments(names []string) ([]*opened, error) {
	var found []*opened
	sessions := make(map[[32]byte]*session)
	for _, name := range names { // sorted: ascending ids
		id, ok := parseName(name, segmentPrefix)
		if !ok {
			continue
		}
		h, err := s.files.acquire(s.path(name), os.O_RDWR)
		if err != nil {
			return found, err
		}
		o := &opened{segment: &segment{id: id, path: s.path(name)}, handle: h}
		found = append(found, o)
		if o.size, err = h.Size(); err != nil {
			return found, err
		}
		head := make([]byte, headBytes)
		if err := readFull(h, head, 0); err != nil {
			return found, err
		}
		header, err := decodeSegmentHeader(s.device.header, head)
		if err != nil || header.ID == id { // a copy under another name counts for nothing
			s.nextID = max(s.nextID, id+1)
		}
		if err != nil {
			o.err = err
			continue
		}
		if header.ID != id {
			o.err = fmt.Errorf("segment header %w: it is of segment %d", errInvalid, header.ID)
			continue
		}
		keys := sessions[header.Key]
		if keys == nil {
			keys = &session{key: header.Key, aead: newGCM(header.Key[:])}
			sessions[header.Key] = keys
		}
		o.keys = keys
		o.slot, o.hasPos, o.torn = newestSlot(keys.aead, id, head[slotAt:dataStart])
		first, err := decodeFrameHeader(keys.aead, id, dataStart, head[dataStart:])
		if err != nil {
			o.err, o.fault = err, dataStart
			continue
		}
		o.firstSeq = first.Seq
		o.before = position{Seq: first.Seq - 1, Chain: first.Prev}
	}
	s.nextID = max(s.nextID, s.tail.Segment+1)
	return found, nil
}

// classify checks the files against the tail file's list. useless are files
// without a usable frame: damaged clean ones, and ones that no flush covered.
func (s *Store) classify(found []*opened) (usable, useless []*opened, err error) {
	byID := make(map[uint64]*opened, len(found))
	for _, o := range found {
		byID[o.id] = o
	}
	for _, id := range s.tail.Dirty {
		o := byID[id]
		lost := &CorruptError{Op: "open", Segment: id, Reason: "the file is missing"}
		if o != nil {
			o.registered, o.dirtyOnDisk = true, true
			if o.err == nil && !o.torn {
				continue
			}
			if o.err == nil {
				o.err, o.fault = fmt.Errorf("tail slots: %w", errInvalid), slotAt
			}
			lost.Offset, lost.Reason = o.fault, o.err.Error()
		}
		// Only of a store that was closed the tail file knows the last record.
		newest := id == s.tail.Segment && !s.tail.Closed && !s.opts.Repair
		switch {
		case newest:
			lost.Reason += fmt.Sprintf("; it is the newest one, and changes after record %d may have been in it", s.tail.Seq)
			return nil, nil, lost
		case o != nil && o.torn:
			s.opts.Logger.Warn("both tail slots of a segment are damaged; its records are followed by their own hashes", "segment", id)
			o.err = nil
		default:
			s.lose(id, lost.Reason)
		}
	}
	var before uint64
	for _, o := range found {
		if !o.registered && o.id <= s.tail.Segment {
			o.state, o.registered = Clean, true
		}
		switch {
		case o.err == nil:
		case o.registered && o.state == Dirty:
			continue // lost
		case s.tailLost:
			s.lose(o.id, o.err.Error())
			continue
		default:
			useless = append(useless, o)
			continue
		}
		if o.registered {
			if o.firstSeq <= before {
				return nil, nil, &CorruptError{Op: "open", Segment: o.id, Offset: dataStart,
					Reason: fmt.Sprintf("begins with record %d, an older segment with %d", o.firstSeq, before)}
			}
			before = o.firstSeq
		}
		usable = append(usable, o)
	}
	return usable, useless, nil
}

// newestPosition is the highest position whose flush had returned: of the tail
// file, or of a slot in the segments that it does not cover yet.
func (s *Store) newestPosition(usable []*opened) (position, error) {
	best := s.tail.position
	if s.tailLost && len(usable) > 0 {
		best = usable[0].before
	}
	for _, o := range usable {
		if o.id < s.tail.Segment || !o.hasPos || o.state == Clean {
			continue
		}
		if o.slot.Segment > o.id || len(o.slot.Dirty) > 0 {
			return best, &CorruptError{Op: "open", Segment: o.id, Offset: slotAt, Reason: "a tail slot names a later segment"}
		}
		if o.slot.Seq > best.Seq {
			best = o.slot.position
		}
	}
	if best != s.tail.position && !s.tailLost && !slices.ContainsFunc(usable, func(o *opened) bool { return o.id == best.Segment }) {
		return best, &CorruptError{Op: "open", Segment: best.Segment,
			Reason: fmt.Sprintf("the file is missing, a tail slot names its record %d", best.Seq)}
	}
	return best, nil
}

// scan follows the frames after tail, verifying header, data and meta, up to
// the first that does not verify. dropped are the segments beyond that one.
func (s *Store) scan(usable []*opened, tail position) (kept, dropped []*opened, end position, err error) {
	end = tail
	scratch := s.buffers.get(readBufferBytes(readBlocksMax))
	defer s.buffers.put(scratch)
	at := slices.IndexFunc(usable, func(o *opened) bool { return o.id >= tail.Segment })
	if at < 0 {
		return usable, nil, end, nil
	}
	for i, o := range usable[at:] {
		off := int64(dataStart)
		if o.id == tail.Segment {
			off = tail.Offset
		}
		end, err = newFrameReader(o.handle.File, o.segment).follow(end, off, *scratch)
		if err != nil {
			return nil, nil, end, err
		}
		if end.Segment != o.id && o.id != tail.Segment { // its first frame is no good: the end
			dropped = usable[at+i:]
			for _, beyond := range dropped {
				beyond.err = fmt.Errorf("records from %d on %w after record %d", o.firstSeq, errInvalid, end.Seq)
			}
			return usable[:at+i], dropped, end, nil
		}
	}
	return usable, nil, end, nil
}

// adopt enters the kept segments into the store.
func (s *Store) adopt(kept []*opened, end position) {
	for i, o := range kept {
		o.lastSeq, o.end = end.Seq, o.size
		if i+1 < len(kept) {
			o.lastSeq = kept[i+1].firstSeq - 1
		}
		if o.id == end.Segment {
			o.end = end.Offset
		}
		o.lastUse.Store(s.uses.Add(1))
		s.segments[o.id] = o.segment
		if o.state == Clean {
			s.cleanBytes += o.end
		} else {
			s.journalBytes += o.end
		}
	}
	s.last, s.durable, s.acked = end, end, end.Seq
}

// rewrite writes what a file holds of a range once more. After a flush that has failed the kernel takes the pages for
// clean: it shows them to readers, and no later flush would write them.
func rewrite(f File, from, to int64) error {
	buf := make([]byte, min(max(to-from, 0), 1<<20))
	for ; from < to; from += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), to-from)]
		if err := readFull(f, buf, from); err != nil {
			return err
		}
		if _, err := f.WriteAt(buf, from); err != nil {
			return err
		}
	}
	return nil
}

// settle makes frames found beyond the slot durable and trims the last segment.
func (s *Store) settle(kept []*opened, tail, end position) error {
	if end != tail || tail != s.tail.position || s.tailLost {
		for _, o := range kept {
			if o.id < s.tail.Segment || o.state == Clean {
				continue
			}
			from, to := int64(0), o.size
			if o.id == s.tail.Segment {
				from = s.tail.Offset
			}
			if o.id == end.Segment {
				to = min(to, end.Offset)
			}
			if err := rewrite(o.handle, from, to); err != nil {
				return err
			}
			if err := o.handle.Sync(); err != nil {
				return err
			}
			o.registered = true
		}
		if err := s.opts.FS.SyncDir(s.opts.Dir); err != nil {
			return err
		}
		if err := s.writeTail(false); err != nil {
			return err
		}
	}
	for _, o := range kept {
		if o.id == end.Segment && o.size > end.Offset {
			if err := o.handle.Truncate(end.Offset); err != nil {
				return err
			}
		}
	}
	return nil
}
