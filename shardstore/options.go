package shardstore

import (
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Options configures a Store.
type Options struct {
	Dir           string // created when missing
	CapacityBytes uint64 // pack bytes the store may use, if its disk has them; 0 = what the disk has
	DiskShare     uint64 // stores that share the disk's free bytes; default 1

	PackBytes       int64         // size at which a new pack file is begun; default 256 MiB
	IndexCacheBytes int64         // memory of the index's block cache; default 16 MiB
	OpenPacksMax    int           // pack files kept open for reading; default 64
	ProvisionalAge  time.Duration // uptime after which an uncommitted shard is dropped; default 24 h
	TombstoneAge    time.Duration // uptime for which deleted bytes are kept; default 7 days
	SweepInterval   time.Duration // between looks for things to drop; default 1 min

	Now      func() time.Time // default time.Now; must not run backwards
	OpenFile OpenFile         // default OSFile
	Disk     Disk             // default OSDisk
	Logger   *slog.Logger     // default slog.Default
}

// EnsureDefaults fills unset fields.
func (o *Options) EnsureDefaults() {
	setDefault(&o.DiskShare, 1)
	setDefault(&o.PackBytes, 256<<20)
	setDefault(&o.IndexCacheBytes, 16<<20)
	setDefault(&o.OpenPacksMax, 64)
	setDefault(&o.ProvisionalAge, 24*time.Hour)
	setDefault(&o.TombstoneAge, 7*24*time.Hour)
	setDefault(&o.SweepInterval, time.Minute)
	setDefault(&o.Logger, slog.Default())
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.OpenFile == nil {
		o.OpenFile = OSFile
	}
	if o.Disk == nil {
		o.Disk = OSDisk
	}
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate reports all violations at once.
func (o *Options) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.Dir == "" {
		bad("Dir is empty: name a directory for the packs")
	}
	if o.PackBytes < 1<<16 || o.PackBytes > 1<<40 {
		bad("PackBytes is %d: use 64 KiB to 1 TiB", o.PackBytes)
	}
	if o.OpenPacksMax < 1 {
		bad("OpenPacksMax is %d: use at least 1", o.OpenPacksMax)
	}
	if o.IndexCacheBytes < 1<<20 {
		bad("IndexCacheBytes is %d: use at least 1 MiB", o.IndexCacheBytes)
	}
	if o.ProvisionalAge < time.Second || o.TombstoneAge < time.Second {
		bad("ProvisionalAge %v and TombstoneAge %v must be at least 1 s", o.ProvisionalAge, o.TombstoneAge)
	}
	if o.SweepInterval <= 0 {
		bad("SweepInterval is %v: use a positive duration", o.SweepInterval)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("shardstore options: %w", err)
	}
	return nil
}
