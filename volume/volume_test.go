package volume

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/defs-fs/defs/metastore"
)

var testKey = [32]byte{1, 2, 3}

// testClock advances by a microsecond at each reading, so that every change has a time of its own.
type testClock struct{ ns atomic.Int64 }

func (c *testClock) Now() time.Time { return time.Unix(0, c.ns.Add(1000)) }

func newTestClock() *testClock {
	c := new(testClock)
	c.ns.Store(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())
	return c
}

func openAt(t testing.TB, dir string, clock *testClock) *Volume {
	t.Helper()
	v, err := Open(context.Background(), Options{Dir: dir, Key: testKey, Clock: clock.Now, SegmentBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// open returns a new volume that is closed with the test.
func open(t testing.TB) *Volume {
	t.Helper()
	v := openAt(t, t.TempDir(), newTestClock())
	t.Cleanup(func() {
		if err := v.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return v
}

// copyState copies a volume's files as they are at this moment: what a process that is killed now leaves.
func copyState(t testing.TB, from, to string) {
	t.Helper()
	if err := filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o600)
	}); err != nil {
		t.Fatal(err)
	}
}

// fs calls a volume for tests that expect success.
type fs struct {
	testing.TB
	*Volume
	ctx context.Context
}

func newFS(t testing.TB) fs { return fs{t, open(t), context.Background()} }

func (f fs) ok(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f fs) want(err error, kind Kind) {
	f.Helper()
	if !errors.Is(err, kind) {
		f.Fatalf("error is %v, want %v", err, kind)
	}
	var e *Error
	if !errors.As(err, &e) || e.Op == "" {
		f.Fatalf("error %v carries no operation", err)
	}
}

func (f fs) create(dir Ino, name string, mode uint32) Ino {
	f.Helper()
	a, err := f.Create(f.ctx, dir, name, Create{Mode: mode, Target: map[bool]string{true: "target"}[isSymlink(mode)]})
	f.ok(err)
	return a.Ino
}

func (f fs) file(dir Ino, name string) Ino {
	f.Helper()
	return f.create(dir, name, syscall.S_IFREG|0o644)
}

func (f fs) mkdir(dir Ino, name string) Ino {
	f.Helper()
	return f.create(dir, name, syscall.S_IFDIR|0o755)
}

func (f fs) write(ino Ino, off int64, data string) {
	f.Helper()
	n, err := f.Write(f.ctx, ino, off, []byte(data), WriteFlags{})
	f.ok(err)
	if n != len(data) {
		f.Fatalf("wrote %d of %d bytes", n, len(data))
	}
}

func (f fs) read(ino Ino, off int64, n int) string {
	f.Helper()
	b := make([]byte, n)
	for i := range b {
		b[i] = 0xee // what a read must overwrite
	}
	n, err := f.Read(f.ctx, ino, off, b)
	f.ok(err)
	return string(b[:n])
}

func (f fs) attr(ino Ino) Attr {
	f.Helper()
	a, err := f.GetAttr(f.ctx, ino)
	f.ok(err)
	return a
}

func (f fs) lookup(dir Ino, name string) Ino {
	f.Helper()
	a, err := f.Lookup(f.ctx, dir, name)
	f.ok(err)
	return a.Ino
}

func (f fs) names(dir Ino) (names []string) {
	f.Helper()
	f.ok(f.ReadDir(f.ctx, dir, 0, func(d Dirent) bool {
		names = append(names, d.Name)
		return true
	}))
	return names
}

func TestErrnoTable(t *testing.T) {
	for k := range kinds {
		k := Kind(k)
		if kinds[k].errno == 0 || kinds[k].text == "" {
			t.Errorf("kind %d has no errno or text", k)
		}
		err := wrap("op", 7, k)
		if Errno(err) != kinds[k].errno || !errors.Is(err, k) {
			t.Errorf("%v maps to %v", err, Errno(err))
		}
	}
	if Errno(nil) != 0 || Errno(errors.New("x")) != syscall.EIO || wrap("op", 0, nil) != nil {
		t.Error("nil or foreign error mapped wrongly")
	}
	if got := Errno(wrap("op", 0, context.Canceled)); got != syscall.EINTR {
		t.Errorf("cancelled maps to %v", got)
	}
}

func TestOptionsNameEveryViolation(t *testing.T) {
	o := Options{Device: 1 << 15, CleanMaxBytes: -1, Fsync: FsyncJournal}
	err := o.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) || len(joined.Unwrap()) != 3 {
		t.Errorf("want three violations: %v", err)
	}
}

func TestWrongKeyIsRefused(t *testing.T) {
	dir := t.TempDir()
	v := openAt(t, dir, newTestClock())
	if err := v.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(context.Background(), Options{Dir: dir, Key: [32]byte{9}}); err == nil {
		t.Fatal("opened with another key")
	}
}

func TestNumbersStayUniqueAcrossKills(t *testing.T) {
	dir, clock := t.TempDir(), newTestClock()
	seen := map[Ino]bool{}
	for round := range 3 {
		f := fs{t, openAt(t, dir, clock), context.Background()}
		for i := range 5 {
			// A mutation that fails after it took a number must not spoil the reservation.
			_, err := f.commit(func(t *tx) error { t.newID(); return Invalid })
			f.want(wrap("x", 0, err), Invalid)
			ino := f.file(RootIno, string(rune('a'+round*5+i)))
			if seen[ino] {
				t.Fatalf("number %d was given twice", ino)
			}
			seen[ino] = true
		}
		next := t.TempDir()
		copyState(t, dir, next)
		f.ok(f.Close(f.ctx))
		dir = next
	}
}

func TestBeginCutSeesOneMoment(t *testing.T) {
	f := newFS(t)
	a := f.file(RootIno, "a")
	snapshot, seq, gen, err := f.beginCut()
	f.ok(err)
	defer snapshot.Close()
	f.file(RootIno, "b")
	f.write(a, 0, "later")
	if n, err := snapshot.Inode(a); err != nil || n.Size != 0 {
		t.Errorf("snapshot shows size %d, %v", n.Size, err)
	}
	if snapshot.Applied() != seq {
		t.Errorf("snapshot at %d, cut at %d", snapshot.Applied(), seq)
	}
	touched := 0
	f.ok(snapshot.Touched(gen, func([]byte, uint64) bool { touched++; return true }))
	if touched == 0 {
		t.Error("the ended generation lists no key")
	}
	later, _, gen2, err := f.beginCut()
	f.ok(err)
	f.ok(later.Close())
	if gen2 != gen+1 {
		t.Errorf("generation %d follows %d", gen2, gen)
	}
}

// TestUsageFormat decodes the example of FORMAT.md, "Tree values of the volume".
func TestUsageFormat(t *testing.T) {
	const example = "0000000000001000" + "0000000000000002"
	if got := hex.EncodeToString(usage{bytes: 4096, inodes: 2}.marshal()); got != example {
		t.Errorf("%s, want %s", got, example)
	}
	f := newFS(t)
	f.ok(wrap("set", 0, func() error {
		_, err := f.commit(func(t *tx) error { t.PutMeta(usageName, []byte("short")); return nil })
		return err
	}()))
	if _, err := readUsage(f.db); !errors.Is(err, metastore.ErrCorrupt) {
		t.Errorf("a short value: %v", err)
	}
}
