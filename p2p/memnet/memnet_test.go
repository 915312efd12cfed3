package memnet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/memnet"
	"github.com/defs-fs/defs/p2p/transporttest"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

func start(t *testing.T, count int) (*memnet.Network, []*memnet.Node) {
	net := memnet.New()
	var nodes []*memnet.Node
	for i := range count {
		node := net.Add(p2p.Member{ID: placement.NodeID(fmt.Sprintf("node-%02d", i)), Role: p2p.RoleNode})
		t.Cleanup(func() { _ = node.Close() })
		nodes = append(nodes, node)
	}
	return net, nodes
}

func TestNodeIsTransport(t *testing.T) {
	transporttest.Run(t, func(t *testing.T, count int) []p2p.Transport {
		_, nodes := start(t, count)
		var ts []p2p.Transport
		for _, n := range nodes {
			ts = append(ts, n)
		}
		return ts
	})
}

func TestFaults(t *testing.T) {
	net, nodes := start(t, 2)
	a, b := nodes[0], nodes[1]
	b.Handle(transporttest.Echo)
	req := func() *wire.Request { return &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{}}} }
	call := func(ctx context.Context) ([]byte, error) {
		_, body, err := a.Call(ctx, b.Self(), req(), []byte("body"))
		return body, err
	}
	nonce := func() []byte {
		n, err := a.Nonce(t.Context(), b.Self())
		if err != nil {
			t.Fatal(err)
		}
		return n
	}

	before := nonce()
	net.Kill(b.Self())
	if _, err := call(t.Context()); !errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("killed: %v", err)
	}
	if s := a.Members()[0].State; s != p2p.Suspect {
		t.Errorf("killed: %s", s)
	}
	net.Bury(b.Self())
	if s := a.Members()[0].State; s != p2p.Dead {
		t.Errorf("buried: %s", s)
	}
	net.Restart(b.Self())
	if body, err := call(t.Context()); err != nil || string(body) != "body" {
		t.Errorf("restarted: %q, %v", body, err)
	}
	if bytes.Equal(before, nonce()) {
		t.Error("a restart kept the nonce")
	}

	net.Corrupt(b.Self(), func(op string, body []byte) {
		if op == "get_shard" {
			body[0] ^= 1
		}
	})
	if body, err := call(t.Context()); err != nil || string(body) != "cody" {
		t.Errorf("corrupted: %q, %v", body, err)
	}
	net.Corrupt(b.Self(), nil)

	net.Stall(b.Self())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := call(ctx); !errors.Is(err, p2p.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stalled: %v", err)
	}
	net.Resume(b.Self())

	net.Delay(b.Self(), 20*time.Millisecond)
	began := time.Now()
	if _, err := call(t.Context()); err != nil || time.Since(began) < 20*time.Millisecond {
		t.Errorf("delayed: %v after %s", err, time.Since(began))
	}

	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	again := net.Add(p2p.Member{ID: b.Self(), Role: p2p.RoleNode})
	defer again.Close()
	again.Handle(transporttest.Echo)
	if _, err := call(t.Context()); err != nil {
		t.Errorf("added again: %v", err)
	}
}
