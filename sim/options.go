package sim

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/defs-fs/defs/erasure"
)

// Lengths of time, without leap seconds and leap years.
const (
	Day  = 24 * time.Hour
	Year = 365 * Day
)

// Options describes a pool and what happens to it. Nodes, Stripes and Life are
// needed.
type Options struct {
	Seed     uint64
	Nodes    int
	Stripes  int
	Duration time.Duration  // default a year
	Policy   erasure.Policy // of all stripes

	Hosts, Subnets, Zones int // how many there are; default one host a node, one subnet, one zone

	Life   time.Duration // mean lifetime of a member
	Absent time.Duration // mean absence, once a day at an hour of the node's own; default none

	CopyAfter   time.Duration // silence after which a mirrored shard is copied; default 5 min
	DeadAfter   time.Duration // silence after which a member counts as dead; default 1 h
	CopyTime    time.Duration // mean time to copy a shard to another node; default 1 h
	RebuildTime time.Duration // mean time to rebuild one; default 1 h
	StandIn     time.Duration // see the package comment; default 5 min
	AuditEvery  time.Duration // mean time until a node that lies is found out; default 7 days

	Faults []Fault
}

// Kind is a kind of fault.
type Kind string

// The kinds of faults beside churn.
const (
	Crash     Kind = "crash"     // members die for good, at once
	Slow      Kind = "slow"      // transfers to members take SlowFactor times as long from then on
	Lying     Kind = "lying"     // members throw their shards away and claim to have them
	Partition Kind = "partition" // members are cut off for For
	HostLoss  Kind = "host"      // all members of a host die
	ZoneLoss  Kind = "zone"      // all members of a zone die
	SubnetCut Kind = "subnet"    // a subnet is cut off for For
)

// SlowFactor is how much longer a slow member takes.
const SlowFactor = 20

// Fault is something that is to go wrong.
type Fault struct {
	Kind  Kind
	At    time.Duration // since the start
	Nodes int           // of Crash, Slow, Lying and Partition: how many
	For   time.Duration // of Partition and SubnetCut
}

// EnsureDefaults fills what is zero.
func (o *Options) EnsureDefaults() {
	setDefault(&o.Duration, Year)
	setDefault(&o.Hosts, o.Nodes)
	setDefault(&o.Subnets, 1)
	setDefault(&o.Zones, 1)
	setDefault(&o.CopyAfter, 5*time.Minute)
	setDefault(&o.DeadAfter, time.Hour)
	setDefault(&o.CopyTime, time.Hour)
	setDefault(&o.RebuildTime, time.Hour)
	setDefault(&o.StandIn, 5*time.Minute)
	setDefault(&o.AuditEvery, 7*Day)
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate returns all violations, joined.
func (o *Options) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.Nodes < 1 || o.Stripes < 1 {
		wrong("Nodes and Stripes must be positive")
	}
	if o.Life <= 0 || o.Duration < 0 || o.Absent < 0 || o.Absent > 12*time.Hour {
		wrong("Life must be positive, Absent between 0 and 12 h")
	}
	if o.Hosts < 1 || o.Subnets < 1 || o.Zones < 1 {
		wrong("Hosts, Subnets and Zones must be positive")
	}
	if o.CopyAfter < 0 || o.DeadAfter < o.CopyAfter || o.CopyTime < 0 || o.RebuildTime < 0 || o.StandIn < 0 || o.AuditEvery < 0 {
		wrong("0 <= CopyAfter <= DeadAfter, and no time below 0")
	}
	for _, f := range o.Faults {
		if f.At < 0 || f.At > o.Duration {
			wrong("fault %s at %v is outside of %v", f.Kind, f.At, o.Duration)
		}
	}
	return errors.Join(errs...)
}

// Chain is the Markov model of the same pool, without its faults.
func (o Options) Chain() (Chain, error) {
	o.EnsureDefaults()
	g, mirrored, err := o.Policy.Geometry(o.Nodes, math.MaxInt)
	if err != nil {
		return Chain{}, err
	}
	return Chain{
		K: g.K, M: g.M, Mirrored: mirrored, Life: o.Life,
		Copy: o.CopyAfter + o.CopyTime, Rebuild: o.DeadAfter + o.RebuildTime, Urgent: o.CopyAfter + o.RebuildTime,
	}, nil
}

// Traffic is the chain's prediction of what repair moves in Duration for one
// stripe, in shards, the repairs that absences cause among it.
//
// A member is absent once a day, for longer than a threshold D and a transfer
// of mean τ with probability exp(-D/Absent) · Absent/(Absent+τ).
func (o Options) Traffic() (float64, error) {
	o.EnsureDefaults()
	chain, err := o.Chain()
	if err != nil {
		return 0, err
	}
	shards := chain.Traffic(o.Duration)
	if o.Absent == 0 {
		return shards, nil
	}
	after, transfer, copies, moved := o.CopyAfter, o.CopyTime, 2, 1
	if !chain.Mirrored {
		// One silent shard leaves n-1: that is k+1 or less where m is at most 2.
		transfer, copies, moved = o.RebuildTime, 1, chain.K+1
		if chain.M > 2 {
			after = o.DeadAfter
		}
	}
	absent, tau := o.Absent.Hours(), transfer.Hours()
	repaired := math.Exp(-after.Hours()/absent) * absent / (absent + tau)
	perYear := float64(o.Duration) / float64(Day) * repaired
	return shards + perYear*float64(copies*(chain.K+chain.M)*moved), nil
}
