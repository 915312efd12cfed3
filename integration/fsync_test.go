package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFsyncRecoverable: on a mount with fsync=recoverable what fsync has
// acknowledged is back from the 24 words alone. While the nodes are stopped
// fsync waits, a program that waits can be killed, and the wait ends when they
// are back; DEFS_FSYNC_TIMEOUT=1 sees it end without them, after two minutes.
func TestFsyncRecoverable(t *testing.T) {
	c := newCluster(t, "2+1", 3)
	c.options = ",fsync=recoverable"
	c.mountNow()
	c.waitNodes(3)
	write := func(name string) (*os.File, time.Duration) {
		t.Helper()
		f, err := os.Create(filepath.Join(c.mnt, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if _, err := f.WriteString(strings.Repeat(name+"\n", 10_000)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := f.Sync(); err != nil {
			t.Fatalf("fsync of %s: %v", name, err)
		}
		return f, time.Since(began)
	}
	for i := range 3 {
		_, took := write(fmt.Sprint("file-", i))
		t.Logf("fsync took %v", took.Round(time.Millisecond))
	}
	f, _ := write("stopped")
	for _, n := range c.nodes {
		n.stop()
	}
	if _, err := f.WriteString("more"); err != nil {
		t.Fatal(err)
	}
	// A program that is killed while it waits for the peers.
	waiting := spawn(t, "sync", filepath.Join(c.dir, "log", "sync"), "sync", f.Name())
	eventually(t, 10*time.Second, "the program waits for the mount", func() bool { return inSystemCall(waiting, unix.SYS_FSYNC) })
	waiting.signal(syscall.SIGKILL)
	waiting.waitEnd(10 * time.Second)

	ended := make(chan error, 1)
	go func() { ended <- f.Sync() }()
	if os.Getenv("DEFS_FSYNC_TIMEOUT") != "" {
		began := time.Now()
		if err := <-ended; err == nil || !strings.Contains(err.Error(), syscall.ETIMEDOUT.Error()) {
			t.Errorf("without nodes: %v", err)
		}
		t.Logf("without nodes fsync failed after %v", time.Since(began).Round(time.Second))
		go func() { ended <- f.Sync() }()
	}
	eventually(t, 10*time.Second, "fsync waits", func() bool { return c.status().Bytes.Journaled+c.status().Bytes.Queued > 0 })
	select {
	case err := <-ended:
		t.Errorf("fsync has returned without nodes: %v", err)
	default:
	}
	for _, n := range c.nodes {
		n.resume()
	}
	if err := <-ended; err != nil {
		t.Errorf("after the nodes are back: %v", err)
	}

	// The machine is lost.
	c.killMount()
	if err := unix.Unmount(c.mnt, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	_, addrs := c.addrs()
	c.device = filepath.Join(c.dir, "recovered")
	run(t, 60*time.Second, program("defs"), "recover", "--data", c.device, "--words-file", c.words, "--peer", "@"+addrs)
	c.mountNow()
	for name, more := range map[string]string{"file-0": "", "file-1": "", "file-2": "", "stopped": "more"} {
		b, err := os.ReadFile(filepath.Join(c.mnt, name))
		if want := strings.Repeat(name+"\n", 10_000) + more; err != nil || string(b) != want {
			t.Errorf("%s after the recovery: %d bytes, want %d, %v", name, len(b), len(want), err)
		}
	}
	c.unmount()
}

// inSystemCall says whether a process is in a system call (proc_pid_syscall(5)).
func inSystemCall(p *process, number int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", p.cmd.Process.Pid))
	var got int
	if err == nil {
		_, err = fmt.Sscan(string(b), &got)
	}
	return err == nil && got == number
}
