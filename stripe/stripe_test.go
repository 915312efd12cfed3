package stripe

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/internal/pooltest"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/node"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

var ctx = context.Background()

// harness is a store on a pool of real nodes.
type harness struct {
	*Store
	t      testing.TB
	pool   *pooltest.Pool
	policy erasure.Policy
	bundle *seal.Bundle
}

func newHarness(t testing.TB, nodes int, policy string, change ...func(*Options)) *harness {
	t.Helper()
	h := &harness{t: t, pool: pooltest.New(t, nodes)}
	var err error
	if h.policy, err = erasure.ParsePolicy(policy); err != nil {
		t.Fatal(err)
	}
	if h.bundle, err = seal.NewBundle(1, rand.Reader); err != nil {
		t.Fatal(err)
	}
	o := Options{
		Transport: h.pool.Device(t), Volume: [16]byte{1}, Epoch: func() uint32 { return 1 },
		Bundle: func(uint32) (*seal.Bundle, error) { return h.bundle, nil },
	}
	for _, f := range change {
		f(&o)
	}
	h.Store = NewStore(o)
	return h
}

func (h *harness) ok(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) seal(slices ...[]byte) *Sealed {
	h.t.Helper()
	b, err := h.NewBuilder(h.policy, metastore.PurposeContent)
	h.ok(err)
	for _, s := range slices {
		if _, ok := b.Add(s, len(s), false); !ok {
			h.t.Fatal("the slices do not fit one stripe")
		}
	}
	sealed, err := h.Seal(b)
	h.ok(err)
	return sealed
}

// stored is a published stripe.
type stored struct {
	*Sealed
	info metastore.StripeInfo
	data []byte // of all data shards
}

func (h *harness) put(slices ...[]byte) *stored {
	h.t.Helper()
	sealed := h.seal(slices...)
	info, err := h.Place(ctx, sealed)
	h.ok(err)
	h.ok(h.Publish(ctx, []Placed{{ID: sealed.ID, Info: &info, Manifest: sealed.Manifest}}))
	if !info.Complete {
		h.t.Fatalf("not complete: %+v", info)
	}
	st := &stored{Sealed: sealed, info: info}
	for i := range info.K {
		st.data = append(st.data, sealed.Bodies[i][erasure.ColumnBytes:]...)
	}
	return st
}

// check reads a stripe in several ways, and its salt.
func (h *harness) check(st *stored, info metastore.StripeInfo) metastore.StripeInfo {
	h.t.Helper()
	size := int(info.ShardBytes)
	for _, r := range [][2]int{{0, len(st.data)}, {0, 1}, {size - 1, 2}, {len(st.data) - 5, 5}} {
		got, _, err := h.Read(ctx, st.ID, &info, r[0], r[1])
		h.ok(err)
		if !bytes.Equal(got, st.data[r[0]:r[0]+r[1]]) {
			h.t.Fatalf("range %v: other bytes", r)
		}
	}
	salt, _, err := h.Salt(ctx, st.ID, &info)
	h.ok(err)
	if salt != st.Salt {
		h.t.Fatal("another salt")
	}
	return info
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// wantNoGoroutines fails if calls of the store have left any behind.
func wantNoGoroutines(t *testing.T) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	for deadline := time.Now().Add(5 * time.Second); ; {
		s := string(stacks[:runtime.Stack(stacks, true)])
		if !strings.Contains(s, "stripe.(*Store)") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("goroutines are left:\n%s", s)
		}
		runtime.Gosched()
	}
}

func flip(_ string, body []byte) {
	if len(body) > 0 {
		body[len(body)/2] ^= 1
	}
}

