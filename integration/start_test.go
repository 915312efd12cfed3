package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStartScript is what a person does first: one command, called from
// anywhere, gives a folder; called again, it brings back whatever has died.
func TestStartScript(t *testing.T) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if regexp.MustCompile(fmt.Sprintf(`- fuse\.defs home .*user_id=%d,`, os.Geteuid())).Match(mounts) {
		t.Skip("this user has a volume home mounted: the script would stop that one")
	}
	dir := filepath.Join(os.Getenv(directoryVariable), t.Name())
	home, mountpoint := filepath.Join(dir, "home"), filepath.Join(dir, "home", "My Folder")
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("../scripts/start")
	if err != nil {
		t.Fatal(err)
	}
	caches, err := exec.Command("go", "env", "GOCACHE", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	paths := strings.Fields(string(caches))
	start := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // it builds
		defer cancel()
		cmd := exec.CommandContext(ctx, script, args...)
		cmd.Dir = home
		cmd.Env = append(environment(), "HOME="+home, "XDG_DATA_HOME=", "XDG_CONFIG_HOME=", "XDG_STATE_HOME=", "GOCACHE="+paths[0], "GOMODCACHE="+paths[1])
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	started := func(args ...string) string {
		t.Helper()
		out, err := start(args...)
		if err != nil || !strings.Contains(out, "mounted at "+mountpoint) {
			t.Fatalf("start %q: %v\n%s", args, err, out)
		}
		return out
	}
	t.Cleanup(func() {
		start("--stop")
		for _, pid := range runningIn(t, dir) {
			t.Errorf("process %d is left", pid)
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(home, ".local/share/defs/*/log"))
			more, _ := filepath.Glob(filepath.Join(home, ".local/share/defs/volumes/*/log/*"))
			for _, log := range append(logs, more...) {
				t.Logf("---- %s\n%s", log, (&process{log: log}).tail())
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})

	file := filepath.Join(mountpoint, "file")
	has := func() {
		t.Helper()
		if b, err := os.ReadFile(file); err != nil || string(b) != "content" {
			t.Fatalf("read %q, %v", b, err)
		}
	}
	if out := started("My Folder"); !strings.Contains(out, "24 words") {
		t.Errorf("a new volume without its words:\n%s", out)
	}
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := started(mountpoint); strings.Contains(out, "24 words") {
		t.Errorf("called again it has made another volume:\n%s", out)
	}
	has()

	for _, pid := range runningIn(t, dir) { // the mount and its pool
		syscall.Kill(pid, syscall.SIGKILL)
	}
	eventually(t, 10*time.Second, "all processes have ended", func() bool { return len(runningIn(t, dir)) == 0 })
	if err := unix.Statfs(mountpoint, &unix.Statfs_t{}); !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("a mount whose process has ended: %v", err)
	}
	started("My Folder")
	has()

	busy, err := os.Open(mountpoint)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := start("--stop"); err == nil || !strings.Contains(out, "close the files") {
		t.Errorf("stopped while the folder is in use: %v\n%s", err, out)
	}
	if err := busy.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := start("--stop"); err != nil || !strings.Contains(out, "Stopped") {
		t.Fatalf("stop: %v\n%s", err, out)
	}
	if points, err := mountsBelow(dir); err != nil || len(points) > 0 || len(runningIn(t, dir)) > 0 {
		t.Fatalf("after the stop: mounts %v, processes %v, %v", points, runningIn(t, dir), err)
	}
	for _, wrong := range [][]string{{"--wrong"}, {"a", "b"}} {
		if out, err := start(wrong...); err == nil || !strings.Contains(out, "usage:") {
			t.Errorf("start %q: %v\n%s", wrong, err, out)
		}
	}
}

// runningIn lists the processes that were started with a path below dir.
func runningIn(t *testing.T, dir string) (pids []int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines {
		var pid int
		if b, err := os.ReadFile(line); err == nil && strings.Contains(string(b), dir+"/") {
			if _, err := fmt.Sscanf(line, "/proc/%d/", &pid); err == nil && pid != os.Getpid() {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}
