package integration

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/control"
)

// How soon peers notice each other's silence. The defaults are made for
// machines that come and go; tests want to see it happen.
const (
	suspectAfter = 3 * time.Second
	deadAfter    = 10 * time.Minute // nothing is rebuilt, so that what a test broke stays broken
	dialTimeout  = 2 * time.Second
)

// cluster is a pool of storage nodes, a volume and its mount, in one directory.
type cluster struct {
	t         *testing.T
	dir       string
	device    string        // the volume's local state
	mnt       string        // the mountpoint
	ticket    string        // file
	words     string        // file
	options   string        // further ones of the mount
	patience  time.Duration // of nodes with silent ones, before they make up for them
	nodeFlags []string      // more flags of all nodes
	net       *network      // that all processes are in; nil for the machine's own
	nodes     []*node
	mount     *process // nil while there is none
	mounts    int      // so far
}

// node is a storage node, running or not.
type node struct {
	*process
	dir      string
	capacity string // that it is told; empty: what its disk has
}

// newCluster makes a volume and starts count nodes for it, each a process with
// a host label of its own. Nothing is mounted yet.
func newCluster(t *testing.T, policy string, count int, options ...func(*cluster)) *cluster {
	t.Helper()
	return newClusterAt(t, "", policy, count, options...)
}

// newClusterAt is newCluster with the volume's local state in a directory of
// another disk.
func newClusterAt(t *testing.T, device, policy string, count int, options ...func(*cluster)) *cluster {
	t.Helper()
	dir := filepath.Join(os.Getenv(directoryVariable), t.Name())
	c := &cluster{
		t: t, dir: dir, device: cmp.Or(device, filepath.Join(dir, "device")), mnt: filepath.Join(dir, "mnt"),
		ticket: filepath.Join(dir, "secret", "ticket"), words: filepath.Join(dir, "secret", "words"),
		patience: deadAfter,
	}
	for _, o := range options {
		o(c)
	}
	for _, d := range []string{"mnt", "log", "nodes", "secret"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(c.close)
	c.write(c.words, run(t, 30*time.Second, program("defs"), "init", "lab", "--data", c.device, "--policy", policy))
	c.write(c.ticket, run(t, 30*time.Second, program("defs"), "ticket", "--data", c.device))
	for i := range count {
		c.nodes = append(c.nodes, &node{dir: filepath.Join(dir, "nodes", fmt.Sprint(i))})
	}
	c.startAll()
	return c
}

// startAll starts the nodes, none of which runs.
func (c *cluster) startAll() {
	c.t.Helper()
	if len(c.nodes) == 0 {
		return
	}
	c.startNode(0) // whom the others ask first
	var starting sync.WaitGroup
	for i := 1; i < len(c.nodes); i++ {
		starting.Go(func() { c.startNode(i) })
	}
	starting.Wait()
	if c.t.Failed() {
		c.t.FailNow()
	}
}

func (c *cluster) write(path, text string) {
	c.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// close ends everything, and shows what the programs said if the test failed.
func (c *cluster) close() {
	if c.mount != nil {
		c.mount.kill()
	}
	var ending sync.WaitGroup
	for _, n := range c.nodes {
		if n.process != nil {
			ending.Go(n.kill)
		}
	}
	ending.Wait()
	points, err := mountsBelow(c.dir)
	if err != nil {
		c.t.Error(err)
	}
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil {
			c.t.Errorf("unmount %s: %v", p, err)
		}
	}
	logs, _ := filepath.Glob(filepath.Join(c.dir, "log", "*"))
	for _, log := range logs {
		if b, err := os.ReadFile(log); err == nil && bytes.Contains(b, []byte("WARNING: DATA RACE")) {
			c.t.Errorf("%s: %s", filepath.Base(log), b[bytes.Index(b, []byte("WARNING: DATA RACE")):])
		}
	}
	if c.t.Failed() {
		for _, log := range logs {
			if tail := (&process{log: log}).tail(); tail != "" {
				c.t.Logf("---- %s\n%s", filepath.Base(log), tail)
			}
		}
	}
	if err := os.RemoveAll(c.dir); err != nil {
		c.t.Error(err)
	}
}

// startNode starts a node, new or killed, and waits until it serves.
func (c *cluster) startNode(i int) {
	c.t.Helper()
	n := c.nodes[i]
	addrs := filepath.Join(n.dir, "addrs")
	if err := os.Remove(addrs); err != nil && !os.IsNotExist(err) {
		c.t.Error(err)
		return
	}
	args := append(c.net.enter(), []string{
		program("defs"), "node", "--data", n.dir, "--join", "@" + c.ticket, "--listen", c.net.listen(i), "--host", fmt.Sprint("host-", i),
		"--suspect-after", suspectAfter.String(), "--dead-after", c.patience.String(), "--copy-after", c.patience.String(), "--dial-timeout", dialTimeout.String(),
	}...)
	if n.capacity != "" {
		args = append(args, "--capacity", n.capacity)
	}
	args = append(args, c.nodeFlags...)
	if i > 0 {
		args = append(args, "--peers", "@"+filepath.Join(c.nodes[0].dir, "addrs"))
	}
	n.process = spawn(c.t, fmt.Sprint("node ", i), filepath.Join(c.dir, "log", fmt.Sprint("node-", i)), args...)
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(addrs); err == nil {
			return
		}
		if !n.running() || time.Since(began) > 30*time.Second {
			c.t.Errorf("node %d does not serve:\n%s", i, n.tail()) // from any goroutine: no FailNow
			return
		}
	}
}

