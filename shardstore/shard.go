package shardstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

const (
	columnBytes = 32 // erasure.ColumnBytes; the first bytes of a body
	// readPieceBytes is what is read before its checksums are computed: small
	// enough to be in the processor's own cache still. Whole blocks.
	readPieceBytes = 8 * sumBlockBytes
)

// Shard is what PutShard stores.
type Shard struct {
	Key
	Manifest    []byte // opaque here; equal for all shards of a stripe
	Partner     string // node with the other copy; empty for none
	Body        []byte // column (32 bytes) ‖ coded bytes, at least 33 bytes
	Outboard    []byte // hash tree over the coded bytes; opaque here
	Provisional bool   // dropped after Options.ProvisionalAge unless committed
}

// ShardInfo describes a stored shard.
type ShardInfo struct {
	Key
	Partner     string
	Provisional bool
	Proof       []byte // given to Commit
	Bytes       int    // of the body and its outboard
}

// Range is part of a shard.
type Range struct {
	ShardInfo
	Manifest   []byte
	Column     [columnBytes]byte
	CodedBytes int    // of the whole shard
	Offset     int    // of Coded in the shard's coded bytes; a multiple of 16 KiB
	Coded      []byte // whole 16 KiB groups, the last may be short
	Outboard   []byte
}

// PutShard stores a shard durably. Storing the same shard again changes
// nothing but the partner and lets a permanent put commit a provisional
// shard. ErrFull, ErrDeleted, ErrExists (other manifest).
func (s *Store) PutShard(ctx context.Context, sh Shard) error { return s.putShard(ctx, sh, false) }

// ReplaceShard is PutShard over a shard whose stored bytes are damaged.
func (s *Store) ReplaceShard(ctx context.Context, sh Shard) error { return s.putShard(ctx, sh, true) }

func (s *Store) putShard(ctx context.Context, sh Shard, replace bool) error {
	if len(sh.Body) <= columnBytes || len(sh.Partner) > math.MaxUint16 {
		return fmt.Errorf("put shard %v: body of %d bytes", sh.Key, len(sh.Body))
	}
	column, coded := sh.Body[:columnBytes], sh.Body[columnBytes:]
	m := meta{
		Key: sh.Key, Provisional: sh.Provisional, Coded: uint32(len(coded)), Outboard: uint32(len(sh.Outboard)),
		Partner: sh.Partner, Blob: sh.Manifest,
	}
	rec := newPending(kindShard, &m, coded, sh.Outboard, column)
	var stored, commit, partner bool
	seq, err := s.change(ctx, shardKey(sh.Key), func() (*pending, error) {
		if _, dead, err := get(s.index, tombstoneKey(sh.Key), func([]byte) (struct{}, error) { return struct{}{}, nil }); err != nil || dead {
			if err == nil {
				err = ErrDeleted
			}
			return nil, err
		}
		e, found, err := get(s.index, shardKey(sh.Key), decodeShardEntry)
		if err != nil {
			return nil, err
		}
		if found && !replace {
			_, old, _, err := s.recordMeta(e.location)
			if err == nil {
				if !bytes.Equal(old.Blob, sh.Manifest) {
					return nil, ErrExists
				}
				stored, commit, partner = true, e.Provisional && !sh.Provisional, e.Partner != sh.Partner && sh.Partner != ""
				return nil, nil
			}
			if !errors.Is(err, ErrCorrupt) {
				return nil, err
			}
		}
		return &rec, nil
	})
	if err == nil && seq != 0 {
		err = s.wait(ctx, seq)
	}
	if err == nil && stored && commit {
		err = s.Commit(ctx, nil, sh.Key)
	}
	if err == nil && stored && partner {
		err = s.SetPartner(ctx, sh.Key, sh.Partner)
	}
	if err != nil {
		return fmt.Errorf("put shard %v: %w", sh.Key, err)
	}
	return nil
}

// Stat describes a stored shard without reading its bytes. ErrNotFound.
func (s *Store) Stat(key Key) (ShardInfo, error) {
	e, found, err := get(s.index, shardKey(key), decodeShardEntry)
	if err == nil && !found {
		err = ErrNotFound
	}
	if err != nil {
		return ShardInfo{}, fmt.Errorf("shard %v: %w", key, err)
	}
	return e.info(key), nil
}

func (e shardEntry) info(key Key) ShardInfo {
	return ShardInfo{Key: key, Partner: e.Partner, Provisional: e.Provisional, Proof: e.Proof, Bytes: int(e.Data)}
}

// StoredBy returns a time at which the shard was stored already, as early as is
// known: of shards of earlier runs, when the last of these ended. ErrNotFound.
func (s *Store) StoredBy(key Key) (time.Time, error) {
	e, found, err := get(s.index, shardKey(key), decodeShardEntry)
	if err == nil && !found {
		err = ErrNotFound
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("shard %v: %w", key, err)
	}
	if e.Uptime < s.uptimeBase {
		return s.lastRun, nil
	}
	return s.started.Add(time.Duration(e.Uptime-s.uptimeBase+1) * time.Second), nil
}

