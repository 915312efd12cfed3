package conformance

import (
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

func permissionCases() []testCase {
	return []testCase{
		{op: "permissions", name: "files: every mode, for owner, group, supplementary group, others and root", others: true, run: fileBits},
		{op: "permissions", name: "directories: every mode, for owner, group, supplementary group, others and root", others: true, run: directoryBits},
		{op: "permissions", name: "the owner's own files: every mode", run: ownBits},
		{op: "permissions", name: "execution needs an x bit, of root too", others: true, run: execution},
	}
}

// party is a caller, and the class of permission bits that counts for the caller. The object is bob's, of group 31001.
var parties = []struct {
	who   user
	shift int
}{
	{bob, 6},   // owner
	{alice, 3}, // by group
	{carol, 3}, // by supplementary group
	{user{"dave", 31004, 31004, nil}, 0},
}

// fileBits checks every mode of a file: of the caller's class each value, of the other classes the opposite.
func fileBits(t *T) {
	t.must(unix.Chmod(".", 0o777))
	t.file("file", "content")
	t.must(unix.Chown("file", bob.uid, alice.gid))
	for _, p := range parties {
		for bits := range mode(8) {
			m := mode(0o777)&^(7<<p.shift) | bits<<p.shift
			t.must(unix.Chmod("file", uint32(m)))
			t.row("%s, mode %#o", p.who.name, uint32(m))
			t.must(t.as(p.who, func() error { bitsAllow(t, "file", bits); return nil }))
		}
	}
	t.must(unix.Chmod("file", 0))
	t.row("root")
	bitsAllow(t, "file", 6)
}

// bitsAllow checks what a caller with these bits may do with a file.
func bitsAllow(t *T, name string, bits mode) {
	allowed := func(needed mode) syscall.Errno {
		if bits&needed != needed {
			return unix.EACCES
		}
		return 0
	}
	t.want(allowed(4), openClose(name, unix.O_RDONLY, 0))
	t.want(allowed(2), openClose(name, unix.O_WRONLY, 0))
	t.want(allowed(6), openClose(name, unix.O_RDWR, 0))
	t.want(allowed(6), openClose(name, unix.O_RDONLY|unix.O_TRUNC, 0))
	t.want(allowed(2), openClose(name, unix.O_WRONLY|unix.O_APPEND, 0))
	t.want(allowed(2), openClose(name, unix.O_WRONLY|unix.O_CREAT, 0o644))
	t.want(allowed(2), unix.Truncate(name, 3))
	for needed := range mode(8) {
		t.want(allowed(needed), unix.Faccessat(unix.AT_FDCWD, name, uint32(needed), unix.AT_EACCESS))
	}
	t.want(allowed(2), unix.Setxattr(name, "user.x", []byte("v"), 0))
	_, err := unix.Getxattr(name, "user.none", nil)
	if bits&4 == 0 {
		t.want(unix.EACCES, err)
	} else {
		t.want(unix.ENODATA, err)
	}
	t.want(0, openClose(name, unix.O_PATH, 0))
	t.want(0, unix.Lstat(name, new(unix.Stat_t)))
}

// directoryBits checks every mode of a directory for the calls that look into it and change it.
func directoryBits(t *T) {
	t.must(unix.Chmod(".", 0o777))
	t.mkdir("dir", 0o777)
	t.mkdir("dir/sub", 0o777)
	t.file("dir/there", "content")
	t.must(unix.Chmod("dir/there", 0o666))
	t.file("dir/file", "")
	t.mkdir("dir/empty", 0o777)
	for _, name := range []string{"dir", "dir/sub", "dir/there"} {
		t.must(unix.Chown(name, bob.uid, alice.gid))
	}
	for _, p := range parties {
		outside := "outside " + p.who.name
		t.file(outside, "content")
		t.own(outside, p.who, 0o644)
		for bits := range mode(8) {
			m := mode(0o777)&^(7<<p.shift) | bits<<p.shift
			t.must(unix.Chmod("dir", uint32(m)))
			t.row("%s, mode %#o", p.who.name, uint32(m))
			t.must(t.as(p.who, func() error { directoryAllows(t, outside, bits); return nil }))
		}
	}
	t.must(unix.Chmod("dir", 0))
	t.file("outside", "content")
	t.row("root")
	directoryAllows(t, "outside", 7)
}

// directoryAllows checks what a caller with these bits may do with "dir", which holds "there" and "sub".
func directoryAllows(t *T, outside string, bits mode) {
	allowed := func(needed mode) syscall.Errno {
		if bits&needed != needed {
			return unix.EACCES
		}
		return 0
	}
	t.want(allowed(4), openClose("dir", unix.O_RDONLY|unix.O_DIRECTORY, 0))
	t.want(allowed(1), unix.Lstat("dir/there", new(unix.Stat_t)))
	t.want(allowed(1), openClose("dir/there", unix.O_RDWR, 0))
	t.want(allowed(1), openClose("dir/sub", unix.O_RDONLY, 0))
	_, err := unix.Getxattr("dir/there", "user.none", nil)
	if bits&1 == 0 {
		t.want(unix.EACCES, err)
	} else {
		t.want(unix.ENODATA, err)
	}
	change := allowed(3)
	undo := func(err error) {
		if change == 0 {
			t.want(0, err)
		}
	}
	t.want(change, openClose("dir/new", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
	t.want(change, unix.Unlink("dir/file"))
	undo(unix.Rename("dir/new", "dir/file"))
	t.want(change, unix.Mkdir("dir/new", 0o755))
	t.want(change, unix.Rmdir("dir/empty"))
	undo(unix.Rename("dir/new", "dir/empty"))
	t.want(change, unix.Link("dir/there", "dir/linked"))
	undo(unix.Unlink("dir/linked"))
	t.want(change, unix.Symlink("target", "dir/new"))
	undo(unix.Unlink("dir/new"))
	t.want(change, unix.Mkfifo("dir/new", 0o644))
	undo(unix.Unlink("dir/new"))
	t.want(change, unix.Mknod("dir/new", unix.S_IFSOCK|0o644, 0))
	undo(unix.Unlink("dir/new"))
	t.want(change, unix.Rename("dir/there", "dir/renamed"))
	undo(unix.Rename("dir/renamed", "dir/there"))
	t.want(change, unix.Rename("dir/there", "out"))
	undo(unix.Rename("out", "dir/there"))
	t.want(change, unix.Rename(outside, "dir/moved"))
	undo(unix.Rename("dir/moved", outside))
	t.want(change, unix.Rename(outside, "dir/file"))
	undo(unix.Rename("dir/file", outside))
	undo(openClose("dir/file", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
	fd, err := unix.Open("dir", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
	t.want(change, err)
	undo(unix.Close(fd))
}

// A caller of no class but the file's own may be refused by its own file. Root is not.
func ownBits(t *T) {
	t.file("file", "content")
	for bits := range mode(8) {
		t.must(unix.Chmod("file", uint32(bits<<6|0o077&^(bits<<3|bits))))
		t.row("mode %o", uint32(bits))
		if t.base.uid == 0 {
			t.want(0, openClose("file", unix.O_RDWR, 0))
			continue
		}
		bitsAllow(t, "file", bits)
	}
	t.row("a file made without any bit")
	fd := t.open("bare", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0)
	_, err := unix.Write(fd, []byte("its maker may write"))
	t.want(0, err)
	t.want(0, unix.Ftruncate(fd, 3))
	t.close(fd)
	if t.base.uid != 0 {
		t.want(unix.EACCES, openClose("bare", unix.O_RDONLY, 0))
	}
}

func execution(t *T) {
	t.file("program", "#!/bin/true\n")
	for _, row := range []struct {
		mode                     mode
		root, owner, group, rest syscall.Errno
	}{
		{0o666, unix.EACCES, unix.EACCES, unix.EACCES, unix.EACCES},
		{0o766, 0, 0, unix.EACCES, unix.EACCES},
		{0o676, 0, unix.EACCES, 0, unix.EACCES},
		{0o667, 0, unix.EACCES, unix.EACCES, 0},
	} {
		t.own("program", alice, row.mode)
		for _, c := range []struct {
			who  user
			want syscall.Errno
		}{{root, row.root}, {alice, row.owner}, {carol, row.group}, {bob, row.rest}} {
			t.row("%s, mode %#o", c.who.name, uint32(row.mode))
			t.want(c.want, t.as(c.who, func() error { return unix.Faccessat(unix.AT_FDCWD, "program", unix.X_OK, unix.AT_EACCESS) }))
			t.want(c.want, run(t.dir, c.who, "./program"))
		}
	}
}

// run starts a program in a process of u's.
func run(dir string, u user, name string) error {
	cmd := exec.Command(name)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: u.credential()}
	return cmd.Run()
}
