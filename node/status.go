package node

import (
	"sync/atomic"
	"time"

	"github.com/defs-fs/defs/shardstore"
)

// tally counts what the node has done since it was made.
type tally struct {
	scrubbed, scrubbedBytes atomic.Int64
	damaged, healed         atomic.Int64
	copied, rebuilt         atomic.Int64
	audited, auditsFailed   atomic.Int64 // challenges
	moved, surplusDropped   atomic.Int64
	broken                  atomic.Int64 // stripes, now
}

// Status is what a node holds and what it has done of its own accord since it
// was made. Counts without another unit are shards.
type Status struct {
	Usage  shardstore.Usage
	Uptime time.Duration // of the store, over all its runs

	BackgroundBytes int64 // moved for all of what follows
	BackgroundRate  int64 // bytes per second that it may move

	Scrubbed, ScrubbedBytes int64
	ScrubInterval           time.Duration
	Damaged                 int64 // found by scrubbing
	Healed                  int64 // from the partner's copy

	Copied  int64 // to a new mirror, or to one that had lost it
	Rebuilt int64 // from other shards
	Broken  int64 // stripes, of those whose index records are kept here, that have lost shards and are not whole again

	Moved    int64 // to other nodes, by a drain or to balance the pool
	Draining bool  // it takes no shards

	Surplus, SurplusBytes int64 // copies that the keepers do not name, and no signature lets go
	SurplusDropped        int64 // that a signature did

	Audited, AuditsFailed int64 // challenges to other nodes, which were proved or not
}

// Status returns the figures of this moment. It never waits for the disk.
func (n *Node) Status() Status {
	surplus, surplusBytes := n.surplus.total()
	return Status{
		Usage: n.store.Usage(), Uptime: n.store.Uptime(),
		BackgroundBytes: n.budget.bytesMoved(), BackgroundRate: n.o.BackgroundRate,
		Scrubbed: n.did.scrubbed.Load(), ScrubbedBytes: n.did.scrubbedBytes.Load(), ScrubInterval: n.o.ScrubInterval,
		Damaged: n.did.damaged.Load(), Healed: n.did.healed.Load(),
		Copied: n.did.copied.Load(), Rebuilt: n.did.rebuilt.Load(), Broken: n.did.broken.Load(),
		Moved: n.did.moved.Load(), Draining: n.draining.Load(),
		Surplus: surplus, SurplusBytes: surplusBytes, SurplusDropped: n.did.surplusDropped.Load(),
		Audited: n.did.audited.Load(), AuditsFailed: n.did.auditsFailed.Load(),
	}
}
