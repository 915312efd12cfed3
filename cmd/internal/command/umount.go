package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
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
			if err := a.umount(ctx, args[0], durable); err != nil {
				return err
			}
			return a.print(struct {
				Schema     int    `json:"schema"`
				Mountpoint string `json:"mountpoint"`
			}{control.Schema, args[0]}, func(io.Writer) {})
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
	if cleaned, err := fusefs.CleanStale(m.Mountpoint); err != nil || cleaned {
		return err
	}
	client, err := control.Dial(ctx, volumeDir(m))
	if err != nil {
		if durable {
			return fmt.Errorf("cannot ask the process that serves %s whether the peers have everything: %w", m.Mountpoint, err)
		}
		return unmountPath(m.Mountpoint)
	}
	defer client.Close()
	if durable {
		if err := a.waitDurable(ctx, client); err != nil {
			return fmt.Errorf("still mounted: %w", err)
		}
	}
	if err := client.Unmount(ctx); control.CodeOf(err) == control.CodeBusy {
		return &exitError{exitMountpoint, err}
	} else if err != nil {
		return err
	}
	closed, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	return waitClosed(closed, volumeDir(m))
}

// volumeDir is the directory of a mounted volume.
func volumeDir(m fusefs.Mounted) string {
	if filepath.IsAbs(m.Source) {
		return m.Source
	}
	return filepath.Join(config.VolumesDir(), m.Source)
}

// mountAt finds the topmost mount of a volume at path. It does not touch the
// mount itself, whose process may be dead.
func mountAt(path string) (fusefs.Mounted, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return fusefs.Mounted{}, err
	}
	if parent, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		abs = filepath.Join(parent, filepath.Base(abs))
	}
	if target, err := filepath.EvalSymlinks(abs); err == nil {
		abs = target
	}
	mounts, err := fusefs.Mounts()
	if err != nil {
		return fusefs.Mounted{}, err
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].Mountpoint == abs {
			return mounts[i], nil
		}
	}
	return fusefs.Mounted{}, fmt.Errorf("no volume is mounted at %s", abs)
}

// mountAbove finds the mount that holds path.
func mountAbove(path string) (fusefs.Mounted, bool) {
	mounts, err := fusefs.Mounts()
	if err != nil {
		return fusefs.Mounted{}, false
	}
	best, found := fusefs.Mounted{}, false
	for _, m := range mounts {
		if (path == m.Mountpoint || strings.HasPrefix(path, m.Mountpoint+"/")) && len(m.Mountpoint) >= len(best.Mountpoint) {
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
	if errors.Is(err, unix.EBUSY) {
		return &exitError{exitMountpoint, fmt.Errorf("unmount %s: programs have files or working directories in it", path)}
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