// TestEveryLossPattern: all subsets of up to m nodes, killed, lying, or half
// and half.
func TestEveryLossPattern(t *testing.T) {
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off,shard=16KiB")
	st := h.put(random(60_000))
	for a := range 6 {
		for b := a; b < 6; b++ {
			for _, fault := range []string{"killed", "lying", "both"} {
				for i, n := range []int{a, b} {
					if fault == "killed" || (fault == "both" && i == 0) {
						h.pool.Net.Kill(h.pool.IDs[n])
					} else {
						h.pool.Net.Corrupt(h.pool.IDs[n], flip)
					}
				}
				h.check(st, st.info)
				for _, n := range []int{a, b} {
					h.pool.Net.Restart(h.pool.IDs[n])
					h.pool.Net.Corrupt(h.pool.IDs[n], nil)
				}
			}
		}
	}
	// One more is too many, and says so.
	for _, id := range h.pool.IDs[:3] {
		h.pool.Net.Kill(id)
	}
	info := st.info
	_, _, err := h.Read(ctx, st.ID, &info, 0, len(st.data))
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), string(h.pool.IDs[0])) {
		t.Fatalf("three of six lost: %v", err)
	}
	wantNoGoroutines(t)
}

// TestMirroredLosesAnyFive draws five of fourteen nodes at random: one each of
// two pairs and whole pairs, as it comes.
func TestMirroredLosesAnyFive(t *testing.T) {
	h := newHarness(t, 14, "rs-ratio:4+2,shard=16KiB", func(o *Options) { o.HedgeAfter = 100 * time.Millisecond })
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := mathrand.New(mathrand.NewPCG(seed, 0))
	st := h.put(random(60_000))
	if !st.info.Mirrored {
		t.Fatal("not mirrored")
	}
	for range 60 {
		lost := rng.Perm(14)[:5]
		for i, n := range lost {
			if i%2 == 0 {
				h.pool.Net.Kill(h.pool.IDs[n])
			} else {
				h.pool.Net.Corrupt(h.pool.IDs[n], flip)
			}
		}
		h.check(st, st.info)
		for _, n := range lost {
			h.pool.Net.Restart(h.pool.IDs[n])
			h.pool.Net.Corrupt(h.pool.IDs[n], nil)
		}
	}
}

// silent hides that members have stopped, as heartbeats do for some seconds.
type silent struct{ p2p.Transport }

func (s silent) Members() []p2p.Member {
	members := s.Transport.Members()
	for i := range members {
		if members[i].State == p2p.Suspect {
			members[i].State = p2p.Alive
		}
	}
	return members
}

// TestHedging stops any two nodes, which still look alive: a read waits for
// them about as long as it takes to call them late.
func TestHedging(t *testing.T) {
	for _, policy := range []struct {
		text  string
		nodes int
	}{{"rs-ratio:4+2,mirror=off,shard=16KiB", 6}, {"rs-ratio:4+2,mirror=on,shard=16KiB", 12}} {
		h := newHarness(t, policy.nodes, policy.text, func(o *Options) {
			o.Transport, o.HedgeAfter = silent{o.Transport}, 100*time.Millisecond
		})
		st := h.put(random(60_000))
		var slowest time.Duration
		for a := range 6 {
			stopped := []string{st.info.Holders[a].Primary, st.info.Holders[(a+1)%6].Primary}
			for _, id := range stopped {
				h.pool.Net.Stall(placement.NodeID(id))
			}
			for _, n := range []int{1, len(st.data)} {
				info := st.info
				started := time.Now()
				got, _, err := h.Read(ctx, st.ID, &info, 0, n)
				h.ok(err)
				slowest = max(slowest, time.Since(started))
				if !bytes.Equal(got, st.data[:n]) {
					t.Fatal("other bytes")
				}
			}
			for _, id := range stopped {
				h.pool.Net.Resume(placement.NodeID(id))
			}
		}
		t.Logf("%s: slowest read %v with two nodes stopped", policy.text, slowest)
		if slowest > 2*time.Second {
			t.Errorf("a read took %v", slowest)
		}
		wantNoGoroutines(t)
	}
}

