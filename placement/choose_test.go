package placement_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/defs-fs/defs/placement"
	"pgregory.net/rapid"
)

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 11)) }

// pool returns count equal nodes, each on a host of its own.
func pool(count int) []placement.Node {
	nodes := make([]placement.Node, count)
	for i := range nodes {
		nodes[i] = placement.Node{ID: placement.NodeID(fmt.Sprint("node", i)), Alive: true, Uptime: 1}
	}
	return nodes
}

func byID(nodes []placement.Node) map[placement.NodeID]placement.Node {
	index := make(map[placement.NodeID]placement.Node)
	for _, node := range nodes {
		index[node.ID] = node
	}
	return index
}

// copies lists all nodes of the pairs and fails on a node that is used twice,
// unknown, or not usable.
func copies(t rapid.TB, pairs []placement.Pair, nodes []placement.Node, mirror bool) []placement.Node {
	t.Helper()
	index := byID(nodes)
	seen := map[placement.NodeID]bool{}
	var used []placement.Node
	add := func(id placement.NodeID) {
		node, ok := index[id]
		if !ok || seen[id] || placement.Score(node) <= 0 {
			t.Fatalf("node %q is unknown, used twice or unusable", id)
		}
		seen[id] = true
		used = append(used, node)
	}
	for _, pair := range pairs {
		add(pair.Primary)
		if mirror {
			add(pair.Mirror)
		} else if pair.Mirror != "" {
			t.Fatal("a mirror that nobody asked for")
		}
	}
	return used
}

func drawPool(t *rapid.T) []placement.Node {
	nodes := pool(rapid.IntRange(0, 40).Draw(t, "nodes"))
	hosts, zones := rapid.IntRange(1, 20).Draw(t, "hosts"), rapid.IntRange(1, 4).Draw(t, "zones")
	for i := range nodes {
		host := rapid.IntRange(0, hosts-1).Draw(t, "host")
		nodes[i].Host, nodes[i].Subnet, nodes[i].Zone = fmt.Sprint("h", host), fmt.Sprint("s", host/2), fmt.Sprint("z", host/2%zones)
		nodes[i].Alive = rapid.IntRange(0, 9).Draw(t, "alive") > 0
		nodes[i].Uptime = rapid.Float64Range(0, 1).Draw(t, "uptime")
		nodes[i].CapacityBytes = rapid.SampledFrom([]uint64{0, 1 << 30, 1 << 40}).Draw(t, "capacity")
		nodes[i].UsedBytes = rapid.SampledFrom([]uint64{0, 1 << 29, 1 << 30}).Draw(t, "used")
		for range rapid.IntRange(0, 4).Draw(t, "partners") {
			partner := rapid.IntRange(0, len(nodes)-1).Draw(t, "partner")
			nodes[i].Partners = append(nodes[i].Partners, nodes[partner].ID)
		}
	}
	return nodes
}

func TestChooseProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := drawPool(t)
		n, mirror := rapid.IntRange(0, 14).Draw(t, "n"), rapid.Bool().Draw(t, "mirror")
		pairs, err := placement.Choose(newRand(rapid.Uint64().Draw(t, "seed")), nodes, n, mirror)
		freeOnHost := map[string]int{}
		usable := 0
		for _, node := range nodes {
			if placement.Score(node) > 0 {
				usable++
				freeOnHost[node.Host]++
			}
		}
		needed := n
		if mirror {
			needed = 2 * n
		}
		if usable < needed {
			if !errors.Is(err, placement.ErrTooFewNodes) {
				t.Fatalf("%d usable for %d: %v", usable, needed, err)
			}
			return
		}
		if err != nil || len(pairs) != n {
			t.Fatalf("%d pairs for %d: %v", len(pairs), n, err)
		}
		used := copies(t, pairs, nodes, mirror)
		if !mirror {
			checkEvenSpread(t, used, freeOnHost)
			return
		}
		// Every pair lies on two hosts whenever that is possible for all.
		room := 0
		for _, free := range freeOnHost {
			room += min(free, n)
		}
		index := byID(nodes)
		for _, pair := range pairs {
			if room >= 2*n && index[pair.Primary].Host == index[pair.Mirror].Host {
				t.Fatalf("%v share host %s", pair, index[pair.Primary].Host)
			}
		}
	})
}

// Pools that can just be paired: a careless early pair would leave only nodes
// of one host for a later one.
func TestChooseKeepsPairsApartInTightPools(t *testing.T) {
	for _, sizes := range [][]int{{1, 1}, {2, 1, 1}, {2, 2}, {3, 1, 1, 1}, {3, 2, 1}, {4, 2, 1, 1}, {3, 3, 2}, {5, 1, 1, 1, 1, 1, 2}} {
		var nodes []placement.Node
		for host, size := range sizes {
			for range size {
				node := pool(1)[0]
				node.ID, node.Host = placement.NodeID(fmt.Sprint("node", len(nodes))), fmt.Sprint(host)
				nodes = append(nodes, node)
			}
		}
		for i := range nodes { // partners on the own host must not mislead
			nodes[i].Partners = []placement.NodeID{nodes[0].ID, nodes[1].ID}
		}
		index := byID(nodes)
		for seed := range uint64(200) {
			pairs, err := placement.Choose(newRand(seed), nodes, len(nodes)/2, true)
			if err != nil {
				t.Fatal(err)
			}
			for _, pair := range pairs {
				if index[pair.Primary].Host == index[pair.Mirror].Host {
					t.Fatalf("hosts of %v nodes, seed %d: %v share one", sizes, seed, pair)
				}
			}
		}
	}
}

