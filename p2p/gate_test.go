package p2p

import (
	"bufio"
	"context"
	"crypto/rand"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"

	"github.com/defs-fs/defs/p2p/wire"
)

// guarded starts a host of the fixed pool and a bare libp2p host that is
// connected to it and has said no Hello.
func guarded(t *testing.T) (*Host, host.Host) {
	t.Helper()
	h, err := NewHost(t.Context(), HostOptions{
		Dir: t.TempDir(), Key: fixed(3), Certificate: fixedCertificate(t, fixed(3)),
		Listen: []string{"/ip4/127.0.0.1/tcp/0"}, DialTimeout: 300 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	bare, err := libp2p.New(libp2p.NoListenAddrs, libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(libp2ptls.ID, libp2ptls.New), libp2p.DisableMetrics())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = bare.Close() })
	info, err := parsePeerAddr(h.Addrs()[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := bare.Connect(t.Context(), info); err != nil {
		t.Fatal(err)
	}
	return h, bare
}

func ask(t *testing.T, h *Host, bare host.Host, req *wire.Request) (*wire.Reply, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, err := bare.NewStream(ctx, h.net.ID(), requestProtocol)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Reset() }()
	_ = s.SetDeadline(time.Now().Add(10 * time.Second))
	if err := writeFrame(s, req, nil, nothing); err != nil {
		return nil, err
	}
	rep := new(wire.Reply)
	return rep, readMessage(bufio.NewReader(s), rep, MessageBytesMax)
}

// TestStrangerIsNotServed: who has shown no certificate gets no answer but
// "denied", on no protocol, and is cut off.
func TestStrangerIsNotServed(t *testing.T) {
	h, bare := guarded(t)
	h.Handle(func(context.Context, Peer, *wire.Request, []byte) (*wire.Reply, []byte, error) {
		t.Error("the handler ran for a stranger")
		return nil, nil, nil
	})
	session := make([]byte, sessionBytes)
	_, _ = rand.Read(session)
	forged := fixedAnnouncement(t, 4, func(*wire.Member) {})
	for name, req := range map[string]*wire.Request{
		"request":         {Version: 1, Op: &wire.Request_GetShard{GetShard: &wire.GetShard{}}},
		"member list":     {Version: 1, Op: &wire.Request_Members{Members: &wire.Members{}}},
		"heartbeat":       {Version: 1, Op: &wire.Request_Heartbeat{Heartbeat: &wire.Heartbeat{}}},
		"empty hello":     {Version: 1, Op: &wire.Request_Hello{Hello: &wire.Hello{Session: session}}},
		"another's hello": {Version: 1, Op: &wire.Request_Hello{Hello: &wire.Hello{Session: session, Self: forged}}},
	} {
		rep, err := ask(t, h, bare, req)
		if err != nil || rep.Status != wire.Status_STATUS_DENIED {
			t.Errorf("%s: %v, %v", name, rep, err)
		}
		if len(rep.GetMembers().GetMembers()) > 0 || rep.GetHello() != nil {
			t.Errorf("%s: told %v", name, rep)
		}
	}
	large := &wire.Request{Version: 1, Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: &wire.Head{Sealed: make([]byte, strangerMessageMax)}}}}
	if rep, err := ask(t, h, bare, large); err == nil {
		t.Errorf("a large message of a stranger was answered: %v", rep)
	}
	for _, id := range []protocol.ID{"/defs/kad/1.0.0", "/meshsub/1.2.0"} {
		s, err := bare.NewStream(t.Context(), h.net.ID(), id)
		if err != nil {
			continue // already cut off
		}
		_ = s.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = s.Write([]byte{0})
		if n, err := s.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: %d bytes came", id, n)
		}
	}
	h.gate.closeStrangers(time.Now().Add(h.gate.patience))
	for end := time.Now().Add(10 * time.Second); bare.Network().Connectedness(h.net.ID()) == network.Connected; {
		if time.Now().After(end) {
			t.Fatal("the stranger is still connected")
		}
		time.Sleep(time.Millisecond)
	}
	if len(h.Members()) != 0 {
		t.Errorf("members %v", h.Members())
	}
}

// TestOldVersionIsRefused: requests of another version get a clear answer.
func TestOldVersionIsRefused(t *testing.T) {
	h, bare := guarded(t)
	rep, err := ask(t, h, bare, &wire.Request{Version: 9, Op: &wire.Request_GetShard{GetShard: &wire.GetShard{}}})
	if err != nil || rep.Status != wire.Status_STATUS_INVALID {
		t.Errorf("%v, %v", rep, err)
	}
}

