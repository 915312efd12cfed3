package command

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/fusefs"
)

func (a *app) umountCommand() *cobra.Command {
	var durable bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "umount MOUNTPOINT",
		Short: "Unmount, and return when the volume is closed",
		Args:  args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, timeout)
				defer cancel()
			}
			return a.umount(ctx, args[0], durable)
		},
	}
	cmd.Flags().BoolVar(&durable, "durable", false, "first wait until the peers have everything")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up after so long, such as 5m; 0 is never")
	return cmd
}

func (a *app) umount(ctx context.Context, path string, durable bool) error {
	m, err := mountAt(path)
	if err != nil {
		return &exitError{exitMountpoint, err}
	}
	if cleaned, err := fusefs.CleanStale(m.point); err != nil || cleaned {
		return err
	}
	client, err := control.Dial(ctx, m.dir())
	if err != nil {
		if durable {
			return fmt.Errorf("cannot ask the process that serves %s whether the peers have everything: %w", m.point, err)
		}
		return unmountPath(m.point)
	}
	defer client.Close()
	if durable {
		if err := a.waitDurable(ctx, client); err != nil {
			return fmt.Errorf("still mounted: %w", err)
		}
	}
	if err := client.Unmount(ctx); err != nil {
		return err
	}
	closed, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	return waitClosed(closed, m.dir())
}

// defsMount is one line of the mount table.
type defsMount struct{ source, point string }

// dir is the directory of the mounted volume.
func (m defsMount) dir() string {
	if filepath.IsAbs(m.source) {
		return m.source
	}
	return filepath.Join(config.VolumesDir(), m.source)
}

// defsMounts lists the mounts of volumes, oldest first.
func defsMounts() ([]defsMount, error) {
	f, err := os.Open("/proc/self/mountinfo") // proc_pid_mountinfo(5)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []defsMount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		before, after, found := strings.Cut(lines.Text(), " - ")
		head, tail := strings.Fields(before), strings.Fields(after)
		if found && len(head) >= 5 && len(tail) >= 2 && tail[0] == "fuse.defs" {
			out = append(out, defsMount{unescapeOctal(tail[1]), unescapeOctal(head[4])})
		}
	}
	return out, lines.Err()
}

// unescapeOctal decodes the \ooo of the mount table.
func unescapeOctal(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountAt finds the topmost mount of a volume at path. It does not touch the
// mount itself, whose process may be dead.
func mountAt(path string) (defsMount, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return defsMount{}, err
	}
	if parent, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		abs = filepath.Join(parent, filepath.Base(abs))
	}
	if target, err := filepath.EvalSymlinks(abs); err == nil {
		abs = target
	}
	mounts, err := defsMounts()
	if err != nil {
		return defsMount{}, err
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].point == abs {
			return mounts[i], nil
		}
	}
	return defsMount{}, fmt.Errorf("no volume is mounted at %s", abs)
}

// mountAbove finds the mount that holds path.
func mountAbove(path string) (defsMount, bool) {
	mounts, err := defsMounts()
	if err != nil {
		return defsMount{}, false
	}
	best, found := defsMount{}, false
	for _, m := range mounts {
		if (path == m.point || strings.HasPrefix(path, m.point+"/")) && len(m.point) >= len(best.point) {
			best, found = m, true
		}
	}
	return best, found
}

// unmountPath unmounts where the process that serves the mount cannot be asked.
func unmountPath(path string) error {
	err := unix.Unmount(path, 0)
	if errors.Is(err, unix.EPERM) {
		return fusermount("-u", path)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

func fusermount(args ...string) error {
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("fusermount3: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
