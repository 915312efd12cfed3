package volume

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/defs-fs/defs/cache/faultfs"
	"github.com/defs-fs/defs/internal/reference"
	"github.com/defs-fs/defs/metastore/crashfs"
)

// fault makes calls to the disks fail with EIO: of one kind, from the at-th on.
type fault struct {
	op    crashfs.Op
	at    int64
	stays bool // else one call fails
	seen  atomic.Int64
}

func (f *fault) String() string {
	if f.stays {
		return fmt.Sprintf("each %s from number %d on fails", f.op, f.at)
	}
	return fmt.Sprintf("%s number %d fails", f.op, f.at)
}

func (f *fault) hit() bool { return f.seen.Load() >= f.at }

func (f *fault) call(op crashfs.Op) error {
	if op != f.op {
		return nil
	}
	if n := f.seen.Add(1); n == f.at || f.stays && n > f.at {
		return syscall.EIO
	}
	return nil
}

func (f *fault) install(d crashDisks) {
	d.journal.OnCall(func(_ int, op, _ string) error {
		switch op {
		case "write", "allocate", "truncate":
			return f.call(crashfs.Write)
		case "sync":
			return f.call(crashfs.Sync)
		}
		return f.call(crashfs.Names)
	})
	d.journal.OnRead(func(string) error { return f.call(crashfs.Read) })
	d.meta.OnCall(f.call)
}

func (d crashDisks) heal() {
	d.journal.OnCall(nil)
	d.journal.OnRead(nil)
	d.meta.OnCall(func(crashfs.Op) error { return nil })
}

// killed copies the disks as the death of the process leaves them.
func (d crashDisks) killed(w *workload) crashDisks { return d.crash(100, w.rng, d.journal.KillClone) }

// powerless copies the disks as a power cut leaves them that loses whatever was not flushed.
func (d crashDisks) powerless() crashDisks {
	return d.crash(0, nil, func() *faultfs.FS { return d.journal.CrashClone(faultfs.KeepNone) })
}

// storageFailed tells an error of the disk from one that the operation has by POSIX.
func storageFailed(e syscall.Errno) bool { return e == syscall.EIO || e == syscall.EROFS }

// possible are the states that a volume may be in after calls that may have failed half way.
type possible []*reference.Tree

// after returns the states after a call that has returned errno.
func (p possible) after(c call, errno syscall.Errno) possible {
	var next possible
	for _, tree := range p {
		before, _ := tree.Clone()
		want := c.ref(tree)
		if storageFailed(errno) {
			next = append(next, before)
		}
		if want == errno || storageFailed(errno) && want == 0 {
			next = append(next, tree)
		}
	}
	return next
}

// holds compares a volume with the states. What cannot be read is no difference where reads may fail.
func (p possible) holds(v *Volume, readsFail bool) error {
	var differs []error
	for _, tree := range p {
		err := sameTree(v, RootIno, tree.Root, ".")
		var failure *Error
		if err == nil || readsFail && errors.As(err, &failure) && failure.Kind == IO {
			return nil
		}
		differs = append(differs, err)
	}
	return errors.Join(differs...)
}

// faultyWorkload runs the calls while the disk fails. It returns whether the fault was met.
func faultyWorkload(t testing.TB, seed uint64, calls []call, f *fault) bool {
	t.Helper()
	var names []string
	for _, c := range calls {
		names = append(names, c.name)
	}
	stuck := time.AfterFunc(time.Minute, func() { panic(fmt.Sprintf("%s: %v: stuck", strings.Join(names, "; "), f)) })
	defer stuck.Stop()
	if err := runFaulty(t, seed, calls, f); err != nil {
		t.Fatalf("%s: %v: %v", strings.Join(names, "; "), f, err)
	}
	return f.hit()
}

