package stripe

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/placement"
)

// source is one copy of a shard.
type source struct {
	index int
	node  placement.NodeID
}

// copies are places of shards that a lookup has told of, beside the holders in
// the stripe's info. They are claims: whatever comes from there is verified.
type copies struct {
	sources []source
}

// copiesMax bounds the claims that one lookup follows.
const copiesMax = 1024

// add notes a claim and reports whether it is new.
func (c *copies) add(info *metastore.StripeInfo, index int, node string) bool {
	src := source{index, placement.NodeID(node)}
	if node == "" || index >= info.K+info.M || len(c.sources) >= copiesMax || slices.Contains(c.sources, src) {
		return false
	}
	c.sources = append(c.sources, src)
	return index >= len(info.Holders) || (info.Holders[index].Primary != node && info.Holders[index].Mirror != node)
}

// request is one source being asked.
type request struct {
	source
	late bool
	data []byte
	err  error
}

// gather asks the holders of a stripe until it has all wanted shards, or any k
// where that is not to be had or none is wanted. fetch brings one copy,
// verified. It asks for the wanted shards first; a request that fails, or is
// late by HedgeAfter, is joined by one to another copy, or by as many to other
// shards as k take. The result has k+m entries, nil for what was not needed.
//
// Goroutines have ended when it returns.
func (s *Store) gather(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, more *copies, want []int,
	fetch func(context.Context, source) ([]byte, error),
) ([][]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	sources := s.sources(info, more, want)
	got := make([][]byte, info.K+info.M)
	onTime := make([]int, len(got)) // requests under way that are not late, by shard
	var running []*request
	results := make(chan *request, len(sources)) // never blocks a sender
	defer func() {
		cancel()
		for range running {
			<-results
		}
	}()
	var tried []placement.NodeID
	lastErr := errors.New("no holder is known")

	start := func() bool {
		i := slices.IndexFunc(sources, func(src source) bool { return got[src.index] == nil && onTime[src.index] == 0 })
		if i < 0 {
			return false
		}
		r := &request{source: sources[i]}
		sources = slices.Delete(sources, i, i+1)
		running, tried = append(running, r), append(tried, r.node)
		onTime[r.index]++
		go func() {
			r.data, r.err = fetch(ctx, r.source)
			results <- r
		}()
		return true
	}
	// satisfied reports whether the wanted shards, or k in all, are there, or
	// are expected if hoping.
	satisfied := func(hoping bool) bool {
		count, missing := 0, len(want) == 0
		for i := range got {
			if got[i] != nil || (hoping && onTime[i] > 0) {
				count++
			} else {
				missing = missing || slices.Contains(want, i)
			}
		}
		return count >= info.K || !missing
	}
	tick := time.NewTicker(s.o.HedgeAfter)
	defer tick.Stop()
	for !satisfied(false) {
		for !satisfied(true) && start() {
		}
		if len(running) == 0 {
			return nil, fmt.Errorf("stripe %v: %d of %d shards, asked %v: %w (last: %v)", id, count(got), info.K, tried, ErrUnavailable, lastErr)
		}
		select {
		case r := <-results:
			running = slices.DeleteFunc(running, func(other *request) bool { return other == r })
			if !r.late {
				onTime[r.index]--
			}
			switch {
			case r.err == nil && got[r.index] == nil:
				got[r.index] = r.data
				learn(info, more, r.source)
			case r.err != nil && ctx.Err() == nil:
				lastErr = r.err
				s.log.Warn("a shard could not be read from a peer; using others", "stripe", id.String(), "shard", r.index, "peer", r.node, "err", r.err)
			}
		case <-tick.C:
			for _, r := range running {
				if !r.late {
					r.late = true
					onTime[r.index]--
				}
			}
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil, fmt.Errorf("stripe %v: %w", id, ctx.Err())
			}
			return nil, fmt.Errorf("stripe %v: %d of %d shards in time, asked %v: %w", id, count(got), info.K, tried, ErrUnavailable)
		}
	}
	return got, nil
}

func count(shards [][]byte) (n int) {
	for _, b := range shards {
		if b != nil {
			n++
		}
	}
	return n
}

// learn makes a claim that has proved true a holder.
func learn(info *metastore.StripeInfo, more *copies, src source) {
	h := &info.Holders[src.index]
	if slices.Contains(more.sources, src) && h.Primary != string(src.node) && h.Mirror != string(src.node) {
		*h = metastore.Holder{Primary: string(src.node)}
	}
}

// sources orders the copies of a stripe's shards: of peers that are alive the
// wanted shards first, then one copy of each shard, then the others, each by
// the time that a peer takes to answer; then silent peers, dead ones last.
func (s *Store) sources(info *metastore.StripeInfo, more *copies, want []int) []source {
	members := make(map[placement.NodeID]p2p.Member)
	for _, m := range s.t.Members() {
		members[m.ID] = m
	}
	state := func(src source) p2p.State {
		if m, ok := members[src.node]; ok {
			return m.State
		}
		return p2p.Dead
	}
	near := func(a, b source) int {
		return cmp.Or(cmp.Compare(state(a), state(b)), cmp.Compare(members[a.node].RTT, members[b.node].RTT))
	}
	order := make(map[source]int) // among the copies of its shard
	var all []source
	for i := range info.K + info.M {
		var list []source
		add := func(node placement.NodeID) {
			if src := (source{i, node}); node != "" && !slices.Contains(list, src) {
				list = append(list, src)
			}
		}
		if i < len(info.Holders) {
			add(placement.NodeID(info.Holders[i].Primary))
			add(placement.NodeID(info.Holders[i].Mirror))
		}
		for _, src := range more.sources {
			if src.index == i {
				add(src.node)
			}
		}
		slices.SortStableFunc(list, near)
		for n, src := range list {
			order[src] = n
			if slices.Contains(want, i) {
				order[src] = -1
			}
		}
		all = append(all, list...)
	}
	slices.SortStableFunc(all, func(a, b source) int {
		return cmp.Or(cmp.Compare(state(a), state(b)), cmp.Compare(order[a], order[b]), near(a, b))
	})
	return all
}
