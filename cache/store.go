package cache

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// Options of a Store. Zero fields take the defaults of EnsureDefaults.
type Options struct {
	Dir             string   // holds the store's files and nothing else; created if missing
	Key             [32]byte // device key; subkeys are derived from it
	SegmentBytes    int64    // size of a preallocated segment; default 64 MiB
	MaxJournalBytes int64    // cap of dirty bytes (WaitRoom); default 8 GiB
	MaxCleanBytes   int64    // cap of clean bytes on disk; default 8 GiB
	MaxMemoryBytes  int64    // cap of fetched slices kept in memory; default 64 MiB
	Logger          *slog.Logger
	FS              FS // default: OSFS
	// Repair makes Open go on where it would refuse: it makes a new tail file
	// from the segments, puts segments back under their names, and takes the
	// journal to end where it can be followed to. What it did is in Notes.
	Repair bool
}

// EnsureDefaults fills the fields that are zero.
func (o *Options) EnsureDefaults() {
	o.SegmentBytes = cmp.Or(o.SegmentBytes, 64<<20)
	o.MaxJournalBytes = cmp.Or(o.MaxJournalBytes, 8<<30)
	o.MaxCleanBytes = cmp.Or(o.MaxCleanBytes, 8<<30)
	o.MaxMemoryBytes = cmp.Or(o.MaxMemoryBytes, 64<<20)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.FS == nil {
		o.FS = OSFS{}
	}
}

// Validate reports all violations at once.
func (o *Options) Validate() error {
	var errs []error
	if o.Dir == "" {
		errs = append(errs, errors.New("Dir is empty: name a directory for the local store"))
	}
	if o.Key == ([32]byte{}) {
		errs = append(errs, errors.New("Key is zero: pass the device key"))
	}
	if o.SegmentBytes < 64<<10 || o.SegmentBytes > 1<<30 {
		errs = append(errs, fmt.Errorf("SegmentBytes is %d: use 64 KiB to 1 GiB", o.SegmentBytes))
	}
	if o.MaxJournalBytes < 2*o.SegmentBytes {
		errs = append(errs, fmt.Errorf("MaxJournalBytes is %d: use at least two segments (%d)", o.MaxJournalBytes, 2*o.SegmentBytes))
	}
	if o.MaxCleanBytes < 0 || o.MaxMemoryBytes < 0 {
		errs = append(errs, fmt.Errorf("MaxCleanBytes is %d, MaxMemoryBytes is %d: use 0 or more", o.MaxCleanBytes, o.MaxMemoryBytes))
	}
	return errors.Join(errs...)
}

// Ref says where a run of data lies. It is stored in extents and stays valid
// until the segment is evicted.
type Ref struct {
	Segment uint64
	Offset  uint32 // of the first sealed data block in the segment file
	Length  uint32 // plaintext bytes
	Nonce   uint64 // nonce counter of the first block
}

// State of a segment.
type State uint8

const (
	Dirty State = iota // pinned: the only copy of something
	Clean              // evictable: everything in it is published and placed
)

// SegmentInfo describes one segment on disk.
type SegmentInfo struct {
	ID uint64
	// FirstSeq and LastSeq are the records in it. LastSeq may be too high, never
	// too low, when the segment after it was evicted before this open.
	FirstSeq, LastSeq uint64
	Bytes             int64
	State             State
	Active            bool // still takes appends; call Rotate before MarkClean
}

// LostSegment is one whose records cannot be read any more: its file is
// missing, or is not what its name says. The file, if there is one, stays.
type LostSegment struct {
	ID     uint64
	Reason string
}

// Stats of a store at one moment.
type Stats struct {
	JournalBytes, JournalMaxBytes int64 // dirty segments
	CleanBytes, CleanMaxBytes     int64 // clean segments and fetched slices on disk
	MemoryBytes                   int64 // fetched slices in memory
	LastSeq, DurableSeq           uint64
	NoSpace                       bool  // the disk was full when the newest segment was wanted
	DamagedReads                  int64 // reads since Open that failed, or whose bytes did not verify
}

