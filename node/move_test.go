package node

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// wholeWithout checks that all shards of a stripe are held for good, each
// mirrored if the stripe is, by nodes that are not in gone.
func (p *pool) wholeWithout(s *stripe, mirrored bool, gone ...placement.NodeID) {
	p.t.Helper()
	seen := map[string]bool{}
	holders := p.holders(s, mirrored, gone...)
	if len(holders) != s.geometry.N() {
		p.t.Fatalf("%d holders of %d shards", len(holders), s.geometry.N())
	}
	for _, h := range holders {
		ids := []string{h.Primary}
		if mirrored {
			ids = append(ids, h.Mirror)
		}
		for i, id := range ids {
			m := p.nodes[placement.NodeID(id)]
			if seen[id] || m == nil || slices.Contains(gone, m.id) {
				p.t.Fatalf("shard %d is held by %v", h.Index, ids)
			}
			seen[id] = true
			r, err := m.store.ReadShard(s.key(int(h.Index)), 0, 0, nil)
			if err != nil || r.Provisional || !bytes.Equal(slices.Concat(r.Column[:], r.Coded), s.bodies[h.Index]) {
				p.t.Errorf("shard %d at %s: provisional %v, %v", h.Index, id, r.Provisional, err)
			}
			if mirrored && r.Partner != ids[1-i] {
				p.t.Errorf("shard %d at %s: its partner is %q, want %q", h.Index, id, r.Partner, ids[1-i])
			}
		}
	}
}

func TestDrain(t *testing.T) {
	for name, mirrored := range map[string]bool{"unmirrored": false, "mirrored": true} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, 9)
			var all []*stripe
			for range 12 {
				s := newStripe(t, 2, 1, 64<<10)
				p.place(s, mirrored)
				all = append(all, s)
			}
			leaving := p.nodes[nodeID(1)]
			var last Drained
			if err := leaving.node.Drain(ctx, func(d Drained) { last = d }); err != nil {
				t.Fatal(err)
			}
			if last.Moved != 12 || last.Left != 0 || last.MovedBytes < 12*64<<10 {
				t.Errorf("progress ended with %+v", last)
			}
			if st := leaving.node.Status(); st.Usage.Shards != 0 || !st.Draining || st.Moved != 12 {
				t.Errorf("it is not empty: %+v", st)
			}
			for _, s := range all {
				p.wholeWithout(s, mirrored, leaving.id)
			}
			for id, n := range p.nodes {
				if id != leaving.id && slices.Contains(n.node.poolNodes(), leaving.id) {
					t.Errorf("%s takes it for a keeper", id)
				}
			}
			s := newStripe(t, 1, 1, 16<<10)
			if _, _, err := p.call(leaving.id, &wire.Request{Op: &wire.Request_PutShard{PutShard: s.put(0)}}, s.bodies[0]); p2p.StatusOf(err) != wire.Status_STATUS_FULL {
				t.Errorf("it takes another shard: %v", err)
			}
			// The pool needs nothing from it.
			p.net.Kill(leaving.id)
			p.net.Bury(leaving.id)
			for _, s := range all {
				p.wholeWithout(s, mirrored, leaving.id)
			}
		})
	}
}

// A drain that finds no place for a shard says so, and the node goes on.
func TestDrainWithoutRoom(t *testing.T) {
	p := newPool(t, 3)
	s := newStripe(t, 2, 1, 16<<10)
	p.place(s, false)
	err := p.nodes[nodeID(1)].node.Drain(ctx, func(Drained) {})
	if err == nil || !strings.Contains(err.Error(), "1 shards are still here") || !strings.Contains(err.Error(), "no node is eligible") {
		t.Fatalf("it says: %v", err)
	}
	p.wholeWithout(s, false)
	other := newStripe(t, 2, 1, 16<<10)
	p.mustPut(nodeID(1), other, 0, "")

	stopped, cancel := context.WithCancel(ctx)
	cancel()
	if err := p.nodes[nodeID(1)].node.Drain(stopped, func(Drained) {}); err == nil || p.nodes[nodeID(1)].node.Status().Draining {
		t.Fatalf("a cancelled drain: %v", err)
	}
}