// addrs returns the addresses of all nodes, and writes them to a file.
func (c *cluster) addrs() (addrs []string, file string) {
	c.t.Helper()
	for _, n := range c.nodes {
		if list, err := defs.ReadPeers(filepath.Join(n.dir, "addrs")); err == nil {
			addrs = append(addrs, list...)
		}
	}
	file = filepath.Join(c.dir, "addrs")
	c.write(file, strings.Join(addrs, "\n")+"\n")
	return addrs, file
}

// startMount starts the mount's process and does not wait for it.
func (c *cluster) startMount() {
	c.t.Helper()
	_, addrs := c.addrs()
	c.mounts++
	c.mount = spawn(c.t, "mount", filepath.Join(c.dir, "log", fmt.Sprint("mount-", c.mounts)),
		append(c.net.enter(), program("defs-mount"), "lab", c.mnt, "-o", fmt.Sprintf("data=%s,peers=@%s,listen=%s,suspect-after=%v,dead-after=%v,dial-timeout=%v%s",
			c.device, addrs, c.net.listen(mountAddress), suspectAfter, deadAfter, dialTimeout, c.options))...)
}

// mountNow mounts the volume and returns how long it took until it answered.
func (c *cluster) mountNow() time.Duration {
	c.t.Helper()
	began := time.Now()
	c.startMount()
	eventually(c.t, 30*time.Second, "the mount answers", func() bool {
		if !c.mount.running() {
			c.t.Fatalf("mount ended:\n%s", c.mount.tail())
		}
		points, err := mountsBelow(c.dir)
		if err != nil || len(points) == 0 {
			return false
		}
		_, err = os.Stat(c.mnt)
		return err == nil
	})
	took := time.Since(began)
	eventually(c.t, 10*time.Second, "the mount's process answers", func() bool {
		return c.control(time.Second, func(context.Context, *control.Client) error { return nil }) == nil
	})
	return took
}

// unmount ends the mount in order.
func (c *cluster) unmount() {
	c.t.Helper()
	run(c.t, 60*time.Second, program("defs"), "umount", c.mnt)
	c.mount.waitEnd(30 * time.Second)
	c.mount = nil
}

// killMount ends the mount as a crash does. Its mountpoint stays behind, stale.
func (c *cluster) killMount() {
	c.mount.kill()
	c.mount = nil
}

// fsck checks the volume, which is not mounted.
func (c *cluster) fsck() {
	c.t.Helper()
	run(c.t, 60*time.Second, program("defs"), "fsck", "--data", c.device)
}

// control asks the mount's process.
func (c *cluster) control(timeout time.Duration, ask func(ctx context.Context, client *control.Client) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	client, err := control.Dial(ctx, c.device)
	if err != nil {
		return err
	}
	defer client.Close()
	return ask(ctx, client)
}

// waitDurable waits until the peers have everything.
func (c *cluster) waitDurable(timeout time.Duration) time.Duration {
	c.t.Helper()
	began := time.Now()
	var last control.Status
	if err := c.control(timeout, func(ctx context.Context, client *control.Client) error {
		return client.WaitDurable(ctx, func(s control.Status) { last = s })
	}); err != nil {
		c.t.Fatalf("wait until durable: %v; last status %+v", err, last)
	}
	return time.Since(began)
}

// waitRecoverable waits until the 24 words would bring everything back. It does
// not need all nodes.
func (c *cluster) waitRecoverable(timeout time.Duration) {
	c.t.Helper()
	took := eventually(c.t, timeout, "everything is recoverable", func() bool {
		s := c.status()
		return s.Bytes.Journaled+s.Bytes.Queued == 0
	})
	c.t.Logf("recoverable after %v", took.Round(time.Millisecond))
}

// dropCache removes every clean local byte.
func (c *cluster) dropCache() error {
	return c.control(30*time.Second, func(ctx context.Context, client *control.Client) error {
		_, err := client.DropCache(ctx, true)
		return err
	})
}

func (c *cluster) status() (status control.Status) {
	c.t.Helper()
	if err := c.control(10*time.Second, func(ctx context.Context, client *control.Client) (err error) {
		status, err = client.Status(ctx)
		return err
	}); err != nil {
		c.t.Fatal(err)
	}
	return status
}

// waitNodes waits until the mount's process counts so many nodes as alive.
func (c *cluster) waitNodes(count int) {
	c.t.Helper()
	eventually(c.t, 30*time.Second, fmt.Sprint(count, " nodes are alive"), func() bool { return c.status().Pool.Nodes == count })
}

// lie flips one bit in each 4 KiB of all the node's pack files.
func (n *node) lie(t *testing.T) (flipped int) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(n.dir, "shards"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".pack") {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		one := make([]byte, 1)
		for off := rand.Int64N(4096); off < info.Size(); off += 4096 {
			if _, err := f.ReadAt(one, off); err != nil {
				return err
			}
			one[0] ^= 1 << rand.IntN(8)
			if _, err := f.WriteAt(one, off); err != nil {
				return err
			}
			flipped++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if flipped == 0 {
		t.Fatalf("%s holds nothing that could be changed", n.dir)
	}
	return flipped
}

// forgetPages drops what the kernel has cached of a file.
func forgetPages(f *os.File) error {
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// stop freezes a process; resume lets it go on.
func (p *process) stop()   { p.signal(syscall.SIGSTOP) }
func (p *process) resume() { p.signal(syscall.SIGCONT) }
