package p2p

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/libp2p/go-libp2p/x/rate"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const (
	connsPerPeerMax    = 16
	connsPerIPMax      = 256 // many nodes may run on one machine
	newConnsPerSecond  = 32  // of one IP
	streamsPerPeerMax  = 768 // all protocols
	requestStreamsMax  = 256 // of one peer and direction: its calls at once, and those that rest in its pool
	connsHigh          = membersMax
	connsLow           = membersMax * 3 / 4
	quicDelay          = 250 * time.Millisecond // behind TCP: half the CPU per byte on a LAN
	quicDelayNear      = 2 * time.Second        // to a private address, where TCP fails at once or works
	relayDelay         = 750 * time.Millisecond
	streamWindowBytes  = 1 << 20 // at first; yamux grows it up to 16 MiB
	relayBytesMax      = 1 << 30
	relayCircuitsMax   = 128
	relayDuration      = time.Hour
	allowLimitedReason = "defs requests may pass a relay"
)

// newNetwork builds the libp2p host, listening on nothing yet.
func newNetwork(o HostOptions, gate *gate) (host.Host, error) {
	key, err := crypto.UnmarshalEd25519PrivateKey(o.Key)
	if err != nil {
		return nil, fmt.Errorf("peer key: %w", err)
	}
	resources, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(resourceLimits()), resourceOptions()...)
	if err != nil {
		return nil, fmt.Errorf("resource manager: %w", err)
	}
	conns, err := connmgr.NewConnManager(connsLow, connsHigh)
	if err != nil {
		return nil, fmt.Errorf("connection manager: %w", err)
	}
	mux := *yamux.DefaultTransport
	mux.InitialStreamWindowSize = streamWindowBytes
	mux.MaxMessageSize = muxerMessageBytes
	options := []libp2p.Option{
		libp2p.Identity(key),
		libp2p.NoListenAddrs,
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Transport(libp2pquic.NewTransport),
		libp2p.Security(libp2ptls.ID, newCoalescingTLS),
		libp2p.Muxer(yamux.ID, &mux),
		libp2p.ResourceManager(resources),
		libp2p.ConnectionManager(conns),
		libp2p.ConnectionGater(gate),
		libp2p.WithDialTimeout(o.DialTimeout),
		libp2p.SwarmOpts(swarm.WithDialTimeoutLocal(o.DialTimeout), swarm.WithDialRanker(rankTCPFirst)),
		libp2p.DisableMetrics(), // they go to a registry shared by the whole process
		libp2p.Ping(false),
		libp2p.UserAgent("defs"),
		libp2p.EnableRelay(),
	}
	if slices.ContainsFunc(o.Listen, beyondLoopback) {
		options = append(options,
			libp2p.NATPortMap(),
			libp2p.EnableAutoNATv2(),
			libp2p.EnableHolePunching(),
			libp2p.EnableAutoRelayWithPeerSource(gate.relays),
			libp2p.EnableRelayService(relay.WithACL(gate), relay.WithResources(relayResources())),
		)
	} else {
		options = append(options, libp2p.DisableIdentifyAddressDiscovery())
	}
	h, err := libp2p.New(append(options, o.network...)...)
	if err != nil {
		return nil, fmt.Errorf("libp2p: %w", err)
	}
	return h, nil
}

// resourceLimits replaces libp2p's defaults, of which 75 streams and 8
// connections of one peer stop a loaded storage node. Memory is bounded by the
// host's own limits on bodies.
func resourceLimits() rcmgr.ConcreteLimitConfig {
	streams := rcmgr.ResourceLimits{
		Streams: streamsPerPeerMax, StreamsInbound: streamsPerPeerMax, StreamsOutbound: streamsPerPeerMax,
		Conns: connsPerPeerMax, ConnsInbound: connsPerPeerMax, ConnsOutbound: connsPerPeerMax,
		FD: connsPerPeerMax, Memory: rcmgr.Unlimited64,
	}
	requests := streams
	requests.Streams, requests.StreamsInbound, requests.StreamsOutbound = 2*requestStreamsMax, requestStreamsMax, requestStreamsMax
	all := rcmgr.ResourceLimits{
		Streams: rcmgr.Unlimited, StreamsInbound: rcmgr.Unlimited, StreamsOutbound: rcmgr.Unlimited,
		Conns: 2 * connsHigh, ConnsInbound: 2 * connsHigh, ConnsOutbound: 2 * connsHigh,
		FD: 2 * connsHigh, Memory: rcmgr.Unlimited64,
	}
	// Streams that have not named their protocol yet: no few peers may take all.
	const unnamed = strangersMax * streamsPerPeerMax
	transient := rcmgr.ResourceLimits{
		Streams: unnamed, StreamsInbound: unnamed, StreamsOutbound: unnamed,
		Conns: 512, ConnsInbound: 512, ConnsOutbound: 512, FD: 512, Memory: 256 << 20,
	}
	return rcmgr.PartialLimitConfig{
		System:              all,
		Transient:           transient,
		ServiceDefault:      all,
		ServicePeerDefault:  streams,
		ProtocolDefault:     all,
		ProtocolPeerDefault: streams,
		ProtocolPeer:        map[protocol.ID]rcmgr.ResourceLimits{requestProtocol: requests},
		PeerDefault:         streams,
		Conn:                rcmgr.ResourceLimits{Conns: 1, ConnsInbound: 1, ConnsOutbound: 1, FD: 1, Memory: rcmgr.Unlimited64},
		Stream:              rcmgr.ResourceLimits{Streams: 1, StreamsInbound: 1, StreamsOutbound: 1, Memory: rcmgr.Unlimited64},
	}.Build(rcmgr.DefaultLimits.AutoScale())
}

