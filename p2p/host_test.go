package p2p_test

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/transporttest"
	"github.com/defs-fs/defs/placement"
)

// testPool makes hosts of one pool on loopback.
type testPool struct {
	t         testing.TB
	ticket    p2p.Ticket
	bootstrap []string
	dirs      map[placement.NodeID]string // of the hosts started
}

func newTestPool(t testing.TB) *testPool {
	key, err := p2p.NewPool()
	if err != nil {
		t.Fatal(err)
	}
	ticket, err := key.Ticket(time.Time{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &testPool{t: t, ticket: ticket, dirs: make(map[placement.NodeID]string)}
}

func (p *testPool) options(dir string) p2p.HostOptions {
	key, err := p2p.LoadOrCreateKey(filepath.Join(dir, "peer.key"))
	if err != nil {
		p.t.Fatal(err)
	}
	cert, err := p2p.Join(p.ticket, key, p2p.RoleNode)
	if err != nil {
		p.t.Fatal(err)
	}
	return p2p.HostOptions{
		Dir: dir, Key: key, Certificate: cert, Bootstrap: p.bootstrap,
		Listen:            []string{"/ip4/127.0.0.1/tcp/0"},
		HeartbeatInterval: 50 * time.Millisecond,
		SuspectAfter:      2 * time.Second,
		DeadAfter:         time.Hour,
		DialTimeout:       2 * time.Second,
		Logger:            testLogger(),
	}
}

func testLogger() *slog.Logger {
	if os.Getenv("DEFS_TEST_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.NewTextHandler(io.Discard, nil))
}

func (p *testPool) start(o p2p.HostOptions) *p2p.Host {
	h, err := p2p.NewHost(p.t.Context(), o)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := h.Close(); err != nil {
			p.t.Error(err)
		}
	})
	p.dirs[h.Self()] = o.Dir
	if p.bootstrap == nil {
		p.bootstrap = h.Addrs()
	}
	return h
}

func (p *testPool) hosts(count int) []*p2p.Host {
	var hosts []*p2p.Host
	for range count {
		hosts = append(hosts, p.start(p.options(p.t.TempDir())))
	}
	waitAll(p.t, hosts)
	return hosts
}

func waitAll(t testing.TB, hosts []*p2p.Host) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, h := range hosts {
		if err := h.WaitMembers(ctx, len(hosts)-1); err != nil {
			t.Fatal(err)
		}
	}
}

func TestHostIsTransport(t *testing.T) {
	transporttest.Run(t, func(t *testing.T, count int) []p2p.Transport {
		var ts []p2p.Transport
		for _, h := range newTestPool(t).hosts(count) {
			ts = append(ts, h)
		}
		return ts
	})
}