// Store is the local segment store. All methods may be called concurrently,
// but the order of concurrent Appends is then up to chance.
type Store struct {
	opts    Options
	session *session
	device  deviceKeys
	files   *handles
	buffers buffers
	noSpace atomic.Bool  // the disk was full when the newest segment was wanted
	damaged atomic.Int64 // reads that did not verify
	slices  *sliceCache
	uses    atomic.Uint64 // clock of the least-recently-used order
	lost    []LostSegment // found by Open; by ascending id
	notes   []string      // what else Open found

	// appendMu serialises writers of the active segment. Taken before mu.
	appendMu sync.Mutex
	metaBuf  []byte // scratch of Append

	// cleanMu serialises changes to the set of clean files. Taken before tailMu.
	cleanMu sync.Mutex

	// tailMu serialises writes of the tail file. Taken before mu.
	tailMu   sync.Mutex
	tailFile File
	tail     tailSlot // newest slot on disk
	tailLost bool     // the tail file held none, and a new one is made

	// mu guards what follows. Never held across a system call.
	mu             sync.RWMutex
	segments       map[uint64]*segment
	active         *segment // takes appends; nil until the first one
	nextID         uint64
	last           position   // of the newest frame appended
	durable        position   // of the newest frame whose flush returned
	acked          uint64     // newest sequence that Sync vouches for, ≤ durable.Seq
	unflushed      []*segment // in order; segments with frames after durable
	retired        []*segment // no longer active, not yet trimmed to their end
	unflushedBytes int64
	journalBytes   int64
	cleanBytes     int64
	broken         error         // sticky
	flushed        chan struct{} // closed and replaced after each flush
	room           chan struct{} // closed and replaced when journalBytes shrinks

	flushKick, cleanKick chan struct{}
	stop                 chan struct{}
	flusherDone          chan struct{}
	cleanerDone          chan struct{}
}

// segment is one file of frames. Fields that change are guarded by Store.mu.
type segment struct {
	id                uint64
	path              string
	keys              *session // aead of its frames; the counter is used by the active session only
	firstSeq, lastSeq uint64
	end               int64 // of the last frame
	state             State
	registered        bool    // its directory entry is durable
	dirtyOnDisk       bool    // the newest tail slot on disk lists it as dirty
	handle            *handle // held until the segment is retired, flushed and trimmed
	slots             uint64  // tail slots written; flusher only
	reserve           bool    // made of the space that data leaves free
	lastUse           atomic.Uint64
	damaged           atomic.Bool // a read did not verify, and the log says so
}

func (s *Store) path(name string) string      { return filepath.Join(s.opts.Dir, name) }
func (s *Store) segmentPath(id uint64) string { return s.path(segmentName(id)) }

const (
	tailName      = "tail"
	tailTempName  = "tail.new"
	segmentPrefix = "segment-"
	slicesPrefix  = "slices-"
)

func segmentName(id uint64) string { return fmt.Sprintf("%s%016x", segmentPrefix, id) }

// Open opens or creates the store in o.Dir, finds the end of the journal and
// makes all that it found durable. It changes no frame; the first Append
// starts a new segment.
//
// Dirty segments that are missing or damaged are listed by Lost; Replay says
// whether their records are needed.
//
// Errors: ErrCorrupt when the end of the journal cannot be known; errors of the
// file system.
func Open(o Options) (*Store, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("cache: open: %w", err)
	}
	s := &Store{
		opts:        o,
		session:     &session{},
		device:      deviceKeys{header: deviceAEAD(o.Key, "segment header"), tail: deviceAEAD(o.Key, "tail file")},
		files:       newHandles(o.FS),
		segments:    make(map[uint64]*segment),
		nextID:      1,
		flushed:     make(chan struct{}),
		room:        make(chan struct{}),
		flushKick:   make(chan struct{}, 1),
		cleanKick:   make(chan struct{}, 1),
		stop:        make(chan struct{}),
		flusherDone: make(chan struct{}),
		cleanerDone: make(chan struct{}),
	}
	if _, err := rand.Read(s.session.key[:]); err != nil {
		return nil, fmt.Errorf("cache: open: session key: %w", err)
	}
	s.session.aead = newGCM(s.session.key[:])
	s.slices = newSliceCache(o.MaxMemoryBytes)
	if err := s.recover(); err != nil {
		return nil, fmt.Errorf("cache: open %s: %w", o.Dir, errors.Join(err, s.closeFiles()))
	}
	go s.flusher()
	go s.cleaner()
	return s, nil
}

