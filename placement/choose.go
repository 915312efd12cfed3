package placement

import (
	"cmp"
	"fmt"
	"math/rand/v2"
)

// Choose draws the holders of a stripe's n shards: len(pairs) == n, pairs[i]
// for shard i, no node twice. Nodes that are not alive or whose score is 0 are
// left out; the others are drawn with a probability that grows with their
// score. Shards are spread as evenly as the pool allows over hosts first, then
// subnets, then zones. With mirror each pair has a Mirror on another host than
// its Primary while the pool allows, a partner of it where one is eligible.
//
// rng is a seeded source in tests and an unpredictable one
// (rand.NewChaCha8 with a random seed) otherwise. ErrTooFewNodes says that
// fewer than n (2n with mirror) usable nodes exist.
func Choose(rng *rand.Rand, nodes []Node, n int, mirror bool) ([]Pair, error) {
	d := newDraw(rng, nodes)
	needed := n
	if mirror {
		needed = 2 * n
	}
	if n < 0 || len(d.free) < needed {
		return nil, fmt.Errorf("placement: choose: %w: %d needed, %d of %d alive with room", ErrTooFewNodes, needed, len(d.free), len(nodes))
	}
	pairs := make([]Pair, n)
	for i := range pairs {
		primary := d.take(func(c *candidate) rank { return d.primaryRank(c) })
		pairs[i].Primary = primary.ID
		if mirror {
			pairs[i].Mirror = d.take(func(c *candidate) rank { return d.mirrorRank(c, primary) }).ID
		}
	}
	return pairs, nil
}

// candidate is a node that may be drawn.
type candidate struct {
	*Node
	host  string // Host, or a name of its own
	score float64
}

// draw is the state of one Choose.
type draw struct {
	rng     *rand.Rand
	free    []*candidate
	hosts   map[string]int // copies placed so far in each domain
	subnets map[string]int
	zones   map[string]int
}

func newDraw(rng *rand.Rand, nodes []Node) *draw {
	d := &draw{rng: rng, hosts: map[string]int{}, subnets: map[string]int{}, zones: map[string]int{}}
	seen := make(map[NodeID]bool, len(nodes))
	for i := range nodes {
		node := &nodes[i]
		score := Score(*node)
		if score <= 0 || seen[node.ID] {
			continue
		}
		seen[node.ID] = true
		d.free = append(d.free, &candidate{Node: node, host: hostName(node.Host, node.ID), score: score})
	}
	return d
}

// hostName keeps nodes without a known host apart from each other and from
// every named host.
func hostName(host string, id NodeID) string {
	if host == "" {
		return "\x00" + string(id)
	}
	return host
}

// rank orders candidates; lower ones are taken first, entry by entry.
type rank [6]int

// compare orders ranks lexicographically.
func (r rank) compare(other rank) int {
	for i := range r {
		if order := cmp.Compare(r[i], other[i]); order != 0 {
			return order
		}
	}
	return 0
}

func (d *draw) primaryRank(c *candidate) rank {
	return rank{d.hosts[c.host], d.subnets[c.Subnet], d.zones[c.Zone]}
}

// mirrorRank puts the host before partnership, because a mirror that dies with
// its primary is none, and partnership before subnet and zone, because partners
// are chosen to be near.
func (d *draw) mirrorRank(c, primary *candidate) rank {
	return rank{
		one(c.host == primary.host),
		d.hosts[c.host],
		one(!isPartner(c, primary)),
		one(c.Subnet == primary.Subnet),
		d.subnets[c.Subnet],
		d.zones[c.Zone],
	}
}

func isPartner(a, b *candidate) bool {
	for _, id := range b.Partners {
		if id == a.ID {
			return true
		}
	}
	return false
}

func one(condition bool) int {
	if condition {
		return 1
	}
	return 0
}

// take draws one of the free candidates of the lowest rank, weighted by score,
// and counts its domains as used. At least one candidate must be free.
func (d *draw) take(rankOf func(*candidate) rank) *candidate {
	best := rankOf(d.free[0])
	ranks := make([]rank, len(d.free))
	for i, c := range d.free {
		ranks[i] = rankOf(c)
		if ranks[i].compare(best) < 0 {
			best = ranks[i]
		}
	}
	total := 0.0
	for i, c := range d.free {
		if ranks[i] == best {
			total += c.score
		}
	}
	point := d.rng.Float64() * total
	chosen := -1
	for i, c := range d.free {
		if ranks[i] != best {
			continue
		}
		chosen = i // the last one also takes what rounding leaves over
		if point -= c.score; point < 0 {
			break
		}
	}
	c := d.free[chosen]
	d.free[chosen] = d.free[len(d.free)-1]
	d.free = d.free[:len(d.free)-1]
	d.hosts[c.host]++
	d.subnets[c.Subnet]++
	d.zones[c.Zone]++
	return c
}
