package volume

import (
	"bytes"
	"context"
	"errors"
	"math"
	"strings"
	"syscall"
	"testing"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
)

func TestReadWrite(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.write(ino, 5, "hello")
	for _, c := range []struct {
		off  int64
		n    int
		want string
	}{
		{0, 100, "\x00\x00\x00\x00\x00hello"},
		{0, 6, "\x00\x00\x00\x00\x00h"},
		{9, 1, "o"},
		{10, 10, ""},
		{math.MaxInt64, 10, ""},
	} {
		if got := f.read(ino, c.off, c.n); got != c.want {
			t.Errorf("read %d+%d: %q", c.off, c.n, got)
		}
	}
	n, err := f.Write(f.ctx, ino, 0, []byte("!"), WriteFlags{Append: true})
	f.ok(err)
	if n != 1 || f.read(ino, 10, 9) != "!" {
		t.Error("append")
	}
	_, err = f.Read(f.ctx, ino, -1, make([]byte, 1))
	f.want(err, Invalid)
	_, err = f.Write(f.ctx, ino, -1, []byte("x"), WriteFlags{})
	f.want(err, Invalid)
	_, err = f.Write(f.ctx, RootIno, 0, []byte("x"), WriteFlags{})
	f.want(err, IsDir)
	_, err = f.Read(f.ctx, RootIno, 0, make([]byte, 1))
	f.want(err, IsDir)
	_, err = f.Write(f.ctx, 999, 0, []byte("x"), WriteFlags{})
	f.want(err, Stale)
	if a := f.attr(ino); a.Size != 11 || a.Blocks != 1 {
		t.Errorf("size %d blocks %d", a.Size, a.Blocks)
	}
}

func TestLongWrite(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	data := bytes.Repeat([]byte("0123456789abcdef"), (3<<20)/16)
	n, err := f.Write(f.ctx, ino, 3, data, WriteFlags{})
	f.ok(err)
	if n != len(data) || f.read(ino, 3, len(data)+1) != string(data) {
		t.Error("3 MiB came back different")
	}
}

func TestLargestFile(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.write(ino, math.MaxInt64-1, "x") // its last byte is at 8 EiB - 2
	if a := f.attr(ino); a.Size != math.MaxInt64 || a.Blocks != 1 {
		t.Errorf("size %d blocks %d", a.Size, a.Blocks)
	}
	if got := f.read(ino, math.MaxInt64-2, 10); got != "\x00x" {
		t.Errorf("read %q", got)
	}
	_, err := f.Write(f.ctx, ino, math.MaxInt64, []byte("x"), WriteFlags{})
	f.want(err, FileTooLarge)
	_, err = f.SetAttr(f.ctx, ino, SetAttr{Valid: SetSize, Size: math.MaxInt64 + 1})
	f.want(err, FileTooLarge)
	f.want(f.Fallocate(f.ctx, ino, 0, math.MaxInt64, 1, WriteFlags{}), FileTooLarge)
	at, err := f.Seek(f.ctx, ino, 0, SeekData)
	f.ok(err)
	if at != math.MaxInt64-1 {
		t.Errorf("data at %d", at)
	}
	f.truncate(ino, 0)
	f.truncate(ino, math.MaxInt64)
	if f.read(ino, math.MaxInt64-2, 10) != "\x00\x00" {
		t.Error("cut bytes came back")
	}
	checkInvariants(t, f.Volume)
}

func TestTruncateZeroes(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.write(ino, 0, "0123456789")
	f.truncate(ino, 4)
	f.truncate(ino, 8)
	if got := f.read(ino, 0, 20); got != "0123\x00\x00\x00\x00" {
		t.Errorf("%q", got)
	}
	_, err := f.SetAttr(f.ctx, RootIno, SetAttr{Valid: SetSize})
	f.want(err, IsDir)
	_, err = f.SetAttr(f.ctx, f.create(RootIno, "fifo", syscall.S_IFIFO), SetAttr{Valid: SetSize})
	f.want(err, Invalid)
}

