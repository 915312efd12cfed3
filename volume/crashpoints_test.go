package volume

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/defs-fs/defs/cache/faultfs"
	"github.com/defs-fs/defs/internal/reference"
	"github.com/defs-fs/defs/metastore/crashfs"
)

// crashDisks hold the local state of a volume and show what a crash leaves of it.
type crashDisks struct {
	journal *faultfs.FS
	meta    *crashfs.Disk
}

func (d crashDisks) open() (*Volume, error) {
	return Open(ctx, Options{
		Dir: "/volume", Key: testKey, Clock: newTestClock().Now, SegmentBytes: 64 << 10,
		disk: disk{journal: d.journal, openMetastore: d.meta.Open},
	})
}

// crash copies the disks. The metastore's comes first: one that is older than the journal is what a crash may
// leave, one that is newer is not.
func (d crashDisks) crash(percent int, rng *rand.Rand, journal func() *faultfs.FS) crashDisks {
	meta := d.meta.CrashClone(percent, rng)
	return crashDisks{journal(), meta}
}

// call is one operation of a workload, on a volume and on the reference.
type call struct {
	name string
	sync bool // flushes everything before it
	do   func(w *workload) error
	ref  func(t *reference.Tree) syscall.Errno
}

// workload is a volume at work on a few calls.
type workload struct {
	v     *Volume
	disks crashDisks
	rng   *rand.Rand

	mu       sync.Mutex // guards what follows
	watching bool
	closing  bool
	started  int // calls
	returned int
	synced   int // calls that a flush has covered
	crashes  []crash
}

// crash is what a crash has left, and how many calls that may and must hold.
type crash struct {
	disks    crashDisks
	how      string
	min, max int
}

// crashed notes every kind of crash at this moment.
func (w *workload) crashed() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.watching {
		return
	}
	note := func(how string, min int, disks crashDisks) {
		w.crashes = append(w.crashes, crash{disks, fmt.Sprintf("%s, copy %d", how, len(w.crashes)), min, w.started})
	}
	half := faultfs.KeepRandom(w.rng)
	note("some kept", w.synced, w.disks.crash(50, w.rng, func() *faultfs.FS { return w.disks.journal.CrashClone(half) }))
	if w.closing && len(w.crashes)%4 != 0 {
		return // the metastore makes many calls when it ends
	}
	note("nothing kept", w.synced, w.disks.crash(0, nil, func() *faultfs.FS { return w.disks.journal.CrashClone(faultfs.KeepNone) }))
	note("all kept", w.synced, w.disks.crash(100, w.rng, func() *faultfs.FS { return w.disks.journal.CrashClone(faultfs.KeepAll) }))
	note("process killed", w.returned, w.disks.crash(100, w.rng, w.disks.journal.KillClone))
}

// run runs the calls and returns the states of the reference before and after each.
func (w *workload) run(calls []call, tree *reference.Tree) (states []*reference.Tree, err error) {
	keep := func() {
		c, _ := tree.Clone()
		states = append(states, c)
	}
	keep()
	for i, c := range calls {
		w.mu.Lock()
		w.started = i + 1
		w.mu.Unlock()
		got, want := Errno(c.do(w)), c.ref(tree)
		if got != want {
			return nil, fmt.Errorf("%s: %v, want %v", c.name, got, want)
		}
		keep()
		w.mu.Lock()
		w.returned = i + 1
		if c.sync && got == 0 {
			w.synced = i + 1
		}
		w.mu.Unlock()
	}
	return states, nil
}

func (w *workload) ino(p string) (Ino, error) {
	at := RootIno
	for name := range strings.SplitSeq(strings.TrimPrefix(p, "."), "/") {
		if name == "" {
			continue
		}
		a, err := w.v.Lookup(ctx, at, name)
		if err != nil {
			return 0, err
		}
		at = a.Ino
	}
	return at, nil
}

func refAt(t *reference.Tree, p string) *reference.Node {
	n := t.Root
	for name := range strings.SplitSeq(strings.TrimPrefix(p, "."), "/") {
		if name != "" && n != nil {
			n = n.Names[name]
		}
	}
	return n
}