// TestInterruptedRead ends at once, as an interruption and not as a loss.
func TestInterruptedRead(t *testing.T) {
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off,shard=16KiB")
	st := h.put(random(1000))
	for _, id := range h.pool.IDs {
		h.pool.Net.Stall(id)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Hour)
	time.AfterFunc(50*time.Millisecond, cancel)
	info := st.info
	started := time.Now()
	if _, _, err := h.Read(ctx, st.ID, &info, 0, 10); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	if took := time.Since(started); took > 2*time.Second {
		t.Fatalf("the read went on for %v", took)
	}
	wantNoGoroutines(t)
}

// TestNobodyAnswers: reads end within ReadTimeout, also when nodes hang, and
// the error is not one of an interruption.
func TestNobodyAnswers(t *testing.T) {
	if d := (&Options{}); true {
		if d.EnsureDefaults(); d.ReadTimeout >= 30*time.Second {
			t.Fatalf("reads may take %v", d.ReadTimeout)
		}
	}
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off,shard=16KiB", func(o *Options) {
		o.RequestTimeout, o.ReadTimeout, o.HedgeAfter = 200*time.Millisecond, 700*time.Millisecond, 50*time.Millisecond
	})
	st := h.put(random(1000))
	for name, fault := range map[string]func(placement.NodeID){"killed": h.pool.Net.Kill, "stopped": h.pool.Net.Stall} {
		for _, id := range h.pool.IDs {
			fault(id)
		}
		info := st.info
		started := time.Now()
		_, _, err := h.Read(ctx, st.ID, &info, 0, 1)
		_, _, saltErr := h.Salt(ctx, st.ID, &info)
		if !errors.Is(err, ErrUnavailable) || !errors.Is(saltErr, ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || errors.Is(saltErr, context.DeadlineExceeded) {
			t.Errorf("%s: %v, %v", name, err, saltErr)
		}
		if took := time.Since(started); took > 3*time.Second {
			t.Errorf("%s: %v", name, took)
		}
		for _, id := range h.pool.IDs {
			h.pool.Net.Restart(id)
		}
	}
	wantNoGoroutines(t)
}

func lose(info metastore.StripeInfo) metastore.StripeInfo {
	info.Holders = make([]metastore.Holder, info.K+info.M)
	for i := range info.Holders {
		info.Holders[i].Primary = "nobody"
	}
	return info
}

// TestLostHints: keepers tell; without them the pool does.
func TestLostHints(t *testing.T) {
	h := newHarness(t, 9, "rs-ratio:2+2,mirror=off,shard=16KiB")
	st := h.put(random(20_000))
	found := h.check(st, lose(st.info))
	if fmt.Sprint(found.Holders) != fmt.Sprint(st.info.Holders) {
		t.Fatalf("keepers told %v, the holders are %v", found.Holders, st.info.Holders)
	}
	// Keepers forget: the records are deleted.
	keys, err := h.Keys(st.ID, 1, 1)
	h.ok(err)
	for _, id := range h.pool.IDs {
		h.ok(h.pool.Stores[id].ForgetIndex(ctx, keys.Blind))
	}
	started := time.Now()
	h.check(st, lose(st.info))
	t.Logf("by broadcast: %v", time.Since(started))
	// With one holder lost the answers are enough all the same.
	h.pool.Net.Kill(placement.NodeID(st.info.Holders[0].Primary))
	h.check(st, lose(st.info))
}

// lying answers in a node's stead.
type lying struct {
	p2p.Transport
	answer func(to placement.NodeID, req *wire.Request, rep *wire.Reply)
}

func (l *lying) Call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	rep, replyBody, err := l.Transport.Call(ctx, to, req, body)
	if err == nil && l.answer != nil {
		l.answer(to, req, rep)
	}
	return rep, replyBody, err
}

