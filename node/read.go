package node

import (
	"context"
	"errors"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/shardstore"
)

// getShard answers a range of coded bytes with its proof, or the whole body to
// the shard's partner and the stripe's keepers.
func (n *Node) getShard(ctx context.Context, from p2p.Peer, op *wire.GetShard) (*wire.GetShardReply, []byte, error) {
	key, err := shardKey(op.Blind, op.Index)
	if err != nil {
		return nil, nil, err
	}
	off, length := int(op.Offset), int(op.Length)
	if op.Offset > wire.ShardBytesMax || op.Length > wire.ShardBytesMax {
		return nil, nil, invalid("range %d+%d is beyond any shard", op.Offset, op.Length)
	}
	if op.Whole {
		off, length = 0, 0
	}
	room := int64(length)
	if length == 0 {
		room = 1 << 20
	}
	if op.Whole { // for a repair
		if err := n.budget.yield(ctx); err != nil {
			return nil, nil, err
		}
	}
	if err := n.take(ctx, n.readBytes, room); err != nil {
		return nil, nil, err
	}
	buf, _ := n.buffers.Get().(*[]byte)
	if buf == nil {
		buf = new([]byte)
	}
	// The reply is sent out of the buffer, which counts until then.
	if !p2p.AfterReply(ctx, func() { n.buffers.Put(buf); n.readBytes.Release(room) }) {
		buf = new([]byte)
		defer n.readBytes.Release(room)
	}
	r, err := n.store.ReadShard(key, off, length, *buf)
	if err != nil {
		return nil, nil, n.readError(key, err)
	}
	if cap(r.Coded) > cap(*buf) {
		*buf = r.Coded[:0]
	}
	columnHash := erasure.ColumnHash(r.Column[:])
	rep := &wire.GetShardReply{ColumnHash: columnHash[:]}
	if op.Whole {
		rep.Manifest = new(wire.Manifest)
		if err := proto.Unmarshal(r.Manifest, rep.Manifest); err != nil {
			return nil, nil, n.readError(key, errors.Join(shardstore.ErrCorrupt, err))
		}
		partner := r.Partner != "" && placement.NodeID(r.Partner) == from.Member.ID
		// Who ranks as keeper of the stripe if it is mirrored does so if it is not.
		if !partner && !n.isKeeper(from.Member.ID, rep.Manifest, true) {
			return nil, nil, denied("whole shards go to the shard's partner and the stripe's keepers only")
		}
		rep.Commit = r.Proof
		return rep, append(append(make([]byte, 0, len(r.Column)+len(r.Coded)), r.Column[:]...), r.Coded...), nil
	}
	if length == 0 {
		length = r.CodedBytes - off
	}
	if off == 0 && length == r.CodedBytes {
		return rep, r.Coded, nil // all of it is its own proof
	}
	proof, err := erasure.Prove(r.Coded, r.Outboard, off, length)
	if err != nil {
		return nil, nil, err
	}
	rep.ProofBytes = uint32(len(proof))
	return rep, proof, nil
}

// readError turns a failed read into a reply; a damaged shard is healed.
func (n *Node) readError(key shardstore.Key, err error) error {
	switch {
	case errors.Is(err, shardstore.ErrRange):
		return invalid("%v", err)
	case errors.Is(err, shardstore.ErrCorrupt):
		n.log.Error("A stored shard is damaged; the copy of its partner is fetched, if it has one.", "shard", key.String(), "err", err)
		select {
		case n.heals <- key:
		default: // the next read asks again
		}
	}
	return err
}

// getColumns answers salt columns to who opens the lock.
func (n *Node) getColumns(from p2p.Peer, op *wire.GetColumns) (*wire.GetColumnsReply, error) {
	if err := checkBatch(len(op.Requests)); err != nil {
		return nil, err
	}
	rep := &wire.GetColumnsReply{}
	for _, r := range op.Requests {
		c, err := n.column(from, r)
		if err != nil {
			if p2p.StatusOf(replyError(err)) == wire.Status_STATUS_INTERNAL {
				n.log.Error("A column could not be read.", "err", err)
			}
			c = &wire.Column{Status: p2p.StatusOf(replyError(err))}
		}
		rep.Columns = append(rep.Columns, c)
	}
	return rep, nil
}

