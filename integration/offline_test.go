package integration

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// instant bounds what never waits for a peer. It is the middle one of some
// tries that is held against it: other programs may be busy too.
const instant = 100 * time.Millisecond

// mustBeInstant asks the mount for metadata and holds the time against instant.
func (c *cluster) mustBeInstant(when string) {
	c.t.Helper()
	for name, ask := range map[string]func() error{
		"ls":   func() error { _, err := os.ReadDir(c.mnt); return err },
		"stat": func() error { _, err := os.Stat(filepath.Join(c.mnt, "cold")); return err },
		"df":   func() error { return unix.Statfs(c.mnt, &unix.Statfs_t{}) },
	} {
		var took []time.Duration
		for range 21 {
			began := time.Now()
			if err := ask(); err != nil {
				c.t.Errorf("%s: %s: %v", when, name, err)
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		c.t.Logf("%s: %s: median %v, slowest %v", when, name, took[10], took[20])
		if took[10] > instant || took[20] > time.Second {
			c.t.Errorf("%s: %s took %v, %v at most", when, name, took[10], took[20])
		}
	}
}

// writeAndRead writes a new file, syncs it and reads it back from this disk.
func (c *cluster) writeAndRead(name string) {
	c.t.Helper()
	l := &appender{path: filepath.Join(c.mnt, name), seed: 11, sync: true}
	for range 20 {
		if err := l.step(); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := forgetPages(l.file); err != nil {
		c.t.Fatal(err)
	}
	l.close()
	if err := l.check(); err != nil {
		c.t.Error(err)
	}
}

// readFails reads a file that only the peers have, and wants EIO in time.
func (c *cluster) readFails(f *coldFiles, i int) time.Duration {
	c.t.Helper()
	began := time.Now()
	err := f.read(i)
	took := time.Since(began)
	if !errors.Is(err, syscall.EIO) {
		c.t.Errorf("a read that needs a peer ended with %v", err)
	}
	if took > operationMax {
		c.t.Errorf("a read that needs a peer took %v", took)
	}
	return took
}

// interrupted starts cat on a file that only the peers have and presses Ctrl-C.
func (c *cluster) interrupted(path string) time.Duration {
	c.t.Helper()
	file, err := os.Open(path)
	if err != nil {
		c.t.Fatal(err)
	}
	defer file.Close()
	if err := forgetPages(file); err != nil {
		c.t.Fatal(err)
	}
	cat := exec.Command("cat", path)
	if err := cat.Start(); err != nil {
		c.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cat.Wait() }()
	blocked := func() bool { // in a read: the kernel says in which function it waits
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(cat.Process.Pid), "wchan"))
		return err == nil && regexp.MustCompile("fuse|folio|request_wait|filemap").Match(b)
	}
	eventually(c.t, 10*time.Second, "cat waits for its read", blocked)
	began := time.Now()
	if err := cat.Process.Signal(os.Interrupt); err != nil {
		c.t.Fatal(err)
	}
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
			c.t.Errorf("cat ended with %v, not by the signal", err)
		}
	case <-time.After(operationMax):
		c.t.Fatal("Ctrl-C does not end a read")
	}
	return time.Since(began)
}

// Without any peer the mount goes on with what is on this disk. What needs a
// peer fails in time, says why, and can be interrupted.
func TestNoPeers(t *testing.T) {
	c := newCluster(t, "4+2", 6)
	c.mountNow()
	c.waitNodes(6)
	f := &coldFiles{c: c, count: 6, bytes: 2 << 20}
	f.make()
	c.waitDurable(time.Minute)
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}

	// They fall silent: connections stay, answers do not come.
	for _, n := range c.nodes {
		n.stop()
	}
	t.Logf("Ctrl-C ended cat after %v", c.interrupted(f.path(0)).Round(time.Millisecond))
	failed := make(chan time.Duration)
	go func() { failed <- c.readFails(f, 1) }()
	c.mustBeInstant("peers silent, a read waiting")
	c.writeAndRead("local")
	t.Logf("peers silent: EIO after %v", (<-failed).Round(time.Millisecond))
	for _, n := range c.nodes {
		n.resume()
	}
	eventually(t, time.Minute, "reads work again", func() bool { return f.read(1) == nil })

	// They are gone, and the mount starts without them.
	c.waitDurable(time.Minute)
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	c.unmount()
	for _, n := range c.nodes {
		n.kill()
	}
	if took := c.mountNow(); took > remountMax {
		t.Errorf("mounting without peers took %v", took)
	} else {
		t.Logf("mounted without peers in %v", took.Round(time.Millisecond))
	}
	c.mustBeInstant("peers gone")
	c.writeAndRead("local again")
	t.Logf("peers gone: EIO after %v", c.readFails(f, 2).Round(time.Millisecond))
	c.mustBeInstant("after EIO")
	line := regexp.MustCompile(`(?m)^.*level=ERROR.* inode=\d+ .*stripe [0-9a-f]{32}: .* asked .*12D3KooW.*$`)
	log, err := os.ReadFile(c.mount.log)
	if err != nil {
		t.Fatal(err)
	}
	if found := line.Find(log); found == nil {
		t.Errorf("no line of the log names the stripe and the peers:\n%s", c.mount.tail())
	} else {
		t.Logf("log: %.300s", found)
	}

	// They come back, and so does everything.
	for i := range c.nodes {
		c.startNode(i)
	}
	eventually(t, time.Minute, "reads work again", func() bool { return f.read(2) == nil })
	for i := range f.count {
		if err := f.read(i); err != nil {
			t.Error(err)
		}
	}
	t.Logf("durable after %v", c.waitDurable(time.Minute).Round(time.Millisecond))
	c.unmount()
}
