package sim

import (
	"math/rand/v2"
	"slices"
	"time"
)

// Lookup is a message-level model of the broadcast by which a stripe's shards
// are found where hints and keepers fail: gossipsub with flood publishing, as
// package p2p sets it up, and answers sent directly.
type Lookup struct {
	Seed      uint64
	Nodes     int
	Connected int           // of them the asker is connected to so many; 0: to all
	OneWay    time.Duration // of each link
	Dial      time.Duration // what a new connection costs before the first request
	Answerers int           // nodes that hold a shard or keep the record
	Enough    int           // answers that name k shards
}

// gossipDegree is to how many members a message is passed on: D of gossipsub.
const gossipDegree = 6

// Broadcasted is what one broadcast took.
type Broadcasted struct {
	First, Enough time.Duration // until an answer, and so many
	Copies        int           // of the question, all members together
	Hops          int           // of the question to the last member
}

// Broadcast follows one question. Each member passes it on once, to
// gossipDegree others at random.
func (l Lookup) Broadcast() Broadcasted {
	rng := rand.New(rand.NewPCG(l.Seed, 51))
	hops := make([]int, l.Nodes) // until a member has it; 0: not yet
	order := rng.Perm(l.Nodes)
	direct := l.Connected
	if direct == 0 || direct > l.Nodes {
		direct = l.Nodes
	}
	b := Broadcasted{Copies: direct}
	now := order[:direct]
	for _, i := range now {
		hops[i] = 1
	}
	for hop := 2; len(now) > 0; hop++ {
		b.Hops = hop - 1
		var next []int
		for range now {
			for range gossipDegree - 1 { // not back to where it came from
				to := rng.IntN(l.Nodes)
				b.Copies++
				if hops[to] == 0 {
					hops[to] = hop
					next = append(next, to)
				}
			}
		}
		now = next
	}
	arrivals := make([]time.Duration, 0, l.Answerers)
	for _, i := range rng.Perm(l.Nodes)[:min(l.Answerers, l.Nodes)] {
		if hops[i] == 0 {
			continue
		}
		answer := l.OneWay
		if l.Connected > 0 && hops[i] > 1 {
			answer += l.Dial
		}
		arrivals = append(arrivals, time.Duration(hops[i])*l.OneWay+answer)
	}
	slices.Sort(arrivals)
	if len(arrivals) > 0 {
		b.First = arrivals[0]
	}
	if len(arrivals) >= l.Enough && l.Enough > 0 {
		b.Enough = arrivals[l.Enough-1]
	}
	return b
}
