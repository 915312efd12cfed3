package p2p

import "github.com/libp2p/go-libp2p"

// Simulate replaces a host's sockets.
func (o *HostOptions) Simulate(network ...libp2p.Option) { o.network = network }

// Disconnect closes all connections of a host.
func (h *Host) Disconnect() {
	for _, p := range h.net.Network().Peers() {
		_ = h.net.Network().ClosePeer(p)
	}
}
