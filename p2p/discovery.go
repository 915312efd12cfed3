package p2p

import (
	"context"
	"fmt"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
)

// discovery finds members whose known addresses do not answer, by Kademlia
// among the members. It holds no records: heads and indexes have keepers.
type discovery struct {
	dht *dht.IpfsDHT
}

func newDiscovery(h membersOnly) (*discovery, error) {
	d, err := dht.New(h,
		dht.Mode(dht.ModeServer),
		dht.ProtocolPrefix("/defs"),
		dht.DisableProviders(),
		dht.DisableValues(),
		dht.RoutingTableFilter(func(_ any, p peer.ID) bool { return h.gate.admitted(p) }),
		dht.QueryFilter(func(_ any, info peer.AddrInfo) bool { return h.gate.admitted(info.ID) }),
	)
	if err != nil {
		return nil, fmt.Errorf("dht: %w", err)
	}
	return &discovery{d}, nil
}

// add puts a member that has just been admitted into the routing table; when
// it connected it was still a stranger.
func (d *discovery) add(p peer.ID) { _, _ = d.dht.RoutingTable().TryAddPeer(p, true, true) }

// find returns where p is, as other members know it.
func (d *discovery) find(ctx context.Context, p peer.ID) (peer.AddrInfo, error) {
	if d.dht.RoutingTable().Size() == 0 {
		return peer.AddrInfo{}, fmt.Errorf("%w: nobody to ask for its address", ErrUnreachable)
	}
	info, err := d.dht.FindPeer(ctx, p)
	if err != nil {
		return peer.AddrInfo{}, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return info, nil
}

func (d *discovery) close() error { return d.dht.Close() }

var _ host.Host = membersOnly{}
