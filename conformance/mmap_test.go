package conformance

import (
	"bytes"
	"os"

	"golang.org/x/sys/unix"
)

func mmapCases() []testCase {
	return []testCase{
		{op: "mmap", name: "shared, writable: seen by read, and mtime", run: mmapShared},
		{op: "mmap", name: "private changes stay private", run: func(t *T) {
			t.file("file", "content")
			m := t.mmap(t.open("file", unix.O_RDONLY, 0), 7, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
			copy(m, "CHANGED")
			equal(t, "content", t.content("file"), "content")
			equal(t, "mapping", string(m), "CHANGED")
		}},
		{op: "mmap", name: "write is seen in a mapping", run: func(t *T) {
			fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
			t.pwrite(fd, string(bytes.Repeat([]byte("a"), 10_000)), 0)
			m := t.mmap(fd, 10_000, unix.PROT_READ, unix.MAP_SHARED)
			equal(t, "byte", m[5000], 'a')
			t.pwrite(fd, "b", 5000)
			equal(t, "byte", m[5000], 'b')
			t.want(0, unix.Fallocate(fd, punch, 0, 8192))
			equal(t, "punched byte", m[5000], 0)
			equal(t, "byte behind the hole", m[9000], 'a')
		}},
		{op: "mmap", name: "what lies behind the end of the file", run: func(t *T) {
			fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
			t.pwrite(fd, "content", 0)
			m := t.mmap(fd, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			equal(t, "rest of the page", string(m[7:100]), zeros(93))
			copy(m[7:], "behind the end")
			t.want(0, unix.Msync(m, unix.MS_SYNC))
			equal(t, "size", t.fstat(fd).Size, 7)
			t.want(0, unix.Ftruncate(fd, 100))
			equal(t, "content", t.content("file"), "content"+zeros(93))
		}},
		{op: "mmap", name: "outlives the descriptor and the name", run: func(t *T) {
			fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
			t.must(unix.Ftruncate(fd, 1<<20))
			m := t.mmap(fd, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			t.must(unix.Link("file", "other"))
			t.close(fd)
			t.want(0, unix.Unlink("file"))
			for i := 0; i < len(m); i += 4096 {
				m[i] = 'm'
			}
			t.want(0, unix.Msync(m, unix.MS_SYNC))
			equal(t, "byte", t.content("other")[512<<10], 'm')
			t.want(0, unix.Unlink("other"))
			m[1] = 'n'
			t.want(0, unix.Msync(m, unix.MS_SYNC))
		}},
		{op: "mmap", name: "descriptors that do not allow it", run: func(t *T) {
			t.file("file", "content")
			w, r := t.open("file", unix.O_WRONLY, 0), t.open("file", unix.O_RDONLY, 0)
			_, err := unix.Mmap(w, 0, 7, unix.PROT_READ, unix.MAP_SHARED)
			t.want(unix.EACCES, err)
			_, err = unix.Mmap(r, 0, 7, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			t.want(unix.EACCES, err)
			_, err = unix.Mmap(t.openDir(), 0, 7, unix.PROT_READ, unix.MAP_SHARED)
			t.want(unix.ENODEV, err)
		}},
	}
}

// mmap maps a file until the end of the process.
func (t *T) mmap(fd, length, protection, flags int) []byte {
	m, err := unix.Mmap(fd, 0, length, protection, flags)
	t.must(err)
	t.maps = append(t.maps, m)
	return m
}

func mmapShared(t *T) {
	fd := t.open("file", unix.O_CREAT|unix.O_RDWR, 0o644)
	t.pwrite(fd, string(bytes.Repeat([]byte("a"), 100_000)), 0)
	m := t.mmap(fd, 100_000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	before := t.stamps("file")
	t.tick()
	copy(m[50_000:], "through the mapping")
	equal(t, "read", t.pread(fd, 19, 50_000), "through the mapping")
	t.want(0, unix.Msync(m, unix.MS_SYNC))
	after := t.stamps("file")
	t.that(after.mtime > before.mtime && after.ctime > before.ctime, "mtime and ctime are not changed by msync")
	before = t.stamps("file")
	t.tick()
	m[7] = 'c'
	t.must(unix.Munmap(m))
	t.maps = nil
	t.close(fd)
	after = t.stamps("file")
	t.that(after.mtime > before.mtime, "mtime is not changed by munmap and close")
	b, err := os.ReadFile("file")
	t.want(0, err)
	equal(t, "byte", b[7], 'c')
}
