// Package crashfs is a disk in memory for tests of what is built on a
// metastore: it shows what a crash would leave of the metastore's files.
//
//	disk := crashfs.New(func() { /* before each call that writes or flushes */ })
//	db, err := disk.Open(metastore.Options{…})
//	after := disk.CrashClone(50, rng)
package crashfs

import (
	"math/rand/v2"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/defs-fs/defs/metastore"
)

// Disk is a disk in memory.
type Disk struct {
	mem    *vfs.MemFS
	onCall func()
}

// New returns an empty disk. onCall runs before each call that changes or
// flushes something.
func New(onCall func()) *Disk { return &Disk{vfs.NewCrashableMem(), onCall} }

// Open opens the metastore of o.Dir on this disk.
func (d *Disk) Open(o metastore.Options) (*metastore.DB, error) {
	o.FS = errorfs.Wrap(d.mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if d.onCall != nil && op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			d.onCall()
		}
		return nil
	}))
	return metastore.Open(o)
}

// CrashClone returns a new disk with what was flushed, and about so many
// percent of what was not. With 100 it is what the death of a process leaves.
func (d *Disk) CrashClone(percent int, rng *rand.Rand) *Disk {
	return &Disk{mem: d.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})}
}
