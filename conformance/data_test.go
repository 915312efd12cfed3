package conformance

import (
	"bytes"
	"fmt"
	"math"
	"syscall"

	"golang.org/x/sys/unix"
)

func dataCases() []testCase {
	return []testCase{
		{op: "write", name: "times, sizes, holes", run: writes},
		{op: "write", name: "set-user-ID and set-group-ID go", others: true, run: clearedByWriting},
		{op: "write", name: "vectors, positions", run: vectors},
		{op: "write", name: "atomic appends of several writers", run: parallelAppends},
		{op: "truncate", name: "sizes, content, times", run: truncates},
		{op: "truncate", name: "what cannot be cut", run: truncateRefuses},
		{op: "limits", name: "RLIMIT_FSIZE", run: fileSizeLimit},
		{op: "limits", name: "the end of the offsets", run: lastOffsets},
		{op: "fallocate", name: "modes: size, content, times", run: fallocates},
		{op: "fallocate", name: "wrong arguments", run: fallocateRefuses},
		{op: "lseek", name: "data and holes", run: dataAndHoles},
		{op: "copy_file_range", name: "bytes, offsets, ends", run: copies},
		{op: "copy_file_range", name: "what cannot be copied", run: copyRefuses},
		{op: "copy_file_range", name: "times, privileges", run: copyStamps},
		{op: "sendfile and splice", name: "into and out of a file", run: splices},
	}
}

func (t *T) pwrite(fd int, s string, off int64) {
	n, err := unix.Pwrite(fd, []byte(s), off)
	t.must(err)
	equal(t, "bytes written", n, len(s))
}

func (t *T) pread(fd, size int, off int64) string {
	buf := make([]byte, size)
	n, err := unix.Pread(fd, buf, off)
	t.must(err)
	return string(buf[:n])
}

func zeros(n int) string { return string(make([]byte, n)) }

func writes(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	t.changes("file", "mc", func() error { _, err := unix.Write(fd, []byte("content")); return err })
	t.changes("file", "mc", func() error { _, err := unix.Pwrite(fd, []byte("x"), 0); return err })
	t.changes("file", "", func() error { _, err := unix.Pwrite(fd, nil, 100); return err })
	equal(t, "size", t.lstat("file").Size, 7)
	t.pwrite(fd, "far", 100_000)
	equal(t, "size", t.lstat("file").Size, 100_003)
	equal(t, "what was never written", t.pread(fd, 99_993, 7), zeros(99_993))
	equal(t, "the end", t.pread(fd, 100, 100_000), "far")
	t.that(t.lstat("file").Blocks > 0, "no blocks")
	t.pwrite(fd, "sparse", 1<<40)
	equal(t, "size", t.lstat("file").Size, 1<<40+6)
	t.that(t.lstat("file").Blocks < 10_000, "%d blocks for a few bytes", t.lstat("file").Blocks)
	off, err := unix.Seek(fd, -6, unix.SEEK_END)
	t.want(0, err)
	equal(t, "offset", off, 1<<40)
}

