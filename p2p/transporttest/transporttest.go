// Package transporttest holds what every p2p.Transport must do.
//
//	transporttest.Run(t, func(t *testing.T, count int) []p2p.Transport { … })
package transporttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const patience = 20 * time.Second

// Run runs all cases. start returns count transports that already know and
// can reach each other; it closes them at the end of the test.
func Run(t *testing.T, start func(t *testing.T, count int) []p2p.Transport) {
	cases := []struct {
		name  string
		count int
		run   func(t *testing.T, ts []p2p.Transport)
	}{
		{"MembersKnowEachOther", 3, membersKnowEachOther},
		{"CallCarriesBodies", 2, callCarriesBodies},
		{"CallReachesSelf", 2, callReachesSelf},
		{"CallsRunInParallel", 2, callsRunInParallel},
		{"StatusesComeBack", 2, statusesComeBack},
		{"InternalErrorsStayInside", 2, internalErrorsStayInside},
		{"NoHandlerIsBusy", 2, noHandlerIsBusy},
		{"TooLargeIsRefused", 2, tooLargeIsRefused},
		{"CancelledCallReturns", 2, cancelledCallReturns},
		{"UnknownPeerIsUnreachable", 2, unknownPeerIsUnreachable},
		{"ClosedPeerIsUnreachable", 2, closedPeerIsUnreachable},
		{"NonceMatches", 3, nonceMatches},
		{"BroadcastReachesAll", 4, broadcastReachesAll},
		{"HeadsReachAll", 3, headsReachAll},
		{"UsageSpreads", 2, usageSpreads},
		{"CloseWaitsForHandlers", 2, closeWaitsForHandlers},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(t, start(t, c.count)) })
	}
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// Eventually polls until ok or the deadline.
func Eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", patience, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// Echo answers put_shard with the body it got.
func Echo(_ context.Context, _ p2p.Peer, _ *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	return &wire.Reply{Result: &wire.Reply_GetShard{GetShard: &wire.GetShardReply{ProofBytes: uint32(len(body))}}}, bytes.Clone(body), nil
}

func get(index uint32) *wire.Request {
	return &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{Blind: make([]byte, 32), Index: index}}}
}

func membersKnowEachOther(t *testing.T, ts []p2p.Transport) {
	for _, a := range ts {
		members := a.Members()
		if len(members) != len(ts)-1 {
			t.Fatalf("%s knows %d members, want %d", a.Self(), len(members), len(ts)-1)
		}
		for i, m := range members {
			if m.ID == a.Self() {
				t.Errorf("%s lists itself", a.Self())
			}
			if i > 0 && members[i-1].ID >= m.ID {
				t.Errorf("members are not ordered: %s before %s", members[i-1].ID, m.ID)
			}
			if m.State != p2p.Alive || m.Role != p2p.RoleNode {
				t.Errorf("member %s is %s, a %s", m.ID, m.State, m.Role)
			}
		}
	}
}

func callCarriesBodies(t *testing.T, ts []p2p.Transport) {
	ts[1].Handle(Echo)
	rng := rand.NewChaCha8([32]byte{1})
	for _, size := range []int{0, 1, 100, 4 << 10, 16<<10 - 1, 16 << 10, 16<<10 + 1, 64 << 10, 1<<20 - 1, 1<<20 + 32, 9<<20 + 7} {
		body := make([]byte, size)
		_, _ = rng.Read(body)
		want := bytes.Clone(body)
		rep, got, err := ts[0].Call(deadline(t), ts[1].Self(), get(1), body)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if n := rep.GetGetShard().GetProofBytes(); int(n) != size {
			t.Errorf("%d bytes: the handler saw %d", size, n)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes: another body came back", size)
		}
		clear(got) // ours: must not show up in what was sent
		if !bytes.Equal(body, want) {
			t.Errorf("%d bytes: the reply shares memory with the request", size)
		}
	}
}

func callReachesSelf(t *testing.T, ts []p2p.Transport) {
	var from p2p.Peer
	ts[0].Handle(func(ctx context.Context, p p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		from = p
		return Echo(ctx, p, req, body)
	})
	_, got, err := ts[0].Call(deadline(t), ts[0].Self(), get(1), []byte("me"))
	if err != nil || string(got) != "me" {
		t.Fatalf("got %q, %v", got, err)
	}
	nonce, err := ts[0].Nonce(deadline(t), ts[0].Self())
	if err != nil || !bytes.Equal(nonce, from.Nonce) || from.Member.ID != ts[0].Self() {
		t.Fatalf("sender %s with nonce %x, want %x (%v)", from.Member.ID, from.Nonce, nonce, err)
	}
}