// onFile makes a call on the file or directory at p.
func onFile(name, p string, do func(v *Volume, ino Ino) error, ref func(t *reference.Tree, n *reference.Node)) call {
	return call{
		name: name + " " + p,
		do: func(w *workload) error {
			ino, err := w.ino(p)
			if err != nil {
				return err
			}
			return do(w.v, ino)
		},
		ref: func(t *reference.Tree) syscall.Errno {
			n := refAt(t, p)
			if n == nil {
				return syscall.ENOENT
			}
			ref(t, n)
			return 0
		},
	}
}

// onNames makes a call on one or two names whose directories exist.
func onNames(name, p, q string, do func(v *Volume, dir Ino, name string, dir2 Ino, name2 string) error,
	ref func(t *reference.Tree, dir *reference.Node, name string, dir2 *reference.Node, name2 string) syscall.Errno) call {
	return call{
		name: strings.TrimSpace(name + " " + p + " " + q),
		do: func(w *workload) error {
			dir, err := w.ino(path.Dir(p))
			if err != nil {
				return err
			}
			dir2, err := w.ino(path.Dir(q))
			if err != nil {
				return err
			}
			return do(w.v, dir, path.Base(p), dir2, path.Base(q))
		},
		ref: func(t *reference.Tree) syscall.Errno {
			dir, dir2 := refAt(t, path.Dir(p)), refAt(t, path.Dir(q))
			if dir == nil || dir2 == nil {
				return syscall.ENOENT
			}
			return ref(t, dir, path.Base(p), dir2, path.Base(q))
		},
	}
}

func makeNode(p string, mode uint32) call {
	mode |= 0o700
	target := ""
	if isSymlink(mode) {
		mode, target = syscall.S_IFLNK|0o777, "target"
	}
	return onNames("make "+direntName(mode), p, "", func(v *Volume, dir Ino, name string, _ Ino, _ string) error {
		_, err := v.Create(ctx, dir, name, Create{Mode: mode, Target: target, Excl: true})
		return err
	}, func(t *reference.Tree, dir *reference.Node, name string, _ *reference.Node, _ string) syscall.Errno {
		n, errno := t.Create(dir, name, mode)
		if errno == 0 {
			n.Target = target
		}
		return errno
	})
}

func direntName(mode uint32) string {
	return map[uint32]string{syscall.S_IFREG: "file", syscall.S_IFDIR: "directory", syscall.S_IFLNK: "link"}[mode&syscall.S_IFMT]
}

func write(p string, off, n int) call {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(off), byte(n)}).Read(data)
	return onFile(fmt.Sprintf("write %d at %d", n, off), p, func(v *Volume, ino Ino) error {
		_, err := v.Write(ctx, ino, int64(max(off, 0)), data, WriteFlags{Append: off < 0})
		return err
	}, func(t *reference.Tree, f *reference.Node) {
		at := off
		if at < 0 {
			at = len(f.Data)
		}
		t.Write(f, at, data)
	})
}

func truncate(p string, size int) call {
	return onFile(fmt.Sprint("truncate to ", size), p, func(v *Volume, ino Ino) error {
		_, err := v.SetAttr(ctx, ino, SetAttr{Valid: SetSize, Size: uint64(size)})
		return err
	}, func(t *reference.Tree, n *reference.Node) { t.Truncate(n, size) })
}

func rename(p, q string, flags RenameFlags) call {
	return onNames(fmt.Sprint("rename ", flags), p, q, func(v *Volume, dir Ino, name string, dir2 Ino, name2 string) error {
		return v.Rename(ctx, dir, name, dir2, name2, flags)
	}, func(t *reference.Tree, dir *reference.Node, name string, dir2 *reference.Node, name2 string) syscall.Errno {
		return t.Rename(dir, name, dir2, name2, int(flags))
	})
}