func TestTruncateManyExtents(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	const count = 2*extentsPerRecord + 100
	for i := range int64(count) {
		f.write(ino, 2*i, "x")
	}
	dst := f.file(RootIno, "b")
	for off := int64(0); ; {
		n, err := f.CopyRange(f.ctx, ino, off, dst, off, math.MaxInt64/2, WriteFlags{})
		f.ok(err)
		if n == 0 {
			break
		}
		off += n
	}
	all := strings.Repeat("x\x00", count)[:2*count-1]
	if f.read(dst, 0, 1<<20) != all {
		t.Error("copied content differs")
	}
	f.truncate(ino, 11)
	if got := f.read(ino, 0, 100); got != "x\x00x\x00x\x00x\x00x\x00x" {
		t.Errorf("%q", got)
	}
	f.ok(f.Fallocate(f.ctx, dst, FallocPunchHole|FallocKeepSize, 5, 1<<30, WriteFlags{}))
	if a := f.attr(dst); a.Size != uint64(len(all)) || f.read(dst, 0, 9) != "x\x00x\x00x\x00\x00\x00\x00"[:9] {
		t.Errorf("size %d, %q", a.Size, f.read(dst, 0, 9))
	}
	f.write(ino, 0, strings.Repeat("y", 100))
	checkInvariants(t, f.Volume)
	f.ok(f.Unlink(f.ctx, RootIno, "b"))
	f.reaper.wait()
	checkInvariants(t, f.Volume)
}

// TestRecordsAreBounded: no change makes a record over recordMaxBytes.
func TestRecordsAreBounded(t *testing.T) {
	f := newFS(t)
	_, err := f.commit(func(t *tx) error {
		for i := range uint64(recordMaxBytes / 16) {
			t.DeleteExtent(RootIno, metastore.Extent{Off: i, Len: 1})
		}
		return nil
	})
	if !errors.Is(err, errRecordTooLarge) {
		t.Errorf("a record of over %d bytes: %v", recordMaxBytes, err)
	}
}

func TestFallocate(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.write(ino, 0, "0123456789")
	for _, c := range []struct {
		name   string
		mode   uint32
		off, n int64
		size   uint64
		want   string
	}{
		{"within", 0, 0, 5, 10, "0123456789"},
		{"keep size", FallocKeepSize, 5, 100, 10, "0123456789"},
		{"punch", FallocPunchHole | FallocKeepSize, 2, 2, 10, "01\x00\x00456789"},
		{"punch past end", FallocPunchHole | FallocKeepSize, 8, 100, 10, "01\x00\x004567\x00\x00"},
		{"zero", FallocZeroRange, 4, 1, 10, "01\x00\x00\x00567\x00\x00"},
		{"zero and grow", FallocZeroRange, 7, 5, 12, "01\x00\x00\x0056\x00\x00\x00\x00\x00"},
		{"zero, keep size", FallocZeroRange | FallocKeepSize, 5, 100, 12, "01" + strings.Repeat("\x00", 10)},
		{"grow", 0, 0, 14, 14, "01" + strings.Repeat("\x00", 12)},
	} {
		f.ok(f.Fallocate(f.ctx, ino, c.mode, c.off, c.n, WriteFlags{}))
		if got := f.read(ino, 0, 100); got != c.want || f.attr(ino).Size != c.size {
			t.Errorf("%s: %q, size %d", c.name, got, f.attr(ino).Size)
		}
	}
	for _, c := range []struct {
		mode   uint32
		off, n int64
		kind   Kind
	}{
		{FallocPunchHole, 0, 1, NotSupported}, // without keep size
		{0x08, 0, 1, NotSupported},            // FALLOC_FL_COLLAPSE_RANGE
		{0, -1, 1, Invalid},
		{0, 0, 0, Invalid},
		{0, 0, math.MaxInt64, NoSpace},
	} {
		f.want(f.Fallocate(f.ctx, ino, c.mode, c.off, c.n, WriteFlags{}), c.kind)
	}
	f.want(f.Fallocate(f.ctx, RootIno, 0, 0, 1, WriteFlags{}), IsDir)
	checkInvariants(t, f.Volume)
}

func TestSeek(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.write(ino, 10, "aaaaa")
	f.write(ino, 15, "bbbbb")
	f.write(ino, 30, "c")
	f.truncate(ino, 40)
	for _, c := range []struct{ off, data, hole int64 }{
		{0, 10, 0}, {10, 10, 20}, {14, 14, 20}, {17, 17, 20}, {20, 30, 20}, {30, 30, 31}, {31, -1, 31}, {39, -1, 39}, {40, -1, -1}, {-1, -1, -1},
	} {
		for whence, want := range map[int]int64{SeekData: c.data, SeekHole: c.hole} {
			got, err := f.Seek(f.ctx, ino, c.off, whence)
			if want < 0 {
				f.want(err, NoData)
			} else if err != nil || got != want {
				t.Errorf("seek %d whence %d: %d, %v; want %d", c.off, whence, got, err, want)
			}
		}
	}
	_, err := f.Seek(f.ctx, ino, 0, 0)
	f.want(err, Invalid)
	_, err = f.Seek(f.ctx, RootIno, 0, SeekData)
	f.want(err, IsDir)
	full := f.file(RootIno, "full")
	f.write(full, 0, "x")
	if at, err := f.Seek(f.ctx, full, 0, SeekHole); err != nil || at != 1 {
		t.Errorf("the end is a hole at %d, %v", at, err)
	}
}

