package volume

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/volume/headpb"
)

// recoverFrom recovers the state of a device, or the newest one, and opens it.
func recoverFrom(t *testing.T, pool *testPool, words string, from uint16) (*testVolume, *Recovered) {
	t.Helper()
	root, err := seal.RootFromWords(words)
	if err != nil {
		t.Fatal(err)
	}
	v := &testVolume{words: words, dir: t.TempDir()}
	report, err := Recover(t.Context(), v.dir, root, pool.device(t), from, Options{SegmentBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v.dev = report.Device
	v.open(t, pool.device(t))
	t.Cleanup(func() { v.Close(context.Background()) })
	return v, report
}

// published makes everything durable and returns the device's newest head.
func (v *testVolume) published(t *testing.T) HeadRef {
	t.Helper()
	wait(t, v.Volume)
	p := v.network.publisher
	p.mu.Lock()
	defer p.mu.Unlock()
	return HeadRef{Device: v.dev.Slot, Sequence: p.sequence, Time: time.Unix(0, p.head.Time).UTC()}
}

func wantLeft(t *testing.T, got []LeftHead, want ...LeftHead) {
	t.Helper()
	text := func(list []LeftHead) string {
		var b strings.Builder
		for _, l := range list {
			fmt.Fprintf(&b, "%+v since %+v %s\n", l.HeadRef, l.Since, l.Problem)
		}
		return b.String()
	}
	if text(got) != text(want) {
		t.Fatalf("left:\n%swant:\n%s", text(got), text(want))
	}
}

// TestRecoveryTellsWhatItLeaves has two devices write to a volume, each on its
// own. A recovery names the state that it does not take, takes either on
// demand, and nothing of what any of them has is ever deleted.
func TestRecoveryTellsWhatItLeaves(t *testing.T) {
	pool := newTestPool(t, 6)
	first := newTestVolume(t, pool, "rs-ratio:4+2")
	t.Cleanup(func() { first.Close(context.Background()) })
	common, ofFirst, ofSecond, ofFourth := random(1<<20), random(900_000), random(800_000), random(700_000)
	first.put(t, "common", common)
	base := first.published(t)

	second, report := recoverFrom(t, pool, first.words, 0)
	wantLeft(t, report.Left)
	if report.Head != base || second.dev.Slot != 2 {
		t.Fatalf("took %+v as device %d, want %+v as device 2", report.Head, second.dev.Slot, base)
	}
	if err := first.Unlink(t.Context(), RootIno, "common"); err != nil {
		t.Fatal(err)
	}
	first.put(t, "of-first", ofFirst)
	firstHead := first.published(t)
	second.put(t, "of-second", ofSecond)
	secondHead := second.published(t)

	// The newest by default; the other one is named, with the state that both
	// go on from.
	third, report := recoverFrom(t, pool, first.words, 0)
	if report.Head != secondHead || len(report.Warnings) > 0 {
		t.Fatalf("took %+v, want %+v; warnings %q", report.Head, secondHead, report.Warnings)
	}
	wantLeft(t, report.Left, LeftHead{HeadRef: firstHead, Since: &base})
	wantContent(t, third.Volume, "common", common)
	wantContent(t, third.Volume, "of-second", ofSecond)

	// The other one on demand.
	fourth, report := recoverFrom(t, pool, first.words, 1)
	if report.Head != firstHead {
		t.Fatalf("took %+v, want %+v", report.Head, firstHead)
	}
	wantLeft(t, report.Left, LeftHead{HeadRef: secondHead, Since: &base})
	wantContent(t, fourth.Volume, "of-first", ofFirst)
	if _, err := fourth.Lookup(t.Context(), RootIno, "of-second"); !errors.Is(err, NotExist) {
		t.Fatalf("a file of the other device: %v", err)
	}

	// What the fourth publishes contains the first's state.
	fourth.put(t, "of-fourth", ofFourth)
	fourthHead := fourth.published(t)
	_, report = recoverFrom(t, pool, first.words, 0)
	if report.Head != fourthHead {
		t.Fatalf("took %+v, want %+v", report.Head, fourthHead)
	}
	wantLeft(t, report.Left, LeftHead{HeadRef: secondHead, Since: &base})

	root, err := seal.RootFromWords(first.words)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Recover(t.Context(), t.TempDir(), root, pool.device(t), 7, Options{}); err == nil || !strings.Contains(err.Error(), "4, 2, 1") {
		t.Errorf("the head of a device that has none: %v", err)
	}

	// Two delete what they have, and tend. The heads of the others are kept.
	for _, v := range []*testVolume{first, third} {
		for _, name := range []string{"common", "of-first", "of-second", "of-fourth"} {
			if err := v.Unlink(t.Context(), RootIno, name); err != nil && !errors.Is(err, NotExist) {
				t.Fatal(err)
			}
		}
		for i := range 4 {
			v.put(t, fmt.Sprintf("turn-%d", i), nil)
			wait(t, v.Volume)
			for range 3 {
				v.network.publisher.kick <- struct{}{}
			}
		}
	}
	again, _ := recoverFrom(t, pool, first.words, 2)
	wantContent(t, again.Volume, "common", common)
	wantContent(t, again.Volume, "of-second", ofSecond)
	again, _ = recoverFrom(t, pool, first.words, 4)
	wantContent(t, again.Volume, "of-first", ofFirst)
	wantContent(t, again.Volume, "of-fourth", ofFourth)
}

// TestChooseHead looks at the choice alone: what a head contains counts more
// than its time, and one that cannot be read is not passed over.
func TestChooseHead(t *testing.T) {
	head := func(slot uint16, sequence uint64, seconds int64, contains ...uint64) *foundHead {
		h := &foundHead{slot: slot, head: &wire.Head{Sequence: sequence}, body: &headpb.Body{Time: seconds * 1e9}}
		for i := 0; i < len(contains); i += 2 {
			h.body.Contains = append(h.body.Contains, &headpb.Contained{Slot: uint32(contains[i]), Sequence: contains[i+1], Time: int64(contains[i+1]) * 1e9})
		}
		return h
	}
	broken := func(slot uint16) *foundHead {
		return &foundHead{slot: slot, head: &wire.Head{Sequence: 3}, err: ErrNoHead}
	}
	for _, c := range []struct {
		name  string
		heads []*foundHead // newest first
		from  uint16
		want  uint16 // 0: none
		left  string
	}{
		{name: "none"},
		{name: "one", heads: []*foundHead{head(1, 7, 100)}, want: 1},
		{name: "a wrong clock", heads: []*foundHead{head(1, 7, 100), head(2, 1, 50, 1, 7)}, want: 2},
		{name: "an older state on demand", heads: []*foundHead{head(2, 1, 150, 1, 7), head(1, 7, 100)}, from: 1, want: 1, left: "2 since 1/7 "},
		{name: "gone on", heads: []*foundHead{head(1, 9, 200), head(2, 1, 150, 1, 7)}, want: 1, left: "2 since 1/7 "},
		{name: "a chain", heads: []*foundHead{head(3, 2, 300, 1, 7, 2, 5), head(2, 5, 200, 1, 7), head(1, 7, 100)}, want: 3},
		{name: "two of one", heads: []*foundHead{head(3, 2, 300, 1, 7, 2, 5), head(2, 8, 200, 1, 7), head(1, 7, 100)}, want: 3, left: "2 since 2/5 "},
		{name: "the part before counts once", heads: []*foundHead{head(4, 2, 300, 1, 9), head(3, 2, 200, 1, 7, 2, 5), head(2, 5, 150, 1, 7), head(1, 9, 100)}, want: 4, left: "3 since 1/7 "},
		{name: "nothing in common", heads: []*foundHead{head(2, 5, 200), head(1, 7, 100)}, want: 2, left: "1 "},
		{name: "not there", heads: []*foundHead{head(1, 7, 100)}, from: 2},
		{name: "unreadable", heads: []*foundHead{head(1, 7, 100), broken(2)}},
		{name: "unreadable on demand", heads: []*foundHead{head(1, 7, 100), broken(2)}, from: 2},
		{name: "beside an unreadable one", heads: []*foundHead{head(1, 7, 100), broken(2)}, from: 1, want: 1, left: "2 ! "},
		{name: "an unreadable one that is contained", heads: []*foundHead{head(3, 1, 100, 2, 3), broken(2)}, want: 3},
		{name: "a circle", heads: []*foundHead{head(1, 7, 100, 2, 5), head(2, 5, 50, 1, 7)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &foundHeads{heads: c.heads}
			taken, err := f.choose(c.from)
			if err != nil {
				if c.want != 0 {
					t.Fatal(err)
				}
				return
			}
			if taken.slot != c.want {
				t.Fatalf("took %d, want %d", taken.slot, c.want)
			}
			var left strings.Builder
			for _, l := range f.left(taken) {
				fmt.Fprintf(&left, "%d ", l.Device)
				if l.Since != nil {
					fmt.Fprintf(&left, "since %d/%d ", l.Since.Device, l.Since.Sequence)
				}
				if l.Problem != "" {
					left.WriteString("! ")
				}
			}
			if left.String() != c.left {
				t.Fatalf("left %q, want %q", left.String(), c.left)
			}
		})
	}
}