// TestLyingNodes: forged columns, and index records that name other holders,
// signed by nobody or with moves that never happened.
func TestLyingNodes(t *testing.T) {
	liar := &lying{}
	h := newHarness(t, 8, "rs-ratio:4+2,mirror=off,shard=16KiB", func(o *Options) {
		liar.Transport = o.Transport
		o.Transport = liar
	})
	st := h.put(random(60_000))
	t.Run("columns", func(t *testing.T) {
		for a := range 6 {
			bad := map[string]bool{st.info.Holders[a].Primary: true, st.info.Holders[(a+2)%6].Primary: true}
			liar.answer = func(to placement.NodeID, _ *wire.Request, rep *wire.Reply) {
				if c := rep.GetGetColumns().GetColumns(); len(c) > 0 && bad[string(to)] {
					c[0].Column = random(32)
				}
			}
			info := st.info
			salt, _, err := h.Salt(ctx, st.ID, &info)
			h.ok(err)
			if salt != st.Salt {
				t.Fatal("another salt")
			}
		}
	})
	keys, err := h.Keys(st.ID, 1, 1)
	h.ok(err)
	keepers := h.keepers(keys.Blind, 2, false, 1)
	for name, lie := range map[string]func(r *wire.IndexRecord){
		"changed holders": func(r *wire.IndexRecord) {
			for _, h := range r.Holders {
				h.Primary = "thief"
			}
		},
		"false moves": func(r *wire.IndexRecord) {
			for i, h := range r.Holders {
				r.Moves = append(r.Moves, &wire.HolderMove{Index: uint32(i), From: h.Primary, To: "thief"})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			liar.answer = func(to placement.NodeID, _ *wire.Request, rep *wire.Reply) {
				if r := rep.GetGetIndex().GetRecords(); len(r) > 0 && to == keepers[0] {
					lie(r[0])
				}
			}
			h.check(st, lose(st.info))
			// Even where no other keeper is left.
			for _, id := range h.pool.IDs {
				if id != keepers[0] {
					h.ok(h.pool.Stores[id].ForgetIndex(ctx, keys.Blind))
				}
			}
			h.check(st, lose(st.info))
			info := st.info
			h.ok(h.Publish(ctx, []Placed{{ID: st.ID, Info: &info, Manifest: st.Manifest}}))
		})
	}
}

// TestFailOver: nodes that are full, refuse or die while a stripe is placed.
func TestFailOver(t *testing.T) {
	var refuse atomic.Int32
	faulty := &pooltest.Faulty{}
	h := newHarness(t, 8, "rs-ratio:4+2,mirror=off,shard=16KiB", func(o *Options) {
		faulty.Transport = o.Transport
		o.Transport = faulty
	})
	faulty.Before = func(op string, to placement.NodeID) error {
		if op == "put_shard" && refuse.Add(-1) >= 0 {
			return p2p.Statusf(wire.Status_STATUS_FULL, "full")
		}
		return nil
	}
	refuse.Store(2)
	st := h.put(random(60_000))
	h.check(st, st.info)
	used := make(map[string]bool)
	for _, holder := range st.info.Holders {
		if used[holder.Primary] {
			t.Fatalf("a node twice: %v", st.info.Holders)
		}
		used[holder.Primary] = true
	}
	// Three of eight are more than the spares make good.
	refuse.Store(3)
	if _, err := h.Place(ctx, h.seal(random(60_000))); !errors.Is(err, ErrTooFewNodes) {
		t.Fatalf("five nodes for six shards: %v", err)
	}
	// A node that dies with the shard on its way.
	faulty.Before = func(op string, to placement.NodeID) error {
		if op == "put_shard" && refuse.Add(1) == 1 {
			h.pool.Net.Kill(to)
		}
		return nil
	}
	refuse.Store(0)
	sealed := h.seal(random(60_000))
	info, err := h.Place(ctx, sealed)
	h.ok(err)
	h.ok(h.Publish(ctx, []Placed{{ID: sealed.ID, Info: &info, Manifest: sealed.Manifest}}))
	if info.Placed() != 6 {
		t.Fatalf("%d shards placed", info.Placed())
	}
	wantNoGoroutines(t)
}

