package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func TestAppendAndTruncate(t *testing.T) {
	mnt := mount(t)
	one, err := os.OpenFile(mnt+"/f", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	must(t, err)
	defer one.Close()
	two, err := os.OpenFile(mnt+"/f", os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	defer two.Close()
	var want strings.Builder
	for i := range 100 {
		for j, f := range []*os.File{one, two} {
			line := fmt.Sprintf("line %d of %d\n", i, j)
			want.WriteString(line)
			_, err := f.WriteString(line)
			must(t, err)
		}
	}
	wantContent(t, mnt+"/f", want.String())
	must(t, os.Truncate(mnt+"/f", 7))
	_, err = one.WriteString("end")
	must(t, err)
	wantContent(t, mnt+"/f", "line 0 end")
	f, err := os.OpenFile(mnt+"/f", os.O_WRONLY|os.O_TRUNC, 0)
	must(t, err)
	must(t, f.Close())
	wantContent(t, mnt+"/f", "")
	_, err = two.WriteString("again")
	must(t, err)
	wantContent(t, mnt+"/f", "again")
}

func TestSparse(t *testing.T) {
	mnt := mount(t)
	f := create(t, mnt+"/f")
	const far = 1 << 40
	_, err := f.WriteAt([]byte("near"), 1<<20)
	must(t, err)
	_, err = f.WriteAt([]byte("far"), far)
	must(t, err)
	must(t, f.Sync())
	st := stat(t, mnt+"/f")
	if st.Size != far+3 || st.Blocks > 100 {
		t.Fatalf("size %d, %d blocks", st.Size, st.Blocks)
	}
	seek := func(off int64, whence int) int64 {
		t.Helper()
		n, err := f.Seek(off, whence)
		must(t, err)
		return n
	}
	if data := seek(0, unix.SEEK_DATA); data == 0 || data > 1<<20 {
		t.Fatalf("first data at %d", data)
	}
	hole := seek(1<<20, unix.SEEK_HOLE)
	if hole < 1<<20+4 || hole > 2<<20 {
		t.Fatalf("hole at %d", hole)
	}
	if data := seek(hole, unix.SEEK_DATA); data > far || data < far-1<<20 {
		t.Fatalf("second data at %d", data)
	}
	if end := seek(far, unix.SEEK_HOLE); end != far+3 {
		t.Fatalf("the hole at the end is at %d", end)
	}
	_, err = f.Seek(far+3, unix.SEEK_DATA)
	wantErr(t, err, unix.ENXIO)
	buf := make([]byte, 8)
	_, err = f.ReadAt(buf, far-5)
	must(t, err)
	if string(buf) != "\x00\x00\x00\x00\x00far" {
		t.Fatalf("got %q", buf)
	}
	must(t, f.Truncate(1<<62))
	if size := stat(t, mnt+"/f").Size; size != 1<<62 {
		t.Fatalf("size %d", size)
	}
}

func TestFallocate(t *testing.T) {
	mnt, server := mountServer(t)
	f := create(t, mnt+"/f")
	content := bytes.Repeat([]byte("abcd"), 16<<10)
	_, err := f.Write(content)
	must(t, err)
	allocate := func(mode uint32, off, n int64) error { return unix.Fallocate(int(f.Fd()), mode, off, n) }
	same := func(step string) {
		t.Helper()
		uncache(t, server, mnt+"/f")
		got, err := os.ReadFile(mnt + "/f")
		must(t, err)
		if !bytes.Equal(got, content) {
			t.Fatalf("%s: the content differs", step)
		}
	}
	must(t, allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4097, 20000))
	clear(content[4097:24097])
	same("punch hole")
	must(t, allocate(unix.FALLOC_FL_ZERO_RANGE, 60000, 10000))
	clear(content[60000:])
	content = append(content, make([]byte, 70000-len(content))...)
	same("zero range past the end")
	must(t, allocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 65000, 100000))
	same("zero range, size kept")
	must(t, allocate(0, 0, 100000))
	content = append(content, make([]byte, 100000-len(content))...)
	same("extend")
	must(t, allocate(unix.FALLOC_FL_KEEP_SIZE, 100000, 100000))
	same("reserve")
	wantErr(t, allocate(unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096), unix.EOPNOTSUPP)
	wantErr(t, allocate(0, 0, 0), unix.EINVAL)
}

func TestCopyRange(t *testing.T) {
	mnt, server := mountServer(t)
	content := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{1}).Read(content)
	must(t, os.WriteFile(mnt+"/src", content, 0o644))
	src, err := os.Open(mnt + "/src")
	must(t, err)
	defer src.Close()
	dst := create(t, mnt+"/dst")
	srcOff, dstOff := int64(1000), int64(777)
	for want := 2 << 20; want > 0; {
		n, err := unix.CopyFileRange(int(src.Fd()), &srcOff, int(dst.Fd()), &dstOff, want, 0)
		must(t, err)
		if n == 0 {
			t.Fatal("the copy ended early")
		}
		want -= n
	}
	uncache(t, server, mnt+"/dst")
	got, err := os.ReadFile(mnt + "/dst")
	must(t, err)
	if !bytes.Equal(got[:777], make([]byte, 777)) || !bytes.Equal(got[777:], content[1000:1000+2<<20]) {
		t.Fatalf("the copy of %d bytes differs", len(got))
	}
	// The two files are independent.
	_, err = dst.WriteAt([]byte("changed"), 777)
	must(t, err)
	uncache(t, server, mnt+"/src")
	if got, err := os.ReadFile(mnt + "/src"); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the source changed: %v", err)
	}
}