func link(p, q string) call {
	return onNames("link", p, q, func(v *Volume, dir Ino, name string, dir2 Ino, name2 string) error {
		a, err := v.Lookup(ctx, dir, name)
		if err == nil {
			_, err = v.Link(ctx, a.Ino, dir2, name2)
		}
		return err
	}, func(t *reference.Tree, dir *reference.Node, name string, dir2 *reference.Node, name2 string) syscall.Errno {
		n := dir.Names[name]
		if n == nil {
			return syscall.ENOENT
		}
		return t.Link(n, dir2, name2)
	})
}

func unlink(p string) call {
	return onNames("unlink", p, "", func(v *Volume, dir Ino, name string, _ Ino, _ string) error {
		return v.Unlink(ctx, dir, name)
	}, func(t *reference.Tree, dir *reference.Node, name string, _ *reference.Node, _ string) syscall.Errno {
		return t.Unlink(dir, name)
	})
}

func rmdir(p string) call {
	return onNames("rmdir", p, "", func(v *Volume, dir Ino, name string, _ Ino, _ string) error {
		return v.Rmdir(ctx, dir, name)
	}, func(t *reference.Tree, dir *reference.Node, name string, _ *reference.Node, _ string) syscall.Errno {
		return t.Rmdir(dir, name)
	})
}

// fsync stands for fdatasync too, and for the fsync of a directory: the volume knows one call.
func fsync(p string) call {
	c := onFile("fsync", p, func(v *Volume, ino Ino) error { return v.Fsync(ctx, ino) }, func(*reference.Tree, *reference.Node) {})
	c.sync = true
	return c
}

// crashCalls are what workloads are made of. They start with files a, b and d/c, a directory e that is empty, and
// "a" also called d/a.
func crashCalls() []call {
	return []call{
		makeNode("n", syscall.S_IFREG), makeNode("d/n", syscall.S_IFREG), makeNode("m", syscall.S_IFDIR), makeNode("d/m", syscall.S_IFDIR), makeNode("l", syscall.S_IFLNK),
		write("a", 10, 2000), write("a", 2900, 500), write("b", 0, 20_000), write("n", 0, 100), write("a", -1, 300), write("d/c", -1, 5000),
		truncate("a", 1000), truncate("a", 5000), truncate("b", 0), truncate("n", 10),
		rename("a", "b", 0), rename("a", "n", 0), rename("b", "d/n", 0), rename("d/c", "a", 0), rename("e", "d/m", 0), rename("d", "e", 0),
		rename("a", "d/c", RenameExchange), rename("d", "e", RenameExchange), rename("b", "d/a", RenameNoReplace), rename("n", "a", 0),
		link("a", "n"), link("b", "d/n"), link("n", "m"),
		unlink("a"), unlink("b"), unlink("d/c"), unlink("n"), unlink("l"), rmdir("e"), rmdir("m"),
		fsync("a"), fsync("b"), fsync("d"), fsync("."), fsync("n"),
		onFile("punch", "a", func(v *Volume, ino Ino) error {
			return v.Fallocate(ctx, ino, FallocPunchHole|FallocKeepSize, 100, 1000, WriteFlags{})
		}, func(t *reference.Tree, n *reference.Node) {
			t.Fallocate(n, reference.PunchHole|reference.KeepSize, 100, 1000)
		}),
		onFile("chmod", "a", func(v *Volume, ino Ino) error {
			_, err := v.SetAttr(ctx, ino, SetAttr{Valid: SetMode, Mode: 0o640})
			return err
		}, func(t *reference.Tree, n *reference.Node) { t.Chmod(n, 0o640) }),
		onFile("set attribute", "b", func(v *Volume, ino Ino) error {
			return v.SetXattr(ctx, ino, "user.x", []byte("value"), 0)
		}, func(t *reference.Tree, n *reference.Node) { t.SetXattr(n, "user.x", "value", 0) }),
		{name: "copy a to b",
			do: func(w *workload) error {
				a, errA := w.ino("a")
				b, errB := w.ino("b")
				if err := cmp.Or(errA, errB); err != nil {
					return err
				}
				_, err := w.v.CopyRange(ctx, a, 5, b, 3000, 1500, WriteFlags{})
				return err
			},
			ref: func(t *reference.Tree) syscall.Errno {
				a, b := refAt(t, "a"), refAt(t, "b")
				if a == nil || b == nil {
					return syscall.ENOENT
				}
				_, errno := t.Copy(a, 5, b, 3000, 1500)
				return errno
			}},
		{name: "flush of the metastore", do: func(w *workload) error { return w.v.db.Flush(ctx) }, ref: func(*reference.Tree) syscall.Errno { return 0 }},
	}
}