// clearedByWriting: a change of content by who is not root takes set-user-ID, and set-group-ID with group execution.
func clearedByWriting(t *T) {
	t.must(unix.Chmod(".", 0o777))
	changes := map[string]func(fd int) error{
		"write":          func(fd int) error { _, err := unix.Write(fd, []byte("x")); return err },
		"pwrite":         func(fd int) error { _, err := unix.Pwrite(fd, []byte("x"), 10); return err },
		"ftruncate":      func(fd int) error { return unix.Ftruncate(fd, 3) },
		"ftruncate up":   func(fd int) error { return unix.Ftruncate(fd, 300) },
		"fallocate":      func(fd int) error { return unix.Fallocate(fd, 0, 0, 300) },
		"fallocate keep": func(fd int) error { return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 300) },
		"punch": func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4)
		},
		"zero":        func(fd int) error { return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 0, 4) },
		"truncate":    func(int) error { return unix.Truncate("file", 2) },
		"open to cut": func(int) error { return openClose("file", unix.O_WRONLY|unix.O_TRUNC, 0) },
		"copy": func(fd int) error {
			_, err := unix.CopyFileRange(t.open("source", unix.O_RDONLY, 0), nil, fd, nil, 4, 0)
			return err
		},
	}
	t.file("source", "source")
	t.own("source", alice, 0o666)
	for what, change := range changes {
		for _, row := range []struct{ before, after mode }{
			{0o4777, 0o777}, {0o2777, 0o777}, {0o6777, 0o777}, {0o6767, 0o2767}, {0o4666, 0o666}, {0o2666, 0o2666}, {0o6666, 0o2666}, {0o1666, 0o1666}, {0o6676, 0o676},
		} {
			for _, by := range []user{root, alice, carol, bob} {
				t.file("file", "content")
				t.own("file", alice, row.before)
				want := row.after
				if by.uid == 0 {
					want = row.before
				}
				// Without group execution the bit stays of members only, and the kernel does not tell who is one.
				if by.uid == bob.uid && row.before&0o2010 == 0o2000 {
					continue
				}
				t.row("%s, mode %#o, by %s", what, uint32(row.before), by.name)
				t.must(t.as(by, func() error {
					fd, err := unix.Open("file", unix.O_RDWR|unix.O_CLOEXEC, 0)
					if err != nil {
						return err
					}
					t.want(0, change(fd))
					return unix.Close(fd)
				}))
				equal(t, "mode", t.permissions("file"), want)
				t.must(unix.Unlink("file"))
			}
		}
	}
}

func vectors(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	n, err := unix.Writev(fd, [][]byte{[]byte("one "), nil, []byte("two "), []byte("three")})
	t.want(0, err)
	equal(t, "written", n, 13)
	n, err = unix.Pwritev(fd, [][]byte{[]byte("T"), []byte("WO")}, 4)
	t.want(0, err)
	equal(t, "written", n, 3)
	a, b := make([]byte, 4), make([]byte, 20)
	n, err = unix.Preadv(fd, [][]byte{a, b}, 0)
	t.want(0, err)
	equal(t, "read", string(a)+string(b[:max(n-4, 0)]), "one TWO three")
	off, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	t.want(0, err)
	equal(t, "offset", off, 13)
	n, err = unix.Pwritev2(fd, [][]byte{[]byte("!")}, 0, unix.RWF_APPEND)
	t.want(0, err)
	equal(t, "written", n, 1)
	equal(t, "content", t.content("file"), "one TWO three!")
	_, err = unix.Pwritev2(fd, [][]byte{[]byte("?")}, 13, unix.RWF_SYNC|unix.RWF_DSYNC)
	t.want(0, err)
}

