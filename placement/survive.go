package placement

import "slices"

// searchStepsMax bounds the exact search of SurvivesLosses: some milliseconds.
const searchStepsMax = 1 << 16

// SurvivesLosses returns how many nodes, and how many hosts, can be lost at
// once in the worst case with k of the shards still there. A shard is lost
// when both its copies are. hostOf gives a node's host; nil or an empty answer
// counts the node as a host of its own. Both results are -1 where fewer than k
// shards are there now. Pairs that share hosts in intricate ways are searched
// up to a bound; beyond it the result may be too low, never too high.
func SurvivesLosses(pairs []Pair, k int, hostOf func(NodeID) string) (nodes, hosts int) {
	nodes = survives(pairs, k, func(id NodeID) string { return string(id) })
	hosts = survives(pairs, k, func(id NodeID) string {
		if hostOf == nil {
			return hostName("", id)
		}
		return hostName(hostOf(id), id)
	})
	return nodes, hosts
}

// survives does the same for one kind of domain.
func survives(pairs []Pair, k int, domainOf func(NodeID) string) int {
	numbers := map[string]int{}
	number := func(id NodeID) int {
		name := domainOf(id)
		if _, ok := numbers[name]; !ok {
			numbers[name] = len(numbers)
		}
		return numbers[name]
	}
	var shards [][]int // the distinct domains of each shard that is there
	for _, pair := range pairs {
		var domains []int
		for _, id := range []NodeID{pair.Primary, pair.Mirror} {
			if id != "" && !slices.Contains(domains, number(id)) {
				domains = append(domains, number(id))
			}
		}
		if len(domains) > 0 {
			shards = append(shards, domains)
		}
	}
	if len(shards) < k {
		return -1
	}
	if k <= 0 {
		return len(numbers)
	}
	a := attack{shards: shards, toKill: len(shards) - k + 1, lost: make([]int, len(numbers))}
	return a.domainsMin() - 1
}

// attack looks for the fewest domains whose loss kills toKill shards.
type attack struct {
	shards [][]int
	toKill int
	lost   []int // how many of the killed shards need the domain to be lost
	nLost  int   // domains with lost > 0
	best   int   // fewest domains found so far
	floor  int   // no fewer can do
	steps  int
}

func (a *attack) domainsMin() int {
	a.floor = a.lowerBound()
	a.best = a.greedy()
	a.search(0, a.toKill)
	if a.steps >= searchStepsMax {
		return a.floor
	}
	return a.best
}

// lowerBound lets each domain of a shard carry an equal part of it. Killing s
// shards takes domains that carry s in sum, so at least as many as the
// heaviest ones that do. Weights are doubled to stay whole: 2 or 1 + 1.
func (a *attack) lowerBound() int {
	weights := make([]int, len(a.lost))
	for _, shard := range a.shards {
		for _, domain := range shard {
			weights[domain] += 2 / len(shard)
		}
	}
	slices.Sort(weights)
	slices.Reverse(weights)
	carried := 0
	for i, weight := range weights {
		if carried += weight; carried >= 2*a.toKill {
			return i + 1
		}
	}
	return len(weights)
}

// greedy kills, one after the other, the shard that costs fewest new domains.
func (a *attack) greedy() int {
	lost := make([]bool, len(a.lost))
	killed := make([]bool, len(a.shards))
	total := 0
	for range a.toKill {
		next, nextCost := -1, 0
		for i, shard := range a.shards {
			cost := 0
			for _, domain := range shard {
				if !lost[domain] {
					cost++
				}
			}
			if !killed[i] && (next < 0 || cost < nextCost) {
				next, nextCost = i, cost
			}
		}
		killed[next] = true
		total += nextCost
		for _, domain := range a.shards[next] {
			lost[domain] = true
		}
	}
	return total
}

// search tries every way to kill need shards of those from index from on.
func (a *attack) search(from, need int) {
	if a.best == a.floor || a.nLost >= a.best || a.steps >= searchStepsMax {
		return
	}
	if need == 0 {
		a.best = a.nLost
		return
	}
	a.steps++
	for i := from; i <= len(a.shards)-need; i++ {
		for _, domain := range a.shards[i] {
			if a.lost[domain]++; a.lost[domain] == 1 {
				a.nLost++
			}
		}
		a.search(i+1, need-1)
		for _, domain := range a.shards[i] {
			if a.lost[domain]--; a.lost[domain] == 0 {
				a.nLost--
			}
		}
	}
}