func runFaulty(t testing.TB, seed uint64, calls []call, f *fault) error {
	w, tree := start(t, seed)
	states := possible{tree}
	f.install(w.disks)
	for _, c := range calls {
		err := c.do(w)
		if states = states.after(c, Errno(err)); len(states) == 0 {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if err := states.holds(w.v, true); err != nil {
			return fmt.Errorf("after %s: %w", c.name, err)
		}
		if failed := w.v.failure(); failed != nil {
			if !errors.Is(failed, ReadOnly) || !errors.Is(failed, syscall.EIO) {
				return fmt.Errorf("the volume is read-only and does not say why: %w", failed)
			}
		}
		if c.sync && err == nil && f.hit() {
			if err := reopened(t, w, w.disks.powerless(), states); err != nil {
				return fmt.Errorf("after a power cut behind %s, which has succeeded: %w", c.name, err)
			}
		}
	}
	killed := w.disks.killed(w)
	closed := w.v.Close(ctx)
	if err := reopened(t, w, killed, states); err != nil {
		return fmt.Errorf("after the death of the process: %w", err)
	}
	if closed == nil {
		if err := reopened(t, w, w.disks.powerless(), states); err != nil {
			return fmt.Errorf("after closing, which has succeeded: %w", err)
		}
	}
	w.disks.heal()
	if err := reopened(t, w, w.disks.killed(w), states); err != nil {
		return fmt.Errorf("after closing: %w", err)
	}
	return nil
}

// reopened opens disks that do not fail any more: the volume is in one of the states, takes changes again, and what it
// flushes stays.
func reopened(t testing.TB, w *workload, d crashDisks, states possible) error {
	v, err := d.open()
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	v.reaper.wait()
	checkInvariants(t, v)
	if err := states.holds(v, false); err != nil {
		return errors.Join(err, v.Close(ctx))
	}
	if err := v.Fsync(ctx, RootIno); err != nil {
		return errors.Join(err, v.Close(ctx))
	}
	after := d.powerless()
	if err := v.Close(ctx); err != nil {
		return err
	}
	if v, err = after.open(); err != nil {
		return fmt.Errorf("open after a flush and a power cut: %w", err)
	}
	if err := states.holds(v, false); err != nil {
		return fmt.Errorf("after a flush and a power cut: %w", errors.Join(err, v.Close(ctx)))
	}
	return v.Close(ctx)
}

// faultyCalls are the calls that follow the one under test: they flush, write and flush again.
func faultyCalls(first call) []call {
	flush := call{name: "flush of the metastore", do: func(w *workload) error {
		short, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		return wrap("flush", 0, w.v.db.Flush(short))
	}, ref: func(*reference.Tree) syscall.Errno { return 0 }}
	return []call{first, fsync("."), write("d/c", 0, 700), flush, fsync("d/c"), makeNode("z", syscall.S_IFREG), fsync(".")}
}

// TestIOErrors lets the N-th call to the disk fail, for every N and each kind of call, once and from then on, in the
// workloads of the crash points, each followed by flushes. There are never wrong bytes nor a flush that is a lie; what
// was acknowledged is there when the disk works again. DEFS_IO_ERRORS=all runs all of them.
func TestIOErrors(t *testing.T) {
	calls := crashCalls()
	all := os.Getenv("DEFS_IO_ERRORS") == "all"
	var runs, hits atomic.Int64
	mine := shard(t)
	t.Run("first call", func(t *testing.T) {
		for i, first := range calls {
			if !mine(i) || !all && i%15 != 7 {
				continue
			}
			t.Run(first.name, func(t *testing.T) {
				t.Parallel()
				for _, op := range []crashfs.Op{crashfs.Write, crashfs.Sync, crashfs.Names, crashfs.Read} {
					for _, stays := range []bool{false, true} {
						for n := int64(1); ; n++ {
							if !all && n > 2 && n%4 != 0 {
								continue
							}
							runs.Add(1)
							if !faultyWorkload(t, uint64(i), faultyCalls(first), &fault{op: op, at: n, stays: stays}) {
								break
							}
							hits.Add(1)
						}
					}
				}
			})
		}
	})
	t.Logf("%d runs, %d of them met their fault", runs.Load(), hits.Load())
	if hits.Load() < 10 {
		t.Error("too few faults: does the volume use these disks?")
	}
}

// TestIOErrorsAtOpen lets the N-th call fail while a volume is opened after the death of its process, and read: it
// opens, or says that it cannot, and opens when the disk works again.
func TestIOErrorsAtOpen(t *testing.T) {
	w, tree := start(t, 7)
	if _, err := w.run(faultyCalls(write("a", 10, 2000))[:6], tree); err != nil {
		t.Fatal(err)
	}
	states := possible{tree}
	disks := w.disks.killed(w)
	if err := w.v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	all := os.Getenv("DEFS_IO_ERRORS") == "all"
	var runs, refused atomic.Int64
	t.Run("fault", func(t *testing.T) {
		for _, op := range []crashfs.Op{crashfs.Write, crashfs.Sync, crashfs.Names, crashfs.Read} {
			for _, stays := range []bool{false, true} {
				t.Run(fmt.Sprint(op, stays), func(t *testing.T) {
					t.Parallel()
					for n := int64(1); ; n++ {
						if !all && n > 2 && n%8 != 0 {
							continue
						}
						runs.Add(1)
						f := &fault{op: op, at: n, stays: stays}
						opens, err := openFaulty(t, disks.killed(&workload{rng: rand.New(rand.NewPCG(uint64(n), 1))}), states, f)
						if err != nil {
							t.Fatalf("%v: %v", f, err)
						}
						if !opens {
							refused.Add(1)
						}
						if !f.hit() {
							break
						}
					}
				})
			}
		}
	})
	t.Logf("%d runs, %d refused to open", runs.Load(), refused.Load())
	if refused.Load() == 0 || refused.Load() == runs.Load() {
		t.Error("all or none refused to open")
	}
}

// openFaulty opens disks that fail, and then that they do not. It returns whether they have opened at first.
func openFaulty(t testing.TB, d crashDisks, states possible, f *fault) (opens bool, err error) {
	w := &workload{rng: rand.New(rand.NewPCG(uint64(f.at), 2))}
	f.install(d)
	v, err := d.open()
	if err != nil && !errors.Is(err, syscall.EIO) {
		return false, err
	}
	if opens = err == nil; opens {
		if err := states.holds(v, true); err != nil {
			return true, err
		}
		if err := v.Fsync(ctx, RootIno); err == nil {
			if err := reopened(t, w, d.powerless(), states); err != nil {
				return true, fmt.Errorf("after a flush and a power cut: %w", err)
			}
		}
		_ = v.Close(ctx) // may fail, as the disk does
	}
	d.heal()
	if err := reopened(t, w, d.killed(w), states); err != nil {
		return opens, fmt.Errorf("after the disk works again: %w", err)
	}
	return opens, nil
}

// states are compared by what differs between them.
func TestPossible(t *testing.T) {
	tree := reference.New()
	p := possible{tree}
	p = p.after(makeNode("a", syscall.S_IFREG), syscall.EIO)
	if len(p) != 2 {
		t.Fatalf("%d states after a call that failed half way", len(p))
	}
	p = p.after(makeNode("a", syscall.S_IFREG), syscall.EEXIST)
	if len(p) != 1 || !slices.Contains([]int{1}, len(p[0].Root.Names)) {
		t.Fatalf("%d states after the name was found taken", len(p))
	}
}