func TestDirectIO(t *testing.T) {
	mnt := mount(t)
	fd, err := unix.Open(mnt+"/f", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o644)
	must(t, err)
	defer unix.Close(fd)
	block := bytes.Repeat([]byte("direct! "), 512)
	for i := range 16 {
		_, err := unix.Pwrite(fd, block, int64(i*len(block)))
		must(t, err)
	}
	wantContent(t, mnt+"/f", strings.Repeat("direct! ", 512*16))
	// What is written through the page cache is read directly, and the other way round.
	f, err := os.OpenFile(mnt+"/f", os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte("BUFFERED"), 4096)
	must(t, err)
	got := make([]byte, 8)
	_, err = unix.Pread(fd, got, 4096)
	must(t, err)
	if string(got) != "BUFFERED" {
		t.Fatalf("read directly: %q", got)
	}
	_, err = unix.Pwrite(fd, block, 4096)
	must(t, err)
	_, err = f.ReadAt(got, 4096)
	must(t, err)
	if string(got) != "direct! " {
		t.Fatalf("read through the cache: %q", got)
	}
}

// Memory maps are tested in another process: a page fault in the serving process could stop its own server.
func TestMmap(t *testing.T) {
	mnt, server := mountServer(t)
	path := mnt + "/f"
	must(t, helper(t, "mmap", path).Run())
	uncache(t, server, path)
	got, err := os.ReadFile(path)
	must(t, err)
	want := make([]byte, mmapBytes)
	copy(want, "written")
	copy(want[mmapBytes-3:], "end")
	copy(want[5000:], "mapped")
	if !bytes.Equal(got, want) {
		t.Fatal("the content differs")
	}
	st := stat(t, path)
	if st.Mtim.Sec < 1e9 {
		t.Fatalf("writing through the map did not change mtime: %v", st.Mtim)
	}
}

const mmapBytes = 1 << 20

func helpMmap(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	if err := f.Truncate(mmapBytes); err != nil {
		return err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, mmapBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(m[mmapBytes-3:], "end")
	if _, err := f.WriteAt([]byte("written"), 0); err != nil {
		return err
	}
	if string(m[:7]) != "written" {
		return errors.New("the map does not show what write wrote")
	}
	if err := unix.Utimes(path, []unix.Timeval{{Sec: 1}, {Sec: 1}}); err != nil {
		return err
	}
	copy(m[5000:], "mapped")
	buf := make([]byte, 6)
	if _, err := f.ReadAt(buf, 5000); err != nil || string(buf) != "mapped" {
		return fmt.Errorf("read does not show what the map holds: %q, %v", buf, err)
	}
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		return err
	}
	if err := unix.Munmap(m); err != nil {
		return err
	}
	return f.Close()
}

func TestLargestFile(t *testing.T) {
	mnt := mount(t)
	f := create(t, mnt+"/f")
	_, err := unix.Pwrite(int(f.Fd()), []byte("x"), 1<<63-2)
	must(t, err)
	if size := stat(t, mnt+"/f").Size; size != 1<<63-1 {
		t.Fatalf("size %d", size)
	}
}

// A random mix of writes, truncations and holes, compared with the same on a slice.
func TestRandomContent(t *testing.T) {
	mnt, server := mountServer(t)
	f := create(t, mnt+"/f")
	rng := rand.New(rand.NewPCG(1, 2))
	var want []byte
	const sizeMax = 1 << 20
	for step := range 400 {
		off := rng.IntN(sizeMax)
		n := 1 + rng.IntN(min(100_000, sizeMax-off))
		grow := func(size int) {
			if size > len(want) {
				want = append(want, make([]byte, size-len(want))...)
			}
		}
		switch rng.IntN(6) {
		case 0, 1, 2:
			data := bytes.Repeat([]byte{byte(1 + step%255)}, n)
			_, err := f.WriteAt(data, int64(off))
			must(t, err)
			grow(off + n)
			copy(want[off:], data)
		case 3:
			must(t, f.Truncate(int64(off)))
			grow(off)
			want = want[:off:off]
		case 4:
			must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)))
			if off < len(want) {
				clear(want[off:min(off+n, len(want))])
			}
		case 5:
			if rng.IntN(4) == 0 {
				uncache(t, server, mnt+"/f")
			}
			got := make([]byte, n)
			read, _ := f.ReadAt(got, int64(off))
			expected := want[min(off, len(want)):min(off+n, len(want))]
			if !bytes.Equal(got[:read], expected) {
				t.Fatalf("step %d: %d bytes at %d differ", step, n, off)
			}
		}
	}
	uncache(t, server, mnt+"/f")
	got, err := os.ReadFile(mnt + "/f")
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatalf("%d bytes differ from %d wanted", len(got), len(want))
	}
}