func callsRunInParallel(t *testing.T, ts []p2p.Transport) {
	const count = 16
	var arrived sync.WaitGroup
	arrived.Add(count)
	ts[1].Handle(func(ctx context.Context, p p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		arrived.Done()
		arrived.Wait() // returns only if all are here at once
		return Echo(ctx, p, req, body)
	})
	ctx := deadline(t)
	errs := make(chan error, count)
	shared := get(1)
	for i := range count {
		go func() {
			want := fmt.Appendf(nil, "body %d", i)
			_, got, err := ts[0].Call(ctx, ts[1].Self(), shared, want)
			if err == nil && !bytes.Equal(got, want) {
				err = fmt.Errorf("sent %q, got %q", want, got)
			}
			errs <- err
		}()
	}
	for range count {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

func statusesComeBack(t *testing.T, ts []p2p.Transport) {
	ts[1].Handle(func(context.Context, p2p.Peer, *wire.Request, []byte) (*wire.Reply, []byte, error) {
		return nil, nil, fmt.Errorf("wrapped: %w", p2p.Statusf(wire.Status_STATUS_NOT_FOUND, "no shard %d", 7))
	})
	rep, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(7), []byte("body"))
	var se *p2p.StatusError
	if !errors.As(err, &se) {
		t.Fatalf("got %v, want a StatusError", err)
	}
	if se.Op != "get_shard" || se.Peer != ts[1].Self() || se.Status != wire.Status_STATUS_NOT_FOUND || se.Message != "no shard 7" {
		t.Errorf("got %+v", se)
	}
	if rep.GetStatus() != wire.Status_STATUS_NOT_FOUND || errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("reply %v, error %v", rep, err)
	}
}

func internalErrorsStayInside(t *testing.T, ts []p2p.Transport) {
	ts[1].Handle(func(context.Context, p2p.Peer, *wire.Request, []byte) (*wire.Reply, []byte, error) {
		return nil, nil, errors.New("open /secret/path: no space")
	})
	_, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(7), nil)
	if p2p.StatusOf(err) != wire.Status_STATUS_INTERNAL || err == nil || bytes.Contains([]byte(err.Error()), []byte("secret")) {
		t.Fatalf("got %v", err)
	}
	ts[1].Handle(func(context.Context, p2p.Peer, *wire.Request, []byte) (*wire.Reply, []byte, error) { panic("a bug") })
	if _, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(7), nil); !errors.Is(err, &p2p.StatusError{Status: wire.Status_STATUS_INTERNAL}) {
		t.Fatalf("after a panic: got %v", err)
	}
}

func noHandlerIsBusy(t *testing.T, ts []p2p.Transport) {
	_, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(0), []byte("x"))
	if p2p.StatusOf(err) != wire.Status_STATUS_BUSY {
		t.Fatalf("got %v", err)
	}
}

func tooLargeIsRefused(t *testing.T, ts []p2p.Transport) {
	ts[1].Handle(Echo)
	_, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(0), make([]byte, p2p.BodyBytesMax+1))
	if !errors.Is(err, p2p.ErrTooLarge) {
		t.Errorf("body: got %v", err)
	}
	big := &wire.Request{Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: &wire.Head{Sealed: make([]byte, p2p.MessageBytesMax)}}}}
	if _, _, err := ts[0].Call(deadline(t), ts[1].Self(), big, nil); !errors.Is(err, p2p.ErrTooLarge) {
		t.Errorf("message: got %v", err)
	}
	if _, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(0), []byte("x")); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func cancelledCallReturns(t *testing.T, ts []p2p.Transport) {
	arrived, release := make(chan struct{}), make(chan struct{})
	ts[1].Handle(func(ctx context.Context, p p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		close(arrived)
		<-release
		return Echo(ctx, p, req, body)
	})
	ctx, cancel := context.WithCancel(deadline(t))
	done := make(chan error)
	go func() {
		_, _, err := ts[0].Call(ctx, ts[1].Self(), get(0), nil)
		done <- err
	}()
	<-arrived
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("got %v", err)
	}
	close(release)
	ts[1].Handle(Echo)
	if _, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(0), nil); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func unknownPeerIsUnreachable(t *testing.T, ts []p2p.Transport) {
	if _, _, err := ts[0].Call(deadline(t), "12D3KooWnobody", get(0), nil); !errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("call: got %v", err)
	}
	if _, err := ts[0].Nonce(deadline(t), "12D3KooWnobody"); !errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("nonce: got %v", err)
	}
}

func closedPeerIsUnreachable(t *testing.T, ts []p2p.Transport) {
	ts[1].Handle(Echo)
	gone := ts[1].Self()
	if _, _, err := ts[0].Call(deadline(t), gone, get(0), nil); err != nil {
		t.Fatal(err)
	}
	if err := ts[1].Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ts[0].Call(deadline(t), gone, get(0), nil); !errors.Is(err, p2p.ErrUnreachable) {
		t.Fatalf("got %v", err)
	}
	Eventually(t, "the closed member is suspect", func() bool { return ts[0].Members()[0].State != p2p.Alive })
	if _, _, err := ts[1].Call(deadline(t), ts[0].Self(), get(0), nil); err == nil {
		t.Error("a closed transport still calls")
	}
}

