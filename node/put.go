package node

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/shardstore"
)

const nodeIDBytesMax = 128

// putShard checks and stores a shard, on the mirror as well when asked to.
func (n *Node) putShard(ctx context.Context, from p2p.Peer, op *wire.PutShard, body []byte) (*wire.PutShardReply, error) {
	sh, err := checkShard(op.Manifest, op.Index, op.Crc32C, body)
	if err != nil {
		return nil, err
	}
	self := n.transport.Self()
	mirror := placement.NodeID(op.Mirror)
	switch {
	case len(op.Mirror) > nodeIDBytesMax || len(op.Partner) > nodeIDBytesMax:
		return nil, invalid("node id of more than %d bytes", nodeIDBytesMax)
	case mirror == self:
		return nil, invalid("a node cannot mirror itself")
	case op.MirrorCopy && (mirror != "" || placement.NodeID(op.Partner) != from.Member.ID):
		return nil, invalid("a mirror's copy comes from its partner")
	}
	sh.Provisional = true
	sh.Partner = op.Mirror
	if op.MirrorCopy {
		sh.Partner = op.Partner
	}
	// Copies are not counted: two nodes full of puts that wait for each other's
	// copies would stand still.
	if !op.MirrorCopy {
		if err := n.take(ctx, n.putBytes, int64(len(body))); err != nil {
			return nil, err
		}
		defer n.putBytes.Release(int64(len(body)))
	}
	if n.draining.Load() {
		return nil, p2p.Statusf(wire.Status_STATUS_FULL, "this node is being drained")
	}
	if u := n.store.Usage(); placement.ShardRoom(u.CapacityBytes, u.UsedBytes) < uint64(len(body)) {
		n.announceUsage() // who places shards is to know
		return nil, p2p.Statusf(wire.Status_STATUS_FULL, "%d of %d bytes used", u.UsedBytes, u.CapacityBytes)
	}
	release, err := n.stripes.reserve(sh.Key)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := n.holdsOther(sh.Key); err != nil {
		return nil, err
	}
	lock, err := n.checkLock(sh.Blind, op.Manifest.IndexKey, op.Lock)
	if err != nil {
		return nil, err
	}

	var own errgroup.Group
	own.Go(func() error { return n.store.PutShard(ctx, sh) })
	if lock != nil {
		own.Go(func() error { return n.store.PutLock(ctx, sh.Blind, op.Lock.Version, lock) })
	}
	var copied sync.WaitGroup
	var copyErr error
	if mirror != "" {
		copied.Go(func() {
			_, _, copyErr = n.call(ctx, mirror, &wire.Request{Op: &wire.Request_PutShard{PutShard: &wire.PutShard{
				Manifest: op.Manifest, Index: op.Index, Lock: op.Lock, Crc32C: op.Crc32C, MirrorCopy: true, Partner: string(self),
			}}}, body)
		})
	}
	err = own.Wait()
	copied.Wait()
	if err != nil {
		return nil, err
	}
	if copyErr != nil {
		n.log.Warn("A shard could not be copied to its mirror; it has one copy until its owner or a repair adds one.",
			"shard", sh.Key.String(), "peer", op.Mirror, "err", copyErr)
		if err := n.store.SetPartner(ctx, sh.Key, ""); err != nil {
			return nil, err
		}
	}
	return &wire.PutShardReply{Mirrored: mirror != "" && copyErr == nil}, nil
}