func parallelAppends(t *T) {
	const writers, each = 4, 200
	t.file("file", "")
	done := make(chan error, writers)
	for w := range writers {
		go func() {
			done <- t.as(t.base, func() error {
				fd, err := unix.Open("file", unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				for i := range each {
					if _, err := unix.Write(fd, fmt.Appendf(nil, "%d:%04d\n", w, i)); err != nil {
						return err
					}
				}
				return nil
			})
		}()
	}
	for range writers {
		t.want(0, <-done)
	}
	lines := bytes.Split([]byte(t.content("file")), []byte("\n"))
	equal(t, "lines", len(lines), writers*each+1)
	var next [writers]int
	for _, line := range lines[:max(len(lines)-1, 0)] {
		var w, i int
		_, err := fmt.Sscanf(string(line), "%d:%04d", &w, &i)
		t.that(err == nil && w < writers && i == next[w%writers], "line %q out of order", line)
		next[w%writers]++
	}
}

func truncates(t *T) {
	t.file("file", "content")
	fd := t.open("file", unix.O_RDWR, 0)
	for _, row := range []struct {
		size int64
		want string
	}{{3, "con"}, {3, "con"}, {5, "con\x00\x00"}, {0, ""}, {1, "\x00"}} {
		t.row("to %d", row.size)
		t.changes("file", "mc", func() error { return unix.Ftruncate(fd, row.size) })
		equal(t, "content", t.content("file"), row.want)
	}
	t.row("by name")
	t.changes("file", "mc", func() error { return unix.Truncate("file", 10) })
	t.changes("file", "mc", func() error { return unix.Truncate("file", 10) })
	equal(t, "size", t.lstat("file").Size, 10)
	t.row("what was cut does not come back")
	t.pwrite(fd, string(bytes.Repeat([]byte("secret"), 20_000)), 0)
	t.want(0, unix.Ftruncate(fd, 4097))
	t.want(0, unix.Ftruncate(fd, 120_000))
	equal(t, "after the cut", t.pread(fd, 120_000, 4097), zeros(120_000-4097))
	t.want(0, unix.Ftruncate(fd, 1<<40))
	equal(t, "size", t.lstat("file").Size, 1<<40)
	equal(t, "far away", t.pread(fd, 4096, 1<<39), zeros(4096))
	t.want(0, unix.Ftruncate(fd, 0))
	equal(t, "blocks", t.lstat("file").Blocks, 0)
}

func truncateRefuses(t *T) {
	for _, k := range t.kinds() {
		t.must(k.make(k.name))
	}
	t.want(unix.EISDIR, unix.Truncate("directory", 0))
	t.want(unix.EINVAL, unix.Truncate("fifo", 0))
	t.want(unix.EINVAL, unix.Truncate("socket", 0))
	t.want(unix.EINVAL, unix.Truncate("file", -1))
	t.want(unix.ENOENT, unix.Truncate("symbolic link", 0))
	fd := t.open("file", unix.O_RDWR, 0)
	t.want(unix.EINVAL, unix.Ftruncate(fd, -1))
	t.wantAny(unix.Ftruncate(fd, math.MaxInt64), 0, unix.EFBIG)
}

func fileSizeLimit(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	var old unix.Rlimit
	t.must(unix.Getrlimit(unix.RLIMIT_FSIZE, &old))
	t.must(unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 10_000, Max: old.Max}))
	defer unix.Setrlimit(unix.RLIMIT_FSIZE, &old)
	n, err := unix.Pwrite(fd, make([]byte, 20_000), 0)
	t.want(0, err)
	equal(t, "written up to the limit", n, 10_000)
	_, err = unix.Pwrite(fd, []byte("x"), 10_000)
	t.want(unix.EFBIG, err)
	_, err = unix.Pwrite(fd, []byte("x"), 1<<40)
	t.want(unix.EFBIG, err)
	t.want(unix.EFBIG, unix.Ftruncate(fd, 10_001))
	t.want(unix.EFBIG, unix.Truncate("file", 10_001))
	t.want(unix.EFBIG, unix.Fallocate(fd, 0, 0, 10_001))
	t.want(0, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 10_001))
	t.want(0, unix.Ftruncate(fd, 10_000))
	equal(t, "size", t.fstat(fd).Size, 10_000)
	direct := t.open("file", unix.O_RDWR|unix.O_DIRECT, 0)
	_, err = unix.Pwrite(direct, aligned(4096, 'd'), 12<<10)
	t.want(unix.EFBIG, err)
}

// lastOffsets: the largest file is 8 EiB - 1. A filesystem may have a smaller bound, and then says EFBIG.
func lastOffsets(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	const last = math.MaxInt64
	for _, n := range []int{3, 4} {
		_, err := unix.Pwrite(fd, make([]byte, n), last-2) // past the range of the offsets themselves
		t.want(unix.EINVAL, err)
		_, err = unix.Pread(fd, make([]byte, n), last-2)
		t.want(unix.EINVAL, err)
	}
	_, err := unix.Pread(fd, make([]byte, 3), last-3)
	t.want(0, err)
	t.wantAny(unix.Fallocate(fd, 0, last-10, 10), 0, unix.EFBIG, unix.ENOSPC)
	t.want(unix.EFBIG, unix.Fallocate(fd, 0, last-10, 11))
	if unix.Ftruncate(fd, last) == nil {
		t.row("a file of 8 EiB - 1")
		equal(t, "size", t.fstat(fd).Size, last)
		n, err := unix.Pwrite(fd, []byte("the"), last-3)
		t.want(0, err)
		equal(t, "written", n, 3)
		equal(t, "the end", t.pread(fd, 3, last-3), "the")
		off, err := unix.Seek(fd, 0, unix.SEEK_END)
		t.want(0, err)
		equal(t, "end", off, last)
		_, err = unix.Write(fd, []byte("x"))
		t.wantAny(err, unix.EFBIG, unix.EINVAL)
		_, err = unix.Seek(fd, 1, unix.SEEK_CUR)
		t.wantAny(err, unix.EOVERFLOW, unix.EINVAL)
		off, err = unix.Seek(fd, 100, unix.SEEK_DATA)
		t.want(0, err)
		t.that(off >= last-5000, "data at %d", off)
		t.want(0, unix.Ftruncate(fd, 1))
	}
}