func nonceMatches(t *testing.T, ts []p2p.Transport) {
	seen := make(chan p2p.Peer, 1)
	ts[2].Handle(func(ctx context.Context, p p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		seen <- p
		return Echo(ctx, p, req, body)
	})
	nonces := map[string]bool{}
	for _, a := range ts[:2] {
		nonce, err := a.Nonce(deadline(t), ts[2].Self())
		if err != nil || len(nonce) != p2p.NonceBytes {
			t.Fatalf("nonce %x, %v", nonce, err)
		}
		if _, _, err := a.Call(deadline(t), ts[2].Self(), get(0), nil); err != nil {
			t.Fatal(err)
		}
		if p := <-seen; p.Member.ID != a.Self() || !bytes.Equal(p.Nonce, nonce) {
			t.Errorf("the handler saw %s with nonce %x, want %s with %x", p.Member.ID, p.Nonce, a.Self(), nonce)
		}
		nonces[string(nonce)] = true
	}
	if len(nonces) != 2 {
		t.Error("two peers got the same nonce")
	}
}

func broadcastReachesAll(t *testing.T, ts []p2p.Transport) {
	type receipt struct {
		at, from placement.NodeID
		blind    byte
	}
	receipts := make(chan receipt, 1024)
	for _, b := range ts {
		b.OnBroadcast(func(from placement.NodeID, l *wire.Lookup) {
			if l.Sender != string(from) || len(l.Nonce) != 16 {
				t.Errorf("sender %s, nonce %x", l.Sender, l.Nonce)
			}
			receipts <- receipt{b.Self(), from, l.Blinds[0][0]}
		})
	}
	ctx := deadline(t)
	got := map[placement.NodeID]bool{}
	for round := byte(1); len(got) < len(ts)-1; round++ { // meshes form in their own time: best effort
		blind := bytes.Repeat([]byte{round}, 32)
		if err := ts[0].Broadcast(ctx, &wire.Lookup{Blinds: [][]byte{blind}}); err != nil {
			t.Fatal(err)
		}
		for again := time.After(200 * time.Millisecond); again != nil; {
			select {
			case r := <-receipts:
				if r.at == ts[0].Self() || r.from != ts[0].Self() {
					t.Fatalf("%s received a lookup from %s", r.at, r.from)
				}
				got[r.at] = true
			case <-again:
				again = nil
			case <-ctx.Done():
				t.Fatalf("only %d of %d received a lookup", len(got), len(ts)-1)
			}
		}
	}
	for name, wrong := range map[string]*wire.Lookup{
		"no blinds":   {},
		"short blind": {Blinds: [][]byte{{1}}},
		"short nonce": {Nonce: []byte{1}, Blinds: [][]byte{make([]byte, 32)}},
		"many blinds": {Blinds: make([][]byte, 257)},
	} {
		if err := ts[0].Broadcast(ctx, wrong); err == nil {
			t.Errorf("%s: was sent", name)
		}
	}
}

func headsReachAll(t *testing.T, ts []p2p.Transport) {
	receipts := make(chan placement.NodeID, 1024)
	for _, b := range ts[1:] {
		b.OnHead(func(from placement.NodeID, n *wire.HeadNotice) {
			if from == ts[0].Self() && n.Sequence > 0 && len(n.Address) == 32 {
				receipts <- b.Self()
			}
		})
	}
	ctx := deadline(t)
	got := map[placement.NodeID]bool{}
	for sequence := uint64(1); len(got) < len(ts)-1; sequence++ {
		if err := ts[0].AnnounceHead(ctx, &wire.HeadNotice{Address: make([]byte, 32), Sequence: sequence}); err != nil {
			t.Fatal(err)
		}
		for again := time.After(200 * time.Millisecond); again != nil; {
			select {
			case at := <-receipts:
				got[at] = true
			case <-again:
				again = nil
			case <-ctx.Done():
				t.Fatalf("only %d of %d received the notice", len(got), len(ts)-1)
			}
		}
	}
	if err := ts[0].AnnounceHead(ctx, &wire.HeadNotice{Address: []byte{1}}); err == nil {
		t.Error("a short address was announced")
	}
}

func usageSpreads(t *testing.T, ts []p2p.Transport) {
	ts[1].SetUsage(1000, 400)
	Eventually(t, "the usage is known", func() bool {
		m := ts[0].Members()[0]
		return m.CapacityBytes == 1000 && m.UsedBytes == 400
	})
}

func closeWaitsForHandlers(t *testing.T, ts []p2p.Transport) {
	arrived := make(chan struct{})
	var mu sync.Mutex
	finished := false
	ts[1].Handle(func(ctx context.Context, p p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		close(arrived)
		<-ctx.Done()
		mu.Lock()
		finished = true
		mu.Unlock()
		return nil, nil, ctx.Err()
	})
	done := make(chan error, 1)
	go func() {
		_, _, err := ts[0].Call(deadline(t), ts[1].Self(), get(0), nil)
		done <- err
	}()
	<-arrived
	if err := ts[1].Close(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if !finished {
		t.Error("Close returned before the handler")
	}
	if err := <-done; err == nil {
		t.Error("the call succeeded")
	}
}
