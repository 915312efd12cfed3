package cache_test

import (
	"bytes"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/cache/faultfs"
)

func stripe(i int) (id [16]byte) { id[0], id[1] = byte(i), byte(i>>8); return id }

// has tells whether the whole slice is there, and fails on wrong bytes.
func has(t *testing.T, s *cache.Store, i int, want []byte) bool {
	t.Helper()
	got := make([]byte, len(want))
	if !s.GetSlice(stripe(i), uint32(i), 0, got) {
		return false
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("slice %d: wrong bytes", i)
	}
	return true
}

// onDisk waits until the slices' bytes have reached the disk.
func onDisk(t *testing.T, s *cache.Store, bytes int64) {
	t.Helper()
	eventually(t, "slices written", func() bool { return s.Stats().CleanBytes >= bytes })
}

func TestSlices(t *testing.T) {
	disk := faultfs.New()
	o := options(disk)
	o.MaxMemoryBytes = 100_000
	s := mustOpen(t, o)
	var all [][]byte
	var sum int64
	for i := range 20 {
		all = append(all, content(i, 1+i*2500))
		s.PutSlice(stripe(i), uint32(i), all[i])
		sum += int64(len(all[i]))
	}
	onDisk(t, s, sum)
	check := func(when string) {
		for i, want := range all {
			if !has(t, s, i, want) {
				t.Fatalf("%s: slice %d is missing", when, i)
			}
			for _, r := range [][2]int{{0, 1}, {len(want) - 1, 1}, {len(want) / 3, len(want) / 3}, {len(want), 0}} {
				got := make([]byte, r[1])
				if !s.GetSlice(stripe(i), uint32(i), r[0], got) || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
					t.Fatalf("%s: slice %d, bytes %v", when, i, r)
				}
			}
			if s.GetSlice(stripe(i), uint32(i), 1, make([]byte, len(want))) || s.GetSlice(stripe(i), uint32(i), -1, nil) {
				t.Fatalf("%s: read beyond slice %d", when, i)
			}
		}
		if s.GetSlice(stripe(1), 77, 0, make([]byte, 1)) {
			t.Fatal("a slice that was never put")
		}
	}
	check("at first")
	if st := s.Stats(); st.MemoryBytes > o.MaxMemoryBytes {
		t.Errorf("%d bytes in memory", st.MemoryBytes)
	}
	s.Close()
	s = mustOpen(t, o)
	s.WaitIndexed()
	check("after reopening")
	s.PutSlice(stripe(3), 3, all[3]) // known already: not written again
	if freed, err := s.DropClean(nil, nil); err != nil || freed < sum {
		t.Fatal(freed, err)
	}
	for i, want := range all {
		if has(t, s, i, want) {
			t.Errorf("slice %d is still there", i)
		}
	}
	if st := s.Stats(); st.CleanBytes != 0 || st.MemoryBytes != 0 {
		t.Errorf("left after the drop: %+v", st)
	}
	for _, name := range disk.Names() {
		if strings.Contains(name, "slices") {
			t.Errorf("%s is still there", name)
		}
	}
	s.PutSlice(stripe(3), 3, all[3])
	if !has(t, s, 3, all[3]) {
		t.Error("the cache does not go on after a drop")
	}
}

// TestDamagedSlices flips bits in a slice file: a damaged slice is absent, never wrong.
func TestDamagedSlices(t *testing.T) {
	disk := faultfs.New()
	s := mustOpen(t, options(disk))
	all := [][]byte{content(0, 300), content(1, 20_000)}
	for i, data := range all {
		s.PutSlice(stripe(i), uint32(i), data)
	}
	onDisk(t, s, 20_300)
	s.Close()
	names := disk.Names()
	name := names[slices.IndexFunc(names, func(n string) bool { return strings.Contains(n, "slices") })]
	data := disk.Read(name)
	missing := 0
	for at := 0; at < len(data); at += 1 + at/37 {
		clone := disk.KillClone()
		flipped := slices.Clone(data)
		flipped[at] ^= 0x10
		clone.Write(name, flipped)
		s := mustOpen(t, options(clone))
		s.WaitIndexed()
		for i, want := range all {
			if !has(t, s, i, want) {
				missing++
			}
		}
		s.Close()
	}
	if missing == 0 {
		t.Error("no damage was noticed")
	}
	// A torn file, and one cut within a slice.
	for _, size := range []int{0, 10, 200, 400, 10_000} {
		clone := disk.KillClone()
		clone.Write(name, data[:size])
		s := mustOpen(t, options(clone))
		s.WaitIndexed()
		for i, want := range all {
			has(t, s, i, want)
		}
	}
}

func TestSlicesAreEvictedByUse(t *testing.T) {
	o := options(faultfs.New())
	o.MaxCleanBytes, o.MaxMemoryBytes = 1<<20, 1
	s := mustOpen(t, o)
	for i := range 40 {
		s.PutSlice(stripe(i), uint32(i), content(i, 60_000))
		onDiskOrEvicted(t, s)
	}
	eventually(t, "within the cap", func() bool { return s.Stats().CleanBytes <= o.MaxCleanBytes })
}

// onDiskOrEvicted waits until the cleaner is within its cap again.
func onDiskOrEvicted(t *testing.T, s *cache.Store) {
	t.Helper()
	eventually(t, "within the cap", func() bool { st := s.Stats(); return st.CleanBytes <= st.CleanMaxBytes })
}

func TestSliceWriteErrorsCostOnlyTheCache(t *testing.T) {
	disk := faultfs.New()
	disk.OnCall(func(_ int, op, name string) error {
		if strings.Contains(name, "slices") {
			return syscall.EIO
		}
		return nil
	})
	s := mustOpen(t, options(disk))
	for i := range 5 {
		s.PutSlice(stripe(i), uint32(i), content(i, 1000))
		if !has(t, s, i, content(i, 1000)) {
			t.Error("not even in memory")
		}
	}
	mustSync(t, s, mustAppend(t, s, content(1, 100)).seq)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestOversizedAndEmptySlicesAreNotKept(t *testing.T) {
	s := mustOpen(t, options(faultfs.New()))
	s.PutSlice(stripe(1), 1, nil)
	s.PutSlice(stripe(2), 2, make([]byte, 16<<20+1))
	if st := s.Stats(); st.MemoryBytes != 0 || s.GetSlice(stripe(1), 1, 0, nil) {
		t.Errorf("%+v", st)
	}
}
