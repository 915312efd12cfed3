package volume

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// TestCollect deletes the only file of a stripe and finds the stripe's shards
// gone from every node once a head without it is published.
func TestCollect(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	ino := v.put(t, "file", random(1<<20))
	wait(t, v.Volume)
	var id [16]byte
	if err := v.db.Extents(ino, 0, 1<<62, func(e metastore.Extent) bool { id = e.Remote.Stripe; return false }); err != nil {
		t.Fatal(err)
	}
	info, err := v.db.Stripe(id)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := v.network.stripes.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		t.Fatal(err)
	}
	held := func() (n int) {
		for _, node := range pool.ids {
			req := &wire.HasShards{}
			for s := range info.K + info.M {
				req.Shards = append(req.Shards, &wire.ShardRef{Blind: keys.Blind[:], Index: uint32(s)})
			}
			rep, _, err := v.network.transport.Call(t.Context(), node, &wire.Request{Op: &wire.Request_HasShards{HasShards: req}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, h := range rep.GetHasShards().Held {
				if h {
					n++
				}
			}
		}
		return n
	}
	if got := held(); got != info.K+info.M {
		t.Fatalf("%d shards held, want %d", got, info.K+info.M)
	}
	if err := v.Unlink(t.Context(), RootIno, "file"); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for i := 0; held() > 0; i++ {
		if time.Now().After(deadline) {
			t.Fatalf("%d shards are still held", held())
		}
		v.put(t, fmt.Sprintf("turn-%d", i), nil) // a change, so that a head is due
		wait(t, v.Volume)
		v.network.publisher.kick <- struct{}{} // nothing is due: it tends
	}
	if _, err := v.db.Stripe(id); !errors.Is(err, metastore.ErrNotFound) {
		t.Fatalf("the stripe is still known: %v", err)
	}
}

// TestMend loses a node for good and finds stripes whole again.
func TestMend(t *testing.T) {
	pool := newTestPool(t, 8)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	data := random(3 << 20)
	ino := v.put(t, "file", data)
	wait(t, v.Volume)
	var holders []metastore.Holder
	if err := v.db.Extents(ino, 0, 1, func(e metastore.Extent) bool {
		info, err := v.db.Stripe(e.Remote.Stripe)
		if err != nil {
			t.Error(err)
		}
		holders = info.Holders
		return false
	}); err != nil || len(holders) != 6 {
		t.Fatalf("%d holders: %v", len(holders), err)
	}
	kill := func(i int) placement.NodeID {
		id := placement.NodeID(holders[i].Primary)
		pool.net.Kill(id)
		return id
	}
	pool.net.Bury(kill(0))
	p := v.network.publisher
	whole := func() bool {
		whole := true
		if err := v.db.Stripes(func(_ [16]byte, s metastore.StripeInfo) bool {
			h := v.network.stripes.Health(&s)
			whole = whole && (s.Condemned || (h.Shards == s.K+s.M && s.Complete))
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return whole
	}
	if whole() {
		t.Fatal("no stripe had a shard on the node that died")
	}
	for deadline := time.Now().Add(20 * time.Second); !whole(); {
		if time.Now().After(deadline) {
			t.Fatal("stripes are not whole again")
		}
		p.kick <- struct{}{} // nothing is to be published: it tends
	}
	// Two more may die now.
	kill(1)
	kill(2)
	if _, err := v.DropCache(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	wantContent(t, v.Volume, "file", data)
}

// TestLaterDeviceKeepsItsContent recovers a volume while its first device still
// lives. What that one deletes or overwrites stays readable on the other, and
// each device has a slot of its own before it has published anything.
func TestLaterDeviceKeepsItsContent(t *testing.T) {
	pool := newTestPool(t, 6)
	first := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { first.Close(context.Background()) }()
	data := random(1 << 20)
	first.put(t, "file", data)
	wait(t, first.Volume)
	second := recoverVolume(t, pool, first.words)
	defer func() { second.Close(context.Background()) }()
	third := recoverVolume(t, pool, first.words)
	defer func() { third.Close(context.Background()) }()
	if second.dev.Slot != 2 || third.dev.Slot != 3 {
		t.Fatalf("slots %d and %d", second.dev.Slot, third.dev.Slot)
	}
	for _, v := range []*testVolume{first, third} {
		if err := v.Unlink(t.Context(), RootIno, "file"); err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			v.put(t, fmt.Sprintf("turn-%d", i), nil)
			wait(t, v.Volume)
			for range 3 { // when the third is taken, it has tended once at least
				v.network.publisher.kick <- struct{}{}
			}
		}
	}
	if _, err := second.DropCache(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	wantContent(t, second.Volume, "file", data)
}
