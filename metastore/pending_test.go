package metastore

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// Reads must not tell what is in Pebble from what is not yet: a store that
// drains after each record is the reference.
func TestPendingIsInvisible(t *testing.T) {
	lazy, j := newTestDB(t)
	eager, j2 := newTestDB(t)
	rng, rng2 := rand.New(rand.NewPCG(3, 4)), rand.New(rand.NewPCG(3, 4))
	dump := func(db *DB, from, to []byte) string {
		var b bytes.Buffer
		if err := db.Scan(from, to, func(k, v []byte) bool { fmt.Fprintf(&b, "%x=%x\n", k, v); return true }); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	waiting, moving := 0, 0
	for i := range 3 * pendingRecordsMax {
		commit(t, lazy, j, func(txn *Txn) { randomTxn(rng, txn) })
		commit(t, eager, j2, func(txn *Txn) { randomTxn(rng2, txn) })
		if err := eager.drain(); err != nil {
			t.Fatal(err)
		}
		ino := Ino(i % 8)
		held := i%50 == 25 // Pebble is being given what is there, and does not have it yet
		if held {
			if err := lazy.awaitMove(); err != nil {
				t.Fatal(err)
			}
			lazy.pending.swap()
			moving += len(lazy.pending.moving.changes)
		}
		for _, key := range lazy.pending.keys() {
			got, err := lazy.Get([]byte(key))
			want, err2 := eager.Get([]byte(key))
			if !bytes.Equal(got, want) || fmt.Sprint(err) != fmt.Sprint(err2) {
				t.Fatalf("record %d, key %x: %x (%v), want %x (%v)", i, key, got, err, want, err2)
			}
			waiting++
		}
		if held {
			if err := lazy.move(lazy.Applied()); err != nil {
				t.Fatal(err)
			}
		}
		if i%97 != 0 {
			continue // listing drains
		}
		for _, kind := range []byte{prefixExtent, prefixCookie, prefixXattr} {
			from := key8(kind, uint64(ino))
			if got, want := dump(lazy, from, successor(from)), dump(eager, from, successor(from)); got != want {
				t.Fatalf("record %d, kind %q of inode %d:\n%swant\n%s", i, kind, ino, got, want)
			}
		}
		for _, kind := range []byte{prefixInode, prefixDirent, prefixWrite, prefixRef, prefixTouched, prefixStripe} {
			if got, want := dump(lazy, []byte{kind}, nil), dump(eager, []byte{kind}, nil); got != want {
				t.Fatalf("record %d, kind %q:\n%swant\n%s", i, kind, got, want)
			}
		}
	}
	if waiting == 0 || moving == 0 {
		t.Errorf("%d keys waited and %d moved", waiting, moving)
	}
}

// keys lists what Pebble may not have yet.
func (p *pending) keys() []string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return slices.AppendSeq(slices.Collect(maps.Keys(p.newest.changes)), maps.Keys(p.moving.changes))
}