const (
	keepSize = unix.FALLOC_FL_KEEP_SIZE
	punch    = unix.FALLOC_FL_PUNCH_HOLE | keepSize
	zero     = unix.FALLOC_FL_ZERO_RANGE
)

func fallocates(t *T) {
	full := bytes.Repeat([]byte("x"), 10_000)
	for _, row := range []struct {
		mode     uint32
		off, n   int64
		size     int64
		from, to int // zeroed
	}{
		{0, 0, 5000, 10_000, 0, 0},
		{0, 0, 20_000, 20_000, 10_000, 20_000},
		{0, 15_000, 5000, 20_000, 10_000, 20_000},
		{keepSize, 0, 20_000, 10_000, 0, 0},
		{keepSize, 50_000, 10, 10_000, 0, 0},
		{punch, 0, 10_000, 10_000, 0, 10_000},
		{punch, 1, 1, 10_000, 1, 2},
		{punch, 4095, 4098, 10_000, 4095, 8193},
		{punch, 9000, 50_000, 10_000, 9000, 10_000},
		{punch, 20_000, 10, 10_000, 0, 0},
		{zero, 100, 5000, 10_000, 100, 5100},
		{zero, 9000, 5000, 14_000, 9000, 14_000},
		{zero, 20_000, 100, 20_100, 10_000, 20_100},
		{zero | keepSize, 9000, 5000, 10_000, 9000, 10_000},
	} {
		t.row("mode %d, %d bytes from %d", row.mode, row.n, row.off)
		fd := t.open("file", unix.O_CREAT|unix.O_RDWR|unix.O_TRUNC, 0o644)
		t.pwrite(fd, string(full), 0)
		t.changes("file", "mc", func() error { return unix.Fallocate(fd, row.mode, row.off, row.n) })
		want := append(bytes.Clone(full), make([]byte, 30_000)...)
		clear(want[row.from:row.to])
		equal(t, "size", t.fstat(fd).Size, row.size)
		equal(t, "content", t.content("file"), string(want[:row.size]))
		t.close(fd)
	}
}

func fallocateRefuses(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	for _, row := range []struct {
		what   string
		mode   uint32
		off, n int64
		want   syscall.Errno
	}{
		{"nothing", 0, 0, 0, unix.EINVAL},
		{"less than nothing", 0, 0, -1, unix.EINVAL},
		{"before the start", 0, -1, 10, unix.EINVAL},
		{"punch without keep size", unix.FALLOC_FL_PUNCH_HOLE, 0, 10, unix.EOPNOTSUPP},
		{"punch and zero", punch | zero, 0, 10, unix.EOPNOTSUPP},
		{"an unknown mode", 0x80, 0, 10, unix.EOPNOTSUPP},
		{"past the largest offset", 0, math.MaxInt64, 10, unix.EFBIG},
	} {
		t.row("%s", row.what)
		t.want(row.want, unix.Fallocate(fd, row.mode, row.off, row.n))
	}
	t.row("what is no file")
	t.must(unix.Mkfifo("fifo", 0o644))
	t.want(unix.ESPIPE, unix.Fallocate(t.open("fifo", unix.O_RDWR, 0), 0, 0, 10))
}