// TestMirrorStandsIn: where no node is to spare, a shard's mirror takes it when
// its primary does not.
func TestMirrorStandsIn(t *testing.T) {
	var failed atomic.Bool
	faulty := &pooltest.Faulty{Before: func(op string, to placement.NodeID) error {
		if op == "put_shard" && !failed.Swap(true) {
			return p2p.ErrUnreachable
		}
		return nil
	}}
	h := newHarness(t, 12, "rs-ratio:4+2,mirror=on,shard=16KiB", func(o *Options) {
		faulty.Transport = o.Transport
		o.Transport = faulty
	})
	st := h.seal(random(60_000))
	info, err := h.Place(ctx, st)
	h.ok(err)
	h.ok(h.Publish(ctx, []Placed{{ID: st.ID, Info: &info, Manifest: st.Manifest}}))
	if info.Placed() != 6 || info.Complete {
		t.Fatalf("%d shards placed, complete %v", info.Placed(), info.Complete)
	}
	// Mending adds the copy that is missing.
	info, err = h.Mend(ctx, st.ID, info)
	h.ok(err)
	if !info.Complete {
		t.Fatalf("not mended: %+v", info.Holders)
	}
}

// TestKeepersStandIn: a stripe is published while its keepers are silent; as
// many others have its record then.
func TestKeepersStandIn(t *testing.T) {
	h := newHarness(t, 9, "rs-ratio:2+2,mirror=off,shard=16KiB")
	st := h.seal(random(1000))
	keys, err := h.Keys(st.ID, 1, 1)
	h.ok(err)
	info, err := h.Place(ctx, st)
	h.ok(err)
	silent := 0
	for _, id := range h.keepers(keys.Blind, 2, false, 1) {
		holder := false
		for _, h := range info.Holders {
			holder = holder || h.Primary == string(id)
		}
		if !holder {
			h.pool.Net.Kill(id)
			silent++
		}
	}
	h.ok(h.Publish(ctx, []Placed{{ID: st.ID, Info: &info, Manifest: st.Manifest}}))
	kept := 0
	for _, id := range h.pool.IDs {
		if _, err := h.pool.Stores[id].Index(keys.Blind); err == nil {
			kept++
		}
	}
	if !info.Complete || info.IndexAcks != 3 || kept < 3 {
		t.Fatalf("%d keepers silent: %d nodes have the record, %d of %d keepers, complete %v", silent, kept, info.IndexAcks, info.IndexKeepers, info.Complete)
	}
	lost := lose(info)
	if _, _, err := h.Read(ctx, st.ID, &lost, 0, 100); err != nil {
		t.Fatal(err)
	}
}

// TestProvisional: what is never published is not committed anywhere.
func TestProvisional(t *testing.T) {
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off,shard=16KiB")
	st := h.seal(random(1000))
	info, err := h.Place(ctx, st)
	h.ok(err)
	keys, err := h.Keys(st.ID, 1, 1)
	h.ok(err)
	count := func() (provisional, committed int) {
		for _, id := range h.pool.IDs {
			shards, err := h.pool.Stores[id].StripeShards(keys.Blind)
			h.ok(err)
			for _, s := range shards {
				if s.Provisional {
					provisional++
				} else {
					committed++
				}
			}
		}
		return provisional, committed
	}
	if p, c := count(); p != info.K+info.M || c != 0 {
		t.Fatalf("%d provisional, %d committed before the index", p, c)
	}
	h.ok(h.Publish(ctx, []Placed{{ID: st.ID, Info: &info, Manifest: st.Manifest}}))
	if p, c := count(); p != 0 || c != info.K+info.M {
		t.Fatalf("%d provisional, %d committed after", p, c)
	}
}