// New nodes take their share; who has given it stays as full as the others.
func TestBalance(t *testing.T) {
	p := newPoolWith(t, 3, func(o *Options) { o.BalanceInterval = 50 * time.Millisecond; o.BackgroundRate = 1 << 30 })
	var all []*stripe
	for range 30 {
		s := newStripe(t, 2, 1, 1<<20)
		p.place(s, false)
		all = append(all, s)
	}
	for i := 3; i < 6; i++ {
		p.add(nodeID(i))
	}
	used := func(i int) uint64 { return p.nodes[nodeID(i)].store.Usage().UsedBytes }
	mean := uint64(15 << 20)
	eventually(t, "they are balanced", func() bool {
		for i := range 3 {
			if used(i) > mean*5/4+10<<20 || used(i+3) < 2<<20 {
				return false
			}
		}
		return true
	})
	eventually(t, "they rest", func() bool {
		before := [6]uint64{}
		for i := range 6 {
			before[i] = used(i)
		}
		time.Sleep(200 * time.Millisecond) // four rounds in which something could move
		for i := range 6 {
			if used(i) != before[i] {
				return false
			}
		}
		return true
	})
	for _, s := range all {
		p.wholeWithout(s, false)
	}
}

// A holder that comes back after its shard was rebuilt elsewhere keeps its copy,
// and counts it, until the owner has signed a list without it and those on the
// list prove what they have.
func TestReturnedHolder(t *testing.T) {
	p := newPoolWith(t, 8, func(o *Options) { o.SurplusInterval, o.CensusInterval = 100*time.Millisecond, time.Hour })
	s := newStripe(t, 2, 1, 16<<10)
	p.place(s, false)
	back := nodeID(1)
	p.net.Kill(back)
	p.net.Bury(back)
	eventually(t, "the repair", func() bool {
		for _, id := range p.keepers(s, false, back) {
			r := p.getIndex(id, s)
			if r == nil {
				return false
			}
			h := r.CurrentHolders()[1]
			if info, err := p.nodes[placement.NodeID(h.Primary)].store.Stat(s.key(1)); h.Primary == string(back) || err != nil || info.Provisional {
				return false
			}
		}
		return true
	})
	p.net.Restart(back)
	status := func() Status { return p.nodes[back].node.Status() }
	eventually(t, "the copy is counted", func() bool { return status().Surplus == 1 && status().SurplusBytes >= 16<<10 })

	publish := func(holders []*wire.Holder) {
		r := s.record(uint64(time.Now().UnixNano()), holders...)
		r.Mirrored = false
		r.SignHolders(s.keys.Index)
		for _, id := range p.keepers(s, false) {
			if st := p.putIndex(id, r); st != 0 {
				t.Fatal(st)
			}
		}
	}
	right := p.holders(s, false)
	time.Sleep(time.Second) // a list has to be younger than the copy, whose age is known to a second
	// A list of nodes that hold nothing lets nobody drop anything.
	wrong := right[1].Primary
	for i := range 8 {
		if id := string(nodeID(i)); i > 2 && id != right[1].Primary {
			wrong = id
		}
	}
	publish([]*wire.Holder{right[0], {Index: 1, Primary: wrong}, right[2]})
	rounds := func() { // two whole ones
		for range 2 {
			until := p.nodes[back].store.Uptime() + 150*time.Millisecond
			eventually(t, "a round", func() bool { return p.nodes[back].store.Uptime() > until })
		}
	}
	rounds()
	if !p.nodes[back].store.Has(s.key(1)) {
		t.Fatal("it was dropped although the holder that is named has not got it")
	}
	publish(right)
	eventually(t, "the copy is dropped", func() bool {
		return !p.nodes[back].store.Has(s.key(1)) && status().SurplusDropped == 1 && status().Surplus == 0
	})
	p.wholeWithout(s, false, back)
	for _, id := range []int{0, 2} {
		if st := p.nodes[nodeID(id)].node.Status(); st.SurplusDropped+st.Surplus != 0 {
			t.Errorf("node %d has dropped or counted what it is to hold: %+v", id, st)
		}
	}
}
