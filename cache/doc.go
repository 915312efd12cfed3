// Package cache is the local segment store of one device: the write-back
// journal (dirty segments, pinned) and the clean cache (placed segments and
// fetched slices, evicted by use). Nothing is copied from one to the other: a
// segment turns clean where it lies.
//
//	s, err := cache.Open(cache.Options{Dir: dir, Key: deviceKey})
//	err = s.Replay(applied, func(seq uint64, meta []byte) error { return db.Apply(seq, meta) })
//
//	sealed, err := s.Seal(data)                    // outside any lock
//	seq, err := s.Append(sealed, func(seq uint64, ref cache.Ref) ([]byte, error) {
//		return recordThatNames(ref), nil       // the record's meta
//	})                                             // survives SIGKILL from here on
//	err = s.Sync(ctx, seq)                         // survives power loss from here on
//	err = s.ReadAt(ref, 0, data)
//
// Every record is a frame in a segment file: a header, the sealed data, the
// sealed meta (FORMAT.md, "Journal and clean cache"). Records have consecutive
// sequence numbers and are replayed in that order.
//
// Goroutines: Open starts two, Close waits for both. The flusher makes appended
// frames durable (one flush for all who wait in Sync; at least each second and
// each 64 MiB) and is the only one that flushes segments. The cleaner writes
// fetched slices to disk and removes the least recently used clean files.
// Append never waits for a flush.
//
// Buffers: Seal copies its input; Append takes over the Sealed. PutSlice keeps
// the slice it is given. The meta passed to Replay's function is valid during
// the call only. Apart from the bounded memory cache of slices the store holds
// pooled buffers of the operations under way and about 40 bytes for each slice
// on disk.
//
// A crash of the process loses nothing that Append returned. A power loss may
// lose the records that no Sync or background flush covered, always the newest
// ones; Open then finds the exact prefix. Bytes that were durable and do not
// verify are reported as ErrCorrupt and never returned. A failed write or flush
// is never retried into success: the store stays readable and answers
// ErrReadOnly to everything else.
//
// The caller makes sure that only one Store has a directory open.
package cache
