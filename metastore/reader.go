package metastore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cockroachdb/pebble/v2"
)

// Reader reads the tree. A DB reads the newest applied state (each call on its
// own); a Snapshot one fixed state. All methods may run concurrently. Errors
// are ErrNotFound, ErrCorrupt or an I/O error. Callbacks return false to stop.
type Reader interface {
	// Applied is the journal sequence up to which this state holds everything.
	Applied() uint64

	Inode(ino Ino) (Inode, error)
	Inodes(fn func(Ino, Inode) bool) error
	Dirent(parent Ino, name string) (Dirent, error)
	// ReadDir lists entries with cookies above after, in order of cookies.
	ReadDir(parent Ino, after uint64, fn func(Dirent) bool) error
	// Extents lists extents that overlap [from, to), in order of offsets.
	Extents(ino Ino, from, to uint64, fn func(Extent) bool) error
	Xattr(ino Ino, name string) ([]byte, error)
	// Xattrs lists attributes; value is valid during the call only.
	Xattrs(ino Ino, fn func(name string, value []byte) bool) error
	Orphans(fn func(Ino) bool) error

	Stripe(id [16]byte) (StripeInfo, error)
	Stripes(fn func(id [16]byte, s StripeInfo) bool) error
	Salt(id [16]byte) ([32]byte, error)
	Dedup(hash [32]byte) (Remote, error)
	// References lists the extents whose bytes are in a stripe, by slice.
	References(stripe [16]byte, fn func(Reference) bool) error
	// Unplaced lists extents that only the local segment store has, from a
	// segment on, in order of segment, inode, offset.
	Unplaced(fromSegment uint64, fn func(Unplaced) bool) error
	// Touched lists the tree keys that changed in a cut generation, with the
	// Lamport time of the last change; key is valid during the call only.
	Touched(generation uint64, fn func(key []byte, lamport uint64) bool) error

	// Counter returns a volume counter, 0 when it was never stored.
	Counter(name string) (uint64, error)
	Volume(name string) ([]byte, error)
	Meta(name string) ([]byte, error)
	// Generation is the current cut generation.
	Generation() (uint64, error)

	// Get returns a raw key's value.
	Get(key []byte) ([]byte, error)
	// Scan lists raw keys in [from, to); a nil to means to the end of the keys
	// that share from's first byte. key and value are valid during the call only.
	Scan(from, to []byte, fn func(key, value []byte) bool) error
}

var (
	_ Reader = (*DB)(nil)
	_ Reader = (*Snapshot)(nil)
)

// source is what a reader needs of a Pebble DB or snapshot.
type source interface {
	Get(key []byte) ([]byte, io.Closer, error)
	NewIter(o *pebble.IterOptions) (*pebble.Iterator, error)
}

// reader implements all of Reader but Applied.
type reader struct{ src source }

func wrapError(what string, err error) error {
	if errors.Is(err, ErrCorrupt) || !pebble.IsCorruptionError(err) {
		return fmt.Errorf("metastore: %s: %w", what, err)
	}
	return fmt.Errorf("metastore: %s: %w: %w", what, ErrCorrupt, err)
}

func (r reader) Get(key []byte) ([]byte, error) {
	var out []byte
	err := r.view(key, func(value []byte) error {
		out = append(make([]byte, 0, len(value)), value...)
		return nil
	})
	return out, err
}

// view calls fn with a value that is valid during the call only.
func (r reader) view(key []byte, fn func(value []byte) error) error {
	value, closer, err := r.src.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return ErrNotFound
	}
	if err != nil {
		return wrapError("get", err)
	}
	err = fn(value)
	return errors.Join(err, closer.Close())
}

func (r reader) Scan(from, to []byte, fn func(key, value []byte) bool) error {
	if to == nil && len(from) > 0 {
		to = successor(from[:1])
	}
	return r.scan(from, to, func(k, v []byte) (bool, error) { return fn(k, v), nil })
}

func (r reader) scan(from, to []byte, fn func(key, value []byte) (bool, error)) (err error) {
	it, err := r.src.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: to})
	if err != nil {
		return wrapError("scan", err)
	}
	defer func() {
		if closeErr := it.Close(); err == nil && closeErr != nil {
			err = wrapError("scan", closeErr)
		}
	}()
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return wrapError("scan", err)
		}
		more, err := fn(it.Key(), value)
		if err != nil || !more {
			return err
		}
	}
	return nil // the deferred Close returns what stopped the iterator
}

func (r reader) scanPrefix(prefix []byte, fn func(key, value []byte) (bool, error)) error {
	return r.scan(prefix, successor(prefix), fn)
}

