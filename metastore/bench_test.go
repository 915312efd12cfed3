package metastore

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/defs-fs/defs/cache"
)

// benchDB opens a metastore on disk with the real sizes.
func benchDB(b *testing.B) (*DB, *fakeJournal) {
	b.Helper()
	j := &fakeJournal{}
	db, err := Open(Options{Dir: b.TempDir(), Journal: discardJournal{}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	return db, j
}

func create(txn *Txn, n uint64) {
	ino := Ino(1000 + n)
	txn.PutDirent(1, Dirent{Ino: ino, Type: 8, Cookie: 3 + n, Name: fmt.Sprintf("file-%08d.txt", n)})
	txn.PutInode(ino, Inode{Mode: 0o100644, Nlink: 1, Mtime: int64(n)})
	txn.PutInode(1, Inode{Mode: 0o40755, Nlink: 2, Mtime: int64(n)})
}

func BenchmarkCreate(b *testing.B) {
	b.Run("record", func(b *testing.B) {
		db, _ := benchDB(b)
		b.ReportAllocs()
		var n uint64
		for b.Loop() {
			txn := db.NewTxn()
			create(txn, n)
			n++
			_ = txn.Record()
		}
	})
	b.Run("apply", func(b *testing.B) {
		db, _ := benchDB(b)
		const batch = 1 << 12
		records := make([][]byte, batch)
		var seq uint64
		b.ReportAllocs()
		for b.Loop() {
			if seq%batch == 0 {
				b.StopTimer()
				for i := range records {
					txn := db.NewTxn()
					create(txn, seq+uint64(i))
					records[i] = txn.Record()
				}
				b.StartTimer()
			}
			if err := db.Apply(seq+1, records[seq%batch]); err != nil {
				b.Fatal(err)
			}
			seq++
		}
	})
}

type discardJournal struct{}

func (discardJournal) Sync(context.Context, uint64) error { return nil }

func filled(b *testing.B, files, extents uint64) *DB {
	db, j := benchDB(b)
	for n := range files {
		commit(b, db, j, func(txn *Txn) { create(txn, n) })
	}
	for n := range extents {
		commit(b, db, j, func(txn *Txn) {
			txn.PutExtent(7, Extent{Off: n << 12, Len: 4096, Seq: n, Local: cache.Ref{Segment: 1, Length: 4096}})
		})
	}
	return db
}

func BenchmarkInode(b *testing.B) {
	db := filled(b, 100_000, 0)
	for name, flush := range map[string]bool{"memory": false, "table": true} {
		b.Run(name, func(b *testing.B) {
			if flush {
				if err := db.Flush(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
			rng := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := db.Inode(Ino(1000 + rng.Uint64N(100_000))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkExtents(b *testing.B) {
	db := filled(b, 1000, 50_000)
	for _, flush := range []bool{false, true} {
		b.Run(map[bool]string{false: "memory", true: "table"}[flush], func(b *testing.B) {
			if flush {
				if err := db.Flush(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
			rng := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			for b.Loop() {
				off := rng.Uint64N(50_000 << 12)
				n := 0
				if err := db.Extents(7, off, off+4096, func(Extent) bool { n++; return true }); err != nil || n == 0 {
					b.Fatal(n, err)
				}
			}
		})
	}
}
