package metastore

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// Changes says what Touched and Get say together, over tables and memory.
func TestChangesAreTouchedKeysWithValues(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		db, j := newTestDB(t)
		for range rapid.IntRange(1, 30).Draw(rt, "transactions") {
			commit(t, db, j, func(txn *Txn) {
				for range rapid.IntRange(1, 5).Draw(rt, "changes") {
					ino := Ino(rapid.IntRange(2, 40).Draw(rt, "ino"))
					switch rapid.IntRange(0, 3).Draw(rt, "change") {
					case 0, 1:
						txn.PutInode(ino, Inode{Size: rapid.Uint64().Draw(rt, "size")})
					case 2:
						txn.DeleteInode(ino)
					case 3:
						txn.PutDirent(1, Dirent{Ino: ino, Type: 8, Cookie: uint64(ino), Name: "x"})
					}
				}
			})
			if rapid.IntRange(0, 9).Draw(rt, "flush") == 0 {
				if err := db.Flush(t.Context()); err != nil {
					rt.Fatal(err)
				}
			}
		}
		snapshot, err := db.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		defer snapshot.Close()
		type change struct{ key, value []byte }
		var want []change
		if err := snapshot.Touched(0, func(key []byte, _ uint64) bool {
			value, err := snapshot.Get(key)
			if err != nil && !errors.Is(err, ErrNotFound) {
				rt.Fatal(err)
			}
			want = append(want, change{bytes.Clone(key), value})
			return true
		}); err != nil {
			rt.Fatal(err)
		}
		if len(want) == 0 {
			rt.Fatal("nothing was touched")
		}
		if err := snapshot.Changes(0, func(key, value []byte) bool {
			if len(want) == 0 || !bytes.Equal(key, want[0].key) || !bytes.Equal(value, want[0].value) || (value == nil) != (want[0].value == nil) {
				rt.Fatalf("key %x has %x, want %+v", key, value, want)
			}
			want = want[1:]
			return true
		}); err != nil {
			rt.Fatal(err)
		}
		if len(want) != 0 {
			rt.Fatalf("left out: %x", want)
		}
	})
}
