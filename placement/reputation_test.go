package placement

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestReputation(t *testing.T) {
	now := 1e9
	for _, c := range []struct {
		name      string
		outcomes  []Outcome
		later     float64 // seconds
		contained bool
	}{
		{"nothing known", nil, 0, false},
		{"one lie", []Outcome{Lied}, 0, false},
		{"two lies", []Outcome{Lied, Lied}, 0, true},
		{"two lies among proofs", []Outcome{Proved, Lied, Proved, Proved, Proved, Lied, Proved, Proved, Proved}, 0, true},
		{"three losses", []Outcome{Lost, Lost, Lost}, 0, false},
		{"four losses", []Outcome{Lost, Lost, Lost, Lost}, 0, true},
		{"losses, and proofs since", []Outcome{Lost, Lost, Lost, Lost, Proved, Proved, Proved}, 0, false},
		{"five stalls", []Outcome{Stalled, Stalled, Stalled, Stalled, Stalled}, 0, true},
		{"two lies, a week ago", []Outcome{Lied, Lied}, 7 * 24 * 3600, false},
		{"four lies, a week ago", []Outcome{Lied, Lied, Lied, Lied}, 7*24*3600 - 3600, true},
	} {
		var all Reputations
		for _, o := range c.outcomes {
			all.Note("n", o, now)
		}
		if r := all.Of("n", now+c.later); r.Contained() != c.contained {
			t.Errorf("%s: trust %.2f, contained %v", c.name, r.Trust(), r.Contained())
		}
		if all.Of("other", now).Trust() != 1 {
			t.Errorf("%s: another node is blamed", c.name)
		}
	}
}

func TestReputationsAreBounded(t *testing.T) {
	var all Reputations
	now := 1e9
	all.Note("liar", Lied, now)
	all.Note("liar", Lied, now)
	for i := range 2 * reputationsMax {
		all.Note(NodeID(fmt.Sprint(i)), Proved, now)
	}
	if len(all.byID) != reputationsMax || !all.Of("liar", now).Contained() {
		t.Errorf("%d remembered, the liar contained: %v", len(all.byID), all.Of("liar", now).Contained())
	}
}

func TestContainedNodesAreNotChosen(t *testing.T) {
	nodes := []Node{
		{ID: "a", Alive: true}, {ID: "b", Alive: true, Reputation: Reputation{Lied: 2}}, {ID: "c", Alive: true, Reputation: Reputation{Lied: 1}},
	}
	count := map[NodeID]int{}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 10000 {
		pairs, err := Choose(rng, nodes, 1, false)
		if err != nil {
			t.Fatal(err)
		}
		count[pairs[0].Primary]++
	}
	if count["b"] != 0 || count["c"] < 3500 || count["c"] > 4000 { // 0.6 : 1
		t.Errorf("drawn: %v", count)
	}
}
