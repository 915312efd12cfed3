package volume

import (
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestNames(t *testing.T) {
	f := newFS(t)
	for _, c := range []struct {
		name string
		kind Kind
	}{
		{strings.Repeat("n", 256), NameTooLong},
		{"", NotExist},
		{".", Exist},
		{"..", Exist},
		{"a/b", Invalid},
		{"a\x00b", Invalid},
	} {
		_, err := f.Create(f.ctx, RootIno, c.name, Create{Mode: syscall.S_IFREG, Excl: true})
		f.want(err, c.kind)
		if strings.Contains(err.Error(), "nnn") {
			t.Error("the error holds a name")
		}
	}
	for _, name := range []string{strings.Repeat("n", 255), "\xff\xfe", " ", "\n", "日本", "a\\b"} {
		ino := f.file(RootIno, name)
		if f.lookup(RootIno, name) != ino {
			t.Errorf("%q is not found", name)
		}
	}
	_, err := f.Lookup(f.ctx, RootIno, strings.Repeat("n", 256))
	f.want(err, NameTooLong)
	_, err = f.Lookup(f.ctx, RootIno, "none")
	f.want(err, NotExist)
	_, err = f.Lookup(f.ctx, f.file(RootIno, "file"), "x")
	f.want(err, NotDir)
	_, err = f.Lookup(f.ctx, 999, "x")
	f.want(err, Stale)
}

func TestCreateTypes(t *testing.T) {
	f := newFS(t)
	for _, c := range []struct {
		name string
		mode uint32
		rdev uint32
	}{
		{"reg", syscall.S_IFREG | 0o640, 0},
		{"fifo", syscall.S_IFIFO | 0o600, 0},
		{"sock", syscall.S_IFSOCK | 0o777, 0},
		{"chr", syscall.S_IFCHR | 0o666, 0x103},
		{"blk", syscall.S_IFBLK | 0o660, 0x801},
		{"dir", syscall.S_IFDIR | 0o1777, 0},
	} {
		a, err := f.Create(f.ctx, RootIno, c.name, Create{Mode: c.mode, Umask: 0o022, UID: 5, GID: 6, Rdev: 0x801})
		f.ok(err)
		if a.Mode != c.mode&^0o022 || a.UID != 5 || a.GID != 6 {
			t.Errorf("%s: mode %o owner %d:%d", c.name, a.Mode, a.UID, a.GID)
		}
		wantRdev := uint32(0)
		if c.rdev != 0 {
			wantRdev = 0x801
		}
		if a.Rdev != wantRdev {
			t.Errorf("%s: rdev %#x", c.name, a.Rdev)
		}
		if a.Btime == 0 || a.Btime != a.Mtime || a.Ctime != a.Atime {
			t.Errorf("%s: times %+v", c.name, a)
		}
		if got, err := f.GetAttr(f.ctx, a.Ino); err != nil || got != a {
			t.Errorf("%s: getattr %+v, %v", c.name, got, err)
		}
		_, err = f.Create(f.ctx, RootIno, c.name, Create{Mode: c.mode, Excl: true})
		f.want(err, Exist)
	}
	_, err := f.Create(f.ctx, RootIno, "x", Create{Mode: 0o644})
	f.want(err, Invalid)

	// Without Excl a regular file is opened as it is.
	a, err := f.Create(f.ctx, RootIno, "reg", Create{Mode: syscall.S_IFREG | 0o777})
	f.ok(err)
	if a.Ino != f.lookup(RootIno, "reg") || a.Mode&0o777 != 0o640 {
		t.Errorf("existing file came back as %+v", a)
	}
	_, err = f.Create(f.ctx, RootIno, "dir", Create{Mode: syscall.S_IFREG})
	f.want(err, Exist)
	_, err = f.Create(f.ctx, f.lookup(RootIno, "reg"), "x", Create{Mode: syscall.S_IFREG})
	f.want(err, NotDir)
}

func TestSymlinks(t *testing.T) {
	f := newFS(t)
	link := func(name, target string) (Attr, error) {
		return f.Create(f.ctx, RootIno, name, Create{Mode: syscall.S_IFLNK | 0o600, Umask: 0o777, Target: target})
	}
	long := strings.Repeat("x", 4095)
	a, err := link("long", long)
	f.ok(err)
	if a.Size != 4095 || a.Mode != syscall.S_IFLNK|0o777 {
		t.Errorf("size %d mode %o", a.Size, a.Mode)
	}
	if got, err := f.Readlink(f.ctx, a.Ino); err != nil || got != long {
		t.Errorf("readlink: %d bytes, %v", len(got), err)
	}
	_, err = link("longer", long+"x")
	f.want(err, NameTooLong)
	_, err = link("empty", "")
	f.want(err, NotExist)
	_, err = link("nul", "a\x00")
	f.want(err, Invalid)
	_, err = f.Readlink(f.ctx, RootIno)
	f.want(err, Invalid)
	_, err = f.Read(f.ctx, a.Ino, 0, make([]byte, 1))
	f.want(err, Invalid)
}

func TestLinkCountsOfDirectories(t *testing.T) {
	f := newFS(t)
	nlink := func(ino Ino, want uint32) {
		t.Helper()
		if got := f.attr(ino).Nlink; got != want {
			t.Errorf("inode %d has %d links, want %d", ino, got, want)
		}
	}
	a, b := f.mkdir(RootIno, "a"), f.mkdir(RootIno, "b")
	sub := f.mkdir(a, "sub")
	f.file(a, "file")
	nlink(RootIno, 4)
	nlink(a, 3)
	f.ok(f.Rename(f.ctx, a, "sub", b, "sub", 0))
	nlink(a, 2)
	nlink(b, 3)
	if p, _ := f.Parent(f.ctx, sub); p != b {
		t.Errorf("parent is %d", p)
	}
	f.mkdir(a, "sub")
	f.ok(f.Rename(f.ctx, b, "sub", a, "sub", 0)) // over an empty directory
	nlink(a, 3)
	nlink(b, 2)
	f.file(b, "file")
	f.ok(f.Rename(f.ctx, a, "sub", b, "file", RenameExchange))
	nlink(a, 2)
	nlink(b, 3)
	f.ok(f.Rmdir(f.ctx, b, "file"))
	nlink(b, 2)
	if p, _ := f.Parent(f.ctx, RootIno); p != RootIno {
		t.Errorf("the root's parent is %d", p)
	}
}

func TestUnlinkAndRmdir(t *testing.T) {
	f := newFS(t)
	dir := f.mkdir(RootIno, "dir")
	f.file(dir, "file")
	f.want(f.Rmdir(f.ctx, RootIno, "dir"), NotEmpty)
	f.want(f.Unlink(f.ctx, RootIno, "dir"), IsDir)
	f.want(f.Rmdir(f.ctx, dir, "file"), NotDir)
	f.want(f.Rmdir(f.ctx, dir, "."), Invalid)
	f.want(f.Rmdir(f.ctx, dir, ".."), NotEmpty)
	f.want(f.Rmdir(f.ctx, dir, "none"), NotExist)
	f.want(f.Unlink(f.ctx, dir, "none"), NotExist)
	f.want(f.Unlink(f.ctx, dir, strings.Repeat("n", 256)), NameTooLong)
	f.ok(f.Unlink(f.ctx, dir, "file"))
	f.Acquire(dir, 1)
	f.ok(f.Rmdir(f.ctx, RootIno, "dir"))
	if n := f.attr(dir).Nlink; n != 0 {
		t.Errorf("an open removed directory has %d links", n)
	}
	_, err := f.Create(f.ctx, dir, "x", Create{Mode: syscall.S_IFREG})
	f.want(err, NotExist)
	f.Release(dir, 1)
	f.reaper.wait()
	_, err = f.GetAttr(f.ctx, dir)
	f.want(err, Stale)
}

func TestLinks(t *testing.T) {
	f := newFS(t)
	dir := f.mkdir(RootIno, "dir")
	ino := f.file(RootIno, "a")
	before := f.attr(ino)
	a, err := f.Link(f.ctx, ino, dir, "b")
	f.ok(err)
	if a.Nlink != 2 || a.Ctime <= before.Ctime || a.Mtime != before.Mtime {
		t.Errorf("after link: %+v", a)
	}
	_, err = f.Link(f.ctx, ino, dir, "b")
	f.want(err, Exist)
	_, err = f.Link(f.ctx, dir, RootIno, "d")
	f.want(err, Permission)
	_, err = f.Link(f.ctx, 999, RootIno, "d")
	f.want(err, Stale)
	f.ok(f.Rename(f.ctx, RootIno, "a", dir, "b", 0)) // two names of one inode: nothing happens
	f.want(f.Rename(f.ctx, RootIno, "a", dir, "b", RenameNoReplace), Exist)
	if f.lookup(RootIno, "a") != f.lookup(dir, "b") {
		t.Error("a name went")
	}
	f.ok(f.Unlink(f.ctx, RootIno, "a"))
	if n := f.attr(ino).Nlink; n != 1 {
		t.Errorf("%d links", n)
	}
	f.Acquire(ino, 1)
	f.ok(f.Unlink(f.ctx, dir, "b"))
	_, err = f.Link(f.ctx, ino, dir, "again") // a file whose names are gone stays without
	f.want(err, NotExist)
	f.Release(ino, 1)
}

func TestUnlinkedWhileOpen(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	f.write(ino, 0, "content")
	f.Acquire(ino, 3)
	f.ok(f.Unlink(f.ctx, RootIno, "a"))
	f.write(ino, 7, "!")
	if got := f.read(ino, 0, 100); got != "content!" {
		t.Errorf("read %q", got)
	}
	f.Release(ino, 2)
	f.reaper.wait()
	if n := f.attr(ino).Nlink; n != 0 {
		t.Errorf("%d links", n)
	}
	f.Release(ino, 1)
	f.reaper.wait()
	_, err := f.GetAttr(f.ctx, ino)
	f.want(err, Stale)
	checkInvariants(t, f.Volume)
}

func TestOrphansGoAtOpen(t *testing.T) {
	dir, clock := t.TempDir(), newTestClock()
	f := fs{t, openAt(t, dir, clock), t.Context()}
	ino := f.file(RootIno, "a")
	f.write(ino, 0, "content")
	f.ok(f.SetXattr(f.ctx, ino, "user.a", []byte("1"), 0))
	f.Acquire(ino, 1)
	f.ok(f.Unlink(f.ctx, RootIno, "a"))
	tmp, err := f.CreateTmp(f.ctx, RootIno, Create{Mode: syscall.S_IFREG | 0o600})
	f.ok(err)
	next := t.TempDir()
	copyState(t, dir, next)
	f.ok(f.Close(f.ctx))

	f = fs{t, openAt(t, next, clock), t.Context()}
	f.reaper.wait()
	for _, ino := range []Ino{ino, tmp.Ino} {
		_, err := f.GetAttr(f.ctx, ino)
		f.want(err, Stale)
	}
	checkInvariants(t, f.Volume)
	f.ok(f.Close(f.ctx))
}

func TestUnnamedFile(t *testing.T) {
	f := newFS(t)
	a, err := f.CreateTmp(f.ctx, RootIno, Create{Mode: syscall.S_IFREG | 0o666, Umask: 0o027})
	f.ok(err)
	if a.Nlink != 0 || a.Mode&0o777 != 0o640 {
		t.Errorf("%+v", a)
	}
	f.Acquire(a.Ino, 1)
	f.write(a.Ino, 0, "x")
	_, err = f.Link(f.ctx, a.Ino, RootIno, "named")
	f.ok(err)
	f.Release(a.Ino, 1)
	f.reaper.wait()
	if f.lookup(RootIno, "named") != a.Ino || f.attr(a.Ino).Nlink != 1 || f.read(a.Ino, 0, 9) != "x" {
		t.Error("the linked file is not whole")
	}
	b, err := f.CreateTmp(f.ctx, RootIno, Create{Mode: syscall.S_IFREG})
	f.ok(err)
	f.Acquire(b.Ino, 1)
	f.Release(b.Ino, 1)
	f.reaper.wait()
	_, err = f.GetAttr(f.ctx, b.Ino)
	f.want(err, Stale)
	_, err = f.CreateTmp(f.ctx, RootIno, Create{Mode: syscall.S_IFDIR})
	f.want(err, Invalid)
	checkInvariants(t, f.Volume)
}

func TestRenameErrors(t *testing.T) {
	f := newFS(t)
	a := f.mkdir(RootIno, "a")
	b := f.mkdir(a, "b")
	c := f.mkdir(b, "c")
	f.file(RootIno, "file")
	f.file(a, "kept")
	for _, x := range []struct {
		fromDir Ino
		from    string
		toDir   Ino
		to      string
		flags   RenameFlags
		kind    Kind
	}{
		{RootIno, "a", c, "x", 0, Invalid},              // below itself
		{RootIno, "a", a, "x", 0, Invalid},              //
		{RootIno, "a", a, "b", RenameExchange, Invalid}, //
		{a, "b", RootIno, "a", RenameExchange, Invalid}, // an ancestor moved below its child
		{a, "b", RootIno, "a", 0, NotEmpty},             //
		{RootIno, "file", RootIno, "a", 0, IsDir},       //
		{RootIno, "a", RootIno, "file", 0, NotDir},      //
		{RootIno, "none", RootIno, "x", 0, NotExist},    //
		{RootIno, "file", RootIno, "none", RenameExchange, NotExist},
		{RootIno, "file", RootIno, "a", RenameNoReplace, Exist}, //
		{RootIno, "file", 999, "x", 0, Stale},                   //
		{RootIno, "file", f.lookup(RootIno, "file"), "x", 0, NotDir},
		{RootIno, "file", RootIno, strings.Repeat("n", 256), 0, NameTooLong},
		{RootIno, "file", RootIno, "x", RenameNoReplace | RenameExchange, Invalid},
		{RootIno, "file", RootIno, "x", 4, Invalid}, // RENAME_WHITEOUT
		{RootIno, "file", RootIno, ".", 0, Invalid},
	} {
		f.want(f.Rename(f.ctx, x.fromDir, x.from, x.toDir, x.to, x.flags), x.kind)
	}
	checkInvariants(t, f.Volume)
}

func TestRenameOverOpenFile(t *testing.T) {
	f := newFS(t)
	old, next := f.file(RootIno, "a"), f.file(RootIno, "b")
	f.write(old, 0, "old")
	f.write(next, 0, "new")
	f.Acquire(old, 1)
	f.ok(f.Rename(f.ctx, RootIno, "b", RootIno, "a", 0))
	if f.lookup(RootIno, "a") != next || f.attr(old).Nlink != 0 || f.read(old, 0, 9) != "old" {
		t.Error("rename over an open file")
	}
	if got := f.names(RootIno); !slices.Equal(got, []string{"a"}) {
		t.Errorf("names %q", got)
	}
	f.Release(old, 1)
	f.reaper.wait()
	checkInvariants(t, f.Volume)
}

func TestSetGroupIDDirectory(t *testing.T) {
	f := newFS(t)
	a, err := f.Create(f.ctx, RootIno, "d", Create{Mode: syscall.S_IFDIR | syscall.S_ISGID | 0o775, GID: 42})
	f.ok(err)
	sub, err := f.Create(f.ctx, a.Ino, "sub", Create{Mode: syscall.S_IFDIR | 0o755, GID: 7})
	f.ok(err)
	file, err := f.Create(f.ctx, a.Ino, "file", Create{Mode: syscall.S_IFREG | 0o644, GID: 7})
	f.ok(err)
	if sub.GID != 42 || sub.Mode&syscall.S_ISGID == 0 {
		t.Errorf("subdirectory %+v", sub)
	}
	if file.GID != 42 || file.Mode&syscall.S_ISGID != 0 {
		t.Errorf("file %+v", file)
	}
}

// TestParentTimes checks which times each operation on names moves.
func TestParentTimes(t *testing.T) {
	f := newFS(t)
	dir, other := f.mkdir(RootIno, "dir"), f.mkdir(RootIno, "other")
	file := f.file(dir, "file")
	type stamped struct{ mtime, ctime bool }
	moved := func(ino Ino, op func()) stamped {
		t.Helper()
		before := f.attr(ino)
		op()
		after := f.attr(ino)
		if after.Btime != before.Btime {
			t.Error("birth time changed")
		}
		return stamped{after.Mtime > before.Mtime, after.Ctime > before.Ctime}
	}
	both, onlyCtime, neither := stamped{true, true}, stamped{false, true}, stamped{}
	for _, c := range []struct {
		name string
		ino  Ino
		op   func()
		want stamped
	}{
		{"create in parent", dir, func() { f.file(dir, "x") }, both},
		{"link in parent", dir, func() { f.Link(f.ctx, file, dir, "l") }, both},
		{"link on inode", file, func() { f.Link(f.ctx, file, other, "l") }, onlyCtime},
		{"unlink in parent", dir, func() { f.ok(f.Unlink(f.ctx, dir, "x")) }, both},
		{"unlink on inode", file, func() { f.ok(f.Unlink(f.ctx, other, "l")) }, onlyCtime},
		{"mkdir in parent", dir, func() { f.mkdir(dir, "s") }, both},
		{"rmdir in parent", dir, func() { f.ok(f.Rmdir(f.ctx, dir, "s")) }, both},
		{"rename from", dir, func() { f.ok(f.Rename(f.ctx, dir, "l", other, "m", 0)) }, both},
		{"rename to", dir, func() { f.ok(f.Rename(f.ctx, other, "m", dir, "l", 0)) }, both},
		{"rename on inode", file, func() { f.ok(f.Rename(f.ctx, dir, "l", dir, "k", 0)) }, onlyCtime},
		{"rename to same inode", file, func() { f.ok(f.Rename(f.ctx, dir, "k", dir, "file", 0)) }, neither},
		{"failed create", dir, func() { f.Create(f.ctx, dir, "k", Create{Mode: syscall.S_IFREG, Excl: true}) }, neither},
		{"open by create", dir, func() { f.Create(f.ctx, dir, "k", Create{Mode: syscall.S_IFREG}) }, neither},
		{"write", file, func() { f.write(file, 0, "x") }, both},
		{"empty write", file, func() { f.write(file, 0, "") }, neither},
		{"truncate", file, func() { f.truncate(file, 0) }, both},
		{"truncate to same size", file, func() { f.truncate(file, 0) }, both},
		{"chmod", file, func() { f.set(file, SetAttr{Valid: SetMode, Mode: 0o600}) }, onlyCtime},
		{"chown", file, func() { f.set(file, SetAttr{Valid: SetUID, UID: 4}) }, onlyCtime},
		{"utimens mtime", file, func() { f.set(file, SetAttr{Valid: SetMtimeNow}) }, both},
		{"utimens atime", file, func() { f.set(file, SetAttr{Valid: SetAtime, Atime: 5}) }, onlyCtime},
		{"setxattr", file, func() { f.ok(f.SetXattr(f.ctx, file, "user.a", nil, 0)) }, onlyCtime},
		{"removexattr", file, func() { f.ok(f.RemoveXattr(f.ctx, file, "user.a")) }, onlyCtime},
		{"fallocate", file, func() { f.ok(f.Fallocate(f.ctx, file, 0, 0, 10, WriteFlags{})) }, both},
		{"read", file, func() { f.read(file, 0, 1) }, neither},
		{"readdir", dir, func() { f.names(dir) }, neither},
	} {
		if got := moved(c.ino, c.op); got != c.want {
			t.Errorf("%s: moved mtime, ctime %v, want %v", c.name, got, c.want)
		}
	}
}

func (f fs) set(ino Ino, s SetAttr) Attr {
	f.Helper()
	a, err := f.SetAttr(f.ctx, ino, s)
	f.ok(err)
	return a
}

func (f fs) truncate(ino Ino, size uint64) {
	f.Helper()
	f.set(ino, SetAttr{Valid: SetSize, Size: size})
}

func TestReadDirWhileItChanges(t *testing.T) {
	f := newFS(t)
	dir, other := f.mkdir(RootIno, "d"), f.mkdir(RootIno, "o")
	var want []string
	for i := range 50 {
		name := string(rune('A' + i))
		f.file(dir, name)
		want = append(want, name)
	}
	var got []string
	var cookie uint64
	for {
		n := 0
		f.ok(f.ReadDir(f.ctx, dir, cookie, func(d Dirent) bool {
			if d.Cookie < 3 || d.Cookie <= cookie {
				t.Fatalf("cookie %d after %d", d.Cookie, cookie)
			}
			cookie = d.Cookie
			got = append(got, d.Name)
			n++
			return n < 7
		}))
		if n == 0 {
			break
		}
		// What was met is renamed in place, moved out or removed; new names come.
		last := got[len(got)-1]
		if !strings.HasPrefix(last, "new") {
			f.ok(f.Rename(f.ctx, dir, last, dir, last+"renamed", 0))
			f.ok(f.Rename(f.ctx, dir, got[len(got)-2], other, last, 0))
		}
		if len(got) < 40 {
			f.file(dir, "new"+last)
		}
	}
	met := map[string]int{}
	for _, name := range got {
		met[name]++
	}
	for _, name := range want {
		if met[name] != 1 {
			t.Errorf("%q was met %d times", name, met[name])
		}
	}
	f.want(f.ReadDir(f.ctx, f.file(RootIno, "f"), 0, nil), NotDir)
	f.want(f.ReadDir(f.ctx, 999, 0, nil), Stale)
}
