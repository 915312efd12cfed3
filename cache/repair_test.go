package cache_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/cache/faultfs"
)

// TestLostSegments: a dirty segment that is missing or damaged is listed by
// each open until it is let go of, and only a replay that needs it fails.
func TestLostSegments(t *testing.T) {
	one, two := testDir+"/segment-0000000000000001", testDir+"/segment-0000000000000002"
	for _, test := range []struct {
		name   string
		lost   uint64
		damage func(*faultfs.FS)
	}{
		{"first missing", 1, func(d *faultfs.FS) { d.Delete(one) }},
		{"last missing", 2, func(d *faultfs.FS) { d.Delete(two) }},
		{"header damaged", 1, func(d *faultfs.FS) { b := d.Read(one); b[50] ^= 1; d.Write(one, b) }},
		{"first frame damaged", 2, func(d *faultfs.FS) { b := d.Read(two); b[12<<10+50] ^= 1; d.Write(two, b) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			disk, want := smallStore(t)
			test.damage(disk)
			for range 2 {
				s := mustOpen(t, options(disk))
				if lost := s.Lost(); len(lost) != 1 || lost[0].ID != test.lost {
					t.Fatalf("lost are %v", lost)
				}
				if err := s.Replay(uint64(len(want)), func(uint64, []byte) error { return nil }); err != nil {
					t.Fatal(err)
				}
				if err := s.Replay(0, func(uint64, []byte) error { return nil }); !isCorrupt(err) {
					t.Fatalf("replay without its records: %v", err)
				}
				r := mustAppend(t, s, content(1, 1000))
				want = append(want, r)
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			s := mustOpen(t, options(disk))
			if err := s.ForgetLost(); err != nil {
				t.Fatal(err)
			}
			s.Close()
			s = mustOpen(t, options(disk))
			if lost := s.Lost(); len(lost) != 0 {
				t.Errorf("still lost: %v", lost)
			}
			if err := verify(s, 8, want); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestTailIsMadeAnew: without a tail file only a repair goes on, with all that
// the segments have.
func TestTailIsMadeAnew(t *testing.T) {
	tail := testDir + "/tail"
	for name, damage := range map[string]func(*faultfs.FS){
		"zeros":   func(d *faultfs.FS) { d.Write(tail, make([]byte, 8192)) },
		"empty":   func(d *faultfs.FS) { d.Write(tail, nil) },
		"missing": func(d *faultfs.FS) { d.Delete(tail) },
	} {
		t.Run(name, func(t *testing.T) {
			disk, want := smallStore(t)
			damage(disk)
			o := options(disk)
			if _, err := cache.Open(o); !isCorrupt(err) {
				t.Fatalf("opened: %v", err)
			}
			o.Repair = true
			s := mustOpen(t, o)
			if err := verify(s, 0, want); err != nil || int(s.LastSeq()) != len(want) {
				t.Errorf("%d of %d records: %v", s.LastSeq(), len(want), err)
			}
			if notes := strings.Join(s.Notes(), " "); !strings.Contains(notes, "cannot be known") {
				t.Errorf("notes are %q", notes)
			}
			want = append(want, mustAppend(t, s, content(9, 100)))
			s.Close()
			if err := verify(mustOpen(t, options(disk)), 0, want); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDamagedSlotIsTold: with one slot left a store opens, and says so.
func TestDamagedSlotIsTold(t *testing.T) {
	for slot := range 2 {
		disk, want := smallStore(t)
		b := disk.Read(testDir + "/tail")
		clear(b[slot*4096:][:4096])
		disk.Write(testDir+"/tail", b)
		s := mustOpen(t, options(disk))
		if err := verify(s, 0, want); err != nil {
			t.Error(err)
		}
		if len(s.Notes()) != 1 {
			t.Errorf("slot %d: notes are %q", slot, s.Notes())
		}
	}
}

// TestSegmentsArePutBack: a repair finds segments that changed places, or lie
// under a free name.
func TestSegmentsArePutBack(t *testing.T) {
	one, two, nine := testDir+"/segment-0000000000000001", testDir+"/segment-0000000000000002", testDir+"/segment-0000000000000009"
	for name, damage := range map[string]func(*faultfs.FS){
		"swapped": func(d *faultfs.FS) { a, b := d.Read(one), d.Read(two); d.Write(one, b); d.Write(two, a) },
		"moved":   func(d *faultfs.FS) { d.Write(nine, d.Read(one)); d.Delete(one) },
		"interrupted": func(d *faultfs.FS) {
			d.Write(one+".moving", d.Read(one))
			d.Delete(one)
		},
	} {
		t.Run(name, func(t *testing.T) {
			disk, want := smallStore(t)
			damage(disk)
			o := options(disk)
			o.Repair = true
			s := mustOpen(t, o)
			if err := verify(s, 0, want); err != nil {
				t.Error(err)
			}
			s.Close()
			if err := verify(mustOpen(t, options(disk)), 0, want); err != nil {
				t.Error(err)
			}
			if slices.ContainsFunc(disk.Names(), func(n string) bool { return strings.Contains(n, "moving") }) {
				t.Error(disk.Names())
			}
		})
	}
}

// TestJournalThatLostItsEnd goes on where the metastore is.
func TestJournalThatLostItsEnd(t *testing.T) {
	disk, want := smallStore(t)
	s := mustOpen(t, options(disk))
	if err := s.SkipTo(20); err != nil {
		t.Fatal(err)
	}
	r := mustAppend(t, s, content(3, 100))
	if r.seq != 21 || int(s.LastSeq()) != 21 {
		t.Fatalf("record %d after %d", r.seq, len(want))
	}
	s.Close()
	s = mustOpen(t, options(disk))
	if err := s.Replay(20, func(seq uint64, _ []byte) error { return nil }); err != nil || s.LastSeq() != 21 {
		t.Errorf("replay: %v, to %d", err, s.LastSeq())
	}
	if err := s.Replay(8, func(seq uint64, _ []byte) error { return nil }); !isCorrupt(err) {
		t.Errorf("replay over the gap: %v", err)
	}
}
