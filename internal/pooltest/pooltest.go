// Package pooltest makes pools for tests: real storage nodes with their stores
// on disk, joined by a network in memory.
//
//	pool := pooltest.New(t, 6)
//	device := pool.Device(t)
//	pool.Net.Kill(pool.IDs[0])
//
// Nodes and devices end with the test.
package pooltest

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/defs-fs/defs/node"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/memnet"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

// CapacityBytes is what each node of New offers.
const CapacityBytes = 4 << 30

// Pool is a pool in one process.
type Pool struct {
	Net    *memnet.Network
	IDs    []placement.NodeID // of the nodes
	Stores map[placement.NodeID]*shardstore.Store
	Nodes  map[placement.NodeID]*node.Node

	devices int
}

// New starts a pool of so many nodes, each on a host of its own.
func New(t testing.TB, nodes int) *Pool {
	t.Helper()
	return NewSized(t, slices.Repeat([]uint64{CapacityBytes}, nodes)...)
}

// NewSized is New for nodes of these capacities.
func NewSized(t testing.TB, capacities ...uint64) *Pool {
	t.Helper()
	p := &Pool{Net: memnet.New(), Stores: make(map[placement.NodeID]*shardstore.Store), Nodes: make(map[placement.NodeID]*node.Node)}
	for i, capacity := range capacities {
		id := placement.NodeID(fmt.Sprintf("node-%02d", i))
		store, err := shardstore.Open(shardstore.Options{Dir: filepath.Join(t.TempDir(), "store"), CapacityBytes: capacity})
		if err != nil {
			t.Fatal(err)
		}
		transport := p.Net.Add(p2p.Member{ID: id, Role: p2p.RoleNode, Host: string(id), CapacityBytes: capacity})
		n, err := node.New(node.Options{Store: store, Transport: transport})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = n.Run(ctx) }()
		t.Cleanup(func() {
			stop()
			<-done
			transport.Close()
			n.Close()
			store.Close()
		})
		p.IDs = append(p.IDs, id)
		p.Stores[id], p.Nodes[id] = store, n
	}
	return p
}

// Device adds a member that mounts volumes.
func (p *Pool) Device(t testing.TB) *memnet.Node {
	t.Helper()
	p.devices++
	transport := p.Net.Add(p2p.Member{ID: placement.NodeID(fmt.Sprintf("device-%d", p.devices)), Role: p2p.RoleDevice, Host: "device"})
	t.Cleanup(func() { transport.Close() })
	return transport
}

// Faulty is a transport whose calls can be made to fail. Before and After, if
// not nil, are called around each call with the name of its operation, such as
// "put_shard"; an error from either is the call's.
type Faulty struct {
	p2p.Transport
	Before, After func(op string, to placement.NodeID) error
}

// Call is Transport.Call.
func (f *Faulty) Call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	op := p2p.OpOf(req)
	if f.Before != nil {
		if err := f.Before(op, to); err != nil {
			return nil, nil, fmt.Errorf("%s to %s: %w", op, to, err)
		}
	}
	rep, replyBody, err := f.Transport.Call(ctx, to, req, body)
	if f.After != nil && err == nil {
		if err := f.After(op, to); err != nil {
			return nil, nil, fmt.Errorf("%s to %s: %w", op, to, err)
		}
	}
	return rep, replyBody, err
}
