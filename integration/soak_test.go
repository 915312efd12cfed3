package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/defs-fs/defs/control"
)

// A pool under everything that happens to pools, for as long as DEFS_SOAK says
// (`make soak`): nodes are killed, stopped, partitioned, lose their disks and
// have them rot, some are full, while a mount writes and reads. No read ever
// shows a wrong byte; in the end every file is there, every stripe is whole, and
// nobody has grown.
func TestSoak(t *testing.T) {
	const nodes = 24
	duration := 18 * time.Second
	if text := os.Getenv("DEFS_SOAK"); text != "" {
		var err error
		duration, err = time.ParseDuration(text)
		check(t, err)
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("DEFS_SOAK_SEED"); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		check(t, err)
	}
	t.Logf("DEFS_SOAK_SEED=%d, %v", seed, duration)
	c := newCluster(t, "4+2", nodes, func(c *cluster) {
		c.patience = 2 * suspectAfter
		c.nodeFlags = []string{"--scrub-every", "5s"}
		if os.Geteuid() == 0 {
			c.net = newNetwork(t)
		}
	})
	c.mountNow()
	c.waitNodes(nodes)
	s := &soak{cluster: c, calm: min(c.patience, duration/8), away: min(10*time.Second, duration/6), rng: rand.New(rand.NewPCG(seed, 1)), files: make(map[string]*soakFile), fired: make(map[string]int)}
	ctx, cancel := context.WithTimeout(t.Context(), duration)
	defer cancel()
	var working sync.WaitGroup
	working.Go(func() { s.write(ctx, rand.New(rand.NewPCG(seed, 2))) })
	working.Go(func() { s.read(ctx, rand.New(rand.NewPCG(seed, 3))) })
	working.Go(func() { s.measure(ctx) })
	working.Go(func() { s.silence(ctx, rand.New(rand.NewPCG(seed, 4))) })
	s.destroy(ctx)
	working.Wait()
	if t.Failed() {
		t.FailNow()
	}
	c.waitNodes(nodes)
	t.Logf("%v after %d writes and %d reads (%d of them did not come in time), %d files",
		s.fired, s.writes, s.reads, s.unanswered, len(s.files))
	for _, fault := range s.planned() {
		if s.fired[fault] == 0 {
			t.Errorf("planned, and never happened: %s", fault)
		}
	}
	took := c.waitDurable(3 * time.Minute)
	healed := eventually(t, 3*time.Minute, "all stripes are whole", func() bool {
		if h := c.status().Health; h.Degraded+h.Unreachable+h.Lost > 0 {
			return false
		}
		for _, n := range c.nodes {
			if st, err := n.ask(); err != nil || st.Repair.Broken > 0 {
				return false
			}
		}
		return true
	})
	t.Logf("durable after %v, whole after another %v; %+v", took.Round(time.Millisecond), healed.Round(time.Millisecond), c.status().Health)
	check(t, c.dropCache())
	for name, f := range s.files {
		if err := f.compare(filepath.Join(c.mnt, name)); err != nil {
			t.Errorf("in the end: %v", err)
		}
	}
	s.compareMeasures()
	for i, n := range c.nodes {
		st, err := n.ask()
		check(t, err)
		if i < 3 || st.Scrub.Damaged+st.Moves.Surplus+st.Audit.Failed > 0 {
			t.Logf("node %d: %d MiB; scrub %+v, repair %+v, moves %+v, audit %+v", i, st.UsedBytes>>20, st.Scrub, st.Repair, st.Moves, st.Audit)
		}
	}
}

// soak is one run.
type soak struct {
	*cluster
	rng  *rand.Rand    // of destroy
	away time.Duration // for which nodes are away at most
	calm time.Duration // for which nothing may be broken before something else is destroyed

	mu                        sync.Mutex // guards what follows
	files                     map[string]*soakFile
	fired                     map[string]int
	down                      []int // nodes that are away or lack what they held
	writes, reads, unanswered int
	measures                  []map[string]measure
}

// soakFile is what a file is to hold; mu keeps it while it is written or read.
type soakFile struct {
	mu    sync.Mutex
	seed  uint64
	bytes int
}

func (f *soakFile) content() []byte {
	b := make([]byte, f.bytes)
	if f.seed%2 == 0 {
		rand.NewChaCha8([32]byte{byte(f.seed), byte(f.seed >> 8), byte(f.seed >> 16), byte(f.seed >> 24)}).Read(b)
	} else {
		pattern(b, f.seed, 0)
	}
	return b
}

func (f *soakFile) compare(path string) error {
	got, err := readStored(path)
	if err != nil {
		return err
	}
	if want := f.content(); !bytes.Equal(got, want) {
		return fmt.Errorf("%w: %s has %d bytes, want %d, the first difference at %d", errWrongBytes, filepath.Base(path), len(got), len(want), difference(got, want))
	}
	return nil
}

