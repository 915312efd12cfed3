package node

import (
	"context"
	"encoding/binary"
	"errors"
	"math/bits"
	"time"

	"github.com/defs-fs/defs/shardstore"
)

const (
	walkBatch   = 256
	walkOverlap = 5 * time.Minute // of uptime that a crash may take back; at most a sixteenth of a round
)

// walk visits every stored shard once in each interval of the store's uptime,
// evenly spread. Names of shards are hashes, so that the part of the interval
// that has passed tells which of them are due: the place survives restarts
// without being written down, and a node that runs an hour a day gets round too.
func (n *Node) walk(ctx context.Context, interval time.Duration, visit func(context.Context, shardstore.ShardInfo)) {
	done := max(0, n.store.Uptime()-min(walkOverlap, interval/16))
	every(ctx, min(max(interval/1024, 10*time.Millisecond), time.Minute), func() {
		now := n.store.Uptime()
		if now-done >= interval {
			done = now - interval + 1 // late by a whole round: nothing is visited twice for that
		}
		from, to := duePlace(done, interval), duePlace(now, interval)
		var err error
		if from <= to {
			err = n.visit(ctx, from, to, visit)
		} else {
			err = errors.Join(n.visit(ctx, from, ^uint64(0), visit), n.visit(ctx, 0, to, visit))
		}
		if err != nil && ctx.Err() == nil {
			n.log.Error("The stored shards cannot be listed.", "err", err)
			return
		}
		done = now
	})
}

// duePlace is how far a round has come at this uptime, as the first 8 bytes of
// the names that are due.
func duePlace(uptime, interval time.Duration) uint64 {
	place, _ := bits.Div64(uint64(uptime%interval), 0, uint64(interval))
	return place
}

// visit calls f for the shards whose names begin behind from and not behind to.
func (n *Node) visit(ctx context.Context, from, to uint64, f func(context.Context, shardstore.ShardInfo)) error {
	var after shardstore.Key
	if from > 0 {
		for i := range after.Blind {
			after.Blind[i] = 0xff
		}
		binary.BigEndian.PutUint64(after.Blind[:], from)
		after.Index = 0xff
	}
	for ctx.Err() == nil {
		var due []shardstore.ShardInfo // no iterator stays open while shards are read
		if err := n.store.Shards(after, func(info shardstore.ShardInfo) bool {
			if binary.BigEndian.Uint64(info.Blind[:]) <= to {
				due = append(due, info)
				return len(due) < walkBatch
			}
			return false
		}); err != nil {
			return err
		}
		for _, info := range due {
			if ctx.Err() == nil {
				f(ctx, info)
			}
		}
		if len(due) < walkBatch {
			return nil
		}
		after = due[len(due)-1].Key
	}
	return nil
}

// scrub reads one shard. A damaged one is healed by its partner's copy, or
// counts as lost from then on, so that the keepers have it rebuilt elsewhere.
func (n *Node) scrub(ctx context.Context, info shardstore.ShardInfo) {
	if n.budget.spend(ctx, info.Bytes) != nil {
		return
	}
	buf, _ := n.buffers.Get().(*[]byte)
	if buf == nil {
		buf = new([]byte)
	}
	defer n.buffers.Put(buf)
	r, err := n.store.ReadShard(info.Key, 0, 0, *buf)
	if cap(r.Coded) > cap(*buf) {
		*buf = r.Coded[:0]
	}
	switch {
	case errors.Is(err, shardstore.ErrNotFound): // deleted meanwhile
		return
	case errors.Is(err, shardstore.ErrCorrupt):
		n.did.damaged.Add(1)
		n.log.Error("A stored shard was found damaged when it was read again.", "shard", info.Key.String(), "err", err)
		select {
		case n.heals <- info.Key:
		case <-ctx.Done():
		}
	case err != nil:
		n.log.Error("A stored shard cannot be read; it is read again in the next round.", "shard", info.Key.String(), "err", err)
	}
	n.did.scrubbed.Add(1)
	n.did.scrubbedBytes.Add(int64(info.Bytes))
}
