// Package shardstore keeps a node's shards, index records, locks and heads on
// disk.
//
// Append-only pack files are the truth: every change is one self-describing
// record with checksums (FORMAT.md, "Shard store"). A Pebble database
// is only an index over them; it is caught up from the packs at open and
// rebuilt from them when it is missing or damaged.
//
//	s, err := shardstore.Open(shardstore.Options{Dir: dir, CapacityBytes: 1 << 40})
//	err = s.PutShard(ctx, shardstore.Shard{Key: key, Manifest: m, Body: body, Outboard: ob})
//	r, err := s.ReadShard(key, 0, 0, nil) // the whole shard
//	err = s.Close()
//
// A call that changes the store returns nil only after a device flush that
// covers the change (group commit: one flush answers all waiting callers).
// A crash loses nothing that was answered; it may keep changes that were not.
//
// The store owns two goroutines, the flusher and the sweeper; Close waits for
// both. Bytes passed in belong to the caller again when a call returns; bytes
// returned belong to the caller.
//
// Time is uptime: seconds this store has been open, added up over restarts.
// A provisional shard is dropped after 24 h of it, the bytes of a deleted
// shard are given back to the filesystem after 7 days of it, so that a node
// that was away for a month neither drops nor forgets anything on its return.
package shardstore
