package node

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
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
	blind := [32]byte(r.Manifest.Blind)
	if moves := r.Moves; len(moves) > 0 {
		r.Moves = nil
		for _, move := range moves {
			// Moves are for keepers to hand over, and hold where they can be seen.
			if from.Member.Role != p2p.RoleNode {
				continue
			}
			if move, err := n.checkMove(ctx, from.Member.ID, r, move); err == nil {
				r.Move(move)
			}
		}
	}
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

// moveHolder changes one holder of a stripe. It is asked by a node that holds
// the shard now, which moves away or has a new partner, or by another keeper
// that has rebuilt the shard; that one's word counts only where the old holder
// is gone. Nobody is believed about the new holder: it has to prove the shard.
// So one node that lies moves nothing but its own record.
func (n *Node) moveHolder(ctx context.Context, from placement.NodeID, op *wire.MoveHolder) error {
	blind, err := stripeID(op.Blind)
	if err != nil {
		return err
	}
	move := op.Move
	if move == nil || len(move.From) > nodeIDBytesMax || len(move.To) > nodeIDBytesMax {
		return invalid("a move needs its node ids")
	}
	r, err := n.index(blind)
	if err != nil {
		return err
	}
	if move, err = n.checkMove(ctx, from, r, move); err != nil {
		return err
	}
	return n.store.UpdateIndex(ctx, blind, func(b []byte) ([]byte, error) {
		r := new(wire.IndexRecord)
		if err := proto.Unmarshal(b, r); err != nil {
			return nil, errors.Join(shardstore.ErrCorrupt, err)
		}
		if slices.ContainsFunc(r.CurrentHolders(), func(h *wire.Holder) bool {
			return h.Index == move.Index && (!move.Mirror && h.Primary == move.To || move.Mirror && h.Mirror == move.To)
		}) {
			return nil, nil // told twice
		}
		if !r.Move(move) {
			return nil, denied("the move does not fit the holders known here")
		}
		return marshal(r)
	})
}

// checkMove looks whether a move of a record's holders may be believed, and
// returns it as it fits the record: a keeper may have missed earlier moves, so
// that the holder which another one has replaced is not the one known here.
func (n *Node) checkMove(ctx context.Context, from placement.NodeID, r *wire.IndexRecord, move *wire.HolderMove) (*wire.HolderMove, error) {
	holders := r.CurrentHolders()
	i := slices.IndexFunc(holders, func(h *wire.Holder) bool { return h.Index == move.Index })
	if i < 0 {
		return nil, denied("shard %d has no holder here", move.Index)
	}
	now, key := holders[i], shardstore.Key{Blind: [32]byte(r.Manifest.Blind), Index: uint8(move.Index)}
	if from != placement.NodeID(now.Primary) && from != placement.NodeID(now.Mirror) {
		if from != n.transport.Self() && !n.isKeeper(from, r.Manifest, r.Mirrored) {
			return nil, denied("only a holder of the shard or a keeper may move it")
		}
		old := now.Primary
		if move.Mirror {
			old = now.Mirror
		}
		if old != "" && old != move.To && !n.without(ctx, placement.NodeID(old), r.Manifest, key) {
			return nil, denied("the holder that is to be replaced is there")
		}
		move = &wire.HolderMove{Index: move.Index, From: old, To: move.To, Mirror: move.Mirror}
	}
	if move.To != "" {
		if err := n.proves(ctx, placement.NodeID(move.To), r.Manifest, key); err != nil {
			return nil, denied("the new holder does not prove the shard: %v", err)
		}
	}
	return move, nil
}

// poolNodes are the nodes that may be keepers, this one among them, and those
// not that are leaving: what is handed to them is lost.
func (n *Node) poolNodes() []placement.NodeID {
	ids := []placement.NodeID{n.transport.Self()}
	for _, m := range n.transport.Members() {
		if m.Role == p2p.RoleNode && m.State != p2p.Dead && !m.Leaving() {
			ids = append(ids, m.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

func keepers(blind [32]byte, m int, mirrored bool, pool []placement.NodeID) []placement.NodeID {
	return placement.Keepers(blind, pool, placement.KeeperCount(m, mirrored, len(pool)))
}

// isKeeper says whether a node ranks as a keeper of a stripe, or nearly so:
// views of the pool differ for a while after each change.
func (n *Node) isKeeper(id placement.NodeID, m *wire.Manifest, mirrored bool) bool {
	pool := n.poolNodes()
	count := keeperNearness * placement.KeeperCount(int(m.GetM()), mirrored, len(pool))
	return slices.Contains(placement.Keepers([32]byte(m.Blind), pool, count), id)
}

// without says whether a holder has been silent for long, answers that it does
// not have the shard, or is found out when it is to show it.
func (n *Node) without(ctx context.Context, id placement.NodeID, m *wire.Manifest, key shardstore.Key) bool {
	if n.stillGivenUp(id) {
		return true
	}
	held, err := n.heldBy(ctx, id, []shardstore.Key{key})
	if err == nil && !held[0] {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, n.o.CallTimeout/2) // who asks waits, too
	defer cancel()
	outcome, ok := n.challenge(ctx, id, m, key)
	return ok && (outcome == placement.Lied || outcome == placement.Lost) || n.contained(id)
}

// proves has a node show a random part of a shard that it is said to hold.
func (n *Node) proves(ctx context.Context, id placement.NodeID, m *wire.Manifest, key shardstore.Key) error {
	if id == n.transport.Self() {
		if !n.store.Has(key) {
			return shardstore.ErrNotFound
		}
		return nil
	}
	off := rand.IntN(int(m.ShardBytes))
	rep, proof, err := n.call(ctx, id, &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{
		Blind: m.Blind, Index: uint32(key.Index), Offset: uint32(off), Length: 1,
	}}}, nil)
	if err != nil {
		return err
	}
	columnHash := rep.GetGetShard().GetColumnHash()
	if len(columnHash) != 32 {
		return fmt.Errorf("%w: a reply without the column's hash", errLied)
	}
	var shown [1]byte
	if err := erasure.VerifyRange([32]byte(m.Roots[key.Index]), [32]byte(columnHash), int(m.ShardBytes), off, 1, proof, shown[:]); err != nil {
		return fmt.Errorf("%w: %w", errLied, err)
	}
	return nil
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