// TestDeleteAndForgery: only the owner's key deletes and reads columns.
func TestDeleteAndForgery(t *testing.T) {
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off,shard=16KiB")
	st := h.put(random(1000))
	stranger := *h
	other, err := seal.NewBundle(1, rand.Reader)
	h.ok(err)
	stranger.Store = NewStore(Options{
		Transport: h.pool.Device(t), Volume: [16]byte{1}, Epoch: func() uint32 { return 1 },
		Bundle: func(uint32) (*seal.Bundle, error) { return other, nil },
	})
	keys, err := h.Keys(st.ID, 1, 1)
	h.ok(err)
	forged, err := stranger.Keys(st.ID, 1, 1)
	h.ok(err)
	forged.Blind = keys.Blind // it knows the name that nodes see
	node := placement.NodeID(st.info.Holders[2].Primary)
	if err := stranger.deleteShard(ctx, forged, 2, node); err == nil || !strings.Contains(err.Error(), "DENIED") {
		t.Errorf("delete by a stranger: %v", err)
	}
	if _, err := stranger.column(ctx, forged, 2, node, st.info.Roots[2]); err == nil || !strings.Contains(err.Error(), "DENIED") {
		t.Errorf("column for a stranger: %v", err)
	}
	// A signature for one shard, node or operation is none for another.
	auth, err := h.authorize(ctx, keys, seal.OpColumns, 2, node)
	h.ok(err)
	for name, req := range map[string]*wire.Request{
		"another operation": {Op: &wire.Request_DeleteShards{DeleteShards: &wire.DeleteShards{Requests: []*wire.ColumnRequest{{Blind: keys.Blind[:], Index: 2, Authorization: auth}}}}},
		"another shard":     {Op: &wire.Request_GetColumns{GetColumns: &wire.GetColumns{Requests: []*wire.ColumnRequest{{Blind: keys.Blind[:], Index: 3, Authorization: auth}}}}},
	} {
		rep, _, err := h.Store.t.Call(ctx, node, req, nil)
		if err == nil && (rep.GetDeleteShards().GetStatus() == nil || rep.GetDeleteShards().Status[0] != wire.Status_STATUS_DENIED) &&
			(rep.GetGetColumns().GetColumns() == nil || rep.GetGetColumns().Columns[0].Status != wire.Status_STATUS_DENIED) {
			t.Errorf("%s: %v", name, rep)
		}
	}
	h.check(st, st.info)

	// The owner deletes; a node that is declared dead does not hold it up.
	h.pool.Net.Kill(placement.NodeID(st.info.Holders[0].Primary))
	if err := h.Delete(ctx, st.ID, &st.info); err == nil {
		t.Error("a silent holder goes unnoticed")
	}
	h.pool.Net.Bury(placement.NodeID(st.info.Holders[0].Primary))
	h.ok(h.Delete(ctx, st.ID, &st.info))
	h.ok(h.Delete(ctx, st.ID, &st.info)) // again is harmless
	info := st.info
	if _, _, err := h.Read(ctx, st.ID, &info, 0, 10); !errors.Is(err, ErrUnavailable) {
		t.Errorf("read after delete: %v", err)
	}
}

// TestMend: dead holders, holders without their shard, too few nodes for all.
func TestMend(t *testing.T) {
	h := newHarness(t, 7, "rs-ratio:4+2,mirror=off,shard=16KiB")
	st := h.put(random(60_000))
	keys, err := h.Keys(st.ID, 1, 1)
	h.ok(err)
	holder := func(i int) placement.NodeID { return placement.NodeID(st.info.Holders[i].Primary) }
	// One has lost its shard and does not hide it.
	h.ok(h.deleteShard(ctx, keys, 4, holder(4)))
	info, err := h.Mend(ctx, st.ID, st.info)
	h.ok(err)
	if !info.Complete || info.Holders[4].Primary == string(holder(4)) {
		t.Fatalf("mended: %+v", info.Holders)
	}
	// Of two that die one can be replaced: that much is reached.
	for _, i := range []int{0, 1} {
		h.pool.Net.Kill(holder(i))
		h.pool.Net.Bury(holder(i))
	}
	before := info
	info, err = h.Mend(ctx, st.ID, before)
	if err == nil || info.Complete {
		t.Fatalf("six shards on five nodes: %v %+v", err, info.Holders)
	}
	if info.Placed() != 5 {
		t.Fatalf("%d shards placed: %v", info.Placed(), err)
	}
	h.check(st, info)
	h.pool.Net.Kill(placement.NodeID(info.Holders[5].Primary))
	h.check(st, info)
}