// checkEvenSpread fails when a host holds two copies more than one that still
// has a free node.
func checkEvenSpread(t *rapid.T, used []placement.Node, freeOnHost map[string]int) {
	count := map[string]int{}
	for _, node := range used {
		count[node.Host]++
	}
	for _, node := range used {
		for host, free := range freeOnHost {
			if count[host] < free && count[node.Host] > count[host]+1 {
				t.Fatalf("host %s has %d copies, %s only %d of %d", node.Host, count[node.Host], host, count[host], free)
			}
		}
	}
}

// Subnets and zones are kept apart as well while hosts allow it.
func TestChooseSpreadsOverSubnetsAndZones(t *testing.T) {
	nodes := pool(24) // 12 hosts in 6 subnets in 3 zones
	for i := range nodes {
		nodes[i].Host, nodes[i].Subnet, nodes[i].Zone = fmt.Sprint(i/2), fmt.Sprint(i/4), fmt.Sprint(i/8)
	}
	for seed := range uint64(50) {
		for n, want := range map[int][3]int{3: {3, 3, 3}, 6: {6, 6, 3}, 9: {9, 6, 3}} {
			pairs, err := placement.Choose(newRand(seed), nodes, n, false)
			if err != nil {
				t.Fatal(err)
			}
			domains := [3]map[string]bool{{}, {}, {}}
			for _, node := range copies(t, pairs, nodes, false) {
				domains[0][node.Host], domains[1][node.Subnet], domains[2][node.Zone] = true, true, true
			}
			if got := [3]int{len(domains[0]), len(domains[1]), len(domains[2])}; got != want {
				t.Fatalf("seed %d, %d shards: on %v hosts, subnets, zones, want %v", seed, n, got, want)
			}
		}
	}
}

// The pool of one computer: all nodes share a host, and the choice still works.
func TestChooseOnOneHost(t *testing.T) {
	nodes := pool(14)
	for i := range nodes {
		nodes[i].Host, nodes[i].Subnet, nodes[i].Zone = "here", "127.0.0.0/8", ""
	}
	pairs, err := placement.Choose(newRand(1), nodes, 6, true)
	if err != nil {
		t.Fatal(err)
	}
	copies(t, pairs, nodes, true)
	if nodes, hosts := placement.SurvivesLosses(pairs, 4, func(placement.NodeID) string { return "here" }); nodes != 5 || hosts != 0 {
		t.Fatalf("survives %d nodes, %d hosts", nodes, hosts)
	}
}

func TestChoosePrefersPartners(t *testing.T) {
	nodes := pool(20)
	for i := range nodes {
		nodes[i].Zone = fmt.Sprint(i % 3) // partners lie in different zones,
		partner := i ^ 1                  // each node has one,
		nodes[i].Partners = []placement.NodeID{nodes[partner].ID}
	}
	nodes[4].Partners = nil // and one of a pair knows it already
	for seed := range uint64(100) {
		pairs, err := placement.Choose(newRand(seed), nodes, 7, true)
		if err != nil {
			t.Fatal(err)
		}
		index := byID(nodes)
		for _, pair := range pairs {
			a, b := index[pair.Primary], index[pair.Mirror]
			if !(len(a.Partners) > 0 && a.Partners[0] == b.ID) && !(len(b.Partners) > 0 && b.Partners[0] == a.ID) {
				t.Fatalf("seed %d: %v are no partners", seed, pair)
			}
		}
	}
	nodes[0].Alive = false // where no partner is eligible, another node serves
	found := false
	for seed := range uint64(100) {
		pairs, err := placement.Choose(newRand(seed), nodes, 9, true)
		if err != nil {
			t.Fatal(err)
		}
		for _, pair := range pairs {
			found = found || pair.Primary == nodes[1].ID || pair.Mirror == nodes[1].ID
		}
	}
	if !found {
		t.Fatal("a node without a live partner was never used")
	}
}

