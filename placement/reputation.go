package placement

import (
	"math"
	"sync"
)

// Outcome is how a node came out of one challenge, or of one read.
type Outcome int

const (
	// Proved: it showed bytes that verify.
	Proved Outcome = iota
	// Lied: what it sent is not what it holds by the stripe's manifest.
	Lied
	// Lost: it has not, or cannot read, what it is to hold.
	Lost
	// Stalled: it did not answer in time, though its heartbeats come.
	Stalled
)

// What one such outcome leaves of the trust in a node, and how long it takes
// until half of it is forgotten. Two lies, four losses or five stalls in a row
// contain a node.
const (
	liedLeaves     = 0.6
	lostLeaves     = 0.8
	stalledLeaves  = 0.85
	containedBelow = 0.5
	halfForgotten  = 7 * 24 * 3600 // seconds
	// provedLeaves is what a proof leaves of losses and stalls, which pass; a
	// node that lies now and then proves most of the time.
	provedLeaves = 0.9
)

// reputationsMax bounds how many nodes are remembered.
const reputationsMax = 4096

// Reputation is what one member has itself seen of a node. Counts fade.
type Reputation struct {
	Proved, Lied, Lost, Stalled float64
	atSeconds                   float64 // as of which the counts are
}

// Trust is 1 for a node of which nothing bad is known, down to 0.
func (r Reputation) Trust() float64 {
	return math.Pow(liedLeaves, r.Lied) * math.Pow(lostLeaves, r.Lost) * math.Pow(stalledLeaves, r.Stalled)
}

// Contained nodes are given no shards, and what they hold is held elsewhere.
func (r Reputation) Contained() bool { return r.Trust() < containedBelow }

// fade brings the counts to now.
func (r *Reputation) fade(nowSeconds float64) {
	if passed := nowSeconds - r.atSeconds; passed > 0 {
		keep := math.Exp2(-passed / halfForgotten)
		r.Proved, r.Lied, r.Lost, r.Stalled = r.Proved*keep, r.Lied*keep, r.Lost*keep, r.Stalled*keep
	}
	r.atSeconds = nowSeconds
}

// note adds one outcome.
func (r *Reputation) note(o Outcome, nowSeconds float64) {
	r.fade(nowSeconds)
	switch o {
	case Proved:
		r.Proved++
		r.Lost, r.Stalled = r.Lost*provedLeaves, r.Stalled*provedLeaves
	case Lied:
		r.Lied++
	case Lost:
		r.Lost++
	case Stalled:
		r.Stalled++
	}
}

// Reputations are those of all nodes, as one member sees them. Nobody is
// believed about others. The zero value is ready, and safe for concurrent use.
type Reputations struct {
	mu   sync.Mutex
	byID map[NodeID]Reputation // guarded by mu
}

// Note adds what was seen of a node and returns its reputation. nowSeconds are
// counted from any moment, the same in all calls.
func (r *Reputations) Note(id NodeID, o Outcome, nowSeconds float64) Reputation {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byID == nil {
		r.byID = make(map[NodeID]Reputation)
	}
	one, known := r.byID[id]
	if !known {
		one.atSeconds = nowSeconds
		if len(r.byID) >= reputationsMax {
			r.forget(nowSeconds)
		}
	}
	one.note(o, nowSeconds)
	r.byID[id] = one
	return one
}

// forget drops the node with the least against it.
func (r *Reputations) forget(nowSeconds float64) {
	var best NodeID
	trust := -1.0
	for id, one := range r.byID {
		if one.fade(nowSeconds); one.Trust() > trust {
			best, trust = id, one.Trust()
		}
	}
	delete(r.byID, best)
}

// Of returns a node's reputation now.
func (r *Reputations) Of(id NodeID, nowSeconds float64) Reputation {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.byID[id]
	one.fade(nowSeconds)
	return one
}
