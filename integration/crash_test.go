package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// crashes returns how often the crash tests crash something.
func crashes(t *testing.T) int {
	text := os.Getenv("DEFS_CRASHES")
	if text == "" {
		return 5
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("DEFS_CRASHES=%q is no count", text)
	}
	return n
}

// remountMax is how long a mount may take to come back after a crash.
const remountMax = 5 * time.Second

// The process that serves the mount is killed in the middle of work. What was
// acknowledged is there when it is back, and nothing is half done.
func TestMountKilled(t *testing.T) {
	c := newCluster(t, "4+2", 6)
	source := filepath.Join(c.dir, "source")
	if err := os.Mkdir(source, 0o700); err != nil {
		t.Fatal(err)
	}
	makeTree(t, source)
	c.mountNow()
	var all []load
	var slowest time.Duration
	var steps int64
	for round := range crashes(t) {
		dir := filepath.Join(c.mnt, fmt.Sprint("round-", round))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		seed := uint64(round+1) * 10
		loads := []load{
			&appender{path: dir + "/written", seed: seed},
			&appender{path: dir + "/synced", seed: seed + 1, sync: true},
			&overwriter{path: dir + "/overwritten"},
			&replacer{path: dir + "/replaced"},
			&replacer{path: dir + "/replaced-synced", sync: true},
			&gardener{dir: dir + "/names"},
			&database{path: dir + "/delete.db", mode: "delete"},
			&database{path: dir + "/wal.db", mode: "wal"},
			&copier{source: source + "/dir-2", dir: dir + "/copy"},
		}
		steps += crashUnder(t, c, loads, 300+rand.Int64N(1500))
		if round%2 == 1 { // else the mount itself is the first to open what the crash left
			c.fsck()
		}
		slowest = max(slowest, c.mountNow())
		for _, l := range loads {
			if err := l.check(); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if t.Failed() {
			return
		}
		all = append(all, loads...)
	}
	var copies, transactions int
	for _, l := range all {
		switch l := l.(type) {
		case *copier:
			copies += l.copied
		case *database:
			transactions += l.acknowledged
		}
	}
	t.Logf("%d whole copies, %d transactions", copies, transactions)
	t.Logf("%d crashes, %d operations acknowledged, slowest mount %v", crashes(t), steps, slowest.Round(time.Millisecond))
	if slowest > remountMax {
		t.Errorf("a mount took %v to come back, at most %v was promised", slowest, remountMax)
	}

	// Also once it comes from the peers.
	t.Logf("durable after %v", c.waitDurable(2*time.Minute).Round(time.Millisecond))
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	c.unmount()
	c.mountNow()
	for _, l := range all {
		if err := l.check(); err != nil {
			t.Errorf("from the peers: %v", err)
		}
	}
	c.unmount()
	c.fsck()
}

// The loads notice what a crash must not do. This needs no mount.
func TestLoadsNotice(t *testing.T) {
	truncate := func(path string) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, info.Size()-1)
	}
	for name, test := range map[string]struct {
		load   func(path string) load
		damage func(path string) error
	}{
		"an end cut off":        {func(p string) load { return &appender{path: p} }, truncate},
		"a lost block":          {func(p string) load { return &overwriter{path: p} }, func(p string) error { return os.Truncate(p, 0) }},
		"half a file":           {func(p string) load { return &replacer{path: p} }, truncate},
		"a lost name":           {func(p string) load { return &gardener{dir: p} }, os.RemoveAll},
		"a name come back":      {func(p string) load { return &gardener{dir: p} }, func(p string) error { return os.Mkdir(p+"/n1", 0o700) }},
		"a lost transaction":    {func(p string) load { return &database{path: p, mode: "delete"} }, deleteLast},
		"a file lost in a copy": {func(p string) load { return &copier{source: ".", dir: p} }, func(p string) error { return os.Remove(p + "-1/main_test.go") }},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x")
			l := test.load(path)
			for range 22 {
				if err := l.step(); err != nil {
					t.Fatal(err)
				}
			}
			l.close()
			if err := l.check(); err != nil {
				t.Fatal(err)
			}
			if err := test.damage(path); err != nil {
				t.Fatal(err)
			}
			if err := l.check(); err == nil {
				t.Error("not noticed")
			}
		})
	}
}

func deleteLast(path string) error {
	_, err := try(toolTimeout, "sqlite3", path, "DELETE FROM t WHERE id = (SELECT max(id) FROM t);")
	return err
}

// crashUnder runs the loads, kills the mount when they have done so many steps,
// each at least two, and returns how many there were. No load may fail before.
func crashUnder(t *testing.T, c *cluster, loads []load, stepsMin int64) int64 {
	t.Helper()
	steps := make([]atomic.Int64, len(loads))
	total := func() (sum int64) {
		for i := range steps {
			sum += steps[i].Load()
		}
		return sum
	}
	least := func() int64 {
		n := steps[0].Load()
		for i := range steps {
			n = min(n, steps[i].Load())
		}
		return n
	}
	var killed atomic.Bool
	var working sync.WaitGroup
	for i, l := range loads {
		working.Go(func() {
			for {
				if err := l.step(); err != nil {
					if !killed.Load() {
						t.Errorf("an operation failed before the crash: %v", err)
					}
					return
				}
				steps[i].Add(1)
			}
		})
	}
	eventually(t, time.Minute, "the loads work", func() bool {
		return total() >= stepsMin && least() >= 2 || t.Failed()
	})
	killed.Store(true)
	c.killMount()
	working.Wait()
	for _, l := range loads {
		l.close()
	}
	return total()
}
