package integration

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Nodes die one after the other, more of them than a stripe's parity makes up
// for, while nobody has the volume mounted. The nodes that are left rebuild what
// is lost before the next one dies, so that the owner finds everything.
func TestPoolRepairsItself(t *testing.T) {
	const nodes, deaths = 10, 4
	c := newCluster(t, "4+2", nodes, func(c *cluster) { c.patience = suspectAfter })
	c.mountNow()
	c.waitNodes(nodes)
	files := &coldFiles{c: c, count: 24, bytes: 1 << 20}
	files.make()
	c.waitDurable(60 * time.Second)
	if losses := c.status().SurvivesLosses.Nodes; losses >= deaths {
		t.Fatalf("%d nodes may be lost at once: killing %d shows nothing", losses, deaths)
	}
	c.unmount()
	for died := 1; died <= deaths; died++ {
		c.nodes[nodes-died].kill()
		took := eventually(t, 60*time.Second, "the others have made up for the loss", func() bool {
			for _, n := range c.nodes[:nodes-died] {
				if !n.whole(t, died) {
					return false
				}
			}
			return true
		})
		t.Logf("loss %d: whole again after %v, of which %v for finding the node dead", died, took.Round(time.Millisecond), c.patience)
	}
	c.mountNow()
	c.waitNodes(nodes - deaths)
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	for i := range files.count {
		if err := files.read(i); err != nil {
			t.Error(err)
		}
	}
}

var lookedAt = regexp.MustCompile(`were looked at\.".* silent_nodes=(\d+) with_lost_shards=(\d+)`)

// whole says whether the node has noticed that so many others are silent, and has
// nothing to repair.
func (n *node) whole(t *testing.T, silent int) bool {
	t.Helper()
	log, err := os.ReadFile(n.log)
	if err != nil {
		t.Fatal(err)
	}
	looks := lookedAt.FindAllSubmatchIndex(log, -1)
	if len(looks) == 0 {
		return false
	}
	last := looks[len(looks)-1]
	count := func(i int) string { return string(log[last[2*i]:last[2*i+1]]) }
	if count(1) != strconv.Itoa(silent) {
		return false
	}
	return count(2) == "0" || strings.Contains(string(log[last[1]:]), "are whole again")
}
