package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// diskBytes is the size of the disk that fills up: some journal segments, and
// the room that data leaves for what publishes and deletes it.
const diskBytes = 400 << 20

// The disk with the volume's local state fills up: with what is written while
// no peer is there, then to the last byte from outside. Programs are told that
// there is no space, deletes work, nothing that was acknowledged is lost, and
// with room all goes on without a new mount.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a disk")
	}
	disk := t.TempDir()
	if err := unix.Mount("small", disk, "tmpfs", 0, fmt.Sprint("size=", diskBytes)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c := newClusterAt(t, filepath.Join(disk, "device"), "4+2", 6)
	c.mountNow()
	c.waitNodes(6)
	h := newHistory(filepath.Join(c.mnt, "history"), &ledger{})
	if err := h.make(); err != nil {
		t.Fatal(err)
	}
	for i := range c.nodes {
		c.nodes[i].kill()
	}

	// steps goes on after a step for which there was no space: that was done in
	// part, or not at all.
	steps := func(when string, count int) (refused int) {
		t.Helper()
		for range count {
			err := h.step()
			if errors.Is(err, syscall.ENOSPC) {
				refused++
				h.ledger.crashed(false)
				err = h.check()
			}
			if err != nil {
				t.Fatalf("%s: %v; status %+v", when, err, c.status())
			}
		}
		t.Logf("%-40s %d of %d steps refused", when, refused, count)
		return refused
	}
	steps("room", 300)
	large := &appender{path: c.mnt + "/large", seed: 5, sync: true}
	if err := untilFull(large); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after %d MiB: %v", large.written>>20, err)
	}
	t.Logf("%d MiB fit on the disk", large.written>>20)
	if steps("full of what is not published", 300) == 0 {
		t.Error("data is written on a disk that is full")
	}
	ballast := fillUp(t, disk)
	steps("full to the last byte", 300)
	large.close()
	if err := large.check(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(large.path); err != nil {
		t.Errorf("delete on a full disk: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for i := range c.nodes {
		c.startNode(i)
	}
	c.waitNodes(6)
	t.Logf("durable after %v", c.waitDurable(2*time.Minute).Round(time.Millisecond))
	eventually(t, time.Minute, "there is room again", func() bool { return steps("room again", 100) == 0 })
	if steps("room for good", 300) > 0 {
		t.Error("the disk has room again, the volume has not")
	}

	// With the peers there, published segments give way: much more goes through
	// than fits, while others fill the disk and leave it.
	large = &appender{path: c.mnt + "/through", seed: 6}
	for round := 0; large.written < diskBytes && !t.Failed(); round++ {
		if err := untilFull(large); err != nil && !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("after %d MiB: %v", large.written>>20, err)
		}
		if round%3 == 1 {
			ballast = fillUp(t, disk)
			steps("full while publishing", 100)
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
		}
		c.waitDurable(2 * time.Minute)
	}
	large.close()
	if err := large.check(); err != nil {
		t.Error(err)
	}
	if problem := c.status().ReadOnly; problem != "" {
		t.Errorf("the volume is read-only: %s", problem)
	}
	c.waitDurable(2 * time.Minute)
	c.unmount()
	c.fsck()
	c.mountNow()
	h.ledger.crashed(false)
	for _, l := range []load{h, large} {
		if err := l.check(); err != nil {
			t.Errorf("mounted again: %v", err)
		}
	}
	c.unmount()
}

// untilFull appends until an error, or until a disk's worth has been written.
func untilFull(a *appender) error {
	for limit := a.written + diskBytes; a.written < limit; {
		if err := a.step(); err != nil {
			a.tried = a.written
			return err
		}
	}
	return nil
}

// fillUp writes a file until there is no byte left.
func fillUp(t *testing.T, dir string) (path string) {
	t.Helper()
	path = filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for n := 1 << 20; n > 0; {
		if _, err := f.Write(make([]byte, n)); errors.Is(err, syscall.ENOSPC) {
			n /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return path
}
