package cache_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/cache/faultfs"
	"pgregory.net/rapid"
)

// model remembers what was appended and what was acknowledged. The crash tests
// compare a recovered store with it.
type model struct {
	mu       sync.Mutex
	appended []record // in order, the one being written included
	returned int      // appends that returned
	acked    uint64
}

func (m *model) note(r record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.appended = append(m.appended[:r.seq-1:r.seq-1], r)
}

func (m *model) state() (appended []record, returned int, acked uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.appended), m.returned, m.acked
}

func (m *model) append(s *cache.Store, data []byte) error {
	_, err := appendRecord(s, data, m.note)
	if err == nil {
		m.mu.Lock()
		m.returned = len(m.appended)
		m.mu.Unlock()
	}
	return err
}

func (m *model) sync(s *cache.Store, seq uint64) error {
	err := s.Sync(context.Background(), seq)
	if err == nil {
		m.mu.Lock()
		m.acked = max(m.acked, seq)
		m.mu.Unlock()
	}
	return err
}

// workload appends, syncs and rotates over several segments and two opens. It
// stops at the first error.
func workload(disk *faultfs.FS, m *model) error {
	for open := range 2 {
		s, err := cache.Open(options(disk))
		if err != nil {
			return err
		}
		for i := range 14 {
			n := []int{0, 10, 700, 17_000, 40_000}[i%5]
			if err = m.append(s, content(open*100+i, n)); err != nil {
				break
			}
			if i%2 == 0 {
				if err = m.sync(s, s.LastSeq()); err != nil {
					break
				}
			}
			if i == 9 {
				if err = s.Rotate(); err != nil {
					break
				}
			}
		}
		if closeErr := s.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			return err
		}
		m.mu.Lock()
		m.acked = uint64(len(m.appended)) // Close flushes
		m.mu.Unlock()
	}
	return nil
}

// checkRecovered opens a disk after a crash: what it holds is an exact prefix
// of what was appended, with at least atLeast records, and the store goes on.
func checkRecovered(disk *faultfs.FS, appended []record, atLeast uint64) error {
	s, err := cache.Open(options(disk))
	if err != nil {
		return err
	}
	defer s.Close()
	if s.LastSeq() < atLeast {
		return fmt.Errorf("the journal ends with %d, record %d was acknowledged", s.LastSeq(), atLeast)
	}
	if err := verify(s, 0, appended); err != nil {
		return err
	}
	// Twice: the second open sees what the first recovery left, on a disk that
	// lost everything the first did not flush.
	again := disk.CrashClone(faultfs.KeepNone)
	s2, err := cache.Open(options(again))
	if err != nil {
		return fmt.Errorf("second recovery: %w", err)
	}
	defer s2.Close()
	if s2.LastSeq() != s.LastSeq() {
		return fmt.Errorf("second recovery ends with %d, the first with %d", s2.LastSeq(), s.LastSeq())
	}
	grown := slices.Clone(appended[:s2.LastSeq()])
	for i := range 3 {
		r, err := appendRecord(s2, content(900+i, 5000), nil)
		if err != nil {
			return err
		}
		grown = append(grown, r)
	}
	if err := s2.Close(); err != nil {
		return err
	}
	s3, err := cache.Open(options(again))
	if err != nil {
		return fmt.Errorf("third open: %w", err)
	}
	defer s3.Close()
	if int(s3.LastSeq()) != len(grown) {
		return fmt.Errorf("third open ends with %d of %d", s3.LastSeq(), len(grown))
	}
	return verify(s3, 0, grown)
}

func TestCrashAtEachCall(t *testing.T) {
	type crash struct {
		at       string
		disk     *faultfs.FS
		appended []record
		atLeast  uint64
	}
	var crashes []crash
	disk, m := faultfs.New(), &model{}
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(1, 2))
	disk.OnCall(func(n int, op, name string) error {
		mu.Lock()
		defer mu.Unlock()
		// What was acknowledged before the power went must be there after it.
		appended, returned, acked := m.state()
		at := fmt.Sprintf("call %d, %s %s", n, op, name)
		crashes = append(crashes,
			crash{at + ", nothing kept", disk.CrashClone(faultfs.KeepNone), appended, acked},
			crash{at + ", process killed", disk.KillClone(), appended, uint64(returned)})
		for range 3 {
			crashes = append(crashes, crash{at + ", some kept", disk.CrashClone(faultfs.KeepRandom(rng)), appended, acked})
		}
		return nil
	})
	if err := workload(disk, m); err != nil {
		t.Fatal(err)
	}
	if len(crashes) < 300 {
		t.Fatalf("only %d crashes", len(crashes))
	}
	for _, c := range crashes {
		if err := checkRecovered(c.disk, c.appended, c.atLeast); err != nil {
			t.Fatalf("crash at %s: %v", c.at, err)
		}
	}
}

