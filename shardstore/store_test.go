package shardstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Unix(1_700_000_000, 0)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func testOptions(dir string) Options {
	return Options{
		Dir: dir, CapacityBytes: 1 << 30, PackBytes: 1 << 20, OpenPacksMax: 2, IndexCacheBytes: 1 << 20,
		SweepInterval: time.Hour, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

func mustOpen(t testing.TB, o Options) *Store {
	t.Helper()
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// testShard is a shard whose bytes follow from its number.
func testShard(n int, coded int) Shard {
	rng := rand.New(rand.NewPCG(uint64(n), 7))
	sh := Shard{Manifest: []byte(fmt.Sprintf("manifest %d", n)), Body: make([]byte, columnBytes+coded), Outboard: make([]byte, 8+64*(coded/sumBlockBytes))}
	for _, b := range [][]byte{sh.Blind[:], sh.Body, sh.Outboard} {
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
	}
	sh.Index = uint8(n % 6)
	return sh
}

func checkShard(t testing.TB, s *Store, want Shard) {
	t.Helper()
	r, err := s.ReadShard(want.Key, 0, 0, nil)
	if err != nil {
		t.Fatalf("shard %v: %v", want.Key, err)
	}
	if !bytes.Equal(r.Manifest, want.Manifest) || !bytes.Equal(r.Coded, want.Body[columnBytes:]) ||
		!bytes.Equal(r.Column[:], want.Body[:columnBytes]) || !bytes.Equal(r.Outboard, want.Outboard) {
		t.Fatalf("shard %v reads back differently", want.Key)
	}
}

var ctx = context.Background()

func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, testOptions(dir))
	var all []Shard
	for i, coded := range []int{1, 100, 16 << 10, 16<<10 + 1, 64 << 10, 100_000, 256 << 10, 300_000} {
		all = append(all, testShard(i, coded))
	}
	var wg sync.WaitGroup
	for _, sh := range all {
		wg.Go(func() {
			if err := s.PutShard(ctx, sh); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for round := range 2 {
		for _, sh := range all {
			checkShard(t, s, sh)
			coded := sh.Body[columnBytes:]
			for range 20 {
				off := rand.IntN(len(coded))
				n := 1 + rand.IntN(len(coded)-off)
				r, err := s.ReadShard(sh.Key, off, n, make([]byte, 1<<20))
				if err != nil {
					t.Fatal(err)
				}
				if r.Offset > off || r.Offset%sumBlockBytes != 0 || r.Offset+len(r.Coded) < off+n ||
					!bytes.Equal(r.Coded, coded[r.Offset:r.Offset+len(r.Coded)]) || !bytes.Equal(r.Outboard, sh.Outboard) {
					t.Fatalf("range %d+%d of %d bytes is wrong", off, n, len(coded))
				}
			}
			for _, bad := range [][2]int{{-1, 1}, {0, len(coded) + 1}, {len(coded), 1}, {len(coded), 0}} {
				if _, err := s.ReadShard(sh.Key, bad[0], bad[1], nil); err == nil {
					t.Fatalf("range %v accepted", bad)
				}
			}
		}
		if got := s.Usage().Shards; got != uint64(len(all)) {
			t.Fatalf("%d shards counted, want %d", got, len(all))
		}
		if round == 0 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = mustOpen(t, testOptions(dir))
		}
	}
	if _, err := s.ReadShard(testShard(99, 1).Key, 0, 0, nil); !errors.Is(err, ErrNotFound) {
		t.Fatalf("unknown shard: %v", err)
	}
	n := 0
	var after Key
	for {
		more := false
		err := s.Shards(after, func(i ShardInfo) bool { n++; after = i.Key; more = true; return n%3 != 0 })
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			break
		}
	}
	if n != len(all) {
		t.Fatalf("listed %d shards, want %d", n, len(all))
	}
}

func TestPutTwice(t *testing.T) {
	s := mustOpen(t, testOptions(t.TempDir()))
	sh := testShard(1, 5000)
	sh.Provisional = true
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := s.PutShard(ctx, sh); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	used := s.Usage().UsedBytes
	if used > 2*uint64(len(sh.Body)) {
		t.Fatalf("%d bytes used by one shard", used)
	}
	other := sh
	other.Manifest = []byte("another")
	if err := s.PutShard(ctx, other); !errors.Is(err, ErrExists) {
		t.Fatalf("other manifest: %v", err)
	}
	sh.Provisional, sh.Partner = false, "peer"
	if err := s.PutShard(ctx, sh); err != nil {
		t.Fatal(err)
	}
	info, err := s.Stat(sh.Key)
	if err != nil || info.Provisional || info.Partner != "peer" {
		t.Fatalf("after a permanent put: %+v %v", info, err)
	}
	if s.Usage().Shards != 1 {
		t.Fatal("one shard counted more than once")
	}
}

func TestPartners(t *testing.T) {
	s := mustOpen(t, testOptions(t.TempDir()))
	partners := func(p string) (n int) {
		if err := s.PartnerShards(p, func(Key) bool { n++; return true }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for i := range 6 {
		sh := testShard(i, 100)
		sh.Partner = []string{"a", "ab"}[i%2]
		if err := s.PutShard(ctx, sh); err != nil {
			t.Fatal(err)
		}
	}
	if partners("a") != 3 || partners("ab") != 3 || partners("b") != 0 {
		t.Fatal("partners miscounted")
	}
	if err := s.SetPartner(ctx, testShard(0, 1).Key, "ab"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Delete(ctx, testShard(1, 1).Key); err != nil {
		t.Fatal(err)
	}
	if partners("a") != 2 || partners("ab") != 3 {
		t.Fatal("partners miscounted after changes")
	}
	if err := s.SetPartner(ctx, testShard(9, 1).Key, "a"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
}

func TestDeleteKeepsBytesThenPunches(t *testing.T) {
	o, clk := testOptions(t.TempDir()), newClock()
	o.Now = clk.Now
	s := mustOpen(t, o)
	keep, gone := testShard(1, 256<<10), testShard(2, 256<<10)
	for _, sh := range []Shard{keep, gone} {
		if err := s.PutShard(ctx, sh); err != nil {
			t.Fatal(err)
		}
	}
	found, err := s.Delete(ctx, gone.Key, testShard(3, 1).Key)
	if err != nil || !found[0] || found[1] {
		t.Fatal(found, err)
	}
	if s.Has(gone.Key) {
		t.Fatal("deleted shard is still there")
	}
	if err := s.PutShard(ctx, gone); !errors.Is(err, ErrDeleted) {
		t.Fatalf("put over a tombstone: %v", err)
	}
	used, blocks := s.Usage().UsedBytes, diskBlocks(t, o.Dir)
	step := func(d time.Duration) {
		clk.advance(d)
		if err := s.Sweep(ctx); err != nil {
			t.Fatal(err)
		}
	}
	step(6 * 24 * time.Hour)
	if u := s.Usage(); u.UsedBytes < used || u.Tombstones != 1 || diskBlocks(t, o.Dir) < blocks {
		t.Fatalf("bytes went before their time: %+v", u)
	}
	// Uptime is carried over a restart; time away does not count.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	clk.advance(100 * 24 * time.Hour)
	s = mustOpen(t, o)
	step(time.Second)
	if s.Usage().Tombstones != 1 {
		t.Fatal("time away counted as uptime")
	}
	step(25 * time.Hour)
	if u := s.Usage(); u.UsedBytes > used-(256<<10) || u.Tombstones != 0 {
		t.Fatalf("bytes are still counted: %+v", u)
	}
	if got := diskBlocks(t, o.Dir); got > blocks-(256<<10)/512+16 {
		t.Fatalf("%d blocks on disk, were %d", got, blocks)
	}
	checkShard(t, s, keep)
	// The index built anew knows the same.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(o.Dir, "index")); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, o)
	checkShard(t, s, keep)
	if s.Has(gone.Key) || s.Usage().Shards != 1 {
		t.Fatal("a rebuilt index brought a deleted shard back")
	}
}

func diskBlocks(t *testing.T, dir string) (n int64) {
	paths, _ := filepath.Glob(filepath.Join(dir, "packs", "*"))
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		n += st.Sys().(*syscall.Stat_t).Blocks
	}
	return n
}

func TestProvisionalExpires(t *testing.T) {
	o, clk := testOptions(t.TempDir()), newClock()
	o.Now = clk.Now
	s := mustOpen(t, o)
	a, b, c := testShard(1, 1000), testShard(2, 1000), testShard(3, 1000)
	a.Provisional, b.Provisional = true, true
	for _, sh := range []Shard{a, b, c} {
		if err := s.PutShard(ctx, sh); err != nil {
			t.Fatal(err)
		}
	}
	clk.advance(23 * time.Hour)
	if err := errors.Join(s.Sweep(ctx), s.Commit(ctx, []byte("proof"), b.Key)); err != nil {
		t.Fatal(err)
	}
	if !s.Has(a.Key) {
		t.Fatal("expired early")
	}
	clk.advance(2 * time.Hour)
	if err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if s.Has(a.Key) || !s.Has(b.Key) || !s.Has(c.Key) {
		t.Fatal("wrong shards expired")
	}
	if i, err := s.Stat(b.Key); err != nil || string(i.Proof) != "proof" {
		t.Fatalf("proof is not kept: %+v %v", i, err)
	}
	if err := s.PutShard(ctx, a); err != nil {
		t.Fatalf("an expired shard may come again: %v", err)
	}
	if err := s.Commit(ctx, nil, a.Key, testShard(9, 1).Key); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if i, _ := s.Stat(a.Key); i.Provisional {
		t.Fatal("not committed")
	}
}

func TestItems(t *testing.T) {
	o := testOptions(t.TempDir())
	s := mustOpen(t, o)
	id := [32]byte{1, 2, 3}
	if err := errors.Join(
		s.PutLock(ctx, id, 2, []byte("lock2")), s.PutLock(ctx, id, 2, []byte("lock2")),
		s.PutIndex(ctx, id, 5, []byte("five")), s.PutIndex(ctx, id, 5, []byte("five again")),
		s.UpdateIndex(ctx, id, func(old []byte) ([]byte, error) { return append(old, ", moved"...), nil }),
		s.PutHead(ctx, id, 7, []byte("head7")), s.PutHead(ctx, id, 7, []byte("head7")), s.PutHead(ctx, id, 8, bytes.Repeat([]byte("8"), 1<<20)),
	); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"lower lock":  s.PutLock(ctx, id, 1, []byte("lock1")),
		"other lock":  s.PutLock(ctx, id, 2, []byte("lockX")),
		"lower index": s.PutIndex(ctx, id, 4, []byte("four")),
		"lower head":  s.PutHead(ctx, id, 7, []byte("head7")),
		"other head":  s.PutHead(ctx, id, 8, []byte("headX")),
	} {
		if !errors.Is(err, ErrStale) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		v, lock, err := s.Lock(id)
		if err != nil || v != 2 || string(lock) != "lock2" {
			t.Fatal(v, lock, err)
		}
		if rec, err := s.Index(id); err != nil || string(rec) != "five, moved" {
			t.Fatal(rec, err)
		}
		if seq, h, err := s.Head(id); err != nil || seq != 8 || len(h) != 1<<20 {
			t.Fatal(seq, len(h), err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(o.Dir, "index")); err != nil {
			t.Fatal(err)
		}
		s = mustOpen(t, o)
	}
	n := 0
	if err := s.Indexes([32]byte{}, func(b [32]byte) bool { n++; return b == id }); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	if err := errors.Join(s.ForgetIndex(ctx, id), s.ForgetIndex(ctx, id)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Index(id); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
}

func TestFull(t *testing.T) {
	o := testOptions(t.TempDir())
	o.CapacityBytes = 1 << 20
	s := mustOpen(t, o)
	var last error
	stored := 0
	for i := range 20 {
		if last = s.PutShard(ctx, testShard(i, 100<<10)); last != nil {
			break
		}
		stored++
	}
	if !errors.Is(last, ErrFull) || stored < 8 || s.Usage().UsedBytes > o.CapacityBytes {
		t.Fatalf("%d stored, then %v; %+v", stored, last, s.Usage())
	}
	if _, err := s.Delete(ctx, testShard(0, 1).Key); err != nil {
		t.Fatalf("a full store must take deletes: %v", err)
	}
}

// TestCapacityIsThatOfTheDisk shrinks the disk under a store.
func TestCapacityIsThatOfTheDisk(t *testing.T) {
	const total = 100 << 20
	var free atomic.Uint64
	free.Store(60 << 20)
	o := testOptions(t.TempDir())
	o.CapacityBytes = 0
	o.Disk = func(string) (uint64, uint64, error) { return free.Load(), total, nil }
	s := mustOpen(t, o)
	want := func(capacity uint64) {
		t.Helper()
		if u := s.Usage(); u.CapacityBytes != capacity {
			t.Errorf("capacity %d, want %d", u.CapacityBytes, capacity)
		}
	}
	want(55 << 20) // a twentieth of the disk stays free
	if err := s.PutShard(ctx, testShard(1, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := s.measureDisk(); err != nil {
		t.Fatal(err)
	}
	used := s.Usage().UsedBytes
	want(55<<20 + used)
	free.Store(5 << 20)
	if err := s.measureDisk(); err != nil {
		t.Fatal(err)
	}
	want(used)
	if err := s.PutShard(ctx, testShard(2, 1<<10)); !errors.Is(err, ErrFull) {
		t.Errorf("a shard on a full disk: %v", err)
	}
	if _, err := s.Delete(ctx, testShard(1, 1).Key); err != nil {
		t.Errorf("a delete on a full disk: %v", err)
	}
	s.Close()

	free.Store(60 << 20)
	o.DiskShare = 5
	s = mustOpen(t, o)
	want(11<<20 + s.Usage().UsedBytes)
	s.Close()
	o.CapacityBytes = 2 << 20
	s = mustOpen(t, o)
	want(2 << 20)
}

func TestSecondOpenIsRefused(t *testing.T) {
	o := testOptions(t.TempDir())
	s := mustOpen(t, o)
	if s2, err := Open(o); err == nil {
		s2.Close()
		t.Fatal("two stores share a directory")
	}
	if err := s.PutShard(ctx, testShard(1, 10)); err != nil {
		t.Fatal(err)
	}
}

func TestValidateNamesAll(t *testing.T) {
	o := Options{PackBytes: 1, OpenPacksMax: -1, SweepInterval: -1}
	o.EnsureDefaults()
	err := o.Validate()
	for _, want := range []string{"Dir", "PackBytes", "OpenPacksMax", "SweepInterval"} {
		if err == nil || !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Errorf("%s is not in %v", want, err)
		}
	}
}