func TestTCPIsDialledFirst(t *testing.T) {
	addrs := fixedAddrs(t,
		"/ip4/192.0.2.1/udp/1/quic-v1",
		"/ip4/192.0.2.9/tcp/9/p2p/12D3KooWRndVhVZPCiQwHBBBdg769GyrPUW13zxwqQyf9r3ANaba/p2p-circuit",
		"/ip4/192.0.2.1/tcp/1")
	ranked := rankTCPFirst(addrs)
	if !ranked[0].Addr.Equal(addrs[2]) || ranked[0].Delay != 0 || !ranked[1].Addr.Equal(addrs[0]) || ranked[1].Delay != quicDelay || ranked[2].Delay != relayDelay {
		t.Errorf("ranked %v", ranked)
	}
	if near := rankTCPFirst(fixedAddrs(t, "/ip4/127.0.0.1/udp/1/quic-v1", "/ip4/127.0.0.1/tcp/1")); near[1].Delay != quicDelayNear {
		t.Errorf("ranked %v", near)
	}
	if alone := rankTCPFirst(addrs[:1]); alone[0].Delay != 0 {
		t.Errorf("QUIC alone waits %s", alone[0].Delay)
	}
	if alone := rankTCPFirst(addrs[1:2]); alone[0].Delay != 0 {
		t.Errorf("a relay alone waits %s", alone[0].Delay)
	}
}

// TestTableTakesOnlyNews: what is older than known changes nothing; ends of
// certificates end memberships.
func TestTableTakesOnlyNews(t *testing.T) {
	h, _ := guarded(t)
	now := time.Now()
	learn := func(sequence uint64, zone string) {
		t.Helper()
		m := fixedAnnouncement(t, 5, func(m *wire.Member) { m.Sequence, m.Zone = sequence, zone })
		if _, err := h.table.learn(m, now); err != nil {
			t.Fatal(err)
		}
	}
	learn(5, "five")
	learn(4, "four")
	learn(5, "other five")
	if got := h.Members(); len(got) != 1 || got[0].Zone != "five" {
		t.Fatalf("got %+v", got)
	}
	learn(6, "six")
	if got := h.Members(); got[0].Zone != "six" {
		t.Fatalf("got %+v", got)
	}
	if m, err := h.table.learn(h.self(), now); m != nil || err != nil {
		t.Fatalf("itself: %v, %v", m, err)
	}

	end := now.Add(time.Hour).Truncate(time.Second)
	cert, err := Join(fixedTicket(end), fixed(6), RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	guest := fixedAnnouncement(t, 6, func(m *wire.Member) { m.Certificate = cert })
	if _, err := h.table.learn(guest, now); err != nil {
		t.Fatal(err)
	}
	if gone := h.table.expire(end); len(gone) != 1 || string(gone[0].id) != cert.Peer || len(h.Members()) != 1 {
		t.Fatalf("%d memberships ended", len(gone))
	}
}

func TestStates(t *testing.T) {
	table := &memberTable{suspectAfter: time.Minute, deadAfter: time.Hour}
	start := time.Unix(1_000_000, 0)
	m := &member{since: start}
	for _, c := range []struct {
		name   string
		change func()
		at     time.Duration
		want   State
	}{
		{"just learned", func() {}, 0, Alive},
		{"never heard", func() {}, time.Minute, Suspect},
		{"never heard for long", func() {}, time.Hour, Dead},
		{"heard", func() { m.heard, m.seen = true, start.Add(time.Hour) }, time.Hour, Alive},
		{"silent", func() {}, time.Hour + time.Minute, Suspect},
		{"dial failed", func() { m.unreachable = true }, time.Hour + time.Second, Suspect},
		{"gone", func() {}, 2 * time.Hour, Dead},
		{"this host was stopped", func() { m.since, m.unreachable = start.Add(2*time.Hour), false }, 2 * time.Hour, Alive},
	} {
		c.change()
		if got := table.state(m, start.Add(c.at)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestSmoothedRTT(t *testing.T) {
	table := &memberTable{}
	m := &member{}
	table.measured(m, 80*time.Millisecond)
	table.measured(m, 160*time.Millisecond)
	if m.rtt != 90*time.Millisecond {
		t.Errorf("smoothed to %s", m.rtt)
	}
}