// TestLayout: small slices never straddle shards; partial stripes are small,
// and their padding looks like the rest.
func TestLayout(t *testing.T) {
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off,shard=64KiB")
	var small [][]byte
	for i := range 60 {
		small = append(small, bytes.Repeat([]byte{byte(i)}, 100+i*37))
	}
	sealed := h.seal(small...)
	for i, r := range sealed.Slices {
		size := int(sealed.Info.ShardBytes)
		first, last := int(r.StripeOff)/size, (int(r.StripeOff)+seal.SealedBytes(int(r.StoredLen))-1)/size
		if seal.SealedBytes(int(r.StoredLen)) <= size/4 && first != last {
			t.Errorf("slice %d of %d bytes lies on shards %d to %d", i, r.StoredLen, first, last)
		}
	}
	for _, n := range []int{1, 1000, 70_000, 200_000} {
		sealed := h.seal(bytes.Repeat([]byte{0}, n))
		g := sealed.Info
		if n <= 1000 && g.K*int(g.ShardBytes) > 32<<10 {
			t.Errorf("%d bytes take a stripe of %d+%d × %d", n, g.K, g.M, g.ShardBytes)
		}
		for i, body := range sealed.Bodies {
			var histogram [256]int
			for _, b := range body {
				histogram[b]++
			}
			chi := 0.0
			expected := float64(len(body)) / 256
			for _, n := range histogram {
				chi += (float64(n) - expected) * (float64(n) - expected) / expected
			}
			// 255 degrees of freedom: 480 is 10 standard deviations off.
			if chi > 480 {
				t.Errorf("%d bytes, shard %d: bytes are not evenly spread (%.0f)", n, i, chi)
			}
		}
	}
	// Sealing twice gives nothing in common.
	a, b := h.seal([]byte("x")), h.seal([]byte("x"))
	if a.ID == b.ID || a.Salt == b.Salt || bytes.Equal(a.Bodies[0], b.Bodies[0]) {
		t.Error("two stripes of the same slice are alike")
	}
}

// TestSplit: slices that leave much of a stripe empty are divided, in their
// order, among stripes with little padding; others stay together.
func TestSplit(t *testing.T) {
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off")
	const chunkBytes = 80_000
	for _, c := range []struct {
		chunks, parts int
	}{{0, 1}, {1, 1}, {13, 1}, {27, 2}, {34, 2}, {40, 2}, {50, 1}} {
		b, err := h.NewBuilder(h.policy, metastore.PurposeContent)
		h.ok(err)
		for i := range c.chunks {
			if _, ok := b.Add(bytes.Repeat([]byte{byte(i)}, chunkBytes), chunkBytes, false); !ok {
				t.Fatalf("chunk %d has no room", i)
			}
		}
		parts := b.Split()
		if len(parts) != c.parts {
			t.Errorf("%d chunks: %d stripes, want %d", c.chunks, len(parts), c.parts)
		}
		next := 0
		for i, part := range parts {
			for _, slice := range part.slices {
				if slice.stored[0] != byte(next) {
					t.Fatalf("%d chunks: stripe %d has chunk %d, want %d", c.chunks, i, slice.stored[0], next)
				}
				next++
			}
			g, _, _, used, err := part.geometry()
			h.ok(err)
			if padding := g.DataBytes() - used; c.chunks > 0 && padding > paddingBytesMax {
				t.Errorf("%d chunks: stripe %d of %v has %d bytes of padding", c.chunks, i, g, padding)
			}
		}
		if next != c.chunks {
			t.Errorf("%d of %d chunks are in a stripe", next, c.chunks)
		}
	}
}

