// Package stripe places stripes on the nodes of a pool and fetches them back.
//
// A [Builder] collects slices until a stripe is full. [Store.Seal] draws the
// stripe's columns and salt, seals every slice with a key of its own, codes
// the result into k+m shards and signs the manifest; nothing has left the
// machine yet. [Store.Place] puts the shards on random nodes, and
// [Store.Publish] hands the index records to the stripes' keepers and makes
// the shards permanent. [Store.Read] brings back any range of a stripe's data:
//
//	b := store.NewBuilder(policy, metastore.PurposeContent)
//	slice, ok := b.Add(plain)
//	sealed, err := store.Seal(b)
//	info, err := store.Place(ctx, sealed)
//	acks, err := store.Publish(ctx, []stripe.Placed{{ID: sealed.ID, Info: info, Manifest: sealed.Manifest}})
//	data, err := store.Read(ctx, sealed.ID, &info, offset, length)
//
// A read asks the k best holders, adds one as soon as one is late, verifies
// every range against the stripe's roots and rebuilds what is missing. When
// the holders that the caller remembers do not suffice it asks the stripe's
// keepers, then the whole pool by one broadcast.
//
// Goroutines end before the call that started them returns. Returned bytes
// belong to the caller. The package keeps nothing on disk: a crash between
// Place and Publish leaves provisional shards, which nodes drop by themselves.
package stripe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

// Errors of the package.
var (
	// ErrUnavailable: fewer than k shards of a stripe could be had in time.
	ErrUnavailable = errors.New("too few shards can be reached")
	// ErrTooFewNodes: the pool has no room for a stripe now.
	ErrTooFewNodes = errors.New("too few nodes can take shards")
)

// Options of a Store.
type Options struct {
	Transport p2p.Transport
	Volume    [16]byte
	// Bundle returns the key bundle of an epoch.
	Bundle func(epoch uint32) (*seal.Bundle, error)
	// Epoch returns the epoch that new stripes are sealed in.
	Epoch  func() uint32
	Logger *slog.Logger

	HedgeAfter     time.Duration // a request is late after this; default 300 ms
	RequestTimeout time.Duration // one request; default 10 s
	ReadTimeout    time.Duration // one Read with all its fall-backs; default 25 s
	PlaceTimeout   time.Duration // one Place with all its retries; default 60 s
}

// EnsureDefaults fills what is zero.
func (o *Options) EnsureDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&o.HedgeAfter, 300*time.Millisecond)
	setDefault(&o.RequestTimeout, 10*time.Second)
	setDefault(&o.ReadTimeout, 25*time.Second)
	setDefault(&o.PlaceTimeout, time.Minute)
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// Store places and fetches stripes of one volume. It is safe for concurrent use.
type Store struct {
	o       Options
	t       p2p.Transport
	log     *slog.Logger
	counter atomic.Uint64 // of authorizations; grows for the life of the process
	answers *answers
	misses  *lru.Cache[erasure.BlindID, time.Time] // stripes that nobody knew, until when that holds

	broadcasts *rate.Limiter
	codes      erasure.Codes
	buffers    sync.Pool // of *stripeBuffers

	mu   sync.Mutex
	keys map[keysID]*seal.StripeKeys  // guarded by mu; bounded by keysMax
	took map[placement.NodeID]*intake // guarded by mu; bounded by the pool

	reputations placement.Reputations // by what reads have shown
}

type keysID struct {
	id      erasure.StripeID
	epoch   uint32
	version uint32
}

const keysMax = 4096

// intake counts the bytes that a node was given since it announced what it holds.
type intake struct{ announced, bytes uint64 }

// NewStore makes the transport answer this store's lookups.
func NewStore(o Options) *Store {
	o.EnsureDefaults()
	s := &Store{o: o, t: o.Transport, log: o.Logger, keys: make(map[keysID]*seal.StripeKeys), took: make(map[placement.NodeID]*intake), answers: newAnswers(), broadcasts: rate.NewLimiter(broadcastsPerSecond, broadcastBurst)}
	s.misses, _ = lru.New[erasure.BlindID, time.Time](missesMax) // fails only for a size below 1
	// Counters must grow within a connection nonce, which changes with every
	// start of either side, but not with every Store on a transport.
	s.counter.Store(uint64(time.Now().UnixNano()))
	s.t.Handle(s.answers.serve)
	return s
}

