// Package metastore keeps the tree of a volume on this device: inodes, names,
// extents, attributes and stripes, as keys in Pebble.
//
// The journal (package cache) is the truth; the metastore is the journal's
// operations applied. Pebble runs without a log of its own: a [Txn] collects
// changes and turns them into one journal record, and [DB.Apply] applies that
// record. It is visible to readers at once, and goes to Pebble with those that
// follow it and their sequence number in one atomic batch: see pending. After a crash the
// metastore opens at some earlier position, an exact prefix of what was
// applied, and the journal is replayed from there:
//
//	db, err := metastore.Open(metastore.Options{Dir: dir, Key: key, Journal: store})
//	err = store.Replay(db.Applied(), db.Apply)
//
//	txn := db.NewTxn()
//	txn.PutInode(ino, inode)
//	txn.PutDirent(parent, entry)
//	seq, err := store.Append(nil, func(seq uint64, _ cache.Ref) ([]byte, error) { return txn.Record(), nil })
//	err = db.Apply(seq, txn.Record())
//
// Files on disk are sealed block by block with the device's key (see
// FORMAT.md, "Metastore"). Before any of them is synced the journal is synced
// through the newest applied record, so that the metastore is never ahead of
// the journal.
//
// Ownership: byte slices and structures that readers return belong to the
// caller; slices handed to callbacks (Scan, Touched, Xattrs) are valid only
// during the call. Pebble owns its background goroutines; Close waits for
// them. A crash loses nothing that the journal keeps.
package metastore
