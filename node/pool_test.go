package node

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

func (p *pool) putIndex(to placement.NodeID, r *wire.IndexRecord) wire.Status {
	p.t.Helper()
	rep, _, err := p.call(to, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{r}}}}, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return rep.GetPutIndex().Status[0]
}

func (p *pool) getIndex(to placement.NodeID, s *stripe) *wire.IndexRecord {
	p.t.Helper()
	rep, _, err := p.call(to, &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{s.keys.Blind[:]}}}}, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, r := range rep.GetGetIndex().Records {
		return r
	}
	return nil
}

func TestIndexRecords(t *testing.T) {
	p := newPool(t, 3)
	id := nodeID(0)
	s, other := newStripe(t, 1, 1, 16<<10), newStripe(t, 1, 1, 16<<10)
	a, b := &wire.Holder{Index: 0, Primary: "a", Mirror: "b"}, &wire.Holder{Index: 1, Primary: "c"}
	if st := p.putIndex(id, s.record(5, a, b)); st != 0 {
		t.Fatal(st)
	}
	forged := s.record(9, a, b)
	forged.Holders[0].Primary = "thief"
	if st := p.putIndex(id, forged); st != wire.Status_STATUS_INVALID {
		t.Fatalf("forged record: %v", st)
	}
	forged = other.record(9, a)
	forged.Manifest = s.manifest
	if st := p.putIndex(id, forged); st != wire.Status_STATUS_INVALID {
		t.Fatalf("record signed by another: %v", st)
	}
	if st := p.putIndex(id, s.record(4, b)); st != wire.Status_STATUS_DENIED {
		t.Fatalf("lower version: %v", st)
	}
	moved := s.record(6, &wire.Holder{Index: 0, Primary: "x"})
	moved.Moves = []*wire.HolderMove{{Index: 0, From: "x", To: "thief"}}
	if st := p.putIndex(id, moved); st != 0 {
		t.Fatal(st)
	}
	if r := p.getIndex(id, s); r == nil || r.Version != 6 || len(r.Moves) != 0 {
		t.Fatalf("a device's moves must not count: %v", r)
	}
}

func TestMoveHolder(t *testing.T) {
	p := newPool(t, 5)
	keeper := nodeID(0)
	s := newStripe(t, 1, 1, 16<<10)
	n1, n2, n3, n4 := string(nodeID(1)), string(nodeID(2)), string(nodeID(3)), string(nodeID(4))
	for _, id := range []string{n1, n3} {
		p.mustPut(placement.NodeID(id), s, 0, "")
	}
	p.mustPut(nodeID(2), s, 1, "")
	if st := p.putIndex(keeper, s.record(1, &wire.Holder{Index: 0, Primary: n1, Mirror: n3}, &wire.Holder{Index: 1, Primary: n2})); st != 0 {
		t.Fatal(st)
	}
	move := func(from p2p.Transport, m *wire.HolderMove) wire.Status {
		_, _, err := from.Call(ctx, keeper, &wire.Request{Version: 1, Op: &wire.Request_MoveHolder{MoveHolder: &wire.MoveHolder{Blind: s.keys.Blind[:], Move: m}}}, nil)
		return p2p.StatusOf(err)
	}
	t1, t2 := p.nodes[nodeID(1)].transport, p.nodes[nodeID(2)].transport
	away := &wire.HolderMove{Index: 0, From: n3, To: n4, Mirror: true}
	if st := move(t1, away); st != wire.Status_STATUS_DENIED {
		t.Fatalf("to a node that does not have the shard: %v", st)
	}
	p.mustPut(nodeID(4), s, 0, "")
	for name, st := range map[string]wire.Status{
		"by the device":                          move(p.device, away),
		"by a keeper, from a holder that has it": move(t2, away),
		"from who does not hold it":              move(t1, &wire.HolderMove{Index: 0, From: "node07", To: n4, Mirror: true}),
		"to a holder of the stripe":              move(t1, &wire.HolderMove{Index: 0, From: n3, To: n2, Mirror: true}),
		"of a shard that does not exist":         move(t1, &wire.HolderMove{Index: 9, From: n3, To: n4, Mirror: true}),
		"without a primary afterwards":           move(t1, &wire.HolderMove{Index: 0, From: n1, To: ""}),
	} {
		if st != wire.Status_STATUS_DENIED {
			t.Errorf("%s: %v", name, st)
		}
	}
	if st := move(t1, away); st != 0 {
		t.Fatal(st)
	}
	if st := move(t1, away); st != 0 {
		t.Fatalf("told twice: %v", st)
	}
	if h := p.getIndex(keeper, s).CurrentHolders()[0]; h.Primary != n1 || h.Mirror != n4 {
		t.Fatal(h)
	}
	// The owner's next record replaces all moves.
	if st := p.putIndex(keeper, s.record(2, &wire.Holder{Index: 0, Primary: n2})); st != 0 {
		t.Fatal(st)
	}
	if r := p.getIndex(keeper, s); len(r.Moves) != 0 || r.CurrentHolders()[0].Primary != n2 {
		t.Fatal(r)
	}
}

