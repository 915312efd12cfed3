package p2p

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	pubsub "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

type topicKind int

const (
	topicMembers topicKind = iota
	topicDeaths
	topicHeads
	topicLookups
)

const (
	gossipBytesMax   = 64 << 10
	gossipQueue      = 512 // messages to one peer; the default of 32 drops bursts
	lookupNonceBytes = 16
	lookupBlindsMax  = 256
	lookupSeenMax    = 4096
	lookupsPerSecond = 40 // of all members together: some 100 KB a second of passing on
	lookupsBurst     = 400
	listenersMin     = 4
	listenersWait    = time.Second
	listenersLook    = 20 * time.Millisecond
)

var topicNames = [topicCount]string{"members", "deaths", "heads", "lookups"}

// newRates bounds what one member may gossip on each topic.
func newRates() (rates [topicCount]*rate.Limiter) {
	rates[topicMembers] = rate.NewLimiter(1, 10)
	rates[topicDeaths] = rate.NewLimiter(10, 200)
	rates[topicHeads] = rate.NewLimiter(10, 100)
	rates[topicLookups] = rate.NewLimiter(20, 200)
	return rates
}

// gossip spreads announcements, deaths, heads and lookups among the members.
// libp2p signs each message with its author's key; validators drop what does
// not come from a member, is malformed, or comes too often, before it is
// passed on.
type gossip struct {
	h      *Host
	cancel context.CancelFunc
	topics [topicCount]*pubsub.Topic
	seen   *lru.Cache[string, struct{}] // nonces of lookups
	budget *rate.Limiter                // of lookups, of the pool

	onLookup atomic.Pointer[func(placement.NodeID, *wire.Lookup)]
	onHead   atomic.Pointer[func(placement.NodeID, *wire.HeadNotice)]
}

func newGossip(h *Host, net membersOnly) (*gossip, error) {
	ctx, cancel := context.WithCancel(h.ctx)
	g := &gossip{h: h, cancel: cancel, budget: rate.NewLimiter(lookupsPerSecond, lookupsBurst)}
	var err error
	if g.seen, err = lru.New[string, struct{}](lookupSeenMax); err != nil {
		cancel()
		return nil, fmt.Errorf("gossip: %w", err)
	}
	ps, err := pubsub.NewGossipSub(ctx, net,
		pubsub.WithPeerFilter(func(p peer.ID, _ string) bool { return net.gate.admitted(p) }),
		pubsub.WithMaxMessageSize(gossipBytesMax),
		pubsub.WithPeerOutboundQueueSize(gossipQueue),
		pubsub.WithValidateQueueSize(gossipQueue),
		pubsub.WithFloodPublish(true), // a lookup reaches all connected members in one hop
	)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("gossip: %w", err)
	}
	for kind := range topicKind(topicCount) {
		if err := g.join(ctx, ps, kind); err != nil {
			cancel()
			return nil, fmt.Errorf("gossip: topic %s: %w", topicNames[kind], err)
		}
	}
	return g, nil
}

func (g *gossip) join(ctx context.Context, ps *pubsub.PubSub, kind topicKind) (err error) {
	name := "/defs/1/" + g.h.table.pool.String() + "/" + topicNames[kind]
	err = ps.RegisterTopicValidator(name, func(_ context.Context, _ peer.ID, msg *pubsub.Message) pubsub.ValidationResult {
		return g.validate(kind, msg)
	})
	if err != nil {
		return err
	}
	if g.topics[kind], err = ps.Join(name); err != nil {
		return err
	}
	sub, err := g.topics[kind].Subscribe(pubsub.WithBufferSize(gossipQueue))
	if err != nil {
		return err
	}
	g.h.spawn(func() {
		defer sub.Cancel()
		for {
			msg, err := sub.Next(ctx)
			if err != nil {
				return
			}
			if author := placement.NodeID(msg.GetFrom().String()); author != g.h.id {
				g.deliver(author, msg.ValidatorData)
			}
		}
	})
	return nil
}

// validate decides whether a message is passed on, and decodes it.
func (g *gossip) validate(kind topicKind, msg *pubsub.Message) pubsub.ValidationResult {
	author := placement.NodeID(msg.GetFrom().String())
	if author == g.h.id {
		return pubsub.ValidationAccept
	}
	m := g.h.table.get(author)
	if m == nil || !m.rates[kind].Allow() {
		return pubsub.ValidationIgnore
	}
	decoded, err := decodeGossip(kind, author, msg.Data)
	if err != nil {
		return pubsub.ValidationReject
	}
	if lookup, ok := decoded.(*wire.Lookup); ok {
		if again, _ := g.seen.ContainsOrAdd(string(author)+string(lookup.Nonce), struct{}{}); again || !g.budget.Allow() {
			return pubsub.ValidationIgnore
		}
	}
	msg.ValidatorData = decoded
	return pubsub.ValidationAccept
}

