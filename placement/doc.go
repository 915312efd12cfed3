// Package placement decides which nodes hold a stripe's shards and which keep
// its index record.
//
// Holders are drawn at random, weighted by score, so that nobody can compute
// them from a stripe's id; shards are spread over hosts, subnets and zones
// while the pool allows. Keepers follow from the blinded stripe id by
// rendezvous hashing, so that whoever has that id finds them without a search.
//
//	pairs, err := placement.Choose(rng, nodes, g.N(), mirrored)
//	keepers := placement.Keepers(blind, ids, placement.KeeperCount(g.M, mirrored, len(ids)))
//	nodes, hosts := placement.SurvivesLosses(pairs, g.K, hostOf)
//
// The package is pure: no files, no network, no clock, no goroutines, no state
// but that of Reputations, which their owner makes. Results belong to the
// caller; arguments are only read.
package placement
