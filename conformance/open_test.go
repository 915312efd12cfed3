package conformance

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

func openCases() []testCase {
	return []testCase{
		{op: "open", name: "flags by type of file", run: openFlags},
		{op: "open", name: "O_CREAT: times and modes of what is there already", run: openExisting},
		{op: "open", name: "O_TRUNC", run: openTrunc},
		{op: "open", name: "O_APPEND", run: openAppend},
		{op: "open", name: "O_TMPFILE and linkat", run: tmpfile},
		{op: "open", name: "O_TMPFILE with O_EXCL cannot be linked", run: tmpfileExclusive},
		{op: "open", name: "O_PATH", run: openPath},
		{op: "open", name: "O_NOATIME is for the owner", others: true, run: openNoAtime},
		{op: "open", name: "O_DIRECT", run: openDirect},
		{op: "open", name: "a program that runs cannot be written", run: textBusy},
		{op: "open", name: "reads and writes want the right descriptor", run: wrongDescriptors},
	}
}

func openFlags(t *T) {
	for _, k := range t.kinds() {
		if k.mode != unix.S_IFLNK {
			t.must(k.make(k.name))
		}
	}
	t.must(unix.Symlink("file", "link"))
	t.must(unix.Symlink("directory", "dirlink"))
	for _, row := range []struct {
		name  string
		flags int
		want  syscall.Errno
	}{
		{"directory", unix.O_RDONLY, 0},
		{"directory", unix.O_WRONLY, unix.EISDIR},
		{"directory", unix.O_RDWR, unix.EISDIR},
		{"directory", unix.O_RDONLY | unix.O_TRUNC, unix.EISDIR},
		{"directory", unix.O_RDONLY | unix.O_CREAT, unix.EISDIR},
		{"directory", unix.O_WRONLY | unix.O_CREAT, unix.EISDIR},
		{"directory", unix.O_RDONLY | unix.O_CREAT | unix.O_DIRECTORY, unix.EINVAL},
		{"directory", unix.O_RDONLY | unix.O_CREAT | unix.O_EXCL, unix.EEXIST},
		{"directory", unix.O_RDONLY | unix.O_DIRECTORY, 0},
		{"file", unix.O_RDONLY | unix.O_DIRECTORY, unix.ENOTDIR},
		{"file", unix.O_RDWR | unix.O_CREAT, 0},
		{"file", unix.O_RDWR | unix.O_CREAT | unix.O_EXCL, unix.EEXIST},
		{"file", unix.O_RDONLY | unix.O_NOFOLLOW, 0},
		{"file", unix.O_RDWR | unix.O_SYNC, 0},
		{"file", unix.O_RDWR | unix.O_DSYNC, 0},
		{"link", unix.O_RDONLY | unix.O_NOFOLLOW, unix.ELOOP},
		{"link", unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_DIRECTORY, unix.ENOTDIR},
		{"link", unix.O_WRONLY | unix.O_CREAT | unix.O_NOFOLLOW, unix.ELOOP},
		{"link", unix.O_RDWR | unix.O_CREAT | unix.O_EXCL, unix.EEXIST},
		{"dirlink", unix.O_RDONLY | unix.O_DIRECTORY, 0},
		{"dirlink", unix.O_WRONLY, unix.EISDIR},
		{"fifo", unix.O_RDONLY, 0},
		{"fifo", unix.O_WRONLY, unix.ENXIO},
		{"fifo", unix.O_RDWR, 0},
		{"fifo", unix.O_RDONLY | unix.O_DIRECTORY, unix.ENOTDIR},
		{"fifo", unix.O_RDONLY | unix.O_CREAT, 0},
		{"fifo", unix.O_RDWR | unix.O_CREAT | unix.O_EXCL, unix.EEXIST},
		{"socket", unix.O_RDONLY, unix.ENXIO},
		{"socket", unix.O_RDWR | unix.O_CREAT, unix.ENXIO},
		{".", unix.O_TMPFILE | unix.O_RDONLY, unix.EINVAL},
		{"file", unix.O_TMPFILE | unix.O_RDWR, unix.ENOTDIR},
		{"missing", unix.O_TMPFILE | unix.O_RDWR, unix.ENOENT},
		{"missing", unix.O_RDONLY | unix.O_EXCL, unix.ENOENT},
	} {
		t.row("%s, flags %#o", row.name, row.flags)
		t.want(row.want, openClose(row.name, row.flags, 0o644))
	}
}

