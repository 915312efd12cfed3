package metastore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// states applies records one by one and returns the state at a position.
func stateAt(records [][]byte, seq uint64) map[string]string {
	m := newModel()
	for i, r := range records[:seq] {
		m.apply(uint64(i+1), r)
	}
	return m.state
}

// checkExact compares a reopened DB with the records up to its position, then
// replays the rest and compares again.
func checkExact(db *DB, records [][]byte) error {
	if db.Applied() > uint64(len(records)) {
		return fmt.Errorf("position %d of %d", db.Applied(), len(records))
	}
	for _, replay := range []bool{false, true} {
		if replay {
			for i := db.Applied(); i < uint64(len(records)); i++ {
				if err := db.Apply(i+1, records[i]); err != nil {
					return err
				}
			}
		}
		got, err := dump(db)
		if err != nil {
			return err
		}
		want := stateAt(records, db.Applied())
		if db.Applied() == 0 {
			want = map[string]string{}
		}
		if err := diff(want, got); err != nil {
			return fmt.Errorf("at position %d (replayed: %t): %w", db.Applied(), replay, err)
		}
	}
	return nil
}

// A crash at any moment, with any part of the unsynced bytes kept, leaves an
// exact prefix that agrees with the stored position, no further than the
// journal is synced, no less than Flushed promised.
func TestCrashLeavesExactPrefix(t *testing.T) {
	rounds := uint64(40)
	if testing.Short() {
		rounds = 8
	}
	advanced := 0
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(seed, 11))
		mem := vfs.NewCrashableMem()
		j := &fakeJournal{}
		db := openTest(t, mem, j)
		var promised uint64
		for range 40 + rng.IntN(250) {
			commit(t, db, j, func(txn *Txn) {
				randomTxn(rng, txn)
				txn.PutXattr(1, "user.bulk", randomBytes(rng, rng.IntN(2000)))
			})
			switch rng.IntN(60) {
			case 0:
				if _, err := db.pebble.AsyncFlush(); err != nil {
					t.Fatal(err)
				}
			case 1:
				if err := db.Flush(context.Background()); err != nil {
					t.Fatal(err)
				}
			case 2:
				promised = db.Flushed()
			case 3:
				if err := db.pebble.Compact(context.Background(), []byte{0}, []byte{255}, false); err != nil {
					t.Fatal(err)
				}
			}
		}
		// The journal's lock keeps its synced position and the disk in step.
		j.mu.Lock()
		synced, records := j.synced, j.records
		clone := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		j.mu.Unlock()
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := open(testOptions(j), clone, smallMemTable)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if again.Applied() > synced || again.Applied() < promised {
			t.Errorf("seed %d: position %d, journal synced through %d, promised %d", seed, again.Applied(), synced, promised)
		}
		if again.Applied() > 0 {
			advanced++
		}
		if err := checkExact(again, records); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if err := again.Close(); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	if advanced < int(rounds)/4 {
		t.Errorf("only %d of %d crashes came after a flush", advanced, rounds)
	}
}

func copyDir(t testing.TB, from *vfs.MemFS) *vfs.MemFS {
	t.Helper()
	to := vfs.NewMem()
	if _, err := vfs.Clone(from, to, testDir, testDir); err != nil {
		t.Fatal(err)
	}
	return to
}

