package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

const (
	healQueueMax   = 256
	damagedMax     = 4096 // shards; an older one is found damaged again when it is read
	lookupQueueMax = 64
	usageInterval  = 10 * time.Second
	// messageRoom is what the records of one message may take: the bound of a
	// message less its other fields.
	messageRoom = p2p.MessageBytesMax - 4<<10
)

// Node serves one member's store to the pool.
type Node struct {
	o         Options
	store     *shardstore.Store
	transport p2p.Transport
	log       *slog.Logger

	putBytes  *semaphore.Weighted
	readBytes *semaphore.Weighted
	buffers   sync.Pool // of *[]byte, for reads
	counters  counters
	stripes   reservations
	answers   *rate.Limiter
	answered  *lru.Cache[string, struct{}] // nonces of lookups
	budget    *budget
	did       tally

	reputations placement.Reputations
	surplus     surplus
	draining    atomic.Bool

	heals   chan shardstore.Key
	damaged *lru.Cache[shardstore.Key, struct{}] // that no partner could heal
	lookups chan lookup
	mirrors mirrors

	repairs  repairs
	rebuilds *semaphore.Weighted // bytes of shards being rebuilt
	codes    erasure.Codes

	mu      sync.Mutex // guards what follows
	cancel  context.CancelFunc
	done    chan struct{} // of Run; nil before it
	closed  bool
	settled []placement.NodeID // see keeperPool
}

// New makes a node and begins to answer requests. Run does the rest.
func New(o Options) (*Node, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	answered, err := lru.New[string, struct{}](1024)
	if err != nil {
		return nil, fmt.Errorf("new node: %w", err)
	}
	damaged, err := lru.New[shardstore.Key, struct{}](damagedMax)
	if err != nil {
		return nil, fmt.Errorf("new node: %w", err)
	}
	n := &Node{
		o: o, store: o.Store, transport: o.Transport, log: o.Logger,
		putBytes: semaphore.NewWeighted(o.PutBytesMax), readBytes: semaphore.NewWeighted(o.ReadBytesMax),
		rebuilds: semaphore.NewWeighted(rebuildBytes),
		answers:  rate.NewLimiter(rate.Limit(o.AnswersPerSecond), lookupQueueMax), answered: answered,
		budget: newBudget(o.BackgroundRate),
		heals:  make(chan shardstore.Key, healQueueMax), damaged: damaged, lookups: make(chan lookup, lookupQueueMax),
	}
	n.counters.peers = map[placement.NodeID]*window{}
	n.stripes.busy = map[[32]byte]reservation{}
	n.repairs.broken = map[[32]byte]*repair{}
	n.surplus.keys = map[shardstore.Key]int{}
	n.mirrors.init()
	n.announceUsage()
	o.Transport.OnBroadcast(n.enqueueLookup)
	o.Transport.Handle(n.handle)
	return n, nil
}

// Run looks after mirrors, index records, damaged shards and lookups until ctx
// ends or Close. It returns when all its goroutines have ended.
func (n *Node) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil // Close was quicker
	}
	if n.done != nil {
		n.mu.Unlock()
		return errors.New("run node: running already")
	}
	done := make(chan struct{})
	n.cancel, n.done = cancel, done
	n.mu.Unlock()
	defer close(done)

	var wg sync.WaitGroup
	for range n.o.CopiesMax {
		wg.Go(func() { n.healer(ctx) })
	}
	wg.Go(func() { n.answerer(ctx) })
	wg.Go(func() { every(ctx, usageInterval, n.announceUsage) })
	wg.Go(func() { every(ctx, n.o.MirrorInterval, func() { n.mirrorRound(ctx) }) })
	wg.Go(func() { n.handover(ctx) })
	wg.Go(func() { every(ctx, n.o.RepairInterval, func() { n.repairRound(ctx) }) })
	wg.Go(func() { every(ctx, n.o.AuditInterval, func() { n.audit(ctx) }) })
	wg.Go(func() { n.walk(ctx, n.o.ScrubInterval, n.scrub) })
	wg.Go(func() { n.walk(ctx, n.o.SurplusInterval, n.reconcile) })
	wg.Go(func() { every(ctx, n.o.BalanceInterval, func() { n.balance(ctx) }) })
	wg.Wait()
	return nil
}

// Close ends Run and waits for it. Close the transport first.
func (n *Node) Close() error {
	n.mu.Lock()
	n.closed = true
	cancel, done := n.cancel, n.done
	n.mu.Unlock()
	if done != nil {
		cancel()
		<-done
	}
	return nil
}

// every calls f at intervals, the first time after one, until ctx ends.
func every(ctx context.Context, interval time.Duration, f func()) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			f()
		case <-ctx.Done():
			return
		}
	}
}

func (n *Node) announceUsage() {
	u := n.store.Usage()
	if n.draining.Load() {
		u.CapacityBytes, u.UsedBytes = p2p.LeavingCapacityBytes, max(u.UsedBytes, p2p.LeavingCapacityBytes) // nobody chooses a full node
	}
	n.transport.SetUsage(u.CapacityBytes, u.UsedBytes)
}

