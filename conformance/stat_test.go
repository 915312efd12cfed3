package conformance

import (
	"bytes"
	"fmt"

	"golang.org/x/sys/unix"
)

func statCases() []testCase {
	return []testCase{
		{op: "stat", name: "blocks count what is stored", run: func(t *T) {
			fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
			t.pwrite(fd, string(bytes.Repeat([]byte("x"), 1<<20)), 0)
			t.must(unix.Fsync(fd))
			t.that(t.fstat(fd).Blocks >= 2048 && t.fstat(fd).Blocks < 2300, "%d blocks of a MiB", t.fstat(fd).Blocks)
			t.want(0, unix.Fallocate(fd, punch, 0, 512<<10))
			t.that(t.fstat(fd).Blocks < 1300, "%d blocks after half was punched", t.fstat(fd).Blocks)
			t.that(t.fstat(fd).Blksize >= 512, "block size %d", t.fstat(fd).Blksize)
		}},
		{op: "stat", name: "statx: mask, birth time, flags", run: func(t *T) {
			t.file("file", "content")
			st := t.statx("file")
			t.that(st.Mask&(unix.STATX_BASIC_STATS|unix.STATX_BTIME) == unix.STATX_BASIC_STATS|unix.STATX_BTIME, "mask %#x", st.Mask)
			birth := st.Btime
			t.tick()
			t.must(unix.Chmod("file", 0o600))
			t.file("file", "other")
			t.must(utimens("file", &[2]unix.Timespec{at(1), at(2)}))
			t.must(unix.Rename("file", "renamed"))
			equal(t, "birth time", t.statx("renamed").Btime, birth)
			equal(t, "size", st.Size, 7)
			equal(t, "inode", st.Ino, t.lstat("renamed").Ino)
			var forced unix.Statx_t
			t.want(0, unix.Statx(unix.AT_FDCWD, "renamed", unix.AT_STATX_FORCE_SYNC, unix.STATX_ALL, &forced))
			t.want(0, unix.Statx(unix.AT_FDCWD, "renamed", unix.AT_STATX_DONT_SYNC, unix.STATX_ALL, &forced))
			t.want(unix.EINVAL, unix.Statx(unix.AT_FDCWD, "renamed", unix.AT_STATX_FORCE_SYNC|unix.AT_STATX_DONT_SYNC, unix.STATX_ALL, &forced))
			t.want(unix.EINVAL, unix.Statx(unix.AT_FDCWD, "renamed", 0, 1<<31, &forced))
		}},
		{op: "stat", name: "a link and what it points to", run: func(t *T) {
			t.file("file", "content")
			t.must(unix.Symlink("file", "link"))
			var st unix.Stat_t
			t.want(0, unix.Stat("link", &st))
			equal(t, "inode", st.Ino, t.lstat("file").Ino)
			t.that(t.lstat("link").Ino != st.Ino, "a link is its target")
			x := t.statx("link")
			equal(t, "mode by statx", mode(x.Mode), unix.S_IFLNK|0o777)
			equal(t, "size by statx", x.Size, 4)
		}},
		{op: "statfs", name: "figures", run: func(t *T) {
			var st unix.Statfs_t
			t.must(unix.Statfs(".", &st))
			t.that(st.Bsize > 0 && st.Frsize > 0, "block sizes %d, %d", st.Bsize, st.Frsize)
			t.that(st.Blocks >= st.Bfree && st.Bfree >= st.Bavail && st.Bavail > 0, "blocks %d, free %d, available %d", st.Blocks, st.Bfree, st.Bavail)
			t.that(st.Files >= st.Ffree && st.Ffree > 0, "files %d, free %d", st.Files, st.Ffree)
			equal(t, "longest name", st.Namelen, 255)
			fd := t.openDir()
			var same unix.Statfs_t
			t.want(0, unix.Fstatfs(fd, &same))
			equal(t, "type by descriptor", same.Type, st.Type)
		}},
		{op: "atime", name: "a first read sets it, more within a day do not", run: func(t *T) {
			t.must(unix.Symlink("target", "link"))
			before := t.stamps("link").atime
			t.tick()
			for range 2 {
				_, err := unix.Readlink("link", make([]byte, 10))
				t.want(0, err)
			}
			after := t.stamps("link").atime
			t.that(after > before, "atime of a link is not changed by readlink")
			t.must(utimens("link", &[2]unix.Timespec{at(1e9), at(1e9 - 1)}))
		}},
		{op: "atime", name: "a read from the page cache sets it", forced: "the kernel answers from its own pages and tells the filesystem nothing", run: func(t *T) {
			t.file("file", "content")
			before := t.stamps("file").atime
			t.tick()
			t.content("file")
			t.that(t.stamps("file").atime > before, "not changed")
		}},
		{op: "file handles", name: "by number, after the name has changed", root: true, run: handles},
		{op: "open files", name: "a thousand at a time", run: func(t *T) {
			for i := range 1000 {
				fd := t.open(fmt.Sprint(i), unix.O_CREAT|unix.O_RDWR, 0o644)
				t.pwrite(fd, fmt.Sprint(i), 0)
				t.must(unix.Unlink(fmt.Sprint(i)))
			}
			for i, fd := range t.fds {
				equal(t, "content", t.pread(fd, 10, 0), fmt.Sprint(i))
			}
		}},
	}
}

// handles: what open_by_handle_at and NFS servers do.
func handles(t *T) {
	t.file("file", "content")
	t.mkdir("dir", 0o755)
	h, mountID, err := unix.NameToHandleAt(unix.AT_FDCWD, "file", 0)
	t.want(0, err)
	if err != nil {
		return
	}
	_ = mountID
	t.must(unix.Rename("file", "dir/moved"))
	fd, err := unix.OpenByHandleAt(t.openDir(), h, unix.O_RDONLY)
	t.want(0, err)
	if err == nil {
		equal(t, "content", t.pread(fd, 10, 0), "content")
		t.must(unix.Close(fd))
	}
	t.must(unix.Unlink("dir/moved"))
	_, err = unix.OpenByHandleAt(t.openDir(), h, unix.O_RDONLY)
	t.want(unix.ESTALE, err)
	h, _, err = unix.NameToHandleAt(unix.AT_FDCWD, "dir", 0)
	t.want(0, err)
	fd, err = unix.OpenByHandleAt(t.openDir(), h, unix.O_RDONLY|unix.O_DIRECTORY)
	t.want(0, err)
	if err == nil {
		equal(t, "inode", t.fstat(fd).Ino, t.lstat("dir").Ino)
		t.must(unix.Close(fd))
	}
}
