package metastore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Txn collects the changes of one operation, keeps derived keys right, and
// turns them into one journal record. It sees its own changes through Get,
// Inode and Dirent. A Txn is for one goroutine; the caller holds the order
// lock under which the record is appended and applied.
type Txn struct {
	// Lamport is the operation's logical time, stored with every tree key that
	// it changes. 0 stands for the journal sequence.
	Lamport uint64

	base      reader
	mutations []mutation
	few       [searchMax]mutation // where mutations begins: most operations need no more
	index     map[string]int      // key → position in mutations; nil while these are few
	err       error
}

// searchMax is how many mutations are searched one by one.
const searchMax = 8

// NewTxn starts an empty Txn over the newest state.
func (db *DB) NewTxn() *Txn { return newTxn(db.reader) }

func newTxn(base reader) *Txn {
	t := &Txn{base: base}
	t.mutations = t.few[:0]
	return t
}

// Empty reports whether the Txn changes nothing.
func (t *Txn) Empty() bool { return len(t.mutations) == 0 }

// Err returns the first failure of a Put or Delete. Record panics when there
// is one, so check it first.
func (t *Txn) Err() error { return t.err }

func (t *Txn) fail(err error) {
	if t.err == nil {
		t.err = err
	}
}

func (t *Txn) add(m mutation) {
	if err := m.validate(); err != nil {
		t.fail(err)
		return
	}
	if i, ok := t.find(m.key); ok {
		t.mutations[i] = m
		return
	}
	t.mutations = append(t.mutations, m)
	switch n := len(t.mutations); {
	case n <= searchMax:
	case t.index == nil:
		t.index = make(map[string]int, 2*n)
		for i := range t.mutations {
			t.index[string(t.mutations[i].key)] = i
		}
	default:
		t.index[string(m.key)] = n - 1
	}
}

// find returns the position of a key's mutation.
func (t *Txn) find(key []byte) (int, bool) {
	if t.index != nil {
		i, ok := t.index[string(key)]
		return i, ok
	}
	for i := range t.mutations {
		if bytes.Equal(t.mutations[i].key, key) {
			return i, true
		}
	}
	return 0, false
}

func (t *Txn) put(key, value []byte) { t.add(mutation{op: opPut, key: key, value: value}) }
func (t *Txn) del(key []byte)        { t.add(mutation{op: opDelete, key: key}) }

// Put sets a raw key. It keeps no derived key right: see PutTree. The Txn
// keeps both slices.
func (t *Txn) Put(key, value []byte) { t.put(key, value) }

// Delete removes a raw key. The Txn keeps the slice.
func (t *Txn) Delete(key []byte) { t.del(key) }

// Get returns a key's value as the Txn leaves it, or ErrNotFound.
func (t *Txn) Get(key []byte) ([]byte, error) {
	if i, ok := t.find(key); ok {
		if m := t.mutations[i]; m.op == opPut {
			return append([]byte(nil), m.value...), nil
		}
		return nil, ErrNotFound
	}
	return t.base.Get(key)
}

// old reads what a Put is about to replace; nil when there is nothing.
func (t *Txn) old(key []byte) []byte {
	b, err := t.Get(key)
	if err != nil && !errors.Is(err, ErrNotFound) {
		t.fail(err)
	}
	return b
}

// Inode returns an inode as the Txn leaves it, or ErrNotFound.
func (t *Txn) Inode(ino Ino) (Inode, error) { return readInode(t, ino) }

// Dirent returns a directory entry as the Txn leaves it, or ErrNotFound.
func (t *Txn) Dirent(parent Ino, name string) (Dirent, error) { return readDirent(t, parent, name) }

// PutInode sets an inode.
func (t *Txn) PutInode(ino Ino, n Inode) {
	b, err := n.MarshalBinary()
	if err != nil {
		t.fail(err)
		return
	}
	t.put(inodeKey(ino), b)
}

// DeleteInode removes an inode, but not its names, extents or attributes.
func (t *Txn) DeleteInode(ino Ino) { t.del(inodeKey(ino)) }