func TestCopyRange(t *testing.T) {
	f := newFS(t)
	src, dst := f.file(RootIno, "src"), f.file(RootIno, "dst")
	f.write(src, 0, "0123456789")
	f.write(src, 20, "abcdefghij")
	f.write(dst, 0, strings.Repeat("x", 40))
	journaled := f.store.Stats().JournalBytes
	n, err := f.CopyRange(f.ctx, src, 5, dst, 3, 100, WriteFlags{})
	f.ok(err)
	want := "xxx56789" + strings.Repeat("\x00", 10) + "abcdefghij" + strings.Repeat("x", 12)
	if got := f.read(dst, 0, 100); n != 25 || got != want {
		t.Errorf("%d: %q", n, got)
	}
	if grown := f.store.Stats().JournalBytes - journaled; grown > 4096 {
		t.Errorf("the journal grew by %d bytes: content was moved", grown)
	}
	f.write(src, 0, "changed afterwards, and the copy must not change")
	if got := f.read(dst, 0, 100); got != want {
		t.Errorf("after a change of the source: %q", got)
	}
	n, err = f.CopyRange(f.ctx, dst, 0, dst, 100, 8, WriteFlags{})
	f.ok(err)
	if n != 8 || f.read(dst, 100, 100) != "xxx56789" {
		t.Error("copy inside one file")
	}
	_, err = f.CopyRange(f.ctx, dst, 0, dst, 4, 8, WriteFlags{})
	f.want(err, Invalid)
	n, err = f.CopyRange(f.ctx, src, 1000, dst, 0, 8, WriteFlags{})
	f.ok(err)
	if n != 0 {
		t.Errorf("%d bytes past the end", n)
	}
	_, err = f.CopyRange(f.ctx, RootIno, 0, dst, 0, 8, WriteFlags{})
	f.want(err, IsDir)
	f.ok(f.Unlink(f.ctx, RootIno, "src"))
	f.reaper.wait()
	if f.read(dst, 3, 5) != "56789" {
		t.Error("shared bytes went with the source")
	}
	checkInvariants(t, f.Volume)
}

func TestPrivilegesDrop(t *testing.T) {
	f := newFS(t)
	const set = 0o6755
	capability := []byte("cap")
	ino := f.file(RootIno, "a")
	f.write(ino, 0, "x")
	for _, c := range []struct {
		name string
		op   func()
		mode uint32
	}{
		{"write", func() { f.Write(f.ctx, ino, 0, []byte("y"), WriteFlags{KillPriv: true}) }, 0o755},
		{"privileged write", func() { f.write(ino, 0, "z") }, set},
		{"truncate", func() { f.set(ino, SetAttr{Valid: SetSize, KillPriv: true}) }, 0o755},
		{"privileged truncate", func() { f.truncate(ino, 1) }, set},
		{"chown", func() { f.set(ino, SetAttr{Valid: SetUID | SetGID, UID: 1, GID: 1}) }, 0o755},
		{"chown to nobody in particular", func() { f.set(ino, SetAttr{}) }, 0o755},
		{"fallocate", func() { f.ok(f.Fallocate(f.ctx, ino, 0, 0, 9, WriteFlags{KillPriv: true})) }, 0o755},
		{"copy", func() { f.CopyRange(f.ctx, ino, 0, ino, 10, 4, WriteFlags{KillPriv: true}) }, 0o755},
	} {
		f.set(ino, SetAttr{Valid: SetMode, Mode: set})
		f.ok(f.SetXattr(f.ctx, ino, xattrCapability, capability, 0))
		c.op()
		if got := f.attr(ino).Mode & 0o7777; got != c.mode {
			t.Errorf("%s: mode %o, want %o", c.name, got, c.mode)
		}
		if _, err := f.GetXattr(f.ctx, ino, xattrCapability); !errors.Is(err, NoAttr) {
			t.Errorf("%s: the capability stayed: %v", c.name, err)
		}
	}
	// Without group execution the bit means mandatory locking and stays.
	f.set(ino, SetAttr{Valid: SetMode, Mode: 0o6744})
	f.Write(f.ctx, ino, 0, []byte("y"), WriteFlags{KillPriv: true})
	if got := f.attr(ino).Mode & 0o7777; got != 0o2744 {
		t.Errorf("mode %o", got)
	}
	dir := f.mkdir(RootIno, "d")
	f.set(dir, SetAttr{Valid: SetMode, Mode: 0o6755})
	f.set(dir, SetAttr{Valid: SetUID, UID: 3})
	if got := f.attr(dir).Mode & 0o7777; got != 0o6755 {
		t.Errorf("chown of a directory left %o", got)
	}
}