// rottenMax is how many nodes' disks may rot in one run.
const rottenMax = 4

var errWrongBytes = errors.New("wrong bytes")

// write makes files, replaces, renames and deletes them.
func (s *soak) write(ctx context.Context, rng *rand.Rand) {
	for i := 0; ctx.Err() == nil && !s.t.Failed(); i++ {
		name := fmt.Sprintf("file-%d", rng.IntN(60))
		s.mu.Lock()
		f := s.files[name]
		if f == nil {
			f = &soakFile{}
		}
		s.mu.Unlock()
		f.mu.Lock()
		path := filepath.Join(s.mnt, name)
		var err error
		if f.bytes > 0 && rng.IntN(8) == 0 {
			err = os.Remove(path)
			s.mu.Lock()
			delete(s.files, name)
			s.mu.Unlock()
		} else {
			f.seed, f.bytes = rng.Uint64(), 1+rng.IntN(1<<(10+rng.IntN(13)))
			if err = os.WriteFile(path+".new", f.content(), 0o600); err == nil {
				err = os.Rename(path+".new", path)
			}
			s.mu.Lock()
			s.files[name] = f
			s.mu.Unlock()
		}
		f.mu.Unlock()
		if err != nil {
			s.t.Errorf("write %s: %v", name, err)
		}
		s.mu.Lock()
		s.writes++
		s.mu.Unlock()
		pause(ctx, 40*time.Millisecond)
	}
}

// read reads files from the peers. One may fail while too many nodes are away,
// but never show other bytes.
func (s *soak) read(ctx context.Context, rng *rand.Rand) {
	for i := 0; ctx.Err() == nil && !s.t.Failed(); i++ {
		if i%20 == 0 {
			if err := s.dropCache(); err != nil {
				s.t.Error(err)
			}
		}
		s.mu.Lock()
		names := slices.Sorted(maps.Keys(s.files))
		var f *soakFile
		var name string
		if len(names) > 0 {
			name = names[rng.IntN(len(names))]
			f = s.files[name]
		}
		s.mu.Unlock()
		if f == nil {
			pause(ctx, 10*time.Millisecond)
			continue
		}
		f.mu.Lock()
		s.mu.Lock()
		there := s.files[name] == f
		s.mu.Unlock()
		if there {
			err := f.compare(filepath.Join(s.mnt, name))
			s.mu.Lock()
			s.reads++
			if err != nil {
				s.unanswered++
			}
			s.mu.Unlock()
			if errors.Is(err, errWrongBytes) || errors.Is(err, os.ErrNotExist) {
				s.t.Error(err)
			}
		}
		f.mu.Unlock()
	}
}

// planned are the faults that must have happened.
func (s *soak) planned() []string {
	all := []string{"killed", "stopped", "filled up", "lost its disk", "disk rotted"}
	if s.net != nil {
		all = append(all, "partitioned")
	}
	return all
}

func (s *soak) happened(fault string, nodes ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fired[fault]++
	s.t.Logf("%s: %v", fault, nodes)
}

// pick takes count of the first nodes that nothing is wrong with.
func (s *soak) pick(rng *rand.Rand, count, among int) (picked []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range rng.Perm(among) {
		if len(picked) < count && !slices.Contains(s.down, i) {
			picked = append(picked, i)
		}
	}
	s.down = append(s.down, picked...)
	return picked
}

func (s *soak) release(nodes []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = slices.DeleteFunc(s.down, func(i int) bool { return slices.Contains(nodes, i) })
}

// silence has nodes away, or full, for a while: up to two at a time.
func (s *soak) silence(ctx context.Context, rng *rand.Rand) {
	faults := []string{"killed", "stopped", "filled up"}
	if s.net != nil {
		faults = append(faults, "partitioned")
	}
	for i := 0; ctx.Err() == nil && !s.t.Failed(); i++ {
		fault := faults[i%len(faults)]
		nodes := s.pick(rng, 1+rng.IntN(2), len(s.nodes))
		for _, n := range nodes {
			switch fault {
			case "killed":
				s.nodes[n].kill()
			case "stopped":
				s.nodes[n].stop()
			case "filled up":
				s.restart(n, "1MiB")
			}
		}
		if fault == "partitioned" {
			others := []int{mountAddress}
			for n := range s.nodes {
				if !slices.Contains(nodes, n) {
					others = append(others, n)
				}
			}
			s.net.cut(nodes, others)
		}
		s.happened(fault, nodes...)
		// Some come back soon, some after they were given up.
		pause(ctx, s.away*time.Duration(1+rng.IntN(9))/10)
		for _, n := range nodes {
			switch fault {
			case "killed":
				s.startNode(n)
			case "stopped":
				s.nodes[n].resume()
			case "filled up":
				s.restart(n, "")
			}
		}
		if fault == "partitioned" {
			s.net.heal()
		}
		s.release(nodes)
		pause(ctx, s.away/10)
	}
}