// start makes a volume with the files that crashCalls start with, all flushed.
func start(t testing.TB, seed uint64) (*workload, *reference.Tree) {
	t.Helper()
	w := &workload{rng: rand.New(rand.NewPCG(seed, 5))}
	w.disks = crashDisks{faultfs.New(), crashfs.New()}
	w.disks.journal.OnCall(func(int, string, string) error { w.crashed(); return nil })
	w.disks.meta.OnCall(func(op crashfs.Op) error {
		if op != crashfs.Read {
			w.crashed()
		}
		return nil
	})
	var err error
	if w.v, err = w.disks.open(); err != nil {
		t.Fatal(err)
	}
	tree := reference.New()
	if _, err := w.run([]call{
		makeNode("a", syscall.S_IFREG), makeNode("b", syscall.S_IFREG), makeNode("d", syscall.S_IFDIR), makeNode("d/c", syscall.S_IFREG), makeNode("e", syscall.S_IFDIR),
		write("a", 0, 3000), write("b", 0, 100), write("d/c", 0, 10), link("a", "d/a"), fsync("."),
	}, tree); err != nil {
		t.Fatal(err)
	}
	w.started, w.returned, w.synced = 0, 0, 0
	return w, tree
}

// crashWorkload runs the calls and checks what a crash at each call of the file system leaves. It returns how many
// crashes there were.
func crashWorkload(t testing.TB, seed uint64, calls []call) int {
	t.Helper()
	names := make([]string, len(calls))
	for i, c := range calls {
		names[i] = c.name
	}
	fail := func(err error) {
		t.Helper()
		t.Fatalf("%s: %v", strings.Join(names, "; "), err)
	}
	w, tree := start(t, seed)
	w.mu.Lock()
	w.watching = true
	w.mu.Unlock()
	states, err := w.run(calls, tree)
	if err != nil {
		fail(err)
	}
	w.crashed()
	w.mu.Lock()
	w.closing = true
	w.mu.Unlock()
	if err := w.v.Close(ctx); err != nil {
		fail(err)
	}
	w.mu.Lock()
	w.synced, w.closing = len(calls), false // Close flushes
	w.mu.Unlock()
	w.crashed()
	for i, c := range w.crashes {
		if err := checkCrash(t, c, states, i%7 == 0); err != nil {
			fail(fmt.Errorf("%s (%d to %d calls): %w", c.how, c.min, c.max, err))
		}
	}
	return len(w.crashes)
}

// checkCrash opens what a crash has left: it holds some of the calls, in order, and with more the volume goes on.
func checkCrash(t testing.TB, c crash, states []*reference.Tree, more bool) error {
	v, err := c.disks.open()
	if err != nil {
		return err
	}
	v.reaper.wait()
	checkInvariants(t, v)
	var differs []error
	for _, tree := range states[c.min : c.max+1] {
		err := sameTree(v, RootIno, tree.Root, ".")
		if err == nil {
			differs = nil
			break
		}
		differs = append(differs, err)
	}
	if err := cmp.Or(errors.Join(differs...), v.Close(ctx)); err != nil || !more {
		return err
	}
	again, err := c.disks.open()
	if err != nil {
		return fmt.Errorf("second open: %w", err)
	}
	w := &workload{v: again}
	if _, err := w.run([]call{makeNode("more", syscall.S_IFREG), write("more", 0, 1000), fsync("more")}, reference.New()); err != nil {
		return err
	}
	after := c.disks.crash(0, nil, func() *faultfs.FS { return c.disks.journal.CrashClone(faultfs.KeepNone) })
	if err := again.Close(ctx); err != nil {
		return err
	}
	if again, err = after.open(); err != nil {
		return fmt.Errorf("third open: %w", err)
	}
	a, err := again.Lookup(ctx, RootIno, "more")
	if err == nil && a.Size != 1000 {
		err = fmt.Errorf("%d bytes, 1000 were flushed", a.Size)
	}
	return cmp.Or(err, again.Close(ctx))
}

