// Package volume is the data path of a DeFS volume: the tree, the content of its files, and their way to the
// network and back.
//
//	v, err := volume.Open(ctx, volume.Options{Dir: dir, Key: key})
//	a, err := v.Create(ctx, volume.RootIno, "notes", volume.Create{Mode: syscall.S_IFREG | 0o644})
//	n, err := v.Write(ctx, a.Ino, 0, []byte("hello"), volume.WriteFlags{})
//	err = v.Fsync(ctx, a.Ino)
//	err = v.Close(ctx)
//
// Every change takes one way: under the order lock the state is checked in the metastore, one record is appended
// to the journal and applied to the metastore; then the caller is answered. Nothing under that lock waits for the
// network or for a flush. Reads take no order lock.
//
// Access is checked by the caller (the kernel, mounted with default_permissions); all other rules of POSIX are
// kept here.
//
// A crash of the process loses nothing that a call acknowledged, except access times of the last moments. A power
// cut loses what no Fsync or Sync that returned has covered. Byte slices passed in are not kept; slices returned
// belong to the caller. The volume's goroutines end before Close returns.
package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/seal"
)

// Ino is an inode number: 16-bit device slot ‖ 48-bit counter. Numbers are never used again.
type Ino = metastore.Ino

// RootIno is the inode number of the root directory.
const RootIno = metastore.RootIno

// Options configures the local part of a volume.
type Options struct {
	Dir             string           // local state of this device: journal/ and meta/ are made below it
	Key             [32]byte         // seals everything under Dir
	Device          uint16           // slot of this device, below 32768; the upper 16 bits of the inode numbers it makes
	RootUID         uint32           // owner of the root directory of a new volume
	RootGID         uint32           //
	JournalMaxBytes int64            // hard cap of dirty bytes; 0 = the store's default
	CleanMaxBytes   int64            // bound of the clean cache; 0 = the store's default
	SegmentBytes    int64            // of the local segment store; 0 = the store's default
	NoAtime         bool             // never record access times; else as with relatime
	Fsync           string           // what Fsync waits for where no directory says so; default FsyncJournal
	Clock           func() time.Time // nil = time.Now
	Logger          *slog.Logger     // nil = no log

	disk disk // tests put the local state on other disks
}

// disk is where the local state is: the zero value means the operating system's files.
type disk struct {
	journal       cache.FS
	openMetastore func(metastore.Options) (*metastore.DB, error)
}

// EnsureDefaults fills what was left zero.
func (o *Options) EnsureDefaults() {
	if o.Fsync == "" {
		o.Fsync = FsyncJournal
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.disk.openMetastore == nil {
		o.disk.openMetastore = metastore.Open
	}
}

// Validate reports every field that no volume can be opened with.
func (o *Options) Validate() error {
	var errs []error
	if o.Dir == "" {
		errs = append(errs, errors.New("no directory for the local state"))
	}
	if o.Device >= 1<<15 {
		errs = append(errs, fmt.Errorf("device slot %d is not below 32768", o.Device))
	}
	for name, n := range map[string]int64{"journal": o.JournalMaxBytes, "clean cache": o.CleanMaxBytes, "segment": o.SegmentBytes} {
		if n < 0 {
			errs = append(errs, fmt.Errorf("negative size %d for %s", n, name))
		}
	}
	return errors.Join(append(errs, checkFsyncMode(o.Fsync))...)
}

// remoteReader reads placed content whose local copy is gone.
type remoteReader interface {
	// ReadSlice fills dst with plaintext of the slice at, from off bytes past at.Off on.
	ReadSlice(ctx context.Context, at metastore.Remote, off int, dst []byte) error
}

// Volume is an open volume. Its methods may be called from many goroutines.
type Volume struct {
	store   *cache.Store
	db      *metastore.DB
	inodes  *inodeTable
	names   *nameTable
	extents *extentTable
	refs    references
	reaper  *reaper
	clock   func() time.Time
	log     *slog.Logger
	device  uint16
	noAtime bool
	fsync   string // a mode of Fsync

	recoverableWait time.Duration // recoverableWaitMax; shorter in tests
	dir             string

	// mu orders mutations: it is held from the check of the state until the record is applied.
	// It guards nextID, boundID and usage, and writes to lastSeq.
	mu              sync.Mutex
	nextID, boundID uint64
	usage           usage

	lastSeq    atomic.Uint64         // journal sequence of the newest applied record
	failed     atomic.Pointer[error] // set once: why the volume is read-only
	foreground foreground            // what callers do; background work yields to it
	changed    chan struct{}         // one slot; signalled after each commit
	capacity   atomic.Pointer[capacity]

	lastChange atomic.Uint64 // journal sequence of the newest change that is not the publisher's own bookkeeping
	network    *network      // nil without a pool

	remote  remoteReader                // nil without a network
	virtual map[string]virtualAttribute // extended attributes that are computed; set before the volume is used
}

// Open opens the local part of a volume, or makes a new one where Dir holds none. The journal's records that the
// metastore does not have are replayed first.
func Open(ctx context.Context, o Options) (*Volume, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	v := &Volume{
		clock:   o.Clock,
		log:     o.Logger,
		device:  o.Device,
		noAtime: o.NoAtime,
		fsync:   o.Fsync,

		recoverableWait: recoverableWaitMax,
		dir:             o.Dir,
		changed:         make(chan struct{}, 1),
	}
	v.refs.orphans = make(map[Ino]struct{})
	var err error
	v.store, err = cache.Open(cache.Options{
		Dir: filepath.Join(o.Dir, "journal"), Key: o.Key, Logger: o.Logger, FS: o.disk.journal,
		SegmentBytes: o.SegmentBytes, MaxJournalBytes: o.JournalMaxBytes, MaxCleanBytes: o.CleanMaxBytes,
	})
	if err != nil {
		return nil, fmt.Errorf("open volume: local segment store: %w", advise(err))
	}
	// The store derives its keys from the device key; the metastore uses the one that it is given.
	metaKey := seal.LocalKey(o.Key).Derive("metastore", nil)
	v.db, err = o.disk.openMetastore(metastore.Options{Dir: filepath.Join(o.Dir, "meta"), Key: metaKey, Journal: v.store})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open volume: metastore: %w", advise(err)), v.store.Close())
	}
	v.inodes = newInodeTable(v.db)
	v.names = newNameTable(v.inodes)
	v.extents = newExtentTable(v.db)
	if err := v.start(o); err != nil {
		return nil, errors.Join(fmt.Errorf("open volume: %w", err), v.db.Close(), v.store.Close())
	}
	v.reaper = startReaper(v)
	return v, nil
}

