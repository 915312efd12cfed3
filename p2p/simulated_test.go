package p2p_test

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	"github.com/marcopolo/simnet"
	"github.com/quic-go/quic-go"
	"go.uber.org/fx"

	"github.com/defs-fs/defs/node"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/shardstore"
)

// simulation is a network of real nodes and devices in which time and links are
// simulated. All of it lives in a synctest bubble: time passes when everybody
// waits.
type simulation struct {
	t      *testing.T
	net    *simnet.Simnet
	oneWay time.Duration
	ticket p2p.Ticket

	heartbeat, deadAfter time.Duration // default those of the host
	nodes                node.Options
	members              []*simulated

	mu     sync.Mutex
	delays map[string]time.Duration // of packets from and to an address; guarded by mu

	packets, bytes atomic.Int64 // sent
	lost, slowed   atomic.Int64 // of the packets, by a fault
}

// simulated is one member.
type simulated struct {
	*p2p.Host
	addr    string // as in the network
	liar    *liar
	store   *shardstore.Store
	stop    func()
	crashed bool
}

const (
	simulatedBps = 100_000_000
	never        = 10000 * time.Hour // a packet that is lost
)

func newSimulation(t *testing.T, oneWay time.Duration) *simulation {
	s := &simulation{t: t, oneWay: oneWay, delays: map[string]time.Duration{}}
	s.net = &simnet.Simnet{LatencyFunc: func(p *simnet.Packet) time.Duration {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.delays) == 0 {
			return s.oneWay
		}
		delay := max(s.oneWay, s.delays[p.From.String()], s.delays[p.To.String()])
		switch {
		case delay == never:
			s.lost.Add(1)
		case delay > s.oneWay:
			s.slowed.Add(1)
		}
		return delay
	}, Logger: testLogger()}
	s.net.Start()
	key, err := p2p.NewPool()
	if err != nil {
		t.Fatal(err)
	}
	if s.ticket, err = key.Ticket(time.Time{}, nil); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *simulation) close() {
	var wg sync.WaitGroup
	for _, m := range s.members {
		if !m.crashed {
			wg.Go(m.stop)
		}
	}
	wg.Wait()
	s.net.Close()
}

// metered counts what a member sends.
type metered struct {
	net.PacketConn
	s *simulation
}

func (m *metered) WriteTo(b []byte, to net.Addr) (int, error) {
	m.s.packets.Add(1)
	m.s.bytes.Add(int64(len(b)))
	return m.PacketConn.WriteTo(b, to)
}

type sourceIP struct{ ip net.IP }

func (s *sourceIP) PreferredSourceIPForDestination(*net.UDPAddr) (net.IP, error) { return s.ip, nil }

// sockets is what x/simlibp2p of go-libp2p has as QUICSimnet, with a meter.
func (s *simulation) sockets(ip net.IP) libp2p.Option {
	link := simnet.LinkSettings{BitsPerSecond: simulatedBps}
	return libp2p.QUICReuse(
		func(l fx.Lifecycle, reset quic.StatelessResetKey, token quic.TokenGeneratorKey, o ...quicreuse.Option) (*quicreuse.ConnManager, error) {
			cm, err := quicreuse.NewConnManager(reset, token, o...)
			if err == nil {
				l.Append(fx.StopHook(cm.Close))
			}
			return cm, err
		},
		quicreuse.OverrideSourceIPSelector(func() (quicreuse.SourceIPSelector, error) { return &sourceIP{ip}, nil }),
		quicreuse.OverrideListenUDP(func(_ string, addr *net.UDPAddr) (net.PacketConn, error) {
			return &metered{s.net.NewEndpoint(addr, simnet.NodeBiDiLinkSettings{Downlink: link, Uplink: link}), s}, nil
		}),
	)
}

// add starts a member: a node with its store, or a device.
func (s *simulation) add(role p2p.Role) *simulated {
	s.t.Helper()
	number := len(s.members) + 1
	var seed [ed25519.SeedSize]byte
	binary.BigEndian.PutUint32(seed[:], uint32(number))
	key := ed25519.NewKeyFromSeed(seed[:])
	cert, err := p2p.Join(s.ticket, key, role)
	s.ok(err)
	// Loopback addresses, so that no host looks for a router on the real network.
	ip := net.IPv4(127, 1, byte(number/200), byte(number%200+1)).To4()
	dir := s.t.TempDir()
	o := p2p.HostOptions{
		Dir: dir, Key: key, Certificate: cert, Host: fmt.Sprint("host-", number),
		Listen: []string{fmt.Sprintf("/ip4/%s/udp/8000/quic-v1", ip)}, Logger: testLogger(),
	}
	if number > 1 {
		for _, m := range s.members {
			if !m.crashed && len(o.Bootstrap) < 3 {
				o.Bootstrap = append(o.Bootstrap, m.Addrs()...)
			}
		}
	}
	if s.heartbeat > 0 {
		o.HeartbeatInterval, o.SuspectAfter, o.DeadAfter = s.heartbeat, 3*s.heartbeat, s.deadAfter
	}
	o.Simulate(s.sockets(ip))
	h, err := p2p.NewHost(s.t.Context(), o)
	s.ok(err)
	m := &simulated{Host: h, addr: (&net.UDPAddr{IP: ip, Port: 8000}).String(), liar: &liar{Transport: h}}
	m.stop = func() { _ = h.Close() }
	s.members = append(s.members, m)
	if role != p2p.RoleNode {
		return m
	}
	m.store, err = shardstore.Open(shardstore.Options{
		Dir: filepath.Join(dir, "store"), CapacityBytes: 1 << 30, IndexCacheBytes: 1 << 20, Logger: testLogger(),
	})
	s.ok(err)
	no := s.nodes
	no.Store, no.Transport, no.Logger = m.store, m.liar, testLogger()
	n, err := node.New(no)
	s.ok(err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = n.Run(ctx) })
	m.stop = func() {
		cancel()
		wg.Wait()
		_ = h.Close()
		_ = n.Close()
		_ = m.store.Close()
	}
	return m
}

func (s *simulation) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// pool starts so many nodes and a device, and waits until all know all.
func (s *simulation) pool(nodes int) *simulated {
	s.t.Helper()
	for range nodes {
		s.add(p2p.RoleNode)
	}
	device := s.add(p2p.RoleDevice)
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Minute)
	defer cancel()
	for _, m := range s.members {
		s.ok(m.WaitMembers(ctx, nodes))
	}
	return device
}

func pseudoRandom(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 50)) }

// realNow is the time outside of the bubble.
func realNow() time.Time {
	var now syscall.Timeval
	_ = syscall.Gettimeofday(&now)
	return time.Unix(now.Unix())
}
