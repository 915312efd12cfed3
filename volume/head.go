package volume

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/volume/headpb"
)

var be = binary.BigEndian

const (
	// headEverywhere: in pools up to this size every node keeps every head.
	headEverywhere = 32
	// headCopies is how many nodes keep a head in larger pools.
	headCopies = 16

	wrapBundle  = "defs bundle v1"
	wrapPoolKey = "defs pool key v1"
)

// headBody describes the published volume: the old log and what this cut adds,
// or a new checkpoint alone.
func (p *publisher) headBody(old *headpb.Body, cut, generationNext uint64, refs []*headpb.Stripe, checkpoint bool) (*headpb.Body, error) {
	body := &headpb.Body{
		Version: 1, Volume: p.dev.Volume, Name: p.dev.Name, Slot: uint32(p.dev.Slot), Cut: cut,
		Time: p.v.clock().UnixNano(), Policy: p.dev.Policy, Chain: p.dev.Chain, Pool: p.dev.Pool,
		GenerationNext: generationNext,
	}
	if checkpoint {
		body.Segments, body.CheckpointStripes = refs, uint32(len(refs))
	} else {
		body.Segments = append(append(body.Segments, old.Segments...), refs...)
		body.CheckpointStripes = old.CheckpointStripes
	}
	if old != nil {
		// Wrapping is randomised: what is wrapped stays as it is.
		body.Bundles, body.PoolKey = old.Bundles, old.PoolKey
	}
	for i := len(body.Bundles); i < len(p.dev.Bundles); i++ {
		wrapped, err := seal.WrapTo(p.dev.RecoveryKey, wrapBundle, p.dev.Bundles[i])
		if err != nil {
			return nil, fmt.Errorf("wrap key bundle: %w", err)
		}
		body.Bundles = append(body.Bundles, wrapped)
	}
	if len(body.PoolKey) == 0 && len(p.dev.PoolKey) > 0 {
		wrapped, err := seal.WrapTo(p.dev.RecoveryKey, wrapPoolKey, p.dev.PoolKey)
		if err != nil {
			return nil, fmt.Errorf("wrap pool key: %w", err)
		}
		body.PoolKey = wrapped
	}
	return body, nil
}

// putHead signs, seals and stores a head; a majority of its nodes must
// acknowledge it. It returns the head's hash.
func (p *publisher) putHead(ctx context.Context, sequence uint64, previous []byte, body *headpb.Body) (hash []byte, acks, nodes int, err error) {
	plain, err := proto.Marshal(body)
	if err != nil {
		return nil, 0, 0, err
	}
	head, err := signHead(p.dev.HeadKey, sequence, previous, plain)
	if err != nil {
		return nil, 0, 0, err
	}
	if err := p.putDevices(ctx, uint32(p.dev.Slot)); err != nil {
		return nil, 0, 0, fmt.Errorf("list of devices: %w", err)
	}
	acks, nodes, err = p.spread(ctx, head)
	if err != nil {
		return nil, 0, 0, err
	}
	if err := p.t.AnnounceHead(ctx, &wire.HeadNotice{Address: head.Address, Sequence: sequence}); err != nil {
		p.log.Debug("head not announced", "err", err)
	}
	sum := head.Hash()
	return sum[:], acks, nodes, nil
}

func signHead(key []byte, sequence uint64, previous, plain []byte) (*wire.Head, error) {
	k, err := seal.UnmarshalHeadKey(key)
	if err != nil {
		return nil, err
	}
	sealed, err := k.SealHead(sequence, plain)
	if err != nil {
		return nil, err
	}
	head := &wire.Head{Sequence: sequence, Previous: previous, Sealed: sealed}
	head.Sign(k.Sign)
	return head, head.Verify()
}

// putDevices publishes the list of slots, which only grows: its sequence is
// the highest slot.
func (p *publisher) putDevices(ctx context.Context, slot uint32) error {
	p.mu.Lock()
	known := p.head != nil
	p.mu.Unlock()
	if known {
		return nil // published with this device's first head
	}
	list := &headpb.Devices{Version: 1}
	for s := uint32(1); s <= slot; s++ {
		list.Slots = append(list.Slots, s)
	}
	plain, err := proto.Marshal(list)
	if err != nil {
		return err
	}
	head, err := signHead(p.dev.DevicesKey, uint64(slot), nil, plain)
	if err != nil {
		return err
	}
	_, _, err = p.spread(ctx, head)
	return err
}

// headNodesOf returns the nodes that keep a head.
func headNodesOf(t p2p.Transport, address [32]byte) []placement.NodeID {
	var ids []placement.NodeID
	for _, m := range t.Members() {
		if m.Role == p2p.RoleNode && m.State != p2p.Dead {
			ids = append(ids, m.ID)
		}
	}
	if len(ids) <= headEverywhere {
		return ids
	}
	return placement.Keepers(address, ids, headCopies)
}

// spread stores a head at its nodes and fails without a majority.
func (p *publisher) spread(ctx context.Context, head *wire.Head) (acks, nodes int, err error) {
	ids := headNodesOf(p.t, [32]byte(head.Address))
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(16)
	for _, id := range ids {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, headTimeout)
			defer cancel()
			_, _, err := p.t.Call(ctx, id, &wire.Request{Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: head}}}, nil)
			if err != nil {
				p.log.Debug("a node did not take the head", "peer", id, "err", err)
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			acks++
			return nil
		})
	}
	g.Wait()
	if len(ids) == 0 || acks < len(ids)/2+1 {
		return acks, len(ids), fmt.Errorf("%d of %d nodes acknowledged the head, a majority is needed", acks, len(ids))
	}
	return acks, len(ids), nil
}

// repeatHead stores the last head again, for nodes that missed it.
func (p *publisher) repeatHead(ctx context.Context) error {
	p.mu.Lock()
	body, sequence := p.head, p.sequence
	p.mu.Unlock()
	// A head is signed and sealed anew; the same sequence and body say the
	// same, and nodes that have it keep theirs.
	plain, err := proto.Marshal(body)
	if err != nil {
		return err
	}
	head, err := signHead(p.dev.HeadKey, sequence, nil, plain)
	if err != nil {
		return err
	}
	acks, nodes, err := p.spread(ctx, head)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sequence == sequence {
		p.headAcks, p.headNodes = acks, nodes
		p.progress()
	}
	return err
}
