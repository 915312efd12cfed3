package node

import (
	"bytes"
	"crypto/rand"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

func TestPutAndGet(t *testing.T) {
	p := newPool(t, 1)
	for _, size := range []int{16 << 10, 256 << 10, 4 << 20} { // the last is over 2 MiB in one frame
		s := newStripe(t, 2, 1, size)
		p.mustPut(nodeID(0), s, 1, "")
		for _, r := range [][2]int{{0, 0}, {0, 1}, {16<<10 - 1, 1}, {size - 1, 1}, {size / 2, size / 2}, {5000, 7000}} {
			rep, proof, err := p.call(nodeID(0), getShard(s, 1, r[0], r[1]), nil)
			if err != nil {
				t.Fatal(err)
			}
			checkRange(t, s, 1, r[0], r[1], rep, proof)
			if bytes.Contains(proof, s.columns[1]) {
				t.Fatal("a data proof reveals the column")
			}
		}
		for _, bad := range []*wire.Request{getShard(s, 1, size, 1), getShard(s, 1, 1, size), getShard(s, 1, 1<<31, 1<<31)} {
			if _, _, err := p.call(nodeID(0), bad, nil); p2p.StatusOf(err) != wire.Status_STATUS_INVALID {
				t.Fatalf("bad range: %v", err)
			}
		}
		if _, _, err := p.call(nodeID(0), getShard(s, 0, 0, 0), nil); p2p.StatusOf(err) != wire.Status_STATUS_NOT_FOUND {
			t.Fatalf("shard that is not there: %v", err)
		}
		rep, _, err := p.call(nodeID(0), &wire.Request{Op: &wire.Request_HasShards{HasShards: &wire.HasShards{Shards: []*wire.ShardRef{
			{Blind: s.keys.Blind[:], Index: 0}, {Blind: s.keys.Blind[:], Index: 1},
		}}}}, nil)
		if err != nil || rep.GetHasShards().Held[0] || !rep.GetHasShards().Held[1] {
			t.Fatal(rep, err)
		}
	}
}

func TestWrongPutsAreRefused(t *testing.T) {
	p := newPool(t, 1)
	s, other := newStripe(t, 2, 1, 16<<10), newStripe(t, 2, 1, 16<<10)
	cases := map[string]func(op *wire.PutShard, body []byte) []byte{
		"other shard's bytes":   func(op *wire.PutShard, _ []byte) []byte { op.Crc32C = erasure.CRC(s.bodies[1]); return s.bodies[1] },
		"flipped bit":           func(_ *wire.PutShard, b []byte) []byte { b[100] ^= 1; return b },
		"flipped bit, good crc": func(op *wire.PutShard, b []byte) []byte { b[100] ^= 1; op.Crc32C = erasure.CRC(b); return b },
		"flipped column":        func(op *wire.PutShard, b []byte) []byte { b[0] ^= 1; op.Crc32C = erasure.CRC(b); return b },
		"short body":            func(op *wire.PutShard, b []byte) []byte { b = b[:len(b)-1]; op.Crc32C = erasure.CRC(b); return b },
		"no body":               func(*wire.PutShard, []byte) []byte { return nil },
		"no manifest":           func(op *wire.PutShard, b []byte) []byte { op.Manifest = nil; return b },
		"changed root": func(op *wire.PutShard, b []byte) []byte {
			b[100] ^= 1
			root := erasure.Root(b)
			op.Manifest.Roots[0], op.Crc32C = root[:], erasure.CRC(b)
			return b
		},
		"another's name":      func(op *wire.PutShard, b []byte) []byte { op.Manifest.Blind = other.manifest.Blind; return b },
		"another's key":       func(op *wire.PutShard, b []byte) []byte { op.Manifest.IndexKey = other.manifest.IndexKey; return b },
		"number out of range": func(op *wire.PutShard, b []byte) []byte { op.Index = 3; return b },
		"no lock":             func(op *wire.PutShard, b []byte) []byte { op.Lock = nil; return b },
		"another's lock":      func(op *wire.PutShard, b []byte) []byte { op.Lock = other.lock; return b },
		"unproven lock":       func(op *wire.PutShard, b []byte) []byte { op.Lock.Version = 7; return b },
		"mirror is itself":    func(op *wire.PutShard, b []byte) []byte { op.Mirror = string(nodeID(0)); return b },
		"copy for another":    func(op *wire.PutShard, b []byte) []byte { op.MirrorCopy, op.Partner = true, "somebody"; return b },
		"odd shard size": func(op *wire.PutShard, b []byte) []byte {
			op.Manifest.ShardBytes = 16<<10 + 1
			return append(b, 0)
		},
	}
	for name, change := range cases {
		op := proto.Clone(s.put(0)).(*wire.PutShard)
		body := change(op, bytes.Clone(s.bodies[0]))
		_, _, err := p.call(nodeID(0), &wire.Request{Op: &wire.Request_PutShard{PutShard: op}}, body)
		switch p2p.StatusOf(err) {
		case wire.Status_STATUS_INVALID, wire.Status_STATUS_DENIED, wire.Status_STATUS_CORRUPT:
		default:
			t.Errorf("%s: %v", name, err)
		}
	}
	if u := p.nodes[nodeID(0)].store.Usage(); u.Shards != 0 {
		t.Fatalf("something was stored: %+v", u)
	}
	p.mustPut(nodeID(0), s, 0, "")
	if _, _, err := p.call(nodeID(0), &wire.Request{Op: &wire.Request_PutShard{PutShard: s.put(1)}}, s.bodies[1]); p2p.StatusOf(err) != wire.Status_STATUS_DENIED {
		t.Fatalf("second shard of one stripe: %v", err)
	}
	p.mustPut(nodeID(0), s, 0, "") // the same again is fine
}

func TestMirrorOnPut(t *testing.T) {
	p := newPool(t, 3)
	s := newStripe(t, 2, 1, 16<<10)
	if !p.mustPut(nodeID(0), s, 0, nodeID(1)).Mirrored {
		t.Fatal("not mirrored")
	}
	rep, proof, err := p.call(nodeID(1), getShard(s, 0, 0, 0), nil)
	if err != nil {
		t.Fatal(err)
	}
	checkRange(t, s, 0, 0, 0, rep, proof)
	for id, partner := range map[placement.NodeID]placement.NodeID{nodeID(0): nodeID(1), nodeID(1): nodeID(0)} {
		if info, err := p.nodes[id].store.Stat(s.key(0)); err != nil || info.Partner != string(partner) || !info.Provisional {
			t.Fatalf("%s: %+v %v", id, info, err)
		}
	}
	p.net.Kill(nodeID(2))
	if p.mustPut(nodeID(0), newStripe(t, 2, 1, 16<<10), 0, nodeID(2)).Mirrored {
		t.Fatal("mirrored on a dead node")
	}
}

func TestColumnsNeedTheLock(t *testing.T) {
	p := newPool(t, 2)
	id := nodeID(0)
	s, other := newStripe(t, 2, 1, 16<<10), newStripe(t, 2, 1, 16<<10)
	p.mustPut(id, s, 1, "")
	p.mustPut(id, other, 1, "")
	good := p.authorization(s, seal.OpColumns, id, 1)
	c := p.columns(id, good)[0]
	if c.Status != 0 || erasure.VerifyColumn([32]byte(s.manifest.Roots[1]), c.Column, [32]byte(c.CodedRoot)) != nil {
		t.Fatalf("column: %v", c)
	}
	clone := func(r *wire.ColumnRequest) *wire.ColumnRequest { return proto.Clone(r).(*wire.ColumnRequest) }
	nonce, _ := p.device.Nonce(ctx, id)
	sign := func(expiry time.Time, counter uint64, key *stripe, node placement.NodeID) *wire.ColumnRequest {
		a := &wire.Authorization{Expiry: expiry.Unix(), Counter: counter}
		var err error
		a.Unlock, err = seal.Sign(key.keys.Lock, seal.P2PKH, seal.Operation{
			Kind: seal.OpColumns, Blind: s.keys.Blind, Index: 1, Node: string(node), Nonce: nonce, Expiry: a.Expiry, Counter: counter,
		})
		if err != nil {
			t.Fatal(err)
		}
		return &wire.ColumnRequest{Blind: s.keys.Blind[:], Index: 1, Authorization: a}
	}
	soon := time.Now().Add(time.Minute)
	bad := map[string]*wire.ColumnRequest{
		"replay":           good,
		"nothing":          {Blind: s.keys.Blind[:], Index: 1},
		"for delete":       p.authorization(s, seal.OpDelete, id, 1),
		"other shard":      p.authorization(s, seal.OpColumns, id, 0),
		"other node":       p.authorization(s, seal.OpColumns, nodeID(1), 1),
		"other owner":      sign(soon, 1000, other, id),
		"expired":          sign(time.Now().Add(-time.Minute), 1001, s, id),
		"expires in years": sign(time.Now().AddDate(3, 0, 0), 1002, s, id),
		"old counter":      sign(soon, good.Authorization.Counter, s, id),
		"not the node":     sign(soon, 1003, s, nodeID(1)),
	}
	r := clone(good)
	r.Authorization.Counter = 2000
	bad["changed counter"] = r
	for name, r := range bad {
		if name == "other shard" {
			r.Index = 1
		}
		if c := p.columns(id, r)[0]; c.Status != wire.Status_STATUS_DENIED || len(c.Column) != 0 {
			t.Errorf("%s: %v", name, c)
		}
	}
	if c := p.columns(id, sign(soon, 3000, s, id))[0]; c.Status != 0 {
		t.Fatalf("a fresh signature is refused: %v", c)
	}
	// A node that starts again draws a new nonce: old signatures are void.
	held := sign(soon, 4000, s, id)
	p.net.Kill(id)
	p.net.Restart(id)
	if _, err := p.device.Nonce(ctx, id); err != nil {
		t.Fatal(err)
	}
	if c := p.columns(id, held)[0]; c.Status != wire.Status_STATUS_DENIED {
		t.Fatalf("a signature for an older connection: %v", c)
	}
}

func TestDelete(t *testing.T) {
	p := newPool(t, 1)
	id := nodeID(0)
	s, other := newStripe(t, 2, 1, 16<<10), newStripe(t, 2, 1, 16<<10)
	p.mustPut(id, s, 0, "")
	if _, _, err := p.call(id, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{s.record(1)}}}}, nil); err != nil {
		t.Fatal(err)
	}
	forged := p.authorization(other, seal.OpDelete, id, 0)
	forged.Blind = s.keys.Blind[:]
	for _, st := range p.delete(id, forged, p.authorization(s, seal.OpColumns, id, 0), &wire.ColumnRequest{Blind: s.keys.Blind[:]}) {
		if st != wire.Status_STATUS_DENIED {
			t.Fatalf("forged delete: %v", st)
		}
	}
	if !p.nodes[id].store.Has(s.key(0)) {
		t.Fatal("deleted without a right to")
	}
	got := p.delete(id, p.authorization(s, seal.OpDelete, id, 0), p.authorization(s, seal.OpDelete, id, 1), p.authorization(s, seal.OpDelete, id, wire.IndexNumber))
	if got[0] != 0 || got[1] != wire.Status_STATUS_NOT_FOUND || got[2] != 0 {
		t.Fatal(got)
	}
	if p.nodes[id].store.Has(s.key(0)) {
		t.Fatal("not deleted")
	}
	rep, _, err := p.call(id, &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{s.keys.Blind[:]}}}}, nil)
	if err != nil || len(rep.GetGetIndex().Records) != 0 {
		t.Fatal("index record not deleted", err)
	}
	if _, _, err := p.call(id, &wire.Request{Op: &wire.Request_PutShard{PutShard: s.put(0)}}, s.bodies[0]); p2p.StatusOf(err) != wire.Status_STATUS_DENIED {
		t.Fatalf("a deleted shard came back: %v", err)
	}
}