// handle answers one request of a member.
func (n *Node) handle(ctx context.Context, from p2p.Peer, req *wire.Request, body []byte) (rep *wire.Reply, replyBody []byte, err error) {
	rep = &wire.Reply{}
	if foreground(from) {
		defer n.budget.enter()()
	}
	switch op := req.Op.(type) {
	case *wire.Request_PutShard:
		var r *wire.PutShardReply
		r, err = n.putShard(ctx, from, op.PutShard, body)
		rep.Result = &wire.Reply_PutShard{PutShard: r}
	case *wire.Request_GetShard:
		var r *wire.GetShardReply
		r, replyBody, err = n.getShard(ctx, from, op.GetShard)
		rep.Result = &wire.Reply_GetShard{GetShard: r}
	case *wire.Request_GetColumns:
		var r *wire.GetColumnsReply
		r, err = n.getColumns(from, op.GetColumns)
		rep.Result = &wire.Reply_GetColumns{GetColumns: r}
	case *wire.Request_HasShards:
		var r *wire.HasShardsReply
		r, err = n.hasShards(op.HasShards)
		rep.Result = &wire.Reply_HasShards{HasShards: r}
	case *wire.Request_DeleteShards:
		var r *wire.DeleteShardsReply
		r, err = n.deleteShards(ctx, from, op.DeleteShards)
		rep.Result = &wire.Reply_DeleteShards{DeleteShards: r}
	case *wire.Request_CommitShards:
		var r *wire.CommitShardsReply
		r, err = n.commitShards(ctx, op.CommitShards)
		rep.Result = &wire.Reply_CommitShards{CommitShards: r}
	case *wire.Request_PutIndex:
		var r *wire.PutIndexReply
		r, err = n.putIndex(ctx, from, op.PutIndex)
		rep.Result = &wire.Reply_PutIndex{PutIndex: r}
	case *wire.Request_GetIndex:
		var r *wire.GetIndexReply
		r, err = n.getIndex(op.GetIndex)
		rep.Result = &wire.Reply_GetIndex{GetIndex: r}
	case *wire.Request_MoveHolder:
		err = n.moveHolder(ctx, from.Member.ID, op.MoveHolder)
	case *wire.Request_PutHead:
		rep, err = n.putHead(ctx, op.PutHead)
	case *wire.Request_GetHead:
		var r *wire.GetHeadReply
		r, err = n.getHead(op.GetHead)
		rep.Result = &wire.Reply_GetHead{GetHead: r}
	case *wire.Request_Ping:
		var r *wire.PingReply
		r, err = n.ping(from.Member.ID)
		rep.Result = &wire.Reply_Ping{Ping: r}
	default:
		err = p2p.Statusf(wire.Status_STATUS_INVALID, "a node does not serve this request")
	}
	if err != nil {
		return nil, nil, replyError(err)
	}
	return rep, replyBody, nil
}

// replyError gives errors of the store their status.
func replyError(err error) error {
	var status *p2p.StatusError
	if errors.As(err, &status) {
		return err
	}
	if s := storeStatus(err); s != wire.Status_STATUS_INTERNAL {
		return p2p.Statusf(s, "%v", err)
	}
	return err
}

func storeStatus(err error) wire.Status {
	switch {
	case err == nil:
		return wire.Status_STATUS_OK
	case errors.Is(err, shardstore.ErrNotFound):
		return wire.Status_STATUS_NOT_FOUND
	case errors.Is(err, shardstore.ErrFull):
		return wire.Status_STATUS_FULL
	case errors.Is(err, shardstore.ErrCorrupt):
		return wire.Status_STATUS_CORRUPT
	case errors.Is(err, shardstore.ErrDeleted), errors.Is(err, shardstore.ErrExists), errors.Is(err, shardstore.ErrStale):
		return wire.Status_STATUS_DENIED
	}
	return wire.Status_STATUS_INTERNAL
}

func invalid(format string, args ...any) error {
	return p2p.Statusf(wire.Status_STATUS_INVALID, format, args...)
}

func denied(format string, args ...any) error {
	return p2p.Statusf(wire.Status_STATUS_DENIED, format, args...)
}

// take waits a short time for a turn, then says that the node is busy.
func (n *Node) take(ctx context.Context, s *semaphore.Weighted, bytes int64) error {
	ctx, cancel := context.WithTimeout(ctx, n.o.BusyAfter)
	defer cancel()
	if err := s.Acquire(ctx, bytes); err != nil {
		return p2p.Statusf(wire.Status_STATUS_BUSY, "too many bytes under way, ask again soon")
	}
	return nil
}

// call asks another node, for at most CallTimeout.
func (n *Node) call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, n.o.CallTimeout)
	defer cancel()
	req.Version, req.BodyBytes = p2p.WireVersion, uint64(len(body))
	return n.transport.Call(ctx, to, req, body)
}

// stripeID checks the length of a blinded stripe id.
func stripeID(b []byte) ([32]byte, error) {
	if len(b) != 32 {
		return [32]byte{}, invalid("a stripe id has 32 bytes, not %d", len(b))
	}
	return [32]byte(b), nil
}

func shardKey(blind []byte, index uint32) (shardstore.Key, error) {
	id, err := stripeID(blind)
	if err == nil && index >= wire.ShardsMax {
		err = invalid("shard number %d is too high", index)
	}
	return shardstore.Key{Blind: id, Index: uint8(index)}, err
}

func checkBatch(count int) error {
	if count > wire.BatchMax {
		return invalid("%d entries in one request, at most %d", count, wire.BatchMax)
	}
	return nil
}

func marshal(m proto.Message) ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}
