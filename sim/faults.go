package sim

import (
	"slices"

	"github.com/defs-fs/defs/placement"
)

// fault lets something go wrong, and counts what it hits: members that hold
// shards.
func (s *simulation) fault(f Fault) {
	var hit []int32
	switch f.Kind {
	case Crash, Slow, Lying, Partition:
		order := s.rng.Perm(len(s.members))
		for _, member := range order[:min(f.Nodes, len(order))] {
			hit = append(hit, s.byID[s.members[member].ID])
		}
	case HostLoss:
		hit = s.sharing(func(n placement.Node) string { return n.Host })
	case SubnetCut:
		hit = s.sharing(func(n placement.Node) string { return n.Subnet })
	case ZoneLoss:
		hit = s.sharing(func(n placement.Node) string { return n.Zone })
	}
	for _, index := range hit {
		n := &s.nodes[index]
		if n.silent && (f.Kind == Partition || f.Kind == SubnetCut) || n.lying {
			continue
		}
		if len(n.holds) > 0 {
			s.result.Fired[f.Kind]++
		}
		switch f.Kind {
		case Crash, HostLoss, ZoneLoss:
			s.die(index)
		case Partition, SubnetCut:
			s.cut(index, f.For)
		case Slow:
			n.slow = true
		case Lying:
			s.lie(index)
		}
	}
}

// sharing returns the members of a random failure domain of one kind.
func (s *simulation) sharing(domain func(placement.Node) string) (nodes []int32) {
	name := domain(s.members[s.rng.IntN(len(s.members))])
	for _, m := range s.members {
		if domain(m) == name {
			nodes = append(nodes, s.byID[m.ID])
		}
	}
	return nodes
}

// lie makes a member throw its shards away; an audit finds it out, and it is
// contained: what it holds counts as lost, and it gets no more.
func (s *simulation) lie(index int32) {
	s.nodes[index].lying = true
	for _, ref := range s.nodes[index].holds {
		s.look(&s.stripes[ref.stripe])
	}
	s.after(s.exponential(s.o.AuditEvery), func() {
		n := &s.nodes[index]
		if n.dead {
			return
		}
		s.result.FoundLying++
		n.caught = true
		s.members[n.member].Alive = false
		s.pool = nil
		for _, ref := range slices.Clone(n.holds) {
			s.mend(ref.stripe)
		}
	})
}