// TestSaltFromAnyColumns: every choice of k columns gives the salt.
func TestSaltFromAnyColumns(t *testing.T) {
	h := newHarness(t, 6, "rs-ratio:4+2,mirror=off,shard=16KiB")
	sealed := h.seal(random(100))
	k, n := sealed.Info.K, len(sealed.Bodies)
	code, err := erasure.New(k, n-k)
	h.ok(err)
	for set := range 1 << n {
		columns := make([][]byte, n)
		have := 0
		for i := range n {
			if set>>i&1 == 1 {
				columns[i] = sealed.Bodies[i][:erasure.ColumnBytes]
				have++
			}
		}
		salt, err := code.Salt(columns)
		if have < k {
			if err == nil {
				t.Fatalf("%d columns give a salt", have)
			}
		} else if err != nil || salt != sealed.Salt {
			t.Fatalf("columns %b: %v", set, err)
		}
	}
}

// counted counts broadcasts and the stripes in them.
type counted struct {
	p2p.Transport
	broadcasts, blinds atomic.Int64
}

func (c *counted) Broadcast(ctx context.Context, l *wire.Lookup) error {
	c.broadcasts.Add(1)
	c.blinds.Add(int64(len(l.Blinds)))
	return c.Transport.Broadcast(ctx, l)
}

// Stripes that are looked for at the same time share a broadcast, and what
// nobody knows is not asked for again at once.
func TestBroadcastsAreSharedAndMissesKept(t *testing.T) {
	c := &counted{}
	h := newHarness(t, 6, "2+1,shard=16KiB", func(o *Options) {
		c.Transport = o.Transport
		o.Transport = &pooltest.Faulty{Transport: c, Before: func(op string, _ placement.NodeID) error {
			if op == "get_index" {
				return p2p.ErrUnreachable
			}
			return nil
		}}
	})
	var all []*stored
	for i := range 20 {
		all = append(all, h.put(bytes.Repeat([]byte{byte(i)}, 5000)))
	}
	unknown := *all[0]
	unknown.Sealed = &Sealed{}
	rand.Read(unknown.ID[:])
	read := func(stripes ...*stored) (failed int64) {
		var wg sync.WaitGroup
		var count atomic.Int64
		for _, st := range stripes {
			wg.Go(func() {
				info := st.info
				info.Holders = make([]metastore.Holder, len(info.Holders))
				if _, _, err := h.Read(ctx, st.ID, &info, 0, 100); err != nil {
					count.Add(1)
				}
			})
		}
		wg.Wait()
		return count.Load()
	}
	if failed := read(append(all, &unknown)...); failed != 1 {
		t.Fatalf("%d reads failed, want 1", failed)
	}
	if c.broadcasts.Load() >= 10 || c.blinds.Load() != 21 {
		t.Errorf("%d broadcasts for %d stripes", c.broadcasts.Load(), c.blinds.Load())
	}
	before := c.broadcasts.Load()
	if failed := read(&unknown); failed != 1 || c.broadcasts.Load() != before {
		t.Errorf("%d broadcasts for a stripe that nobody knew a moment ago", c.broadcasts.Load()-before)
	}
	if failed := read(all[1]); failed != 0 || c.broadcasts.Load() != before+1 {
		t.Errorf("%d reads failed after %d broadcasts", failed, c.broadcasts.Load()-before)
	}
}

// Shards that have moved, of which the owner does not know, are deleted as well.
func TestDeleteFindsMovedShards(t *testing.T) {
	h := newHarness(t, 7, "2+1")
	st := h.put(make([]byte, 1000))
	for _, holder := range st.info.Holders[:2] {
		h.ok(h.pool.Nodes[placement.NodeID(holder.Primary)].Drain(ctx, func(node.Drained) {}))
	}
	h.check(st, st.info)
	h.ok(h.Delete(ctx, st.ID, &st.info))
	for id, store := range h.pool.Stores {
		if u := store.Usage(); u.Shards != 0 {
			t.Errorf("%s holds %d shards", id, u.Shards)
		}
	}
}
