package p2p

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	"golang.org/x/sync/semaphore"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// Host is the Transport over libp2p.
type Host struct {
	o         HostOptions
	log       *slog.Logger
	id        placement.NodeID
	net       host.Host
	table     *memberTable
	gate      *gate
	gossip    *gossip
	discovery *discovery
	bound     []string // what o.Listen came to

	session      []byte   // of this run, told in each Hello
	nonceSecret  [32]byte // of this run
	handler      atomic.Pointer[Handler]
	inboundBytes *semaphore.Weighted // request bodies held
	bodies       sync.Pool           // of *[]byte: buffers of request bodies, at most bodyTrustBytes each
	wake         chan struct{}       // asks the heartbeat loop to look again

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex // guards what follows
	closed    bool
	greetings map[network.Conn]*greeting
	said      *wire.Member // this host's newest announcement
	capacity  uint64
	used      uint64
}

// NewHost starts a member of the pool that o.Certificate names. It returns
// when the host listens; members come as they are found, see WaitMembers. ctx
// bounds the start alone. The caller must Close the host.
func NewHost(ctx context.Context, o HostOptions) (_ *Host, err error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	id, err := NodeIDOf(o.Key)
	if err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	pool := PoolID(o.Certificate.Pool)
	if holder, err := VerifyCertificate(o.Certificate, pool, time.Now()); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	} else if holder != id {
		return nil, fmt.Errorf("start host: %w: the certificate is for peer %s, the key is of %s", ErrNotAdmitted, holder, id)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}

	h := &Host{
		o: o, id: id, log: o.Logger.With("self", string(id)),
		session:      make([]byte, sessionBytes),
		inboundBytes: semaphore.NewWeighted(o.InboundBytesMax),
		wake:         make(chan struct{}, 1),
		greetings:    make(map[network.Conn]*greeting),
		capacity:     o.CapacityBytes, used: o.UsedBytes,
	}
	_, _ = rand.Read(h.session)
	_, _ = rand.Read(h.nonceSecret[:])
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.table = &memberTable{
		self: id, pool: pool, suspectAfter: o.SuspectAfter, deadAfter: o.DeadAfter,
		newMember: h.newMember, byID: make(map[placement.NodeID]*member), changed: make(chan struct{}),
	}
	h.gate = &gate{table: h.table, ctx: h.ctx, patience: 2 * o.DialTimeout, strangers: make(map[network.Conn]time.Time)}
	lastListen := h.loadMembers()
	if err := h.learnSponsored(); err != nil {
		h.cancel()
		return nil, fmt.Errorf("start host: %w", err)
	}

	if h.net, err = newNetwork(o, h.gate); err != nil {
		h.cancel()
		return nil, fmt.Errorf("start host: %w", err)
	}
	defer func() {
		if err != nil {
			_ = h.Close()
		}
	}()
	h.net.Network().Notify(&network.NotifyBundle{ConnectedF: h.connected, DisconnectedF: h.disconnected})
	h.net.SetStreamHandler(requestProtocol, h.serveStream)
	h.net.SetStreamHandler(certificateProtocol, h.serveCertificate)
	if h.discovery, err = newDiscovery(membersOnly{h.net, h.gate}); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	if h.gossip, err = newGossip(h, membersOnly{h.net, h.gate}); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	if h.bound, err = listen(h.net, o.Listen, lastListen); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	if err := h.announce(); err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	moved, err := h.net.EventBus().Subscribe(new(event.EvtLocalAddressesUpdated))
	if err != nil {
		return nil, fmt.Errorf("start host: %w", err)
	}
	if err := ctx.Err(); err != nil {
		_ = moved.Close()
		return nil, fmt.Errorf("start host: %w", err)
	}
	if !slices.Equal(h.bound, lastListen) {
		// At once: others know these ports from now on, and a host that is
		// killed soon must come back at them.
		h.table.mu.Lock()
		h.table.dirty = true
		h.table.mu.Unlock()
		if err := h.saveMembers(); err != nil {
			_ = moved.Close()
			return nil, fmt.Errorf("start host: %w", err)
		}
	}
	h.spawn(func() { h.runHeartbeats(moved) })
	return h, nil
}

func (h *Host) newMember(id placement.NodeID) *member {
	return &member{
		id:       id,
		calls:    make(chan struct{}, h.o.CallsPerPeerMax),
		handlers: make(chan struct{}, h.o.HandlersPerPeerMax),
		bodies:   semaphore.NewWeighted(max(BodyBytesMax, h.o.InboundBytesMax/4)),
		rates:    newRates(),
	}
}

// Self is this host's id.
func (h *Host) Self() placement.NodeID { return h.id }

// Members lists the admitted members known here, ordered by id.
func (h *Host) Members() []Member { return h.table.list(time.Now()) }

// Addrs are the multiaddrs, with /p2p/ID, at which this host can be reached:
// what a ticket should hold.
func (h *Host) Addrs() []string {
	var full []string
	for _, a := range h.net.Addrs() {
		full = append(full, a.String()+"/p2p/"+string(h.id))
	}
	return full
}

