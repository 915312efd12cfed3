package conformance

import (
	"fmt"

	"golang.org/x/sys/unix"
)

func removeCases() []testCase {
	out := []testCase{
		{op: "rmdir", name: "what is no directory, or not empty", run: rmdirRefuses},
		{op: "rmdir", name: "counts and times", run: func(t *T) {
			t.mkdir("dir", 0o755)
			t.mkdir("dir/sub", 0o755)
			equal(t, "links", t.lstat("dir").Nlink, 3)
			t.changes("dir", "mc", func() error { return unix.Rmdir("dir/sub") })
			equal(t, "links", t.lstat("dir").Nlink, 2)
			before := t.stamps("dir")
			t.tick()
			t.want(unix.ENOENT, unix.Rmdir("dir/sub"))
			equal(t, "times after a failure", t.stamps("dir"), before)
		}},
		{op: "rmdir", name: "a directory that is in use", run: removedDirectory},
		{op: "unlink", name: "a directory", run: func(t *T) {
			t.mkdir("dir", 0o755)
			t.want(unix.EISDIR, unix.Unlink("dir"))
			t.that(exists("dir"), "it went")
		}},
		{op: "unlink", name: "a file that is open", run: unlinkedOpen},
		{op: "unlink", name: "times of the other names", run: func(t *T) {
			t.mkdir("dir", 0o755)
			t.file("dir/a", "")
			t.must(unix.Link("dir/a", "b"))
			fd := t.open("b", unix.O_RDONLY, 0)
			t.changes("dir", "mc", func() error { return unix.Unlink("dir/a") })
			t.changes("b", "", func() error { return nil })
			before := stampsOf(t.fstat(fd))
			t.tick()
			t.want(0, unix.Unlink("b"))
			after := stampsOf(t.fstat(fd))
			t.that(after.ctime > before.ctime, "ctime is not changed by the last unlink")
			equal(t, "mtime", after.mtime, before.mtime)
		}},
	}
	for _, k := range kinds {
		if k.mode == unix.S_IFDIR {
			continue
		}
		out = append(out, testCase{op: "unlink", name: k.name, root: k.root, run: func(t *T) {
			t.mkdir("dir", 0o755)
			t.must(k.make("dir/x"))
			t.changes("dir", "mc", func() error { return unix.Unlink("dir/x") })
			t.that(!exists("dir/x"), "it is still there")
			t.want(unix.ENOENT, unix.Unlink("dir/x"))
			t.want(0, k.make("dir/x"))
		}})
	}
	return out
}

func rmdirRefuses(t *T) {
	for _, k := range t.kinds() {
		t.row("%s", k.name)
		t.must(k.make("x"))
		if k.mode != unix.S_IFDIR {
			t.want(unix.ENOTDIR, unix.Rmdir("x"))
		}
		t.mkdir("dir", 0o755)
		t.must(unix.Rename("x", "dir/x"))
		t.want(unix.ENOTEMPTY, unix.Rmdir("dir"))
		t.must(unix.Rename("dir/x", "is "+k.name))
		t.want(0, unix.Rmdir("dir"))
	}
	t.row("flags")
	t.mkdir("dir", 0o755)
	t.want(unix.EINVAL, unix.Unlinkat(unix.AT_FDCWD, "dir", 1))
}

// removedDirectory: a working directory that is removed is empty and takes no names; what is open goes on.
func removedDirectory(t *T) {
	t.mkdir("dir", 0o755)
	t.mkdir("dir/inner", 0o755)
	fd := t.open("dir/inner", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	t.must(unix.Chdir("dir/inner"))
	t.want(0, unix.Rmdir("../inner"))
	equal(t, "links", t.fstat(fd).Nlink, 0)
	equal(t, "links of .", t.lstat(".").Nlink, 0)
	_, err := unix.Getcwd(make([]byte, 4096))
	t.want(unix.ENOENT, err)
	for _, c := range pathCalls {
		if c.makes && c.name != "link to" && c.name != "rename to" {
			t.row("%s in it", c.name)
			t.want(unix.ENOENT, c.call("new"))
		}
	}
	t.row("in it")
	t.must(unix.Chdir("."))
	t.want(unix.ENOENT, unix.Stat("there", new(unix.Stat_t)))
	t.wantAny(openClose(".", unix.O_TMPFILE|unix.O_RDWR, 0o644), unix.ENOENT, unix.EPERM)
	entries, err := listSome(fd, 4096)
	t.wantAny(err, 0, unix.ENOENT)
	equal(t, "entries", len(entries), 0)
	t.want(0, unix.Fchmod(fd, 0o700))
	t.want(0, unix.Fsetxattr(fd, "user.a", []byte("v"), 0))
	t.want(0, unix.Fsync(fd))
	equal(t, "links of the parent", t.lstat("..").Nlink, 2)
}

func unlinkedOpen(t *T) {
	for _, how := range []string{"unlinked", "replaced"} {
		t.row("%s", how)
		t.file("file", "content")
		fd := t.open("file", unix.O_RDWR, 0)
		if how == "unlinked" {
			t.want(0, unix.Unlink("file"))
		} else {
			t.file("other", "")
			t.want(0, unix.Rename("other", "file"))
		}
		st := t.fstat(fd)
		equal(t, "links", st.Nlink, 0)
		equal(t, "size", st.Size, 7)
		_, err := unix.Pwrite(fd, []byte("CON"), 0)
		t.want(0, err)
		t.want(0, unix.Ftruncate(fd, 5))
		t.want(0, unix.Fallocate(fd, 0, 0, 100))
		t.want(0, unix.Fchmod(fd, 0o600))
		t.want(0, unix.Fsetxattr(fd, "user.a", []byte("v"), 0))
		t.want(0, unix.Fsync(fd))
		t.want(0, unix.Futimes(fd, []unix.Timeval{{Sec: 5}, {Sec: 6}}))
		equal(t, "mtime", t.fstat(fd).Mtim.Sec, 6)
		equal(t, "links", t.fstat(fd).Nlink, 0)
		buf := make([]byte, 200)
		n, err := unix.Pread(fd, buf, 0)
		t.want(0, err)
		equal(t, "content", string(buf[:max(n, 0)]), "CONte"+string(make([]byte, 95)))
		again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		t.want(0, err)
		n, err = unix.Pread(again, buf, 0)
		t.want(0, err)
		equal(t, "bytes by another descriptor", n, 100)
		t.close(again)
		t.close(fd)
	}
}
