package node

import (
	"bytes"
	"slices"
	"testing"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// place stores all shards of s, shard i at node i and, with mirrors, at node
// n+i, commits them, and gives the keepers the index record.
func (p *pool) place(s *stripe, mirrored bool) {
	p.t.Helper()
	n := s.geometry.N()
	var holders []*wire.Holder
	for i := range n {
		h := &wire.Holder{Index: uint32(i), Primary: string(nodeID(i))}
		if mirrored {
			h.Mirror = string(nodeID(n + i))
		}
		p.mustPut(nodeID(i), s, i, placement.NodeID(h.Mirror))
		p.commit(nodeID(i), s)
		if mirrored {
			p.commit(nodeID(n+i), s)
		}
		holders = append(holders, h)
	}
	r := s.record(1, holders...)
	r.Mirrored = mirrored
	r.SignHolders(s.keys.Index)
	for _, id := range p.keepers(s, mirrored) {
		if st := p.putIndex(id, r); st != 0 {
			p.t.Fatal(st)
		}
	}
}

// keepers ranks the nodes that are not in gone.
func (p *pool) keepers(s *stripe, mirrored bool, gone ...placement.NodeID) []placement.NodeID {
	var pool []placement.NodeID
	for id := range p.nodes {
		if !slices.Contains(gone, id) {
			pool = append(pool, id)
		}
	}
	return keepers(s.keys.Blind, s.geometry.M, mirrored, pool)
}

// holders returns what most of the keepers say.
func (p *pool) holders(s *stripe, mirrored bool, gone ...placement.NodeID) []*wire.Holder {
	p.t.Helper()
	count, most := map[string]int{}, ""
	said := map[string][]*wire.Holder{}
	for _, id := range p.keepers(s, mirrored, gone...) {
		r := p.getIndex(id, s)
		if r == nil {
			continue
		}
		key := ""
		for _, h := range r.CurrentHolders() {
			key += h.String()
		}
		said[key] = r.CurrentHolders()
		if count[key]++; count[key] > count[most] {
			most = key
		}
	}
	return said[most]
}

// A shard whose copies are all gone is rebuilt bit for bit by the keepers,
// without its owner, permanently, and the keepers know its new holders.
func TestLostShardsAreRebuilt(t *testing.T) {
	for name, c := range map[string]struct {
		k, m, nodes int
		mirrored    bool
		lose        []int // nodes
		shards      []int // that are lost with them
	}{
		"unmirrored":             {2, 2, 7, false, []int{1}, []int{1}},
		"two of two to spare":    {2, 2, 8, false, []int{0, 3}, []int{0, 3}},
		"primary and mirror":     {1, 1, 7, true, []int{0, 2}, []int{0}},
		"holders that are new":   {4, 2, 12, false, []int{2}, []int{2}},
		"the keeper takes it":    {2, 1, 4, false, []int{2}, []int{2}},
		"mirrored, less to take": {1, 1, 5, true, []int{0, 2}, []int{0}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, c.nodes)
			s := newStripe(t, c.k, c.m, 64<<10)
			p.place(s, c.mirrored)
			var gone []placement.NodeID
			for _, i := range c.lose {
				gone = append(gone, nodeID(i))
				p.net.Kill(nodeID(i))
				p.net.Bury(nodeID(i))
			}
			for _, i := range c.shards {
				eventually(t, "the repair", func() bool {
					for _, h := range p.holders(s, c.mirrored, gone...) {
						to := placement.NodeID(h.Primary)
						if h.Index != uint32(i) || slices.Contains(gone, to) {
							continue
						}
						info, err := p.nodes[to].store.Stat(s.key(i))
						return err == nil && !info.Provisional
					}
					return false
				})
			}
			seen := map[string]bool{}
			for _, h := range p.holders(s, c.mirrored, gone...) {
				for _, id := range []string{h.Primary, h.Mirror} {
					if id == "" {
						continue
					}
					if seen[id] {
						t.Errorf("node %s holds two shards", id)
					}
					seen[id] = true
				}
				r, err := p.nodes[placement.NodeID(h.Primary)].store.ReadShard(s.key(int(h.Index)), 0, 0, nil)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(slices.Concat(r.Column[:], r.Coded), s.bodies[h.Index]) {
					t.Errorf("shard %d is not the one that was placed", h.Index)
				}
			}
			// A rebuilt shard opens to its owner like the first.
			for _, h := range p.holders(s, c.mirrored, gone...) {
				if c := p.columns(placement.NodeID(h.Primary), p.authorization(s, 3, placement.NodeID(h.Primary), int(h.Index)))[0]; c.Status != 0 || !bytes.Equal(c.Column, s.columns[h.Index]) {
					t.Fatal(c)
				}
			}
		})
	}
}

// A keeper that was away when the owner deleted a stripe learns of it from the
// holders, and gives the record to nobody.
func TestDeletedStripeIsForgotten(t *testing.T) {
	p := newPool(t, 7)
	s := newStripe(t, 2, 1, 16<<10)
	p.place(s, false)
	kept := p.keepers(s, false)
	away := kept[0]
	for _, id := range kept[1:] {
		p.delete(id, p.authorization(s, 1, id, wire.IndexNumber))
	}
	for i := range 2 { // the third is away as well
		if st := p.delete(nodeID(i), p.authorization(s, 1, nodeID(i), i)); st[0] != 0 {
			t.Fatal(st)
		}
	}
	eventually(t, "the record is dropped", func() bool { return p.getIndex(away, s) == nil })
	eventually(t, "nobody has it", func() bool {
		for id := range p.nodes {
			if p.getIndex(id, s) != nil {
				return false
			}
		}
		return true
	})
}

