// Package crashfs is a disk in memory for tests of what is built on a
// metastore: it fails on purpose, and shows what a crash would leave of the
// metastore's files.
//
//	disk := crashfs.New()
//	disk.OnCall(func(op crashfs.Op) error { if op == crashfs.Sync { return syscall.EIO }; return nil })
//	db, err := disk.Open(metastore.Options{…})
//	after := disk.CrashClone(50, rng)
package crashfs

import (
	"math/rand/v2"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/defs-fs/defs/metastore"
)

// Op is what a call does.
type Op string

// The kinds of calls.
const (
	Read  Op = "read"  // the content of a file
	Write Op = "write" // content
	Sync  Op = "sync"  // a file's content
	Names Op = "names" // create, rename, link, remove, or flush a directory
)

// Disk is a disk in memory.
type Disk struct {
	mem    *vfs.MemFS
	onCall atomic.Pointer[func(Op) error]
}

// New returns an empty disk.
func New() *Disk { return &Disk{mem: vfs.NewCrashableMem()} }

// OnCall sets a function that runs before each call. The call fails with its
// error.
func (d *Disk) OnCall(f func(Op) error) { d.onCall.Store(&f) }

// Open opens the metastore of o.Dir on this disk.
func (d *Disk) Open(o metastore.Options) (*metastore.DB, error) {
	o.FS = errorfs.Wrap(d.mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		f := d.onCall.Load()
		kind, ok := opOf(op.Kind)
		if f == nil || !ok {
			return nil
		}
		return (*f)(kind)
	}))
	return metastore.Open(o)
}

// opOf leaves out what looks at names alone.
func opOf(kind errorfs.OpKind) (Op, bool) {
	switch kind {
	case errorfs.OpFileRead, errorfs.OpFileReadAt:
		return Read, true
	case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
		return Sync, true
	case errorfs.OpFileWrite, errorfs.OpFileWriteAt, errorfs.OpFilePreallocate, errorfs.OpFileFlush:
		return Write, true
	}
	return Names, kind.ReadOrWrite() == errorfs.OpIsWrite
}

// CrashClone returns a new disk with what was flushed, and about so many
// percent of what was not. With 100 it is what the death of a process leaves.
func (d *Disk) CrashClone(percent int, rng *rand.Rand) *Disk {
	return &Disk{mem: d.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})}
}