// getter is what a point read needs; a reader or a Txn.
type getter interface {
	Get(key []byte) ([]byte, error)
}

func readInode(g getter, ino Ino) (n Inode, err error) {
	b, err := g.Get(inodeKey(ino))
	if err != nil {
		return n, err
	}
	return n, n.UnmarshalBinary(b)
}

func readDirent(g getter, parent Ino, name string) (Dirent, error) {
	if len(name) > NameBytesMax {
		return Dirent{}, ErrNotFound
	}
	b, err := g.Get(direntKey(parent, name))
	if err != nil {
		return Dirent{}, err
	}
	return decodeDirent(name, b)
}

func (r reader) Inode(ino Ino) (n Inode, err error) {
	err = r.view(inodeKey(ino), n.UnmarshalBinary)
	return n, err
}

func (r reader) Inodes(fn func(Ino, Inode) bool) error {
	return r.scanPrefix([]byte{prefixInode}, func(k, v []byte) (bool, error) {
		ino, err := decodeU64(k[1:])
		if err != nil {
			return false, err
		}
		var n Inode
		if err := n.UnmarshalBinary(v); err != nil {
			return false, err
		}
		return fn(Ino(ino), n), nil
	})
}

func (r reader) Dirent(parent Ino, name string) (Dirent, error) { return readDirent(r, parent, name) }

func (r reader) ReadDir(parent Ino, after uint64, fn func(Dirent) bool) error {
	if after == 1<<64-1 {
		return nil
	}
	to := successor(key8(prefixCookie, uint64(parent)))
	return r.scan(cookieKey(parent, after+1), to, func(k, v []byte) (bool, error) {
		cookie, err := decodeU64(k[9:])
		if err != nil {
			return false, err
		}
		e, err := decodeListing(cookie, v)
		if err != nil {
			return false, err
		}
		return fn(e), nil
	})
}

func (r reader) Extents(ino Ino, from, to uint64, fn func(Extent) bool) (err error) {
	if from >= to {
		return nil
	}
	it, err := r.src.NewIter(&pebble.IterOptions{
		LowerBound: extentKey(ino, 0),
		UpperBound: extentKey(ino, to),
	})
	if err != nil {
		return wrapError("extents", err)
	}
	defer func() {
		if closeErr := it.Close(); err == nil && closeErr != nil {
			err = wrapError("extents", closeErr)
		}
	}()
	// Extents do not overlap, so at most one that starts before from reaches
	// into the range: the last of those, and none where one starts at from.
	// Steps from key to key are avoided where they can be: Pebble walks over
	// every version of a key that was rewritten often.
	start := extentKey(ino, from)
	ok := it.SeekGE(start)
	if from > 0 && (!ok || !bytes.Equal(it.Key(), start)) {
		if err := it.Error(); err != nil {
			return wrapError("extents", err)
		}
		if ok = it.SeekLT(start); !ok {
			if err := it.Error(); err != nil {
				return wrapError("extents", err)
			}
			ok = it.First()
		}
	}
	for ; ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return wrapError("extents", err)
		}
		key := it.Key()
		if len(key) != 17 {
			return fmt.Errorf("metastore: extents of inode %d: key of %d bytes: %w", ino, len(key), ErrCorrupt)
		}
		e, err := decodeExtent(binary.BigEndian.Uint64(key[9:]), value)
		if err != nil {
			return err
		}
		if e.End() <= from {
			continue
		}
		if !fn(e) || e.End() >= to {
			return nil
		}
	}
	return nil // the deferred Close returns what stopped the iterator
}

func (r reader) Xattr(ino Ino, name string) ([]byte, error) {
	if len(name) > NameBytesMax {
		return nil, ErrNotFound
	}
	return r.Get(xattrKey(ino, name))
}

func (r reader) Xattrs(ino Ino, fn func(name string, value []byte) bool) error {
	return r.scanPrefix(key8(prefixXattr, uint64(ino)), func(k, v []byte) (bool, error) {
		return fn(string(k[9:]), v), nil
	})
}

func (r reader) Orphans(fn func(Ino) bool) error {
	return r.scanPrefix([]byte{prefixOrphan}, func(k, _ []byte) (bool, error) {
		ino, err := decodeU64(k[1:])
		return err == nil && fn(Ino(ino)), err
	})
}

func (r reader) Stripe(id [16]byte) (s StripeInfo, err error) {
	err = r.view(stripeKey(id), s.UnmarshalBinary)
	return s, err
}