// Close flushes what was appended, writes the tail and waits for the store's
// goroutines. It returns the sticky error if there is one. Everything but Close
// answers ErrClosed afterwards.
func (s *Store) Close() error {
	s.appendMu.Lock()
	defer s.appendMu.Unlock()
	s.mu.Lock()
	if errors.Is(s.broken, ErrClosed) {
		s.mu.Unlock()
		return nil
	}
	s.retireLocked()
	s.mu.Unlock()

	close(s.stop)
	<-s.flusherDone
	<-s.cleanerDone

	s.mu.Lock()
	err := s.broken
	s.broken = ErrClosed
	close(s.flushed)
	s.flushed = make(chan struct{})
	close(s.room)
	s.room = make(chan struct{})
	s.mu.Unlock()

	if closeErr := s.closeFiles(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("cache: close: %w", err)
	}
	return nil
}

func (s *Store) closeFiles() error {
	for _, seg := range s.segments {
		if seg.handle != nil {
			s.files.release(seg.handle)
		}
	}
	s.files.close()
	if s.tailFile != nil {
		return s.tailFile.Close()
	}
	return nil
}

// fail makes err sticky: from now on the store is read-only.
func (s *Store) fail(op string, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken == nil {
		s.broken = fmt.Errorf("%w: %s: %w", ErrReadOnly, op, err)
		s.opts.Logger.Error("local store turned read-only; check the disk, then mount again", "op", op, "err", err)
		close(s.flushed)
		s.flushed = make(chan struct{})
		close(s.room)
		s.room = make(chan struct{})
	}
	return s.broken
}

// LastSeq is the sequence of the newest record, 0 for an empty journal.
func (s *Store) LastSeq() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.last.Seq
}

// Durable is the newest sequence that survives a power loss.
func (s *Store) Durable() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.acked
}

// Segments lists the segments on disk by ascending ID.
func (s *Store) Segments() []SegmentInfo {
	s.mu.RLock()
	defer s.mu.RUnlock()
	infos := make([]SegmentInfo, 0, len(s.segments))
	for _, seg := range s.segments {
		infos = append(infos, SegmentInfo{
			ID: seg.id, FirstSeq: seg.firstSeq, LastSeq: seg.lastSeq,
			Bytes: seg.end, State: seg.state, Active: seg == s.active,
		})
	}
	slices.SortFunc(infos, func(a, b SegmentInfo) int { return cmp.Compare(a.ID, b.ID) })
	return infos
}

// Lost lists the segments that should be there and cannot be used.
func (s *Store) Lost() []LostSegment {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clone(s.lost)
}

// Notes says, in sentences, what else Open found wrong or has repaired.
func (s *Store) Notes() []string { return s.notes }

// note keeps a sentence for Notes and logs it. Only while opening.
func (s *Store) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.notes = append(s.notes, text)
	s.opts.Logger.Warn("local state: " + text)
}

// Holds reports whether a segment is on disk.
func (s *Store) Holds(id uint64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.segments[id]
	return ok
}

// Stats reports sizes and positions.
func (s *Store) Stats() Stats {
	memory := s.slices.memoryBytes()
	s.mu.RLock()
	defer s.mu.RUnlock()
	return Stats{
		JournalBytes: s.journalBytes, JournalMaxBytes: s.opts.MaxJournalBytes,
		CleanBytes: s.cleanBytes, CleanMaxBytes: s.opts.MaxCleanBytes,
		MemoryBytes: memory, LastSeq: s.last.Seq, DurableSeq: s.acked, NoSpace: s.noSpace.Load(),
		DamagedReads: s.damaged.Load(),
	}
}

// isNoSpace tells a full disk from a failing one.
func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// kick wakes the goroutine that reads c, once.
func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
