package metastore

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/defs-fs/defs/cache"
)

// The worked example of FORMAT.md, "Metastore". It must decode for ever.

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const goldenRecord = `
	01 0000000000000007 00000005
	01 0009 690001000000000002 00000058
	   01 000081a4 000003e8 000003e8 00000000 00000001 0000000000000005 0000000000000005
	   0000000000000000 17979cfe362a0000 0000000000000000 0000000000000000
	   00000001 00000000 0000000000000000 0000 00
	01 0011 6500010000000000020000000000000000 0000002a
	   01 01 00000005 000000000000002a 0000000000000003 00000040 00000005 0000000000000009 00000000
	01 0019 77000000000000000300010000000000020000000000000000 00000004 00000005
	02 000f 780001000000000002757365722e61
	03 0000000000000004`

func TestGoldenRecord(t *testing.T) {
	db, j := newTestDB(t)
	record := unhex(t, goldenRecord)
	if err := db.Apply(j.append(record), record); err != nil {
		t.Fatal(err)
	}
	ino := NewIno(1, 2)
	want := Inode{Mode: 0o100644, UID: 1000, GID: 1000, Nlink: 1, Size: 5, Allocated: 5, Mtime: 1700000000000000000, Generation: 1}
	if got, err := db.Inode(ino); err != nil || got != want {
		t.Errorf("inode: %+v, %v", got, err)
	}
	extent := Extent{Len: 5, Seq: 42, Local: cache.Ref{Segment: 3, Offset: 64, Length: 5, Nonce: 9}}
	if err := db.Extents(ino, 0, 5, func(e Extent) bool {
		if e != extent {
			t.Errorf("extent: %+v", e)
		}
		return true
	}); err != nil {
		t.Error(err)
	}
	if err := db.Unplaced(0, func(u Unplaced) bool {
		if u != (Unplaced{3, ino, 0, 5}) {
			t.Errorf("unplaced: %+v", u)
		}
		return true
	}); err != nil {
		t.Error(err)
	}
	touched := 0
	if err := db.Touched(0, func(_ []byte, lamport uint64) bool { touched += int(lamport); return true }); err != nil || touched != 3*7 {
		t.Errorf("touched: %d, %v", touched, err)
	}
	if g, err := db.Generation(); err != nil || g != 4 {
		t.Errorf("generation: %d, %v", g, err)
	}
}

const goldenFile = `
	446546536d737431
	3f6750f9f962c2882d634764f1dc45d7 4c896d4adfb984e6a04e1bd3
	11710baf892f2f6577b082213e4852e57ba4e564647ac9df5e1925779940a3a2 0a2f0222c6ed1193877de8506524b345
	0000000000000000 00000000 00000005
	bea043c897 653e940e19947e7a3a25cb60651b27ba`

func TestGoldenFile(t *testing.T) {
	mem := vfs.NewMem()
	putRawFile(t, mem, "f", unhex(t, goldenFile))
	var key [32]byte
	for i := range key {
		key[i] = byte(i)
	}
	fs, err := newSealedFS(mem, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readAll(t, fs, "f"); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
}
