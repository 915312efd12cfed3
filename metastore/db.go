package metastore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
)

const (
	blockCacheBytes  = 64 << 20
	memTableBytes    = 16 << 20
	openFilesMax     = 128
	bloomBits        = 10
	manifestBytesMax = 1 << 20

	// Apply waits while more than this many bytes of memtables wait for their
	// flush, or this many runs of tables for their compaction.
	unflushedBytesMax = 4 * memTableBytes
	sublevelsMax      = 40
	// fullMax is how long Apply waits, with so much unflushed, for room on a
	// full disk.
	fullMax = 20 * time.Second
	// gateBytes is how much is applied between two looks at those figures.
	gateBytes = 1 << 20

	schemaVersion = 1
)

// Journal is what the metastore needs of the local segment store.
type Journal interface {
	// Sync returns when every record up to seq is on stable storage.
	Sync(ctx context.Context, seq uint64) error
}

// Options of a metastore. Dir and Journal are required.
type Options struct {
	Dir     string   // made when missing
	Key     [32]byte // the device's key; seals every file
	Journal Journal  // whose records are applied
	FS      vfs.FS   // where Dir is; nil = the operating system's. Tests pass others (package crashfs)
	Logger  *slog.Logger
}

// EnsureDefaults fills what may be left out.
func (o *Options) EnsureDefaults() {
	if o.FS == nil {
		o.FS = vfs.Default
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports every violation at once.
func (o *Options) Validate() error {
	var errs []error
	if o.Dir == "" {
		errs = append(errs, errors.New("metastore options: Dir is empty; name a directory"))
	}
	if o.Journal == nil {
		errs = append(errs, errors.New("metastore options: Journal is nil; pass the local segment store"))
	}
	return errors.Join(errs...)
}

// DB is the tree at the newest applied record. Reads may run concurrently with
// each other and with Apply; the caller runs one Apply at a time, in journal
// order. No method may be called after Close.
type DB struct {
	reader
	pebble   *pebble.DB
	cache    *pebble.Cache
	fs       *sealedFS
	dir      string
	logger   *slog.Logger
	progress chan struct{} // one slot: a flush or compaction ended

	// applying is the newest record that may be in Pebble's memory. The
	// write-ahead rule needs it.
	applying atomic.Uint64
	applied  atomic.Uint64
	closed   atomic.Bool
	pending  *pending // the records after applying, through applied

	applyMu   sync.Mutex // guards what follows; held by Apply
	gateLeft  int        // bytes to apply before the gate is looked at
	mutations []mutation
	// mover runs move. What follows is move's while it runs, else the holder's
	// of applyMu.
	mover      sync.WaitGroup
	moveErr    error
	generation uint64
	key        []byte

	anchorMu sync.Mutex // guards anchored and the anchor file
	anchored uint64     // position in the anchor file
}

// Open opens the metastore in o.Dir, or makes an empty one. Replay the journal
// from Applied before anything else. ErrCorrupt says that files were damaged,
// are sealed with another key, or are older than they were; rebuild the
// metastore then from the published log and the journal.
func Open(o Options) (*DB, error) {
	o.EnsureDefaults()
	return open(o, o.FS, memTableBytes)
}

func open(o Options, inner vfs.FS, memTableBytes uint64) (*DB, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	db := &DB{
		dir:      o.Dir,
		logger:   o.Logger,
		progress: make(chan struct{}, 1),
		gateLeft: gateBytes,
		pending:  newPending(),
	}
	var err error
	if db.fs, err = newSealedFS(inner, o.Key, db.beforeSync(o.Journal)); err != nil {
		return nil, fmt.Errorf("metastore: open: %w", err)
	}
	db.cache = pebble.NewCache(blockCacheBytes)
	if db.pebble, err = db.openPebble(db.pebbleOptions(memTableBytes)); err != nil {
		return nil, openError(err)
	}
	db.reader = reader{src: newest{db}}
	if err := db.load(); err != nil {
		return nil, errors.Join(wrapError("open", err), db.close())
	}
	db.fs.state.park()
	return db, nil
}

// openFailedWait is how long Pebble may take to open after a write has failed.
const openFailedWait = 2 * time.Second

// openPebble opens Pebble, which repeats a failed flush without end while it
// opens. It is left behind then, at rest, until the process ends.
func (db *DB) openPebble(options *pebble.Options) (*pebble.DB, error) {
	type result struct {
		db  *pebble.DB
		err error
	}
	opened := make(chan result, 1)
	go func() {
		p, err := pebble.Open(db.dir, options)
		if err != nil {
			db.cache.Unref()
		}
		opened <- result{p, err}
	}()
	select {
	case r := <-opened:
		return r.db, r.err
	case <-db.fs.state.failed:
	}
	select {
	case r := <-opened:
		return r.db, r.err
	case <-time.After(openFailedWait):
		db.fs.state.park() // the flush waits at its next write
		return nil, db.fs.state.error()
	}
}

// openError tells damage from a disk that fails: Pebble has many words for files
// that are missing or do not fit each other.
func openError(err error) error {
	var errno syscall.Errno
	if errors.Is(err, ErrFailed) || errors.As(err, &errno) && errno != syscall.ENOENT {
		return wrapError("open", err)
	}
	if !errors.Is(err, ErrCorrupt) {
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return wrapError("open", err)
}

// load reads the position and checks that the state is not older than what
// Flushed promised before.
func (db *DB) load() error {
	schema, err := db.number(keySchema)
	if err != nil {
		return err
	}
	if schema > schemaVersion {
		return fmt.Errorf("layout version %d is newer than this program's %d: upgrade the program", schema, schemaVersion)
	}
	applied, err := db.number(keyApplied)
	if err != nil {
		return err
	}
	if db.generation, err = db.number(keyGeneration); err != nil {
		return err
	}
	if db.anchored, err = readAnchor(db.fs, db.dir); err != nil {
		return err
	}
	if applied < db.anchored {
		return fmt.Errorf("state is at journal record %d but was flushed through %d: files are missing or were rolled back: %w",
			applied, db.anchored, ErrCorrupt)
	}
	db.applying.Store(applied)
	db.applied.Store(applied)
	return nil
}

func (db *DB) pebbleOptions(memTableBytes uint64) *pebble.Options {
	po := &pebble.Options{
		FS:                 db.fs,
		DisableWAL:         true,
		FormatMajorVersion: pebble.FormatNewest,
		Comparer:           comparer(),
		Cache:              db.cache,
		MemTableSize:       memTableBytes,
		MaxOpenFiles:       openFilesMax,
		// The limits of Pebble would stop Apply where nothing can wake it after
		// a failed flush. They are out of reach: see gate.
		MemTableStopWritesThreshold: int(16 * unflushedBytesMax / memTableBytes),
		L0StopWritesThreshold:       1000,
		MaxManifestFileSize:         manifestBytesMax,
		// One sync per table, at its end, as the sealed files expect.
		BytesPerSync: math.MaxInt,
		Logger:       pebbleLogger{logger: db.logger, fail: db.fs.state.fail},
		EventListener: &pebble.EventListener{
			BackgroundError: func(err error) {
				// Called under Pebble's lock: only take note.
				db.logger.Error("metastore: background work failed", "err", err)
				if pebble.IsCorruptionError(err) || errors.Is(err, ErrCorrupt) {
					// Compaction cannot get past it, so tables would pile up.
					db.fs.state.fail(err)
				}
				db.wake()
			},
			DataCorruption: func(info pebble.DataCorruptionInfo) {
				db.logger.Error("metastore: a table is corrupt; run fsck, then rebuild from the published log", "details", info)
			},
			FlushEnd:      func(pebble.FlushInfo) { db.wake() },
			CompactionEnd: func(pebble.CompactionInfo) { db.wake() },
		},
	}
	for i := range po.Levels {
		po.Levels[i].FilterPolicy = bloom.FilterPolicy(bloomBits)
		po.Levels[i].FilterType = pebble.TableFilter
		po.Levels[i].BlockSize = 8 << 10
	}
	return po
}

// beforeSync returns the write-ahead rule: whatever a file may hold must be in
// the journal on stable storage before the file is. It runs in Pebble's
// goroutines without Pebble's lock.
func (db *DB) beforeSync(journal Journal) func() error {
	return func() error {
		seq := db.applying.Load()
		if seq == 0 {
			return nil
		}
		if err := journal.Sync(context.Background(), seq); err != nil {
			return fmt.Errorf("sync journal through record %d: %w", seq, err)
		}
		return nil
	}
}

func (db *DB) wake() {
	select {
	case db.progress <- struct{}{}:
	default:
	}
}

// Apply applies a journal record: reads see it from now on, and with its
// sequence number it gets into Pebble in one atomic batch, alone or together
// with records around it. A record at or below Applied is skipped, so replay may start early. Only an
// empty metastore takes a record that does not follow the one before it. Tree
// keys that a record changes are listed under the current cut generation.
//
// ErrCorrupt: the record does not decode, or records are missing before it;
// nothing was applied. ErrFailed: an
// earlier write to disk failed. Apply waits while flushes lag far behind.
func (db *DB) Apply(seq uint64, record []byte) error {
	db.applyMu.Lock()
	defer db.applyMu.Unlock()
	if db.closed.Load() {
		return ErrClosed
	}
	applied := db.applied.Load()
	if seq <= applied {
		return nil
	}
	if applied > 0 && seq != applied+1 {
		return fmt.Errorf("metastore: apply record %d after record %d: those between are missing from the journal: %w",
			seq, applied, ErrCorrupt)
	}
	if err := db.gate(len(record)); err != nil {
		return err
	}
	record = bytes.Clone(record) // what is pending refers to it
	var lamport uint64
	db.mutations = db.mutations[:0]
	alone := false // what follows counts to another generation, or removes one
	if err := decodeRecord(record, func(time uint64, m mutation) error {
		lamport = time
		alone = alone || m.op == opSetGeneration || m.op == opDropTouched
		db.mutations = append(db.mutations, m)
		return nil
	}); err != nil {
		return fmt.Errorf("metastore: apply record %d: %w", seq, err)
	}
	if lamport == 0 {
		lamport = seq
	}
	if alone {
		return db.applyAlone(seq, lamport)
	}
	db.pending.add(lamport, db.mutations)
	db.applied.Store(seq)
	if db.pending.newest.full() {
		return db.drainBehind()
	}
	return nil
}

// applyAlone applies db.mutations, which begin a generation or drop one.
func (db *DB) applyAlone(seq, lamport uint64) error {
	if err := db.drainLocked(); err != nil {
		return err
	}
	generation := db.generation
	batch := db.pebble.NewBatch()
	for _, m := range db.mutations {
		var err error
		switch m.op {
		case opPut:
			err = errors.Join(batch.Set(m.key, m.value, nil), db.touch(batch, lamport, m.key))
		case opDelete:
			err = errors.Join(batch.Delete(m.key, nil), db.touch(batch, lamport, m.key))
		case opSetGeneration:
			generation = m.generation
			err = setNumber(batch, keyGeneration, generation)
		default:
			from := touchedKey(nil, m.generation, nil)
			err = batch.DeleteRange(from, successor(from), nil)
		}
		if err != nil {
			return db.commitFailed(batch, err)
		}
	}
	if err := db.commit(batch, seq); err != nil {
		return err
	}
	db.generation = generation
	db.applied.Store(seq)
	return nil
}

func setNumber(batch *pebble.Batch, key []byte, n uint64) error {
	var value [8]byte
	binary.BigEndian.PutUint64(value[:], n)
	return batch.Set(key, value[:], nil)
}

// gate keeps what is not flushed yet bounded, and turns a failed write to disk
// into an error instead of an endless wait.
func (db *DB) gate(recordBytes int) error {
	if err := db.Failed(); err != nil {
		return err
	}
	if db.gateLeft -= recordBytes; db.gateLeft > 0 {
		return nil
	}
	db.gateLeft = gateBytes
	for {
		m := db.pebble.Metrics()
		if m.MemTable.Size <= unflushedBytesMax && m.Levels[0].Sublevels <= sublevelsMax {
			return nil
		}
		select {
		case <-db.progress:
		case <-db.fs.state.failed:
			return db.Failed()
		case <-db.fs.state.noRoom():
			select {
			case <-db.progress:
			case <-db.fs.state.failed:
				return db.Failed()
			case <-time.After(fullMax):
				db.fs.state.fail(fmt.Errorf("%d bytes could not be flushed for %v: %w", m.MemTable.Size, fullMax, syscall.ENOSPC))
			}
		}
	}
}

// Failed returns nil, or an error that wraps ErrFailed after a write to disk
// failed. It never becomes nil again.
func (db *DB) Failed() error {
	if err := db.fs.state.error(); err != nil {
		return fmt.Errorf("metastore: %w", err)
	}
	return nil
}

// FailedC is closed when a write to disk fails.
func (db *DB) FailedC() <-chan struct{} { return db.fs.state.failed }

// Applied returns the sequence of the newest applied record.
func (db *DB) Applied() uint64 { return db.applied.Load() }

// Flushed returns a position that the state on disk has reached. It is
// remembered on disk before it is returned: a later Open that finds an older
// state fails with ErrCorrupt. So whatever records up to it no longer refer
// to may be let go.
func (db *DB) Flushed() uint64 {
	db.anchorMu.Lock()
	defer db.anchorMu.Unlock()
	seq, err := db.durable()
	if err == nil && seq > db.anchored {
		if err = writeAnchor(db.fs.foreground(), db.dir, seq); err == nil {
			db.anchored = seq
		}
	}
	if err != nil {
		db.logger.Error("metastore: cannot tell the flushed position; it stays", "position", db.anchored, "err", err)
	}
	return db.anchored
}

// durable reads the position from the tables that the synced manifest names.
func (db *DB) durable() (seq uint64, err error) {
	it, err := db.pebble.NewIter(&pebble.IterOptions{
		LowerBound:                keyApplied,
		UpperBound:                successor(keyApplied),
		OnlyReadGuaranteedDurable: true,
	})
	if err != nil {
		return 0, wrapError("flushed position", err)
	}
	if it.First() {
		var value []byte
		if value, err = it.ValueAndErr(); err == nil {
			seq, err = decodeU64(value)
		}
	}
	if err = errors.Join(err, it.Close()); err != nil {
		return 0, wrapError("flushed position", err)
	}
	return seq, nil
}

// Flush writes what is applied to disk; afterwards Flushed returns at least
// what Applied was. On a full disk it returns ENOSPC, and the flush goes on as
// soon as there is room.
func (db *DB) Flush(ctx context.Context) error {
	if err := db.drain(); err != nil {
		return err
	}
	return db.flush(ctx)
}

func (db *DB) flush(ctx context.Context) error {
	if err := db.Failed(); err != nil {
		return err
	}
	done, err := db.pebble.AsyncFlush()
	if err != nil {
		return wrapError("flush", err)
	}
	select {
	case <-done:
		return nil
	case <-db.fs.state.failed:
		return db.Failed()
	case <-db.fs.state.noRoom():
		return fmt.Errorf("metastore: flush: %w", syscall.ENOSPC)
	case <-ctx.Done():
		return fmt.Errorf("metastore: flush: %w", ctx.Err())
	}
}

// Snapshot returns the newest applied state. Call it under the lock that
// orders Apply, so that its position is the caller's.
func (db *DB) Snapshot() (*Snapshot, error) {
	db.applyMu.Lock()
	defer db.applyMu.Unlock()
	if err := db.drainLocked(); err != nil {
		return nil, err
	}
	s := db.pebble.NewSnapshot()
	return &Snapshot{reader: reader{src: s}, snapshot: s, applied: db.applied.Load()}, nil
}

// Bytes returns the size of the metastore on disk.
func (db *DB) Bytes() uint64 { return db.pebble.Metrics().DiskSpaceUsage() }

// Close flushes, so that the next start has little to replay, and closes; on a
// full disk it leaves more to replay. The journal must still be open. Snapshots must be closed before.
func (db *DB) Close() error {
	if db.closed.Swap(true) {
		return ErrClosed
	}
	// Waits for a running Apply.
	db.applyMu.Lock()
	defer db.applyMu.Unlock()
	err := db.drainLocked()
	if err == nil {
		err = db.flush(context.Background())
	}
	if isNoSpace(err) {
		db.logger.Warn("metastore: closed without a flush, the disk is full; the next start takes longer")
		_ = db.close() // of the flush that is given up
		return nil
	}
	return errors.Join(err, db.close())
}

func (db *DB) close() error {
	db.fs.state.release()
	err := db.pebble.Close()
	db.cache.Unref()
	if err != nil {
		return wrapError("close", err)
	}
	return nil
}
