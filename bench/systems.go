package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// system is a filesystem under test.
type system interface {
	name() string
	dir() string                       // to work in
	settle(ctx context.Context) error  // returns when it does nothing in the background
	remount(ctx context.Context) error // forgets what it holds in memory
	abort()                            // makes every call into it return
	close() error
}

const (
	nativeName = "native"
	nullName   = "nullfs"
	defsName   = "DeFS"
)

const readyTimeout = 30 * time.Second // for a process to answer

// native is a directory.
type native struct{ directory string }

func (n native) name() string                  { return nativeName }
func (n native) dir() string                   { return n.directory }
func (n native) settle(context.Context) error  { return nil }
func (n native) remount(context.Context) error { return nil }
func (n native) abort()                        {}
func (n native) close() error                  { return nil }

// null is the FUSE filesystem that does nothing. Its files are in its memory:
// it is never remounted.
type null struct {
	mountpoint string
	process    *process
}

func startNull(ctx context.Context, s *scratch, base string) (*null, error) {
	n := &null{mountpoint: filepath.Join(base, "nullfs")}
	if err := os.Mkdir(n.mountpoint, 0o700); err != nil {
		return nil, err
	}
	var err error
	if n.process, err = spawn(n.mountpoint+".log", os.Environ(), filepath.Join(s.bin(), "nullfs"), n.mountpoint); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := n.process.await(ctx, func() bool { return isMountpoint(n.mountpoint) }); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

func (n *null) name() string                  { return nullName }
func (n *null) dir() string                   { return n.mountpoint }
func (n *null) settle(context.Context) error  { return nil }
func (n *null) remount(context.Context) error { return nil }
func (n *null) abort()                        { n.process.kill() }
func (n *null) close() error                  { return errors.Join(n.process.stop(), unmountBelow(n.mountpoint)) }

// mounted is a DeFS volume with a pool of local nodes.
type mounted struct {
	bin, base string
	env       []string
	nodes     *process
	mount     *process
	peak      int64 // bytes, of all mount processes so far
}

const poolNodes = 6

// startDefs makes a volume and its pool below base, and mounts it.
func startDefs(ctx context.Context, s *scratch, base string, policy string) (*mounted, error) {
	base = filepath.Join(base, "defs")
	m := &mounted{bin: s.bin(), base: base}
	// No setting of the person who runs it has a say.
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "DEFS_") && !strings.HasPrefix(v, "XDG_") {
			m.env = append(m.env, v)
		}
	}
	for _, v := range []string{"CONFIG", "DATA", "STATE"} {
		m.env = append(m.env, fmt.Sprintf("XDG_%s_HOME=%s", v, filepath.Join(base, "xdg")))
	}
	if err := errors.Join(os.Mkdir(base, 0o700), os.Mkdir(m.dir(), 0o700), os.Mkdir(m.pool(), 0o700)); err != nil {
		return nil, err
	}
	if _, err := m.defs(ctx, "init", "bench", "--policy", policy); err != nil {
		return nil, err
	}
	ticket, err := m.defs(ctx, "ticket")
	if err != nil {
		return nil, err
	}
	ticketFile := filepath.Join(base, "ticket")
	if err := os.WriteFile(ticketFile, ticket, 0o600); err != nil {
		return nil, err
	}
	m.nodes, err = spawn(filepath.Join(base, "nodes.log"), m.env, filepath.Join(m.bin, "defs"), "node",
		"--count", fmt.Sprint(poolNodes), "--data", m.pool(), "--join", "@"+ticketFile)
	if err != nil {
		return nil, err
	}
	ready, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := m.nodes.await(ready, func() bool { _, err := os.Stat(m.addrs()); return err == nil }); err != nil {
		return nil, errors.Join(err, m.close())
	}
	if err := m.start(ctx); err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

func (m *mounted) name() string  { return defsName }
func (m *mounted) dir() string   { return filepath.Join(m.base, "mount") }
func (m *mounted) local() string { return filepath.Join(m.base, "volume") }
func (m *mounted) pool() string  { return filepath.Join(m.base, "pool") }
func (m *mounted) addrs() string { return filepath.Join(m.pool(), "addrs") }

// defs runs the command with the volume and returns its output.
func (m *mounted) defs(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(m.bin, "defs"), append(args, "--data", m.local())...)
	cmd.Env = m.env
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("defs %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

func (m *mounted) start(ctx context.Context) (err error) {
	m.mount, err = spawn(filepath.Join(m.base, "mount.log"), m.env, filepath.Join(m.bin, "defs-mount"),
		"bench", m.dir(), "--data", m.local(), "-o", "peers=@"+m.addrs())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	return m.mount.await(ctx, func() bool { return isMountpoint(m.dir()) })
}

func (m *mounted) settle(ctx context.Context) error {
	_, err := m.defs(ctx, "wait", "--durable", "--timeout", "120s")
	return err
}

func (m *mounted) notePeak() { m.peak = max(m.peak, m.mount.peakBytes()) }

func (m *mounted) remount(ctx context.Context) error {
	m.notePeak()
	if err := errors.Join(m.mount.stop(), unmountBelow(m.dir())); err != nil {
		return err
	}
	return m.start(ctx)
}

// dropLocal waits for the nodes to have everything, and removes it here.
func (m *mounted) dropLocal(ctx context.Context, writtenBytes int64) error {
	if err := m.settle(ctx); err != nil {
		return err
	}
	if _, err := m.defs(ctx, "cache", "drop"); err != nil {
		return err
	}
	st, err := m.status(ctx)
	if err != nil {
		return err
	}
	if local := st.Journal.Bytes + st.Cache.CleanBytes; local > writtenBytes/2 {
		return fmt.Errorf("%d MiB are still on this disk: it would be no read from the nodes", local>>20)
	}
	return nil
}

// status is what the benchmark needs of `defs status --json`.
type status struct {
	Pool    struct{ Nodes int }
	Journal struct{ Bytes int64 }
	Cache   struct {
		CleanBytes int64 `json:"clean_bytes"`
	}
}

func (m *mounted) status(ctx context.Context) (st status, err error) {
	out, err := m.defs(ctx, "status", "--json")
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(out, &st); err != nil {
		return st, fmt.Errorf("defs status: %w", err)
	}
	return st, nil
}

// awaitNodes returns when the mount has heard of every node.
func (m *mounted) awaitNodes(ctx context.Context) error {
	for {
		st, err := m.status(ctx)
		if err != nil || st.Pool.Nodes == poolNodes {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d nodes answer: %w", st.Pool.Nodes, poolNodes, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (m *mounted) abort() {
	m.notePeak()
	m.mount.kill()
	_ = unmountBelow(m.dir())
}

func (m *mounted) close() error {
	var errs []error
	if m.mount != nil {
		m.notePeak()
		errs = append(errs, m.mount.stop())
	}
	return errors.Join(append(errs, unmountBelow(m.dir()), m.nodes.stop())...)
}
