package metastore

import (
	"bytes"
	"fmt"
	"math/rand/v2"
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
	waiting := 0
	for i := range 3 * pendingRecordsMax {
		commit(t, lazy, j, func(txn *Txn) { randomTxn(rng, txn) })
		commit(t, eager, j2, func(txn *Txn) { randomTxn(rng2, txn) })
		if err := eager.drain(); err != nil {
			t.Fatal(err)
		}
		ino := Ino(i % 8)
		for key := range lazy.pending.changes {
			got, err := lazy.Get([]byte(key))
			want, err2 := eager.Get([]byte(key))
			if !bytes.Equal(got, want) || fmt.Sprint(err) != fmt.Sprint(err2) {
				t.Fatalf("record %d, key %x: %x (%v), want %x (%v)", i, key, got, err, want, err2)
			}
			waiting++
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
	if waiting == 0 {
		t.Error("nothing ever waited")
	}
}
