package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
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

// A node gives shards to others when it is drained, when it is fuller than the
// pool, and when it is nearly full. A move adds a copy before it takes one away:
// the new holder has the shard for good and has proved it to a majority of the
// stripe's keepers before this node lets go of its own.

const (
	// Balance: a node gives where it is fuller than the pool by a twentieth and
	// a hundredth of its capacity, to nodes that are less full than the pool.
	balanceSlack = 1.05
	balanceFloor = 0.01
	nearlyFull   = 0.9 // from here on it gives whatever the slack
	balanceMax   = 256 // shards given in one round

	settleWait    = time.Minute // for what was put before a drain to be committed
	drainPassMax  = 5           // passes in a row that move nothing
	drainPassRest = time.Second // between passes
)

// errNotHolder says that this node is not, or no longer, a holder of the shard
// by what the keepers know: nothing is to be moved.
var errNotHolder = errors.New("the keepers name other holders")

// moveAway gives one shard to another node, one of those that eligible accepts,
// and lets go of the copy here.
func (n *Node) moveAway(ctx context.Context, key shardstore.Key, eligible func(placement.Node) bool) error {
	info, b, err := n.store.Manifest(key)
	if err != nil {
		return n.readError(key, err)
	}
	m := new(wire.Manifest)
	if err := proto.Unmarshal(b, m); err != nil {
		return n.readError(key, errors.Join(shardstore.ErrCorrupt, err))
	}
	if info.Provisional || len(info.Proof) == 0 {
		return errors.New("its owner has not committed it yet")
	}
	record, keeperIDs := n.recordOf(ctx, key.Blind, m)
	if record == nil {
		return errors.New("no keeper of its stripe answers")
	}
	holders := record.CurrentHolders()
	i := slices.IndexFunc(holders, func(h *wire.Holder) bool { return h.Index == uint32(key.Index) })
	if i < 0 {
		return errNotHolder
	}
	self := string(n.transport.Self())
	n.mirrors.mu.Lock()
	to := n.mirrors.moved[key]
	n.mirrors.mu.Unlock()
	switch h := holders[i]; {
	case to != "" && (h.Primary == string(to) || h.Mirror == string(to)): // an earlier attempt has come so far
	case h.Primary != self && h.Mirror != self:
		return errNotHolder
	default:
		move := &wire.HolderMove{Index: h.Index, From: self, Mirror: h.Mirror == self}
		other := h.Mirror
		if move.Mirror {
			other = h.Primary
		}
		if other != "" && !n.alive(placement.NodeID(other)) {
			return errors.New("the node that mirrors it is silent")
		}
		if to == "" {
			if to, err = n.handTo(ctx, key, m, record, placement.NodeID(other), eligible); err != nil {
				return err
			}
			n.mirrors.mu.Lock()
			if len(n.mirrors.moved) < roundShardsMax {
				n.mirrors.moved[key] = to
			}
			n.mirrors.mu.Unlock()
		}
		move.To = string(to)
		took, err := n.tellKeepers(ctx, key.Blind, keeperIDs, move)
		if err == nil && took <= len(keeperIDs)/2 {
			err = fmt.Errorf("%d of %d keepers accept the new holder", took, len(keeperIDs))
		}
		if err != nil {
			if n.proves(ctx, to, m, key) != nil {
				n.forgetMove(key) // another one next time
			}
			return err
		}
	}
	rep, _, err := n.call(ctx, to, &wire.Request{Op: &wire.Request_CommitShards{CommitShards: &wire.CommitShards{
		Commits: []*wire.Commit{{Blind: key.Blind[:], Signature: info.Proof}},
	}}}, nil)
	if held := rep.GetCommitShards().GetHeld(); err == nil && (len(held) != 1 || !held[0]) {
		err = errors.New("it has lost the shard already")
	}
	if err == nil {
		err = n.proves(ctx, to, m, key)
	}
	if err != nil {
		return fmt.Errorf("make it permanent at node %s: %w", to, err)
	}
	n.forgetMove(key)
	if err := n.store.Drop(ctx, key); err != nil {
		return err
	}
	n.did.moved.Add(1)
	return nil
}