func (r reader) Stripes(fn func(id [16]byte, s StripeInfo) bool) error {
	return r.scanPrefix([]byte{prefixStripe}, func(k, v []byte) (bool, error) {
		p, err := ParseTreeKey(k)
		if err != nil {
			return false, err
		}
		var s StripeInfo
		if err := s.UnmarshalBinary(v); err != nil {
			return false, err
		}
		return fn(p.Stripe, s), nil
	})
}

func (r reader) Salt(id [16]byte) (salt [32]byte, err error) {
	err = r.view(saltKey(id), func(b []byte) error {
		d := decoder{b: b}
		copy(salt[:], d.take(len(salt)))
		return d.end("salt")
	})
	return salt, err
}

func (r reader) Dedup(hash [32]byte) (out Remote, err error) {
	err = r.view(dedupKey(hash), func(b []byte) (err error) {
		out, err = decodeDedup(b)
		return err
	})
	return out, err
}

func (r reader) References(stripe [16]byte, fn func(Reference) bool) error {
	return r.scanPrefix(append([]byte{prefixRef}, stripe[:]...), func(k, v []byte) (bool, error) {
		d := decoder{b: k[1:]}
		ref := Reference{Stripe: d.id(), Slice: d.u32(), Ino: Ino(d.u64()), Off: d.u64()}
		length, err := decodeU32(v)
		if err := errors.Join(err, d.end("reference")); err != nil {
			return false, err
		}
		ref.Len = length
		return fn(ref), nil
	})
}

func (r reader) Unplaced(fromSegment uint64, fn func(Unplaced) bool) error {
	return r.scan(key8(prefixWrite, fromSegment), []byte{prefixWrite + 1}, func(k, v []byte) (bool, error) {
		d := decoder{b: k[1:]}
		u := Unplaced{Segment: d.u64(), Ino: Ino(d.u64()), Off: d.u64()}
		length, err := decodeU32(v)
		if err := errors.Join(err, d.end("unplaced extent")); err != nil {
			return false, err
		}
		u.Len = length
		return fn(u), nil
	})
}

func (r reader) Touched(generation uint64, fn func(key []byte, lamport uint64) bool) error {
	return r.scanPrefix(touchedKey(nil, generation, nil), func(k, v []byte) (bool, error) {
		lamport, err := decodeU64(v)
		if err != nil {
			return false, err
		}
		return fn(k[9:], lamport), nil
	})
}

// Changes lists the tree keys that changed in a cut generation, in order, with
// the value that each has in the snapshot: nil where it is gone. key and value
// are valid during the call only.
func (s *Snapshot) Changes(generation uint64, fn func(key, value []byte) bool) (err error) {
	// One iterator moves along with the keys: a search for each would cost
	// several times as much.
	values, err := s.src.NewIter(nil)
	if err != nil {
		return wrapError("changes", err)
	}
	defer func() {
		if closeErr := values.Close(); err == nil && closeErr != nil {
			err = wrapError("changes", closeErr)
		}
	}()
	var failed error
	err = s.Touched(generation, func(key []byte, _ uint64) bool {
		if !values.Valid() || bytes.Compare(values.Key(), key) < 0 {
			values.SeekGE(key)
		}
		if failed = values.Error(); failed != nil {
			return false
		}
		var value []byte
		if values.Valid() && bytes.Equal(values.Key(), key) {
			if value, failed = values.ValueAndErr(); failed != nil {
				return false
			}
			if value == nil {
				value = []byte{} // there, and empty
			}
		}
		return fn(key, value)
	})
	if failed != nil {
		return wrapError("changes", failed)
	}
	return err
}

func (r reader) Counter(name string) (uint64, error) { return r.number(volumeKey(name)) }

func (r reader) Generation() (uint64, error) { return r.number(keyGeneration) }

// number reads an 8-byte value, 0 when there is none.
func (r reader) number(key []byte) (n uint64, err error) {
	err = r.view(key, func(b []byte) (err error) {
		n, err = decodeU64(b)
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return 0, nil
	}
	return n, err
}

func (r reader) Volume(name string) ([]byte, error) { return r.Get(volumeKey(name)) }

func (r reader) Meta(name string) ([]byte, error) { return r.Get(metaKey(name)) }

func metaKey(name string) []byte { return append([]byte{prefixMeta}, name...) }

// Snapshot reads one fixed state. It keeps old tables alive: close it soon.
type Snapshot struct {
	reader
	snapshot *pebble.Snapshot
	applied  uint64
}

// Applied returns the position of the state.
func (s *Snapshot) Applied() uint64 { return s.applied }

// Close releases the state.
func (s *Snapshot) Close() error { return s.snapshot.Close() }