// A keeper that comes back with an empty disk is given its records again.
func TestEmptiedKeeperIsGivenItsRecords(t *testing.T) {
	p := newPool(t, 7)
	s := newStripe(t, 2, 2, 16<<10)
	p.place(s, false)
	id := p.keepers(s, false)[0]
	if err := p.nodes[id].store.ForgetIndex(ctx, s.keys.Blind); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the record", func() bool { return p.getIndex(id, s) != nil })
}

// A holder that comes back with an empty disk answers, and has nothing.
func TestEmptiedHolderIsNoticed(t *testing.T) {
	p := newPool(t, 7)
	s := newStripe(t, 2, 2, 16<<10)
	p.place(s, false)
	if err := p.nodes[nodeID(1)].store.Drop(ctx, s.key(1)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the repair", func() bool {
		h := p.holders(s, false)[1]
		return h.Primary != string(nodeID(1)) && p.nodes[placement.NodeID(h.Primary)].store.Has(s.key(1))
	})
}

// A shard that is damaged where it has no mirror is given up once its holder has
// noticed, and rebuilt elsewhere.
func TestDamagedShardIsReplaced(t *testing.T) {
	p := newPool(t, 7)
	s := newStripe(t, 2, 2, 16<<10)
	p.place(s, false)
	damage(t, p.nodes[nodeID(1)].dir, s.bodies[1][100:200])
	if _, _, err := p.call(nodeID(1), getShard(s, 1, 0, 0), nil); p2p.StatusOf(err) != wire.Status_STATUS_CORRUPT {
		t.Fatalf("the damage was not noticed: %v", err)
	}
	eventually(t, "the repair", func() bool {
		h := p.holders(s, false)[1]
		return h.Primary != string(nodeID(1)) && p.nodes[placement.NodeID(h.Primary)].store.Has(s.key(1))
	})
}

// Fewer than k shards are left: nothing is invented, and when a holder is back,
// the others are rebuilt.
func TestTooFewShardsWait(t *testing.T) {
	p := newPool(t, 7)
	gone := []placement.NodeID{nodeID(0), nodeID(1), nodeID(2)}
	left := func(id placement.NodeID) bool { return !slices.Contains(gone, id) }
	s := newStripe(t, 2, 2, 16<<10)
	for !slices.ContainsFunc(p.keepers(s, false), left) {
		s = newStripe(t, 2, 2, 16<<10) // the record must not be lost as well
	}
	p.place(s, false)
	for _, id := range gone {
		p.net.Kill(id)
		p.net.Bury(id)
	}
	eventually(t, "the loss to be seen", func() bool { return p.log.has("must come back") })
	if h := p.holders(s, false, gone...); h[0].Primary != string(nodeID(0)) || h[1].Primary != string(nodeID(1)) {
		t.Fatalf("holders were replaced without a shard: %v", h)
	}
	p.net.Restart(nodeID(0))
	eventually(t, "the repair", func() bool {
		for _, i := range []int{1, 2} {
			h := p.holders(s, false, nodeID(1), nodeID(2))[i]
			if slices.Contains(gone[1:], placement.NodeID(h.Primary)) {
				return false
			}
		}
		return true
	})
}

// One keeper that lies moves no holder at the others, and nobody but partner and
// keepers gets a whole shard.
func TestLyingKeeper(t *testing.T) {
	p := newPool(t, 12)
	var pool []placement.NodeID
	for i := range 12 {
		pool = append(pool, nodeID(i))
	}
	var s *stripe
	var liar, far placement.NodeID // a keeper, and one that does not even rank near them; neither holds a shard
	for liar == "" || far == "" {
		s = newStripe(t, 2, 1, 16<<10)
		liar, far = "", ""
		kept := p.keepers(s, false)
		near := placement.Keepers(s.keys.Blind, pool, keeperNearness*placement.KeeperCount(1, true, len(pool)))
		for _, id := range pool[3:] {
			if slices.Contains(kept, id) {
				liar = id
			}
			if !slices.Contains(near, id) {
				far = id
			}
		}
	}
	p.place(s, false)
	for _, to := range p.keepers(s, false) {
		if to == liar {
			continue
		}
		for what, move := range map[string]*wire.HolderMove{
			"a holder that is there":      {Index: 1, From: string(nodeID(1)), To: string(liar)},
			"to who does not hold it":     {Index: 1, From: "node77", To: string(liar)},
			"a mirror that nobody placed": {Index: 1, From: "", To: string(liar), Mirror: true},
		} {
			_, _, err := p.nodes[liar].transport.Call(ctx, to, &wire.Request{Version: 1, Op: &wire.Request_MoveHolder{MoveHolder: &wire.MoveHolder{Blind: s.keys.Blind[:], Move: move}}}, nil)
			if p2p.StatusOf(err) != wire.Status_STATUS_DENIED {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	whole := &wire.Request{Version: 1, Op: &wire.Request_GetShard{GetShard: &wire.GetShard{Blind: s.keys.Blind[:], Index: 1, Whole: true}}}
	rep, body, err := p.nodes[liar].transport.Call(ctx, nodeID(1), whole, nil)
	if err != nil || erasure.VerifyBody([32]byte(s.manifest.Roots[1]), body) != nil || len(rep.GetGetShard().Commit) == 0 {
		t.Fatal("a keeper is not given what it needs:", err)
	}
	for _, stranger := range []p2p.Transport{p.device, p.nodes[far].transport} {
		if _, _, err := stranger.Call(ctx, nodeID(1), whole, nil); p2p.StatusOf(err) != wire.Status_STATUS_DENIED {
			t.Errorf("%s was given a whole shard: %v", stranger.Self(), err)
		}
	}
}
