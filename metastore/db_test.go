package metastore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/defs-fs/defs/cache"
)

func TestTypedRoundTrip(t *testing.T) {
	db, j := newTestDB(t)
	inode := Inode{Mode: 0o40755, Nlink: 2, Mtime: -5, Parent: 1}
	entry := Dirent{Ino: 2, Type: 4, Cookie: 3, Name: "dir"}
	id := [16]byte{9}
	commit(t, db, j, func(txn *Txn) {
		txn.PutInode(2, inode)
		txn.PutDirent(1, entry)
		txn.PutXattr(2, "user.a", []byte("value"))
		txn.PutXattr(2, "user.b", nil)
		txn.PutXattr(3, "user.c", nil)
		txn.PutOrphan(8)
		txn.PutStripe(id, testStripe())
		txn.PutSalt(id, [32]byte{4})
		txn.PutDedup([32]byte{5}, Remote{Slice: 6, Compressed: true})
		txn.PutCounter(CounterIno, 77)
		txn.PutVolume("policy", []byte("auto"))
		txn.PutMeta("head", []byte("h"))
		// The transaction sees its own changes.
		if got, err := txn.Inode(2); err != nil || got != inode {
			t.Errorf("inode in the transaction: %+v, %v", got, err)
		}
		if got, err := txn.Dirent(1, "dir"); err != nil || got != entry {
			t.Errorf("entry in the transaction: %+v, %v", got, err)
		}
	})
	if got, err := db.Inode(2); err != nil || got != inode {
		t.Errorf("inode: %+v, %v", got, err)
	}
	if got, err := db.Dirent(1, "dir"); err != nil || got != entry {
		t.Errorf("entry: %+v, %v", got, err)
	}
	if got, err := db.Xattr(2, "user.a"); err != nil || string(got) != "value" {
		t.Errorf("attribute: %q, %v", got, err)
	}
	var names []string
	if err := db.Xattrs(2, func(name string, _ []byte) bool { names = append(names, name); return true }); err != nil ||
		!reflect.DeepEqual(names, []string{"user.a", "user.b"}) {
		t.Errorf("attributes: %q, %v", names, err)
	}
	if got, err := db.Stripe(id); err != nil || !reflect.DeepEqual(got, testStripe()) {
		t.Errorf("stripe: %+v, %v", got, err)
	}
	if got, err := db.Salt(id); err != nil || got != [32]byte{4} {
		t.Errorf("salt: %x, %v", got, err)
	}
	if got, err := db.Dedup([32]byte{5}); err != nil || got != (Remote{Slice: 6, Compressed: true}) {
		t.Errorf("dedup: %+v, %v", got, err)
	}
	if got, err := db.Counter(CounterIno); err != nil || got != 77 {
		t.Errorf("counter: %d, %v", got, err)
	}
	if got, err := db.Counter(CounterCookie); err != nil || got != 0 {
		t.Errorf("counter never stored: %d, %v", got, err)
	}
	if got, err := db.Volume("policy"); err != nil || string(got) != "auto" {
		t.Errorf("volume value: %q, %v", got, err)
	}
	if got, err := db.Meta("head"); err != nil || string(got) != "h" {
		t.Errorf("device value: %q, %v", got, err)
	}
	orphans := 0
	if err := db.Orphans(func(ino Ino) bool { orphans += int(ino); return true }); err != nil || orphans != 8 {
		t.Errorf("orphans: %d, %v", orphans, err)
	}
	inodes, stripes := 0, 0
	if err := db.Inodes(func(ino Ino, _ Inode) bool { inodes++; return ino == 2 }); err != nil || inodes != 1 {
		t.Errorf("inodes: %d, %v", inodes, err)
	}
	if err := db.Stripes(func(got [16]byte, _ StripeInfo) bool { stripes++; return got == id }); err != nil || stripes != 1 {
		t.Errorf("stripes: %d, %v", stripes, err)
	}
	commit(t, db, j, func(txn *Txn) {
		txn.DeleteInode(2)
		txn.DeleteDirent(1, entry)
		txn.DeleteXattr(2, "user.a")
		txn.DeleteOrphan(8)
		txn.DeleteStripe(id)
		txn.DeleteDedup([32]byte{5})
		txn.DeleteMeta("head")
		if _, err := txn.Inode(2); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted inode in the transaction: %v", err)
		}
	})
	for name, err := range map[string]error{
		"inode":  second(db.Inode(2)),
		"entry":  second(db.Dirent(1, "dir")),
		"xattr":  second(db.Xattr(2, "user.a")),
		"stripe": second(db.Stripe(id)),
		"salt":   second(db.Salt(id)),
		"dedup":  second(db.Dedup([32]byte{5})),
		"meta":   second(db.Meta("head")),
		"name":   second(db.Dirent(1, strings.Repeat("x", 300))),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s after its deletion: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestReadDir(t *testing.T) {
	db, j := newTestDB(t)
	commit(t, db, j, func(txn *Txn) {
		for i := range 10 {
			txn.PutDirent(5, Dirent{Ino: Ino(100 + i), Type: 8, Cookie: uint64(3 + 2*i), Name: fmt.Sprintf("n%d", 9-i)})
			txn.PutDirent(6, Dirent{Ino: 1, Type: 8, Cookie: uint64(3 + i), Name: "other" + fmt.Sprint(i)})
		}
	})
	list := func(after uint64) (names []string) {
		if err := db.ReadDir(5, after, func(e Dirent) bool {
			names = append(names, e.Name)
			return len(names) < 4
		}); err != nil {
			t.Fatal(err)
		}
		return names
	}
	for after, want := range map[uint64]string{0: "[n9 n8 n7 n6]", 3: "[n8 n7 n6 n5]", 4: "[n8 n7 n6 n5]", 19: "[n0]", 21: "[]", 1<<64 - 1: "[]"} {
		if got := fmt.Sprint(list(after)); got != want {
			t.Errorf("after %d: %s, want %s", after, got, want)
		}
	}
	// A rename over a name leaves one place in the listing.
	commit(t, db, j, func(txn *Txn) { txn.PutDirent(5, Dirent{Ino: 7, Type: 8, Cookie: 99, Name: "n9"}) })
	if got := fmt.Sprint(list(0)); got != "[n8 n7 n6 n5]" {
		t.Errorf("after replacing n9: %s", got)
	}
	if got := fmt.Sprint(list(21)); got != "[n9]" {
		t.Errorf("the new place of n9: %s", got)
	}
}

func TestExtentsOverlap(t *testing.T) {
	db, j := newTestDB(t)
	extents := []Extent{{Off: 0, Len: 10}, {Off: 10, Len: 5}, {Off: 100, Len: 50}, {Off: 1 << 40, Len: 1}}
	commit(t, db, j, func(txn *Txn) {
		for _, e := range extents {
			txn.PutExtent(7, e)
		}
		txn.PutExtent(6, Extent{Off: 5, Len: 1000})
		txn.PutExtent(8, Extent{Off: 0, Len: 1000})
	})
	for from := range uint64(160) {
		for _, to := range []uint64{from, from + 1, from + 7, from + 95, 1<<63 + from} {
			var want, got []Extent
			for _, e := range extents {
				if e.Off < to && e.End() > from && from < to {
					want = append(want, e)
				}
			}
			if err := db.Extents(7, from, to, func(e Extent) bool { got = append(got, e); return true }); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("[%d,%d): got %v, want %v", from, to, got, want)
			}
		}
	}
}

