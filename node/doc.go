// Package node is a storage node: it keeps shards for others, copies them to
// partners, keeps index records and heads, rebuilds what the stripes of these
// records have lost, and answers lookups.
//
//	n, err := node.New(node.Options{Store: store, Transport: host})
//	go n.Run(ctx)
//	…
//	host.Close() // no more requests
//	n.Close()    // waits for Run
//	store.Close()
//
// A node trusts nobody: whatever it stores proves itself (manifest and root of
// a shard, signature of an index record, key of a head's address), and whatever
// it gives away or deletes needs the lock's signature, except coded bytes,
// which are of no use without the volume's keys.
//
// Requests are served on the transport's goroutines. Run owns all others and
// waits for them. A put is answered after the store's flush, so that a crash
// loses nothing answered; copies under way are begun again.
package node