func (n *Node) column(from p2p.Peer, req *wire.ColumnRequest) (*wire.Column, error) {
	key, err := shardKey(req.Blind, req.Index)
	if err != nil {
		return nil, err
	}
	if err := n.authorize(from, seal.OpColumns, key.Blind, key.Index, req.Authorization); err != nil {
		return nil, err
	}
	r, err := n.store.ReadShard(key, 0, 1, nil)
	if err != nil {
		return nil, n.readError(key, err)
	}
	root, err := erasure.OutboardRoot(r.Outboard)
	if err != nil {
		return nil, err
	}
	return &wire.Column{Column: r.Column[:], CodedRoot: root[:]}, nil
}

// hasShards tells which shards, and which index records, are stored and not known to be damaged beyond
// healing here: who asks then rebuilds them elsewhere. No shard's bytes are read.
func (n *Node) hasShards(op *wire.HasShards) (*wire.HasShardsReply, error) {
	if err := checkBatch(len(op.Shards)); err != nil {
		return nil, err
	}
	rep := &wire.HasShardsReply{Held: make([]bool, len(op.Shards)), Deleted: make([]bool, len(op.Shards))}
	for i, s := range op.Shards {
		if s.Index == wire.IndexNumber {
			blind, err := stripeID(s.Blind)
			if err != nil {
				return nil, err
			}
			_, err = n.index(blind)
			rep.Held[i] = err == nil
			continue
		}
		key, err := shardKey(s.Blind, s.Index)
		if err != nil {
			return nil, err
		}
		rep.Held[i], rep.Deleted[i] = n.has(key), n.store.Deleted(key)
	}
	return rep, nil
}

func (n *Node) has(key shardstore.Key) bool { return n.store.Has(key) && !n.damaged.Contains(key) }

// healer replaces damaged shards by their partners' copies.
func (n *Node) healer(ctx context.Context) {
	for {
		select {
		case key := <-n.heals:
			err := n.heal(ctx, key)
			if err == nil {
				n.did.healed.Add(1)
				n.damaged.Remove(key)
			} else if ctx.Err() == nil {
				n.damaged.Add(key, struct{}{})
				n.log.Error("A damaged shard was not healed; parity restores it when its holder is given up.", "shard", key.String(), "err", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

func (n *Node) heal(ctx context.Context, key shardstore.Key) error {
	info, err := n.store.Stat(key)
	if err != nil {
		return err
	}
	if _, err := n.store.ReadShard(key, 0, 0, nil); !errors.Is(err, shardstore.ErrCorrupt) {
		return err // healed meanwhile
	}
	if info.Partner == "" {
		return errors.New("it has no partner")
	}
	if err := n.budget.spend(ctx, info.Bytes); err != nil {
		return err
	}
	rep, body, err := n.call(ctx, placement.NodeID(info.Partner), &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{
		Blind: key.Blind[:], Index: uint32(key.Index), Whole: true,
	}}}, nil)
	if err != nil {
		return err
	}
	// The reply proves itself by the stripe's name, which is our own key.
	m := rep.GetGetShard().GetManifest()
	sh, err := checkShard(m, uint32(key.Index), erasure.CRC(body), body)
	if err != nil {
		return err
	}
	if sh.Key != key {
		return errors.New("the partner answered with another stripe")
	}
	sh.Partner, sh.Provisional = info.Partner, info.Provisional
	if err := n.store.ReplaceShard(ctx, sh); err != nil {
		return err
	}
	n.log.Info("A damaged shard was healed from its partner.", "shard", key.String(), "peer", info.Partner)
	return nil
}
