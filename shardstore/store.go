package shardstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// Errors that callers tell apart with errors.Is.
var (
	ErrNotFound = errors.New("not in the store")
	ErrFull     = errors.New("store is full")
	ErrCorrupt  = errors.New("stored bytes are damaged")
	ErrDeleted  = errors.New("shard was deleted by its owner")
	ErrExists   = errors.New("another shard is stored under this name")
	ErrStale    = errors.New("a newer version is stored")
	ErrRange    = errors.New("range is outside the shard")
	ErrFailed   = errors.New("store has failed and takes no more changes") // a flush or write failed; reopen after repair
	ErrClosed   = errors.New("store is closed")
)

// Key names a shard: the blinded stripe id and the shard's number.
type Key struct {
	Blind [32]byte
	Index uint8
}

func (k Key) String() string { return fmt.Sprintf("%x/%d", k.Blind[:8], k.Index) }

// Store is safe for concurrent use.
type Store struct {
	opts  Options
	log   *slog.Logger
	id    [8]byte
	lock  *os.File // flocked: one process has the directory
	files *packFiles
	index *pebble.DB

	indexFS *indexFS // that index is on

	corruptRecords atomic.Uint64
	started        time.Time
	uptimeBase     uint64    // seconds before started
	lastRun        time.Time // when the last record of earlier runs was written, at the latest

	applyMu sync.Mutex // held over a change of the index; taken before mu

	mu         sync.Mutex // guards what follows; never held over a flush
	state      indexState // as of the last record in the index
	pack       *openPack  // appended to
	packOffset int64
	fullPacks  []*openPack // to be flushed and closed
	dirDirty   bool        // a pack was created
	lastSeq    uint64      // of the last record appended
	flushed    uint64      // highest sequence on the device and in the index
	queue      []logged    // appended, not in the index yet
	queueBytes uint64
	capacity   uint64            // pack bytes, as of the last look at the disk
	busy       map[string]uint64 // index key → last unflushed sequence that changes it
	marked     uint64            // sequence of the last mark
	failed     error
	closed     bool
	advanced   chan struct{} // closed and replaced when flushed or failed changes

	wake   chan struct{} // one token: the queue is not empty
	stop   chan struct{}
	closer sync.Once
	wg     sync.WaitGroup
}

// Open opens or creates the store and starts its goroutines. It returns when
// the index stands where the packs end.
func Open(opts Options) (*Store, error) {
	opts.EnsureDefaults()
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	s := &Store{
		opts:     opts,
		log:      opts.Logger,
		started:  opts.Now(),
		busy:     map[string]uint64{},
		advanced: make(chan struct{}),
		wake:     make(chan struct{}, 1),
		stop:     make(chan struct{}),
	}
	s.indexFS = newIndexFS(s.log, s.stop)
	s.files = &packFiles{path: s.packPath, openFile: opts.OpenFile, max: opts.OpenPacksMax, open: map[uint64]*openPack{}}
	err := os.MkdirAll(filepath.Join(opts.Dir, "packs"), 0o700)
	if err == nil {
		s.lock, err = lockDir(opts.Dir)
	}
	if err == nil {
		err = s.loadID(rand.Reader)
	}
	if err == nil {
		s.lastRun, err = s.lastWrite()
	}
	if err == nil {
		err = s.openOrRebuild()
	}
	if err == nil {
		err = s.measureDisk()
	}
	if err != nil {
		if s.index != nil {
			err = errors.Join(err, s.index.Close())
		}
		s.files.closeAll()
		if s.lock != nil {
			s.lock.Close() // the flock goes with it
		}
		return nil, fmt.Errorf("open shard store: %w", err)
	}
	s.uptimeBase = s.state.Uptime
	s.wg.Go(s.flusher)
	s.wg.Go(s.sweeper)
	return s, nil
}

// Close answers what is waiting, marks the end of the log and stops. Calls
// that read must have returned before it.
func (s *Store) Close() error {
	var err error
	s.closer.Do(func() {
		if merr := s.mark(context.Background()); merr != nil && !errors.Is(merr, ErrFailed) {
			err = merr
		}
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		close(s.stop)
		s.wg.Wait()
		err = errors.Join(err, s.flushIndex(), s.index.Close(), s.pack.Close())
		s.files.closeAll()
		err = errors.Join(err, s.lock.Close())
	})
	if err != nil {
		return fmt.Errorf("close shard store: %w", err)
	}
	return nil
}

// Uptime is how long the store has been open, over all its runs. What a crash
// takes of it is at most some minutes.
func (s *Store) Uptime() time.Duration {
	return time.Duration(s.uptimeBase)*time.Second + max(0, s.opts.Now().Sub(s.started))
}

