package conformance

import (
	"fmt"
	"net"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func makeCases() []testCase {
	out := []testCase{
		{op: "mknod", name: "device numbers", root: true, run: deviceNumbers},
		{op: "mknod", name: "only root makes devices", run: devicesForRoot},
		{op: "mknod", name: "types that there are not", run: func(t *T) {
			t.want(unix.EPERM, unix.Mknod("x", unix.S_IFDIR|0o755, 0))
			t.want(unix.EINVAL, unix.Mknod("x", unix.S_IFLNK|0o755, 0))
			t.want(unix.EINVAL, unix.Mknod("x", 0o170000, 0))
			t.want(0, unix.Mknod("x", 0o644, 0)) // without a type: a file
			equal(t, "mode", mode(t.lstat("x").Mode), unix.S_IFREG|0o644)
		}},
		{op: "mknod", name: "a bound socket", run: boundSocket},
		{op: "mknod", name: "a fifo carries bytes", run: fifo},
		{op: "symlink", name: "targets of 1 to 4,095 bytes", run: targets},
		{op: "symlink", name: "what a link is not", run: linkNature},
	}
	for _, k := range kinds {
		out = append(out,
			testCase{op: "make", name: k.name + ": mode, owner, link counts, times", root: k.root, run: k.made},
			testCase{op: "make", name: k.name + ": a name that is taken by any kind", root: k.root, run: k.taken},
			testCase{op: "make", name: k.name + ": set-group-ID directories lend their group", others: true, run: k.inheritsGroup},
		)
		if k.mode != unix.S_IFLNK {
			out = append(out, testCase{op: "make", name: k.name + ": umask", root: k.root, run: k.umask})
		}
	}
	return out
}

func (k kind) made(t *T) {
	t.mkdir("dir", 0o755)
	links := t.lstat("dir").Nlink
	t.changes("dir", "mc", func() error { return k.make("dir/x") })
	st := t.lstat("dir/x")
	equal(t, "type", mode(st.Mode&unix.S_IFMT), mode(k.mode))
	equal(t, "owner", st.Uid, uint32(t.base.uid))
	equal(t, "group", st.Gid, uint32(t.base.gid))
	dir := t.lstat("dir")
	if k.mode == unix.S_IFDIR {
		equal(t, "links", st.Nlink, 2)
		equal(t, "links of the parent", dir.Nlink, links+1)
	} else {
		equal(t, "links", st.Nlink, 1)
		equal(t, "links of the parent", dir.Nlink, links)
		if k.mode != unix.S_IFLNK {
			equal(t, "size", st.Size, 0)
		}
	}
	at := stampsOf(st)
	t.that(at.atime == at.mtime && at.mtime == at.ctime, "times differ: %+v", at)
	t.that(at.ctime >= stampsOf(dir).ctime-int64(1e9) && at.ctime <= stampsOf(dir).ctime+int64(1e9), "made far from its parent's change")
	birth := t.statx("dir/x")
	t.that(birth.Mask&unix.STATX_BTIME != 0, "no birth time")
	equal(t, "birth time", birth.Btime.Sec*1e9+int64(birth.Btime.Nsec), at.ctime)
	t.that(st.Ino != 0 && st.Ino != dir.Ino && st.Dev == dir.Dev, "inode number or device")
}

func (t *T) statx(name string) *unix.Statx_t {
	var st unix.Statx_t
	t.must(unix.Statx(unix.AT_FDCWD, name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st))
	return &st
}

func (k kind) taken(t *T) {
	for _, other := range t.kinds() {
		t.row("over a %s", other.name)
		t.must(other.make(other.name))
		before := t.stamps(".")
		t.tick()
		t.want(unix.EEXIST, k.make(other.name))
		equal(t, "times of the parent", t.stamps("."), before)
		equal(t, "type", mode(t.lstat(other.name).Mode&unix.S_IFMT), mode(other.mode))
	}
}

func (k kind) umask(t *T) {
	for _, row := range []struct{ mask, asked, want mode }{
		{0, 0o777, 0o777}, {0, 0o151, 0o151}, {0o077, 0o151, 0o100}, {0o070, 0o345, 0o305}, {0o501, 0o345, 0o244}, {0o777, 0o777, 0},
		{0o022, 0o1777, 0o1755}, {0o022, 0o666, 0o644},
	} {
		name := fmt.Sprintf("x%o-%o", uint32(row.mask), uint32(row.asked))
		t.row("umask %o, mode %o", uint32(row.mask), uint32(row.asked))
		unix.Umask(int(row.mask))
		var err error
		switch k.mode {
		case unix.S_IFREG:
			err = openClose(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, row.asked)
		case unix.S_IFDIR:
			err = unix.Mkdir(name, uint32(row.asked))
		default:
			err = unix.Mknod(name, k.mode|uint32(row.asked), int(unix.Mkdev(1, 3)))
		}
		unix.Umask(0)
		t.must(err)
		equal(t, "mode", t.permissions(name), row.want)
	}
}

// inheritsGroup: the group of a directory with the set-group-ID bit goes on, and to directories the bit as well.
func (k kind) inheritsGroup(t *T) {
	t.mkdir("dir", 0o777)
	t.must(unix.Chown("dir", bob.uid, team))
	t.must(unix.Chmod("dir", 0o2777))
	for _, u := range []user{root, alice, bob} {
		if k.root && u.uid != 0 {
			continue
		}
		t.row("made by %s", u.name)
		name := "dir/" + u.name
		t.want(0, t.as(u, func() error { return k.make(name) }))
		st := t.lstat(name)
		equal(t, "owner", st.Uid, uint32(u.uid))
		equal(t, "group", st.Gid, team)
		want := mode(0)
		if k.mode == unix.S_IFDIR {
			want = 0o2000
		}
		equal(t, "set-group-ID", mode(st.Mode&0o2000), want)
	}
	// A file with set-group-ID and group execution keeps it only of members and root.
	if k.mode == unix.S_IFREG {
		for _, row := range []struct {
			who        user
			mode, want mode
		}{{root, 0o2775, 0o2775}, {alice, 0o2775, 0o2775}, {bob, 0o2775, 0o775}, {bob, 0o2765, 0o2765}, {bob, 0o2644, 0o2644}} {
			t.row("%s makes a file of mode %#o", row.who.name, uint32(row.mode))
			t.must(t.as(row.who, func() error {
				t.want(0, openClose("dir/file", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, row.mode))
				return nil
			}))
			equal(t, "mode", t.permissions("dir/file"), row.want)
			t.must(unix.Unlink("dir/file"))
		}
	}
}

func deviceNumbers(t *T) {
	for _, typ := range []uint32{unix.S_IFCHR, unix.S_IFBLK} {
		for _, n := range [][2]uint32{{0, 0}, {1, 3}, {1, 256}, {255, 255}, {256, 0}, {4095, 0xfffff}, {7, 0x10000}} {
			t.row("device %d:%d", n[0], n[1])
			t.want(0, unix.Mknod("dev", typ|0o640, int(unix.Mkdev(n[0], n[1]))))
			st := t.lstat("dev")
			equal(t, "major", unix.Major(st.Rdev), n[0])
			equal(t, "minor", unix.Minor(st.Rdev), n[1])
			x := t.statx("dev")
			equal(t, "major by statx", x.Rdev_major, n[0])
			equal(t, "minor by statx", x.Rdev_minor, n[1])
			equal(t, "mode", mode(st.Mode), mode(typ|0o640))
			t.must(unix.Unlink("dev"))
		}
	}
}

func devicesForRoot(t *T) {
	var want syscall.Errno
	if t.base.uid != 0 {
		want = unix.EPERM
	}
	t.want(want, unix.Mknod("c", unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3))))
	t.want(want, unix.Mknod("b", unix.S_IFBLK|0o644, int(unix.Mkdev(7, 0))))
}

