package integration

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// readBound is the longest that any read may take.
const readBound = 30 * time.Second

// TestSurvivesLosses kills nodes one by one, at random. Up to the promise in
// survives_losses every byte can be read at each step; beyond it a read gives
// the right bytes or EIO, in time.
func TestSurvivesLosses(t *testing.T) {
	for _, c := range []struct {
		name, policy string
		nodes        int
		promise      int
	}{
		{"mirrored", "4+2,mirror=on", 14, 5},
		{"unmirrored", "4+2,mirror=off", 6, 2},
	} {
		t.Run(c.name, func(t *testing.T) { losses(t, c.policy, c.nodes, c.promise) })
	}
}

func losses(t *testing.T, policy string, nodes, promise int) {
	c := newCluster(t, policy, nodes)
	c.mountNow()
	c.waitNodes(nodes)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	files := map[string][]byte{}
	for i, n := range []int{1, 4095, 70_000, 300_000, 1<<20 + 1, 2 << 20, 5<<20 + 17} {
		b := make([]byte, n)
		source.Read(b)
		path := filepath.Join(c.mnt, fmt.Sprint("file-", i))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		files[path] = b
	}
	c.waitDurable(60 * time.Second)
	eventually(t, 30*time.Second, "nothing is left on this disk", func() bool {
		if err := c.dropCache(); err != nil {
			t.Fatal(err)
		}
		return sizeBelow(t, filepath.Join(c.device, "journal")) < 256<<10
	})
	if got := c.status().SurvivesLosses; got.Nodes != promise || got.Hosts != promise {
		t.Fatalf("%s on %d nodes promises to survive the loss of %+v, want %d", policy, nodes, got, promise)
	}

	order := rand.New(source).Perm(nodes)
	for i, victim := range order[:promise] {
		c.nodes[victim].kill()
		if failed := c.readAll(files); len(failed) > 0 {
			t.Fatalf("%d of %d nodes lost (%v), %d were promised: %v", i+1, nodes, order[:i+1], promise, failed)
		}
	}
	// What is promised now holds for whatever comes next.
	c.waitNodes(nodes - promise)
	left := c.status().SurvivesLosses.Nodes
	for _, victim := range order[promise : promise+left] {
		c.nodes[victim].kill()
	}
	if failed := c.readAll(files); len(failed) > 0 {
		t.Fatalf("%d of %d nodes lost, %d more were promised: %v", promise+left, nodes, left, failed)
	}
	t.Logf("lost %v, and %d more that were promised then", order[:promise], left)

	// One node fewer than the smallest number of data shards that a stripe may have.
	for _, victim := range order[promise+left : nodes-1] {
		c.nodes[victim].kill()
	}
	failed := c.readAll(files)
	if len(failed) == 0 {
		t.Fatal("everything can be read from one node")
	}
	t.Logf("with one node %d of %d files cannot be read", len(failed), len(files))
	if entries, err := os.ReadDir(c.mnt); err != nil || len(entries) != len(files) {
		t.Errorf("the directory has %d entries, %v", len(entries), err)
	}
	// They come back, and so does every byte.
	if order[nodes-1] != 0 {
		c.startNode(0) // whom the others ask first
	}
	var starting sync.WaitGroup
	for _, victim := range order[:nodes-1] {
		if victim != 0 {
			starting.Go(func() { c.startNode(victim) })
		}
	}
	starting.Wait()
	eventually(t, 30*time.Second, "every byte is back", func() bool { return len(c.readAll(files)) == 0 })
}

// readAll reads all files from the peers, each at the same time, and returns
// the errors. Other bytes than were written, another error than EIO, or a read
// that takes too long, ends the test.
func (c *cluster) readAll(files map[string][]byte) (failed []error) {
	c.t.Helper()
	if err := c.dropCache(); err != nil {
		c.t.Fatal(err)
	}
	var mu sync.Mutex
	var reading sync.WaitGroup
	for path, want := range files {
		reading.Go(func() {
			began := time.Now()
			err := readSame(path, want)
			took := time.Since(began)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = append(failed, fmt.Errorf("%s: %w", filepath.Base(path), err))
			}
			if took > readBound || (err != nil && !errors.Is(err, syscall.EIO)) {
				c.t.Errorf("%s after %v: %v", filepath.Base(path), took, err)
			}
		})
	}
	reading.Wait()
	if c.t.Failed() {
		c.t.FailNow()
	}
	return failed
}

// readSame compares a file with what it should be, without the kernel's help.
func readSame(path string, want []byte) error {
	got, err := readStored(path)
	if err == nil && !bytes.Equal(got, want) {
		err = errors.New("other bytes")
	}
	return err
}
