package conformance

import (
	"golang.org/x/sys/unix"
)

func linkCases() []testCase {
	out := []testCase{
		{op: "link", name: "a directory has one name", run: func(t *T) {
			t.mkdir("dir", 0o755)
			t.want(unix.EPERM, unix.Link("dir", "second"))
		}},
		{op: "link", name: "onto a name that is taken", run: func(t *T) {
			t.file("file", "")
			for _, k := range t.kinds() {
				t.row("%s", k.name)
				t.must(unix.Link("file", "source"))
				t.must(k.make("taken"))
				t.want(unix.EEXIST, unix.Link("source", "taken"))
				t.want(unix.EEXIST, unix.Link("source", "source"))
				t.must(unix.Unlink("source"))
				t.must(unix.Rename("taken", k.name+" done"))
			}
		}},
		{op: "link", name: "links are followed when asked", run: func(t *T) {
			t.file("file", "")
			t.must(unix.Symlink("file", "link"))
			t.want(0, unix.Linkat(unix.AT_FDCWD, "link", unix.AT_FDCWD, "to link", 0))
			equal(t, "type", mode(t.lstat("to link").Mode&unix.S_IFMT), mode(unix.S_IFLNK))
			t.want(0, unix.Linkat(unix.AT_FDCWD, "link", unix.AT_FDCWD, "to file", unix.AT_SYMLINK_FOLLOW))
			equal(t, "inode", t.lstat("to file").Ino, t.lstat("file").Ino)
			t.want(unix.EINVAL, unix.Linkat(unix.AT_FDCWD, "link", unix.AT_FDCWD, "x", 1<<30))
		}},
		{op: "link", name: "across filesystems", run: func(t *T) {
			t.file("file", "")
			t.want(unix.EXDEV, unix.Link("file", "/dev/shm/defs-conformance"))
			t.want(unix.EXDEV, unix.Rename("file", "/dev/shm/defs-conformance"))
			t.want(unix.EXDEV, unix.Link("/proc/self/status", "x"))
		}},
		{op: "link", name: "a thousand names of one file", run: func(t *T) {
			t.file("file", "content")
			for i := range 1000 {
				t.must(unix.Link("file", "name"+string(rune(0x4e00+i))))
			}
			equal(t, "links", t.lstat("file").Nlink, 1001)
			t.want(0, unix.Unlink("file"))
			equal(t, "links", t.lstat("name一").Nlink, 1000)
			equal(t, "content", t.content("name一"), "content")
		}},
	}
	for _, k := range kinds {
		if k.mode != unix.S_IFDIR {
			out = append(out, testCase{op: "link", name: k.name + ": counts, times, one inode", root: k.root, run: k.linked})
		}
	}
	return out
}

func (k kind) linked(t *T) {
	t.mkdir("dir", 0o755)
	t.must(k.make("one"))
	t.changes("dir", "mc", func() error { return unix.Link("one", "dir/two") })
	t.changes("one", "c", func() error { return unix.Link("one", "three") })
	one := t.lstat("one")
	equal(t, "links", one.Nlink, 3)
	for _, name := range []string{"dir/two", "three"} {
		st := t.lstat(name)
		equal(t, "inode of "+name, st.Ino, one.Ino)
		equal(t, "links of "+name, st.Nlink, 3)
		equal(t, "mode of "+name, mode(st.Mode), mode(one.Mode))
		equal(t, "times of "+name, stampsOf(st), stampsOf(one))
	}
	if k.mode != unix.S_IFLNK {
		t.want(0, unix.Chmod("three", 0o601))
		equal(t, "mode by another name", t.permissions("one"), 0o601)
	}
	t.changes("three", "c", func() error { return unix.Unlink("one") })
	t.changes("three", "c", func() error { return unix.Unlink("dir/two") })
	equal(t, "links", t.lstat("three").Nlink, 1)
	t.want(0, unix.Rename("three", "four"))
	t.want(0, unix.Unlink("four"))
	t.want(unix.ENOENT, unix.Link("four", "five"))
}
