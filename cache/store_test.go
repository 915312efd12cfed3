package cache_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/cache/faultfs"
)

func TestOptionsReportAllViolations(t *testing.T) {
	o := cache.Options{SegmentBytes: 1, MaxJournalBytes: 1, MaxCleanBytes: -1}
	o.EnsureDefaults()
	err := o.Validate()
	for _, field := range []string{"Dir", "Key", "SegmentBytes", "MaxJournalBytes", "MaxCleanBytes"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("no mention of %s in: %v", field, err)
		}
	}
}

var sizes = []int{0, 1, 100, 4096, 16383, 16384, 16385, 32768, 50000, 131072, 1 << 20}

func TestRoundTripOnDisk(t *testing.T) {
	o := cache.Options{Dir: t.TempDir() + "/a/b", Key: testKey, Logger: quiet(), SegmentBytes: 1 << 20}
	s := mustOpen(t, o)
	var want []record
	for i, n := range sizes {
		want = append(want, mustAppend(t, s, content(i, n)))
		want = append(want, mustAppend(t, s, nil))
	}
	for round := range 3 {
		for _, r := range want {
			if err := readBack(s, r); err != nil {
				t.Fatal(err)
			}
		}
		mustSync(t, s, s.LastSeq())
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustOpen(t, o)
		for after := range uint64(len(want) + 1) {
			if err := verify(s, after, want); err != nil {
				t.Fatalf("round %d, replay after %d: %v", round, after, err)
			}
		}
		want = append(want, mustAppend(t, s, content(round, 20000)))
	}
	err := s.Replay(uint64(len(want)+1), func(uint64, []byte) error { return nil })
	if !isCorrupt(err) {
		t.Errorf("replay after a record that does not exist: %v", err)
	}
}

func TestReadRanges(t *testing.T) {
	s := mustOpen(t, options(faultfs.New()))
	data := content(1, 100_000)
	r := mustAppend(t, s, data)
	rng := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		off := rng.IntN(len(data))
		dst := make([]byte, rng.IntN(len(data)-off+1))
		if err := s.ReadAt(r.ref, off, dst); err != nil || !bytes.Equal(dst, data[off:off+len(dst)]) {
			t.Fatalf("bytes %d+%d: %v", off, len(dst), err)
		}
	}
	if err := s.ReadAt(r.ref, 1, make([]byte, len(data))); err == nil {
		t.Error("read beyond the run")
	}
	wrong := r.ref
	wrong.Nonce++
	if err := s.ReadAt(wrong, 0, make([]byte, 10)); !isCorrupt(err) {
		t.Errorf("read under another nonce: %v", err)
	}
	wrong = r.ref
	wrong.Length--
	if err := s.ReadAt(wrong, 0, make([]byte, 10)); !isCorrupt(err) {
		t.Errorf("read with another length: %v", err)
	}
}