func (n *Node) forgetMove(key shardstore.Key) {
	n.mirrors.mu.Lock()
	defer n.mirrors.mu.Unlock()
	delete(n.mirrors.moved, key)
}

// recordOf asks the keepers of a stripe for its index record, in the number that
// a mirrored one has first; nil when none has it.
func (n *Node) recordOf(ctx context.Context, blind [32]byte, m *wire.Manifest) (*wire.IndexRecord, []placement.NodeID) {
	pool := n.poolNodes()
	record := n.findIndex(ctx, blind, keepers(blind, int(m.M), true, pool))
	if record == nil {
		return nil, nil
	}
	return record, keepers(blind, int(m.M), record.Mirrored, pool)
}

// handTo gives a shard to a new holder, which mirrors it with other from then
// on. There it expires unless it is committed.
func (n *Node) handTo(ctx context.Context, key shardstore.Key, m *wire.Manifest, record *wire.IndexRecord, other placement.NodeID, eligible func(placement.Node) bool) (placement.NodeID, error) {
	lock, err := n.wireLock(key.Blind)
	if err != nil {
		return "", err
	}
	bytes := erasure.ColumnBytes + int(m.ShardBytes)
	if other != "" {
		bytes *= 2
	}
	if err := n.budget.spend(ctx, bytes); err != nil {
		return "", err
	}
	r, err := n.store.ReadShard(key, 0, 0, nil)
	if err != nil {
		return "", n.readError(key, err)
	}
	body := slices.Concat(r.Column[:], r.Coded)
	takers := n.takers(record)
	takers.keep(eligible)
	var last error
	for range triesMax {
		to, err := takers.next()
		if err != nil {
			return "", errors.Join(last, err)
		}
		_, _, last = n.call(ctx, to, &wire.Request{Op: &wire.Request_PutShard{PutShard: &wire.PutShard{
			Manifest: m, Index: uint32(key.Index), Lock: lock, Crc32C: erasure.CRC(body), Mirror: string(other), Partner: string(other),
		}}}, body)
		if last == nil {
			return to, nil
		}
	}
	return "", last
}

// Drained is how far a drain has come.
type Drained struct {
	Moved, MovedBytes int64
	Left, LeftBytes   int64 // held here, by what the keepers know
}

// Drain gives every shard to other nodes and takes no more. It returns nil when
// the pool needs nothing from this node any more, which then stays so until it
// is made again. If it fails or ctx ends, the node goes on as before; what has
// moved stays where it is. progress is called now and then.
func (n *Node) Drain(ctx context.Context, progress func(Drained)) (err error) {
	if !n.draining.CompareAndSwap(false, true) {
		return errors.New("drain node: it is being drained already, or is empty")
	}
	defer func() {
		if err != nil {
			n.draining.Store(false)
			err = fmt.Errorf("drain node: %w", err)
		}
		n.announceUsage()
	}()
	n.announceUsage()
	var done Drained
	began, idle := n.o.Now(), 0
	for {
		pass, err := n.drainPass(ctx, &done, progress)
		if err != nil {
			return err
		}
		waiting := pass.provisional > 0 && n.o.Now().Sub(began) < settleWait
		if pass.failed == nil && !waiting {
			break
		}
		if idle++; pass.moved > 0 || waiting {
			idle = 0
		}
		if idle >= drainPassMax {
			return fmt.Errorf("%d shards are still here, the first because: %w; the others have moved", done.Left, pass.failed)
		}
		select {
		case <-time.After(min(drainPassRest, n.o.RepairInterval)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	pool := n.poolNodes()
	others := slices.DeleteFunc(slices.Clone(pool), func(id placement.NodeID) bool { return id == n.transport.Self() })
	if !n.handOver(ctx, pool, others) {
		return errors.New("some index records could not be handed to other keepers")
	}
	return nil
}

type drainPass struct {
	moved, provisional int
	failed             error // the first
}

// drainPass tries to move each shard once.
func (n *Node) drainPass(ctx context.Context, done *Drained, progress func(Drained)) (pass drainPass, err error) {
	var all []shardstore.ShardInfo
	if err := n.store.Shards(shardstore.Key{}, func(info shardstore.ShardInfo) bool {
		if info.Provisional {
			pass.provisional++
			return true
		}
		all = append(all, info)
		return true
	}); err != nil {
		return pass, err
	}
	done.Left, done.LeftBytes = 0, 0
	for _, info := range all {
		done.Left, done.LeftBytes = done.Left+1, done.LeftBytes+int64(info.Bytes)
	}
	var mu sync.Mutex // guards done and pass
	slots := make(chan struct{}, n.o.CopiesMax)
	var wg sync.WaitGroup
	for _, info := range all {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if ctx.Err() != nil {
				return
			}
			err := n.moveAway(ctx, info.Key, nil)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				pass.moved++
				done.Moved, done.MovedBytes = done.Moved+1, done.MovedBytes+int64(info.Bytes)
			case errors.Is(err, errNotHolder), errors.Is(err, shardstore.ErrNotFound): // moved before, or deleted
			default:
				if pass.failed == nil {
					pass.failed = fmt.Errorf("shard %v: %w", info.Key, err)
				}
				return
			}
			done.Left, done.LeftBytes = done.Left-1, done.LeftBytes-int64(info.Bytes)
			progress(*done)
		})
	}
	wg.Wait()
	progress(*done)
	return pass, ctx.Err()
}

