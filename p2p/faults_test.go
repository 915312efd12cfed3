package p2p_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/node"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/shardstore"
)

// liar is the transport of a node that, once it lies, answers with wrong bytes.
type liar struct {
	p2p.Transport
	lies atomic.Bool
	told atomic.Int64
}

func (l *liar) Handle(h p2p.Handler) {
	l.Transport.Handle(func(ctx context.Context, from p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		rep, got, err := h(ctx, from, req, body)
		if err == nil && req.GetGetShard() != nil && len(got) > 0 && l.lies.Load() {
			l.told.Add(1)
			got = slices.Clone(got)
			got[len(got)/2] ^= 1
		}
		return rep, got, err
	})
}

// fault is something that is planned to go wrong, and what it has hit.
type fault struct {
	name  string
	at    time.Duration
	start func()
	hits  func() int64
}

// faultsSeed makes the plan; which packet comes first is the scheduler's.
func faultsSeed(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("DEFS_SIM_SEED")
	if text == "" {
		return 1
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return seed
}

// tick is the unit of the plan. Everything that nodes wait for is shortened
// alike: silence of 45 s is copied, of 3 min dead.
const tick = 10 * time.Second

// TestSimulatedFaults runs real nodes through faults in a simulated network.
// Nobody repairs but the nodes themselves. It prints its seed, which makes the
// plan; it fails if a planned fault has hit nothing, if a read brings wrong
// bytes or fails, and if any stripe is not whole at the end of a round.
// DEFS_SIM_ROUNDS (1) is how often all faults happen, DEFS_SIM_NODES (15) the
// pool.
func TestSimulatedFaults(t *testing.T) {
	seed, rounds, nodes := faultsSeed(t), 1, 15
	for name, value := range map[string]*int{"DEFS_SIM_ROUNDS": &rounds, "DEFS_SIM_NODES": &nodes} {
		if text := os.Getenv(name); text != "" {
			var err error
			if *value, err = strconv.Atoi(text); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("DEFS_SIM_SEED=%d DEFS_SIM_ROUNDS=%d DEFS_SIM_NODES=%d", seed, rounds, nodes)
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t, 10*time.Millisecond)
		s.heartbeat, s.deadAfter = 5*time.Second, 3*time.Minute
		s.nodes = node.Options{
			CopyAfter: 45 * time.Second, MirrorInterval: tick, RepairInterval: tick, HandoverDelay: tick,
			CensusInterval: time.Minute, AuditInterval: tick,
		}
		defer s.close()
		c := s.client(s.pool(nodes), "4+2,shard=16KiB")
		var stripes []stored
		for range 2 * nodes {
			stripes = append(stripes, c.put())
		}
		rng := rand.New(rand.NewPCG(seed, 52))
		begun := time.Now()
		for round := range rounds {
			s.round(t, c, rng, stripes, fmt.Sprint("round ", round+1))
		}
		t.Logf("%v went by, %d packets were lost and %d slow", time.Since(begun).Round(time.Second), s.lost.Load(), s.slowed.Load())
	})
}