func dataAndHoles(t *T) {
	const block = 64 << 10
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
		_, err := unix.Seek(fd, 0, whence)
		t.want(unix.ENXIO, err) // an empty file
	}
	data := string(bytes.Repeat([]byte("d"), block))
	t.pwrite(fd, data, 2*block)
	t.pwrite(fd, data, 4*block)
	t.want(0, unix.Ftruncate(fd, 6*block))
	for _, row := range []struct {
		whence    int
		off, want int64
		errno     syscall.Errno
	}{
		{unix.SEEK_DATA, 0, 2 * block, 0},
		{unix.SEEK_DATA, 2 * block, 2 * block, 0},
		{unix.SEEK_DATA, 2*block + 1, 2*block + 1, 0},
		{unix.SEEK_DATA, 3 * block, 4 * block, 0},
		{unix.SEEK_DATA, 5 * block, 0, unix.ENXIO},
		{unix.SEEK_DATA, 6 * block, 0, unix.ENXIO},
		{unix.SEEK_DATA, 7 * block, 0, unix.ENXIO},
		{unix.SEEK_DATA, -1, 0, unix.ENXIO},
		{unix.SEEK_HOLE, 0, 0, 0},
		{unix.SEEK_HOLE, 5, 5, 0},
		{unix.SEEK_HOLE, 2 * block, 3 * block, 0},
		{unix.SEEK_HOLE, 5*block - 1, 5 * block, 0},
		{unix.SEEK_HOLE, 5 * block, 5 * block, 0},
		{unix.SEEK_HOLE, 6*block - 1, 6*block - 1, 0},
		{unix.SEEK_HOLE, 6 * block, 0, unix.ENXIO},
		{unix.SEEK_HOLE, -1, 0, unix.ENXIO},
	} {
		t.row("whence %d from %d", row.whence, row.off)
		off, err := unix.Seek(fd, row.off, row.whence)
		t.want(row.errno, err)
		if row.errno == 0 {
			equal(t, "offset", off, row.want)
			now, _ := unix.Seek(fd, 0, unix.SEEK_CUR)
			equal(t, "offset of the descriptor", now, row.want)
		}
	}
	t.row("a hole that was punched")
	t.want(0, unix.Fallocate(fd, punch, 2*block, block))
	off, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	t.want(0, err)
	equal(t, "offset", off, 4*block)
	t.row("a full file")
	t.file("full", "content")
	full := t.open("full", unix.O_RDONLY, 0)
	off, err = unix.Seek(full, 3, unix.SEEK_HOLE)
	t.want(0, err)
	equal(t, "offset", off, 7)
}

func copies(t *T) {
	const size = 300_000
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(i / 7)
	}
	t.file("source", string(content))
	src := t.open("source", unix.O_RDONLY, 0)
	dst := t.open("target", unix.O_CREAT|unix.O_RDWR, 0o644)
	for _, row := range []struct{ from, to, n, want int64 }{
		{0, 0, size, size}, {0, 0, size * 2, size}, {1, 1, 100_001, 100_001}, {5, 77_777, 4097, 4097}, {size - 10, 0, 100, 10}, {size, 0, 100, 0}, {size + 10, 0, 100, 0},
		{0, 1 << 40, 1000, 1000}, {0, 0, 0, 0},
	} {
		t.row("%d bytes from %d to %d", row.n, row.from, row.to)
		from, to := row.from, row.to
		n, err := unix.CopyFileRange(src, &from, dst, &to, int(row.n), 0)
		t.want(0, err)
		equal(t, "copied", int64(n), row.want)
		equal(t, "offset in", from, row.from+row.want)
		equal(t, "offset out", to, row.to+row.want)
		if row.want > 0 {
			equal(t, "content", t.pread(dst, int(row.want), row.to), string(content[row.from:row.from+row.want]))
		}
	}
	t.row("with the descriptors' offsets")
	n, err := unix.CopyFileRange(src, nil, dst, nil, 10, 0)
	t.want(0, err)
	equal(t, "copied", n, 10)
	off, _ := unix.Seek(dst, 0, unix.SEEK_CUR)
	equal(t, "offset", off, 10)
	t.row("within a file")
	from, to := int64(0), int64(150_000)
	n, err = unix.CopyFileRange(dst, &from, dst, &to, 100_000, 0)
	t.want(0, err)
	equal(t, "copied", n, 100_000)
	equal(t, "content", t.pread(dst, 100_000, 150_000), t.pread(dst, 100_000, 0))
	t.row("what is written to the copy is not in the source, nor the other way round")
	t.pwrite(dst, "changed", 10)
	equal(t, "source", t.pread(src, 7, 10), string(content[10:17]))
	w := t.open("source", unix.O_WRONLY, 0)
	t.pwrite(w, "otherwise", 100_000)
	equal(t, "target", t.pread(dst, 9, 100_000), string(content[100_000:100_009]))
	t.row("holes")
	t.want(0, unix.Ftruncate(w, 1<<30))
	from, to = 500_000, 0
	n, err = unix.CopyFileRange(src, &from, dst, &to, 4096, 0)
	t.want(0, err)
	equal(t, "copied", n, 4096)
	equal(t, "content", t.pread(dst, 4096, 0), zeros(4096))
}

