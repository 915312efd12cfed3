package node

import (
	"bytes"
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

// Damage that nobody reads is found all the same: healed from the partner, or
// rebuilt elsewhere by the keepers.
func TestScrubFindsDamage(t *testing.T) {
	quick := func(o *Options) { o.ScrubInterval = 200 * time.Millisecond }
	t.Run("healed from the partner", func(t *testing.T) {
		p := newPoolWith(t, 6, quick)
		s := newStripe(t, 1, 1, 64<<10)
		p.place(s, true)
		damage(t, p.nodes[nodeID(1)].dir, s.bodies[1][30000:30100])
		eventually(t, "the damage is found and healed", func() bool {
			st := p.nodes[nodeID(1)].node.Status()
			return st.Damaged > 0 && st.Healed > 0
		})
		r, err := p.nodes[nodeID(1)].store.ReadShard(s.key(1), 0, 0, nil)
		if err != nil || !bytes.Equal(r.Coded, s.bodies[1][32:]) {
			t.Fatal("it is not the shard that was placed:", err)
		}
	})
	t.Run("rebuilt elsewhere", func(t *testing.T) {
		p := newPoolWith(t, 7, quick)
		s := newStripe(t, 2, 2, 16<<10)
		p.place(s, false)
		damage(t, p.nodes[nodeID(1)].dir, s.bodies[1][100:200])
		eventually(t, "the repair", func() bool {
			h := p.holders(s, false)[1]
			return h.Primary != string(nodeID(1)) && p.nodes[placement.NodeID(h.Primary)].store.Has(s.key(1))
		})
		if p.nodes[nodeID(1)].node.Status().Damaged == 0 {
			t.Error("the damage was not counted")
		}
	})
}

// One round visits each shard once, spread over the interval, and goes on where
// it was when the node is started again, however long it was off.
func TestWalkSurvivesRestarts(t *testing.T) {
	const shards, interval = 200, 10 * time.Second
	dir := t.TempDir()
	var clock atomic.Int64 // nanoseconds
	clock.Store(time.Now().UnixNano())
	seen := map[shardstore.Key]int{}
	for _, part := range []time.Duration{3 * time.Second, 4 * time.Second, 4 * time.Second} {
		store, err := shardstore.Open(shardstore.Options{Dir: dir, CapacityBytes: 1 << 30, Logger: testLogger(), Now: func() time.Time { return time.Unix(0, clock.Load()) }})
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; len(seen) < shards; i++ {
			k := shardstore.Key{Blind: [32]byte{byte(i * 256 / shards), byte(i)}, Index: uint8(i)}
			seen[k] = 0
			if err := store.PutShard(ctx, shardstore.Shard{Key: k, Manifest: []byte("m"), Body: make([]byte, 100), Outboard: []byte("o")}); err != nil {
				t.Fatal(err)
			}
		}
		n := &Node{store: store, log: testLogger()}
		runCtx, cancel := context.WithCancel(ctx)
		ended := make(chan struct{})
		var visited atomic.Int64
		go func() {
			defer close(ended)
			n.walk(runCtx, interval, func(_ context.Context, info shardstore.ShardInfo) {
				seen[info.Key]++
				visited.Add(1)
			})
		}()
		least := int64(shards * part / interval)
		var passed time.Duration
		eventually(t, "so much of the round", func() bool {
			if passed < part {
				passed += 10 * time.Millisecond
				clock.Add(int64(10 * time.Millisecond))
			}
			return passed == part && visited.Load() >= least-least/10
		})
		cancel()
		<-ended
		if most := least + shards/16 + 2; visited.Load() > most {
			t.Errorf("%d shards visited in %v, want at most %d", visited.Load(), part, most)
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		clock.Add(int64(1000 * time.Hour)) // off
	}
	counts := map[int]int{}
	for _, c := range seen {
		counts[c]++
	}
	if counts[0] > 0 || slices.Max(slices.Collect(func(yield func(int) bool) {
		for c := range counts {
			if !yield(c) {
				return
			}
		}
	})) > 3 {
		t.Errorf("visits by number of shards: %v", counts)
	}
}
