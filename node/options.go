package node

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/shardstore"
)

// Options configures a Node. Store and Transport are needed and stay the
// caller's to close.
type Options struct {
	Store     *shardstore.Store
	Transport p2p.Transport

	PutBytesMax      int64         // bodies of mirrored puts held at once; more wait, then get STATUS_BUSY; default 64 MiB
	ReadBytesMax     int64         // bytes of reads under way at once; default 64 MiB
	BusyAfter        time.Duration // how long a request waits for its turn; default 2 s
	CallTimeout      time.Duration // for one request to another node; default 15 s
	CopiesMax        int           // shards copied or healed at once; default 2
	MirrorInterval   time.Duration // between looks at the partners; default 30 s
	CopyAfter        time.Duration // silence after which a partner's shards are copied elsewhere; default 5 min
	HandoverDelay    time.Duration // how long the pool must be the same before index records move; default 1 min
	RepairInterval   time.Duration // between looks at the stripes whose index records are kept here; default 30 s
	CensusInterval   time.Duration // between questions to all holders whether they have their shards; default 1 h
	AnswersPerSecond float64       // lookups answered; default 50
	BackgroundRate   int64         // bytes per second that the node moves of its own accord; default 16 MiB
	AuditInterval    time.Duration // between challenges to other nodes; default 30 s
	BalanceInterval  time.Duration // between looks whether this node is fuller than the pool; default 10 min
	SurplusInterval  time.Duration // of the store's uptime in which the keepers are asked once about each shard; default 24 h
	ScrubInterval    time.Duration // of the store's uptime in which each shard is read again once; default 7 days

	Now    func() time.Time // default time.Now
	Logger *slog.Logger     // default slog.Default
}

// EnsureDefaults fills unset fields.
func (o *Options) EnsureDefaults() {
	setDefault(&o.PutBytesMax, 64<<20)
	setDefault(&o.ReadBytesMax, 64<<20)
	setDefault(&o.BusyAfter, 2*time.Second)
	setDefault(&o.CallTimeout, 15*time.Second)
	setDefault(&o.CopiesMax, 2)
	setDefault(&o.MirrorInterval, 30*time.Second)
	setDefault(&o.CopyAfter, 5*time.Minute)
	setDefault(&o.HandoverDelay, time.Minute)
	setDefault(&o.RepairInterval, 30*time.Second)
	setDefault(&o.CensusInterval, time.Hour)
	setDefault(&o.AnswersPerSecond, 50)
	setDefault(&o.BackgroundRate, 16<<20)
	setDefault(&o.AuditInterval, 30*time.Second)
	setDefault(&o.BalanceInterval, 10*time.Minute)
	setDefault(&o.SurplusInterval, 24*time.Hour)
	setDefault(&o.ScrubInterval, 7*24*time.Hour)
	setDefault(&o.Logger, slog.Default())
	if o.Now == nil {
		o.Now = time.Now
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
	if o.Store == nil {
		bad("Store is missing")
	}
	if o.Transport == nil {
		bad("Transport is missing")
	}
	if o.PutBytesMax < wire.BodyBytesMax || o.ReadBytesMax < wire.BodyBytesMax {
		bad("PutBytesMax %d and ReadBytesMax %d must be at least %d", o.PutBytesMax, o.ReadBytesMax, wire.BodyBytesMax)
	}
	if o.CopiesMax < 1 {
		bad("CopiesMax is %d: use at least 1", o.CopiesMax)
	}
	if o.BackgroundRate < 0 {
		bad("BackgroundRate is %d: use a positive number of bytes per second", o.BackgroundRate)
	}
	for name, d := range map[string]time.Duration{
		"BusyAfter": o.BusyAfter, "CallTimeout": o.CallTimeout, "MirrorInterval": o.MirrorInterval,
		"CopyAfter": o.CopyAfter, "HandoverDelay": o.HandoverDelay, "RepairInterval": o.RepairInterval, "CensusInterval": o.CensusInterval, "AuditInterval": o.AuditInterval, "ScrubInterval": o.ScrubInterval, "BalanceInterval": o.BalanceInterval, "SurplusInterval": o.SurplusInterval,
	} {
		if d < 0 {
			bad("%s is %v: use a positive duration", name, d)
		}
	}
	if o.AnswersPerSecond < 0 {
		bad("AnswersPerSecond is %v: use a positive number", o.AnswersPerSecond)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("node options: %w", err)
	}
	return nil
}
