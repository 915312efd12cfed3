package node

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

const handoverBatch = 64

// each runs f for 0 … count-1 at once; the store answers all with few flushes.
func each(count int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// putIndex stores index records, each with its lock.
func (n *Node) putIndex(ctx context.Context, from p2p.Peer, op *wire.PutIndex) (*wire.PutIndexReply, error) {
	if err := checkBatch(len(op.Records)); err != nil {
		return nil, err
	}
	rep := &wire.PutIndexReply{Status: make([]wire.Status, len(op.Records))}
	each(len(op.Records), func(i int) {
		err := replyError(n.keep(ctx, from, op.Records[i]))
		if err == nil {
			return
		}
		rep.Status[i] = p2p.StatusOf(err)
		if rep.Status[i] == wire.Status_STATUS_INTERNAL {
			n.log.Error("An index record was not stored.", "peer", string(from.Member.ID), "err", err)
		}
	})
	return rep, nil
}

func (n *Node) keep(ctx context.Context, from p2p.Peer, r *wire.IndexRecord) error {
	if r.GetManifest() == nil {
		return invalid("an index record comes with its manifest")
	}
	if err := r.Verify(); err != nil {
		return invalid("%v", err)
	}
	if from.Member.Role != p2p.RoleNode {
		r.Moves = nil // moves are for keepers to hand over
	}
	blind := [32]byte(r.Manifest.Blind)
	lock, err := n.checkLock(blind, r.Manifest.IndexKey, r.Lock)
	if err != nil {
		return err
	}
	b, err := marshal(r)
	if err != nil {
		return err
	}
	if lock != nil {
		if err := n.store.PutLock(ctx, blind, r.Lock.Version, lock); err != nil {
			return err
		}
	}
	return n.store.PutIndex(ctx, blind, r.Version, b)
}

// index reads one record from the store.
func (n *Node) index(blind [32]byte) (*wire.IndexRecord, error) {
	b, err := n.store.Index(blind)
	if err != nil {
		return nil, err
	}
	r := new(wire.IndexRecord)
	if err := proto.Unmarshal(b, r); err != nil {
		return nil, errors.Join(shardstore.ErrCorrupt, err)
	}
	return r, nil
}

// getIndex answers the records found, as many as one message holds.
func (n *Node) getIndex(op *wire.GetIndex) (*wire.GetIndexReply, error) {
	if err := checkBatch(len(op.Blinds)); err != nil {
		return nil, err
	}
	rep := &wire.GetIndexReply{}
	room := messageRoom
	for _, b := range op.Blinds {
		blind, err := stripeID(b)
		if err != nil {
			return nil, err
		}
		r, err := n.index(blind)
		if errors.Is(err, shardstore.ErrNotFound) {
			continue
		}
		if err != nil {
			n.log.Error("A stored index record cannot be read; the other keepers have it.", "stripe", blindText(blind), "err", err)
			continue
		}
		if room -= proto.Size(r) + 8; room < 0 {
			rep.More = true
			break
		}
		rep.Records = append(rep.Records, r)
	}
	return rep, nil
}

// moveHolder changes one holder of a stripe on the word of the node that holds
// the shard now: the one that moves away, or its partner.
func (n *Node) moveHolder(ctx context.Context, from placement.NodeID, op *wire.MoveHolder) error {
	blind, err := stripeID(op.Blind)
	if err != nil {
		return err
	}
	move := op.Move
	if move == nil || len(move.From) > nodeIDBytesMax || len(move.To) > nodeIDBytesMax {
		return invalid("a move needs its node ids")
	}
	return n.store.UpdateIndex(ctx, blind, func(b []byte) ([]byte, error) {
		r := new(wire.IndexRecord)
		if err := proto.Unmarshal(b, r); err != nil {
			return nil, errors.Join(shardstore.ErrCorrupt, err)
		}
		holders := r.CurrentHolders()
		i := slices.IndexFunc(holders, func(h *wire.Holder) bool { return h.Index == move.Index })
		if i < 0 || from != placement.NodeID(holders[i].Primary) && from != placement.NodeID(holders[i].Mirror) {
			return nil, denied("only a holder of the shard may move it")
		}
		if role := holders[i].Primary; !move.Mirror && role == move.To || move.Mirror && holders[i].Mirror == move.To {
			return nil, nil // told twice
		}
		if !r.Move(move) {
			return nil, denied("the move does not fit the holders known here")
		}
		return marshal(r)
	})
}

// poolNodes are the nodes that may be keepers, this one among them.
func (n *Node) poolNodes() []placement.NodeID {
	ids := []placement.NodeID{n.transport.Self()}
	for _, m := range n.transport.Members() {
		if m.Role == p2p.RoleNode && m.State != p2p.Dead {
			ids = append(ids, m.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

func keepers(blind [32]byte, m int, mirrored bool, pool []placement.NodeID) []placement.NodeID {
	return placement.Keepers(blind, pool, placement.KeeperCount(m, mirrored, len(pool)))
}

// handover gives index records to the nodes that become keepers when the pool
// changes and then stays the same for a while.
func (n *Node) handover(ctx context.Context) {
	var seen []placement.NodeID
	var since time.Time
	every(ctx, max(n.o.HandoverDelay/4, time.Millisecond), func() {
		now := n.poolNodes()
		if !slices.Equal(now, seen) {
			seen, since = now, n.o.Now()
			return
		}
		settled := n.keeperPool()
		if slices.Equal(now, settled) || n.o.Now().Sub(since) < n.o.HandoverDelay {
			return
		}
		if settled == nil || n.handOver(ctx, settled, now) {
			n.mu.Lock()
			n.settled = now
			n.mu.Unlock()
		}
	})
}

// keeperPool is the pool by which index records were last handed over; nil
// before the pool has settled for the first time.
func (n *Node) keeperPool() []placement.NodeID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.settled
}

// handOver sends each record to the keepers that are new. It returns false
// when some could not be told.
func (n *Node) handOver(ctx context.Context, before, now []placement.NodeID) bool {
	complete := true
	batches := map[placement.NodeID][]*wire.IndexRecord{}
	send := func(to placement.NodeID) {
		_, _, err := n.call(ctx, to, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: batches[to]}}}, nil)
		if err != nil {
			complete = false
			n.log.Warn("Index records were not handed to a new keeper; tried again.", "peer", string(to), "records", len(batches[to]), "err", err)
		}
		delete(batches, to)
	}
	var after [32]byte
	for ctx.Err() == nil {
		var blinds [][32]byte
		if err := n.store.Indexes(after, func(b [32]byte) bool {
			blinds = append(blinds, b)
			return len(blinds) < 1024
		}); err != nil {
			n.log.Error("Index records cannot be listed.", "err", err)
			return false
		}
		if len(blinds) == 0 {
			break
		}
		after = blinds[len(blinds)-1]
		for _, blind := range blinds {
			r, err := n.index(blind)
			if err != nil {
				continue // another keeper has it
			}
			old := keepers(blind, int(r.Manifest.M), r.Mirrored, before)
			for _, k := range keepers(blind, int(r.Manifest.M), r.Mirrored, now) {
				if k == n.transport.Self() || slices.Contains(old, k) {
					continue
				}
				if batches[k] = append(batches[k], r); len(batches[k]) == handoverBatch || len(batches[k])*proto.Size(r) > messageRoom/2 {
					send(k)
				}
			}
		}
	}
	for to := range batches {
		send(to)
	}
	return complete && ctx.Err() == nil
}