// Keys returns the per-stripe keys, which cost a few curve operations to derive.
func (s *Store) Keys(id erasure.StripeID, epoch, version uint32) (*seal.StripeKeys, error) {
	kid := keysID{id, epoch, version}
	s.mu.Lock()
	k := s.keys[kid]
	s.mu.Unlock()
	if k != nil {
		return k, nil
	}
	bundle, err := s.o.Bundle(epoch)
	if err != nil {
		return nil, err
	}
	k, err = bundle.StripeKeys(id, version)
	if err != nil {
		return nil, fmt.Errorf("stripe %v: keys: %w", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.keys) >= keysMax {
		clear(s.keys)
	}
	s.keys[kid] = k
	return k, nil
}

// recordBytesMax bounds what a node stores of a shard beside its body.
const recordBytesMax = 64 << 10

// nodes returns the pool's storage nodes as placement sees them. Those without
// room for a shard do not count as alive. Content leaves some room for the log,
// without which nothing could be deleted.
func (s *Store) nodes(purpose metastore.Purpose, shardBytes int) []placement.Node {
	members := s.t.Members()
	s.mu.Lock()
	defer s.mu.Unlock()
	nodes := make([]placement.Node, 0, len(members))
	for _, m := range members {
		if m.Role != p2p.RoleNode {
			continue
		}
		if in := s.took[m.ID]; in != nil {
			if in.announced != m.UsedBytes {
				*in = intake{announced: m.UsedBytes}
			}
			m.UsedBytes += in.bytes
		}
		need := uint64(shardBytes) + recordBytesMax
		if purpose == metastore.PurposeContent {
			// As much again: another stripe may be on its way.
			need = 2*need + min(m.CapacityBytes/8, 64<<20)
		}
		nodes = append(nodes, placement.Node{
			ID: m.ID, Host: m.Host, Subnet: m.Subnet, Zone: m.Zone,
			CapacityBytes: m.CapacityBytes, UsedBytes: m.UsedBytes,
			LatencyMs: float64(m.RTT) / float64(time.Millisecond), Reputation: s.Reputation(m.ID),
			Alive: m.State == p2p.Alive && !m.Leaving() && (m.CapacityBytes == 0 || placement.ShardRoom(m.CapacityBytes, m.UsedBytes) >= need),
		})
	}
	return nodes
}

// count notes that a node is given so many bytes, or, negative, has not taken them.
func (s *Store) count(node placement.NodeID, bytes int) {
	if node == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.took[node] == nil {
		s.took[node] = &intake{}
	}
	in := s.took[node]
	in.bytes = uint64(max(0, int64(in.bytes)+int64(bytes)))
}

// Reputation is what reads of this store have shown of a node.
func (s *Store) Reputation(node placement.NodeID) placement.Reputation {
	return s.reputations.Of(node, seconds())
}

func seconds() float64 { return float64(time.Now().UnixMilli()) / 1e3 }

// keepers returns the nodes that keep a stripe's index record: the highest
// ranked among those neither declared dead nor leaving, factor times as many as
// there should be.
func (s *Store) keepers(blind erasure.BlindID, m int, mirrored bool, factor int) []placement.NodeID {
	var ids []placement.NodeID
	for _, member := range s.t.Members() {
		if member.Role == p2p.RoleNode && member.State != p2p.Dead && !member.Leaving() {
			ids = append(ids, member.ID)
		}
	}
	return placement.Keepers(blind, ids, factor*placement.KeeperCount(m, mirrored, len(ids)))
}

// authorize signs one operation on one shard at one node.
func (s *Store) authorize(ctx context.Context, keys *seal.StripeKeys, kind seal.OperationKind, index int, node placement.NodeID) (*wire.Authorization, error) {
	nonce, err := s.t.Nonce(ctx, node)
	if err != nil {
		return nil, err
	}
	op := seal.Operation{
		Kind: kind, Blind: keys.Blind, Index: uint8(index), Node: string(node),
		Nonce: nonce, Expiry: time.Now().Add(10 * time.Minute).Unix(), Counter: s.counter.Add(1),
	}
	unlock, err := seal.Sign(keys.Lock, seal.P2PKH, op)
	if err != nil {
		return nil, err
	}
	return &wire.Authorization{Expiry: op.Expiry, Counter: op.Counter, Unlock: unlock}, nil
}

// newRand returns a generator seeded from the system, so that placement
// cannot be guessed.
func newRand() *mathrand.Rand {
	var seed [32]byte
	rand.Read(seed[:])
	return mathrand.New(mathrand.NewChaCha8(seed))
}

// Placed is a stripe with what Publish needs.
type Placed struct {
	ID       erasure.StripeID
	Info     *metastore.StripeInfo
	Manifest *wire.Manifest
}
