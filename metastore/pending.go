package metastore

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// pendingRecordsMax and pendingBytesMax bound what Apply gathers before it
	// goes to Pebble in one batch.
	pendingRecordsMax = 512
	pendingBytesMax   = 512 << 10
)

// pending is what the newest records have changed and Pebble does not have yet.
// Operations that follow each other change the same keys (an inode, its
// directory, the volume's usage), and keys in order cost Pebble a fraction of
// what they cost one by one. Nothing is less safe for it: what Pebble has not
// flushed is in the journal alone either way.
//
// It has two layers, so that records are added to one while Pebble is given the
// other: that runs beside the operations that follow, not as a part of one.
type pending struct {
	mu sync.RWMutex // guards the layers' maps
	// newest takes records. Only the holder of DB.applyMu changes it.
	newest *layer
	// moving is what Pebble is being given; empty at other times. It does not
	// change until Pebble has it all.
	moving *layer
}

type layer struct {
	changes map[string]pendingChange
	groups  map[group]int // how many keys of changes begin so

	records, bytes int
}

type pendingChange struct {
	value   []byte // never changed
	deleted bool
	lamport uint64
}

// group is how keys begin that are listed together: kind and inode.
type group [9]byte

func groupOf[T string | []byte](key T) (g group) {
	copy(g[:], key)
	return g
}

func newLayer() *layer {
	return &layer{changes: make(map[string]pendingChange), groups: make(map[group]int)}
}

func newPending() *pending { return &pending{newest: newLayer(), moving: newLayer()} }

func (l *layer) full() bool { return l.records >= pendingRecordsMax || l.bytes >= pendingBytesMax }

func (l *layer) clear() {
	clear(l.changes)
	clear(l.groups)
	l.records, l.bytes = 0, 0
}

// add takes over the changes of one record, and their values.
func (p *pending) add(lamport uint64, mutations []mutation) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.newest
	for _, m := range mutations {
		if _, ok := l.changes[string(m.key)]; !ok {
			l.groups[groupOf(m.key)]++
		}
		l.changes[string(m.key)] = pendingChange{value: m.value, deleted: m.op == opDelete, lamport: lamport}
		l.bytes += len(m.key) + len(m.value)
	}
	l.records++
}

// swap makes the newest layer the one that moves; that was empty.
func (p *pending) swap() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.newest, p.moving = p.moving, p.newest
}

// moved forgets what Pebble has now.
func (p *pending) moved() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.moving.clear()
}

func (p *pending) get(key []byte) (pendingChange, bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	c, ok := p.newest.changes[string(key)]
	if !ok {
		c, ok = p.moving.changes[string(key)]
	}
	return c, ok
}

// overlaps says whether a key in [from, to) may have changed.
func (p *pending) overlaps(from, to []byte) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.newest.overlaps(from, to) || p.moving.overlaps(from, to)
}

func (l *layer) overlaps(from, to []byte) bool {
	if len(l.changes) == 0 {
		return false
	}
	if len(from) < len(group{}) || from[0] == prefixTouched { // what was touched is listed by move
		return true
	}
	g := groupOf(from)
	if bytes.HasPrefix(to, g[:]) || bytes.Equal(to, successor(g[:])) {
		return l.groups[g] > 0
	}
	return true
}

// newest reads Pebble and what it does not have yet.
type newest struct{ db *DB }

func (n newest) Get(key []byte) ([]byte, io.Closer, error) {
	c, ok := n.db.pending.get(key)
	switch {
	case !ok:
		return n.db.pebble.Get(key)
	case c.deleted:
		return nil, nil, pebble.ErrNotFound
	}
	return c.value, io.NopCloser(nil), nil
}

// NewIter first gives Pebble what has changed in the range.
func (n newest) NewIter(o *pebble.IterOptions) (*pebble.Iterator, error) {
	if o == nil || n.db.pending.overlaps(o.LowerBound, o.UpperBound) {
		if err := n.db.drain(); err != nil {
			return nil, err
		}
	}
	return n.db.pebble.NewIter(o)
}

// drain gives Pebble what it does not have yet. That touches no disk: after a
// failed write too, what was applied can be read.
func (db *DB) drain() error {
	db.applyMu.Lock()
	defer db.applyMu.Unlock()
	return db.drainLocked()
}

func (db *DB) drainLocked() error {
	if err := db.awaitMove(); err != nil || db.pending.newest.records == 0 {
		return err
	}
	db.pending.swap()
	return db.move(db.applied.Load())
}

// drainBehind begins to give Pebble what it does not have yet. It waits where
// Pebble has not taken yet what it was given before.
func (db *DB) drainBehind() error {
	if err := db.awaitMove(); err != nil {
		return err
	}
	db.pending.swap()
	seq := db.applied.Load()
	db.mover.Go(func() { db.moveErr = db.move(seq) })
	return nil
}

// awaitMove returns when nothing moves. An error stays: what did not move can
// still be read key by key.
func (db *DB) awaitMove() error {
	db.mover.Wait()
	return db.moveErr
}

// move gives Pebble the layer that moves, which ends with record seq. One call
// at a time.
func (db *DB) move(seq uint64) error {
	l := db.pending.moving
	keys := make([]string, 0, len(l.changes))
	for key := range l.changes {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	batch := db.pebble.NewBatchWithSize(4*l.bytes + 256)
	var key []byte
	for _, k := range keys {
		c := l.changes[k]
		key = append(key[:0], k...)
		var err error
		if c.deleted {
			err = batch.Delete(key, nil)
		} else {
			err = batch.Set(key, c.value, nil)
		}
		if err == nil {
			err = db.touch(batch, c.lamport, key)
		}
		if err != nil {
			return db.commitFailed(batch, err)
		}
	}
	if err := db.commit(batch, seq); err != nil {
		return err
	}
	db.pending.moved()
	return nil
}

// commit writes a batch that brings Pebble to record seq.
func (db *DB) commit(batch *pebble.Batch, seq uint64) error {
	err := setNumber(batch, keyApplied, seq)
	if err == nil && db.applying.Load() == 0 {
		err = setNumber(batch, keySchema, schemaVersion)
	}
	if err == nil {
		db.applying.Store(seq)
		err = batch.Commit(pebble.NoSync)
	}
	if err != nil {
		return db.commitFailed(batch, err)
	}
	return batch.Close()
}

// commitFailed ends all writing: Pebble is behind what was applied.
func (db *DB) commitFailed(batch *pebble.Batch, err error) error {
	err = fmt.Errorf("metastore: apply records through %d: %w", db.applied.Load(), err)
	db.fs.state.fail(err)
	_ = batch.Close()
	return err
}

// touch lists a tree key under the current generation.
func (db *DB) touch(batch *pebble.Batch, lamport uint64, key []byte) error {
	if !IsTreeKey(key) {
		return nil
	}
	db.key = touchedKey(db.key[:0], db.generation, key)
	var value [8]byte
	binary.BigEndian.PutUint64(value[:], lamport)
	return batch.Set(db.key, value[:], nil)
}