// PutDirent sets a directory entry and its place in the listing; an entry of
// the same name is replaced.
func (t *Txn) PutDirent(parent Ino, e Dirent) {
	if len(e.Name) == 0 || len(e.Name) > NameBytesMax {
		t.fail(fmt.Errorf("put entry in directory %d: name of %d bytes: out of range", parent, len(e.Name)))
		return
	}
	key := direntKey(parent, e.Name)
	if b := t.old(key); b != nil {
		was, err := decodeDirent(e.Name, b)
		if err != nil {
			t.fail(err)
			return
		}
		if was.Cookie != e.Cookie {
			t.del(cookieKey(parent, was.Cookie))
		}
	}
	t.AddDirent(parent, e)
}

// AddDirent is PutDirent for a name that the caller knows to be free, in the
// state or since this Txn: it saves the look at what is there, which is slow
// for a name that comes and goes often.
func (t *Txn) AddDirent(parent Ino, e Dirent) {
	if len(e.Name) == 0 || len(e.Name) > NameBytesMax {
		t.fail(fmt.Errorf("add entry to directory %d: name of %d bytes: out of range", parent, len(e.Name)))
		return
	}
	t.put(direntKey(parent, e.Name), encodeDirent(e))
	t.put(cookieKey(parent, e.Cookie), encodeListing(e))
}

// DeleteDirent removes a directory entry, given as it was read.
func (t *Txn) DeleteDirent(parent Ino, e Dirent) {
	t.del(direntKey(parent, e.Name))
	t.del(cookieKey(parent, e.Cookie))
}

// PutExtent sets the extent at e.Off; one that starts there is replaced. It
// does not look for other overlaps: the caller trims those first.
func (t *Txn) PutExtent(ino Ino, e Extent) {
	if b := t.old(extentKey(ino, e.Off)); b != nil {
		was, err := decodeExtent(e.Off, b)
		if err != nil {
			t.fail(err)
			return
		}
		t.dropDerived(ino, was)
	}
	t.AddExtent(ino, e)
}

// AddExtent is PutExtent where no extent starts at e.Off, in the state or
// since this Txn: it saves the look at what is there.
func (t *Txn) AddExtent(ino Ino, e Extent) {
	value := encodeExtent(e)
	if _, err := decodeExtent(e.Off, value); err != nil {
		t.fail(fmt.Errorf("put extent of inode %d at %d: lengths do not fit", ino, e.Off))
		return
	}
	t.put(extentKey(ino, e.Off), value)
	length := binary.BigEndian.AppendUint32(nil, e.Len)
	if e.HasRemote {
		t.put(refKey(e.Remote, ino, e.Off), length)
	} else {
		t.put(writeKey(e.Local.Segment, ino, e.Off), length)
	}
}

// DeleteExtent removes an extent, given as it was read.
func (t *Txn) DeleteExtent(ino Ino, e Extent) {
	t.del(extentKey(ino, e.Off))
	t.dropDerived(ino, e)
}

func (t *Txn) dropDerived(ino Ino, e Extent) {
	if e.HasRemote {
		t.del(refKey(e.Remote, ino, e.Off))
	} else {
		t.del(writeKey(e.Local.Segment, ino, e.Off))
	}
}

// PutXattr sets an extended attribute. The Txn keeps value.
func (t *Txn) PutXattr(ino Ino, name string, value []byte) {
	if len(name) == 0 || len(name) > NameBytesMax {
		t.fail(fmt.Errorf("put attribute of inode %d: name of %d bytes: out of range", ino, len(name)))
		return
	}
	t.put(xattrKey(ino, name), value)
}

// DeleteXattr removes an extended attribute.
func (t *Txn) DeleteXattr(ino Ino, name string) { t.del(xattrKey(ino, name)) }

// PutOrphan marks an inode that has no name left but may still be open.
func (t *Txn) PutOrphan(ino Ino) { t.put(orphanKey(ino), nil) }

// DeleteOrphan takes the mark away.
func (t *Txn) DeleteOrphan(ino Ino) { t.del(orphanKey(ino)) }

// PutStripe sets what is known of a stripe.
func (t *Txn) PutStripe(id [16]byte, s StripeInfo) {
	b, err := s.MarshalBinary()
	if err != nil {
		t.fail(err)
		return
	}
	t.put(stripeKey(id), b)
}

// DeleteStripe forgets a stripe and its salt.
func (t *Txn) DeleteStripe(id [16]byte) {
	t.del(stripeKey(id))
	t.del(saltKey(id))
}

