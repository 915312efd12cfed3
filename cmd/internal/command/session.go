package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/volume"
)

const (
	settleTimeout = 3 * time.Second  // for the nodes to be heard, when a command opens a volume
	closeTimeout  = 30 * time.Second // for the local state to be written
	handoverMax   = 10 * time.Second // for another process to let go of a volume
	answerTimeout = 30 * time.Second // for the process that has a volume open, which may be stopped, to tell figures
)

// openFlags are the settings that matter to whoever opens a volume.
var openFlags = []string{"peers", "listen", "journal-max", "cache-max", "suspect-after", "dead-after", "dial-timeout"}

// session is a volume that a command can ask: another process's, or its own.
type session struct {
	*control.Client
	own   bool // this process has opened the volume, for this command alone
	close func() error
}

// connect finds the process that has the volume open, or opens the volume.
func (a *app) connect(cmd *cobra.Command) (*session, error) {
	o, dir, err := a.volume(cmd)
	if err != nil {
		return nil, err
	}
	if _, err := volume.LoadDevice(dir); err != nil {
		return nil, err
	}
	ctx := cmd.Context()
	client, err := control.Dial(ctx, dir)
	if err == nil {
		return &session{client, false, func() error { client.Close(); return nil }}, nil
	}
	if !errors.Is(err, control.ErrNotServed) {
		return nil, err
	}
	opened, err := a.open(cmd, o, dir)
	if err != nil {
		return nil, err
	}
	closeVolume := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		return opened.Close(ctx)
	}
	server, err := control.Serve(dir, opened, nil)
	if err != nil {
		return nil, errors.Join(err, closeVolume())
	}
	settle, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	opened.WaitNodes(settle)
	if client, err = control.Dial(ctx, dir); err != nil {
		return nil, errors.Join(err, server.Close(), closeVolume())
	}
	return &session{client, true, func() error {
		client.Close()
		return errors.Join(server.Close(), closeVolume())
	}}, nil
}

// open opens the volume in this process. A process that is just ending is
// waited for.
func (a *app) open(cmd *cobra.Command, o config.Options, dir string) (*defs.Client, error) {
	options, err := clientOptions(o, dir)
	if err != nil {
		return nil, err
	}
	options.Logger = quietLogger(cmd, o, a.Err)
	return openWhenFree(cmd.Context(), options)
}

func openWhenFree(ctx context.Context, options defs.Options) (*defs.Client, error) {
	for deadline := time.Now().Add(handoverMax); ; {
		c, err := defs.New(ctx, options)
		if !errors.Is(err, defs.ErrBusy) || time.Now().After(deadline) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func clientOptions(o config.Options, dir string) (defs.Options, error) {
	peers, err := expandPeers(o.Peers)
	return defs.Options{
		Dir: dir, Listen: o.Listen, Peers: peers,
		JournalMaxBytes: int64(o.JournalMax), CacheMaxBytes: int64(o.CacheMax), NoAtime: o.NoAtime, Fsync: o.Fsync,
		HeartbeatInterval: o.HeartbeatInterval(), SuspectAfter: o.SuspectAfter, DeadAfter: o.DeadAfter, DialTimeout: o.DialTimeout,
	}, err
}

// expandPeers replaces @FILE by the addresses in the file. A file that is not
// there yet is skipped: the pool may be reached by other addresses.
func expandPeers(peers []string) ([]string, error) {
	var out []string
	for _, p := range peers {
		path, isFile := strings.CutPrefix(p, "@")
		if !isFile {
			out = append(out, p)
			continue
		}
		addrs, err := defs.ReadPeers(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		out = append(out, addrs...)
	}
	return out, nil
}

// waitClosed returns when no process has the volume in dir open any more.
func waitClosed(ctx context.Context, dir string) error {
	f, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		return nil // never opened
	}
	defer f.Close()
	for {
		if syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the process that served %s has not ended: %w", dir, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