func openExisting(t *T) {
	t.mkdir("dir", 0o755)
	t.file("dir/file", "content")
	t.must(unix.Chmod("dir/file", 0o640))
	t.changes("dir", "", func() error { return openClose("dir/file", unix.O_CREAT|unix.O_RDWR, 0o777) })
	t.changes("dir/file", "", func() error { return openClose("dir/file", unix.O_CREAT|unix.O_RDWR, 0o777) })
	equal(t, "mode", t.permissions("dir/file"), 0o640)
	equal(t, "content", t.content("dir/file"), "content")
}

func openTrunc(t *T) {
	t.file("file", "content")
	t.changes("file", "mc", func() error { return openClose("file", unix.O_WRONLY|unix.O_TRUNC, 0) })
	equal(t, "size", t.lstat("file").Size, 0)
	t.changes("file", "mc", func() error { return openClose("file", unix.O_WRONLY|unix.O_TRUNC|unix.O_CREAT, 0o600) })
	equal(t, "mode", t.permissions("file"), 0o644)
	fd := t.open("file", unix.O_RDWR, 0)
	_, err := unix.Write(fd, []byte("written before the cut"))
	t.must(err)
	t.want(0, openClose("file", unix.O_RDWR|unix.O_TRUNC, 0))
	_, err = unix.Write(fd, []byte("after"))
	t.want(0, err)
	equal(t, "content", t.content("file"), string(make([]byte, 22))+"after")
}

func openAppend(t *T) {
	t.file("file", "one")
	a := t.open("file", unix.O_WRONLY|unix.O_APPEND, 0)
	b := t.open("file", unix.O_WRONLY|unix.O_APPEND, 0)
	for i, fd := range []int{a, b, b, a} {
		_, err := unix.Pwrite(fd, []byte(fmt.Sprint(i)), 0) // Linux appends here too
		t.want(0, err)
	}
	_, err := unix.Write(a, []byte("!"))
	t.want(0, err)
	equal(t, "content", t.content("file"), "one0123!")
	off, err := unix.Seek(a, 0, unix.SEEK_CUR)
	t.want(0, err)
	equal(t, "offset", off, 8)
	t.must(unix.Truncate("file", 2))
	_, err = unix.Write(b, []byte("X"))
	t.want(0, err)
	equal(t, "content", t.content("file"), "onX")
}

func tmpfile(t *T) {
	t.mkdir("dir", 0o755)
	before := t.stamps("dir").mtime
	fd := t.open("dir", unix.O_TMPFILE|unix.O_RDWR, 0o640)
	st := t.fstat(fd)
	equal(t, "links", st.Nlink, 0)
	equal(t, "mode", mode(st.Mode), unix.S_IFREG|0o640)
	equal(t, "owner", st.Uid, uint32(t.base.uid))
	equal(t, "entries", len(t.list("dir")), 2)
	_, err := unix.Write(fd, []byte("content"))
	t.want(0, err)
	t.want(0, unix.Fchmod(fd, 0o600))
	t.want(0, unix.Fsetxattr(fd, "user.a", []byte("v"), 0))
	equal(t, "mtime of the directory", t.stamps("dir").mtime, before)
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	t.want(0, unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, "dir/named", unix.AT_SYMLINK_FOLLOW))
	equal(t, "links", t.fstat(fd).Nlink, 1)
	equal(t, "content", t.content("dir/named"), "content")
	equal(t, "inode", t.lstat("dir/named").Ino, st.Ino)
	t.want(unix.EEXIST, unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, "dir/named", unix.AT_SYMLINK_FOLLOW))
	t.want(0, unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, "dir/again", unix.AT_SYMLINK_FOLLOW))
	equal(t, "links", t.fstat(fd).Nlink, 2)
	t.want(0, unix.Unlink("dir/named"))
	t.want(0, unix.Unlink("dir/again"))
	equal(t, "links", t.fstat(fd).Nlink, 0)
	t.want(unix.ENOENT, unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, "dir/named", unix.AT_SYMLINK_FOLLOW))
}