// PutSalt caches a stripe's salt on this device.
func (t *Txn) PutSalt(id [16]byte, salt [32]byte) { t.put(saltKey(id), salt[:]) }

// PutDedup remembers in which slice content with this keyed hash is stored.
// r.Off is 0.
func (t *Txn) PutDedup(hash [32]byte, r Remote) { t.put(dedupKey(hash), encodeDedup(r)) }

// DeleteDedup forgets a hash.
func (t *Txn) DeleteDedup(hash [32]byte) { t.del(dedupKey(hash)) }

// PutCounter stores a volume counter such as CounterIno.
func (t *Txn) PutCounter(name string, value uint64) {
	t.put(volumeKey(name), binary.BigEndian.AppendUint64(nil, value))
}

// PutVolume stores a volume-wide value (a policy, a setting). The Txn keeps
// value.
func (t *Txn) PutVolume(name string, value []byte) { t.put(volumeKey(name), value) }

// PutMeta stores a value of this device alone. "applied", "generation" and
// "schema" are taken. The Txn keeps value.
func (t *Txn) PutMeta(name string, value []byte) { t.put(metaKey(name), value) }

// DeleteMeta removes a value of this device alone.
func (t *Txn) DeleteMeta(name string) { t.del(metaKey(name)) }

// SetGeneration starts a cut generation: from the next record on, changed tree
// keys are listed under it.
func (t *Txn) SetGeneration(generation uint64) {
	t.add(mutation{op: opSetGeneration, generation: generation, key: keyGeneration})
}

// DropTouched forgets which keys changed in a generation.
func (t *Txn) DropTouched(generation uint64) {
	t.add(mutation{op: opDropTouched, generation: generation, key: touchedKey(nil, generation, nil)})
}

// PutTree applies a published key and value: as Put, and derived keys are kept
// right. A key or value that does not decode is an error.
func (t *Txn) PutTree(key, value []byte) error {
	p, err := ParseTreeKey(key)
	if err != nil {
		return err
	}
	switch p.Kind {
	case prefixDirent:
		e, err := decodeDirent(p.Name, value)
		if err != nil {
			return err
		}
		t.PutDirent(p.Ino, e)
	case prefixExtent:
		e, err := decodeExtent(p.Off, value)
		if err != nil {
			return err
		}
		t.PutExtent(p.Ino, e)
	case prefixInode:
		var n Inode
		if err := n.UnmarshalBinary(value); err != nil {
			return err
		}
		t.PutInode(p.Ino, n)
	case prefixStripe:
		var s StripeInfo
		if err := s.UnmarshalBinary(value); err != nil {
			return err
		}
		t.PutStripe(p.Stripe, s)
	default:
		t.put(append([]byte(nil), key...), append([]byte(nil), value...))
	}
	return t.err
}

// DeleteTree removes a published key and what is derived from it.
func (t *Txn) DeleteTree(key []byte) error {
	p, err := ParseTreeKey(key)
	if err != nil {
		return err
	}
	b := t.old(key)
	switch {
	case p.Kind == prefixDirent && b != nil:
		e, err := decodeDirent(p.Name, b)
		if err != nil {
			return err
		}
		t.DeleteDirent(p.Ino, e)
	case p.Kind == prefixExtent && b != nil:
		e, err := decodeExtent(p.Off, b)
		if err != nil {
			return err
		}
		t.DeleteExtent(p.Ino, e)
	case p.Kind == prefixStripe:
		t.DeleteStripe(p.Stripe)
	default:
		t.del(append([]byte(nil), key...))
	}
	return t.err
}

// PublicValue returns a tree key's value without what concerns this device
// alone (the place of an extent in the local segment store), as the log
// publishes it. An extent that is not placed yet keeps neither place.
func PublicValue(key, value []byte) ([]byte, error) {
	p, err := ParseTreeKey(key)
	if err != nil || p.Kind != prefixExtent {
		return value, err
	}
	e, err := decodeExtent(p.Off, value)
	if err != nil {
		return nil, err
	}
	e.Local.Length = 0 // no local place: the rest of Local is not encoded
	return encodeExtent(e), nil
}

// DecodeExtent decodes the value of the "e" key of an extent at off.
func DecodeExtent(off uint64, value []byte) (Extent, error) { return decodeExtent(off, value) }