// restart starts a node again with another capacity: one with less than it holds
// is full, and gives shards away.
func (s *soak) restart(node int, capacity string) {
	s.nodes[node].kill()
	s.nodes[node].capacity = capacity
	s.startNode(node)
}

// destroy takes or spoils what one node holds, and goes on when the pool has
// made up for it.
func (s *soak) destroy(ctx context.Context) {
	for i := 0; ctx.Err() == nil && !s.t.Failed(); i++ {
		pause(ctx, 2*time.Second)
		rots := i%2 == 1
		among := len(s.nodes)
		if rots {
			among = rottenMax // a disk that rots is not trusted for days
		}
		nodes := s.pick(s.rng, 1, among)
		if len(nodes) == 0 {
			continue
		}
		n := s.nodes[nodes[0]]
		if !rots {
			n.kill()
			check(s.t, os.RemoveAll(filepath.Join(n.dir, "shards")))
			s.startNode(nodes[0])
			s.happened("lost its disk", nodes...)
		} else {
			n.lie(s.t)
			s.happened("disk rotted", nodes...)
		}
		began := time.Now()
		for quiet := 0; quiet < 2 && time.Since(began) < 2*time.Minute && ctx.Err() == nil; {
			pause(ctx, s.calm) // longer than between two looks at all stripes, unless the run is short
			if quiet++; s.broken() > 0 {
				quiet = 0
			}
		}
		s.release(nodes)
	}
}

// broken counts what the nodes that answer know to be broken.
func (s *soak) broken() (count int64) {
	for _, n := range s.nodes {
		if st, err := n.ask(); err == nil {
			count += st.Repair.Broken
		}
	}
	return count
}

// ask is status without a process of its own. A stopped node does not answer.
func (n *node) ask() (st control.Node, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	client, err := control.Dial(ctx, n.dir)
	if err != nil {
		return st, err
	}
	defer client.Close()
	return client.Node(ctx)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// measure is what a process uses.
type measure struct{ pid, goroutines, descriptors, residentMiB int }

// measure looks at mount and nodes now and then.
func (s *soak) measure(ctx context.Context) {
	for ctx.Err() == nil {
		all := make(map[string]measure)
		if m, err := measureProcess(s.mount.cmd.Process.Pid, s.device); err == nil {
			all["mount"] = m
		}
		for i, n := range s.nodes {
			s.mu.Lock()
			down := slices.Contains(s.down, i)
			s.mu.Unlock()
			if down {
				continue
			}
			if m, err := measureProcess(n.cmd.Process.Pid, n.dir); err == nil {
				all[fmt.Sprint("node ", i)] = m
			}
		}
		s.mu.Lock()
		s.measures = append(s.measures, all)
		s.mu.Unlock()
		pause(ctx, 5*time.Second)
	}
}

func measureProcess(pid int, dir string) (m measure, err error) {
	m.pid = pid
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return m, err
	}
	m.descriptors = len(descriptors)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return m, err
	}
	_, rss, _ := strings.Cut(string(status), "VmRSS:")
	if _, err := fmt.Sscan(rss, &m.residentMiB); err != nil {
		return m, err
	}
	m.residentMiB >>= 10
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dir, "control.sock"))
	}}}
	rep, err := client.Get("http://defs/debug/pprof/goroutine?debug=1")
	if err != nil {
		return m, err
	}
	defer rep.Body.Close()
	_, err = fmt.Fscanf(bufio.NewReader(rep.Body), "goroutine profile: total %d", &m.goroutines)
	return m, err
}

// compareMeasures holds the last fifth of the run against the second: what grows
// with time, and not with the pool, shows there.
func (s *soak) compareMeasures() {
	at := func(from, to int) map[string]measure { // the largest of each process
		most := make(map[string]measure)
		for _, all := range s.measures[from:to] {
			for name, m := range all {
				old := most[name]
				if old.pid != 0 && old.pid != m.pid {
					old = measure{}
				}
				most[name] = measure{m.pid, max(m.goroutines, old.goroutines), max(m.descriptors, old.descriptors), max(m.residentMiB, old.residentMiB)}
			}
		}
		return most
	}
	count := len(s.measures)
	early, late := at(count/5, max(2*count/5, count/5+1)), at(min(4*count/5, count-1), count)
	compared := 0
	for name, now := range late {
		before, ok := early[name]
		if !ok || before.pid != now.pid {
			continue // it was started again in between
		}
		compared++
		if now.goroutines > 2*before.goroutines+200 || now.descriptors > 2*before.descriptors+100 || now.residentMiB > 2*before.residentMiB+100 {
			s.t.Errorf("%s has grown: %+v, then %+v", name, before, now)
		}
		if name == "mount" || compared <= 2 {
			s.t.Logf("%s: %+v, then %+v", name, before, now)
		}
	}
	if compared == 0 {
		s.t.Error("no process lived long enough to be measured")
	}
}