func tmpfileExclusive(t *T) {
	fd := t.open(".", unix.O_TMPFILE|unix.O_RDWR|unix.O_EXCL, 0o640)
	t.want(unix.ENOENT, unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, "named", unix.AT_SYMLINK_FOLLOW))
}

func openPath(t *T) {
	t.file("file", "content")
	t.must(unix.Symlink("file", "link"))
	fd := t.open("file", unix.O_PATH, 0)
	_, err := unix.Read(fd, make([]byte, 1))
	t.want(unix.EBADF, err)
	_, err = unix.Write(fd, []byte("x"))
	t.want(unix.EBADF, err)
	t.want(unix.EBADF, unix.Fchmod(fd, 0o600))
	t.want(unix.EBADF, unix.Fchown(fd, -1, -1))
	t.want(unix.EBADF, unix.Fsetxattr(fd, "user.a", nil, 0))
	t.want(unix.EBADF, unix.Ftruncate(fd, 0))
	equal(t, "size", t.fstat(fd).Size, 7)
	var st unix.Stat_t
	t.want(0, unix.Fstatat(fd, "", &st, unix.AT_EMPTY_PATH))
	link := t.open("link", unix.O_PATH|unix.O_NOFOLLOW, 0)
	equal(t, "type", mode(t.fstat(link).Mode&unix.S_IFMT), mode(unix.S_IFLNK))
	buf := make([]byte, 10)
	n, err := unix.Readlinkat(link, "", buf)
	t.want(0, err)
	equal(t, "target", string(buf[:max(n, 0)]), "file")
	if t.base.uid == 0 {
		t.want(0, unix.Fchownat(link, "", 0, 0, unix.AT_EMPTY_PATH))
		t.want(0, unix.Linkat(fd, "", unix.AT_FDCWD, "second", unix.AT_EMPTY_PATH))
		equal(t, "links", t.fstat(fd).Nlink, 2)
	}
}

func openNoAtime(t *T) {
	t.file("file", "content")
	t.own("file", alice, 0o666)
	t.want(0, t.as(alice, func() error { return openClose("file", unix.O_RDONLY|unix.O_NOATIME, 0) }))
	t.want(unix.EPERM, t.as(bob, func() error { return openClose("file", unix.O_RDONLY|unix.O_NOATIME, 0) }))
	t.want(0, openClose("file", unix.O_RDONLY|unix.O_NOATIME, 0))
}

func openDirect(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o644)
	buf := aligned(1<<20, 'd')
	n, err := unix.Pwrite(fd, buf, 4096)
	t.want(0, err)
	equal(t, "written", n, len(buf))
	t.changes("file", "mc", func() error { _, err := unix.Pwrite(fd, buf[:4096], 0); return err })
	in := aligned(2<<20, 0)
	n, err = unix.Pread(fd, in, 4096)
	t.want(0, err)
	equal(t, "read", n, len(buf))
	t.that(string(in[:max(n, 0)]) == string(buf[:max(n, 0)]), "the bytes differ")
	n, err = unix.Pread(fd, in[:4096], 1<<30)
	t.want(0, err)
	equal(t, "read past the end", n, 0)
	t.want(0, unix.Ftruncate(fd, 5000))
	n, err = unix.Pread(fd, in[:8192], 0)
	t.want(0, err)
	equal(t, "read to the end", n, 5000)
	// What one descriptor writes around the cache, another reads through it, and the other way round.
	cached := t.open("file", unix.O_RDWR, 0)
	_, err = unix.Pread(cached, make([]byte, 5000), 0)
	t.must(err)
	_, err = unix.Pwrite(fd, aligned(4096, 'n'), 0)
	t.want(0, err)
	one := make([]byte, 1)
	_, err = unix.Pread(cached, one, 17)
	t.want(0, err)
	equal(t, "through the cache", one[0], 'n')
	_, err = unix.Pwrite(cached, []byte("c"), 17)
	t.want(0, err)
	_, err = unix.Pread(fd, in[:4096], 0)
	t.want(0, err)
	equal(t, "around the cache", in[17], 'c')
}

