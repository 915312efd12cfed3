package node

import (
	"context"
	"math"
	"sync"
	"time"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"

	"google.golang.org/protobuf/proto"
)

// A holder that was away finds that its shards are held by others now. It lets
// go of such a copy only where the owner has signed a list of holders without
// it, and the holders on that list prove what they have; where only keepers say
// so, or the list is older than the copy, it keeps the copy and counts it.

// surplusMax bounds the copies that are counted by name.
const surplusMax = 1 << 16

// surplus are the copies that nobody asks this node to keep, and which it may
// not drop.
type surplus struct {
	mu   sync.Mutex
	keys map[shardstore.Key]int // bytes; guarded by mu
}

func (s *surplus) set(key shardstore.Key, bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if bytes == 0 {
		delete(s.keys, key)
	} else if len(s.keys) < surplusMax {
		s.keys[key] = bytes
	}
}

func (s *surplus) total() (shards, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.keys {
		bytes += int64(b)
	}
	return int64(len(s.keys)), bytes
}

// reconcile compares one stored shard with what its stripe's keepers say.
func (n *Node) reconcile(ctx context.Context, info shardstore.ShardInfo) {
	_, b, err := n.store.Manifest(info.Key)
	m := new(wire.Manifest)
	if info.Provisional || err != nil || proto.Unmarshal(b, m) != nil {
		return // scrubbing finds damage
	}
	records, keeperCount := n.recordsOf(ctx, info.Blind, m)
	var newest *wire.IndexRecord
	for _, r := range records {
		if newest == nil || r.Version > newest.Version {
			newest = r
		}
	}
	self := n.transport.Self()
	with, without := 0, 0
	for _, r := range records {
		switch {
		case r.Version < newest.Version:
		case names(r.CurrentHolders(), self):
			with++ // it is a holder to one at least, which may tell the others
		default:
			without++
		}
	}
	if with > 0 || without <= keeperCount/2 {
		n.surplus.set(info.Key, 0)
		return
	}
	// The version is the time of signing. A list from before this copy came says
	// nothing about it.
	stored, err := n.store.StoredBy(info.Key)
	if err != nil {
		return
	}
	signed := time.Unix(0, int64(min(newest.Version, math.MaxInt64)))
	if names(newest.Holders, self) || signed.Before(stored) || !n.othersProve(ctx, newest, info.Key) {
		n.surplus.set(info.Key, info.Bytes)
		return
	}
	if err := n.store.Drop(ctx, info.Key); err != nil {
		if ctx.Err() == nil {
			n.log.Error("A copy that is held elsewhere now was not dropped.", "shard", info.Key.String(), "err", err)
		}
		return
	}
	n.surplus.set(info.Key, 0)
	n.damaged.Remove(info.Key)
	n.did.surplusDropped.Add(1)
	n.log.Info("A copy was dropped: the owner names other holders, and they have proved theirs.", "shard", info.Key.String())
}

// recordsOf asks each other keeper of a stripe for its record, and returns those that
// verify and how many keepers there are.
func (n *Node) recordsOf(ctx context.Context, blind [32]byte, m *wire.Manifest) (records []*wire.IndexRecord, keeperCount int) {
	pool := n.poolNodes()
	asked := keepers(blind, int(m.M), true, pool) // which are all of an unmirrored stripe's, and more
	answers := make([]*wire.IndexRecord, len(asked))
	each(len(asked), func(i int) {
		if asked[i] == n.transport.Self() {
			return // it may have been away
		}
		rep, _, err := n.call(ctx, asked[i], &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{blind[:]}}}}, nil)
		if err != nil {
			return
		}
		for _, r := range rep.GetGetIndex().GetRecords() {
			if r.Verify() == nil && [32]byte(r.Manifest.Blind) == blind {
				answers[i] = r
			}
		}
	})
	mirrored := false
	for _, r := range answers {
		mirrored = mirrored || r.GetMirrored()
	}
	keeperCount = placement.KeeperCount(int(m.M), mirrored, len(pool))
	for _, r := range answers[:min(keeperCount, len(answers))] {
		if r != nil {
			records = append(records, r)
		}
	}
	return records, keeperCount
}

func names(holders []*wire.Holder, id placement.NodeID) bool {
	for _, h := range holders {
		if placement.NodeID(h.Primary) == id || placement.NodeID(h.Mirror) == id {
			return true
		}
	}
	return false
}

// othersProve says whether the shard is proved by a holder of it, and as many
// others of the stripe as a recoverable one has.
func (n *Node) othersProve(ctx context.Context, r *wire.IndexRecord, key shardstore.Key) bool {
	holders := r.CurrentHolders()
	proved := make([]bool, len(holders))
	each(len(holders), func(i int) {
		for _, id := range []string{holders[i].Primary, holders[i].Mirror} {
			one := shardstore.Key{Blind: key.Blind, Index: uint8(holders[i].Index)}
			if id != "" && !proved[i] && n.proves(ctx, placement.NodeID(id), r.Manifest, one) == nil {
				proved[i] = true
			}
		}
	})
	count, own := 0, false
	for i, ok := range proved {
		if ok {
			count++
			own = own || holders[i].Index == uint32(key.Index)
		}
	}
	k, all := int(r.Manifest.K), int(r.Manifest.K+r.Manifest.M)
	return own && count >= min(all, k+2)
}