func TestCrashDuringRecovery(t *testing.T) {
	disk, m := faultfs.New(), &model{}
	s := mustOpen(t, options(disk))
	for i := range 12 {
		if err := m.append(s, content(i, 9000)); err != nil {
			t.Fatal(err)
		}
		if i == 5 {
			if err := m.sync(s, 6); err != nil {
				t.Fatal(err)
			}
		}
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for range 40 {
		crashed := disk.CrashClone(faultfs.KeepRandom(rng))
		var during []*faultfs.FS
		crashed.OnCall(func(int, string, string) error {
			during = append(during, crashed.CrashClone(faultfs.KeepRandom(rng)))
			return nil
		})
		s, err := cache.Open(options(crashed))
		if err != nil {
			t.Fatal(err)
		}
		crashed.OnCall(nil)
		s.Close()
		for _, again := range during {
			if err := checkRecovered(again, m.appended, 6); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestErrorAtEachCall(t *testing.T) {
	for n := 1; ; n++ {
		disk, m := faultfs.New(), &model{}
		var failed string
		disk.OnCall(func(call int, op, name string) error {
			if call == n {
				failed = op + " " + name
				return syscall.EIO
			}
			return nil
		})
		err := workload(disk, m)
		if failed == "" {
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d calls", n-1)
			return
		}
		// Only trimming a file to its end may fail without consequence.
		if err == nil && !strings.HasPrefix(failed, "truncate") {
			t.Fatalf("call %d (%s) failed and nobody noticed", n, failed)
		}
		disk.OnCall(nil)
		appended, _, acked := m.state()
		for _, keep := range []faultfs.Keep{faultfs.KeepNone, faultfs.KeepAll} {
			if err := checkRecovered(disk.CrashClone(keep), appended, acked); err != nil {
				t.Fatalf("call %d (%s) failed, then a crash: %v", n, failed, err)
			}
		}
	}
}

func TestFailedFlushIsSticky(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	durable := mustAppend(t, s, content(1, 5000))
	mustSync(t, s, durable.seq)
	disk.OnCall(func(_ int, op, name string) error {
		if op == "sync" && strings.Contains(name, "segment") {
			return syscall.EIO
		}
		return nil
	})
	lost := mustAppend(t, s, content(2, 5000))
	ctx := context.Background()
	if err := s.Sync(ctx, lost.seq); !errors.Is(err, cache.ErrReadOnly) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("sync: %v", err)
	}
	disk.OnCall(nil) // the disk answers again: too late
	_, appendErr := appendRecord(s, []byte("x"), nil)
	_, dropErr := s.DropClean(nil, nil)
	for name, err := range map[string]error{
		"sync again": s.Sync(ctx, lost.seq), "append": appendErr, "drop": dropErr,
		"rotate": s.Rotate(), "mark": s.MarkClean(1), "room": s.WaitRoom(ctx, 1),
	} {
		if !errors.Is(err, cache.ErrReadOnly) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Sync(ctx, durable.seq); err != nil {
		t.Errorf("sync of a durable record: %v", err)
	}
	if s.Durable() != durable.seq {
		t.Errorf("durable up to %d", s.Durable())
	}
	for _, r := range []record{durable, lost} {
		if err := readBack(s, r); err != nil {
			t.Error(err)
		}
	}
	if err := s.Close(); !errors.Is(err, cache.ErrReadOnly) {
		t.Errorf("close: %v", err)
	}
	if err := checkRecovered(disk.CrashClone(faultfs.KeepNone), []record{durable, lost}, 1); err != nil {
		t.Error(err)
	}
}

func TestDiskFull(t *testing.T) {
	disk := faultfs.New()
	disk.SetCapacity(400 << 10)
	s := mustOpen(t, options(disk))
	m := &model{}
	fillUp := func() {
		for i := 0; ; i++ {
			err := m.append(s, content(i, 9000))
			if errors.Is(err, cache.ErrNoSpace) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	fillUp()
	m.appended = m.appended[:m.returned]
	last := s.LastSeq()
	if err := m.sync(s, last); err != nil {
		t.Fatalf("a full disk is no failed one: %v", err)
	}
	if err := verify(s, 0, m.appended); err != nil {
		t.Fatal(err)
	}
	// Clean segments give way to new records.
	s.Rotate()
	mustSync(t, s, last)
	for _, info := range s.Segments()[:2] {
		if err := s.MarkClean(info.ID); err != nil {
			t.Fatal(err)
		}
	}
	fillUp()
	m.appended = m.appended[:m.returned]
	if s.LastSeq() == last {
		t.Fatal("no record found room")
	}
	for _, info := range s.Segments() {
		if info.State == cache.Clean {
			t.Errorf("segment %d is clean and still there", info.ID)
		}
	}
	first := s.Segments()[0].FirstSeq
	s.Close()
	if err := verify(mustOpen(t, options(disk)), first-1, m.appended); err != nil {
		t.Fatal(err)
	}
}

// smallStore makes a closed store of a few records in two segments and a slice
// file, and returns its disk.
func smallStore(t testing.TB) (*faultfs.FS, []record) {
	disk := faultfs.New()
	var rs []record
	for open := range 2 {
		s := mustOpen(t, options(disk))
		for i, n := range []int{10, 0, 20_000, 300} {
			rs = append(rs, mustAppend(t, s, content(open*10+i, n)))
			mustSync(t, s, rs[len(rs)-1].seq)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return disk, rs
}

// TestBitFlips flips bits over the whole of a small store. Each is found or
// without effect: never wrong bytes, never a missing record.
func TestBitFlips(t *testing.T) {
	disk, want := smallStore(t)
	detected := 0
	for _, name := range disk.Names() {
		data := disk.Read(name)
		for at := range data {
			inData := strings.Contains(name, "segment") && at > 12<<10+1000
			if inData && at%97 != 0 || !inData && at >= 400 && at%61 != 0 && at%4096 > 150 {
				continue // sample the long uniform runs
			}
			clone := disk.CrashClone(faultfs.KeepAll)
			flipped := slices.Clone(data)
			flipped[at] ^= 1 << (at % 8)
			clone.Write(name, flipped)
			s, err := cache.Open(options(clone))
			if err == nil {
				err = verify(s, 0, want)
				if err == nil && int(s.LastSeq()) != len(want) {
					t.Fatalf("%s byte %d: %d records are left, no error", name, at, s.LastSeq())
				}
				s.Close()
			}
			if err == nil {
				continue
			}
			detected++
			if !isCorrupt(err) {
				t.Fatalf("%s byte %d: %v", name, at, err)
			}
			if strings.Contains(name, "segment") && !strings.Contains(err.Error(), "segment ") {
				t.Fatalf("%s byte %d: the error names no segment: %v", name, at, err)
			}
		}
	}
	if detected < 100 {
		t.Errorf("only %d flips were detected", detected)
	}
}

func TestMovedFiles(t *testing.T) {
	one, two, tail := testDir+"/segment-0000000000000001", testDir+"/segment-0000000000000002", testDir+"/tail"
	for _, test := range []struct {
		name   string
		damage func(d *faultfs.FS)
	}{
		{"first segment missing", func(d *faultfs.FS) { d.Delete(one) }},
		{"last segment missing", func(d *faultfs.FS) { d.Delete(two) }},
		{"tail missing", func(d *faultfs.FS) { d.Delete(tail) }},
		{"tail empty", func(d *faultfs.FS) { d.Write(tail, nil) }},
		{"swapped", func(d *faultfs.FS) { a, b := d.Read(one), d.Read(two); d.Write(one, b); d.Write(two, a) }},
		{"duplicated over the other", func(d *faultfs.FS) { d.Write(two, d.Read(one)) }},
		{"first truncated", func(d *faultfs.FS) { d.Write(one, d.Read(one)[:20_000]) }},
		{"last truncated", func(d *faultfs.FS) { d.Write(two, d.Read(two)[:20_000]) }},
		{"last emptied", func(d *faultfs.FS) { d.Write(two, nil) }},
		{"frames swapped with another place", func(d *faultfs.FS) {
			b := d.Read(one)
			copy(b[12<<10:], b[len(b)-400:])
			d.Write(one, b)
		}},
	} {
		disk, _ := smallStore(t)
		test.damage(disk)
		s, err := cache.Open(options(disk))
		if err == nil {
			err = s.Replay(0, func(uint64, []byte) error { return nil })
			s.Close()
		}
		if !isCorrupt(err) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	// A copy beyond the end is of no effect on what is there.
	disk, want := smallStore(t)
	disk.Write(testDir+"/segment-0000000000000009", disk.Read(one))
	if err := verify(mustOpen(t, options(disk)), 0, want); err != nil {
		t.Errorf("copied to a new number: %v", err)
	}
	disk, _ = smallStore(t)
	o := options(disk)
	o.Key[0] ^= 1
	if _, err := cache.Open(o); !isCorrupt(err) {
		t.Errorf("wrong device key: %v", err)
	}
}

// TestSegmentOfAnotherHistory: two copies of one store go on separately. Their
// segments have the same numbers and sequences, and must not be mixed.
func TestSegmentOfAnotherHistory(t *testing.T) {
	base, _ := smallStore(t)
	goOn := func(seed int) *faultfs.FS {
		disk := base.KillClone()
		for range 3 {
			s := mustOpen(t, options(disk))
			mustAppend(t, s, content(seed, 100))
			s.Close()
		}
		return disk
	}
	one, other := goOn(1), goOn(2)
	name := testDir + "/segment-0000000000000004"
	one.Write(name, other.Read(name))
	s := mustOpen(t, options(one))
	if err := s.Replay(0, func(uint64, []byte) error { return nil }); !isCorrupt(err) {
		t.Errorf("a segment of another history: %v", err)
	}
	s.Close()
	// Beyond the tail such a segment is no part of the journal.
	two := base.KillClone()
	s = mustOpen(t, options(two))
	mustAppend(t, s, content(1, 100))
	s.Close()
	two.Write(name, other.Read(name))
	s = mustOpen(t, options(two))
	if err := s.Replay(0, func(uint64, []byte) error { return nil }); err != nil || s.LastSeq() != 9 {
		t.Errorf("journal ends with %d: %v", s.LastSeq(), err)
	}
	// Unless its slot vouches for a record that is missing.
	three := base.KillClone()
	three.Write(name, other.Read(name))
	if _, err := cache.Open(options(three)); !isCorrupt(err) {
		t.Errorf("a slot names a missing segment: %v", err)
	}
}

// TestDamageBelowTheSlot: after a kill only the slot inside the segment knows
// how far the flushes came. Damage below it is corruption, not a torn end.
func TestDamageBelowTheSlot(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	var frames []int // end of the segment's frames, by way of the refs
	for i := range 4 {
		r := mustAppend(t, s, content(i, 100))
		frames = append(frames, int(r.ref.Offset))
		mustSync(t, s, r.seq)
	}
	name := testDir + "/segment-0000000000000001"
	for i, dataAt := range frames {
		for _, torn := range []bool{false, true} {
			after := disk.CrashClone(faultfs.KeepNone)
			data := after.Read(name)
			data[dataAt-10] ^= 1 // in the frame's header
			slotted := 3         // the slot written with the fourth flush names the third record
			if torn {
				clear(data[4096:8192])
				slotted = 2
			}
			after.Write(name, data)
			s, err := cache.Open(options(after))
			if err == nil {
				err = s.Replay(0, func(uint64, []byte) error { return nil })
				s.Close()
			}
			if below := i < slotted; below != isCorrupt(err) || !below && err != nil {
				t.Errorf("damage in record %d of 4, newest slot torn %v: %v", i+1, torn, err)
			}
		}
	}
}

func TestLossOfASyncedSegmentIsNoticed(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	fill(t, s, 2)
	mustSync(t, s, mustAppend(t, s, nil).seq)
	after := disk.CrashClone(faultfs.KeepNone)
	after.Delete(testDir + "/segment-0000000000000003")
	if _, err := cache.Open(options(after)); !isCorrupt(err) {
		t.Error(err)
	}
}

// TestTornSlots: a power loss tears at most the slot being written. The other
// one carries on.
func TestTornSlots(t *testing.T) {
	for slot := range 2 {
		for _, file := range []string{"/tail", "/segment-0000000000000002"} {
			disk, want := smallStore(t)
			at := slot * 4096
			if file != "/tail" {
				at += 4096
			}
			data := disk.Read(testDir + file)
			copy(data[at:at+512], make([]byte, 512))
			disk.Write(testDir+file, data)
			s := mustOpen(t, options(disk))
			if err := verify(s, 0, want); err != nil || int(s.LastSeq()) != len(want) {
				t.Errorf("slot %d of %s torn: %d of %d records, %v", slot, file, s.LastSeq(), len(want), err)
			}
		}
	}
}

func TestStaleSegment(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	mustAppend(t, s, content(1, 100))
	mustSync(t, s, 1)
	stale := disk.Read(testDir + "/segment-0000000000000001")
	mustAppend(t, s, content(2, 100))
	s.Close()
	disk.Write(testDir+"/segment-0000000000000001", stale)
	s = mustOpen(t, options(disk))
	if err := s.Replay(0, func(uint64, []byte) error { return nil }); !isCorrupt(err) {
		t.Errorf("an older copy of the segment: %v", err)
	}
}

// FuzzDamagedStore overwrites bytes of a small store: never wrong bytes, and
// an error for each record that is missing.
func FuzzDamagedStore(f *testing.F) {
	disk, want := smallStore(f)
	names := disk.Names()
	f.Add(uint8(0), uint32(12288), []byte("DFrm"))
	f.Add(uint8(1), uint32(12288+40), []byte{1, 2, 3})
	f.Add(uint8(2), uint32(0), make([]byte, 4096))
	f.Fuzz(func(t *testing.T, file uint8, at uint32, patch []byte) {
		clone := disk.KillClone()
		name := names[int(file)%len(names)]
		data := clone.Read(name)
		at %= uint32(len(data))
		copy(data[at:], patch)
		clone.Write(name, data)
		s, err := cache.Open(options(clone))
		if err == nil {
			defer s.Close()
			if err = verify(s, 0, want); err == nil && int(s.LastSeq()) != len(want) {
				t.Fatalf("%d of %d records, no error", s.LastSeq(), len(want))
			}
		}
		if err != nil && !isCorrupt(err) {
			t.Fatal(err)
		}
	})
}

// TestRandomHistories runs random operations, crashes and reopens against a model.
func TestRandomHistories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		disk, m := faultfs.New(), &model{}
		o := options(disk)
		open := func() *cache.Store {
			s, err := cache.Open(o)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		s := open()
		defer func() { s.Close() }()
		gone := uint64(0) // records up to here may be evicted
		check := func(atLeast uint64) {
			if s.LastSeq() < atLeast {
				t.Fatalf("the journal ends with %d, record %d was acknowledged", s.LastSeq(), atLeast)
			}
			m.appended = m.appended[:s.LastSeq()]
			next := gone + 1
			if err := s.Replay(gone, func(seq uint64, meta []byte) error {
				if seq != next || string(meta) != string(m.appended[seq-1].meta) {
					return fmt.Errorf("record %d, want %d", seq, next)
				}
				next++
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			for _, r := range m.appended {
				if err := readBack(s, r); err != nil && (r.seq > gone || !errors.Is(err, cache.ErrEvicted)) {
					t.Fatal(err)
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				n := rapid.SampledFrom([]int{0, 50, 5000, 17_000, 70_000}).Draw(t, "bytes")
				if err := m.append(s, content(len(m.appended), n)); err != nil {
					t.Fatal(err)
				}
			},
			"sync": func(t *rapid.T) {
				if err := m.sync(s, s.LastSeq()); err != nil {
					t.Fatal(err)
				}
			},
			"rotate": func(t *rapid.T) { s.Rotate() },
			"mark clean": func(t *rapid.T) {
				for _, info := range s.Segments() {
					if !info.Active && info.LastSeq <= s.Durable() && rapid.Bool().Draw(t, "clean") {
						if err := s.MarkClean(info.ID); err != nil {
							t.Fatal(err)
						}
						gone = max(gone, info.LastSeq)
					}
				}
			},
			"drop": func(t *rapid.T) {
				if _, err := s.DropClean(nil, nil); err != nil {
					t.Fatal(err)
				}
			},
			"reopen": func(t *rapid.T) {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				m.acked = uint64(len(m.appended))
				s = open()
				check(m.acked)
			},
			"crash": func(t *rapid.T) {
				rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
				keep := rapid.SampledFrom([]faultfs.Keep{nil, faultfs.KeepNone, faultfs.KeepRandom(rng)}).Draw(t, "keep")
				old := s
				if keep == nil {
					disk = disk.KillClone()
				} else {
					disk = disk.CrashClone(keep)
				}
				o.FS = disk
				old.Close()
				s = open()
				check(m.acked)
				m.acked = s.LastSeq()
			},
			"read": func(t *rapid.T) { check(m.acked) },
		})
	})
}