// balance gives shards to emptier nodes while this one is fuller than the pool.
func (n *Node) balance(ctx context.Context) {
	if n.draining.Load() {
		return
	}
	u := n.store.Usage()
	used, capacity := u.UsedBytes, u.CapacityBytes
	for _, m := range n.transport.Members() {
		if m.Role == p2p.RoleNode && m.State == p2p.Alive && m.CapacityBytes > 0 {
			used, capacity = used+min(m.UsedBytes, m.CapacityBytes), capacity+m.CapacityBytes
		}
	}
	if u.CapacityBytes == 0 || capacity == 0 {
		return
	}
	mean, own := float64(used)/float64(capacity), float64(u.UsedBytes)/float64(u.CapacityBytes)
	high := mean*balanceSlack + balanceFloor
	if own >= nearlyFull {
		high = mean
	}
	if own <= high {
		return
	}
	excess := int64((own - high) * float64(u.CapacityBytes))
	emptier := func(node placement.Node) bool {
		return node.CapacityBytes > 0 && float64(node.UsedBytes) < min(mean, own-balanceFloor)*float64(node.CapacityBytes)
	}
	var start shardstore.Key
	_, _ = rand.Read(start.Blind[:]) // never fails
	var some []shardstore.ShardInfo
	take := func(info shardstore.ShardInfo) bool {
		if !info.Provisional && excess > 0 {
			some, excess = append(some, info), excess-int64(info.Bytes)
		}
		return len(some) < balanceMax && excess > 0
	}
	err := n.store.Shards(start, take)
	if err == nil && len(some) < balanceMax && excess > 0 {
		err = n.store.Shards(shardstore.Key{}, func(info shardstore.ShardInfo) bool {
			return string(info.Blind[:]) < string(start.Blind[:]) && take(info)
		})
	}
	if err != nil {
		n.log.Error("The stored shards cannot be listed.", "err", err)
		return
	}
	moved, failed := 0, error(nil)
	for _, info := range some {
		err := n.moveAway(ctx, info.Key, emptier)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			moved++
		case !errors.Is(err, errNotHolder):
			failed = err
		}
	}
	if moved == 0 && failed == nil {
		return
	}
	n.log.Info("Shards were given to emptier nodes.", "moved", moved, "chosen", len(some), "fill", own, "pool_fill", mean, "last_err", failed)
	if err := n.store.Sweep(ctx); err != nil && ctx.Err() == nil { // so that the next round sees what this one has freed
		n.log.Warn("What has moved away is not freed yet.", "err", err)
	}
	n.announceUsage()
}
