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
	for _, n := range []int{5 << 20, 17 << 20} { // a copy should end now and then
		os.Remove(filepath.Join(source, fmt.Sprint("random-", n)))
	}
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
			&copier{source: source, dir: dir + "/copy"},
		}
		steps += crashUnder(t, c, loads, 300+rand.Int64N(1500))
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
}

// crashUnder runs the loads, kills the mount when they have done so many steps,
// and returns how many there were. No load may fail before.
func crashUnder(t *testing.T, c *cluster, loads []load, stepsMin int64) int64 {
	t.Helper()
	var steps atomic.Int64
	var killed atomic.Bool
	var working sync.WaitGroup
	for _, l := range loads {
		working.Go(func() {
			for {
				if err := l.step(); err != nil {
					if !killed.Load() {
						t.Errorf("an operation failed before the crash: %v", err)
					}
					return
				}
				steps.Add(1)
			}
		})
	}
	eventually(t, time.Minute, "the loads work", func() bool { return steps.Load() >= stepsMin || t.Failed() })
	killed.Store(true)
	c.killMount()
	working.Wait()
	for _, l := range loads {
		l.close()
	}
	return steps.Load()
}