// Derived keys are exactly what the tree implies, after any changes, whether
// made by typed calls or from a published log.
func TestDerivedKeys(t *testing.T) {
	db, j := newTestDB(t)
	rng := rand.New(rand.NewPCG(8, 8))
	for range 400 {
		commit(t, db, j, func(txn *Txn) { randomTxn(rng, txn) })
	}
	state, err := dump(db)
	if err != nil {
		t.Fatal(err)
	}
	checkDerived(t, state)

	// Publish all of it and replay it elsewhere.
	other, otherJournal := newTestDB(t)
	commit(t, other, otherJournal, func(txn *Txn) {
		for k, v := range state {
			if IsTreeKey([]byte(k)) {
				public, err := PublicValue([]byte(k), []byte(v))
				if err != nil {
					t.Fatal(err)
				}
				if err := txn.PutTree([]byte(k), public); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	copied, err := dump(other)
	if err != nil {
		t.Fatal(err)
	}
	checkDerived(t, copied)
	for k := range copied {
		if k[0] == prefixWrite && binary.BigEndian.Uint64([]byte(k[1:])) != 0 {
			t.Errorf("a published extent has a local place: %q", k)
		}
	}
	if want, got := len(keysOf(state, "idexosg")), len(keysOf(copied, "idexosg")); want != got {
		t.Errorf("%d tree keys after the copy, want %d", got, want)
	}
	commit(t, other, otherJournal, func(txn *Txn) {
		for k := range copied {
			if IsTreeKey([]byte(k)) {
				if err := txn.DeleteTree([]byte(k)); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	empty, err := dump(other)
	if err != nil {
		t.Fatal(err)
	}
	if left := keysOf(empty, "idexosgcrw"); len(left) != 0 {
		t.Errorf("left after deleting all: %q", left)
	}
}

func keysOf(state map[string]string, prefixes string) (keys []string) {
	for k := range state {
		if strings.IndexByte(prefixes, k[0]) >= 0 {
			keys = append(keys, k)
		}
	}
	return keys
}

func checkDerived(t *testing.T, state map[string]string) {
	t.Helper()
	want := map[string]string{}
	for k, v := range state {
		p, err := ParseTreeKey([]byte(k))
		if err != nil {
			continue
		}
		switch p.Kind {
		case prefixDirent:
			e, err := decodeDirent(p.Name, []byte(v))
			if err != nil {
				t.Fatal(err)
			}
			want[string(cookieKey(p.Ino, e.Cookie))] = string(encodeListing(e))
		case prefixExtent:
			e, err := decodeExtent(p.Off, []byte(v))
			if err != nil {
				t.Fatal(err)
			}
			length := string(binary.BigEndian.AppendUint32(nil, e.Len))
			if e.HasRemote {
				want[string(refKey(e.Remote, p.Ino, p.Off))] = length
			} else {
				want[string(writeKey(e.Local.Segment, p.Ino, p.Off))] = length
			}
		}
	}
	got := map[string]string{}
	for _, k := range keysOf(state, "crw") {
		got[k] = state[k]
	}
	if err := diff(want, got); err != nil {
		t.Error(err)
	}
}

func TestUnplacedAndReferences(t *testing.T) {
	db, j := newTestDB(t)
	local := func(segment uint64) Extent {
		return Extent{Off: 4096, Len: 10, Local: cache.Ref{Segment: segment, Length: 10}}
	}
	stripe := [16]byte{3}
	commit(t, db, j, func(txn *Txn) {
		for segment := range uint64(4) {
			txn.PutExtent(Ino(10+segment), local(segment))
		}
	})
	placed := local(2)
	placed.HasRemote, placed.Remote = true, Remote{Stripe: stripe, Slice: 5, SliceLen: 10}
	commit(t, db, j, func(txn *Txn) { txn.PutExtent(12, placed) })
	var unplaced []Unplaced
	if err := db.Unplaced(1, func(u Unplaced) bool { unplaced = append(unplaced, u); return true }); err != nil {
		t.Fatal(err)
	}
	if want := []Unplaced{{1, 11, 4096, 10}, {3, 13, 4096, 10}}; !reflect.DeepEqual(unplaced, want) {
		t.Errorf("unplaced: %v, want %v", unplaced, want)
	}
	var refs []Reference
	if err := db.References(stripe, func(r Reference) bool { refs = append(refs, r); return true }); err != nil {
		t.Fatal(err)
	}
	if want := []Reference{{stripe, 5, 12, 4096, 10}}; !reflect.DeepEqual(refs, want) {
		t.Errorf("references: %v, want %v", refs, want)
	}
}

func TestTouchedByGeneration(t *testing.T) {
	db, j := newTestDB(t)
	touched := func(generation uint64) map[string]uint64 {
		out := map[string]uint64{}
		if err := db.Touched(generation, func(key []byte, lamport uint64) bool {
			out[string(key)] = lamport
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{}); txn.PutSalt([16]byte{1}, [32]byte{}) }) // 1
	commit(t, db, j, func(txn *Txn) { txn.Lamport = 70; txn.DeleteInode(3); txn.SetGeneration(1) })     // 2: still generation 0
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: 4}) })                                // 3
	if got := db.generation; got != 1 {
		t.Errorf("generation %d", got)
	}
	if got, want := touched(0), map[string]uint64{string(inodeKey(2)): 1, string(inodeKey(3)): 70}; !reflect.DeepEqual(got, want) {
		t.Errorf("generation 0: %v, want %v", got, want)
	}
	if got, want := touched(1), map[string]uint64{string(inodeKey(2)): 3}; !reflect.DeepEqual(got, want) {
		t.Errorf("generation 1: %v, want %v", got, want)
	}
	commit(t, db, j, func(txn *Txn) { txn.DropTouched(0) })
	if got := touched(0); len(got) != 0 {
		t.Errorf("after dropping: %v", got)
	}
	if got := touched(1); len(got) != 1 {
		t.Errorf("generation 1 after dropping 0: %v", got)
	}
}

func TestSnapshotStays(t *testing.T) {
	db, j := newTestDB(t)
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: 1}) })
	s, err := db.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: 2}) })
	if n, err := s.Inode(2); err != nil || n.Size != 1 || s.Applied() != 1 || db.Applied() != 2 {
		t.Errorf("size %d at %d (now %d), %v", n.Size, s.Applied(), db.Applied(), err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestApplySkipsWhatIsApplied(t *testing.T) {
	db, j := newTestDB(t)
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: 1}) })
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: 2}) })
	if err := db.Apply(1, j.records[0]); err != nil {
		t.Fatal(err)
	}
	if n, err := db.Inode(2); err != nil || n.Size != 2 {
		t.Errorf("size %d, %v", n.Size, err)
	}
}