func TestHeads(t *testing.T) {
	p := newPool(t, 1)
	id := nodeID(0)
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	head := func(seq uint64, sealed string) *wire.Head {
		h := &wire.Head{Sequence: seq, Sealed: []byte(sealed)}
		h.Sign(key)
		return h
	}
	put := func(h *wire.Head) (uint64, wire.Status) {
		rep, _, err := p.call(id, &wire.Request{Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: h}}}, nil)
		return rep.GetPutHead().GetSequence(), p2p.StatusOf(err)
	}
	if seq, st := put(head(3, "three")); seq != 3 || st != 0 {
		t.Fatal(seq, st)
	}
	if seq, st := put(head(2, "two")); seq != 3 || st != wire.Status_STATUS_DENIED {
		t.Fatal("an older head:", seq, st)
	}
	forged := head(4, "four")
	forged.Sealed = []byte("five")
	if _, st := put(forged); st != wire.Status_STATUS_INVALID {
		t.Fatal("forged head:", st)
	}
	_, thief, _ := ed25519.GenerateKey(rand.Reader)
	stolen := &wire.Head{Sequence: 9}
	stolen.Sign(thief)
	stolen.Address = head(1, "").Address
	if _, st := put(stolen); st != wire.Status_STATUS_INVALID {
		t.Fatal("head at another's address:", st)
	}
	if seq, st := put(head(4, "four")); seq != 4 || st != 0 {
		t.Fatal(seq, st)
	}
	rep, _, err := p.call(id, &wire.Request{Op: &wire.Request_GetHead{GetHead: &wire.GetHead{Addresses: [][]byte{head(1, "").Address, make([]byte, 32)}}}}, nil)
	if err != nil || len(rep.GetGetHead().Heads) != 1 || string(rep.GetGetHead().Heads[0].Sealed) != "four" {
		t.Fatal(rep, err)
	}
}

func TestLookupIsAnswered(t *testing.T) {
	p := newPool(t, 3)
	s := newStripe(t, 2, 1, 16<<10)
	p.mustPut(nodeID(1), s, 1, "")
	if st := p.putIndex(nodeID(2), s.record(1, &wire.Holder{Index: 1, Primary: string(nodeID(1))})); st != 0 {
		t.Fatal(st)
	}
	answers := make(chan *wire.LookupAnswer, 16)
	p.device.Handle(func(_ context.Context, _ p2p.Peer, req *wire.Request, _ []byte) (*wire.Reply, []byte, error) {
		answers <- proto.Clone(req.GetLookupAnswer()).(*wire.LookupAnswer)
		return &wire.Reply{}, nil, nil
	})
	nonce := []byte("0123456789abcdef")
	if err := p.device.Broadcast(ctx, &wire.Lookup{Nonce: nonce, Blinds: [][]byte{make([]byte, 32), s.keys.Blind[:]}}); err != nil {
		t.Fatal(err)
	}
	var record, held bool
	for !record || !held {
		select {
		case a := <-answers:
			if !bytes.Equal(a.Nonce, nonce) {
				t.Fatal("answer to another question")
			}
			for _, r := range a.Records {
				record = r.Verify() == nil && [32]byte(r.Manifest.Blind) == s.keys.Blind
			}
			for _, h := range a.Held {
				held = h.Manifest.Verify() == nil && h.Index == 1
			}
		case <-time.After(10 * time.Second):
			t.Fatal("no answer")
		}
	}
}

