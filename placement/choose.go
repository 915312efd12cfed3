package placement

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
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
		primary := d.take(d.spreadRank)
		pairs[i].Primary = primary.ID
		if mirror {
			rest := d.pairing(n - 1 - i)
			pairs[i].Mirror = d.take(func(c *candidate) rank { return d.mirrorRank(c, primary, rest) }).ID
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
	rng        *rand.Rand
	free       []*candidate
	freeOnHost map[string]int
	hosts      map[string]int // copies placed so far in each domain
	subnets    map[string]int
	zones      map[string]int
}

func newDraw(rng *rand.Rand, nodes []Node) *draw {
	d := &draw{
		rng: rng, freeOnHost: map[string]int{},
		hosts: map[string]int{}, subnets: map[string]int{}, zones: map[string]int{},
	}
	seen := make(map[NodeID]bool, len(nodes))
	for i := range nodes {
		node := &nodes[i]
		score := Score(*node)
		if score <= 0 || seen[node.ID] {
			continue
		}
		seen[node.ID] = true
		c := &candidate{Node: node, host: hostName(node.Host, node.ID), score: score}
		d.free = append(d.free, c)
		d.freeOnHost[c.host]++
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

// pairing says whether the pairs still to be drawn can each lie on two hosts.
// left pairs can if and only if 2·left free nodes remain with at most left on
// one host, that is if min(free nodes, left) summed over hosts reaches 2·left.
// While that holds no primary can break it, only a mirror.
type pairing struct {
	left  int // pairs after the one being drawn
	slack int // how far the sum exceeds 2·left; negative where it is too late
}

func (d *draw) pairing(left int) pairing {
	slack := -2 * left
	for _, free := range d.freeOnHost {
		slack += min(free, left)
	}
	return pairing{left, slack}
}

// broken reports whether taking one of a host's free nodes ends the chance.
func (p pairing) broken(free int) bool { return p.slack < one(free <= p.left) }

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

// spreadRank keeps copies evenly spread over hosts, then subnets, then zones.
func (d *draw) spreadRank(c *candidate) rank {
	return rank{d.hosts[c.host], d.subnets[c.Subnet], d.zones[c.Zone]}
}

// mirrorRank puts the host before partnership, because a mirror that dies with
// its primary is none, and partnership before subnet and zone, because partners
// are chosen to be near.
func (d *draw) mirrorRank(c, primary *candidate, rest pairing) rank {
	return rank{
		one(c.host == primary.host),
		one(rest.broken(d.freeOnHost[c.host])),
		d.hosts[c.host],
		one(!isPartner(c, primary)),
		one(c.Subnet == primary.Subnet) + d.subnets[c.Subnet],
		one(c.Zone == primary.Zone) + d.zones[c.Zone],
	}
}

// isPartner reports whether either node names the other: the newer of the two
// views is right, and each node knows its own first.
func isPartner(a, b *candidate) bool {
	return slices.Contains(b.Partners, a.ID) || slices.Contains(a.Partners, b.ID)
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
	if d.freeOnHost[c.host]--; d.freeOnHost[c.host] == 0 {
		delete(d.freeOnHost, c.host)
	}
	d.hosts[c.host]++
	d.subnets[c.Subnet]++
	d.zones[c.Zone]++
	return c
}