// advise adds to an error about damage what to do about it.
func advise(err error) error {
	if errors.Is(err, cache.ErrCorrupt) || errors.Is(err, metastore.ErrCorrupt) {
		return fmt.Errorf("%w; run defs fsck --repair", err)
	}
	return err
}

// start replays the journal and brings the state in memory up.
func (v *Volume) start(o Options) error {
	if applied, last := v.db.Applied(), v.store.LastSeq(); applied > last {
		return advise(fmt.Errorf("the metastore is at record %d, the journal ends at %d: the journal has lost its end, or is of another time: %w", applied, last, cache.ErrCorrupt))
	}
	if err := v.store.Replay(v.db.Applied(), v.db.Apply); err != nil {
		for _, s := range v.store.Lost() {
			err = fmt.Errorf("%w; segment %d is lost: %s", err, s.ID, s.Reason)
		}
		return advise(fmt.Errorf("replay the journal: %w", err))
	}
	v.lastSeq.Store(v.db.Applied())
	next, err := v.db.Counter(metastore.CounterIno)
	if err != nil {
		return fmt.Errorf("read the inode counter: %w", err)
	}
	v.nextID = max(next, idFirst)
	v.boundID = v.nextID
	if v.usage, err = readUsage(v.db); err != nil {
		return err
	}
	switch _, err := v.inodes.get(RootIno); {
	case err == nil:
		return nil
	case !errors.Is(err, NotExist):
		return fmt.Errorf("read the root directory: %w", err)
	case v.db.Applied() > 0:
		return advise(fmt.Errorf("the metastore holds %d records and no root directory: %w", v.db.Applied(), metastore.ErrCorrupt))
	}
	_, err = v.commit(func(t *tx) error {
		t.putInode(RootIno, metastore.Inode{
			Mode: syscall.S_IFDIR | 0o755, UID: o.RootUID, GID: o.RootGID, Nlink: 2, Parent: RootIno,
			Atime: t.now, Mtime: t.now, Ctime: t.now, Btime: t.now, Generation: 1,
		})
		t.inodes++
		return nil
	})
	return err
}

// Sync makes everything acknowledged so far survive a power cut.
func (v *Volume) Sync(ctx context.Context) error {
	if err := v.flushAtimes(); err != nil {
		return wrap("sync", 0, err)
	}
	return wrap("sync", 0, v.syncThrough(ctx, v.lastSeq.Load()))
}

func (v *Volume) syncThrough(ctx context.Context, seq uint64) error {
	err := v.store.Sync(ctx, seq)
	if errors.Is(err, cache.ErrReadOnly) {
		v.fail(err)
	}
	return err
}

// Close flushes and closes the local state. No other call may be running or follow.
func (v *Volume) Close(ctx context.Context) error {
	if v.network != nil {
		v.network.close()
	}
	v.reaper.stop()
	err := v.Sync(ctx)
	return errors.Join(err, v.db.Close(), v.store.Close())
}

// foreground tells background work that callers are at work.
type foreground struct {
	running atomic.Int64  // reads and changes of content that have not ended
	begun   atomic.Uint64 // operations of any kind
}

func (f *foreground) begin() {
	f.running.Add(1)
	f.begun.Add(1)
}

func (f *foreground) end() { f.running.Add(-1) }

// note counts an operation that is over soon.
func (f *foreground) note() { f.begun.Add(1) }

// fail makes the volume read-only, for the first reason given.
func (v *Volume) fail(cause error) {
	err := fmt.Errorf("%w: %w", ReadOnly, cause)
	if v.failed.CompareAndSwap(nil, &err) {
		v.log.Error("the volume is read-only from now on", "cause", cause)
	}
}

// failure returns why the volume is read-only, or nil.
func (v *Volume) failure() error {
	if p := v.failed.Load(); p != nil {
		return *p
	}
	return nil
}
