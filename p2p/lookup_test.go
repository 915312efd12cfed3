package p2p_test

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/stripe"
)

// way is a way to find a stripe's shards.
type way string

const (
	byHint      way = "hint"
	byKeepers   way = "keepers"
	byBroadcast way = "broadcast"
)

// figures are what a lookup took and cost. Messages are requests and replies,
// and packets of the network for what is gossiped.
type figures struct {
	FirstByte, KthShard time.Duration
	Searches            int // requests sent to find out where shards are, and broadcasts
	Messages, Bytes     int // requests, replies and answers of the device, all included
	Packets, PacketSum  int // all packets of all members meanwhile, and their bytes
	Found               int
}

// watched counts what goes through a transport.
type watched struct {
	p2p.Transport
	way way

	mu      sync.Mutex // guards what follows
	start   time.Time
	figures figures
	shards  int
	k       int
}

func (w *watched) begin(k int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.start, w.figures, w.shards, w.k = time.Now(), figures{}, 0, k
}

func (w *watched) Call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	op := p2p.OpOf(req)
	if op == "get_index" && w.way == byBroadcast {
		return nil, nil, p2p.ErrUnreachable // as if no keeper were left
	}
	rep, got, err := w.Transport.Call(ctx, to, req, body)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.figures.Messages += 2
	w.figures.Bytes += proto.Size(req) + len(body) + len(got)
	if rep != nil {
		w.figures.Bytes += proto.Size(rep)
	}
	switch op {
	case "get_index":
		w.figures.Searches++
	case "get_shard":
		if err != nil {
			break
		}
		if w.shards++; w.shards == 1 {
			w.figures.FirstByte = time.Since(w.start)
		}
		if w.shards == w.k {
			w.figures.KthShard = time.Since(w.start)
		}
	}
	return rep, got, err
}

func (w *watched) Broadcast(ctx context.Context, l *wire.Lookup) error {
	w.mu.Lock()
	w.figures.Searches++
	w.mu.Unlock()
	return w.Transport.Broadcast(ctx, l)
}

// Handle counts the answers to broadcasts.
func (w *watched) Handle(h p2p.Handler) {
	w.Transport.Handle(func(ctx context.Context, from p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		w.mu.Lock()
		w.figures.Messages++
		w.figures.Bytes += proto.Size(req)
		w.mu.Unlock()
		return h(ctx, from, req, body)
	})
}

// client reads stripes from a simulated pool.
type client struct {
	*stripe.Store
	s      *simulation
	device *simulated
	watch  *watched
	policy erasure.Policy
}

func (s *simulation) client(device *simulated, policy string) *client {
	s.t.Helper()
	c := &client{s: s, device: device, watch: &watched{Transport: device.Host}}
	var err error
	c.policy, err = erasure.ParsePolicy(policy)
	s.ok(err)
	bundle, err := seal.NewBundle(1, rand.Reader)
	s.ok(err)
	c.Store = stripe.NewStore(stripe.Options{
		Transport: c.watch, Volume: [16]byte{1}, Epoch: func() uint32 { return 1 },
		Bundle: func(uint32) (*seal.Bundle, error) { return bundle, nil }, Logger: testLogger(),
	})
	return c
}

// stored is a published stripe.
type stored struct {
	id   erasure.StripeID
	info metastore.StripeInfo
	data []byte // of all data shards
}

// put stores a stripe.
func (c *client) put() stored {
	c.s.t.Helper()
	b, err := c.NewBuilder(c.policy, metastore.PurposeContent)
	c.s.ok(err)
	data := make([]byte, c.policy.K*c.policy.ShardBytes-1024)
	_, _ = rand.Read(data)
	if _, ok := b.Add(data, len(data), false); !ok {
		c.s.t.Fatal("the data does not fit")
	}
	sealed, err := c.Seal(b)
	c.s.ok(err)
	info, err := c.Place(c.s.t.Context(), sealed)
	c.s.ok(err)
	c.s.ok(c.Publish(c.s.t.Context(), []stripe.Placed{{ID: sealed.ID, Info: &info, Manifest: sealed.Manifest}}))
	st := stored{id: sealed.ID, info: info}
	for i := range info.K {
		st.data = append(st.data, sealed.Bodies[i][erasure.ColumnBytes:]...)
	}
	return st
}

