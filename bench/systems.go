package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
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
	sealedName = "nullfs -journal"
	budgetName = "budget" // no filesystem: what the stages allow
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

// null is the FUSE filesystem that does nothing, or only seals and appends what
// is written. Its files are in its memory: it is never remounted.
type null struct {
	system     string // its name
	mountpoint string
	process    *process
}

func startNull(ctx context.Context, s *scratch, base string, sealed bool) (*null, error) {
	n := &null{system: nullName, mountpoint: filepath.Join(base, "nullfs")}
	args := []string{filepath.Join(s.bin(), "nullfs")}
	if sealed {
		n.system, n.mountpoint = sealedName, filepath.Join(base, "sealed")
		args = append(args, "-journal", n.mountpoint+".journal")
	}
	if err := os.Mkdir(n.mountpoint, 0o700); err != nil {
		return nil, err
	}
	var err error
	if n.process, err = spawn(n.mountpoint+".log", os.Environ(), append(args, n.mountpoint)...); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := n.process.await(ctx, func() bool { return isMountpoint(n.mountpoint) }); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

func (n *null) name() string                  { return n.system }
func (n *null) dir() string                   { return n.mountpoint }
func (n *null) settle(context.Context) error  { return nil }
func (n *null) remount(context.Context) error { return nil }
func (n *null) abort()                        { n.process.kill() }
func (n *null) close() error                  { return errors.Join(n.process.stop(), unmountBelow(n.mountpoint)) }

// mounted is a DeFS volume with a pool of local nodes.
type mounted struct {
	pool
	bin, base string
	env       []string
	nodes     *process
	mount     *process
	peak      int64 // bytes, of all mount processes so far
}

// pool says what nodes a volume has.
type pool struct {
	policy string
	nodes  int
	// poolSpace and mountSpace name network namespaces for the nodes and the
	// mount; "" is the one of the benchmark.
	poolSpace, mountSpace string
	listen                string // multiaddr for each node; "" for loopback
	options               string // more of the mount; "" for none
}

// in is a command that runs in a network namespace.
func in(space string, args ...string) []string {
	if space == "" {
		return args
	}
	return append([]string{"nsenter", "--net=" + namespacePath(space)}, args...)
}

// startDefs makes a volume and its pool below base, and mounts it.
func startDefs(ctx context.Context, s *scratch, base string, p pool) (*mounted, error) {
	base = filepath.Join(base, "defs")
	m := &mounted{pool: p, bin: s.bin(), base: base}
	// No setting of the person who runs it has a say.
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "DEFS_") && !strings.HasPrefix(v, "XDG_") {
			m.env = append(m.env, v)
		}
	}
	for _, v := range []string{"CONFIG", "DATA", "STATE"} {
		m.env = append(m.env, fmt.Sprintf("XDG_%s_HOME=%s", v, filepath.Join(base, "xdg")))
	}
	if err := errors.Join(os.Mkdir(base, 0o700), os.Mkdir(m.dir(), 0o700), os.Mkdir(m.nodesDir(), 0o700)); err != nil {
		return nil, err
	}
	if _, err := m.defs(ctx, "init", "bench", "--policy", p.policy); err != nil {
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
	args := in(p.poolSpace, filepath.Join(m.bin, "defs"), "node", "--count", fmt.Sprint(p.nodes), "--data", m.nodesDir(), "--join", "@"+ticketFile)
	if p.listen != "" {
		args = append(args, "--listen", p.listen)
	}
	m.nodes, err = spawn(filepath.Join(base, "nodes.log"), m.env, args...)
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

func (m *mounted) name() string     { return defsName }
func (m *mounted) dir() string      { return filepath.Join(m.base, "mount") }
func (m *mounted) local() string    { return filepath.Join(m.base, "volume") }
func (m *mounted) nodesDir() string { return filepath.Join(m.base, "pool") }
func (m *mounted) addrs() string    { return filepath.Join(m.nodesDir(), "addrs") }

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
	m.mount, err = spawn(filepath.Join(m.base, "mount.log"), m.env, in(m.mountSpace, filepath.Join(m.bin, "defs-mount"),
		"bench", m.dir(), "--data", m.local(), "-o", "peers=@"+m.addrs()+m.options)...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	return m.mount.await(ctx, func() bool { return isMountpoint(m.dir()) })
}

func (m *mounted) settle(ctx context.Context) error {
	_, err := m.defs(ctx, "wait", "--durable", "--timeout", "10m")
	return err
}

// profileTime is covered by one CPU profile; several make up a turn.
const profileTime = 5 * time.Second

// profile collects CPU profiles of the mount in dir until ctx ends.
func (m *mounted) profile(ctx context.Context, dir, name string) {
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(m.local(), "control.sock"))
	}}}
	defer client.CloseIdleConnections()
	for i := 0; ctx.Err() == nil; i++ {
		err := func() error {
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://mount/debug/pprof/profile?seconds=%d", int(profileTime.Seconds())), nil)
			if err != nil {
				return err
			}
			reply, err := client.Do(request)
			if err != nil {
				return err
			}
			defer reply.Body.Close()
			profile, err := io.ReadAll(reply.Body)
			if err != nil || reply.StatusCode != http.StatusOK {
				return errors.Join(err, errors.New(reply.Status))
			}
			return os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%d.pprof", name, i)), profile, 0o644)
		}()
		if err != nil {
			// Between two mounts there is nobody to ask.
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
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
		if err != nil || st.Pool.Nodes == m.pool.nodes {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d nodes answer: %w", st.Pool.Nodes, m.pool.nodes, ctx.Err())
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
