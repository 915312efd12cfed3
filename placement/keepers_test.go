package placement_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/defs-fs/defs/placement"
	"lukechampine.com/blake3"
	"pgregory.net/rapid"
)

func ids(count int) []placement.NodeID {
	list := make([]placement.NodeID, count)
	for i := range list {
		list[i] = placement.NodeID(fmt.Sprint("node", i))
	}
	return list
}

func TestKeepersProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blind := blake3.Sum256([]byte{byte(rapid.IntRange(0, 255).Draw(t, "blind"))})
		nodes := ids(rapid.IntRange(0, 30).Draw(t, "nodes"))
		count := rapid.IntRange(-1, 40).Draw(t, "count")
		keepers := placement.Keepers(blind, nodes, count)
		if len(keepers) != max(0, min(count, len(nodes))) {
			t.Fatalf("%d keepers for %d of %d", len(keepers), count, len(nodes))
		}
		// Neither order nor repetition matters.
		shuffled := append(rapid.Permutation(nodes).Draw(t, "order"), nodes...)
		if again := placement.Keepers(blind, shuffled, count); !slices.Equal(again, keepers) {
			t.Fatalf("%v, in another order %v", keepers, again)
		}
		if len(keepers) < 2 {
			return
		}
		// One that goes is replaced by the next; all others stay.
		gone := rapid.SampledFrom(nodes).Draw(t, "gone")
		rest := slices.DeleteFunc(slices.Clone(nodes), func(id placement.NodeID) bool { return id == gone })
		want := slices.DeleteFunc(placement.Keepers(blind, nodes, count+1), func(id placement.NodeID) bool { return id == gone })
		want = want[:min(len(want), count)]
		if got := placement.Keepers(blind, rest, count); !slices.Equal(got, want) {
			t.Fatalf("without %s: %v, want %v", gone, got, want)
		}
	})
}

// The rank is part of the format: devices must agree on keepers for ever.
func TestKeepersGolden(t *testing.T) {
	blind := [32]byte{1, 2, 3}
	nodes := ids(5)
	want := []placement.NodeID{"node2", "node1", "node3", "node4", "node0"}
	if got := placement.Keepers(blind, nodes, 5); !slices.Equal(got, want) {
		t.Fatalf("keepers %v, want %v", got, want)
	}
	rank := func(id placement.NodeID) []byte {
		sum := blake3.Sum256(append(append([]byte("defs keeper v1"), blind[:]...), id...))
		return sum[:]
	}
	for i := range want[1:] {
		if bytes.Compare(rank(want[i]), rank(want[i+1])) <= 0 {
			t.Fatalf("%s does not rank above %s", want[i], want[i+1])
		}
	}
}

func TestKeepersAreEven(t *testing.T) {
	const quantile, draws = 27.88, 5000 // 0.1 % of chi-square with 9 degrees of freedom
	nodes := ids(10)
	counts, expected := map[placement.NodeID]int{}, map[placement.NodeID]float64{}
	rng := rand.NewChaCha8([32]byte{3})
	for range draws {
		var blind [32]byte
		rng.Read(blind[:])
		counts[placement.Keepers(blind, nodes, 1)[0]]++
	}
	for _, id := range nodes {
		expected[id] = draws / 10
	}
	if x := chiSquare(counts, expected); x > quantile {
		t.Fatalf("chi-square %.1f > %.1f: %v", x, quantile, counts)
	}
}

func TestKeeperCount(t *testing.T) {
	for _, c := range []struct {
		m        int
		mirrored bool
		pool     int
		want     int
	}{
		{2, false, 6, 3}, {1, false, 6, 3}, {4, false, 14, 5}, {2, true, 14, 6}, {4, true, 30, 10},
		{1, true, 14, 4}, {2, false, 2, 2}, {4, true, 7, 7}, {2, false, 0, 0}, {100, false, 300, 101},
	} {
		if got := placement.KeeperCount(c.m, c.mirrored, c.pool); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

func BenchmarkKeepers(b *testing.B) {
	for _, count := range []int{14, 100, 500} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			nodes := ids(count)
			for b.Loop() {
				placement.Keepers([32]byte{1}, nodes, 6)
			}
		})
	}
}
