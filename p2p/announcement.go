package p2p

import (
	"cmp"
	"crypto/ed25519"
	"fmt"
	"net/netip"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	memberDomain       = "defs member v1"
	memberAddrsMax     = 32
	memberAddrBytesMax = 256
	nameBytesMax       = 64 // of host and zone
	announcementMax    = 16 << 10
)

// announcement is a member's own signed word about itself, verified.
type announcement struct {
	id     placement.NodeID
	peerID peer.ID
	addrs  []multiaddr.Multiaddr
	wire   *wire.Member // never changed
}

// signAnnouncement fills in m.Signature.
func signAnnouncement(m *wire.Member, key ed25519.PrivateKey) error {
	b, err := announcementBytes(m)
	if err != nil {
		return err
	}
	m.Signature = ed25519.Sign(key, b)
	return nil
}

// announcementBytes is what a member signs: domain ‖ the message, encoded with
// fields in ascending order, seen and signature left out.
func announcementBytes(m *wire.Member) ([]byte, error) {
	c := proto.CloneOf(m)
	c.Seen, c.Signature = 0, nil
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte(memberDomain), c)
	if err != nil {
		return nil, fmt.Errorf("encode announcement: %w", err)
	}
	return b, nil
}

// verifyAnnouncement checks bounds, certificate and signature. It keeps m.
func verifyAnnouncement(m *wire.Member, pool PoolID, now time.Time) (*announcement, error) {
	if m == nil {
		return nil, fmt.Errorf("%w: announcement is missing", ErrNotAdmitted)
	}
	if size := proto.Size(m); size > announcementMax {
		return nil, fmt.Errorf("%w: announcement of %d bytes, at most %d", ErrTooLarge, size, announcementMax)
	}
	id, err := VerifyCertificate(m.Certificate, pool, now)
	if err != nil {
		return nil, err
	}
	if len(m.Addrs) > memberAddrsMax || len(m.Host) > nameBytesMax || len(m.Zone) > nameBytesMax {
		return nil, fmt.Errorf("announcement of %s: too many addresses or too long a name", id)
	}
	m.Seen = 0 // a reporter's word, not the member's
	a := &announcement{id: id, wire: m}
	if a.peerID, err = peer.Decode(string(id)); err != nil {
		return nil, fmt.Errorf("announcement of %s: %w", id, err)
	}
	pub, err := a.peerID.ExtractPublicKey()
	if err != nil {
		return nil, fmt.Errorf("announcement of %s: %w", id, err)
	}
	raw, err := pub.Raw()
	if err != nil || len(raw) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("announcement of %s: its key is not Ed25519", id)
	}
	signed, err := announcementBytes(m)
	if err != nil {
		return nil, err
	}
	if !ed25519.Verify(raw, signed, m.Signature) {
		return nil, fmt.Errorf("announcement of %s: wrong signature", id)
	}
	for _, text := range m.Addrs {
		if len(text) > memberAddrBytesMax {
			return nil, fmt.Errorf("announcement of %s: an address of %d bytes", id, len(text))
		}
		if addr, err := multiaddr.NewMultiaddr(text); err == nil { // kinds unknown here are no use, but no fault
			a.addrs = append(a.addrs, addr)
		}
	}
	return a, nil
}

// subnetOf names the network of the first address that has an IP: /24 or /48.
func subnetOf(addrs []multiaddr.Multiaddr) string {
	var loopback string
	for _, a := range addrs {
		ip, err := manet.ToIP(a)
		if err != nil {
			continue
		}
		addr, ok := netip.AddrFromSlice(ip)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		bits := 48
		if addr.Is4() {
			bits = 24
		}
		subnet := netip.PrefixFrom(addr, bits).Masked().String()
		if !addr.IsLoopback() {
			return subnet
		}
		loopback = cmp.Or(loopback, subnet)
	}
	return loopback
}

// parsePeerAddr splits a multiaddr that ends in /p2p/ID.
func parsePeerAddr(text string) (peer.AddrInfo, error) {
	info, err := peer.AddrInfoFromString(text)
	if err != nil {
		return peer.AddrInfo{}, fmt.Errorf("address %q: %w", text, err)
	}
	if len(info.Addrs) == 0 {
		return peer.AddrInfo{}, fmt.Errorf("address %q: want an address before /p2p/ID", text)
	}
	return *info, nil
}