// aligned returns n bytes at an address that O_DIRECT takes.
func aligned(n int, fill byte) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err) // out of memory
	}
	for i := range b {
		b[i] = fill
	}
	return b
}

func wrongDescriptors(t *T) {
	t.file("file", "content")
	t.mkdir("dir", 0o755)
	r := t.open("file", unix.O_RDONLY, 0)
	w := t.open("file", unix.O_WRONLY, 0)
	d := t.open("dir", unix.O_RDONLY, 0)
	_, err := unix.Write(r, []byte("x"))
	t.want(unix.EBADF, err)
	_, err = unix.Read(w, make([]byte, 1))
	t.want(unix.EBADF, err)
	_, err = unix.Read(d, make([]byte, 1))
	t.want(unix.EISDIR, err)
	_, err = unix.Pread(d, make([]byte, 1), 0)
	t.want(unix.EISDIR, err)
	_, err = unix.Write(d, []byte("x"))
	t.want(unix.EBADF, err)
	t.want(unix.EINVAL, unix.Ftruncate(r, 1))
	t.want(unix.EINVAL, unix.Ftruncate(d, 1))
	t.want(unix.EBADF, unix.Fallocate(r, 0, 0, 10))
	t.want(unix.EBADF, unix.Fallocate(d, 0, 0, 10))
	_, err = unix.Getdents(r, make([]byte, 4096))
	t.want(unix.ENOTDIR, err)
	t.want(unix.ENOTDIR, unix.Fchdir(r))
	t.want(0, unix.Fsync(r))
	t.want(0, unix.Fdatasync(w))
	t.want(0, unix.Fsync(d))
	t.want(0, unix.Fdatasync(d))
	t.want(0, unix.Syncfs(r))
	_, err = unix.Pread(r, make([]byte, 1), -1)
	t.want(unix.EINVAL, err)
	_, err = unix.Pwrite(w, []byte("x"), -1)
	t.want(unix.EINVAL, err)
	_, err = unix.Seek(r, -1, unix.SEEK_SET)
	t.want(unix.EINVAL, err)
	_, err = unix.Seek(r, 0, 77)
	t.want(unix.EINVAL, err)
	_, err = unix.IoctlGetInt(r, unix.FS_IOC_GETFLAGS)
	t.wantAny(err, 0, unix.ENOTTY, unix.EOPNOTSUPP)
	_, err = unix.IoctlGetInt(r, 0x12345678)
	t.want(unix.ENOTTY, err)
	for _, fd := range []int{r, w, d} {
		t.close(fd)
	}
	t.want(unix.EBADF, unix.Close(r))
}

// textBusy runs a program of the directory's own: a copy of cat, which waits for its input to end.
func textBusy(t *T) {
	t.must(copyFile("/bin/cat", "program", 0o755))
	p := exec.Command("./program")
	p.Dir = t.dir
	input, err := p.StdinPipe()
	t.must(err)
	t.must(p.Start())
	t.want(unix.ETXTBSY, openClose("program", unix.O_WRONLY, 0))
	t.want(unix.ETXTBSY, openClose("program", unix.O_RDWR, 0))
	t.want(unix.ETXTBSY, openClose("program", unix.O_RDONLY|unix.O_TRUNC, 0))
	t.want(unix.ETXTBSY, unix.Truncate("program", 0))
	t.want(0, openClose("program", unix.O_RDONLY, 0))
	t.want(0, unix.Rename("program", "renamed"))
	t.want(0, unix.Unlink("renamed"))
	t.must(input.Close())
	t.want(0, p.Wait())

	t.must(copyFile("/bin/cat", "program", 0o755))
	fd := t.open("program", unix.O_WRONLY, 0)
	t.want(unix.ETXTBSY, run(t.dir, t.base, "./program"))
	t.close(fd)
}

func copyFile(from, to string, m mode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, os.FileMode(m))
}