// lastWrite is when the newest pack was written to.
func (s *Store) lastWrite() (time.Time, error) {
	packs, err := filepath.Glob(filepath.Join(s.opts.Dir, "packs", "*.pack"))
	if err != nil || len(packs) == 0 {
		return time.Time{}, err
	}
	info, err := os.Stat(packs[len(packs)-1]) // in the order of their numbers
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), nil
}

// uptime in seconds over all runs.
func (s *Store) uptime() uint64 {
	return s.uptimeBase + uint64(max(0, s.opts.Now().Sub(s.started)/time.Second))
}

// pending is a record that is ready to be appended.
type pending struct {
	kind recordKind
	meta []byte // sums and fields
	data [][]byte
}

func newPending(kind recordKind, m *meta, data ...[]byte) pending {
	return pending{kind: kind, meta: m.append(appendSums(nil, data), kind), data: data}
}

func (p *pending) dataBytes() (n int64) {
	for _, d := range p.data {
		n += int64(len(d))
	}
	return n
}

// change appends what build returns, or nothing when build returns none or an
// error, and returns the sequence to wait for, 0 for none. build runs with the
// index at its newest for these keys: a change of the same key that is not
// flushed yet is waited for first.
func (s *Store) change(ctx context.Context, key []byte, build func() (*pending, error)) (seq uint64, err error) {
	for {
		s.mu.Lock()
		earlier, busy := s.busy[string(key)]
		if !busy {
			break
		}
		s.mu.Unlock()
		if err := s.wait(ctx, earlier); err != nil {
			return 0, err
		}
	}
	defer s.mu.Unlock()
	p, err := build()
	if err != nil || p == nil {
		return 0, err
	}
	if seq, err = s.append(p); err != nil {
		return 0, err
	}
	s.busy[string(key)] = seq
	return seq, nil
}

// append writes one record to the page cache. s.mu is held.
func (s *Store) append(p *pending) (uint64, error) {
	if s.closed {
		return 0, ErrClosed
	}
	if s.failed != nil {
		return 0, s.failed
	}
	h := recordHeader{
		Kind: p.kind, Store: s.id, Seq: s.lastSeq + 1, Flushed: s.flushed, Uptime: s.uptime(),
		Meta: uint32(len(p.meta)), Data: uint32(p.dataBytes()), MetaCRC: crc32.Checksum(p.meta, castagnoli),
	}
	if h.Meta > metaBytesMax || p.dataBytes() > dataBytesMax {
		return 0, fmt.Errorf("record of %d bytes of meta and %d of data is too large", len(p.meta), p.dataBytes())
	}
	limited := p.kind == kindShard || p.kind == kindIndex || p.kind == kindHead
	if used := s.state.UsedBytes + s.queueBytes + uint64(h.bytes()); limited && used > s.capacity {
		return 0, fmt.Errorf("%w: %d of %d bytes used", ErrFull, s.state.UsedBytes+s.queueBytes, s.capacity)
	}
	if s.packOffset > packHeaderBytes && s.packOffset+h.bytes() > s.opts.PackBytes {
		if err := s.beginPack(s.pack.id + 1); err != nil {
			return 0, s.writeError(err)
		}
	}
	pad := h.bytes() - recordHeaderBytes - int64(h.Meta) - int64(h.Data)
	bufs := append([][]byte{h.encode(), p.meta}, p.data...)
	if err := s.pack.WriteVecAt(append(bufs, make([]byte, pad)), s.packOffset); err != nil {
		if terr := s.pack.Truncate(s.packOffset); terr != nil {
			s.fail(terr)
		}
		return 0, s.writeError(err)
	}
	m, _, err := decodeMeta(h, p.meta)
	if err != nil {
		panic(fmt.Sprintf("shard store: own record does not decode: %v", err))
	}
	if p.kind != kindCommit {
		m.Blob = nil // the index does not keep it
	}
	loc := location{Pack: s.pack.id, Offset: s.packOffset, Seq: h.Seq, Meta: h.Meta, Data: h.Data}
	s.queue = append(s.queue, logged{header: h, meta: m, loc: loc})
	s.queueBytes += uint64(h.bytes())
	s.packOffset += h.bytes()
	s.lastSeq = h.Seq
	if p.kind == kindMark {
		s.marked = h.Seq
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return h.Seq, nil
}

func (s *Store) writeError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return fmt.Errorf("write pack: %w", err)
}

// fail makes the store refuse changes for good: after a failed flush nobody
// knows what the device holds, and the next flush would lie. s.mu is held.
func (s *Store) fail(err error) {
	if s.failed == nil {
		s.failed = fmt.Errorf("%w: %w", ErrFailed, err)
		s.log.Error("shard store: failed, reads go on; check the disk and start the node again", "err", err)
		s.advance()
	}
}

