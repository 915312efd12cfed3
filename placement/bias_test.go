package placement_test

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"testing"

	"gonum.org/v1/gonum/stat/distuv"
	"lukechampine.com/blake3"
	"pgregory.net/rapid"

	"github.com/defs-fs/defs/placement"
)

// placements is how many stripes the statistical tests place: 10^5, or
// DEFS_PLACEMENTS.
func placements(t *testing.T) int {
	t.Helper()
	text := os.Getenv("DEFS_PLACEMENTS")
	if text == "" {
		return 100_000
	}
	count, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return count
}

// significance of each test: the seeds are fixed, so that a right program does
// not fail now and then.
const significance = 0.001

func hash(text string) []byte {
	sum := blake3.Sum256([]byte(text))
	return sum[:]
}

func checkChiSquare(t *testing.T, what string, statistic float64, freedom int) {
	t.Helper()
	limit := distuv.ChiSquared{K: float64(freedom)}.Quantile(1 - significance)
	t.Logf("%s: chi-square %.1f, %d degrees of freedom, limit %.1f", what, statistic, freedom, limit)
	if !(statistic <= limit) {
		t.Errorf("%s: chi-square %.1f > %.1f", what, statistic, limit)
	}
}

// uneven is a pool of nodes that differ in capacity, fill, latency, bandwidth
// and uptime, each on a host of its own.
func uneven(count int) []placement.Node {
	nodes := pool(count)
	for i := range nodes {
		nodes[i].CapacityBytes, nodes[i].UsedBytes = uint64(1+i%4)<<36, uint64(i%3)<<34
		nodes[i].LatencyMs, nodes[i].BandwidthBps = float64(1+7*i), float64(1+i%5)*8e6
		nodes[i].Uptime = 1 - float64(i%6)/20
	}
	return nodes
}

// drawn returns how likely each node is to be drawn as number position, where
// each draw takes one of those that are left in proportion to their scores.
func drawn(nodes []placement.Node, position int) []float64 {
	chances := make([]float64, len(nodes))
	taken := make([]bool, len(nodes))
	var walk func(depth int, chance float64)
	walk = func(depth int, chance float64) {
		total := 0.0
		for i, node := range nodes {
			if !taken[i] {
				total += placement.Score(node)
			}
		}
		for i, node := range nodes {
			if taken[i] {
				continue
			}
			p := chance * placement.Score(node) / total
			if depth == position {
				chances[i] += p
				continue
			}
			taken[i] = true
			walk(depth+1, p)
			taken[i] = false
		}
	}
	walk(0, 1)
	return chances
}

// Every shard of a stripe lies at each node as often as scores say, no more and
// no less.
func TestNoBiasBeyondTheScore(t *testing.T) {
	const n = 4
	nodes, count := uneven(12), placements(t)
	at := make([]map[placement.NodeID]int, n)
	for i := range at {
		at[i] = map[placement.NodeID]int{}
	}
	rng := newRand(21)
	for range count {
		pairs, err := placement.Choose(rng, nodes, n, false)
		if err != nil {
			t.Fatal(err)
		}
		for i, pair := range pairs {
			at[i][pair.Primary]++
		}
	}
	for i := range at {
		expected := map[placement.NodeID]float64{}
		for j, chance := range drawn(nodes, i) {
			expected[nodes[j].ID] = chance * float64(count)
		}
		checkChiSquare(t, fmt.Sprint("shard ", i), chiSquare(at[i], expected), len(nodes)-1)
	}
}

// Equal nodes hold equally many copies, mirrors too. A stripe takes 2n of N
// nodes, none twice, so that counts vary less than those of single draws:
// by (N-2n)/(N-1).
func TestNoBiasAmongEqualNodes(t *testing.T) {
	const n, size = 5, 30
	nodes, count := pool(size), placements(t)
	for i := range nodes {
		nodes[i].Subnet, nodes[i].Zone = fmt.Sprint(i/2), fmt.Sprint(i%3)
	}
	primaries, all, expected := map[placement.NodeID]int{}, map[placement.NodeID]int{}, map[placement.NodeID]float64{}
	rng := newRand(22)
	for range count {
		pairs, err := placement.Choose(rng, nodes, n, true)
		if err != nil {
			t.Fatal(err)
		}
		primaries[pairs[n-1].Primary]++
		for _, pair := range pairs {
			all[pair.Primary]++
			all[pair.Mirror]++
		}
	}
	for _, node := range nodes {
		expected[node.ID] = float64(count) / size
	}
	checkChiSquare(t, "the last primary", chiSquare(primaries, expected), size-1)
	for id := range expected {
		expected[id] *= 2 * n
	}
	// Subnets and zones keep the copies of a stripe apart, which makes counts
	// more even still: too much is wrong, too little is not.
	checkChiSquare(t, "all copies", chiSquare(all, expected)*(size-1)/(size-2*n), size-1)
}

