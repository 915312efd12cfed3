package node

import (
	"context"
	"errors"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/shardstore"
)

// putHead stores a head that is newer than what is stored. Whoever offers an
// older one is told the sequence stored.
func (n *Node) putHead(ctx context.Context, op *wire.PutHead) (*wire.Reply, error) {
	h := op.Head
	if err := h.Verify(); err != nil {
		return nil, invalid("%v", err)
	}
	b, err := marshal(h)
	if err != nil {
		return nil, err
	}
	address := [32]byte(h.Address)
	rep := &wire.Reply{}
	sequence := h.Sequence
	if err = n.store.PutHead(ctx, address, h.Sequence, b); errors.Is(err, shardstore.ErrStale) {
		rep.Status, rep.Error = wire.Status_STATUS_DENIED, "a newer head is stored"
		sequence, _, err = n.store.Head(address)
	}
	rep.Result = &wire.Reply_PutHead{PutHead: &wire.PutHeadReply{Sequence: sequence}}
	return rep, err
}

// getHead answers the heads found, as many as one message holds.
func (n *Node) getHead(op *wire.GetHead) (*wire.GetHeadReply, error) {
	if err := checkBatch(len(op.Addresses)); err != nil {
		return nil, err
	}
	rep := &wire.GetHeadReply{}
	room := messageRoom
	for _, a := range op.Addresses {
		address, err := stripeID(a)
		if err != nil {
			return nil, err
		}
		_, b, err := n.store.Head(address)
		h := new(wire.Head)
		if err == nil {
			err = proto.Unmarshal(b, h)
		}
		if errors.Is(err, shardstore.ErrNotFound) {
			continue
		}
		if err != nil {
			n.log.Error("A stored head cannot be read; other nodes have it.", "err", err)
			continue
		}
		if room -= len(b) + 8; room < 0 && len(rep.Heads) > 0 {
			rep.More = true
			break
		}
		rep.Heads = append(rep.Heads, h)
	}
	return rep, nil
}