// A flipped bit or a cut end in any file is an error, or does no harm; it
// never changes a value and never makes a flushed record disappear.
func TestDamageIsDetected(t *testing.T) {
	mem := vfs.NewMem()
	j := &fakeJournal{}
	db := openTest(t, mem, j)
	rng := rand.New(rand.NewPCG(1, 12))
	for range 150 {
		commit(t, db, j, func(txn *Txn) { randomTxn(rng, txn) })
		if rng.IntN(30) == 0 {
			if err := db.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := db.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := db.Flushed(); got != 150 {
		t.Fatalf("flushed %d", got)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := mem.List(testDir)
	if err != nil {
		t.Fatal(err)
	}
	detected := 0
	for _, name := range names {
		path := mem.PathJoin(testDir, name)
		raw := rawFile(t, mem, path)
		for range 12 {
			if len(raw) == 0 {
				break
			}
			bad := append([]byte(nil), raw...)
			if rng.IntN(5) == 0 {
				bad = bad[:rng.IntN(len(bad))]
			} else {
				bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
			}
			damaged := copyDir(t, mem)
			putRawFile(t, damaged, path, bad)
			db, err := open(testOptions(j), damaged, smallMemTable)
			if err != nil {
				detected++
				continue
			}
			got, err := dump(db)
			if err != nil {
				detected++
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s: %v", name, err)
				}
			} else if err := diff(stateAt(j.records, 150), got); err != nil {
				t.Errorf("%s damaged: %v", name, err)
			}
			_ = db.Close() // flushes may find the damage too
		}
	}
	if detected < 20 {
		t.Errorf("damage was noticed %d times only", detected)
	}
}

// A directory put back from an old copy is refused, not taken for the newest.
func TestOldStateIsRefused(t *testing.T) {
	mem := vfs.NewMem()
	j := &fakeJournal{}
	db := openTest(t, mem, j)
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{}) })
	if err := db.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := db.Flushed(); got != 1 {
		t.Fatalf("flushed %d", got)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := mem.List(testDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if name != anchorName {
			if err := mem.Remove(mem.PathJoin(testDir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := open(testOptions(j), mem, smallMemTable); !errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

// After a failed write nothing is applied, what was applied stays readable,
// nothing hangs, and the disk holds an exact prefix.
func TestFailedWrites(t *testing.T) {
	kinds := []errorfs.OpKind{errorfs.OpCreate, errorfs.OpFileWrite, errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpRename, errorfs.OpRemove}
	failures := 0
	for round := range 36 {
		kind := kinds[round%len(kinds)]
		left := 1 + round/len(kinds)*3
		mem := vfs.NewCrashableMem()
		j := &fakeJournal{}
		armed := false
		inner := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			j.mu.Lock() // orders this with the test
			defer j.mu.Unlock()
			if !armed || op.Kind != kind {
				return nil
			}
			if left--; left > 0 {
				return nil
			}
			return errors.New("injected")
		}))
		db, err := open(testOptions(j), inner, smallMemTable)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(uint64(round), 13))
		records := 0
		for i := range 600 {
			if i == 20 {
				j.mu.Lock()
				armed = true
				j.mu.Unlock()
			}
			txn := db.NewTxn()
			randomTxn(rng, txn)
			txn.PutXattr(1, "user.bulk", randomBytes(rng, 1000))
			if err := txn.Err(); err != nil {
				t.Fatal(err)
			}
			record := txn.Record()
			if err = db.Apply(j.append(record), record); err != nil {
				break
			}
			records++
			if i%50 == 49 {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				if err = db.Flush(ctx); errors.Is(err, context.DeadlineExceeded) {
					t.Fatalf("%v: flush hangs", kind)
				}
				cancel()
				db.Flushed()
			}
		}
		if db.Failed() != nil {
			failures++
			if err := db.Apply(uint64(records)+1, j.records[records-1]); !errors.Is(err, ErrFailed) {
				t.Errorf("%v: apply after the failure: %v", kind, err)
			}
			if err := db.Flush(context.Background()); !errors.Is(err, ErrFailed) {
				t.Errorf("%v: flush after the failure: %v", kind, err)
			}
			select {
			case <-db.FailedC():
			default:
				t.Errorf("%v: the failure is not announced", kind)
			}
		} else if err != nil {
			t.Errorf("%v: %v, but the store has not failed", kind, err)
		}
		promised := db.Flushed()
		if got, err := dump(db); err != nil {
			t.Errorf("%v: read after the failure: %v", kind, err)
		} else if err := diff(stateAt(j.records, db.Applied()), got); err != nil {
			t.Errorf("%v: after the failure: %v", kind, err)
		}
		closed := make(chan error, 1)
		go func() { closed <- db.Close() }()
		select {
		case <-closed:
		case <-time.After(20 * time.Second):
			t.Fatalf("%v: close hangs", kind)
		}
		clone := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		again, err := open(testOptions(j), clone, smallMemTable)
		if err != nil {
			t.Fatalf("%v: reopen: %v", kind, err)
		}
		if again.Applied() < promised {
			t.Errorf("%v: reopened at %d, promised %d", kind, again.Applied(), promised)
		}
		if err := checkExact(again, j.records[:records]); err != nil {
			t.Errorf("%v: %v", kind, err)
		}
		if err := again.Close(); err != nil {
			t.Errorf("%v: %v", kind, err)
		}
	}
	if failures < 12 {
		t.Errorf("only %d of 36 rounds failed", failures)
	}
}

// On a full disk records are still applied and flushes say why they wait. With
// room again all goes on, and also a store that is closed while the disk is full
// is an exact prefix.
func TestFullDisk(t *testing.T) {
	for _, kind := range []errorfs.OpKind{errorfs.OpFileWrite, errorfs.OpCreate} {
		mem := vfs.NewCrashableMem()
		j := &fakeJournal{}
		var full atomic.Bool
		inner := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			if full.Load() && op.Kind == kind {
				return syscall.ENOSPC
			}
			return nil
		}))
		db, err := open(testOptions(j), inner, smallMemTable)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(uint64(kind), 14))
		work := func() {
			t.Helper()
			for range 100 {
				commit(t, db, j, func(txn *Txn) {
					randomTxn(rng, txn)
					txn.PutXattr(1, "user.bulk", randomBytes(rng, 2000))
				})
			}
		}
		work()
		full.Store(true)
		work()
		if err := db.Flush(t.Context()); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v: flush on a full disk: %v", kind, err)
		}
		if flushed := db.Flushed(); flushed > 100 {
			t.Errorf("%v: record %d is flushed on a full disk", kind, flushed)
		}
		full.Store(false)
		for err = db.Flush(t.Context()); errors.Is(err, syscall.ENOSPC); err = db.Flush(t.Context()) {
			time.Sleep(10 * time.Millisecond) // it is tried once a second
		}
		if err != nil || db.Flushed() != 200 {
			t.Errorf("%v: flushed %d with room again, %v", kind, db.Flushed(), err)
		}
		full.Store(true)
		work()
		if err := db.Close(); err != nil {
			t.Errorf("%v: close on a full disk: %v", kind, err)
		}
		if db, err = open(testOptions(j), mem, smallMemTable); err != nil {
			t.Fatal(err)
		}
		if db.Applied() < 200 {
			t.Errorf("%v: reopened at %d", kind, db.Applied())
		}
		if err := errors.Join(checkExact(db, j.records), db.Close()); err != nil {
			t.Errorf("%v: %v", kind, err)
		}
	}
}

