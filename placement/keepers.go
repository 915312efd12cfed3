package placement

import (
	"bytes"
	"slices"

	"lukechampine.com/blake3"
)

// keeperDomain separates keeper ranks from all other uses of BLAKE3.
const keeperDomain = "defs keeper v1"

// Keepers returns the count nodes that rank highest for a blinded stripe id,
// best first, fewer where nodes has fewer; duplicates count once. The order of
// nodes does not matter, and a node that comes or goes changes only its own
// rank (rendezvous hashing: Thaler and Ravishankar 1998). A node's rank is
// BLAKE3("defs keeper v1" ‖ blind ‖ node id), the greatest first.
func Keepers(blind [32]byte, nodes []NodeID, count int) []NodeID {
	type ranked struct {
		id   NodeID
		rank [32]byte
	}
	count = min(max(count, 0), len(nodes))
	best := make([]ranked, 0, count+1) // the highest so far, in order
	input := slices.Concat([]byte(keeperDomain), blind[:])
	for _, id := range nodes {
		input = append(input[:len(keeperDomain)+len(blind)], id...)
		r := ranked{id, blake3.Sum256(input)}
		i, known := slices.BinarySearchFunc(best, r, func(a, b ranked) int { return bytes.Compare(b.rank[:], a.rank[:]) })
		if known || i == count {
			continue
		}
		best = slices.Insert(best, i, r)
		best = best[:min(len(best), count)]
	}
	keepers := make([]NodeID, len(best))
	for i, r := range best {
		keepers[i] = r.id
	}
	return keepers
}

// KeeperCount returns how many keepers a stripe with m parity shards has in a
// pool of so many nodes: max(3, m+1), or 2(m+1) where shards are mirrored,
// never more than the pool. So an index outlives as many nodes as its shards.
func KeeperCount(m int, mirrored bool, pool int) int {
	count := max(3, m+1)
	if mirrored {
		count = max(3, 2*(m+1))
	}
	return min(count, pool)
}