func TestApplyRefusesGaps(t *testing.T) {
	db, j := newTestDB(t)
	txn := db.NewTxn()
	txn.PutInode(2, Inode{})
	record := txn.Record()
	j.records = make([][]byte, 102)
	for _, c := range []struct {
		seq uint64
		ok  bool
	}{{100, true}, {102, false}, {101, true}, {102, true}, {50, true}} {
		if err := db.Apply(c.seq, record); errors.Is(err, ErrCorrupt) == c.ok {
			t.Errorf("record %d at position %d: %v", c.seq, db.Applied(), err)
		}
	}
	if db.Applied() != 102 {
		t.Errorf("position %d", db.Applied())
	}
}

func TestApplyRefusesDamagedRecords(t *testing.T) {
	db, j := newTestDB(t)
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: 1}) })
	before, err := dump(db)
	if err != nil {
		t.Fatal(err)
	}
	record := j.records[0]
	for n := range record {
		if err := db.Apply(2, record[:n]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("%d of %d bytes: %v", n, len(record), err)
		}
	}
	after, err := dump(db)
	if err != nil || db.Applied() != 1 {
		t.Fatalf("position %d, %v", db.Applied(), err)
	}
	if err := diff(before, after); err != nil {
		t.Error(err)
	}
}

func TestFlushedFollowsFlush(t *testing.T) {
	db, j := newTestDB(t)
	for i := range 5 {
		commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: uint64(i)}) })
	}
	if got := db.Flushed(); got != 0 {
		t.Errorf("flushed %d before any flush", got)
	}
	if err := db.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	commit(t, db, j, func(txn *Txn) { txn.PutInode(2, Inode{Size: 9}) })
	if got := db.Flushed(); got != 5 {
		t.Errorf("flushed %d, want 5", got)
	}
	if j.synced != 5 && j.synced != 6 {
		t.Errorf("journal synced through %d", j.synced)
	}
}