func resourceOptions() []rcmgr.Option {
	loopback4, loopback6 := netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")
	perIP := rate.Limit{RPS: newConnsPerSecond, Burst: connsPerIPMax}
	return []rcmgr.Option{
		rcmgr.WithMetricsDisabled(),
		rcmgr.WithNetworkPrefixLimit(
			[]rcmgr.NetworkPrefixLimit{{Network: loopback4, ConnCount: math.MaxInt}},
			[]rcmgr.NetworkPrefixLimit{{Network: loopback6, ConnCount: math.MaxInt}}),
		rcmgr.WithLimitPerSubnet(
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: connsPerIPMax}},
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 56, ConnCount: connsPerIPMax}}),
		rcmgr.WithConnRateLimiters(&rate.Limiter{
			NetworkPrefixLimits: []rate.PrefixLimit{{Prefix: loopback4}, {Prefix: loopback6}},
			SubnetRateLimiter: rate.SubnetLimiter{
				IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: 32, Limit: perIP}},
				IPv6SubnetLimits: []rate.SubnetLimit{{PrefixLength: 56, Limit: perIP}},
				GracePeriod:      time.Minute,
			},
		}),
	}
}

// relayResources lets shards pass; the defaults end a circuit at 128 KiB.
func relayResources() relay.Resources {
	r := relay.DefaultResources()
	r.Limit = &relay.RelayLimit{Duration: relayDuration, Data: relayBytesMax}
	r.MaxCircuits = relayCircuitsMax
	r.BufferSize = 64 << 10
	return r
}

// rankTCPFirst dials TCP at once, QUIC after quicDelay, relays last. What wins
// stays for the life of the connection, and a busy machine may take longer than
// quicDelay to answer TCP: its neighbours wait quicDelayNear.
func rankTCPFirst(addrs []multiaddr.Multiaddr) []network.AddrDelay {
	ranked := make([]network.AddrDelay, 0, len(addrs))
	var quic, near, relayed time.Duration
	for _, a := range addrs {
		if isProtocol(a, multiaddr.P_CIRCUIT) {
			continue
		}
		relayed = relayDelay
		if isProtocol(a, multiaddr.P_TCP) {
			quic, near = quicDelay, quicDelayNear
		}
	}
	for _, a := range addrs {
		var delay time.Duration
		switch {
		case isProtocol(a, multiaddr.P_CIRCUIT):
			delay = relayed
		case !isProtocol(a, multiaddr.P_TCP) && manet.IsPrivateAddr(a):
			delay = near
		case !isProtocol(a, multiaddr.P_TCP):
			delay = quic
		}
		ranked = append(ranked, network.AddrDelay{Addr: a, Delay: delay})
	}
	slices.SortStableFunc(ranked, func(a, b network.AddrDelay) int { return int(a.Delay - b.Delay) })
	return ranked
}

func isProtocol(a multiaddr.Multiaddr, code int) bool {
	_, err := a.ValueForProtocol(code)
	return err == nil
}

func beyondLoopback(listen string) bool {
	a, err := multiaddr.NewMultiaddr(listen)
	return err == nil && !manet.IsIPLoopback(a)
}

// listen binds each address of o.Listen. One with port 0 tries the port it had
// in the last run first, so that what others remember stays true.
func listen(h host.Host, addrs, last []string) (bound []string, err error) {
	for i, text := range addrs {
		tries := []string{text}
		if len(last) == len(addrs) && hasPortZero(text) && samePlace(text, last[i]) {
			tries = []string{last[i], text}
		}
		got := ""
		for _, try := range tries {
			before := h.Network().ListenAddresses()
			a, perr := multiaddr.NewMultiaddr(try)
			if perr != nil {
				return nil, fmt.Errorf("listen on %s: %w", try, perr)
			}
			if err = h.Network().Listen(a); err != nil {
				continue
			}
			for _, now := range h.Network().ListenAddresses() {
				if !slices.ContainsFunc(before, now.Equal) {
					got = now.String()
				}
			}
			break
		}
		bound = append(bound, got)
	}
	if !slices.ContainsFunc(bound, func(a string) bool { return a != "" }) {
		return nil, fmt.Errorf("listen: no address of %s is free: %w", strings.Join(addrs, ", "), err)
	}
	return bound, nil
}

func hasPortZero(listen string) bool {
	return strings.Contains(listen+"/", "/tcp/0/") || strings.Contains(listen+"/", "/udp/0/")
}

// samePlace says whether two listen addresses differ at most in their port.
func samePlace(a, b string) bool {
	x, y := strings.Split(a, "/"), strings.Split(b, "/")
	if len(x) != len(y) {
		return false
	}
	for i := range x {
		if x[i] != y[i] && (i == 0 || x[i-1] != "tcp" && x[i-1] != "udp") {
			return false
		}
	}
	return true
}

// relays offers admitted nodes to which this host is connected, for the case
// that it cannot be reached directly.
func (g *gate) relays(ctx context.Context, count int) <-chan peer.AddrInfo {
	out := make(chan peer.AddrInfo, count)
	defer close(out)
	for _, m := range g.table.all() {
		if len(out) == count {
			break
		}
		g.table.mu.Lock()
		info, alive := peer.AddrInfo{ID: m.said.peerID, Addrs: m.said.addrs}, g.table.state(m, time.Now()) == Alive
		node := Role(m.said.wire.Certificate.Role) == RoleNode
		g.table.mu.Unlock()
		if alive && node {
			out <- info
		}
	}
	return out
}