// advance wakes all waiters. s.mu is held.
func (s *Store) advance() {
	close(s.advanced)
	s.advanced = make(chan struct{})
}

// wait returns when the record with this sequence is on the device.
func (s *Store) wait(ctx context.Context, seq uint64) error {
	for {
		s.mu.Lock()
		flushed, failed, advanced := s.flushed, s.failed, s.advanced
		s.mu.Unlock()
		switch {
		case seq <= flushed:
			return nil
		case failed != nil:
			return failed
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// flusher turns appended records into answers: one flush for all that have
// gathered, then the index, then the waiters.
func (s *Store) flusher() {
	idle := time.NewTimer(time.Hour)
	defer idle.Stop()
	for {
		select {
		case <-s.wake:
			s.flush()
			if err := s.measureDisk(); err != nil {
				s.log.Warn("shard store: the disk's free bytes are not known, the last figure stays", "err", err)
			}
			idle.Reset(time.Second)
		case err := <-s.indexFS.broken:
			s.mu.Lock()
			s.fail(err)
			s.mu.Unlock()
		case <-idle.C:
			s.mu.Lock()
			if s.failed == nil && s.lastSeq != s.marked {
				if _, err := s.append(&pending{kind: kindMark}); err != nil && !errors.Is(err, ErrClosed) {
					s.log.Warn("shard store: mark not written", "err", err)
				}
			}
			s.mu.Unlock()
		case <-s.stop:
			s.flush()
			return
		}
	}
}

func (s *Store) flush() {
	s.mu.Lock()
	queue, bytes := s.queue, s.queueBytes
	full, pack, dirDirty, failed := s.fullPacks, s.pack, s.dirDirty, s.failed
	s.queue, s.fullPacks, s.dirDirty = nil, nil, false
	s.mu.Unlock()
	if failed != nil || len(queue) == 0 {
		return
	}
	var err error
	for _, p := range full {
		err = errors.Join(err, p.Sync(), p.Close())
	}
	err = errors.Join(err, pack.Sync())
	if dirDirty {
		err = errors.Join(err, syncDir(filepath.Join(s.opts.Dir, "packs")))
	}
	if err == nil {
		err = s.applyAll(queue, bytes)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.fail(err)
		return
	}
	s.flushed = queue[len(queue)-1].header.Seq
	for _, r := range queue {
		for _, k := range busyKeys(r) {
			if s.busy[string(k)] <= s.flushed {
				delete(s.busy, string(k))
			}
		}
	}
	s.advance()
}

// applyAll brings flushed records into the index.
func (s *Store) applyAll(queue []logged, bytes uint64) error {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.mu.Lock()
	state := s.state
	s.mu.Unlock()
	x := &indexer{batch: s.index.NewIndexedBatch(), state: &state, keep: s.opts.TombstoneAge}
	for _, r := range queue {
		if err := x.apply(r); err != nil {
			return err
		}
	}
	if err := x.commit(); err != nil {
		return err
	}
	s.mu.Lock()
	s.state = state
	s.queueBytes -= bytes
	s.mu.Unlock()
	return nil
}

// busyKeys are the keys under which change may have noted the record.
func busyKeys(r logged) [][]byte {
	switch r.header.Kind {
	case kindShard, kindCommit, kindPartner, kindDelete, kindDrop:
		return [][]byte{shardKey(r.meta.Key)}
	case kindLock:
		return [][]byte{idKey(prefixLock, r.meta.ID)}
	case kindIndex, kindForget:
		return [][]byte{idKey(prefixIndex, r.meta.ID)}
	case kindHead:
		return [][]byte{idKey(prefixHead, r.meta.ID)}
	}
	return nil
}

// mark appends a record that says what has been flushed, and waits for it.
func (s *Store) mark(ctx context.Context) error {
	s.mu.Lock()
	if s.lastSeq == s.marked && s.flushed == s.lastSeq {
		s.mu.Unlock()
		return nil
	}
	last := s.lastSeq
	s.mu.Unlock()
	if err := s.wait(ctx, last); err != nil {
		return err
	}
	s.mu.Lock()
	seq, err := s.append(&pending{kind: kindMark})
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.wait(ctx, seq)
}

// Usage is what the store holds.
type Usage struct {
	CapacityBytes  uint64 // what packs may use: at most what they do and what the disk has free
	UsedBytes      uint64 // of packs, deleted bytes still kept included
	Shards         uint64
	Tombstones     uint64 // deleted shards whose bytes are kept
	CorruptRecords uint64 // damaged records met since Open
}

// Usage never waits for the disk.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Usage{
		CapacityBytes: s.capacity, UsedBytes: s.state.UsedBytes + s.queueBytes,
		Shards: s.state.Shards, Tombstones: s.state.Tombstones, CorruptRecords: s.corruptRecords.Load(),
	}
}
