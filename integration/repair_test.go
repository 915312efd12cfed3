package integration

import (
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
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

// An application reads from the peers while the pool makes up for a node that
// has died. Every read is right; in the long form (DEFS_REPAIR_MIB=512) the
// slowest hundredth takes at most twice as long as before.
func TestReadsDuringRepair(t *testing.T) {
	const nodes = 10
	mib := 64
	long := os.Getenv("DEFS_REPAIR_MIB")
	if long != "" {
		var err error
		mib, err = strconv.Atoi(long)
		check(t, err)
	}
	c := newCluster(t, "4+2", nodes, func(c *cluster) { c.patience = suspectAfter })
	c.mountNow()
	c.waitNodes(nodes)
	files := &coldFiles{c: c, count: mib / 4, bytes: 4 << 20}
	files.make()
	c.waitDurable(3 * time.Minute)
	broken := func() (stripes int64) {
		for _, n := range c.nodes[:nodes-1] {
			if st, err := n.ask(); err == nil {
				stripes += st.Repair.Broken
			}
		}
		return stripes
	}
	// Reads of 128 KiB anywhere, from the peers, for as long as going says so.
	reads := func(going func(reads int) bool) (took []time.Duration) {
		rng := rand.New(rand.NewPCG(1, uint64(mib)))
		for i := 0; going(i); i++ {
			if i%8 == 0 {
				check(t, c.dropCache())
			}
			file, part := rng.IntN(files.count), int64(rng.IntN(32))<<17
			f, err := os.Open(files.path(file))
			check(t, err)
			check(t, forgetPages(f))
			b := make([]byte, 128<<10)
			began := time.Now()
			_, err = f.ReadAt(b, part)
			took = append(took, time.Since(began))
			check(t, err)
			check(t, f.Close())
			if i%16 == 0 && difference(b, files.content(file)[part:part+128<<10]) >= 0 {
				t.Fatalf("file %d differs", file)
			}
		}
		slices.Sort(took)
		return took
	}
	before := reads(func(n int) bool { return n < 400 })
	moved := func() (bytes int64) {
		for _, n := range c.nodes[:nodes-1] {
			if st, err := n.ask(); err == nil {
				bytes += st.BackgroundBytes
			}
		}
		return bytes
	}
	c.nodes[nodes-1].kill()
	// Reads go around the dead node by now: what follows is the repair's doing.
	eventually(t, 30*time.Second, "the repair begins", func() bool { return broken() > 0 })
	began, atFirst := time.Now(), moved()
	during := reads(func(n int) bool { return n < 50 || n%8 != 0 || broken() > 0 && time.Since(began) < time.Minute })
	took := time.Since(began)
	rate := float64(moved()-atFirst) / took.Seconds() / (1 << 20)
	p := func(all []time.Duration, hundredth int) time.Duration {
		return all[len(all)*hundredth/100].Round(10 * time.Microsecond)
	}
	t.Logf("%d MiB: %d reads before: median %v, p99 %v; %d in %v of repair at %.1f MiB/s: median %v, p99 %v", mib,
		len(before), p(before, 50), p(before, 99), len(during), took.Round(time.Millisecond), rate, p(during, 50), p(during, 99))
	if long != "" && p(during, 99) > 2*p(before, 99) {
		t.Errorf("the slowest hundredth of the reads takes more than twice as long during a repair")
	}
}