// unknown is a stripe that nobody has.
func (c *client) unknown(like stored) stored {
	_, _ = rand.Read(like.id[:])
	return like
}

// read looks stripes up in one way, all at once, and reads them whole.
func (c *client) read(way way, cold bool, stripes ...stored) figures {
	c.s.t.Helper()
	time.Sleep(20 * time.Second) // what went before is over
	synctest.Wait()
	if cold {
		c.device.Disconnect()
	}
	c.watch.way = way
	packets, bytes := c.s.packets.Load(), c.s.bytes.Load()
	c.watch.begin(c.policy.K * len(stripes))
	start := time.Now()
	var wg sync.WaitGroup
	var mu sync.Mutex
	found := 0
	for _, st := range stripes {
		wg.Go(func() {
			info := st.info
			info.Holders = slices.Clone(info.Holders)
			if way != byHint {
				clear(info.Holders)
			}
			_, _, err := c.Read(c.s.t.Context(), st.id, &info, 0, info.K*int(info.ShardBytes))
			switch {
			case err == nil:
				mu.Lock()
				found++
				mu.Unlock()
			case !errors.Is(err, stripe.ErrUnavailable):
				c.s.t.Errorf("lookup by %s: %v", way, err)
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	c.watch.mu.Lock()
	defer c.watch.mu.Unlock()
	f := c.watch.figures
	f.Found = found
	if f.KthShard == 0 {
		f.KthShard = took
	}
	f.Packets, f.PacketSum = int(c.s.packets.Load()-packets), int(c.s.bytes.Load()-bytes)
	return f
}

// Lookups of the real nodes over a simulated network, each in turn by the way
// that is left when the one before is not. What they cost is bounded, however
// large the pool is.
func TestLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t, 50*time.Millisecond)
		s.heartbeat = 2 * time.Minute
		defer s.close()
		c := s.client(s.pool(20), "4+2,shard=16KiB")
		st := c.put()
		const roundTrip, margin = 100 * time.Millisecond, 30 * time.Millisecond
		keepers := placement.KeeperCount(st.info.M, st.info.Mirrored, 20)

		f := c.read(byHint, false, st)
		if f.Found != 1 || f.Searches != 0 || f.KthShard > roundTrip+margin || f.Messages > 2*st.info.K {
			t.Errorf("by hint: %+v", f)
		}
		f = c.read(byKeepers, false, st)
		if f.Found != 1 || f.Searches > 2*keepers || f.FirstByte > 2*roundTrip+margin || f.Messages > 2*(2*keepers+st.info.K) {
			t.Errorf("by keepers: %+v", f)
		}
		f = c.read(byBroadcast, false, st)
		if f.Found != 1 || f.Searches != 1 || f.FirstByte > 2*roundTrip+margin {
			t.Errorf("by broadcast: %+v", f)
		}
		many := []stored{st}
		for range 29 {
			many = append(many, c.put())
		}
		f = c.read(byBroadcast, false, many...)
		if f.Found != len(many) || f.Searches > 3 {
			t.Errorf("%d at once by broadcast: %+v", len(many), f)
		}
		f = c.read(byHint, true, st)
		if f.Found != 1 || f.KthShard > 8*roundTrip {
			t.Errorf("by hint, cold: %+v", f)
		}
		f = c.read(byBroadcast, true, st)
		if f.Found != 1 || f.KthShard > 8*roundTrip {
			t.Errorf("by broadcast, cold: %+v", f)
		}
		t.Logf("by broadcast, cold: %+v", f)
		f = c.read(byKeepers, false, c.unknown(st))
		if f.Found != 0 || f.Searches > 2*keepers+1 || f.KthShard > 5*time.Second {
			t.Errorf("not found: %+v", f)
		}
	})
}