// checkShard checks all that a shard proves by itself and computes its
// outboard, in one pass of the hash.
func checkShard(m *wire.Manifest, index, crc uint32, body []byte) (shardstore.Shard, error) {
	if m == nil {
		return shardstore.Shard{}, invalid("a shard comes with its manifest")
	}
	if err := m.Verify(); err != nil {
		return shardstore.Shard{}, invalid("%v", err)
	}
	g := erasure.Geometry{K: int(m.K), M: int(m.M), ShardBytes: int(m.ShardBytes)}
	if err := g.Validate(); err != nil {
		return shardstore.Shard{}, invalid("%v", err)
	}
	switch {
	case int(index) >= g.N():
		return shardstore.Shard{}, invalid("shard %d of %d", index, g.N())
	case len(body) != g.BodyBytes():
		return shardstore.Shard{}, invalid("body of %d bytes, the manifest says %d", len(body), g.BodyBytes())
	}
	column, coded := body[:erasure.ColumnBytes], body[erasure.ColumnBytes:]
	outboard, err := erasure.Outboard(coded)
	if err != nil {
		return shardstore.Shard{}, invalid("%v", err)
	}
	codedRoot, err := erasure.OutboardRoot(outboard)
	if err != nil {
		return shardstore.Shard{}, err
	}
	if erasure.JoinRoot(erasure.ColumnHash(column), codedRoot) != [32]byte(m.Roots[index]) {
		if erasure.CRC(body) != crc { // an accident on the way, not a lie
			return shardstore.Shard{}, p2p.Statusf(wire.Status_STATUS_CORRUPT, "the body does not have the checksum it was sent with")
		}
		return shardstore.Shard{}, invalid("the body is not shard %d of this manifest", index)
	}
	manifest, err := marshal(m)
	if err != nil {
		return shardstore.Shard{}, err
	}
	return shardstore.Shard{
		Key: shardstore.Key{Blind: [32]byte(m.Blind), Index: uint8(index)}, Manifest: manifest, Body: body, Outboard: outboard,
	}, nil
}

// holdsOther refuses a second shard of a stripe.
func (n *Node) holdsOther(key shardstore.Key) error {
	held, err := n.store.StripeShards(key.Blind)
	if err != nil {
		return err
	}
	for _, h := range held {
		if h.Index != key.Index {
			return denied("this node holds shard %d of the stripe", h.Index)
		}
	}
	return nil
}

// checkLock checks that a lock may stand where it is offered and returns its
// encoding, or nil when the stored lock stays. A first lock is signed by the
// stripe's index key, a later one by the lock before it.
func (n *Node) checkLock(blind [32]byte, indexKey []byte, offered *wire.Lock) ([]byte, error) {
	if offered == nil {
		return nil, invalid("a shard or index record comes with its lock")
	}
	next := sealLock(offered)
	stored, err := n.lock(blind)
	switch {
	case err != nil && !errors.Is(err, shardstore.ErrNotFound) && !errors.Is(err, shardstore.ErrCorrupt):
		return nil, err
	case err == nil && stored.Version > next.Version:
		return nil, nil // a copy made before the lock was changed
	case err == nil && stored.Version == next.Version:
		if string(stored.Script) != string(next.Script) {
			return nil, denied("the stripe has another lock")
		}
		return nil, nil
	case next.Version == seal.FirstLockVersion:
		err = next.VerifyFirst(indexKey)
	case err == nil:
		err = stored.VerifyNext(blind, next)
	default:
		return nil, denied("lock %d cannot be checked without the lock before it", next.Version)
	}
	if err != nil {
		return nil, denied("lock: %v", err)
	}
	return marshal(offered)
}

// reservations keep two shards of one stripe from coming in at once.
type reservations struct {
	mu   sync.Mutex
	busy map[[32]byte]reservation
}

type reservation struct {
	index uint8
	count int
}

func (r *reservations) reserve(key shardstore.Key) (release func(), err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.busy[key.Blind]
	if now.count > 0 && now.index != key.Index {
		return nil, denied("this node is receiving shard %d of the stripe", now.index)
	}
	r.busy[key.Blind] = reservation{index: key.Index, count: now.count + 1}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		now := r.busy[key.Blind]
		if now.count--; now.count == 0 {
			delete(r.busy, key.Blind)
		} else {
			r.busy[key.Blind] = now
		}
	}, nil
}