func TestReopen(t *testing.T) {
	mem := vfs.NewMem()
	j := &fakeJournal{}
	db := openTest(t, mem, j)
	m := newModel()
	rng := rand.New(rand.NewPCG(1, 9))
	for range 50 {
		commit(t, db, j, func(txn *Txn) { randomTxn(rng, txn) })
		m.apply(uint64(len(j.records)), j.records[len(j.records)-1])
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); !errors.Is(err, ErrClosed) {
		t.Errorf("second close: %v", err)
	}
	db = openTest(t, mem, j)
	defer db.Close()
	if db.Applied() != 50 || db.Flushed() != 50 {
		t.Errorf("applied %d, flushed %d", db.Applied(), db.Flushed())
	}
	state, err := dump(db)
	if err != nil {
		t.Fatal(err)
	}
	if err := diff(m.state, state); err != nil {
		t.Error(err)
	}
	if _, err := open(Options{Dir: testDir, Key: [32]byte{9}, Journal: j}, vfs.NewMem(), smallMemTable); err != nil {
		t.Errorf("another key on an empty disk: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	if _, err := Open(Options{}); err == nil || !strings.Contains(err.Error(), "Dir") || !strings.Contains(err.Error(), "Journal") {
		t.Errorf("empty options: %v", err)
	}
	mem := vfs.NewMem()
	db := openTest(t, mem, &fakeJournal{})
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	o := testOptions(&fakeJournal{})
	o.Key[0]++
	if _, err := open(o, mem, smallMemTable); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another device's key: %v", err)
	}
}

// Neither names nor content reach the disk or the log in clear.
func TestNothingInClear(t *testing.T) {
	const canary = "canary-name-of-a-file"
	mem := vfs.NewMem()
	var log bytes.Buffer
	o := testOptions(&fakeJournal{})
	o.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	db, err := open(o, mem, smallMemTable)
	if err != nil {
		t.Fatal(err)
	}
	j := o.Journal.(*fakeJournal)
	for i := range 300 {
		commit(t, db, j, func(txn *Txn) {
			txn.PutDirent(1, Dirent{Ino: 2, Type: 8, Cookie: uint64(3 + i), Name: fmt.Sprint(canary, i)})
			txn.PutXattr(2, fmt.Sprint("user.", i), bytes.Repeat([]byte(canary), 20))
		})
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := mem.List(testDir)
	if err != nil {
		t.Fatal(err)
	}
	tables := 0
	for _, name := range names {
		if strings.HasSuffix(name, ".sst") {
			tables++
		}
		if bytes.Contains(rawFile(t, mem, mem.PathJoin(testDir, name)), []byte("canary")) {
			t.Errorf("%s shows a name", name)
		}
	}
	if tables == 0 {
		t.Error("nothing was flushed")
	}
	if strings.Contains(log.String(), "canary") {
		t.Error("the log shows a name")
	}
	if s := fmt.Sprintf("%s", hiddenKey("dcanary")); strings.Contains(s, "canary") {
		t.Errorf("a key prints as %s", s)
	}
}
