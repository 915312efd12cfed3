package node

import (
	"bytes"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/shardstore"
)

const (
	expiryMax   = 24 * time.Hour // how far ahead an authorization may expire
	windowBits  = 4096           // how far counters may overtake each other
	countersMax = 4096           // peers remembered before departed ones are forgotten
)

// wireLock returns the stripe's lock as stored.
func (n *Node) wireLock(blind [32]byte) (*wire.Lock, error) {
	_, b, err := n.store.Lock(blind)
	if err != nil {
		return nil, err
	}
	l := new(wire.Lock)
	if err := proto.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("stored lock: %w: %w", shardstore.ErrCorrupt, err)
	}
	return l, nil
}

func (n *Node) lock(blind [32]byte) (seal.Lock, error) {
	l, err := n.wireLock(blind)
	if err != nil {
		return seal.Lock{}, err
	}
	return sealLock(l), nil
}

func sealLock(l *wire.Lock) seal.Lock {
	return seal.Lock{Version: l.GetVersion(), Script: l.GetScript(), PrevSig: l.GetPreviousSignature()}
}

// authorize checks that the sender may act on the shard: the lock is opened
// for exactly this operation, shard and node, on this connection, in time, and
// for the first time.
func (n *Node) authorize(from p2p.Peer, kind seal.OperationKind, blind [32]byte, index uint8, a *wire.Authorization) error {
	now := n.o.Now()
	switch {
	case a == nil || len(from.Nonce) == 0:
		return denied("this needs a signature by the owner's lock key")
	case a.Expiry < now.Unix():
		return denied("the signature has expired; check the clocks")
	case a.Expiry > now.Add(expiryMax).Unix():
		return denied("the signature expires too far ahead; check the clocks")
	}
	lock, err := n.lock(blind)
	if err != nil {
		return err
	}
	err = lock.Verify(seal.Operation{
		Kind: kind, Blind: blind, Index: index, Node: string(n.transport.Self()), Nonce: from.Nonce, Expiry: a.Expiry, Counter: a.Counter,
	}, a.Unlock)
	if err != nil {
		return denied("%v", err)
	}
	if !n.counters.use(from, a.Counter, n.transport.Members) {
		return denied("the signature has been used before")
	}
	return nil
}

// counters remember which authorizations were used, for each peer's nonce.
type counters struct {
	mu    sync.Mutex
	peers map[placement.NodeID]*window
}

func (c *counters) use(from p2p.Peer, counter uint64, members func() []p2p.Member) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.peers[from.Member.ID]
	if w == nil || !bytes.Equal(w.nonce, from.Nonce) {
		if w == nil && len(c.peers) >= countersMax {
			c.forget(members())
		}
		w = &window{nonce: bytes.Clone(from.Nonce)}
		c.peers[from.Member.ID] = w
	}
	return w.use(counter)
}

// forget drops the windows of peers that are no longer members: their nonces
// are gone with their connections.
func (c *counters) forget(members []p2p.Member) {
	keep := make(map[placement.NodeID]bool, len(members))
	for _, m := range members {
		keep[m.ID] = true
	}
	for id := range c.peers {
		if !keep[id] {
			delete(c.peers, id)
		}
	}
}

// window is a sliding window over counters (RFC 6479): the highest one used
// and which of the windowBits before it. Requests run in parallel, so counters
// arrive a little out of order.
type window struct {
	nonce []byte
	next  uint64 // one above the highest used
	seen  [windowBits / 64]uint64
}

func (w *window) use(counter uint64) bool {
	if counter == ^uint64(0) {
		return false
	}
	if counter >= w.next {
		if counter-w.next >= windowBits {
			clear(w.seen[:])
		} else {
			for i := w.next; i < counter; i++ {
				w.seen[i/64%uint64(len(w.seen))] &^= 1 << (i % 64)
			}
			w.seen[counter/64%uint64(len(w.seen))] &^= 1 << (counter % 64)
		}
		w.next = counter + 1
	} else if w.next-counter > windowBits {
		return false
	}
	word, bit := &w.seen[counter/64%uint64(len(w.seen))], uint64(1)<<(counter%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}