func copyRefuses(t *T) {
	t.file("source", "content")
	t.mkdir("dir", 0o755)
	t.must(unix.Mkfifo("fifo", 0o644))
	r := t.open("source", unix.O_RDONLY, 0)
	w := t.open("target", unix.O_CREAT|unix.O_WRONLY, 0o644)
	rw := t.open("source", unix.O_RDWR, 0)
	for _, row := range []struct {
		what     string
		from, to int
		want     syscall.Errno
	}{
		{"from what is for writing", w, w, unix.EBADF},
		{"to what is for reading", r, r, unix.EBADF},
		{"to what appends", r, t.open("target", unix.O_WRONLY|unix.O_APPEND, 0), unix.EBADF},
		{"from a directory", t.open("dir", unix.O_RDONLY, 0), w, unix.EISDIR},
		{"to a directory", r, t.open("dir", unix.O_RDONLY, 0), unix.EISDIR},
		{"from a fifo", t.open("fifo", unix.O_RDWR, 0), w, unix.EINVAL},
		{"to a fifo", r, t.open("fifo", unix.O_RDWR, 0), unix.EINVAL},
	} {
		t.row("%s", row.what)
		_, err := unix.CopyFileRange(row.from, nil, row.to, nil, 5, 0)
		t.want(row.want, err)
	}
	t.row("onto itself")
	from, to := int64(0), int64(3)
	_, err := unix.CopyFileRange(rw, &from, rw, &to, 5, 0)
	t.want(unix.EINVAL, err)
	t.row("flags")
	_, err = unix.CopyFileRange(r, nil, w, nil, 5, 1)
	t.want(unix.EINVAL, err)
	t.row("far away")
	from, to = 0, math.MaxInt64
	_, err = unix.CopyFileRange(r, &from, w, &to, 5, 0)
	t.wantAny(err, unix.EFBIG, unix.EOVERFLOW)
}

func copyStamps(t *T) {
	t.file("source", "content")
	t.file("target", "")
	r, w := t.open("source", unix.O_RDONLY, 0), t.open("target", unix.O_WRONLY, 0)
	t.changes("target", "mc", func() error { _, err := unix.CopyFileRange(r, nil, w, nil, 5, 0); return err })
	before := t.stamps("source")
	t.tick()
	_, err := unix.CopyFileRange(r, nil, w, nil, 2, 0)
	t.want(0, err)
	after := t.stamps("source")
	t.that(after.mtime == before.mtime && after.ctime == before.ctime, "times of the source changed")
}

func splices(t *T) {
	content := string(bytes.Repeat([]byte("0123456789"), 10_000))
	t.file("source", content)
	r, w := t.open("source", unix.O_RDONLY, 0), t.open("target", unix.O_CREAT|unix.O_RDWR, 0o644)
	for sent := 0; sent < len(content); {
		n, err := unix.Sendfile(w, r, nil, len(content)-sent)
		t.must(err)
		if n == 0 {
			break
		}
		sent += n
	}
	equal(t, "sent", t.content("target"), content)
	var p [2]int
	t.must(unix.Pipe2(p[:], unix.O_CLOEXEC))
	t.fds = append(t.fds, p[0], p[1])
	off := int64(5)
	n, err := unix.Splice(r, &off, p[1], nil, 1000, 0)
	t.want(0, err)
	equal(t, "into the pipe", n, 1000)
	off = 50
	n, err = unix.Splice(p[0], nil, w, &off, 1000, 0)
	t.want(0, err)
	equal(t, "out of the pipe", n, 1000)
	equal(t, "content", t.pread(w, 1000, 50), content[5:1005])
}
