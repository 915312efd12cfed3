package p2p_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/transporttest"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

func patience(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func getShard() *wire.Request {
	return &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{Length: 10}}}
}

func memberOf(h *p2p.Host, id placement.NodeID) p2p.Member {
	for _, m := range h.Members() {
		if m.ID == id {
			return m
		}
	}
	return p2p.Member{State: -1}
}

func TestMembersSayWhatTheyAre(t *testing.T) {
	pool := newTestPool(t)
	o := pool.options(t.TempDir())
	o.Host, o.Zone, o.CapacityBytes = "rack-1", "cellar", 1<<40
	a := pool.start(o)
	b := pool.start(pool.options(t.TempDir()))
	waitAll(t, []*p2p.Host{a, b})
	m := b.Members()[0]
	if m.Host != "rack-1" || m.Zone != "cellar" || m.CapacityBytes != 1<<40 || m.Subnet != "127.0.0.0/24" || len(m.Addrs) == 0 {
		t.Errorf("got %+v", m)
	}
	transporttest.Eventually(t, "the round trip is measured", func() bool { return b.Members()[0].RTT > 0 })
	if other := a.Members()[0]; other.Host == "" || other.Host == "rack-1" {
		t.Errorf("the default host is %q", other.Host)
	}
}

// TestRestartWithoutBootstrap: the member file alone brings a pool back, all
// of it at once, at the ports it had.
func TestRestartWithoutBootstrap(t *testing.T) {
	pool := newTestPool(t)
	hosts := pool.hosts(4)
	var dirs, addrs []string
	for _, h := range hosts {
		dirs = append(dirs, pool.dirs[h.Self()])
		addrs = append(addrs, h.Addrs()...)
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
	}
	pool.bootstrap = nil
	var again []*p2p.Host
	var addrsAgain []string
	for _, dir := range dirs {
		o := pool.options(dir)
		o.Bootstrap = nil
		h := pool.start(o)
		again = append(again, h)
		addrsAgain = append(addrsAgain, h.Addrs()...)
	}
	waitAll(t, again)
	if !slices.Equal(addrs, addrsAgain) {
		t.Errorf("addresses were %v, are %v", addrs, addrsAgain)
	}
}

// TestMovedMemberIsFound: a member that comes back elsewhere tells the others
// itself.
func TestMovedMemberIsFound(t *testing.T) {
	pool := newTestPool(t)
	hosts := pool.hosts(3)
	dir := pool.dirs[hosts[2].Self()]
	if err := hosts[2].Close(); err != nil {
		t.Fatal(err)
	}
	o := pool.options(dir)
	o.Listen = []string{"/ip4/127.0.0.2/tcp/0"}
	moved := pool.start(o)
	moved.Handle(transporttest.Echo)
	waitAll(t, []*p2p.Host{hosts[0], hosts[1], moved})
	transporttest.Eventually(t, "the new address is known", func() bool {
		return slices.ContainsFunc(memberOf(hosts[0], moved.Self()).Addrs, func(a string) bool { return strings.Contains(a, "127.0.0.2") })
	})
	if _, _, err := hosts[0].Call(patience(t), moved.Self(), getShard(), nil); err != nil {
		t.Fatal(err)
	}
}

// TestKilledPeer: calls to a killed process fail at once, later ones without a
// dial; a new process is taken up with a new nonce.
func TestKilledPeer(t *testing.T) {
	pool := newTestPool(t)
	addr, server := startServer(t, pool.ticket, "/ip4/127.0.0.1/tcp/0")
	pool.bootstrap = []string{addr}
	h := pool.start(pool.options(t.TempDir()))
	ctx := patience(t)
	if err := h.WaitMembers(ctx, 1); err != nil {
		t.Fatal(err)
	}
	to := h.Members()[0].ID
	if _, _, err := h.Call(ctx, to, getShard(), nil); err != nil {
		t.Fatal(err)
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		start := time.Now()
		if _, _, err := h.Call(ctx, to, getShard(), nil); !errors.Is(err, p2p.ErrUnreachable) {
			t.Fatalf("call %d: %v", i, err)
		}
		if took := time.Since(start); took > time.Second {
			t.Fatalf("call %d took %s", i, took)
		}
	}
	transporttest.Eventually(t, "the peer is suspect", func() bool { return memberOf(h, to).State == p2p.Suspect })
}