func TestAccessTime(t *testing.T) {
	dir, clock := t.TempDir(), newTestClock()
	f := fs{t, openAt(t, dir, clock), t.Context()}
	ino := f.file(RootIno, "a")
	f.write(ino, 0, "x")
	f.read(ino, 0, 1)
	first := f.attr(ino).Atime
	if first <= f.attr(ino).Mtime {
		t.Error("the first read after a change is not recorded")
	}
	f.read(ino, 0, 1)
	if f.attr(ino).Atime != first {
		t.Error("a second read is recorded within a day")
	}
	clock.ns.Add(relatimeNs)
	f.read(ino, 0, 1)
	later := f.attr(ino).Atime
	if later == first {
		t.Error("a read a day later is not recorded")
	}
	for range 2 * pendingAtimesMax {
		f.read(f.fresh(), 0, 1)
	}
	f.ok(f.Close(f.ctx))
	f.Volume = openAt(t, dir, clock)
	if got := f.attr(ino).Atime; got != later {
		t.Errorf("after reopening %d, want %d", got, later)
	}
	f.ok(f.Close(f.ctx))
}

var freshNames = 0

func (f fs) fresh() Ino {
	f.Helper()
	freshNames++
	ino := f.file(RootIno, "fresh"+string(rune(0x4e00+freshNames)))
	f.write(ino, 0, "x")
	return ino
}

// remoteStub serves slices from memory.
type remoteStub struct {
	slices map[uint32][]byte
}

func (r *remoteStub) ReadSlice(_ context.Context, at metastore.Remote, off int, dst []byte) error {
	b, ok := r.slices[at.Slice]
	if !ok {
		return errors.New("no such slice")
	}
	copy(dst, b[int(at.Off)+off:])
	return nil
}

// TestRemoteExtents: extents without a local copy are read through remote, at the right place after any cut.
func TestRemoteExtents(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.ok(f.update(ino, func(t *tx, n *metastore.Inode) error {
		t.mapExtent(ino, n, metastore.Extent{Off: 0, Len: 20, HasRemote: true, Remote: metastore.Remote{
			Stripe: [16]byte{1}, Slice: 7, StoredLen: 26, SliceLen: 26, Off: 6,
		}})
		n.Size = 20
		return nil
	}))
	_, err := f.Read(f.ctx, ino, 0, make([]byte, 20))
	f.want(err, IO) // no network
	r := &remoteStub{slices: map[uint32][]byte{7: []byte("abcdefghijklmnopqrstuvwxyz")}}
	f.remote = r
	if got := f.read(ino, 2, 5); got != "ijklm" {
		t.Errorf("%q", got)
	}
	f.write(ino, 5, "LOCAL")
	dst := f.file(RootIno, "b")
	_, err = f.CopyRange(f.ctx, ino, 8, dst, 1, 10, WriteFlags{})
	f.ok(err)
	f.truncate(ino, 15)
	if got := f.read(ino, 0, 99); got != "ghijkLOCALqrstu" {
		t.Errorf("%q", got)
	}
	if got := f.read(dst, 0, 99); got != "\x00ALqrstuvwx" {
		t.Errorf("%q", got)
	}
	delete(r.slices, 7)
	_, err = f.Read(f.ctx, ino, 0, make([]byte, 20))
	f.want(err, IO)
	checkInvariants(t, f.Volume)
}

func TestFailedVolumeRefusesChanges(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.write(ino, 0, "x")
	f.fail(cache.ErrReadOnly)
	_, err := f.Write(f.ctx, ino, 0, []byte("y"), WriteFlags{})
	f.want(err, ReadOnly)
	f.want(f.Unlink(f.ctx, RootIno, "a"), ReadOnly)
	if f.read(ino, 0, 1) != "x" {
		t.Error("a failed volume can still be read")
	}
	f.failed.Store(nil) // so that the test's Close succeeds
}

func TestStatFS(t *testing.T) {
	f := newFS(t)
	f.capacity.Store(&capacity{freeBytes: 1 << 30})
	before, err := f.StatFS(f.ctx)
	f.ok(err)
	ino := f.file(RootIno, "a")
	f.write(ino, 0, strings.Repeat("x", 3*statBlockBytes))
	after, err := f.StatFS(f.ctx)
	f.ok(err)
	if after.Blocks-after.Free != before.Blocks-before.Free+3 || after.Free != 1<<30/statBlockBytes {
		t.Errorf("before %+v after %+v", before, after)
	}
	if used := after.Files - after.FilesFree; used != 2 {
		t.Errorf("%d files in use", used)
	}
	f.capacity.Store(nil)
	if s, err := f.StatFS(f.ctx); err != nil || s.Avail == 0 {
		t.Errorf("%+v, %v", s, err)
	}
}