func boundSocket(t *T) {
	l, err := net.Listen("unix", "socket")
	t.must(err)
	equal(t, "type", mode(t.lstat("socket").Mode&unix.S_IFMT), mode(unix.S_IFSOCK))
	c, err := net.Dial("unix", "socket")
	t.want(0, err)
	if err == nil {
		c.Close()
	}
	_, err = net.Listen("unix", "socket")
	t.want(unix.EADDRINUSE, err)
	t.want(unix.ENXIO, openClose("socket", unix.O_RDWR, 0))
	t.must(l.Close()) // takes the name away
	t.that(!exists("socket"), "the socket's name is still there")
}

func fifo(t *T) {
	t.must(unix.Mkfifo("fifo", 0o644))
	t.want(unix.ENXIO, openClose("fifo", unix.O_WRONLY, 0))
	r := t.open("fifo", unix.O_RDONLY|unix.O_NONBLOCK, 0)
	w := t.open("fifo", unix.O_WRONLY|unix.O_NONBLOCK, 0)
	_, err := unix.Write(w, []byte("through"))
	t.want(0, err)
	buf := make([]byte, 20)
	n, err := unix.Read(r, buf)
	t.want(0, err)
	equal(t, "what came through", string(buf[:max(n, 0)]), "through")
	_, err = unix.Seek(r, 0, unix.SEEK_SET)
	t.want(unix.ESPIPE, err)
	t.want(unix.EINVAL, unix.Truncate("fifo", 0))
	t.close(r)
	t.close(w)
}