// WaitMembers returns when at least count members have been heard and are
// alive, or with ctx's error.
func (h *Host) WaitMembers(ctx context.Context, count int) error {
	for {
		changed := h.table.unread()
		alive := 0
		for _, m := range h.table.all() {
			h.table.mu.Lock()
			if m.heard && h.table.state(m, time.Now()) == Alive {
				alive++
			}
			h.table.mu.Unlock()
		}
		if alive >= count {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for members: %d of %d answer: %w", alive, count, ctx.Err())
		case <-h.ctx.Done():
			return ErrClosed
		}
	}
}

// Handle sets the handler of requests.
func (h *Host) Handle(handler Handler) { h.handler.Store(&handler) }

// SetUsage changes what the host announces about its store. Members hear of it
// with the next heartbeat; that it is leaving, or no longer, is gossiped now.
func (h *Host) SetUsage(capacityBytes, usedBytes uint64) {
	h.mu.Lock()
	turned := (h.capacity == LeavingCapacityBytes) != (capacityBytes == LeavingCapacityBytes)
	h.capacity, h.used = capacityBytes, usedBytes
	h.mu.Unlock()
	if turned {
		h.lookAgain()
	}
}

// self is the newest announcement.
func (h *Host) self() *wire.Member {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.said
}

// announce makes a new announcement if anything in it has changed, and gossips
// it if this host has moved, is leaving, or is no longer.
func (h *Host) announce() error {
	var addrs []string
	for _, a := range h.net.Addrs() {
		if text := a.String(); len(addrs) < memberAddrsMax && len(text) <= memberAddrBytesMax {
			addrs = append(addrs, text)
		}
	}
	h.mu.Lock()
	last := h.said
	next := &wire.Member{
		Certificate: h.o.Certificate, Addrs: addrs, Host: h.o.Host, Zone: h.o.Zone,
		CapacityBytes: h.capacity, UsedBytes: h.used,
	}
	h.mu.Unlock()
	if last != nil && sameSaid(last, next) {
		return nil
	}
	next.Sequence = max(uint64(time.Now().UnixMilli()), last.GetSequence()+1)
	if err := signAnnouncement(next, h.o.Key); err != nil {
		return err
	}
	h.mu.Lock()
	h.said = next
	h.mu.Unlock()
	turned := (last.GetCapacityBytes() == LeavingCapacityBytes) != (next.CapacityBytes == LeavingCapacityBytes)
	if last != nil && slices.Equal(last.Addrs, next.Addrs) && !turned {
		return nil // how full a store is can wait for the heartbeats
	}
	return h.gossip.publish(h.ctx, topicMembers, next)
}

// connected runs for each new connection. The side that dialled says Hello
// first; the other answers in kind once it knows the peer.
func (h *Host) connected(_ network.Network, c network.Conn) {
	h.gate.connected(c, time.Now())
	h.log.Debug("Connected.", "peer", c.RemotePeer().String(), "addr", c.RemoteMultiaddr().String(), "direction", c.Stat().Direction.String())
	switch {
	case h.redundant(c):
		h.spawn(func() { _ = c.Close() })
	case c.Stat().Direction == network.DirOutbound:
		h.greet(c)
	}
}

// redundant says that c goes over QUIC beside a connection over TCP, which
// takes a third of the CPU for each byte. It happens where both ends dial, one
// of them when the other did not listen yet.
func (h *Host) redundant(c network.Conn) bool {
	overTCP := func(c network.Conn) bool {
		return isProtocol(c.RemoteMultiaddr(), multiaddr.P_TCP) && !c.Stat().Limited
	}
	return !overTCP(c) && !c.Stat().Limited && slices.ContainsFunc(h.net.Network().ConnsToPeer(c.RemotePeer()), overTCP)
}

func (h *Host) disconnected(_ network.Network, c network.Conn) {
	h.gate.disconnected(c)
	h.mu.Lock()
	delete(h.greetings, c)
	h.mu.Unlock()
	if m := h.table.get(placement.NodeID(c.RemotePeer().String())); m != nil {
		m.idle.drop(c)
		h.probeSoon(m) // to learn at once whether it is gone
	}
}

// spawn runs f on a goroutine that Close waits for; it reports whether it did.
func (h *Host) spawn(f func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.spawnLocked(f)
}

func (h *Host) spawnLocked(f func()) bool {
	if h.closed {
		return false
	}
	h.wg.Go(f)
	return true
}

// enter counts a goroutine of libp2p's that runs this host's code.
func (h *Host) enter() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.wg.Add(1)
	return true
}

// Close ends all connections and requests, and waits for handlers and
// goroutines. The member file is written.
func (h *Host) Close() error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		h.wg.Wait()
		return nil
	}
	h.closed = true
	h.mu.Unlock()
	h.cancel()
	var errs []error
	if h.gossip != nil {
		h.gossip.close()
	}
	if h.discovery != nil {
		errs = append(errs, h.discovery.close())
	}
	errs = append(errs, h.net.Close())
	h.wg.Wait()
	errs = append(errs, h.saveMembers())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close host: %w", err)
	}
	return nil
}

// dialInfo is how to reach m.
func (h *Host) dialInfo(m *member) peer.AddrInfo {
	h.table.mu.Lock()
	defer h.table.mu.Unlock()
	addrs := append([]multiaddr.Multiaddr(nil), m.said.addrs...)
	return peer.AddrInfo{ID: m.said.peerID, Addrs: addrs}
}

var _ Transport = (*Host)(nil)
