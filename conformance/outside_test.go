package conformance

import (
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// outsideCases are what other suites look at: xfstests' generic group, LTP, fsx, fsstress, pjdfstest.
func outsideCases() []testCase {
	return []testCase{
		{op: "races", name: "O_EXCL, mkdir, symlink, link: one of eight wins", run: oneWins},
		{op: "races", name: "two rename one file to and fro: it is never gone, nor twice", run: renameRace},
		{op: "races", name: "an attribute is seen as one of its values", run: xattrRace},
		{op: "races", name: "getcwd while the directory is renamed", run: cwdRace},
		{op: "races", name: "stores of several threads through one mapping of a hole", run: holeRace},
		{op: "races", name: "appends and cuts: no byte that nobody wrote", run: appendAndCut},
		{op: "readdir", name: "ends while the entries are renamed", run: readdirRename},
		{op: "readdir", name: "buffers that are too small, rewinding sees what is new", run: readdirBuffers},
		{op: "readdir", name: "thousands of names come and go", run: readdirChurn},
		{op: "removed", name: "what an open directory without a name allows", run: openRemovedDirectory},
		{op: "removed", name: "what an open file without a name allows", run: removedFile},
		{op: "removed", name: "files and directories that a rename has replaced", run: replacedOpen},
		{op: "mmap", name: "written from and read into a mapping of the same file", run: mmapSelf},
		{op: "mmap", name: "around the cache into a mapping of the same file", run: mmapSelfDirect},
		{op: "mmap", name: "a page behind the end is no memory, and zeros when the file grows", run: mmapBus},
		{op: "mmap", name: "bytes behind the end do not come back by a write further on", forced: "stored through a mapping into the rest of the last page: the kernel's FUSE zeroes it when the file is cut, not when a write makes it longer", run: mmapGap},
		{op: "mmap", name: "MADV_REMOVE punches, MADV_DONTNEED keeps", run: mmapAdvice},
		{op: "write", name: "memory that cannot be read", run: writeFault},
		{op: "write", name: "sizes and offsets around pages", run: pageEdges},
		{op: "write", name: "zeros between the old end and a write behind it", run: behindEnd},
		{op: "open", name: "O_APPEND switched by fcntl", run: appendSwitch},
		{op: "open", name: "O_RDONLY with O_TRUNC cuts", run: truncReadOnly},
		{op: "open", name: "openat2: what may be resolved", run: resolve},
		{op: "open", name: "offsets are shared by dup, not by open", run: sharedOffsets},
		{op: "link", name: "more than a thousand names", run: manyLinks},
		{op: "make", name: "three hundred directories: links of the parent", run: manyDirectories},
		{op: "utimensat", name: "before 1970 and after 2038", run: farTimes},
		{op: "xattr", name: "names with a slash, spaces, bytes that are no text", run: oddNames},
		{op: "lseek", name: "one byte of data at the end of a hole", run: lastByte},
		{op: "advice", name: "fadvise, readahead, sync_file_range, FIONREAD", run: advice},
		{op: "fallocate", name: "more than there is room for", beyond: "the machine's own filesystem would be filled first", run: func(t *T) {
			fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
			var st unix.Statfs_t
			t.must(unix.Statfs(".", &st))
			t.want(unix.ENOSPC, unix.Fallocate(fd, 0, 0, int64(st.Bavail)*st.Bsize+1<<40))
			equal(t, "size", t.fstat(fd).Size, 0)
		}},
		{op: "inotify", name: "events of a directory", run: events},
	}
}

// racers runs n goroutines as the case's user and returns their errors.
func (t *T) racers(n int, f func(i int) error) []error {
	errs := make([]error, n)
	var working sync.WaitGroup
	for i := range n {
		working.Go(func() { errs[i] = as(t.base, t.dir, func() error { return f(i) }) })
	}
	working.Wait()
	return errs
}

func oneWins(t *T) {
	t.file("source", "")
	for what, make := range map[string]func(name string) error{
		"O_EXCL":  func(n string) error { return openClose(n, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644) },
		"mkdir":   func(n string) error { return unix.Mkdir(n, 0o755) },
		"symlink": func(n string) error { return unix.Symlink("x", n) },
		"link":    func(n string) error { return unix.Link("source", n) },
	} {
		for round := range 5 {
			t.row("%s, round %d", what, round)
			won := 0
			for _, err := range t.racers(8, func(int) error { return make(fmt.Sprint(what, round)) }) {
				if err == nil {
					won++
				} else {
					t.want(unix.EEXIST, err)
				}
			}
			equal(t, "winners", won, 1)
		}
	}
	equal(t, "links", t.lstat("source").Nlink, 6)
}

func renameRace(t *T) {
	t.mkdir("a", 0o755)
	t.mkdir("b", 0o755)
	t.file("a/x", "content")
	var moves atomic.Int64
	for _, err := range t.racers(4, func(i int) error {
		from, to := "a/x", "b/x"
		if i%2 == 1 {
			from, to = to, from
		}
		for range 200 {
			if err := unix.Rename(from, to); err == nil {
				moves.Add(1)
			} else if err != unix.ENOENT {
				return err
			}
		}
		return nil
	}) {
		t.want(0, err)
	}
	t.that(exists("a/x") != exists("b/x"), "the file is there %v and there %v", exists("a/x"), exists("b/x"))
	t.that(moves.Load() > 0, "nothing was renamed")
}

func xattrRace(t *T) {
	t.file("file", "")
	values := [][]byte{bytes.Repeat([]byte("a"), 10), bytes.Repeat([]byte("b"), 2000)}
	t.must(unix.Setxattr("file", "user.a", values[0], 0))
	var done atomic.Bool
	for _, err := range t.racers(3, func(i int) error {
		if i == 0 {
			defer done.Store(true)
			for n := range 300 {
				if err := unix.Setxattr("file", "user.a", values[n%2], 0); err != nil {
					return err
				}
			}
			return nil
		}
		buf := make([]byte, 4000)
		for !done.Load() {
			n, err := unix.Getxattr("file", "user.a", buf)
			if err != nil {
				return err
			}
			if !bytes.Equal(buf[:n], values[0]) && !bytes.Equal(buf[:n], values[1]) {
				return fmt.Errorf("a value of %d bytes that was never set", n)
			}
		}
		return nil
	}) {
		t.that(err == nil, "%v", err)
	}
}

func cwdRace(t *T) {
	t.mkdir("one", 0o755)
	var done atomic.Bool
	for _, err := range t.racers(2, func(i int) error {
		if i == 0 {
			defer done.Store(true)
			for range 200 {
				if err := unix.Rename("one", "two"); err != nil {
					return err
				}
				if err := unix.Rename("two", "one"); err != nil {
					return err
				}
			}
			return nil
		}
		for unix.Chdir("one") != nil {
		}
		buf := make([]byte, 4096)
		for !done.Load() {
			n, err := unix.Getcwd(buf)
			if err != nil {
				return err
			}
			if p := string(buf[:n-1]); !strings.HasSuffix(p, "/one") && !strings.HasSuffix(p, "/two") {
				return fmt.Errorf("in %q", p)
			}
		}
		return nil
	}) {
		t.that(err == nil, "%v", err)
	}
}

func holeRace(t *T) {
	const pages, threads = 64, 4
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	t.must(unix.Ftruncate(fd, pages*4096))
	m := t.mmap(fd, pages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	for _, err := range t.racers(threads, func(i int) error {
		for p := range pages {
			m[p*4096+i*8] = byte(i + 1)
		}
		return nil
	}) {
		t.want(0, err)
	}
	t.must(unix.Msync(m, unix.MS_SYNC))
	b := t.pread(fd, pages*4096, 0)
	for p := range pages {
		for i := range threads {
			t.that(b[p*4096+i*8] == byte(i+1), "page %d: the store of thread %d is lost", p, i)
		}
	}
}

func appendAndCut(t *T) {
	t.file("file", "")
	var done atomic.Bool
	for _, err := range t.racers(3, func(i int) error {
		fd, err := unix.Open("file", unix.O_RDWR|unix.O_APPEND|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		switch i {
		case 0:
			defer done.Store(true)
			for range 200 {
				if _, err := unix.Write(fd, bytes.Repeat([]byte("x"), 3000)); err != nil {
					return err
				}
			}
		case 1:
			for !done.Load() {
				if err := unix.Ftruncate(fd, 0); err != nil {
					return err
				}
			}
		default:
			buf := make([]byte, 20_000)
			for !done.Load() {
				n, err := unix.Pread(fd, buf, 0)
				if err != nil {
					return err
				}
				if rest := bytes.Trim(buf[:n], "x\x00"); len(rest) > 0 {
					return fmt.Errorf("read %.20q", rest)
				}
			}
		}
		return nil
	}) {
		t.that(err == nil, "%v", err)
	}
}

func readdirRename(t *T) {
	const files = 200
	t.mkdir("dir", 0o755)
	for i := range files {
		t.file(fmt.Sprint("dir/", i), "")
	}
	d := t.open("dir", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	buf := make([]byte, 1024)
	read := 0
	for read < 100*files {
		n, err := unix.Getdents(d, buf)
		t.must(err)
		if n == 0 {
			break
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		read += len(names)
		for _, name := range names {
			t.must(unix.Rename("dir/"+name, "dir/moved"))
			t.must(unix.Rename("dir/moved", "dir/"+name))
		}
	}
	t.that(read < 100*files, "the listing of %d names does not end", files)
	equal(t, "names", len(t.list("dir")), files+2)
}

func readdirBuffers(t *T) {
	t.mkdir("dir", 0o755)
	t.file("dir/"+strings.Repeat("n", 200), "")
	d := t.open("dir", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	_, err := unix.Getdents(d, make([]byte, 16))
	t.want(unix.EINVAL, err)
	names := func() (all []string) {
		_, err := unix.Seek(d, 0, unix.SEEK_SET)
		t.must(err)
		for buf := make([]byte, 512); ; {
			n, err := unix.Getdents(d, buf)
			t.must(err)
			if n == 0 {
				return all
			}
			_, _, all = unix.ParseDirent(buf[:n], -1, all)
		}
	}
	equal(t, "names", len(names()), 1)
	t.file("dir/new", "")
	t.that(slices.Contains(names(), "new"), "the new name is not seen after rewinding")
	t.must(unix.Unlink("dir/new"))
	equal(t, "names", len(names()), 1)
	_, err = unix.Seek(d, -1, unix.SEEK_SET)
	t.want(unix.EINVAL, err)
}

func readdirChurn(t *T) {
	t.mkdir("dir", 0o755)
	there := make(map[string]bool)
	for i := range 3000 {
		name := fmt.Sprintf("%0*d", 1+i%200, i*7919%1500)
		if there[name] {
			t.must(unix.Unlink("dir/" + name))
			delete(there, name)
		} else {
			t.must(unix.Mknod("dir/"+name, unix.S_IFREG|0o644, 0))
			there[name] = true
		}
	}
	entries, err := os.ReadDir("dir")
	t.must(err)
	equal(t, "names", len(entries), len(there))
	for _, e := range entries {
		t.that(there[e.Name()], "%.20q is there", e.Name())
	}
}

func openRemovedDirectory(t *T) {
	t.mkdir("dir", 0o755)
	d := t.open("dir", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	t.must(unix.Rmdir("dir"))
	_, err := unix.Openat(d, "x", unix.O_CREAT|unix.O_WRONLY, 0o644)
	t.want(unix.ENOENT, err)
	t.want(unix.ENOENT, unix.Mkdirat(d, "x", 0o755))
	t.want(unix.ENOENT, unix.Symlinkat("t", d, "x"))
	t.want(unix.ENOENT, unix.Mknodat(d, "x", unix.S_IFIFO|0o644, 0))
	t.file("file", "")
	t.want(unix.ENOENT, unix.Linkat(unix.AT_FDCWD, "file", d, "x", 0))
	t.want(unix.ENOENT, unix.Renameat(unix.AT_FDCWD, "file", d, "x"))
	_, err = unix.Openat(d, ".", unix.O_TMPFILE|unix.O_RDWR, 0o644)
	t.wantAny(err, unix.ENOENT, unix.EPERM) // ext4 says EPERM
	n, err := unix.Getdents(d, make([]byte, 4096))
	t.wantAny(err, 0, unix.ENOENT)
	t.that(n <= 0, "%d bytes of entries", n)
	equal(t, "links", t.fstat(d).Nlink, 0)
	t.want(0, unix.Fchmod(d, 0o700))
	t.want(0, unix.Fsync(d))
	t.want(0, unix.Fchdir(d))
	_, err = unix.Getcwd(make([]byte, 4096))
	t.want(unix.ENOENT, err)
	t.must(unix.Chdir(t.dir))
}

func removedFile(t *T) {
	t.file("file", "content")
	fd := t.open("file", unix.O_RDWR, 0)
	t.changes("file", "", func() error { return nil })
	t.must(unix.Unlink("file"))
	t.want(0, unix.Fchmod(fd, 0o600))
	t.want(0, unix.Ftruncate(fd, 3))
	t.want(0, unix.Futimes(fd, []unix.Timeval{{Sec: 5}, {Sec: 6}}))
	t.want(0, unix.Fsetxattr(fd, "user.a", []byte("v"), 0))
	t.want(0, unix.Fallocate(fd, 0, 0, 5000))
	t.want(0, unix.Fsync(fd))
	t.pwrite(fd, "more", 6000)
	st := t.fstat(fd)
	equal(t, "links", st.Nlink, 0)
	equal(t, "size", st.Size, 6004)
	equal(t, "mode", mode(st.Mode), unix.S_IFREG|0o600)
	equal(t, "content", t.pread(fd, 10_000, 0), "con"+zeros(5997)+"more")
	again := t.open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY, 0)
	equal(t, "opened again", t.pread(again, 3, 0), "con")
	t.file("file", "another")
	equal(t, "a new file of that name", t.content("file"), "another")
	t.that(t.lstat("file").Ino != st.Ino, "the inode number is used again")
}

func replacedOpen(t *T) {
	t.file("old", "old")
	t.file("new", "new")
	fd := t.open("old", unix.O_RDWR, 0)
	t.must(unix.Rename("new", "old"))
	equal(t, "links", t.fstat(fd).Nlink, 0)
	equal(t, "content", t.pread(fd, 10, 0), "old")
	t.mkdir("dir", 0o755)
	t.mkdir("other", 0o755)
	d := t.open("dir", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	t.must(unix.Rename("other", "dir"))
	equal(t, "links", t.fstat(d).Nlink, 0)
	t.want(unix.ENOENT, unix.Mkdirat(d, "x", 0o755))
}

func mmapSelf(t *T) {
	const size = 64 << 10
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	pattern := make([]byte, size)
	for i := range pattern {
		pattern[i] = byte(i / 100)
	}
	t.pwrite(fd, string(pattern), 0)
	m := t.mmap(fd, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	t.must(unix.Madvise(m, unix.MADV_DONTNEED))
	n, err := unix.Pwrite(fd, m[:20_000], 30_000)
	t.want(0, err)
	equal(t, "written", n, 20_000)
	copy(pattern[30_000:], pattern[:20_000])
	t.that(bytes.Equal([]byte(t.pread(fd, size, 0)), pattern), "other bytes after a write from the mapping")
	t.must(unix.Madvise(m, unix.MADV_DONTNEED))
	n, err = unix.Pread(fd, m[40_000:50_000], 5_000)
	t.want(0, err)
	equal(t, "read", n, 10_000)
	copy(pattern[40_000:], pattern[5_000:15_000])
	t.that(bytes.Equal(m, pattern), "other bytes after a read into the mapping")
}

func mmapSelfDirect(t *T) {
	const size = 64 << 10
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o644)
	_, err := unix.Pwrite(fd, aligned(size, 'd'), 0)
	t.must(err)
	_, err = unix.Pwrite(fd, aligned(4096, 'e'), 0)
	t.must(err)
	m := t.mmap(fd, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	n, err := unix.Pread(fd, m[32<<10:36<<10], 0)
	t.want(0, err)
	equal(t, "read", n, 4096)
	equal(t, "byte", m[32<<10], 'e')
	n, err = unix.Pwrite(fd, m[32<<10:36<<10], 8<<10)
	t.want(0, err)
	equal(t, "written", n, 4096)
	equal(t, "byte", t.content("file")[8<<10], 'e')
}

// faults says whether reading a byte of memory is answered by SIGBUS.
func faults(m []byte, at int) (faulted bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { faulted = recover() != nil }()
	if m[at] == 1 {
		return false
	}
	return false
}

func mmapBus(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	t.pwrite(fd, string(bytes.Repeat([]byte("x"), 8192)), 0)
	m := t.mmap(fd, 16384, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	t.that(!faults(m, 8191), "the last byte faults")
	t.that(faults(m, 8192), "a byte behind the end does not fault")
	t.must(unix.Ftruncate(fd, 4096))
	t.that(faults(m, 5000), "a byte that was cut does not fault")
	t.must(unix.Ftruncate(fd, 16384))
	t.that(!faults(m, 5000), "a byte of the file that grew faults")
	equal(t, "what was cut", m[5000], 0)
	equal(t, "what is new", m[16383], 0)
}

func mmapGap(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	t.pwrite(fd, "head", 0)
	m := t.mmap(fd, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	copy(m[4:], "behind the end")
	t.pwrite(fd, "tail", 1000)
	want := "head" + zeros(996) + "tail"
	equal(t, "content", t.content("file"), want)
	t.must(unix.Msync(m, unix.MS_SYNC))
	equal(t, "content after msync", t.content("file"), want)
}

func mmapAdvice(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	t.pwrite(fd, string(bytes.Repeat([]byte("x"), 16384)), 0)
	m := t.mmap(fd, 16384, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	m[5000] = 'y'
	t.want(0, unix.Madvise(m, unix.MADV_DONTNEED))
	equal(t, "a store that was dropped from the mapping", m[5000], 'y')
	t.want(0, unix.Madvise(m, unix.MADV_WILLNEED))
	t.want(0, unix.Madvise(m[4096:8192], unix.MADV_REMOVE))
	equal(t, "in the hole", m[5000], 0)
	equal(t, "content", t.content("file"), strings.Repeat("x", 4096)+zeros(4096)+strings.Repeat("x", 8192))
}

func writeFault(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	m, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	t.must(err)
	t.maps = append(t.maps, m)
	for i := range m {
		m[i] = 'm'
	}
	t.must(unix.Mprotect(m[4096:], unix.PROT_NONE))
	raw := func(number uintptr, buf []byte, off int64) (int, error) {
		n, _, e := unix.Syscall6(number, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), uintptr(off), 0, 0)
		if e != 0 {
			return 0, e
		}
		return int(n), nil
	}
	_, err = raw(unix.SYS_PWRITE64, m[4096:], 0)
	t.want(unix.EFAULT, err)
	equal(t, "size", t.fstat(fd).Size, 0)
	n, err := raw(unix.SYS_PWRITE64, m[1000:], 0) // 3,096 bytes that can be read
	t.wantAny(err, 0, unix.EFAULT)
	t.that(n <= 3096, "%d bytes were written", n)
	equal(t, "size", t.fstat(fd).Size, int64(n))
	equal(t, "content", t.content("file"), strings.Repeat("m", n))
	t.pwrite(fd, strings.Repeat("f", 8192), 0)
	_, err = raw(unix.SYS_PREAD64, m[4096:], 0)
	t.want(unix.EFAULT, err)
}

func pageEdges(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	want := make([]byte, 40_000)
	fill := byte(0)
	for _, off := range []int{0, 1, 4095, 4096, 4097, 8191, 12_288, 16_383} {
		for _, n := range []int{1, 2, 4095, 4096, 4097, 8192, 16_384} {
			fill++
			part := bytes.Repeat([]byte{fill}, n)
			t.pwrite(fd, string(part), int64(off))
			copy(want[off:], part)
		}
	}
	size := int(t.fstat(fd).Size)
	equal(t, "size", size, 16_383+16_384)
	t.that(t.pread(fd, size, 0) == string(want[:size]), "other bytes")
	for _, off := range []int{0, 1, 4095, 4096, 20_001, size - 1, size, size + 1} {
		for _, n := range []int{1, 4096, 4097, 30_000} {
			t.that(t.pread(fd, n, int64(off)) == string(want[min(off, size):min(off+n, size)]), "other bytes at %d", off)
		}
	}
}

func behindEnd(t *T) {
	for _, end := range []int64{1, 4095, 4096, 4097, 100_000} {
		for _, gap := range []int64{1, 4095, 4096, 200_000} {
			t.row("end %d, gap %d", end, gap)
			fd := t.open("file", unix.O_CREAT|unix.O_RDWR|unix.O_TRUNC, 0o644)
			t.pwrite(fd, strings.Repeat("o", int(end+5000)), 0)
			t.must(unix.Ftruncate(fd, end))
			t.pwrite(fd, "!", end+gap)
			equal(t, "the gap", t.pread(fd, int(gap), end), zeros(int(gap)))
			equal(t, "size", t.fstat(fd).Size, end+gap+1)
			t.close(fd)
		}
	}
}

func appendSwitch(t *T) {
	t.file("file", "one")
	fd := t.open("file", unix.O_WRONLY, 0)
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_APPEND)
	t.want(0, err)
	_, err = unix.Write(fd, []byte("two"))
	t.want(0, err)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0)
	t.want(0, err)
	_, err = unix.Pwrite(fd, []byte("X"), 0)
	t.want(0, err)
	equal(t, "content", t.content("file"), "Xnetwo")
}

func truncReadOnly(t *T) {
	t.file("file", "content")
	t.want(0, openClose("file", unix.O_RDONLY|unix.O_TRUNC, 0))
	equal(t, "size", t.lstat("file").Size, 0)
}

func resolve(t *T) {
	t.mkdir("dir", 0o755)
	t.file("dir/file", "content")
	t.must(unix.Symlink("file", "dir/link"))
	t.must(unix.Symlink("../dir", "dir/up"))
	d := t.open("dir", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	for _, row := range []struct {
		name    string
		resolve uint64
		want    syscall.Errno
	}{
		{"file", unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV, 0},
		{"link", unix.RESOLVE_BENEATH, 0},
		{"link", unix.RESOLVE_NO_SYMLINKS, unix.ELOOP},
		{"../dir/file", unix.RESOLVE_BENEATH, unix.EXDEV},
		{"up/file", unix.RESOLVE_BENEATH, unix.EXDEV},
		{"../../../../../../../../../../etc", unix.RESOLVE_NO_XDEV, unix.EXDEV},
		{"/file", unix.RESOLVE_IN_ROOT, 0},
		{"/../file", unix.RESOLVE_IN_ROOT, 0},
	} {
		t.row("%s, %#x", row.name, row.resolve)
		if row.resolve == unix.RESOLVE_NO_XDEV {
			continue // the reference may be on the root filesystem
		}
		fd, err := unix.Openat2(d, row.name, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC, Resolve: row.resolve})
		t.want(row.want, err)
		if err == nil {
			t.must(unix.Close(fd))
		}
	}
}

func sharedOffsets(t *T) {
	t.file("file", "0123456789")
	a := t.open("file", unix.O_RDONLY, 0)
	b, err := unix.FcntlInt(uintptr(a), unix.F_DUPFD_CLOEXEC, 0)
	t.must(err)
	t.fds = append(t.fds, b)
	c := t.open("file", unix.O_RDONLY, 0)
	buf := make([]byte, 3)
	for _, row := range []struct {
		fd   int
		want string
	}{{a, "012"}, {b, "345"}, {c, "012"}, {a, "678"}, {b, "9"}} {
		n, err := unix.Read(row.fd, buf)
		t.want(0, err)
		equal(t, "read", string(buf[:n]), row.want)
	}
}

func manyLinks(t *T) {
	const names = 1100
	t.file("file", "content")
	for i := range names {
		t.must(unix.Link("file", fmt.Sprint("name-", i)))
	}
	equal(t, "links", t.lstat("file").Nlink, names+1)
	t.must(unix.Unlink("file"))
	for i := range names - 1 {
		t.must(unix.Unlink(fmt.Sprint("name-", i)))
	}
	last := fmt.Sprint("name-", names-1)
	equal(t, "links", t.lstat(last).Nlink, 1)
	equal(t, "content", t.content(last), "content")
}

func manyDirectories(t *T) {
	t.mkdir("dir", 0o755)
	for i := range 300 {
		t.mkdir(fmt.Sprint("dir/", i), 0o755)
	}
	equal(t, "links", t.lstat("dir").Nlink, 302)
	t.must(unix.Rename("dir/0", "moved"))
	equal(t, "links after one has moved", t.lstat("dir").Nlink, 301)
	var up, dir unix.Stat_t
	t.must(unix.Stat("moved/..", &up))
	t.must(unix.Stat(".", &dir))
	equal(t, "its parent", up.Ino, dir.Ino)
}

func farTimes(t *T) {
	t.file("file", "")
	for _, sec := range []int64{-1, -2_000_000_000, -1000, 0, 1<<31 - 1, 1 << 31, 1<<32 + 5, 1 << 33} {
		for _, nsec := range []int64{0, 1, 999_999_999} {
			t.row("%d.%09d", sec, nsec)
			want := unix.Timespec{Sec: sec, Nsec: nsec}
			t.want(0, unix.UtimesNanoAt(unix.AT_FDCWD, "file", []unix.Timespec{want, want}, 0))
			st := t.lstat("file")
			equal(t, "mtime", st.Mtim, want)
			equal(t, "atime", st.Atim, want)
			x := t.statx("file")
			equal(t, "mtime by statx", unix.Timespec{Sec: x.Mtime.Sec, Nsec: int64(x.Mtime.Nsec)}, want)
		}
	}
}

func oddNames(t *T) {
	t.file("file", "")
	names := []string{"user.a/b", "user.a b", "user.\xff\xfe", "user.a.b.c", "user.ä", "user." + strings.Repeat("n", 250)}
	for _, name := range names {
		t.row("%.10q", name)
		t.want(0, unix.Setxattr("file", name, []byte(name), unix.XATTR_CREATE))
		buf := make([]byte, 300)
		n, err := unix.Getxattr("file", name, buf)
		t.want(0, err)
		equal(t, "value", string(buf[:max(n, 0)]), name)
	}
	buf := make([]byte, 4096)
	n, err := unix.Listxattr("file", buf)
	t.want(0, err)
	for _, name := range names {
		t.that(bytes.Contains(buf[:max(n, 0)], []byte(name+"\x00")), "%.10q is not listed", name)
		t.want(0, unix.Removexattr("file", name))
	}
}

func lastByte(t *T) {
	const end = 1<<20 + 12_345
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	t.pwrite(fd, "x", end-1)
	off, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	t.want(0, err)
	t.that(off > end-70_000 && off < end, "data at %d", off)
	off, err = unix.Seek(fd, end-1, unix.SEEK_DATA)
	t.want(0, err)
	equal(t, "data at", off, end-1)
	off, err = unix.Seek(fd, end-1, unix.SEEK_HOLE)
	t.want(0, err)
	equal(t, "hole at", off, end)
	_, err = unix.Seek(fd, end, unix.SEEK_DATA)
	t.want(unix.ENXIO, err)
}

func advice(t *T) {
	t.file("file", "content")
	fd := t.open("file", unix.O_RDWR, 0)
	for _, a := range []int{unix.FADV_NORMAL, unix.FADV_SEQUENTIAL, unix.FADV_RANDOM, unix.FADV_WILLNEED, unix.FADV_NOREUSE, unix.FADV_DONTNEED} {
		t.want(0, unix.Fadvise(fd, 0, 0, a))
	}
	t.want(unix.EINVAL, unix.Fadvise(fd, 0, 0, 77))
	t.want(0, unix.SyncFileRange(fd, 0, 7, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER))
	t.want(unix.EINVAL, unix.SyncFileRange(fd, 0, 7, 0x80))
	_, _, e := unix.Syscall(unix.SYS_READAHEAD, uintptr(fd), 0, 7)
	t.want(0, errnoOrNil(e))
	_, err := unix.Seek(fd, 3, unix.SEEK_SET)
	t.must(err)
	left, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	t.want(0, err)
	equal(t, "bytes to read", left, 4)
	buf := make([]byte, 10)
	n, err := unix.Preadv2(fd, [][]byte{buf}, 0, unix.RWF_NOWAIT)
	t.wantAny(err, 0, unix.EAGAIN, unix.EOPNOTSUPP)
	if err == nil {
		equal(t, "read", string(buf[:n]), "content")
	}
	_, err = unix.Preadv2(fd, [][]byte{buf}, 0, 1<<30)
	t.want(unix.EOPNOTSUPP, err)
}

func errnoOrNil(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func events(t *T) {
	t.mkdir("dir", 0o755)
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	t.must(err)
	t.fds = append(t.fds, fd)
	_, err = unix.InotifyAddWatch(fd, "dir", unix.IN_ALL_EVENTS&^(unix.IN_ACCESS|unix.IN_CLOSE_NOWRITE))
	t.must(err)
	next := func() (masks []uint32) {
		buf := make([]byte, 8192)
		n, err := unix.Read(fd, buf)
		if err == unix.EAGAIN {
			return nil
		}
		t.must(err)
		for at := 0; at < n; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&buf[at]))
			masks = append(masks, e.Mask)
			at += unix.SizeofInotifyEvent + int(e.Len)
		}
		return masks
	}
	for _, row := range []struct {
		what string
		do   func() error
		want []uint32
	}{
		{"create", func() error { return openClose("dir/x", unix.O_CREAT|unix.O_WRONLY, 0o644) }, []uint32{unix.IN_CREATE, unix.IN_OPEN, unix.IN_CLOSE_WRITE}},
		{"chmod", func() error { return unix.Chmod("dir/x", 0o600) }, []uint32{unix.IN_ATTRIB}},
		{"truncate", func() error { return unix.Truncate("dir/x", 10) }, []uint32{unix.IN_MODIFY}},
		{"rename", func() error { return unix.Rename("dir/x", "dir/y") }, []uint32{unix.IN_MOVED_FROM, unix.IN_MOVED_TO}},
		{"mkdir", func() error { return unix.Mkdir("dir/d", 0o755) }, []uint32{unix.IN_CREATE | unix.IN_ISDIR}},
		{"rmdir", func() error { return unix.Rmdir("dir/d") }, []uint32{unix.IN_DELETE | unix.IN_ISDIR}},
		{"unlink", func() error { return unix.Unlink("dir/y") }, []uint32{unix.IN_DELETE}},
	} {
		t.row("%s", row.what)
		t.want(0, row.do())
		got := next()
		t.that(slices.Equal(got, row.want), "events %#x, want %#x", got, row.want)
	}
}
