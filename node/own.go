package node

import (
	"context"
	"errors"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/shardstore"
)

// What owners do with shards that are stored: delete and commit.

// deleteShards deletes what its senders' signatures allow, with one flush.
func (n *Node) deleteShards(ctx context.Context, from p2p.Peer, op *wire.DeleteShards) (*wire.DeleteShardsReply, error) {
	if err := checkBatch(len(op.Requests)); err != nil {
		return nil, err
	}
	rep := &wire.DeleteShardsReply{Status: make([]wire.Status, len(op.Requests))}
	var keys []shardstore.Key
	var at []int
	for i, r := range op.Requests {
		blind, err := stripeID(r.Blind)
		if err == nil && r.Index >= wire.ShardsMax && r.Index != wire.IndexNumber {
			err = invalid("shard number %d is too high", r.Index)
		}
		if err == nil {
			err = n.authorize(from, seal.OpDelete, blind, uint8(r.Index), r.Authorization)
		}
		switch {
		case err != nil:
			rep.Status[i] = p2p.StatusOf(replyError(err))
		case r.Index == wire.IndexNumber:
			rep.Status[i] = storeStatus(n.store.ForgetIndex(ctx, blind))
		default:
			keys, at = append(keys, shardstore.Key{Blind: blind, Index: uint8(r.Index)}), append(at, i)
		}
	}
	found, err := n.store.Delete(ctx, keys...)
	if err != nil {
		return nil, err
	}
	for j, ok := range found {
		if !ok {
			rep.Status[at[j]] = wire.Status_STATUS_NOT_FOUND
		}
	}
	return rep, nil
}

// commitShards makes shards permanent on the word of their stripes' index keys.
func (n *Node) commitShards(ctx context.Context, op *wire.CommitShards) (*wire.CommitShardsReply, error) {
	if err := checkBatch(len(op.Commits)); err != nil {
		return nil, err
	}
	rep := &wire.CommitShardsReply{Held: make([]bool, len(op.Commits))}
	errs := make([]error, len(op.Commits))
	each(len(op.Commits), func(i int) { rep.Held[i], errs[i] = n.commit(ctx, op.Commits[i]) })
	return rep, errors.Join(errs...)
}

func (n *Node) commit(ctx context.Context, c *wire.Commit) (held bool, err error) {
	blind, err := stripeID(c.Blind)
	if err != nil {
		return false, err
	}
	shards, err := n.store.StripeShards(blind)
	if err != nil || len(shards) == 0 {
		return false, err
	}
	var keys []shardstore.Key
	for _, s := range shards {
		_, b, err := n.store.Manifest(s.Key)
		m := new(wire.Manifest)
		if err == nil {
			if err = proto.Unmarshal(b, m); err != nil {
				err = errors.Join(shardstore.ErrCorrupt, err)
			}
		}
		if errors.Is(err, shardstore.ErrCorrupt) {
			_ = n.readError(s.Key, err)
			continue
		}
		if err != nil {
			return false, err
		}
		if err := c.Verify(m.IndexKey); err != nil {
			return false, denied("%v", err)
		}
		keys = append(keys, s.Key)
	}
	if len(keys) == 0 {
		return false, nil
	}
	err = n.store.Commit(ctx, c.Signature, keys...)
	if errors.Is(err, shardstore.ErrNotFound) { // deleted meanwhile
		return false, nil
	}
	return err == nil, err
}