// TestStoppedPeer: a process that stands still makes calls end by their
// context, is soon suspect, then refused at once, and comes back.
func TestStoppedPeer(t *testing.T) {
	pool := newTestPool(t)
	addr, server := startServer(t, pool.ticket, "/ip4/127.0.0.1/tcp/0")
	pool.bootstrap = []string{addr}
	o := pool.options(t.TempDir())
	o.DialTimeout = 300 * time.Millisecond
	h := pool.start(o)
	if err := h.WaitMembers(patience(t), 1); err != nil {
		t.Fatal(err)
	}
	to := h.Members()[0].ID
	if err := server.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	transporttest.Eventually(t, "a call to the stopped peer ends by its context", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, _, err := h.Call(ctx, to, getShard(), nil)
		return errors.Is(err, p2p.ErrUnreachable) && errors.Is(err, context.DeadlineExceeded)
	})
	transporttest.Eventually(t, "the stopped peer is suspect", func() bool { return memberOf(h, to).State == p2p.Suspect })
	if err := server.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	transporttest.Eventually(t, "the peer is back", func() bool {
		_, _, err := h.Call(patience(t), to, getShard(), nil)
		return err == nil && memberOf(h, to).State == p2p.Alive
	})
}

func TestDeadAfterSilence(t *testing.T) {
	pool := newTestPool(t)
	o := pool.options(t.TempDir())
	o.SuspectAfter, o.DeadAfter = 200*time.Millisecond, 400*time.Millisecond
	a := pool.start(o)
	b := pool.start(pool.options(t.TempDir()))
	waitAll(t, []*p2p.Host{a, b})
	id := b.Self()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	transporttest.Eventually(t, "the member is dead", func() bool { return memberOf(a, id).State == p2p.Dead })
	o = pool.options(pool.dirs[b.Self()])
	o.Bootstrap = a.Addrs()
	pool.start(o)
	transporttest.Eventually(t, "the member is alive again", func() bool { return memberOf(a, id).State == p2p.Alive })
}

func TestNonceIsNewAfterRestart(t *testing.T) {
	pool := newTestPool(t)
	hosts := pool.hosts(2)
	a, b := hosts[0], hosts[1]
	seen := make(chan []byte, 1)
	serve := func(ctx context.Context, from p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		seen <- from.Nonce
		return nil, nil, nil
	}
	b.Handle(serve)
	check := func(from, to *p2p.Host) []byte {
		t.Helper()
		nonce, err := from.Nonce(patience(t), to.Self())
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := from.Call(patience(t), to.Self(), getShard(), nil); err != nil {
			t.Fatal(err)
		}
		if got := <-seen; !bytes.Equal(got, nonce) {
			t.Fatalf("the server has %x, the client %x", got, nonce)
		}
		return nonce
	}
	restart := func(h *p2p.Host) *p2p.Host {
		t.Helper()
		dir := pool.dirs[h.Self()]
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		return pool.start(pool.options(dir))
	}
	first := check(a, b)
	if again := check(a, b); !bytes.Equal(first, again) {
		t.Error("the nonce changed without a restart")
	}
	b = restart(b)
	b.Handle(serve)
	waitAll(t, []*p2p.Host{a, b})
	transporttest.Eventually(t, "the new server is reached", func() bool {
		n, err := a.Nonce(patience(t), b.Self())
		return err == nil && !bytes.Equal(n, first)
	})
	second := check(a, b)
	a = restart(a)
	waitAll(t, []*p2p.Host{a, b})
	if third := check(a, b); bytes.Equal(third, second) {
		t.Error("the client's restart kept the nonce")
	}
}

