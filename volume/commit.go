package volume

import (
	"errors"
	"fmt"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
)

var (
	// errUnchanged ends a build that found nothing to do: no record is written and the commit succeeds.
	errUnchanged = errors.New("nothing to change")
	// errRecordTooLarge: the change touches too much for one record. The caller takes it in steps.
	errRecordTooLarge = errors.New("change too large for one record")
)

// recordMaxBytes bounds a record well below what journal and metastore accept.
const recordMaxBytes = 4 << 20

// tx is one mutation being built: the record's changes, the inodes it loads and replaces, and what it adds to
// the volume's usage. It sees its own inode changes, and nothing else of its own.
type tx struct {
	*metastore.Txn
	v       *Volume
	now     int64  // ns, the time of every stamp of this mutation
	seq     uint64 // journal sequence that the record will have
	changed []changedInode
	names   []changedName
	extents []changedExtent
	bytes   int64  // added to usage
	inodes  int64  // added to usage
	bound   uint64 // of the numbers reserved by this mutation; 0 = none
	reaps   []Ino  // to hand to the reaper once applied

	background bool // bookkeeping of the publisher, which asks for no cut of its own
}

type changedInode struct {
	ino     Ino
	n       metastore.Inode
	deleted bool
}

// inode returns an inode as this mutation sees it; NotExist when there is none.
func (t *tx) inode(ino Ino) (metastore.Inode, error) {
	for i := range t.changed {
		if c := &t.changed[i]; c.ino == ino {
			if c.deleted {
				return metastore.Inode{}, NotExist
			}
			return c.n, nil
		}
	}
	return t.v.inodes.load(ino)
}

// putInode replaces an inode.
func (t *tx) putInode(ino Ino, n metastore.Inode) { t.change(changedInode{ino: ino, n: n}) }

// deleteInode removes an inode. Its extents and attributes are the caller's to remove.
func (t *tx) deleteInode(ino Ino) { t.change(changedInode{ino: ino, deleted: true}) }

func (t *tx) change(c changedInode) {
	for i := range t.changed {
		if t.changed[i].ino == c.ino {
			t.changed[i] = c
			return
		}
	}
	t.changed = append(t.changed, c)
}

// addEntry adds an entry whose name is free. The directory's inode changes with it.
func (t *tx) addEntry(parent Ino, d metastore.Dirent) {
	t.AddDirent(parent, d)
	t.names = append(t.names, changedName{parent: parent, entry: d})
}

// deleteEntry removes an entry. The directory's inode changes with it.
func (t *tx) deleteEntry(parent Ino, d metastore.Dirent) {
	t.DeleteDirent(parent, d)
	t.names = append(t.names, changedName{parent: parent, entry: d, free: true})
}

// AddExtent adds an extent where none starts.
func (t *tx) AddExtent(ino Ino, e metastore.Extent) {
	t.Txn.AddExtent(ino, e)
	t.extents = append(t.extents, changedExtent{ino: ino, e: e})
}

// PutExtent adds an extent, or replaces one of the same place and length.
func (t *tx) PutExtent(ino Ino, e metastore.Extent) {
	t.Txn.PutExtent(ino, e)
	t.extents = append(t.extents, changedExtent{ino: ino, e: e})
}

// DeleteExtent removes an extent, given as it was read.
func (t *tx) DeleteExtent(ino Ino, e metastore.Extent) {
	t.Txn.DeleteExtent(ino, e)
	t.extents = append(t.extents, changedExtent{ino: ino, e: e, deleted: true})
}

// stripes returns the stripes of the inodes that the mutation changes.
func (t *tx) stripes() (set stripeSet) {
	for i := range t.changed {
		set.add(t.changed[i].ino)
	}
	for i := range t.extents {
		set.add(t.extents[i].ino)
	}
	return set
}

// record writes the collected inodes and the usage into the transaction and encodes it.
func (t *tx) record() ([]byte, error) {
	for i := range t.changed {
		if c := &t.changed[i]; c.deleted {
			t.DeleteInode(c.ino)
		} else {
			t.PutInode(c.ino, c.n)
		}
	}
	if t.bytes != 0 || t.inodes != 0 {
		u := t.v.usage.plus(t.bytes, t.inodes)
		t.PutMeta(usageName, u.marshal())
	}
	switch err := t.Err(); {
	case err != nil:
		return nil, err
	case t.Empty():
		return nil, errUnchanged
	case t.Bytes() > recordMaxBytes:
		return nil, errRecordTooLarge
	}
	return t.Record(), nil
}

