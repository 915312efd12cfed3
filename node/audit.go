package node

import (
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

// Nodes challenge each other: whoever keeps a stripe's index record asks its
// holders for a random range of their shards, and whoever holds a shard asks
// the node that mirrors it. What a node makes of the answers is its own affair:
// nobody is believed about others.

// errLied says that what a node sent as its shard is not its shard.
var errLied = errors.New("what it sent is not its shard")

// suspicionMax is how often a node that lies is challenged at once.
const suspicionMax = 3

// audit challenges one node to show a random range of a random shard.
func (n *Node) audit(ctx context.Context) {
	id, m, key, ok := n.auditee()
	if !ok {
		return
	}
	for range suspicionMax {
		if outcome, ok := n.challenge(ctx, id, m, key); !ok || outcome != placement.Lied || n.contained(id) {
			return
		}
	}
}

// auditee draws a shard and a node that is said to hold it, from the index
// records kept here or the shards that are mirrored.
func (n *Node) auditee() (id placement.NodeID, m *wire.Manifest, key shardstore.Key, ok bool) {
	var start [32]byte
	_, _ = rand.Read(start[:]) // never fails
	var said []placement.NodeID
	if start[0]&1 == 0 {
		m, key, said = n.keptShard(start)
	} else {
		m, key, said = n.mirroredShard(start)
	}
	for _, member := range n.transport.Members() {
		for _, s := range said {
			if s == member.ID && member.Role == p2p.RoleNode && member.State == p2p.Alive {
				return s, m, key, true
			}
		}
	}
	return "", nil, key, false
}

// keptShard draws a shard of the first stripe behind start whose index record is
// kept here, and who holds it.
func (n *Node) keptShard(start [32]byte) (*wire.Manifest, shardstore.Key, []placement.NodeID) {
	var blind [32]byte
	found := false
	first := func(b [32]byte) bool { blind, found = b, true; return false }
	if err := n.store.Indexes(start, first); err != nil || !found {
		if err := n.store.Indexes([32]byte{}, first); err != nil || !found {
			return nil, shardstore.Key{}, nil
		}
	}
	record, err := n.index(blind)
	if err != nil {
		return nil, shardstore.Key{}, nil // another keeper has it
	}
	holders := record.CurrentHolders()
	if len(holders) == 0 {
		return nil, shardstore.Key{}, nil
	}
	h := holders[mathrand.IntN(len(holders))]
	one := h.Primary
	if h.Mirror != "" && mathrand.IntN(2) == 0 {
		one = h.Mirror
	}
	if placement.NodeID(one) == n.transport.Self() {
		one = ""
	}
	return record.Manifest, shardstore.Key{Blind: blind, Index: uint8(h.Index)}, []placement.NodeID{placement.NodeID(one)}
}

// mirroredShard draws the first shard behind start that another node has too.
func (n *Node) mirroredShard(start [32]byte) (*wire.Manifest, shardstore.Key, []placement.NodeID) {
	var info shardstore.ShardInfo
	looked := 0
	first := func(s shardstore.ShardInfo) bool {
		looked++
		if s.Partner == "" || s.Provisional {
			return looked < walkBatch
		}
		info = s
		return false
	}
	if err := n.store.Shards(shardstore.Key{Blind: start}, first); err != nil || info.Partner == "" {
		return nil, shardstore.Key{}, nil
	}
	_, b, err := n.store.Manifest(info.Key)
	m := new(wire.Manifest)
	if err != nil || proto.Unmarshal(b, m) != nil {
		return nil, shardstore.Key{}, nil // scrubbing finds the damage
	}
	return m, info.Key, []placement.NodeID{placement.NodeID(info.Partner)}
}

// challenge has a node prove a random range of a shard that it is said to hold,
// and notes how it came out of that; ok is false where nothing can be said.
func (n *Node) challenge(ctx context.Context, id placement.NodeID, m *wire.Manifest, key shardstore.Key) (outcome placement.Outcome, ok bool) {
	err := n.proves(ctx, id, m, key)
	switch status := p2p.StatusOf(err); {
	case err == nil:
		outcome = placement.Proved
	case ctx.Err() != nil || status == wire.Status_STATUS_BUSY:
		return 0, false
	case errors.Is(err, errLied):
		outcome = placement.Lied
	case errors.Is(err, p2p.ErrUnreachable):
		if !n.alive(id) {
			return 0, false // heartbeats say it as well
		}
		outcome = placement.Stalled
	case status == wire.Status_STATUS_NOT_FOUND:
		if !n.stillHolder(ctx, id, key) {
			return 0, false // it has moved, or its owner has deleted it
		}
		if _, deleted, err := n.askHolder(ctx, id, []shardstore.Key{key}); err == nil && deleted[0] {
			// The index record here is older than that; the next round of repairs finds out whether the other holders
			// say the same, and has the shard made anew if they do not.
			return 0, false
		}
		outcome = placement.Lost
	default:
		outcome = placement.Lost
	}
	before := n.contained(id)
	r := n.reputations.Note(id, outcome, n.seconds())
	if outcome == placement.Proved {
		n.did.audited.Add(1)
		return outcome, true
	}
	n.did.auditsFailed.Add(1)
	n.log.Warn("A node did not prove that it holds a shard.", "peer", string(id), "shard", key.String(), "trust", r.Trust(), "err", err)
	if r.Contained() && !before {
		n.log.Error("A node is contained: it is given no shards, and what it holds is put elsewhere.", "peer", string(id))
	}
	return outcome, true
}

// stillHolder says whether a node is the holder of a shard by what is known of
// the stripe here, brought up to date, or by the shard's own copy here.
func (n *Node) stillHolder(ctx context.Context, id placement.NodeID, key shardstore.Key) bool {
	if info, err := n.store.Stat(key); err == nil && placement.NodeID(info.Partner) == id {
		return true
	}
	record, err := n.index(key.Blind)
	if err != nil {
		return false
	}
	record = n.catchUp(ctx, record, keepers(key.Blind, int(record.Manifest.M), record.Mirrored, n.poolNodes()))
	for _, h := range record.CurrentHolders() {
		if h.Index == uint32(key.Index) && (placement.NodeID(h.Primary) == id || placement.NodeID(h.Mirror) == id) {
			return true
		}
	}
	return false
}

func (n *Node) alive(id placement.NodeID) bool {
	for _, m := range n.transport.Members() {
		if m.ID == id {
			return m.State == p2p.Alive
		}
	}
	return false
}

// contained says whether this node has seen enough of another to give it nothing.
func (n *Node) contained(id placement.NodeID) bool {
	return n.Reputation(id).Contained()
}

// Reputation is what this node has seen of another.
func (n *Node) Reputation(id placement.NodeID) placement.Reputation {
	return n.reputations.Of(id, n.seconds())
}

func (n *Node) seconds() float64 { return float64(n.o.Now().UnixMilli()) / 1e3 }
