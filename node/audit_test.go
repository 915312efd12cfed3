package node

import (
	"context"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

func auditing(o *Options) { o.AuditInterval = 10 * time.Millisecond }

// A node that answers, and says that it has its shards, and sends other bytes,
// is found out by those who keep the index records and by those who mirror with
// it. It is given nothing, and its shards are put elsewhere.
func TestLiarIsContained(t *testing.T) {
	for name, mirrored := range map[string]bool{"unmirrored": false, "mirrored": true} {
		t.Run(name, func(t *testing.T) {
			p := newPoolWith(t, 8, auditing)
			s := newStripe(t, 2, 1, 64<<10)
			p.place(s, mirrored)
			liar := nodeID(1)
			p.net.Corrupt(liar, func(op string, body []byte) {
				if op == "get_shard" && len(body) > 0 {
					body[len(body)-1] ^= 1
				}
			})
			held := func(h *wire.Holder) bool { return h.Primary == string(liar) || h.Mirror == string(liar) }
			eventually(t, "the shard has another holder", func() bool {
				h := p.holders(s, mirrored)[1]
				return !held(h) && h.Primary != "" && p.nodes[placement.NodeID(h.Primary)].store.Has(s.key(1))
			})
			for _, h := range p.holders(s, mirrored) {
				if held(h) {
					t.Errorf("the liar holds shard %d", h.Index)
				}
			}
			if !p.log.has("A node is contained") {
				t.Error("nobody has said so")
			}
			for id, m := range p.nodes {
				if r := m.node.Reputation(liar); id != liar && r.Contained() && r.Lied < 1.9 {
					t.Errorf("%s contains it for %+v", id, r)
				}
				for other := range p.nodes {
					if other != liar && id != liar && m.node.contained(other) {
						t.Errorf("%s contains %s: %+v", id, other, m.node.Reputation(other))
					}
				}
			}
		})
	}
}

// A node that keeps its connections and answers nothing is contained.
func TestStallingNodeIsContained(t *testing.T) {
	p := newPoolWith(t, 7, func(o *Options) { auditing(o); o.CallTimeout = 100 * time.Millisecond })
	s := newStripe(t, 2, 2, 16<<10)
	p.place(s, false)
	p.net.Delay(nodeID(1), 200*time.Millisecond) // heartbeats, which memnet does not send, come
	eventually(t, "it is contained", func() bool {
		return slices.ContainsFunc(p.keepers(s, false), func(id placement.NodeID) bool {
			return p.nodes[id].node.contained(nodeID(1))
		})
	})
}

// A holder from which a shard has moved away, or whose owner has deleted it, has
// done nothing wrong.
func TestHonestNodesAreNotBlamed(t *testing.T) {
	p := newPoolWith(t, 7, auditing)
	s := newStripe(t, 2, 1, 16<<10)
	p.place(s, false)
	for _, id := range p.keepers(s, false) {
		eventually(t, "proofs", func() bool { return p.nodes[id].node.Status().Audited > 20 })
	}
	deleted := newStripe(t, 2, 1, 16<<10)
	p.place(deleted, false)
	for _, id := range p.keepers(deleted, false) {
		p.delete(id, p.authorization(deleted, 1, id, 255))
	}
	for i := range 3 {
		p.delete(nodeID(i), p.authorization(deleted, 1, nodeID(i), i))
	}
	for _, id := range p.keepers(s, false) {
		before := p.nodes[id].node.Status().Audited
		eventually(t, "more proofs", func() bool { return p.nodes[id].node.Status().Audited > before+20 })
	}
	for id, m := range p.nodes {
		if st := m.node.Status(); st.AuditsFailed > 0 {
			t.Errorf("%s has blamed somebody %d times", id, st.AuditsFailed)
		}
	}
}

// lying is a node that changes the shards it sends.
type lying struct{ p2p.Transport }

func (l lying) Handle(h p2p.Handler) {
	l.Transport.Handle(func(ctx context.Context, from p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		rep, b, err := h(ctx, from, req, body)
		if req.GetGetShard() != nil && len(b) > 0 {
			b = slices.Clone(b)
			b[0] ^= 1
		}
		return rep, b, err
	})
}

// The same over real hosts.
func TestLiarAmongRealHosts(t *testing.T) {
	hosts := newHosts(t)
	var nodes []*member
	for i := range 6 {
		h, dir := hosts.start(p2p.RoleNode)
		var transport p2p.Transport = h
		if i == 1 {
			transport = lying{h}
		}
		nodes = append(nodes, startMember(t, transport, filepath.Join(dir, "store"), testLogger(), auditing))
	}
	device, _ := hosts.start(p2p.RoleDevice)
	defer device.Close()
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := device.WaitMembers(wait, len(nodes)); err != nil {
		t.Fatal(err)
	}
	call := func(to placement.NodeID, r *wire.Request, body []byte) {
		t.Helper()
		if _, _, err := device.Call(wait, to, r, body); err != nil {
			t.Fatal(err)
		}
	}
	s := newStripe(t, 2, 1, 64<<10)
	var holders []*wire.Holder
	for i := range 3 {
		call(nodes[i].id, &wire.Request{Op: &wire.Request_PutShard{PutShard: s.put(i)}}, s.bodies[i])
		call(nodes[i].id, &wire.Request{Op: &wire.Request_CommitShards{CommitShards: &wire.CommitShards{Commits: []*wire.Commit{wire.NewCommit(s.keys.Index)}}}}, nil)
		holders = append(holders, &wire.Holder{Index: uint32(i), Primary: string(nodes[i].id)})
	}
	r := s.record(1, holders...)
	r.Mirrored = false
	r.SignHolders(s.keys.Index)
	for _, m := range nodes {
		call(m.id, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{r}}}}, nil)
	}
	eventually(t, "another node holds the liar's shard", func() bool {
		return slices.ContainsFunc(nodes[3:], func(m *member) bool {
			info, err := m.store.Stat(s.key(1))
			return err == nil && !info.Provisional
		})
	})
}
