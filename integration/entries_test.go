package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestManyEntries fills one directory: with DEFS_ENTRIES=1000000 as far as is
// promised. What the mount's process needs for it is bounded.
func TestManyEntries(t *testing.T) {
	count := number(t, "DEFS_ENTRIES", 5_000)
	const peakMiB = 640
	c := newCluster(t, "1+1", 0)
	c.mountNow()
	dir := filepath.Join(c.mnt, "dir")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	step := func(what string, f func() error) {
		t.Helper()
		began := time.Now()
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		took := time.Since(began)
		resident, peak := memoryMiB(t, c.mount.cmd.Process.Pid)
		t.Logf("%s: %v, %.0f a second, resident %d MiB, peak %d MiB", what, took.Round(time.Millisecond), float64(count)/took.Seconds(), resident, peak)
		if peak > peakMiB {
			t.Errorf("%s: the process needed %d MiB", what, peak)
		}
	}
	each := func(f func(name string) error) func() error {
		return func() error {
			for i := range count {
				if err := f(filepath.Join(dir, fmt.Sprintf("entry-%07d", i))); err != nil {
					return err
				}
			}
			return nil
		}
	}
	list := func() error {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer d.Close()
		names, err := d.Readdirnames(-1)
		if err != nil {
			return err
		}
		seen := make([]bool, count)
		for _, name := range names {
			i, err := strconv.Atoi(strings.TrimPrefix(name, "entry-"))
			if err != nil || i >= count || seen[i] {
				return fmt.Errorf("%q is listed twice, or is none", name)
			}
			seen[i] = true
		}
		if len(names) != count {
			return fmt.Errorf("%d names, want %d", len(names), count)
		}
		return nil
	}
	stat := each(func(name string) error {
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil || st.Mode != unix.S_IFREG|0o640 || st.Size != 0 {
			return fmt.Errorf("%s: mode %o, %d bytes, %w", name, st.Mode, st.Size, err)
		}
		return nil
	})
	step("create", each(func(name string) error {
		fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o640)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	}))
	step("list", list)
	step("stat", stat)
	step("unmount", func() error { c.unmount(); c.startMount(); return nil })
	step("mount", func() error {
		eventually(t, time.Minute, "the mount answers", func() bool { _, err := os.Stat(dir); return err == nil })
		return nil
	})
	step("list again", list)
	step("stat again", stat)
	step("remove", each(unix.Unlink))
	if err := os.Remove(dir); err != nil {
		t.Error(err)
	}
	c.unmount()
	c.fsck()
}

// memoryMiB returns what a process has in memory, and the most it had.
func memoryMiB(t *testing.T, pid int) (resident, peak int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // proc_pid_status(5)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kib int
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			resident = kib >> 10
		}
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kib); err == nil {
			peak = kib >> 10
		}
	}
	return resident, peak
}