// The survivor of a pair copies its shard to a node that holds none of the
// stripe, tells the keepers, and the new copy is permanent.
func TestMirrorLoss(t *testing.T) {
	p := newPool(t, 6)
	s := newStripe(t, 1, 1, 64<<10)
	p.mustPut(nodeID(0), s, 0, nodeID(1))
	p.mustPut(nodeID(2), s, 1, nodeID(3))
	for i := range 4 {
		p.commit(nodeID(i), s)
	}
	record := s.record(1,
		&wire.Holder{Index: 0, Primary: string(nodeID(0)), Mirror: string(nodeID(1))},
		&wire.Holder{Index: 1, Primary: string(nodeID(2)), Mirror: string(nodeID(3))})
	for i := range 6 {
		if st := p.putIndex(nodeID(i), record); st != 0 {
			t.Fatal(st)
		}
	}
	p.net.Kill(nodeID(0)) // a primary, so that the mirror survives
	p.net.Bury(nodeID(0))
	var to placement.NodeID
	eventually(t, "a new copy", func() bool {
		info, err := p.nodes[nodeID(1)].store.Stat(s.key(0))
		to = placement.NodeID(info.Partner)
		return err == nil && to != nodeID(0)
	})
	if to != nodeID(4) && to != nodeID(5) {
		t.Fatalf("copied to %s, which holds a shard of the stripe", to)
	}
	rep, proof, err := p.call(to, getShard(s, 0, 0, 0), nil)
	if err != nil {
		t.Fatal(err)
	}
	checkRange(t, s, 0, 0, 0, rep, proof)
	info, err := p.nodes[to].store.Stat(s.key(0))
	if err != nil || info.Provisional || info.Partner != string(nodeID(1)) {
		t.Fatalf("%+v %v", info, err)
	}
	told := 0
	for i := 1; i < 6; i++ {
		if h := p.getIndex(nodeID(i), s).CurrentHolders()[0]; h.Primary == string(to) && h.Mirror == string(nodeID(1)) {
			told++
		}
	}
	if told < 3 {
		t.Fatalf("%d keepers know", told)
	}
	// The new copy opens to its owner like the first.
	if c := p.columns(to, p.authorization(s, 3, to, 0))[0]; c.Status != 0 || !bytes.Equal(c.Column, s.columns[0]) {
		t.Fatal(c)
	}
}

// A mirror that lost a shard gets it again when inventories are compared.
func TestInventoriesAreSettled(t *testing.T) {
	p := newPool(t, 2)
	s := newStripe(t, 1, 1, 16<<10)
	p.mustPut(nodeID(0), s, 0, nodeID(1))
	p.commit(nodeID(0), s)
	p.commit(nodeID(1), s)
	if err := p.nodes[nodeID(1)].store.Drop(ctx, s.key(0)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the copy", func() bool {
		info, err := p.nodes[nodeID(1)].store.Stat(s.key(0))
		return err == nil && !info.Provisional && info.Partner == string(nodeID(0))
	})
}

// A node that joins gets the records that it ranks for.
func TestHandover(t *testing.T) {
	p := newPool(t, 3)
	var all []*stripe
	for range 8 {
		s := newStripe(t, 1, 1, 16<<10)
		all = append(all, s)
		for i := range 3 {
			if st := p.putIndex(nodeID(i), s.record(1, &wire.Holder{Index: 0, Primary: string(nodeID(0))})); st != 0 {
				t.Fatal(st)
			}
		}
	}
	for i := range 3 {
		eventually(t, "a settled pool", func() bool { return len(p.nodes[nodeID(i)].node.keeperPool()) == 3 })
	}
	p.add(nodeID(3))
	pool := []placement.NodeID{nodeID(0), nodeID(1), nodeID(2), nodeID(3)}
	for _, s := range all {
		if !slices.Contains(keepers(s.keys.Blind, 1, true, pool), nodeID(3)) {
			continue
		}
		eventually(t, "handover", func() bool { return p.getIndex(nodeID(3), s) != nil })
	}
}

func TestBatchesAreBounded(t *testing.T) {
	p := newPool(t, 1)
	many := make([]*wire.ShardRef, wire.BatchMax+1)
	for i := range many {
		many[i] = &wire.ShardRef{Blind: make([]byte, 32)}
	}
	if _, _, err := p.call(nodeID(0), &wire.Request{Op: &wire.Request_HasShards{HasShards: &wire.HasShards{Shards: many}}}, nil); p2p.StatusOf(err) != wire.Status_STATUS_INVALID {
		t.Fatal(err)
	}
	if _, _, err := p.call(nodeID(0), &wire.Request{Op: &wire.Request_LookupAnswer{}}, nil); p2p.StatusOf(err) != wire.Status_STATUS_INVALID {
		t.Fatal(err)
	}
}

