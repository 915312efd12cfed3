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
			pairs[i].Mirror = d.take(func(c *candidate) rank { return d.mirrorRank(c, &primary, rest) }).ID
		}
	}
	return pairs, nil
}

// candidate is a node that may be drawn. Its domains are numbers, so that
// ranking a pool of thousands hashes no names.
type candidate struct {
	*Node
	host, subnet, zone int
	score              float64
	rank               rank // in the take under way
}

// draw is the state of one Choose.
type draw struct {
	rng        *rand.Rand
	free       []candidate
	freeOnHost []int
	hosts      []int // copies placed so far in each domain
	subnets    []int
	zones      []int
}

// domains numbers the failure domains of one kind.
type domains map[string]int

func (d domains) number(name string) int {
	number, ok := d[name]
	if !ok {
		number = len(d)
		d[name] = number
	}
	return number
}

func newDraw(rng *rand.Rand, nodes []Node) *draw {
	d := &draw{rng: rng, free: make([]candidate, 0, len(nodes))}
	hosts, subnets, zones := make(domains, len(nodes)), domains{}, domains{}
	seen := make(map[NodeID]bool, len(nodes))
	for i := range nodes {
		node := &nodes[i]
		score := Score(*node)
		if score <= 0 || seen[node.ID] {
			continue
		}
		seen[node.ID] = true
		d.free = append(d.free, candidate{
			Node: node, score: score,
			host: hosts.number(hostName(node.Host, node.ID)), subnet: subnets.number(node.Subnet), zone: zones.number(node.Zone),
		})
	}
	d.freeOnHost, d.hosts = make([]int, len(hosts)), make([]int, len(hosts))
	d.subnets, d.zones = make([]int, len(subnets)), make([]int, len(zones))
	for i := range d.free {
		d.freeOnHost[d.free[i].host]++
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
	return rank{d.hosts[c.host], d.subnets[c.subnet], d.zones[c.zone]}
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
		one(c.subnet == primary.subnet) + d.subnets[c.subnet],
		one(c.zone == primary.zone) + d.zones[c.zone],
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
func (d *draw) take(rankOf func(*candidate) rank) candidate {
	var best rank
	total := 0.0
	for i := range d.free {
		c := &d.free[i]
		c.rank = rankOf(c)
		order := -1
		if i > 0 {
			order = c.rank.compare(best)
		}
		if order < 0 {
			best, total = c.rank, 0
		}
		if order <= 0 {
			total += c.score
		}
	}
	point := d.rng.Float64() * total
	chosen := -1
	for i := range d.free {
		if d.free[i].rank != best {
			continue
		}
		chosen = i // the last one also takes what rounding leaves over
		if point -= d.free[i].score; point < 0 {
			break
		}
	}
	c := d.free[chosen]
	d.free[chosen] = d.free[len(d.free)-1]
	d.free = d.free[:len(d.free)-1]
	d.freeOnHost[c.host]--
	d.hosts[c.host]++
	d.subnets[c.subnet]++
	d.zones[c.zone]++
	return c
}
