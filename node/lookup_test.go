package node

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/shardstore"
)

// countedFile counts the bytes that are read from a pack file.
type countedFile struct {
	shardstore.File
	read *atomic.Int64
}

func (f countedFile) ReadAt(b []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(b, off)
	f.read.Add(int64(n))
	return n, err
}

// A node that answers what it holds reads and sends manifests, never shards.
func TestLookupReadsNoShard(t *testing.T) {
	const (
		stripes      = 16
		shardBytes   = 1 << 20
		answerBytes  = 1 << 10 // most that a shard may cost in an answer
		readBytesMax = 4 << 10 // and on the disk
	)
	p := newPool(t, 0)
	var read, sent atomic.Int64
	id := nodeID(0)
	store, err := shardstore.Open(shardstore.Options{
		Dir: t.TempDir(), CapacityBytes: 1 << 30, Logger: testLogger(),
		OpenFile: func(path string, create bool) (shardstore.File, error) {
			f, err := shardstore.OSFile(path, create)
			return countedFile{f, &read}, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	n, err := New(Options{Store: store, Transport: p.net.Add(p2p.Member{ID: id, Role: p2p.RoleNode, CapacityBytes: 1 << 30}), Logger: testLogger()})
	if err != nil {
		t.Fatal(err)
	}
	run, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- n.Run(run) }()
	defer func() {
		stop()
		if err := errors.Join(<-ended, n.Close(), store.Close()); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	held := make(chan int, stripes)
	p.device.Handle(func(_ context.Context, _ p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		sent.Add(int64(proto.Size(req) + len(body)))
		held <- len(req.GetLookupAnswer().GetHeld())
		return &wire.Reply{}, nil, nil
	})
	lookup := &wire.Lookup{Nonce: []byte("0123456789abcdef")}
	refs := &wire.HasShards{}
	first := newStripe(t, 1, 1, shardBytes)
	for i := range stripes {
		s := first
		if i > 0 {
			s = newStripe(t, 1, 1, shardBytes)
		}
		p.mustPut(id, s, 0, "")
		lookup.Blinds = append(lookup.Blinds, s.keys.Blind[:])
		refs.Shards = append(refs.Shards, &wire.ShardRef{Blind: s.keys.Blind[:]})
	}
	if _, _, err := p.call(id, getShard(first, 0, 0, 0), nil); err != nil || read.Load() < shardBytes {
		t.Fatalf("%d bytes counted where a shard was read: %v", read.Load(), err)
	}
	read.Store(0)
	if err := p.device.Broadcast(ctx, lookup); err != nil {
		t.Fatal(err)
	}
	for found := 0; found < stripes; {
		select {
		case n := <-held:
			found += n
		case <-time.After(10 * time.Second):
			t.Fatalf("%d of %d shards found", found, stripes)
		}
	}
	rep, _, err := p.call(id, &wire.Request{Op: &wire.Request_HasShards{HasShards: refs}}, nil)
	if err != nil || len(rep.GetHasShards().Held) != stripes || !rep.GetHasShards().Held[stripes-1] {
		t.Fatal(rep, err)
	}
	if n := read.Load() / stripes; n > readBytesMax {
		t.Errorf("%d bytes were read for each shard, at most %d are needed", n, readBytesMax)
	}
	if n := sent.Load() / stripes; n == 0 || n > answerBytes {
		t.Errorf("%d bytes were sent for each shard, at most %d are needed", n, answerBytes)
	}
	t.Logf("for each shard of %d bytes %d bytes were read, %d sent", shardBytes, read.Load()/stripes, sent.Load()/stripes)
}
