package conformance

import (
	"syscall"

	"golang.org/x/sys/unix"
)

func renameCases() []testCase {
	out := []testCase{
		{op: "rename", name: "into itself, onto an ancestor, onto what is not empty", run: renameRefuses},
		{op: "rename", name: "directories that are full, empty, open", run: renameDirectories},
		{op: "rename", name: "two names of one file", run: renameSame},
		{op: "rename", name: "flags", run: renameFlags},
		{op: "rename", name: "a directory without write permission cannot change its parent", others: true, run: renameReadOnlyDirectory},
	}
	for _, k := range kinds {
		out = append(out,
			testCase{op: "rename", name: k.name + ": counts and times", root: k.root, run: k.renamed},
			testCase{op: "rename", name: k.name + " over every kind", root: k.root, run: k.renamedOver},
			testCase{op: "rename", name: k.name + " exchanged with every kind", root: k.root, run: k.exchanged},
		)
	}
	return out
}

func exchange(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
}

func noReplace(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE)
}

func (k kind) renamed(t *T) {
	t.mkdir("from", 0o755)
	t.mkdir("to", 0o755)
	t.must(k.make("from/x"))
	ino := t.lstat("from/x").Ino
	t.changes("from", "mc", func() error { return unix.Rename("from/x", "from/y") })
	t.changes("from", "mc", func() error { return unix.Rename("from/y", "to/y") })
	t.changes("from", "mc", func() error { return unix.Rename("to/y", "from/x") })
	t.changes("to", "mc", func() error { return unix.Rename("from/x", "to/y") })
	before := t.stamps("to/y")
	t.tick()
	t.want(0, unix.Rename("to/y", "to/z"))
	after := t.stamps("to/z")
	t.that(after.ctime > before.ctime, "ctime is not changed")
	equal(t, "mtime", after.mtime, before.mtime)
	equal(t, "inode", t.lstat("to/z").Ino, ino)
	subdirectories := uint64(0)
	if k.mode == unix.S_IFDIR {
		subdirectories = 1
		equal(t, "inode of its parent", t.lstat("to/z/..").Ino, t.lstat("to").Ino)
	}
	equal(t, "links of from", t.lstat("from").Nlink, 2)
	equal(t, "links of to", t.lstat("to").Nlink, 2+subdirectories)
	t.that(!exists("from/x") && !exists("to/y"), "an old name is still there")
	t.want(unix.ENOENT, unix.Rename("from/x", "to/y"))
}

func (k kind) renamedOver(t *T) {
	for _, over := range t.kinds() {
		t.row("over a %s", over.name)
		t.mkdir("dir", 0o755)
		t.must(k.make("x"))
		t.must(over.make("dir/y"))
		ino := t.lstat("x").Ino
		var want syscall.Errno
		switch {
		case k.mode == unix.S_IFDIR && over.mode != unix.S_IFDIR:
			want = unix.ENOTDIR
		case k.mode != unix.S_IFDIR && over.mode == unix.S_IFDIR:
			want = unix.EISDIR
		}
		t.want(unix.EEXIST, noReplace("x", "dir/y"))
		var second uint64
		if over.mode != unix.S_IFDIR {
			t.must(unix.Link("dir/y", "second"))
		}
		before, dirBefore := t.stamps("dir/y"), t.stamps("dir")
		t.tick()
		t.want(want, unix.Rename("x", "dir/y"))
		if want != 0 {
			equal(t, "times of the directory", t.stamps("dir"), dirBefore)
			t.must(unix.Rename("x", "kept"))
			t.must(removeEither("kept"))
		} else {
			equal(t, "inode", t.lstat("dir/y").Ino, ino)
			t.that(!exists("x"), "the old name is still there")
			second = 1
		}
		if over.mode != unix.S_IFDIR {
			st := t.lstat("second")
			equal(t, "links of what was replaced", st.Nlink, 2-second)
			t.that((stampsOf(st).ctime > before.ctime) == (want == 0), "ctime of what was replaced: %d, then %d", before.ctime, stampsOf(st).ctime)
			t.must(unix.Unlink("second"))
		}
		links := uint64(2)
		if over.mode == unix.S_IFDIR {
			links = 3
		}
		equal(t, "links of the directory", t.lstat("dir").Nlink, links)
		t.must(removeEither("dir/y"))
		t.must(unix.Rmdir("dir"))
	}
}

func removeEither(name string) error {
	err := unix.Unlink(name)
	if err == unix.EISDIR {
		err = unix.Rmdir(name)
	}
	return err
}

func (k kind) exchanged(t *T) {
	for _, other := range t.kinds() {
		t.row("with a %s", other.name)
		t.mkdir("a", 0o755)
		t.mkdir("b", 0o755)
		t.must(k.make("a/x"))
		t.must(other.make("b/y"))
		x, y := t.lstat("a/x").Ino, t.lstat("b/y").Ino
		linksA, linksB := t.lstat("a").Nlink, t.lstat("b").Nlink
		t.changes("a", "mc", func() error { return exchange("a/x", "b/y") })
		equal(t, "inode", t.lstat("a/x").Ino, y)
		equal(t, "inode", t.lstat("b/y").Ino, x)
		if (k.mode == unix.S_IFDIR) != (other.mode == unix.S_IFDIR) {
			linksA, linksB = linksB, linksA
		}
		equal(t, "links of the first directory", t.lstat("a").Nlink, linksA)
		equal(t, "links of the second directory", t.lstat("b").Nlink, linksB)
		if k.mode == unix.S_IFDIR {
			equal(t, "parent", t.lstat("b/y/..").Ino, t.lstat("b").Ino)
		}
		before := t.stamps("b/y")
		t.tick()
		t.want(0, exchange("b/y", "a/x"))
		t.that(t.stamps("a/x").ctime > before.ctime, "ctime is not changed")
		equal(t, "mtime", t.stamps("a/x").mtime, before.mtime)
		t.must(removeEither("a/x"))
		t.must(removeEither("b/y"))
		t.must(unix.Rmdir("a"))
		t.must(unix.Rmdir("b"))
	}
}