// decodeGossip reads the message of one topic and checks its bounds.
func decodeGossip(kind topicKind, author placement.NodeID, data []byte) (proto.Message, error) {
	if len(data) > gossipBytesMax {
		return nil, ErrTooLarge
	}
	var decoded proto.Message
	ok := func() bool { return true }
	switch kind {
	case topicMembers:
		m := new(wire.Member)
		decoded, ok = m, func() bool {
			return proto.Size(m) <= announcementMax && m.GetCertificate().GetPeer() == string(author)
		}
	case topicDeaths:
		d := new(wire.Death)
		decoded, ok = d, func() bool { return len(d.Peer) <= peerIDBytesMax }
	case topicHeads:
		n := new(wire.HeadNotice)
		decoded, ok = n, func() bool { return CheckHeadNotice(n) == nil }
	case topicLookups:
		l := new(wire.Lookup)
		decoded, ok = l, func() bool { return l.Sender == string(author) && checkLookup(l) == nil }
	}
	if err := proto.Unmarshal(data, decoded); err != nil {
		return nil, err
	}
	if !ok() {
		return nil, fmt.Errorf("gossip on %s is out of bounds", topicNames[kind])
	}
	return decoded, nil
}

// PrepareLookup fills in the sender and, where empty, the nonce of a lookup,
// and checks its bounds: it is what Broadcast does first.
func PrepareLookup(l *wire.Lookup, sender placement.NodeID) error {
	l.Sender = string(sender)
	if len(l.Nonce) == 0 {
		l.Nonce = make([]byte, lookupNonceBytes)
		_, _ = rand.Read(l.Nonce)
	}
	return checkLookup(l)
}

func checkLookup(l *wire.Lookup) error {
	wrong := slices.ContainsFunc(l.Blinds, func(b []byte) bool { return len(b) != 32 })
	if len(l.Nonce) != lookupNonceBytes || len(l.Blinds) == 0 || len(l.Blinds) > lookupBlindsMax || wrong {
		return fmt.Errorf("lookup: want a nonce of %d bytes and 1 to %d blinds of 32 bytes", lookupNonceBytes, lookupBlindsMax)
	}
	return nil
}

// CheckHeadNotice checks the bounds of a head announcement.
func CheckHeadNotice(n *wire.HeadNotice) error {
	if len(n.Address) != 32 {
		return fmt.Errorf("head announcement: address of %d bytes, want 32", len(n.Address))
	}
	return nil
}

func (g *gossip) deliver(author placement.NodeID, decoded any) {
	switch msg := decoded.(type) {
	case *wire.Member:
		if _, err := g.h.table.learn(msg, time.Now()); err != nil {
			g.h.log.Debug("A gossiped announcement is wrong.", "peer", string(author), "err", err)
		}
	case *wire.Death: // nobody is believed: look
		if m := g.h.table.get(placement.NodeID(msg.Peer)); m != nil && m.id != author {
			g.h.probeSoon(m)
		}
	case *wire.HeadNotice:
		if f := g.onHead.Load(); f != nil {
			(*f)(author, msg)
		}
	case *wire.Lookup:
		if f := g.onLookup.Load(); f != nil {
			(*f)(author, msg)
		}
	}
}

func (g *gossip) publish(ctx context.Context, kind topicKind, msg proto.Message) error {
	data, err := proto.Marshal(msg)
	if err != nil {
		return fmt.Errorf("gossip on %s: %w", topicNames[kind], err)
	}
	if err := g.topics[kind].Publish(ctx, data); err != nil {
		return fmt.Errorf("gossip on %s: %w", topicNames[kind], err)
	}
	return nil
}

func (g *gossip) close() { g.cancel() }

// Broadcast gossips a lookup. See Transport.Broadcast.
func (h *Host) Broadcast(ctx context.Context, lookup *wire.Lookup) error {
	if err := PrepareLookup(lookup, h.id); err != nil {
		return err
	}
	h.awaitListeners(ctx)
	return h.gossip.publish(ctx, topicLookups, lookup)
}

// awaitListeners returns when some members are connected that hear lookups, or
// after listenersWait: what is published before that leaves with a heartbeat of
// gossip, a second later.
func (h *Host) awaitListeners(ctx context.Context) {
	now, alive := time.Now(), 0
	for _, m := range h.table.all() {
		h.table.mu.Lock()
		if h.table.state(m, now) == Alive {
			alive++
		}
		h.table.mu.Unlock()
	}
	ctx, cancel := context.WithTimeout(ctx, listenersWait)
	defer cancel()
	tick := time.NewTicker(listenersLook)
	defer tick.Stop()
	for len(h.gossip.topics[topicLookups].ListPeers()) < min(listenersMin, alive) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		case <-h.ctx.Done():
			return
		}
	}
}

// AnnounceHead gossips that a head has moved on. See Transport.AnnounceHead.
func (h *Host) AnnounceHead(ctx context.Context, notice *wire.HeadNotice) error {
	if err := CheckHeadNotice(notice); err != nil {
		return err
	}
	return h.gossip.publish(ctx, topicHeads, notice)
}

// OnBroadcast sets what receives the lookups of others.
func (h *Host) OnBroadcast(f func(from placement.NodeID, lookup *wire.Lookup)) {
	h.gossip.onLookup.Store(&f)
}

// OnHead sets what receives the head announcements of others.
func (h *Host) OnHead(f func(from placement.NodeID, notice *wire.HeadNotice)) {
	h.gossip.onHead.Store(&f)
}
