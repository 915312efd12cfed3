package p2p

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/multiformats/go-multiaddr"
)

// TestNeighboursTalkOverTCP: addresses of QUIC come first in a ticket, and a
// connection over QUIC comes in beside one over TCP.
func TestNeighboursTalkOverTCP(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	start := func(seed byte, bootstrap []string) *Host {
		h, err := NewHost(ctx, HostOptions{
			Dir: t.TempDir(), Key: fixed(seed), Certificate: fixedCertificate(t, fixed(seed)), Bootstrap: bootstrap,
			Listen: []string{"/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = h.Close() })
		return h
	}
	a := start(3, nil)
	var quic, tcp []string
	for _, addr := range a.Addrs() {
		if parsed := multiaddr.StringCast(addr); isProtocol(parsed, multiaddr.P_TCP) {
			tcp = append(tcp, addr)
		} else {
			quic = append(quic, addr)
		}
	}
	var b *Host
	for seed := byte(4); seed < 12; seed++ { // which address wins is a race, where there is one
		b = start(seed, append(slices.Clone(quic), tcp...))
		if err := b.WaitMembers(ctx, 1); err != nil {
			t.Fatal(err)
		}
		for _, c := range b.net.Network().ConnsToPeer(a.net.ID()) {
			if !isProtocol(c.RemoteMultiaddr(), multiaddr.P_TCP) {
				t.Errorf("connected over %s", c.RemoteMultiaddr())
			}
		}
	}

	info, err := parsePeerAddr(quic[0])
	if err != nil {
		t.Fatal(err)
	}
	second, err := b.net.Network().(*swarm.Swarm).TransportForDialing(info.Addrs[0]).Dial(network.WithForceDirectDial(ctx, "test"), info.Addrs[0], info.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := second.AcceptStream(); err == nil || ctx.Err() != nil {
		t.Errorf("the second connection stays: %v, %v", err, ctx.Err())
	}
}
