package p2p_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const serverEnv = "DEFS_P2P_TEST_SERVER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(serverEnv); dir != "" {
		if err := serveBenchmark(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serveBenchmark is the other process of BenchmarkCall: it reads a ticket from
// stdin, prints its address, and runs until stdin ends.
func serveBenchmark(dir string) error {
	in := bufio.NewReader(os.Stdin)
	text, err := in.ReadString('\n')
	if err != nil {
		return err
	}
	ticket, err := p2p.ParseTicket(text)
	if err != nil {
		return err
	}
	key, err := p2p.LoadOrCreateKey(dir + "/peer.key")
	if err != nil {
		return err
	}
	cert, err := p2p.Join(ticket, key, p2p.RoleNode)
	if err != nil {
		return err
	}
	h, err := p2p.NewHost(context.Background(), p2p.HostOptions{
		Dir: dir, Key: key, Certificate: cert, Listen: []string{os.Getenv("DEFS_P2P_TEST_LISTEN")},
	})
	if err != nil {
		return err
	}
	shard := make([]byte, 1<<20)
	h.Handle(func(_ context.Context, _ p2p.Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		if get := req.GetGetShard(); get != nil {
			return nil, shard[:get.Length], nil
		}
		return nil, nil, nil
	})
	fmt.Println(h.Addrs()[0])
	_, _ = io.Copy(io.Discard, in)
	return h.Close()
}

// startServer runs the test binary as a second process with one host.
func startServer(t testing.TB, ticket p2p.Ticket, listen string) (addr string, server *os.Process) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverEnv+"="+t.TempDir(), "DEFS_P2P_TEST_LISTEN="+listen)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	fmt.Fprintln(in, ticket.Text())
	addr, err = bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(addr), cmd.Process
}

// BenchmarkCall moves bodies between two processes over loopback.
func BenchmarkCall(b *testing.B) {
	for _, listen := range []string{"/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"} {
		pool := newTestPool(b)
		addr, server := startServer(b, pool.ticket, listen)
		pool.bootstrap = []string{addr}
		o := pool.options(b.TempDir())
		o.Listen = []string{listen}
		o.HeartbeatInterval, o.SuspectAfter = time.Second, 30*time.Second
		h := pool.start(o)
		if err := h.WaitMembers(b.Context(), 1); err != nil {
			b.Fatal(err)
		}
		to := h.Members()[0].ID
		transport := strings.Split(listen, "/")[3]
		for _, parallel := range []int{1, 4, 16} {
			for _, size := range []int{0, 64 << 10, 1 << 20} {
				name := fmt.Sprintf("%s/%dKiB/%d", transport, size>>10, parallel)
				b.Run("put/"+name, func(b *testing.B) { benchmarkCalls(b, h, to, parallel, size, true) })
				b.Run("get/"+name, func(b *testing.B) { benchmarkCalls(b, h, to, parallel, size, false) })
			}
		}
		_ = server.Kill()
	}
}

func benchmarkCalls(b *testing.B, h *p2p.Host, to placement.NodeID, parallel, size int, put bool) {
	b.SetBytes(int64(size))
	b.ReportAllocs()
	jobs := make(chan struct{})
	errs := make(chan error, parallel)
	for range parallel {
		go func() {
			var err error
			body := make([]byte, size)
			for range jobs {
				req := &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{Length: uint32(size)}}}
				want := size
				sent := []byte(nil)
				if put {
					req.Op = &wire.Request_PutShard{PutShard: &wire.PutShard{}}
					want, sent = 0, body
				}
				_, got, cerr := h.Call(context.Background(), to, req, sent)
				if cerr == nil && len(got) != want {
					cerr = errors.New("short body")
				}
				err = errors.Join(err, cerr)
			}
			errs <- err
		}()
	}
	b.ResetTimer()
	for range b.N {
		jobs <- struct{}{}
	}
	close(jobs)
	for range parallel {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
}