// round lets every kind of fault happen once, and waits until all is whole.
func (s *simulation) round(t *testing.T, c *client, rng *rand.Rand, stripes []stored, name string) {
	t.Helper()
	alive := slices.DeleteFunc(slices.Clone(s.members), func(m *simulated) bool { return m.store == nil || m.crashed })
	rng.Shuffle(len(alive), func(i, j int) { alive[i], alive[j] = alive[j], alive[i] })
	crashed, cut, slow, lying := alive[:1], alive[1:4], alive[4:6], alive[6]
	when := func(from, to int) time.Duration { return time.Duration(from+rng.IntN(to-from)) * tick }
	var lostShards, lostBefore, slowedBefore, toldBefore int64
	after := func(span time.Duration, f func()) { time.AfterFunc(span, f) }
	faults := []fault{
		{"crash", when(1, 18), func() {
			for _, m := range crashed {
				lostShards += int64(len(s.held(c, m, stripes)))
				s.crash(m)
				s.add(p2p.RoleNode)
			}
		}, func() int64 { return lostShards }},
		{"partition", when(1, 18), func() {
			lostBefore = s.lost.Load()
			s.delay(never, cut...)
			after(6*tick, func() { s.delay(0, cut...) })
		}, func() int64 { return s.lost.Load() - lostBefore }},
		{"slow", when(1, 18), func() {
			slowedBefore = s.slowed.Load()
			s.delay(2*time.Second, slow...)
			after(6*tick, func() { s.delay(0, slow...) })
		}, func() int64 { return s.slowed.Load() - slowedBefore }},
		{"lying", when(1, 6), func() {
			toldBefore = lying.liar.told.Load()
			lying.liar.lies.Store(true)
			after(18*tick, func() { lying.liar.lies.Store(false) })
		}, func() int64 { return lying.liar.told.Load() - toldBefore }},
	}
	began := time.Now()
	slices.SortFunc(faults, func(a, b fault) int { return int(a.at - b.at) })
	next, whole := 0, false
	for ticks := 0; !whole; ticks++ {
		for next < len(faults) && faults[next].at <= time.Since(began) {
			t.Logf("%s, %v: %s", name, time.Since(began), faults[next].name)
			faults[next].start()
			next++
		}
		st := stripes[rng.IntN(len(stripes))]
		info := st.info
		got, _, err := c.Read(t.Context(), st.id, &info, 0, len(st.data))
		if err != nil || !bytes.Equal(got, st.data) {
			t.Fatalf("%s, %v: read of %v: %v", name, time.Since(began), st.id, err)
		}
		time.Sleep(tick)
		if ticks >= 24 {
			wrong := 0
			for _, st := range stripes {
				wrong += s.missing(c, st)
			}
			if whole = wrong == 0; !whole && ticks > 240 {
				t.Fatalf("%s: %d copies are missing after %v", name, wrong, time.Since(began))
			}
		}
	}
	t.Logf("%s: all stripes are whole after %v", name, time.Since(began))
	for _, f := range faults {
		if hits := f.hits(); hits == 0 {
			t.Errorf("%s: the planned fault %q has hit nothing", name, f.name)
		} else {
			t.Logf("%s: %s hit %d times", name, f.name, hits)
		}
	}
}

// delay holds up all packets from and to members; 0 ends it.
func (s *simulation) delay(by time.Duration, members ...*simulated) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range members {
		if by == 0 {
			delete(s.delays, m.addr)
		} else {
			s.delays[m.addr] = by
		}
	}
}

// crash ends a member for good: it falls silent first.
func (s *simulation) crash(m *simulated) {
	s.delay(never, m)
	m.crashed = true
	m.stop()
}

// held lists what a member's disk has of stripes, verified, by shard number.
func (s *simulation) held(c *client, m *simulated, stripes []stored) (indexes []int) {
	s.t.Helper()
	for _, st := range stripes {
		keys, err := c.Keys(st.id, st.info.Epoch, st.info.LockVersion)
		s.ok(err)
		shards, err := m.store.StripeShards(keys.Blind)
		s.ok(err)
		for _, info := range shards {
			r, err := m.store.ReadShard(shardstore.Key{Blind: keys.Blind, Index: info.Index}, 0, 0, nil)
			if err != nil || info.Provisional {
				continue
			}
			body := slices.Concat(r.Column[:], r.Coded)
			if erasure.VerifyBody(st.info.Roots[info.Index], body) == nil {
				indexes = append(indexes, int(info.Index))
			}
		}
	}
	return indexes
}

// missing counts the copies that a stripe lacks at the disks of live nodes.
func (s *simulation) missing(c *client, st stored) (copies int) {
	there := make([]int, st.info.K+st.info.M)
	for _, m := range s.members {
		if m.store == nil || m.crashed {
			continue
		}
		for _, i := range s.held(c, m, []stored{st}) {
			there[i]++
		}
	}
	want := 1
	if st.info.Mirrored {
		want = 2
	}
	for _, n := range there {
		copies += max(0, want-n)
	}
	return copies
}
