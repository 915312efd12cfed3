// Package sim is a seeded model of a pool over years: which stripes survive,
// and what repair costs.
//
//	o := sim.Options{Seed: 1, Nodes: 1000, Stripes: 5000, Policy: policy, Life: 90 * sim.Day}
//	result, err := sim.Run(o)
//	chain := o.Chain()             // the Markov model of the same pool
//	expected := chain.Loss(o.Duration) * float64(o.Stripes)
//
// What is real: the geometry (package erasure), the choice of holders and of
// new holders, and who the keepers are (package placement).
//
// What is modelled, after packages node and p2p: members fall silent and come
// back; silence of CopyAfter makes the holder that is left of a mirrored shard
// copy it; keepers rebuild a shard without a copy after DeadAfter of silence,
// or after CopyAfter where the stripe has at most one shard to spare; the
// keepers after the first in rank wait StandIn each before they take over; a
// rebuild needs k shards at nodes that answer, and a majority of the keepers;
// a holder that comes back before a repair is done ends it. Copies at a holder
// that was replaced count no more, though it may still have them.
//
// Lifetimes, absences and transfers have exponential durations. A member that
// dies is replaced by an empty one in the same place. Index records are handed
// over at once when the pool changes. Transfers do not wait for each other:
// CopyTime and RebuildTime are meant with queueing. A partition silences its
// smaller side, which has no majority of any stripe's keepers. A node that
// lies holds nothing and says that it does, until an audit finds it out.
//
// The package is pure: no files, no network, no clock. One Run uses one
// goroutine and keeps nothing; the same Options give the same Result.
package sim
