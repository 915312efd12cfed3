package p2p

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-multiaddr"

	"github.com/defs-fs/defs/placement"
)

const strangersMax = 64 // connections of peers that have not shown a certificate

// gate lets in whoever might be a member and lets only members stay. A
// stranger may connect, because a new member is one until its Hello, but is
// counted, served nothing else, and closed after patience.
type gate struct {
	table    *memberTable
	ctx      context.Context
	patience time.Duration

	mu        sync.Mutex
	strangers map[network.Conn]time.Time // when they connected
}

func (g *gate) admitted(p peer.ID) bool { return g.table.get(placement.NodeID(p.String())) != nil }

func (g *gate) InterceptPeerDial(peer.ID) bool { return true }

func (g *gate) InterceptAddrDial(peer.ID, multiaddr.Multiaddr) bool { return true }

func (g *gate) InterceptAccept(network.ConnMultiaddrs) bool { return true }

func (g *gate) InterceptSecured(dir network.Direction, p peer.ID, _ network.ConnMultiaddrs) bool {
	if dir == network.DirOutbound || g.admitted(p) {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.strangers) < strangersMax
}

func (g *gate) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }

// AllowReserve and AllowConnect keep the relay service for members.
func (g *gate) AllowReserve(p peer.ID, _ multiaddr.Multiaddr) bool { return g.admitted(p) }

func (g *gate) AllowConnect(src peer.ID, _ multiaddr.Multiaddr, dest peer.ID) bool {
	return g.admitted(src) && g.admitted(dest)
}

func (g *gate) connected(c network.Conn, now time.Time) {
	if g.admitted(c.RemotePeer()) {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.strangers[c] = now
}

func (g *gate) disconnected(c network.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.strangers, c)
}

// closeStrangers ends connections whose peers have had their time.
func (g *gate) closeStrangers(now time.Time) {
	g.mu.Lock()
	var late []network.Conn
	for c, since := range g.strangers {
		if g.admitted(c.RemotePeer()) {
			delete(g.strangers, c)
		} else if now.Sub(since) >= g.patience {
			late = append(late, c)
		}
	}
	g.mu.Unlock()
	for _, c := range late {
		_ = c.Close()
	}
}

// wait returns once p is admitted, or an error after patience.
func (g *gate) wait(ctx context.Context, p peer.ID) error {
	if g.admitted(p) {
		return nil
	}
	timeout := time.NewTimer(g.patience)
	defer timeout.Stop()
	for {
		changed := g.table.unread()
		if g.admitted(p) {
			return nil
		}
		select {
		case <-changed:
		case <-timeout.C:
			return fmt.Errorf("%w: %s", ErrNotAdmitted, p)
		case <-ctx.Done():
			return ctx.Err()
		case <-g.ctx.Done():
			return ErrClosed
		}
	}
}

// membersOnly is a libp2p host on which protocols such as the DHT and gossip
// neither serve nor ask anybody but members.
type membersOnly struct {
	host.Host
	gate *gate
}

func (h membersOnly) SetStreamHandler(id protocol.ID, serve network.StreamHandler) {
	h.Host.SetStreamHandler(id, h.guard(serve))
}

func (h membersOnly) SetStreamHandlerMatch(id protocol.ID, match func(protocol.ID) bool, serve network.StreamHandler) {
	h.Host.SetStreamHandlerMatch(id, match, h.guard(serve))
}

func (h membersOnly) guard(serve network.StreamHandler) network.StreamHandler {
	return func(s network.Stream) {
		if err := h.gate.wait(h.gate.ctx, s.Conn().RemotePeer()); err != nil {
			_ = s.Reset()
			return
		}
		serve(s)
	}
}

func (h membersOnly) NewStream(ctx context.Context, p peer.ID, ids ...protocol.ID) (network.Stream, error) {
	if err := h.gate.wait(ctx, p); err != nil {
		return nil, err
	}
	return h.Host.NewStream(ctx, p, ids...)
}