// When the journal cannot be synced, no table is, and writing stops.
func TestFailedJournal(t *testing.T) {
	mem := vfs.NewCrashableMem()
	j := &fakeJournal{}
	db := openTest(t, mem, j)
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{}) })
	j.mu.Lock()
	j.err = io.ErrShortWrite
	j.mu.Unlock()
	if err := db.Flush(context.Background()); !errors.Is(err, ErrFailed) || !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("flush: %v", err)
	}
	if got := db.Flushed(); got != 0 {
		t.Errorf("flushed %d", got)
	}
	if err := db.Close(); !errors.Is(err, ErrFailed) {
		t.Errorf("close: %v", err)
	}
	again := openTest(t, mem.CrashClone(vfs.CrashCloneCfg{}), &fakeJournal{})
	defer again.Close()
	if again.Applied() != 0 {
		t.Errorf("position %d: ahead of the journal", again.Applied())
	}
}

// While nothing can be flushed Apply waits at a bound, and a failure ends the
// wait.
func TestApplyWaitsForFlush(t *testing.T) {
	j := &stuckJournal{release: make(chan struct{})}
	db, err := open(testOptions(j), vfs.NewMem(), smallMemTable)
	if err != nil {
		t.Fatal(err)
	}
	const recordsMax = 200
	done := make(chan error, 1)
	go func() {
		txn := db.NewTxn()
		txn.PutVolume("bulk", make([]byte, ValueBytesMax))
		record := txn.Record()
		for seq := range uint64(recordsMax) {
			if err := db.Apply(seq+1, record); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	deadline := time.Now().Add(20 * time.Second)
	for db.pebble.Metrics().MemTable.Size <= unflushedBytesMax && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
	}
	close(j.release)
	select {
	case err := <-done:
		if !errors.Is(err, ErrFailed) {
			t.Errorf("got %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Apply hangs")
	}
	if applied := db.Applied(); applied > unflushedBytesMax/ValueBytesMax+8 {
		t.Errorf("%d MiB applied without a flush", applied)
	}
	if err := db.Close(); !errors.Is(err, ErrFailed) {
		t.Errorf("close: %v", err)
	}
}

// stuckJournal syncs nothing, and says so once released.
type stuckJournal struct{ release chan struct{} }

func (j *stuckJournal) Sync(context.Context, uint64) error {
	<-j.release
	return io.ErrUnexpectedEOF
}