func TestChooseTooFewNodes(t *testing.T) {
	nodes := pool(12)
	nodes[3].Alive = false
	nodes[4].CapacityBytes, nodes[4].UsedBytes = 5, 5
	nodes = append(nodes, nodes[0]) // a node listed twice counts once
	if _, err := placement.Choose(newRand(1), nodes, 10, false); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		n      int
		mirror bool
	}{{11, false}, {6, true}, {-1, false}} {
		if _, err := placement.Choose(newRand(1), nodes, c.n, c.mirror); !errors.Is(err, placement.ErrTooFewNodes) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// chiSquare returns the statistic of counts against expected ones.
func chiSquare(counts map[placement.NodeID]int, expected map[placement.NodeID]float64) float64 {
	sum := 0.0
	for id, want := range expected {
		diff := float64(counts[id]) - want
		sum += diff * diff / want
	}
	return sum
}

// A seeded run must fit the distribution: weights in proportion to scores for
// one draw, equal nodes alike for whole stripes. The bounds are the 0.1 %
// quantiles of chi-square with 9 degrees of freedom.
func TestChooseIsRandomByScore(t *testing.T) {
	const quantile, draws = 27.88, 8000
	weighted, total := pool(10), 0.0
	for i := range weighted {
		weighted[i].LatencyMs = float64(1 + 20*i)
		weighted[i].CapacityBytes = uint64(1+i%3) << 36
		total += placement.Score(weighted[i])
	}
	counts, expected := map[placement.NodeID]int{}, map[placement.NodeID]float64{}
	for _, node := range weighted {
		expected[node.ID] = draws * placement.Score(node) / total
	}
	rng := newRand(7)
	for range draws {
		pairs, err := placement.Choose(rng, weighted, 1, false)
		if err != nil {
			t.Fatal(err)
		}
		counts[pairs[0].Primary]++
	}
	if x := chiSquare(counts, expected); x > quantile {
		t.Errorf("weighted draws: chi-square %.1f > %.1f", x, quantile)
	}

	equal := pool(10)
	for i := range equal {
		equal[i].Host = fmt.Sprint("host", i/2)
	}
	for _, c := range []struct {
		n      int
		mirror bool
	}{{4, false}, {3, true}} {
		first := map[placement.NodeID]int{}
		for id := range expected {
			expected[id] = draws / 10
		}
		for range draws {
			pairs, err := placement.Choose(rng, equal, c.n, c.mirror)
			if err != nil {
				t.Fatal(err)
			}
			last := pairs[len(pairs)-1].Primary // no shard number has a favourite
			first[last]++
		}
		if x := chiSquare(first, expected); x > quantile {
			t.Errorf("%d shards, mirror %v: chi-square %.1f > %.1f", c.n, c.mirror, x, quantile)
		}
	}
}

func TestShardRoom(t *testing.T) {
	for _, c := range []struct{ capacity, used, want uint64 }{
		{0, 0, 0},
		{16 << 20, 0, 15 << 20},
		{16 << 20, 14 << 20, 1 << 20},
		{16 << 20, 15 << 20, 0},
		{16 << 20, 17 << 20, 0},
		{1 << 40, 0, 1<<40 - 4<<30},
	} {
		if got := placement.ShardRoom(c.capacity, c.used); got != c.want {
			t.Errorf("room of %d with %d used: %d, want %d", c.capacity, c.used, got, c.want)
		}
	}
}

func TestScore(t *testing.T) {
	good := placement.Node{Alive: true, CapacityBytes: 1 << 40, LatencyMs: 5, BandwidthBps: 50 << 20, Uptime: 0.99}
	better := func(name string, change func(*placement.Node)) {
		t.Helper()
		worse := good
		change(&worse)
		if placement.Score(worse) >= placement.Score(good) || placement.Score(worse) < 0 {
			t.Errorf("%s: %v, not below %v", name, placement.Score(worse), placement.Score(good))
		}
	}
	better("fuller", func(n *placement.Node) { n.UsedBytes = 1 << 39 })
	better("smaller", func(n *placement.Node) { n.CapacityBytes = 1 << 35 })
	better("farther", func(n *placement.Node) { n.LatencyMs = 200 })
	better("slower", func(n *placement.Node) { n.BandwidthBps = 1 << 20 })
	better("less stable", func(n *placement.Node) { n.Uptime = 0.5 })
	better("dead", func(n *placement.Node) { n.Alive = false })
	for _, zero := range []placement.Node{{}, {Alive: true, CapacityBytes: 5, UsedBytes: 5}, {Alive: true, CapacityBytes: 5, UsedBytes: 50}} {
		if placement.Score(zero) != 0 {
			t.Errorf("%+v scores %v", zero, placement.Score(zero))
		}
	}
	odd := []float64{0, -1, math.NaN(), math.Inf(1), math.Inf(-1), math.MaxFloat64, math.SmallestNonzeroFloat64}
	rapid.Check(t, func(t *rapid.T) { // whatever peers report
		value := rapid.OneOf(rapid.SampledFrom(odd), rapid.Float64())
		s := placement.Score(placement.Node{
			Alive: true, CapacityBytes: 1 + rapid.Uint64Range(0, math.MaxUint64-1).Draw(t, "capacity"),
			LatencyMs: value.Draw(t, "latency"), BandwidthBps: value.Draw(t, "bandwidth"), Uptime: value.Draw(t, "uptime"),
		})
		if !(s > 0 && s <= 1) {
			t.Fatalf("score %v", s)
		}
	})
}

func BenchmarkChoose(b *testing.B) {
	for _, count := range []int{14, 100, 500} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			nodes := pool(count)
			for i := range nodes {
				nodes[i].Host, nodes[i].Zone = fmt.Sprint(i/2), fmt.Sprint(i%5)
			}
			rng := newRand(1)
			for b.Loop() {
				if _, err := placement.Choose(rng, nodes, 6, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