func targets(t *T) {
	for _, n := range []int{1, 2, 59, 60, 61, 255, 256, 1023, 1024, 4094, 4095} {
		t.row("%d bytes", n)
		target := strings.Repeat("t/\xff", 1365)[:n]
		t.want(0, unix.Symlink(target, "link"))
		equal(t, "size", t.lstat("link").Size, int64(n))
		buf := make([]byte, 5000)
		got, err := unix.Readlink("link", buf)
		t.want(0, err)
		equal(t, "target", string(buf[:max(got, 0)]), target)
		if n > 2 {
			got, err = unix.Readlink("link", buf[:2])
			t.want(0, err)
			equal(t, "bytes of a short answer", got, 2)
		}
		t.must(unix.Unlink("link"))
	}
	t.row("too long and empty")
	t.want(unix.ENAMETOOLONG, unix.Symlink(strings.Repeat("t", 4096), "link"))
	t.want(unix.ENOENT, unix.Symlink("", "link"))
	_, err := unix.Readlink("link", make([]byte, 10))
	t.want(unix.ENOENT, err)
	t.file("file", "")
	_, err = unix.Readlink("file", make([]byte, 10))
	t.want(unix.EINVAL, err)
}

func linkNature(t *T) {
	t.file("file", "content")
	t.must(unix.Symlink("file", "link"))
	equal(t, "mode", mode(t.lstat("link").Mode), unix.S_IFLNK|0o777)
	t.want(unix.EOPNOTSUPP, unix.Fchmodat(unix.AT_FDCWD, "link", 0o600, unix.AT_SYMLINK_NOFOLLOW))
	t.want(0, unix.Chmod("link", 0o600))
	equal(t, "mode of the file", t.permissions("file"), 0o600)
	t.want(0, unix.Truncate("link", 3))
	equal(t, "content", t.content("file"), "con")
	t.want(unix.ENOTDIR, openClose("link", unix.O_RDONLY|unix.O_DIRECTORY, 0))
	t.want(unix.EEXIST, openClose("link", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
	t.must(unix.Symlink("made through it", "dangling"))
	t.want(unix.EEXIST, openClose("dangling", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
	t.want(unix.EEXIST, unix.Mkdir("dangling", 0o755))
	t.want(0, openClose("dangling", unix.O_CREAT|unix.O_WRONLY, 0o644))
	t.that(exists("made through it"), "nothing was made through the dangling link")
	t.want(0, unix.Unlink("link"))
	t.that(exists("file"), "unlink followed the link")
}