func TestHandlersPerPeerAreBounded(t *testing.T) {
	pool := newTestPool(t)
	o := pool.options(t.TempDir())
	o.HandlersPerPeerMax = 3
	server := pool.start(o)
	client := pool.start(pool.options(t.TempDir()))
	waitAll(t, []*p2p.Host{server, client})
	var running, most atomic.Int64
	release := make(chan struct{})
	server.Handle(func(ctx context.Context, _ p2p.Peer, _ *wire.Request, _ []byte) (*wire.Reply, []byte, error) {
		n := running.Add(1)
		for {
			m := most.Load()
			if n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		<-release
		running.Add(-1)
		return nil, nil, nil
	})
	const count = 20
	errs := make(chan error, count)
	ctx := patience(t)
	for range count {
		go func() {
			_, _, err := client.Call(ctx, server.Self(), getShard(), []byte("x"))
			errs <- err
		}()
	}
	transporttest.Eventually(t, "three run", func() bool { return running.Load() == 3 })
	close(release)
	for range count {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if most.Load() != 3 {
		t.Errorf("%d handlers ran at once", most.Load())
	}
}

func TestQUICOnly(t *testing.T) {
	pool := newTestPool(t)
	var hosts []*p2p.Host
	for range 2 {
		o := pool.options(t.TempDir())
		o.Listen = []string{"/ip4/127.0.0.1/udp/0/quic-v1"}
		hosts = append(hosts, pool.start(o))
	}
	waitAll(t, hosts)
	hosts[1].Handle(transporttest.Echo)
	body := bytes.Repeat([]byte("quic"), 1<<18)
	_, got, err := hosts[0].Call(patience(t), hosts[1].Self(), getShard(), body)
	if err != nil || !bytes.Equal(got, body) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestOtherPoolIsNotServed(t *testing.T) {
	ours, theirs := newTestPool(t), newTestPool(t)
	a := ours.start(ours.options(t.TempDir()))
	var served atomic.Bool
	a.Handle(func(context.Context, p2p.Peer, *wire.Request, []byte) (*wire.Reply, []byte, error) {
		served.Store(true)
		return nil, nil, nil
	})
	theirs.bootstrap = a.Addrs()
	b := theirs.start(theirs.options(t.TempDir()))
	if _, _, err := b.Call(patience(t), a.Self(), getShard(), nil); !errors.Is(err, p2p.ErrUnreachable) {
		t.Errorf("got %v", err)
	}
	c := ours.start(ours.options(t.TempDir()))
	waitAll(t, []*p2p.Host{a, c})
	if len(b.Members()) != 0 || len(a.Members()) != 1 || served.Load() {
		t.Errorf("the stranger knows %d members, the host %d", len(b.Members()), len(a.Members()))
	}
}

func TestWrongStartIsRefused(t *testing.T) {
	pool := newTestPool(t)
	for name, change := range map[string]func(*p2p.HostOptions){
		"another's certificate": func(o *p2p.HostOptions) { o.Certificate = pool.options(t.TempDir()).Certificate },
		"no certificate":        func(o *p2p.HostOptions) { o.Certificate = nil },
		"no directory":          func(o *p2p.HostOptions) { o.Dir = "" },
		"listen":                func(o *p2p.HostOptions) { o.Listen = []string{"localhost:80"} },
		"bootstrap":             func(o *p2p.HostOptions) { o.Bootstrap = []string{"/ip4/127.0.0.1/tcp/1"} },
		"liveness":              func(o *p2p.HostOptions) { o.DeadAfter = time.Millisecond },
	} {
		o := pool.options(t.TempDir())
		change(&o)
		if h, err := p2p.NewHost(t.Context(), o); err == nil {
			_ = h.Close()
			t.Errorf("%s: it started", name)
		}
	}
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	o := pool.options(t.TempDir())
	o.Listen = []string{fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", taken.Addr().(*net.TCPAddr).Port)}
	if h, err := p2p.NewHost(t.Context(), o); err == nil {
		_ = h.Close()
		t.Error("port taken: it started")
	}
}

// TestCorruptMemberFile costs no more than a bootstrap.
func TestCorruptMemberFile(t *testing.T) {
	pool := newTestPool(t)
	hosts := pool.hosts(2)
	dir := pool.dirs[hosts[1].Self()]
	if err := hosts[1].Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "members")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	waitAll(t, []*p2p.Host{hosts[0], pool.start(pool.options(dir))})
}

// TestCloseLeavesNothing: all goroutines of a host end with it.
func TestCloseLeavesNothing(t *testing.T) {
	before := runtime.NumGoroutine()
	pool := newTestPool(t)
	hosts := pool.hosts(3)
	hosts[1].Handle(transporttest.Echo)
	if _, _, err := hosts[0].Call(patience(t), hosts[1].Self(), getShard(), nil); err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts {
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		if err := h.Close(); err != nil {
			t.Fatal("second Close:", err)
		}
	}
	end := time.Now().Add(15 * time.Second)
	for runtime.NumGoroutine() > before+2 {
		if time.Now().After(end) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), stacks[:runtime.Stack(stacks, true)])
		}
		time.Sleep(5 * time.Millisecond)
	}
}