// sameTree compares a volume's tree with the reference's.
func sameTree(v *Volume, ino Ino, n *reference.Node, p string) error {
	a, err := v.GetAttr(ctx, ino)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	if a.Mode != n.Mode || int(a.Nlink) != n.Nlink() || !n.IsDir() && int(a.Size) != len(n.Data)+len(n.Target) {
		return fmt.Errorf("%s: mode %o, %d links, %d bytes; want %o, %d, %d", p, a.Mode, a.Nlink, a.Size, n.Mode, n.Nlink(), len(n.Data))
	}
	switch {
	case n.IsRegular():
		got := make([]byte, len(n.Data))
		if _, err := v.Read(ctx, ino, 0, got); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if !slices.Equal(got, n.Data) {
			return fmt.Errorf("%s: other bytes", p)
		}
	case isSymlink(n.Mode):
		if target, err := v.Readlink(ctx, ino); err != nil || target != n.Target {
			return fmt.Errorf("%s: target %q, %w", p, target, err)
		}
	}
	attributes, err := v.ListXattr(ctx, ino)
	if err != nil || !slices.Equal(attributes, slices.Sorted(maps.Keys(n.Xattrs))) {
		return fmt.Errorf("%s: attributes %q, %w", p, attributes, err)
	}
	if !n.IsDir() {
		return nil
	}
	found := make(map[string]Ino)
	if err := v.ReadDir(ctx, ino, 0, func(d Dirent) bool { found[d.Name] = d.Ino; return true }); err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	if names := slices.Sorted(maps.Keys(found)); !slices.Equal(names, slices.Sorted(maps.Keys(n.Names))) {
		return fmt.Errorf("%s holds %q, want %q", p, names, slices.Sorted(maps.Keys(n.Names)))
	}
	for name, child := range n.Names {
		if err := sameTree(v, found[name], child, path.Join(p, name)); err != nil {
			return err
		}
	}
	return nil
}

// shard reads "2/5", the second of five parts of a long form, from the environment: whether row i of a table is in
// it. Without the variable every row is.
func shard(t *testing.T) func(i int) bool {
	text := os.Getenv("DEFS_SHARD")
	if text == "" {
		return func(int) bool { return true }
	}
	var part, of int
	if n, err := fmt.Sscanf(text, "%d/%d", &part, &of); n != 2 || err != nil || part < 1 || part > of {
		t.Fatalf("DEFS_SHARD=%q is not like 2/5", text)
	}
	return func(i int) bool { return i%of == part-1 }
}

// TestCrashPoints runs every workload of one call, with DEFS_CRASH_POINTS=2 also every one of two, and crashes at
// each call that the volume makes to its disk: what is found then is what some of the calls, in order, have made, and
// holds all that was flushed.
func TestCrashPoints(t *testing.T) {
	calls := crashCalls()
	var workloads, crashes atomic.Int64
	mine := shard(t)
	t.Run("first call", func(t *testing.T) {
		for i, first := range calls {
			if !mine(i) {
				continue
			}
			t.Run(first.name, func(t *testing.T) {
				t.Parallel()
				run := func(seed int, list ...call) {
					crashes.Add(int64(crashWorkload(t, uint64(seed), list)))
					workloads.Add(1)
				}
				run(i, first)
				if os.Getenv("DEFS_CRASH_POINTS") != "2" {
					return
				}
				for j, second := range calls {
					run(i*len(calls)+j, first, second)
				}
			})
		}
	})
	t.Logf("%d workloads, %d crashes", workloads.Load(), crashes.Load())
	if crashes.Load() < 20*workloads.Load() {
		t.Error("too few crashes: does the volume use these disks?")
	}
}
