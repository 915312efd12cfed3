package placement_test

import (
	"fmt"
	"math/bits"
	"testing"
	"time"

	"github.com/defs-fs/defs/placement"
	"pgregory.net/rapid"
)

// stripePairs returns n pairs of distinct nodes; the first mirrored of them
// have a mirror.
func stripePairs(n, mirrored int) []placement.Pair {
	nodes := ids(2 * n)
	pairs := make([]placement.Pair, n)
	for i := range pairs {
		pairs[i].Primary = nodes[2*i]
		if i < mirrored {
			pairs[i].Mirror = nodes[2*i+1]
		}
	}
	return pairs
}

func TestSurvivesLosses(t *testing.T) {
	own := func(id placement.NodeID) string { return string(id) }
	oneHost := func(placement.NodeID) string { return "h" }
	for _, c := range []struct {
		name                 string
		pairs                []placement.Pair
		k                    int
		hostOf               func(placement.NodeID) string
		wantNodes, wantHosts int
	}{
		{"4+2", stripePairs(6, 0), 4, own, 2, 2},
		{"4+2 mirrored", stripePairs(6, 6), 4, own, 5, 5},
		{"10+4 mirrored", stripePairs(14, 14), 10, nil, 9, 9},
		{"4+2, one mirrored", stripePairs(6, 1), 4, own, 2, 2},
		{"4+2, four mirrored", stripePairs(6, 4), 4, own, 3, 3},
		{"4+2 mirrored on one host", stripePairs(6, 6), 4, oneHost, 5, 0},
		{"4+2, hosts not known", stripePairs(6, 0), 4, oneHost0, 2, 2},
		{"one shard lost", append(stripePairs(5, 0), placement.Pair{}), 4, own, 1, 1},
		{"k left", stripePairs(4, 0), 4, own, 0, 0},
		{"k left, mirrored", stripePairs(4, 4), 4, own, 1, 1},
		{"only mirrors left", []placement.Pair{{Mirror: "a"}, {Mirror: "b"}}, 1, own, 1, 1},
		{"lost", stripePairs(3, 3), 4, own, -1, -1},
		{"lost, no shard", nil, 1, own, -1, -1},
		{"100+100 mirrored", stripePairs(200, 200), 100, own, 201, 201},
	} {
		nodes, hosts := placement.SurvivesLosses(c.pairs, c.k, c.hostOf)
		if nodes != c.wantNodes || hosts != c.wantHosts {
			t.Errorf("%s: %d nodes, %d hosts; want %d, %d", c.name, nodes, hosts, c.wantNodes, c.wantHosts)
		}
	}
}

func oneHost0(placement.NodeID) string { return "" }

// bruteForce tries every set of lost hosts.
func bruteForce(pairs []placement.Pair, k int, host map[placement.NodeID]int, hosts int) int {
	survives := hosts
	for lost := range uint(1) << hosts {
		left := 0
		for _, pair := range pairs {
			dead := lost>>host[pair.Primary]&1 == 1
			if pair.Mirror != "" {
				dead = dead && lost>>host[pair.Mirror]&1 == 1
			}
			if !dead {
				left++
			}
		}
		if left < k {
			survives = min(survives, bits.OnesCount(lost)-1)
		}
	}
	return survives
}

func TestSurvivesLossesIsExactForSmallPools(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 10).Draw(t, "n")
		k := rapid.IntRange(1, n).Draw(t, "k")
		pairs := stripePairs(n, rapid.IntRange(0, n).Draw(t, "mirrored"))
		hosts := rapid.IntRange(1, 9).Draw(t, "hosts")
		host := map[placement.NodeID]int{}
		for _, id := range ids(2 * n) {
			host[id] = rapid.IntRange(0, hosts-1).Draw(t, "host")
		}
		_, got := placement.SurvivesLosses(pairs, k, func(id placement.NodeID) string { return fmt.Sprint(host[id]) })
		if want := bruteForce(pairs, k, host, hosts); got != want {
			t.Fatalf("survives %d hosts, want %d", got, want)
		}
	})
}

// Large stripes on tangled hosts are bounded in time and never overstated: the
// answer's claim is checked against random losses.
func TestSurvivesLossesOfLargeStripes(t *testing.T) {
	rng := newRand(5)
	pairs := stripePairs(200, 200)
	host := map[placement.NodeID]int{}
	for _, id := range ids(400) {
		host[id] = rng.IntN(60)
	}
	start := time.Now()
	_, survives := placement.SurvivesLosses(pairs, 100, func(id placement.NodeID) string { return fmt.Sprint(host[id]) })
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	if survives < 1 {
		t.Fatalf("survives %d hosts", survives)
	}
	for range 2000 {
		lost := map[int]bool{}
		for _, h := range rng.Perm(60)[:survives] {
			lost[h] = true
		}
		left := 0
		for _, pair := range pairs {
			if !lost[host[pair.Primary]] || !lost[host[pair.Mirror]] {
				left++
			}
		}
		if left < 100 {
			t.Fatalf("%d shards left after %d hosts", left, survives)
		}
	}
}

func BenchmarkSurvivesLosses(b *testing.B) {
	pairs := stripePairs(6, 6)
	for b.Loop() {
		placement.SurvivesLosses(pairs, 4, nil)
	}
}