// Has says whether the shard is stored; damage is not looked for.
func (s *Store) Has(key Key) bool {
	_, err := s.Stat(key)
	return err == nil
}

// Deleted says whether the shard was deleted by its owner; that is known for
// Options.TombstoneAge.
func (s *Store) Deleted(key Key) bool {
	_, dead, err := get(s.index, tombstoneKey(key), func([]byte) (struct{}, error) { return struct{}{}, nil })
	return err == nil && dead
}

// Manifest returns the manifest stored with the shard.
func (s *Store) Manifest(key Key) (ShardInfo, []byte, error) {
	for attempt := 0; ; attempt++ {
		e, found, err := get(s.index, shardKey(key), decodeShardEntry)
		if err == nil && !found {
			err = ErrNotFound
		}
		var m meta
		if err == nil {
			_, m, _, err = s.recordMeta(e.location)
		}
		if err == nil {
			return e.info(key), m.Blob, nil
		}
		if !errors.Is(err, ErrCorrupt) || attempt > 0 {
			return ShardInfo{}, nil, fmt.Errorf("shard %v: %w", key, err)
		}
	}
}

// ReadShard reads the 16 KiB groups that cover [off, off+n) of the coded
// bytes (n = 0: to the end), with column and outboard. Every byte is checked
// against its CRC32C. Coded and Outboard use buf's memory when it is large
// enough. ErrNotFound, ErrCorrupt, ErrRange.
func (s *Store) ReadShard(key Key, off, n int, buf []byte) (Range, error) {
	for attempt := 0; ; attempt++ {
		r, err := s.readShard(key, off, n, buf)
		// The shard may have been replaced between index and pack.
		if !errors.Is(err, ErrCorrupt) || attempt > 0 {
			if errors.Is(err, ErrCorrupt) {
				s.corruptRecords.Add(1)
			}
			if err != nil {
				err = fmt.Errorf("read shard %v: %w", key, err)
			}
			return r, err
		}
	}
}

func (s *Store) readShard(key Key, off, n int, buf []byte) (Range, error) {
	e, found, err := get(s.index, shardKey(key), decodeShardEntry)
	if err != nil {
		return Range{}, err
	}
	if !found {
		return Range{}, ErrNotFound
	}
	_, m, sums, err := s.recordMeta(e.location)
	if err != nil {
		return Range{}, err
	}
	coded := int(m.Coded)
	if n == 0 {
		n = coded - off
	}
	if off < 0 || n <= 0 || off+n > coded {
		return Range{}, fmt.Errorf("%w: %d+%d of %d bytes", ErrRange, off, n, coded)
	}
	first := off / sumBlockBytes * sumBlockBytes
	end := min(coded, (off+n+sumBlockBytes-1)/sumBlockBytes*sumBlockBytes)
	// What follows the coded bytes shares a CRC block with their end when
	// they are not whole blocks.
	tail := coded / sumBlockBytes * sumBlockBytes
	need := (end - first) + (int(e.Data) - tail)
	if cap(buf) < need {
		buf = make([]byte, need)
	}
	file, err := s.files.acquire(e.Pack)
	if err != nil {
		return Range{}, err
	}
	defer s.files.release(file)
	read := func(dst []byte, at int) error {
		for piece := range slices.Chunk(dst, readPieceBytes) {
			if _, err := file.ReadAt(piece, e.dataOffset()+int64(at)); err != nil {
				if errors.Is(err, io.EOF) {
					return ErrCorrupt
				}
				return err
			}
			if !checkSums(sums[at/sumBlockBytes*4:], piece) {
				return ErrCorrupt
			}
			at += len(piece)
		}
		return nil
	}
	r := Range{ShardInfo: e.info(key), Manifest: m.Blob, CodedBytes: coded, Offset: first}
	var last []byte // from tail to the end of the data
	if end >= tail {
		all := buf[:int(e.Data)-first]
		if err := read(all, first); err != nil {
			return Range{}, err
		}
		r.Coded, last = all[:end-first], all[tail-first:]
	} else {
		r.Coded, last = buf[:end-first], buf[end-first:need]
		if err := errors.Join(read(r.Coded, first), read(last, tail)); err != nil {
			return Range{}, err
		}
	}
	rest := last[coded-tail:]
	r.Outboard = rest[:m.Outboard]
	copy(r.Column[:], rest[m.Outboard:])
	return r, nil
}

// recordMeta reads and verifies header and meta of a record.
func (s *Store) recordMeta(loc location) (recordHeader, meta, []byte, error) {
	f, err := s.files.acquire(loc.Pack)
	if err != nil {
		return recordHeader{}, meta{}, nil, err
	}
	defer s.files.release(f)
	b := make([]byte, recordHeaderBytes+int(loc.Meta))
	if _, err := f.ReadAt(b, loc.Offset); err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrCorrupt
		}
		return recordHeader{}, meta{}, nil, err
	}
	h, err := decodeRecordHeader(b, s.id)
	if err != nil || h.Seq != loc.Seq || h.Meta != loc.Meta {
		return h, meta{}, nil, ErrCorrupt
	}
	m, sums, err := verifyMeta(h, b[recordHeaderBytes:])
	return h, m, sums, err
}

