package integration

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/defs-fs/defs/control"
)

// nodeStatus asks a node's process for its figures.
func (n *node) status(t *testing.T) (st control.Node) {
	t.Helper()
	out := run(t, 30*time.Second, program("defs"), "node", "status", "--json", "--data", n.dir)
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

// A node is emptied by a command while the volume is in use, and goes for good.
// Damage on the disk of another one is found although nobody reads it. New nodes
// hold the shards, the owner finds everything, and the states say so.
func TestDrainAndScrub(t *testing.T) {
	const nodes = 9
	c := newCluster(t, "4+2", nodes, func(c *cluster) {
		c.patience = suspectAfter
		c.nodeFlags = []string{"--scrub-every", "2s"}
	})
	c.mountNow()
	c.waitNodes(nodes)
	files := &coldFiles{c: c, count: 24, bytes: 1 << 20}
	files.make()
	c.waitDurable(60 * time.Second)

	leaving := c.nodes[nodes-1]
	before := leaving.status(t)
	if before.Shards == 0 {
		t.Fatal("the node to drain holds nothing")
	}
	began := time.Now()
	said := run(t, 60*time.Second, program("defs"), "node", "drain", "--data", leaving.dir)
	if !strings.Contains(said, "is empty: "+fmt.Sprint(before.Shards)+" shard") {
		t.Errorf("it says: %s", said)
	}
	t.Logf("%d shards, %d MiB, left in %v", before.Shards, before.UsedBytes>>20, time.Since(began).Round(time.Millisecond))
	if after := leaving.status(t); after.Shards != 0 || !after.Moves.Draining {
		t.Errorf("after the drain: %+v", after)
	}
	leaving.kill()

	damaged := c.nodes[1]
	bits := damaged.lie(t)
	took := eventually(t, 60*time.Second, "scrubbing finds the damage, and nothing is left to repair", func() bool {
		if damaged.status(t).Scrub.Damaged == 0 {
			return false
		}
		for _, n := range c.nodes[:nodes-1] {
			if !n.whole(t, 1) {
				return false
			}
		}
		return true
	})
	t.Logf("%d bits flipped, found and made up for after %v: %+v", bits, took.Round(time.Millisecond), damaged.status(t).Scrub)
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	for i := range files.count {
		if err := files.read(i); err != nil {
			t.Error(err)
		}
	}
	peers := run(t, 30*time.Second, program("defs"), "peers", "--data", c.nodes[0].dir)
	if !strings.Contains(peers, "TRUST") || strings.Count(peers, "\n") < nodes {
		t.Errorf("peers of a node: %s", peers)
	}
}

// The owner's device learns where a drained node has put its shards, counts on
// it for nothing more.
func TestOwnerLearnsOfADrain(t *testing.T) {
	const nodes = 8
	c := newCluster(t, "4+2", nodes)
	c.mountNow()
	c.waitNodes(nodes)
	(&coldFiles{c: c, count: 12, bytes: 1 << 20}).make()
	c.waitDurable(60 * time.Second)

	drain := func(leaving *node) {
		before := leaving.status(t)
		if before.Shards == 0 {
			t.Fatal("the node to drain holds nothing")
		}
		run(t, 60*time.Second, program("defs"), "node", "drain", "--data", leaving.dir)
		leaving.kill()
	}
	whole := func(left int) {
		t.Helper()
		var last control.Status
		took := eventually(t, 60*time.Second, "all stripes are whole again", func() bool {
			last = c.status()
			return last.Pool.Nodes == left && last.Health.Degraded+last.Health.Unreachable+last.Health.Lost == 0 && last.Bytes.Recoverable == 0
		})
		t.Logf("whole after %v: %+v", took.Round(time.Millisecond), last.Health)
	}
	drain(c.nodes[nodes-1])
	whole(nodes - 1)
	// What is new finds all its keepers among those that are left.
	c.write(filepath.Join(c.mnt, "small"), "abc")
	t.Logf("durable after %v", c.waitDurable(60*time.Second).Round(time.Millisecond))

	// Nobody is there to learn of the next one.
	c.unmount()
	drain(c.nodes[nodes-2])
	c.mountNow()
	whole(nodes - 2)
	c.waitDurable(60 * time.Second)
}