func TestNothingInPlainOnDisk(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	canary := []byte("canary 5c1f canary 5c1f")
	for range 3 {
		sealed, _ := s.Seal(canary)
		if _, err := s.Append(sealed, func(uint64, cache.Ref) ([]byte, error) { return canary, nil }); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	for _, name := range disk.Names() {
		if bytes.Contains(disk.Read(name), canary[:12]) {
			t.Errorf("%s holds plaintext", name)
		}
	}
}

func TestBuildErrorAppendsNothing(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	refused := errors.New("refused")
	for _, first := range []bool{true, false} {
		if !first {
			mustAppend(t, s, nil)
		}
		last := s.LastSeq()
		sealed, _ := s.Seal([]byte("x"))
		if _, err := s.Append(sealed, func(uint64, cache.Ref) ([]byte, error) { return nil, refused }); err != refused {
			t.Fatal(err)
		}
		if s.LastSeq() != last {
			t.Error("the sequence moved")
		}
	}
	if got := mustAppend(t, s, nil).seq; got != 2 {
		t.Errorf("next record is %d", got)
	}
}

func TestTooLarge(t *testing.T) {
	s := mustOpen(t, options(faultfs.New()))
	if _, err := s.Seal(make([]byte, cache.MaxDataBytes+1)); !errors.Is(err, cache.ErrTooLarge) {
		t.Error(err)
	}
	_, err := s.Append(nil, func(uint64, cache.Ref) ([]byte, error) { return make([]byte, cache.MaxMetaBytes+1), nil })
	if !errors.Is(err, cache.ErrTooLarge) {
		t.Error(err)
	}
	// A record longer than a segment gets one of its own.
	r := mustAppend(t, s, content(3, 300_000))
	mustAppend(t, s, nil)
	if err := readBack(s, r); err != nil {
		t.Error(err)
	}
}

func TestSyncOfUnknownRecord(t *testing.T) {
	s := mustOpen(t, options(faultfs.New()))
	if err := s.Sync(context.Background(), 1); err == nil {
		t.Error("no error")
	}
}

func TestEachOpenStartsANewSegment(t *testing.T) {
	disk := faultfs.New()
	var before []byte
	for i := range 4 {
		s := mustOpen(t, options(disk))
		r := mustAppend(t, s, content(i, 100))
		if r.ref.Segment != uint64(i+1) {
			t.Fatalf("open %d appends to segment %d", i, r.ref.Segment)
		}
		s.Close()
		first := disk.Read(testDir + "/segment-0000000000000001")
		if i > 0 && !bytes.Equal(first, before) {
			t.Fatal("an old segment was changed")
		}
		before = first
	}
}

func TestIDsAndSequencesSurviveTheLossOfAllSegments(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	r := mustAppend(t, s, content(1, 100))
	mustSync(t, s, r.seq)
	if err := s.MarkClean(1); !errors.Is(err, cache.ErrActive) {
		t.Fatalf("mark the active segment: %v", err)
	}
	if err := s.Rotate(); err != nil {
		t.Fatal(err)
	}
	if err := s.MarkClean(1); err != nil {
		t.Fatal(err)
	}
	if freed, err := s.DropClean(nil, nil); err != nil || freed == 0 {
		t.Fatal(freed, err)
	}
	if err := readBack(s, r); !errors.Is(err, cache.ErrEvicted) {
		t.Fatalf("read of an evicted segment: %v", err)
	}
	s.Close()
	s = mustOpen(t, options(disk))
	if s.LastSeq() != 1 || len(s.Segments()) != 0 {
		t.Fatalf("LastSeq %d, segments %v", s.LastSeq(), s.Segments())
	}
	if r = mustAppend(t, s, nil); r.seq != 2 || r.ref.Segment != 2 {
		t.Fatalf("next record %d in segment %d", r.seq, r.ref.Segment)
	}
	s.Close()
	s = mustOpen(t, options(disk))
	if err := s.Replay(1, func(seq uint64, _ []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Replay(0, func(seq uint64, _ []byte) error { return nil }); !isCorrupt(err) {
		t.Fatalf("replay of evicted records: %v", err)
	}
}

func TestMarkCleanNeedsDurableRecords(t *testing.T) {
	disk := faultfs.New()
	gate := make(chan struct{})
	s := mustOpen(t, options(disk))
	mustAppend(t, s, nil)
	disk.OnCall(func(_ int, op, _ string) error {
		if op == "sync" {
			<-gate
		}
		return nil
	})
	if err := s.Rotate(); err != nil {
		t.Fatal(err)
	}
	if err := s.MarkClean(1); err == nil {
		t.Error("a segment with unflushed records turned clean")
	}
	close(gate)
	mustSync(t, s, 1)
	if err := s.MarkClean(1); err != nil {
		t.Error(err)
	}
}

func TestCleanStateSurvivesReopen(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	fill(t, s, 5)
	for id := range uint64(3) {
		if err := s.MarkClean(id + 1); err != nil {
			t.Fatal(err)
		}
	}
	before := s.Stats()
	s.Close()
	s = mustOpen(t, options(disk))
	for _, info := range s.Segments() {
		if (info.State == cache.Clean) != (info.ID <= 3) {
			t.Errorf("segment %d is %v", info.ID, info.State)
		}
	}
	if after := s.Stats(); after.CleanBytes != before.CleanBytes || after.JournalBytes != before.JournalBytes {
		t.Errorf("bytes before %+v, after %+v", before, after)
	}
}

// fill makes n retired segments of one record each, all durable.
func fill(t testing.TB, s *cache.Store, n int) []record {
	t.Helper()
	var rs []record
	for i := range n {
		rs = append(rs, mustAppend(t, s, content(i, 20_000)))
		if err := s.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	mustSync(t, s, s.LastSeq())
	return rs
}

func TestEvictionTakesTheLeastRecentlyUsedCleanOnly(t *testing.T) {
	o := options(faultfs.New())
	o.MaxCleanBytes = 3 * 33_000
	s := mustOpen(t, o)
	rs := fill(t, s, 8)
	readBack(s, rs[1]) // segment 2 is used again
	for _, id := range []uint64{1, 2, 3, 4, 5} {
		if err := s.MarkClean(id); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "clean bytes within the cap", func() bool { return s.Stats().CleanBytes <= o.MaxCleanBytes })
	for i, r := range rs {
		err := readBack(s, r)
		if gone := i+1 == 1 || i+1 == 3; gone && !errors.Is(err, cache.ErrEvicted) || !gone && err != nil {
			t.Errorf("segment %d: %v", i+1, err)
		}
	}
}

func TestEvictionUnderReaders(t *testing.T) {
	s := mustOpen(t, cache.Options{Dir: t.TempDir(), Key: testKey, Logger: quiet(), SegmentBytes: 1 << 20})
	rs := fill(t, s, 10)
	var wg sync.WaitGroup
	var evicted atomic.Int64
	for worker := range 4 {
		wg.Go(func() {
			for i := 0; evicted.Load() < 40; i++ {
				r := rs[(i+worker)%len(rs)]
				err := readBack(s, r)
				if errors.Is(err, cache.ErrEvicted) {
					evicted.Add(1)
				} else if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for _, info := range s.Segments() {
		if err := s.MarkClean(info.ID); err != nil {
			t.Error(err)
		}
		if _, err := s.DropClean(nil, nil); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
}

func TestConcurrentUse(t *testing.T) {
	o := options(faultfs.New())
	o.MaxCleanBytes = 256 << 10
	s := mustOpen(t, o)
	var order sync.Mutex
	var appended []record
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 60 {
				data := content(worker*100+i, 100+i*80)
				sealed, err := s.Seal(data)
				if err != nil {
					t.Error(err)
					return
				}
				order.Lock()
				var r record
				seq, err := s.Append(sealed, func(seq uint64, ref cache.Ref) ([]byte, error) {
					r = record{seq: seq, ref: ref, data: data, meta: fmt.Append(nil, "meta ", seq)}
					return r.meta, nil
				})
				appended = append(appended, r)
				order.Unlock()
				if err != nil {
					t.Error(err)
					return
				}
				if i%3 == 0 {
					if err := s.Sync(context.Background(), seq); err != nil || s.Durable() < seq {
						t.Error("sync:", err, s.Durable(), seq)
						return
					}
				}
				if err := readBack(s, r); err != nil {
					t.Error(err)
					return
				}
				s.PutSlice([16]byte{byte(worker)}, uint32(i), data)
				got := make([]byte, 50)
				if s.GetSlice([16]byte{byte(worker)}, uint32(i/2), 10, got) && !bytes.Equal(got, content(worker*100+i/2, 100+i/2*80)[10:60]) {
					t.Error("wrong slice bytes")
				}
			}
		})
	}
	wg.Wait()
	for i, r := range appended {
		if r.seq != uint64(i+1) {
			t.Fatalf("record %d has sequence %d", i+1, r.seq)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := verify(mustOpen(t, o), 0, appended); err != nil {
		t.Fatal(err)
	}
}

func TestGroupCommitSharesFlushes(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	r := mustAppend(t, s, nil)
	mustSync(t, s, r.seq)
	gate, entered := make(chan struct{}), make(chan struct{}, 100)
	var syncs atomic.Int64
	disk.OnCall(func(_ int, op, name string) error {
		if op == "sync" && strings.Contains(name, "segment") {
			syncs.Add(1)
			entered <- struct{}{}
			<-gate
		}
		return nil
	})
	var wg sync.WaitGroup
	start := func() {
		seq := mustAppend(t, s, nil).seq
		wg.Go(func() {
			if err := s.Sync(context.Background(), seq); err != nil {
				t.Error(err)
			}
		})
	}
	start()
	<-entered // the first flush is under way
	for range 20 {
		start()
	}
	close(gate)
	wg.Wait()
	if n := syncs.Load(); n > 3 {
		t.Errorf("%d flushes for 21 callers", n)
	}
}

func TestSyncIsInterruptible(t *testing.T) {
	disk := faultfs.New()
	gate := make(chan struct{})
	disk.OnCall(func(_ int, op, name string) error {
		if op == "sync" && strings.Contains(name, "segment") {
			<-gate
		}
		return nil
	})
	s := mustOpen(t, options(disk))
	defer close(gate)
	r := mustAppend(t, s, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Sync(ctx, r.seq); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestBackgroundFlushAndTail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := faultfs.New()
		s, err := cache.Open(options(disk))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		mustAppend(t, s, content(1, 100))
		synctest.Wait()
		if s.Durable() != 0 {
			t.Error("flushed at once")
		}
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		if s.Durable() != 1 {
			t.Error("not flushed within a second")
		}
		mustAppend(t, s, content(1, 100))
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		// After the idle second the tail file alone vouches for the last record:
		// its damage is then corruption, not a torn end.
		time.Sleep(2 * time.Second)
		synctest.Wait()
		clone := disk.CrashClone(faultfs.KeepNone)
		name := testDir + "/segment-0000000000000001"
		data := clone.Read(name)
		flipLastFrame(data)
		clone.Write(name, data)
		after, err := cache.Open(options(clone))
		if err != nil {
			t.Fatal(err)
		}
		defer after.Close()
		if err := after.Replay(0, func(uint64, []byte) error { return nil }); !isCorrupt(err) {
			t.Errorf("replay with a damaged frame at the slot: %v", err)
		}
	})
}

// flipLastFrame damages the last frame header of a segment.
func flipLastFrame(data []byte) {
	data[bytes.LastIndex(data, []byte("DFrm"))+20] ^= 1
}

func TestWaitRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := options(faultfs.New())
		o.MaxJournalBytes = 4 * o.SegmentBytes
		s, err := cache.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		ctx := context.Background()
		wait := func(ctx context.Context, n int64) (time.Duration, error) {
			start := time.Now()
			err := s.WaitRoom(ctx, n)
			return time.Since(start), err
		}
		if d, err := wait(ctx, 1000); err != nil || d != 0 {
			t.Errorf("empty journal: %v, %v", d, err)
		}
		if _, err := wait(ctx, o.MaxJournalBytes+1); !errors.Is(err, cache.ErrNoSpace) {
			t.Errorf("more than the cap: %v", err)
		}
		for s.Stats().JournalBytes < o.MaxJournalBytes*9/10 {
			mustAppend(t, s, content(1, 4000))
		}
		if d, err := wait(ctx, 1000); err != nil || d <= 0 || d > 20*time.Millisecond {
			t.Errorf("nine tenths full: %v, %v", d, err)
		}
		for s.Stats().JournalBytes < o.MaxJournalBytes {
			mustAppend(t, s, content(1, 4000))
		}
		if d, err := wait(ctx, 1000); !errors.Is(err, cache.ErrNoSpace) || d != 20*time.Second {
			t.Errorf("full, nobody frees: %v, %v", d, err)
		}
		cancelled, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		if d, err := wait(cancelled, 1000); !errors.Is(err, context.DeadlineExceeded) || d != 3*time.Second {
			t.Errorf("full, interrupted: %v, %v", d, err)
		}
		// Progress every 15 s keeps the writer waiting beyond 20 s, then lets it go.
		mustSync(t, s, s.LastSeq())
		go func() {
			for id := range uint64(2) {
				time.Sleep(15 * time.Second)
				if err := s.MarkClean(id + 1); err != nil {
					t.Error(err)
				}
			}
		}()
		if d, err := wait(ctx, 100_000); err != nil || d < 30*time.Second {
			t.Errorf("full, freed in two steps: %v, %v", d, err)
		}
	})
}

func TestClosed(t *testing.T) {
	s := mustOpen(t, options(faultfs.New()))
	r := mustAppend(t, s, content(1, 10))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	_, appendErr := appendRecord(s, []byte("x"), nil)
	_, dropErr := s.DropClean(nil, nil)
	for name, err := range map[string]error{
		"append": appendErr, "drop": dropErr,
		"read": readBack(s, r), "rotate": s.Rotate(), "mark": s.MarkClean(1),
		"room":   s.WaitRoom(context.Background(), 1),
		"replay": s.Replay(0, func(uint64, []byte) error { return nil }),
	} {
		if !errors.Is(err, cache.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSIGKILL kills a child that appends to a store on disk. What the child
// reported as appended is there.
func TestSIGKILL(t *testing.T) {
	const dirEnv = "CACHE_TEST_CHILD_DIR"
	if dir := os.Getenv(dirEnv); dir != "" {
		s, err := cache.Open(cache.Options{Dir: dir, Key: testKey, SegmentBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		for i := s.LastSeq(); ; i++ {
			r, err := appendRecord(s, content(int(i), 3000+int(i)%5000), nil)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Println("appended", r.seq)
		}
	}
	dir := t.TempDir()
	for round := range 4 {
		child := exec.Command(os.Args[0], "-test.run=^TestSIGKILL$")
		child.Env = append(os.Environ(), dirEnv+"="+dir)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		var acknowledged uint64
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			fmt.Sscanf(lines.Text(), "appended %d", &acknowledged)
			if n == 400+round*97 {
				child.Process.Kill()
			}
		}
		child.Wait()
		s := mustOpen(t, cache.Options{Dir: dir, Key: testKey, Logger: quiet(), SegmentBytes: 1 << 20})
		if acknowledged == 0 || s.LastSeq() < acknowledged {
			t.Fatalf("round %d: record %d was appended, the journal ends with %d", round, acknowledged, s.LastSeq())
		}
		next := uint64(1)
		err = s.Replay(0, func(seq uint64, meta []byte) error {
			if want := content(int(seq-1), 10); seq != next || !bytes.HasSuffix(meta, want) {
				return fmt.Errorf("record %d has meta %x", seq, meta)
			}
			next++
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
}