// Random requests must not bring a node down or give anything away.
func FuzzHandle(f *testing.F) {
	store, err := shardstore.Open(shardstore.Options{Dir: f.TempDir(), Logger: testLogger()})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { store.Close() })
	n, err := New(Options{Store: store, Transport: newPool(f, 0).device, Logger: testLogger(), BusyAfter: time.Millisecond})
	if err != nil {
		f.Fatal(err)
	}
	s := newStripe(f, 1, 1, 16<<10)
	for _, r := range []*wire.Request{
		{Op: &wire.Request_PutShard{PutShard: s.put(0)}}, getShard(s, 0, 5, 6),
		{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{s.record(1)}}}},
		{Op: &wire.Request_DeleteShards{DeleteShards: &wire.DeleteShards{Requests: []*wire.ColumnRequest{{Blind: s.keys.Blind[:], Authorization: &wire.Authorization{}}}}}},
		{Op: &wire.Request_MoveHolder{MoveHolder: &wire.MoveHolder{}}}, {Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: &wire.Head{}}}},
		{Op: &wire.Request_CommitShards{CommitShards: &wire.CommitShards{Commits: []*wire.Commit{{}}}}},
		{Op: &wire.Request_GetColumns{GetColumns: &wire.GetColumns{Requests: []*wire.ColumnRequest{{}}}}}, {Op: &wire.Request_Ping{}}, {},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, []byte("body"))
	}
	f.Fuzz(func(t *testing.T, b, body []byte) {
		r := new(wire.Request)
		if proto.Unmarshal(b, r) != nil {
			return
		}
		from := p2p.Peer{Member: p2p.Member{ID: "x", Role: p2p.RoleNode}, Nonce: make([]byte, 32)}
		rep, _, err := n.handle(ctx, from, r, body)
		if err == nil && rep == nil {
			t.Fatal("neither reply nor error")
		}
	})
}

// hosts makes members that talk over TCP with TLS, admitted by a ticket.
type hosts struct {
	t         *testing.T
	ticket    p2p.Ticket
	bootstrap []string
}

func newHosts(t *testing.T) *hosts {
	key, err := p2p.NewPool()
	if err != nil {
		t.Fatal(err)
	}
	ticket, err := key.Ticket(time.Time{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &hosts{t: t, ticket: ticket}
}

// start returns a new member and its directory.
func (hs *hosts) start(role p2p.Role) (*p2p.Host, string) {
	dir := hs.t.TempDir()
	peer, err := p2p.LoadOrCreateKey(filepath.Join(dir, "peer.key"))
	if err != nil {
		hs.t.Fatal(err)
	}
	cert, err := p2p.Join(hs.ticket, peer, role)
	if err != nil {
		hs.t.Fatal(err)
	}
	h, err := p2p.NewHost(ctx, p2p.HostOptions{
		Dir: dir, Key: peer, Certificate: cert, Bootstrap: hs.bootstrap, Listen: []string{"/ip4/127.0.0.1/tcp/0"},
		HeartbeatInterval: 100 * time.Millisecond, SuspectAfter: 2 * time.Second, Logger: testLogger(),
	})
	if err != nil {
		hs.t.Fatal(err)
	}
	hs.bootstrap = append(hs.bootstrap, h.Addrs()...)
	return h, dir
}

// The same over real hosts: TCP, TLS, tickets.
func TestRealHosts(t *testing.T) {
	hosts := newHosts(t)
	var nodes []*member
	for range 2 {
		h, dir := hosts.start(p2p.RoleNode)
		nodes = append(nodes, startMember(t, h, filepath.Join(dir, "store"), testLogger(), nil))
	}
	device, _ := hosts.start(p2p.RoleDevice)
	defer device.Close()
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := device.WaitMembers(wait, 2); err != nil {
		t.Fatal(err)
	}
	s := newStripe(t, 2, 1, 4<<20)
	var wg sync.WaitGroup
	var errs [2]error
	for i, m := range nodes {
		wg.Go(func() {
			op := s.put(i)
			op.Mirror = "" // one stripe, two nodes: each holds one shard
			_, _, errs[i] = device.Call(ctx, m.id, &wire.Request{Version: 1, BodyBytes: uint64(len(s.bodies[i])), Op: &wire.Request_PutShard{PutShard: op}}, s.bodies[i])
		})
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	for i, m := range nodes {
		req := getShard(s, i, 0, 0)
		req.Version = 1
		rep, proof, err := device.Call(ctx, m.id, req, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkRange(t, s, i, 0, 0, rep, proof)
	}
	mirrored := newStripe(t, 1, 1, 1<<20)
	op := mirrored.put(0)
	op.Mirror = string(nodes[1].id)
	rep, _, err := device.Call(ctx, nodes[0].id, &wire.Request{Version: 1, BodyBytes: uint64(len(mirrored.bodies[0])), Op: &wire.Request_PutShard{PutShard: op}}, mirrored.bodies[0])
	if err != nil || !rep.GetPutShard().Mirrored {
		t.Fatal(rep, err)
	}
	if got := erasure.Root(mirrored.bodies[0]); !nodes[1].store.Has(mirrored.key(0)) || !bytes.Equal(got[:], mirrored.manifest.Roots[0]) {
		t.Fatal("no copy on the mirror")
	}
}