func verifyMeta(h recordHeader, b []byte) (meta, []byte, error) {
	if crc32.Checksum(b, castagnoli) != h.MetaCRC {
		return meta{}, nil, ErrCorrupt
	}
	m, sums, err := decodeMeta(h, b)
	if err != nil {
		return meta{}, nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return m, sums, nil
}

// onShards appends one record for each of the keys that is stored, and waits
// for all of them at once.
func (s *Store) onShards(ctx context.Context, keys []Key, build func(Key, shardEntry) *pending) (found []bool, err error) {
	found = make([]bool, len(keys))
	var last uint64
	for i, key := range keys {
		seq, err := s.change(ctx, shardKey(key), func() (*pending, error) {
			e, ok, err := get(s.index, shardKey(key), decodeShardEntry)
			found[i] = ok
			if err != nil || !ok {
				return nil, err
			}
			return build(key, e), nil
		})
		if err != nil {
			return nil, err
		}
		last = max(last, seq)
	}
	return found, s.wait(ctx, last)
}

// Commit makes provisional shards permanent. proof, at most 255 bytes and
// opaque here, is kept for whoever gets a copy. ErrNotFound when one of them is
// not stored; the others are committed all the same.
func (s *Store) Commit(ctx context.Context, proof []byte, keys ...Key) error {
	if len(proof) > proofBytesMax {
		return fmt.Errorf("commit shards: proof of %d bytes", len(proof))
	}
	found, err := s.onShards(ctx, keys, func(k Key, e shardEntry) *pending {
		if !e.Provisional {
			return nil
		}
		p := newPending(kindCommit, &meta{Key: k, Blob: proof})
		return &p
	})
	return notFound("commit shards", keys, found, err)
}

// SetPartner notes which node has the other copy; empty for none.
func (s *Store) SetPartner(ctx context.Context, key Key, partner string) error {
	found, err := s.onShards(ctx, []Key{key}, func(k Key, e shardEntry) *pending {
		if e.Partner == partner {
			return nil
		}
		p := newPending(kindPartner, &meta{Key: k, Partner: partner})
		return &p
	})
	return notFound("set partner", []Key{key}, found, err)
}

// Delete turns shards into tombstones: unreadable at once, not to be put
// again, bytes given back after Options.TombstoneAge. found tells which were
// stored. The caller has checked the owner's right.
func (s *Store) Delete(ctx context.Context, keys ...Key) (found []bool, err error) {
	return s.onShards(ctx, keys, func(k Key, _ shardEntry) *pending {
		p := newPending(kindDelete, &meta{Key: k})
		return &p
	})
}

// Drop removes shards that are kept elsewhere now. No tombstone stays.
func (s *Store) Drop(ctx context.Context, keys ...Key) error {
	_, err := s.onShards(ctx, keys, func(k Key, _ shardEntry) *pending {
		p := newPending(kindDrop, &meta{Key: k})
		return &p
	})
	return err
}

func notFound(op string, keys []Key, found []bool, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	for i, ok := range found {
		if !ok {
			return fmt.Errorf("%s: %v: %w", op, keys[i], ErrNotFound)
		}
	}
	return nil
}

// StripeShards returns the shards stored of one stripe, in ascending order.
func (s *Store) StripeShards(blind [32]byte) ([]ShardInfo, error) {
	var out []ShardInfo
	err := s.scan(idKey(prefixShard, blind), nil, func(key, value []byte) (bool, error) {
		e, err := decodeShardEntry(value)
		if err == nil {
			out = append(out, e.info(decodeKey(key[1:])))
		}
		return err == nil, err
	})
	return out, err
}

// Shards calls fn for each stored shard after the given key (zero Key: from
// the start, which skips a shard of the zero key only) until fn returns false.
// fn may use the store.
func (s *Store) Shards(after Key, fn func(ShardInfo) bool) error {
	from := shardKey(after)
	if after == (Key{}) {
		from = nil
	} else {
		from = append(from, 0)
	}
	return s.scan([]byte{prefixShard}, from, func(key, value []byte) (bool, error) {
		e, err := decodeShardEntry(value)
		return err == nil && fn(e.info(decodeKey(key[1:]))), err
	})
}

// PartnerShards calls fn for each shard whose other copy is on the partner.
func (s *Store) PartnerShards(partner string, fn func(Key) bool) error {
	prefix := partnerPrefix(partner)
	return s.scan(prefix, nil, func(key, _ []byte) (bool, error) {
		return len(key) == len(prefix)+keyBytes && fn(decodeKey(key[len(prefix):])), nil
	})
}

// scan visits the keys with the prefix, from a given one on.
func (s *Store) scan(prefix, from []byte, fn func(key, value []byte) (bool, error)) error {
	if from == nil {
		from = prefix
	}
	it, err := s.index.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: prefixEnd(prefix)})
	if err != nil {
		return fmt.Errorf("shard index: %w", err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		more, err := fn(it.Key(), it.Value())
		if err != nil {
			return errors.Join(err, it.Close())
		}
		if !more {
			break
		}
	}
	return errors.Join(it.Error(), it.Close())
}