// commit is the path of every mutation. Under the order lock it lets build check the state and collect changes,
// appends the record to the journal and applies it to the metastore. The change has reached the page cache
// (it survives SIGKILL) when commit returns; it is not flushed. Nothing is written when build fails.
// build runs under v.mu: it must not wait for the network or a flush.
func (v *Volume) commit(build func(*tx) error) (seq uint64, err error) {
	return v.commitData(nil, func(t *tx, _ uint64, _ cache.Ref) error { return build(t) })
}

// commitData is commit for a record that carries bytes; build learns where they are kept.
func (v *Volume) commitData(sealed *cache.Sealed, build func(*tx, uint64, cache.Ref) error) (seq uint64, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.commitLocked(sealed, build)
}

func (v *Volume) commitLocked(sealed *cache.Sealed, build func(*tx, uint64, cache.Ref) error) (seq uint64, err error) {
	if err := v.failure(); err != nil {
		return 0, err
	}
	t := &tx{Txn: v.db.NewTxn(), v: v, now: v.clock().UnixNano()}
	var record []byte
	seq, err = v.store.Append(sealed, func(seq uint64, ref cache.Ref) ([]byte, error) {
		t.seq = seq
		if err := build(t, seq, ref); err != nil {
			return nil, err
		}
		var err error
		record, err = t.record()
		return record, err
	})
	if err == errUnchanged {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	stripes := t.stripes()
	v.inodes.lockAll(stripes)
	err = v.db.Apply(seq, record)
	if err == nil {
		v.inodes.replace(t.changed)
		v.names.replace(t.names)
		v.extents.replace(t.extents)
	}
	v.inodes.unlockAll(stripes)
	if err != nil {
		// The journal has the record, the metastore has not: only a replay brings them together again.
		v.fail(fmt.Errorf("apply journal record %d to the metastore: %w; mount the volume again to replay the journal", seq, err))
		return 0, v.failure()
	}
	v.usage = v.usage.plus(t.bytes, t.inodes)
	v.boundID = max(v.boundID, t.bound)
	v.lastSeq.Store(seq)
	if !t.background {
		v.lastChange.Store(seq)
		v.foreground.note()
	}
	for _, ino := range t.reaps {
		v.reaper.add(ino)
	}
	select {
	case v.changed <- struct{}{}:
	default:
	}
	return seq, nil
}

// beginCut ends a generation of changes: it journals the next generation number and returns a snapshot of the tree
// as of seq. gen is the generation that ended; Touched(gen) on the snapshot lists the keys changed in it.
// The caller closes the snapshot.
func (v *Volume) beginCut() (snapshot *metastore.Snapshot, seq, gen uint64, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if gen, err = v.db.Generation(); err != nil {
		return nil, 0, 0, wrap("begin cut", 0, err)
	}
	seq, err = v.commitLocked(nil, func(t *tx, _ uint64, _ cache.Ref) error {
		t.background = true
		t.SetGeneration(gen + 1)
		return nil
	})
	if err != nil {
		return nil, 0, 0, wrap("begin cut", 0, err)
	}
	if snapshot, err = v.db.Snapshot(); err != nil {
		return nil, 0, 0, wrap("begin cut", 0, err)
	}
	return snapshot, seq, gen, nil
}

// newID returns a number never used before on this device, with the device's slot on top. Inode numbers and
// directory cookies come from the same sequence. The journaled bound runs ahead, so that few records carry it;
// a crash skips what was left below it.
func (t *tx) newID() Ino {
	v := t.v
	if v.nextID >= max(v.boundID, t.bound) {
		t.bound = v.nextID + idsPerReservation
		t.PutCounter(metastore.CounterIno, t.bound)
	}
	id := v.nextID
	v.nextID++
	return metastore.NewIno(v.device, id)
}

const (
	// idFirst is the first number handed out: the root is 1, and cookies 1 and 2 stand for "." and "..".
	idFirst           = 16
	idsPerReservation = 4096
)