func TestCommit(t *testing.T) {
	p := newPool(t, 1)
	id := nodeID(0)
	s, other := newStripe(t, 2, 1, 16<<10), newStripe(t, 2, 1, 16<<10)
	p.mustPut(id, s, 0, "")
	forged := wire.NewCommit(other.keys.Index)
	forged.Blind = s.keys.Blind[:]
	if _, _, err := p.call(id, &wire.Request{Op: &wire.Request_CommitShards{CommitShards: &wire.CommitShards{Commits: []*wire.Commit{forged}}}}, nil); p2p.StatusOf(err) != wire.Status_STATUS_DENIED {
		t.Fatalf("forged commit: %v", err)
	}
	if i, _ := p.nodes[id].store.Stat(s.key(0)); !i.Provisional {
		t.Fatal("committed by a forger")
	}
	p.commit(id, s)
	if i, _ := p.nodes[id].store.Stat(s.key(0)); i.Provisional {
		t.Fatal("not committed")
	}
}

func TestHealFromPartner(t *testing.T) {
	p := newPool(t, 3)
	s := newStripe(t, 2, 1, 64<<10)
	p.mustPut(nodeID(0), s, 0, nodeID(1))
	p.commit(nodeID(0), s)
	damage(t, p.nodes[nodeID(0)].dir, s.bodies[0][erasure.ColumnBytes+20_000:][:64])
	// What is not touched is still served.
	if _, _, err := p.call(nodeID(0), getShard(s, 0, 0, 1), nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.call(nodeID(0), getShard(s, 0, 0, 0), nil); p2p.StatusOf(err) != wire.Status_STATUS_CORRUPT {
		t.Fatalf("damaged bytes: %v", err)
	}
	eventually(t, "healing", func() bool {
		rep, proof, err := p.call(nodeID(0), getShard(s, 0, 0, 0), nil)
		if err == nil {
			checkRange(t, s, 0, 0, 0, rep, proof)
		}
		return err == nil
	})
	if i, err := p.nodes[nodeID(0)].store.Stat(s.key(0)); err != nil || i.Provisional || len(i.Proof) == 0 || i.Partner != string(nodeID(1)) {
		t.Fatalf("after healing: %+v %v", i, err)
	}
	// The whole body, with its column, goes to the partner alone.
	whole := getShard(s, 0, 0, 0)
	whole.GetGetShard().Whole = true
	if _, _, err := p.call(nodeID(0), whole, nil); p2p.StatusOf(err) != wire.Status_STATUS_DENIED {
		t.Fatalf("whole shard to a stranger: %v", err)
	}
}

func TestWindow(t *testing.T) {
	w := &window{}
	for _, step := range []struct {
		counter uint64
		want    bool
	}{
		{0, true}, {0, false}, {5, true}, {4, true}, {4, false}, {5, false}, {0, false}, {1, true},
		{windowBits + 5, true}, {5, false}, {6, true}, {6, false}, {1 << 40, true}, {windowBits + 6, false},
		{1<<40 - windowBits + 1, true}, {1<<40 - windowBits, false}, {^uint64(0), false}, {^uint64(0) - 1, true}, {^uint64(0) - 1, false},
	} {
		if got := w.use(step.counter); got != step.want {
			t.Fatalf("counter %d: %v", step.counter, got)
		}
	}
}

func FuzzWindow(f *testing.F) {
	f.Add([]byte{1, 2, 3, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		w, used := &window{}, map[uint64]bool{}
		at := uint64(0)
		for _, c := range b {
			at += uint64(int64(int8(c)) * 97)
			at %= 1 << 20
			if ok := w.use(at); ok && used[at] {
				t.Fatalf("counter %d twice", at)
			} else if ok {
				used[at] = true
			} else if !used[at] && at+windowBits > w.next {
				t.Fatalf("fresh counter %d refused", at)
			}
		}
	})
}

func BenchmarkPutShard1MiB(b *testing.B) {
	p := newPool(b, 6)
	s := newStripe(b, 4, 2, 1<<20)
	b.SetBytes(1 << 20)
	b.SetParallelism(12)
	next := make(chan *stripe, 64)
	stop := make(chan struct{})
	defer close(stop)
	go func() { // the same bodies under new names
		for {
			n := *s
			n.keys, _ = mustBundle().StripeKeys(s.id, 1)
			n.manifest = proto.Clone(s.manifest).(*wire.Manifest)
			_ = n.manifest.Sign(n.keys.Index)
			lock, _ := n.keys.NewLock(seal.P2PKH)
			n.lock = &wire.Lock{Version: lock.Version, Script: lock.Script, PreviousSignature: lock.PrevSig}
			select {
			case next <- &n:
			case <-stop:
				return
			}
		}
	}()
	before := cpuSeconds(b)
	b.ResetTimer()
	defer func() { b.ReportMetric(float64(b.N)/1000/(cpuSeconds(b)-before), "GB/cpu-s") }()
	b.RunParallel(func(pb *testing.PB) {
		n := <-next
		i := 0
		for pb.Next() {
			if i == 6 {
				n, i = <-next, 0
			}
			p.mustPut(nodeID(i), n, i, "")
			i++
		}
	})
}

// cpuSeconds is what the process has used: on a busy machine the figure that
// holds.
func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func mustBundle() *seal.Bundle {
	b, err := seal.NewBundle(1, rand.Reader)
	if err != nil {
		panic(err)
	}
	return b
}