// An observer knows the pool, its scores, a stripe's id, its blind id even, and
// where all earlier stripes are. No guess from that finds more holders than
// naming n nodes at random does.
func TestAnIdTellsNothingAboutHolders(t *testing.T) {
	const n, size, buckets = 6, 30, 16
	nodes, count := pool(size), placements(t)/2
	ids := make([]placement.NodeID, size)
	number := map[placement.NodeID]int{}
	for i, node := range nodes {
		ids[i], number[node.ID] = node.ID, i
	}
	ring := make([]uint64, size) // the nodes' places in a ring of hashes
	for i, id := range ids {
		ring[i] = binary.BigEndian.Uint64(hash(string(id)))
	}
	nearest := func(point uint64, distance func(a, b uint64) uint64) []placement.NodeID {
		order := slices.SortedFunc(slices.Values(ids), func(a, b placement.NodeID) int {
			x, y := distance(ring[number[a]], point), distance(ring[number[b]], point)
			switch {
			case x < y:
				return -1
			case x > y:
				return 1
			}
			return 0
		})
		return order[:n]
	}
	var before []placement.NodeID
	guesses := map[string]func(id [32]byte) []placement.NodeID{
		"rendezvous": func(id [32]byte) []placement.NodeID { return placement.Keepers(id, ids, n) },
		"xor distance": func(id [32]byte) []placement.NodeID {
			return nearest(binary.BigEndian.Uint64(id[:]), func(a, b uint64) uint64 { return a ^ b })
		},
		"ring": func(id [32]byte) []placement.NodeID {
			return nearest(binary.BigEndian.Uint64(id[:]), func(a, b uint64) uint64 { return a - b })
		},
		"the stripe before": func([32]byte) []placement.NodeID { return before },
	}
	hits, tries := map[string]int{}, map[string]int{}
	var table [buckets][size]int
	rng := newRand(23)
	for stripe := range count {
		id := [32]byte(hash(fmt.Sprint("stripe ", stripe)))
		pairs, err := placement.Choose(rng, nodes, n, false)
		if err != nil {
			t.Fatal(err)
		}
		var holders []placement.NodeID
		for _, pair := range pairs {
			holders = append(holders, pair.Primary)
		}
		for name, guess := range guesses {
			for _, node := range guess(id) {
				tries[name]++
				if slices.Contains(holders, node) {
					hits[name]++
				}
			}
		}
		table[id[0]%buckets][number[holders[stripe%n]]]++
		before = holders
	}
	for name := range guesses {
		// The number of hits of one guess is hypergeometric.
		chance := float64(n) / size
		mean := float64(tries[name]) * chance
		deviation := math.Sqrt(mean * (1 - chance) * (size - n) / (size - 1))
		z := (float64(hits[name]) - mean) / deviation
		t.Logf("%s: %d hits, %.0f by chance, %.1f standard deviations", name, hits[name], mean, z)
		if limit := distuv.UnitNormal.Quantile(1 - significance/2); math.Abs(z) > limit {
			t.Errorf("guess by %s: %d hits, %.0f by chance: %.1f standard deviations", name, hits[name], mean, z)
		}
	}
	// And no part of the id goes together with any node.
	statistic := 0.0
	for _, row := range table {
		total := 0
		for _, hits := range row {
			total += hits
		}
		for _, hits := range row {
			want := float64(total) / size
			statistic += (float64(hits) - want) * (float64(hits) - want) / want
		}
	}
	checkChiSquare(t, "bits of the id by node", statistic, buckets*(size-1))
}

// Where hosts lie in subnets and subnets in zones, no two copies of a stripe
// share a host, a subnet or a zone while there are as many of them as copies,
// and every one is used where there are fewer.
func TestNoTwoShardsInOneDomain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		zones := rapid.IntRange(1, 20).Draw(t, "zones")
		subnets := zones * rapid.IntRange(1, 3).Draw(t, "subnets in a zone")
		hosts := subnets * rapid.IntRange(1, 3).Draw(t, "hosts in a subnet")
		nodes := uneven(hosts * rapid.IntRange(1, 3).Draw(t, "nodes on a host"))
		for i := range nodes {
			host := i % hosts
			subnet := host % subnets
			nodes[i].Host, nodes[i].Subnet, nodes[i].Zone = fmt.Sprint("h", host), fmt.Sprint("s", subnet), fmt.Sprint("z", subnet%zones)
		}
		mirror := rapid.Bool().Draw(t, "mirror")
		most := min(14, hosts)
		if mirror {
			most = min(14, hosts/2)
		}
		n := rapid.IntRange(0, most).Draw(t, "n")
		pairs, err := placement.Choose(newRand(rapid.Uint64().Draw(t, "seed")), nodes, n, mirror)
		if err != nil {
			t.Fatal(err)
		}
		used := [3]map[string]bool{{}, {}, {}}
		all := copies(t, pairs, nodes, mirror)
		for _, node := range all {
			used[0][node.Host], used[1][node.Subnet], used[2][node.Zone] = true, true, true
		}
		for i, there := range []int{hosts, subnets, zones} {
			if len(used[i]) != min(len(all), there) {
				t.Fatalf("%d copies are in %d of %d domains of kind %d", len(all), len(used[i]), there, i)
			}
		}
	})
}
