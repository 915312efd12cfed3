package p2p

import (
	"context"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// startFixed starts the host with the fixed key of seed.
func startFixed(t *testing.T, seed byte, bootstrap []string, change func(*HostOptions)) *Host {
	t.Helper()
	o := HostOptions{
		Dir: t.TempDir(), Key: fixed(seed), Certificate: fixedCertificate(t, fixed(seed)), Bootstrap: bootstrap,
		Listen:            []string{"/ip4/127.0.0.1/tcp/0"},
		HeartbeatInterval: 50 * time.Millisecond, SuspectAfter: 2 * time.Second, DialTimeout: time.Second,
	}
	change(&o)
	h, err := NewHost(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("did not happen: " + what)
		}
	}
}

// TestRecoveryMember: the pool keeps the certificate of a member that only
// the recovery words can be, and gives it to whoever has its key.
func TestRecoveryMember(t *testing.T) {
	certificate, err := Join(fixedTicket(time.Time{}), fixed(7), RoleRecovery)
	if err != nil {
		t.Fatal(err)
	}
	sponsored, err := Sponsor(certificate, fixed(7))
	if err != nil {
		t.Fatal(err)
	}
	a := startFixed(t, 3, nil, func(o *HostOptions) { o.Sponsored = []*wire.Member{sponsored} })
	b := startFixed(t, 4, a.Addrs(), func(*HostOptions) {})
	eventually(t, "the other host knows the recovery member", func() bool {
		return b.table.get(placement.NodeID(certificate.Peer)) != nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got, err := FetchCertificate(ctx, fixed(7), b.Addrs())
	if err != nil {
		t.Fatal(err)
	}
	if got.Peer != certificate.Peer || Role(got.Role) != RoleRecovery {
		t.Fatalf("got %v", got)
	}
	for name, seed := range map[string]byte{"a stranger": 8, "a node": 3} {
		if got, err := FetchCertificate(ctx, fixed(seed), b.Addrs()); err == nil {
			t.Errorf("%s got %v", name, got)
		}
	}
	recovered := startFixed(t, 7, b.Addrs(), func(o *HostOptions) { o.Certificate = got })
	if err := recovered.WaitMembers(ctx, 2); err != nil {
		t.Fatal(err)
	}
}

func FuzzRecoveryCertificate(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0x0a, 1, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseRecoveryCertificate(b, "x"); err == nil {
			t.Fatalf("taken: %v", c)
		}
	})
}

// TestLostAddressIsFoundByDHT: two members that have each other's address
// wrong meet again through a third.
func TestLostAddressIsFoundByDHT(t *testing.T) {
	a := startFixed(t, 3, nil, func(*HostOptions) {})
	b := startFixed(t, 4, a.Addrs(), func(*HostOptions) {})
	c := startFixed(t, 5, a.Addrs(), func(*HostOptions) {})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, h := range []*Host{a, b, c} {
		if err := h.WaitMembers(ctx, 2); err != nil {
			t.Fatal(err)
		}
	}
	wrong := fixedAddrs(t, "/ip4/127.0.0.1/tcp/1")
	forget := func(h, other *Host) {
		m := h.table.get(other.id)
		h.table.mu.Lock()
		said := *m.said
		said.addrs = wrong
		m.said = &said
		h.table.mu.Unlock()
		h.net.Peerstore().ClearAddrs(other.net.ID())
	}
	forget(b, c)
	forget(c, b)
	if err := b.net.Network().ClosePeer(c.net.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "they are connected again", func() bool {
		return b.net.Network().Connectedness(c.net.ID()) == network.Connected
	})
	if _, err := b.Nonce(ctx, c.id); err != nil {
		t.Fatal(err)
	}
}
