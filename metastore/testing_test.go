package metastore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/defs-fs/defs/cache"
)

// fakeJournal keeps records in memory and remembers how far it was synced.
type fakeJournal struct {
	mu      sync.Mutex
	records [][]byte // records[i] has sequence i+1
	synced  uint64
	err     error // of Sync
}

func (j *fakeJournal) append(record []byte) uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.records = append(j.records, record)
	return uint64(len(j.records))
}

func (j *fakeJournal) Sync(_ context.Context, seq uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return j.err
	}
	if seq > uint64(len(j.records)) {
		return fmt.Errorf("sync of record %d of %d", seq, len(j.records))
	}
	j.synced = max(j.synced, seq)
	return nil
}

const testDir = "/defs/meta"

func testOptions(j Journal) Options { return Options{Dir: testDir, Key: [32]byte{1, 2, 3}, Journal: j} }

// smallMemTable makes flushes and compactions frequent.
const smallMemTable = 64 << 10

func openTest(t testing.TB, fs vfs.FS, j Journal) *DB {
	t.Helper()
	db, err := open(testOptions(j), fs, smallMemTable)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func newTestDB(t testing.TB) (*DB, *fakeJournal) {
	t.Helper()
	j := &fakeJournal{}
	db := openTest(t, vfs.NewMem(), j)
	t.Cleanup(func() {
		if err := db.Close(); err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("close: %v", err)
		}
	})
	return db, j
}

// commit runs one mutation as the volume does.
func commit(t testing.TB, db *DB, j *fakeJournal, build func(*Txn)) {
	t.Helper()
	txn := db.NewTxn()
	build(txn)
	if err := txn.Err(); err != nil {
		t.Fatal(err)
	}
	record := txn.Record()
	if err := db.Apply(j.append(record), record); err != nil {
		t.Fatal(err)
	}
}

// dump returns every key and value.
func dump(r interface {
	Scan(from, to []byte, fn func(key, value []byte) bool) error
}) (map[string]string, error) {
	out := map[string]string{}
	err := r.Scan([]byte{0}, []byte{255}, func(k, v []byte) bool {
		out[string(k)] = string(v)
		return true
	})
	return out, err
}

// model is the plain meaning of records: a map.
type model struct {
	state      map[string]string
	generation uint64
}

func newModel() *model { return &model{state: map[string]string{}} }

func number(n uint64) string {
	return string([]byte{byte(n >> 56), byte(n >> 48), byte(n >> 40), byte(n >> 32), byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

func (m *model) apply(seq uint64, record []byte) {
	generation := m.generation
	err := decodeRecord(record, func(lamport uint64, mu mutation) error {
		if lamport == 0 {
			lamport = seq
		}
		key := string(mu.key)
		switch mu.op {
		case opPut:
			m.state[key] = string(mu.value)
		case opDelete:
			delete(m.state, key)
		case opSetGeneration:
			generation = mu.generation
			m.state["mgeneration"] = number(generation)
		case opDropTouched:
			for k := range m.state {
				if k[0] == 't' && k[1:9] == number(mu.generation) {
					delete(m.state, k)
				}
			}
		}
		if (mu.op == opPut || mu.op == opDelete) && bytes.IndexByte([]byte("idexosg"), key[0]) >= 0 {
			m.state["t"+number(m.generation)+key] = number(lamport)
		}
		return nil
	})
	if err != nil {
		panic(err)
	}
	m.generation = generation
	m.state["mapplied"] = number(seq)
	m.state["mschema"] = number(schemaVersion)
}

func diff(want, got map[string]string) error {
	for k, v := range want {
		if g, ok := got[k]; !ok {
			return fmt.Errorf("key %q is missing", k)
		} else if g != v {
			return fmt.Errorf("key %q is %q, want %q", k, g, v)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			return fmt.Errorf("key %q should not be there", k)
		}
	}
	return nil
}

func randomRemote(rng *rand.Rand) Remote {
	r := Remote{Slice: rng.Uint32N(4), StripeOff: rng.Uint32(), StoredLen: 1 << 10, SliceLen: 1 << 20,
		Compressed: rng.IntN(2) == 0, Off: rng.Uint32N(1 << 10)}
	r.Stripe[0] = byte(rng.IntN(4))
	return r
}

func randomExtent(rng *rand.Rand, off uint64) Extent {
	e := Extent{Off: off, Len: 1 + rng.Uint32N(4096), Seq: rng.Uint64()}
	if kind := rng.IntN(3); kind != 0 {
		e.Local = cache.Ref{Segment: 1 + rng.Uint64N(4), Offset: rng.Uint32(), Length: 1 << 20, Nonce: rng.Uint64()}
		e.LocalOff = rng.Uint32N(1 << 10)
		e.HasRemote = kind == 2
	} else {
		e.HasRemote = true
	}
	if e.HasRemote {
		e.Remote = randomRemote(rng)
	}
	return e
}

// randomTxn changes a few things of a small tree.
func randomTxn(rng *rand.Rand, txn *Txn) {
	for range 1 + rng.IntN(6) {
		ino := Ino(1 + rng.Uint64N(50))
		name := fmt.Sprintf("name-%d", rng.IntN(40))
		switch rng.IntN(14) {
		case 0, 1, 2:
			txn.PutInode(ino, Inode{Mode: rng.Uint32(), Size: rng.Uint64(), Target: name})
		case 3:
			txn.DeleteInode(ino)
		case 4, 5:
			txn.PutDirent(ino, Dirent{Ino: Ino(rng.Uint64()), Type: 8, Cookie: 3 + rng.Uint64N(1<<40), Name: name})
		case 6:
			if e, err := txn.Dirent(ino, name); err == nil {
				txn.DeleteDirent(ino, e)
			}
		case 7, 8, 9:
			txn.PutExtent(ino, randomExtent(rng, 4096*rng.Uint64N(20)))
		case 10:
			key := extentKey(ino, 4096*rng.Uint64N(20))
			if b, err := txn.Get(key); err == nil {
				if err := txn.DeleteTree(key); err != nil {
					panic(err)
				}
				_ = b
			}
		case 11:
			txn.PutXattr(ino, "user."+name, bytes.Repeat([]byte{byte(rng.Uint32())}, rng.IntN(300)))
		case 12:
			g, err := txn.base.Generation()
			if err != nil {
				panic(err)
			}
			txn.SetGeneration(g + 1)
			if g > 0 {
				txn.DropTouched(g - 1)
			}
		case 13:
			txn.PutCounter(CounterIno, rng.Uint64())
			txn.PutSalt([16]byte{byte(rng.Uint32())}, [32]byte{byte(rng.Uint32())})
		}
	}
}