func renameRefuses(t *T) {
	for _, dir := range []string{"a", "a/b", "a/b/c", "full", "full/sub"} {
		t.mkdir(dir, 0o755)
	}
	for _, row := range []struct {
		from, to string
		want     syscall.Errno
	}{
		{"a", "a/x", unix.EINVAL},
		{"a", "a/b", unix.EINVAL},
		{"a", "a/b/x", unix.EINVAL},
		{"a", "a/b/c", unix.EINVAL},
		{"a/b/c", "a", unix.ENOTEMPTY},
		{"a/b/c", "a/b", unix.ENOTEMPTY},
		{"a", "full", unix.ENOTEMPTY},
		{"full/sub", "full", unix.ENOTEMPTY},
		{"a", "a", 0},
		{"missing", "a", unix.ENOENT},
		{"a", "missing/x", unix.ENOENT},
		{"a/.", "x", unix.EBUSY},
	} {
		t.row("%s to %s", row.from, row.to)
		before := t.stamps(".")
		t.want(row.want, unix.Rename(row.from, row.to))
		equal(t, "times", t.stamps("."), before)
	}
	t.row("exchange of a directory with what is in it")
	t.want(unix.EINVAL, exchange("a", "a/b"))
	t.want(unix.EINVAL, exchange("a/b", "a"))
	t.want(unix.EINVAL, exchange("a", "a/b/c"))
	t.want(unix.ENOENT, exchange("a", "missing"))
	t.want(unix.ENOENT, exchange("missing", "a"))
}

func renameDirectories(t *T) {
	t.mkdir("full", 0o755)
	t.file("full/x", "content")
	t.mkdir("full/sub", 0o755)
	t.mkdir("empty", 0o755)
	fd := t.open("empty", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	t.want(0, unix.Rename("full", "empty"))
	equal(t, "content", t.content("empty/x"), "content")
	equal(t, "links of the replaced directory", t.fstat(fd).Nlink, 0)
	entries, err := listSome(fd, 4096)
	t.wantAny(err, 0, unix.ENOENT)
	equal(t, "entries of the replaced directory", len(entries), 0)
	t.want(unix.ENOENT, unix.Mkdirat(fd, "x", 0o755))
	// A working directory moves along.
	t.must(unix.Chdir("empty/sub"))
	t.mkdir("../../elsewhere", 0o755)
	t.want(0, unix.Rename("../../empty", "../../elsewhere/moved"))
	equal(t, "content", t.content("../x"), "content")
	equal(t, "inode", t.lstat("../..").Ino, t.lstat(t.dir+"/elsewhere").Ino)
	t.want(0, unix.Mkdir("new", 0o755))
	t.that(exists(t.dir+"/elsewhere/moved/sub/new"), "a directory made in a moved one is not there")
}

func renameSame(t *T) {
	t.file("a", "content")
	t.must(unix.Link("a", "b"))
	before, dir := t.stamps("a"), t.stamps(".")
	t.tick()
	t.want(0, unix.Rename("a", "b"))
	t.that(exists("a") && exists("b"), "a name went")
	equal(t, "times", t.stamps("a"), before)
	equal(t, "times of the directory", t.stamps("."), dir)
	t.want(0, unix.Rename("a", "a"))
	t.want(0, exchange("a", "b"))
	t.want(unix.EEXIST, noReplace("a", "b"))
	equal(t, "links", t.lstat("a").Nlink, 2)
}

func renameFlags(t *T) {
	t.file("a", "")
	t.file("b", "")
	for _, flags := range []uint{8, 16, 1 << 31, unix.RENAME_NOREPLACE | unix.RENAME_EXCHANGE, unix.RENAME_EXCHANGE | unix.RENAME_WHITEOUT} {
		t.row("flags %#x", flags)
		t.want(unix.EINVAL, unix.Renameat2(unix.AT_FDCWD, "a", unix.AT_FDCWD, "b", flags))
	}
	t.row("no replacement")
	t.want(unix.EEXIST, noReplace("a", "b"))
	t.want(0, noReplace("a", "c"))
	t.that(exists("c") && !exists("a"), "not renamed")
}

func renameReadOnlyDirectory(t *T) {
	t.must(unix.Chmod(".", 0o777))
	for _, name := range []string{"from", "to"} {
		t.mkdir(name, 0o755)
		t.own(name, alice, 0o755)
	}
	t.mkdir("from/x", 0o755)
	t.own("from/x", alice, 0o555)
	t.must(t.as(alice, func() error {
		t.want(unix.EACCES, unix.Rename("from/x", "to/x"))
		t.want(0, unix.Rename("from/x", "from/y"))
		t.want(0, unix.Chmod("from/y", 0o755))
		t.want(0, unix.Rename("from/y", "to/y"))
		return nil
	}))
}
