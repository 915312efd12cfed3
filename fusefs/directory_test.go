package fusefs

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func makeEntries(t *testing.T, dir string, n int) {
	t.Helper()
	must(t, os.Mkdir(dir, 0o755))
	for i := range n {
		must(t, unix.Mknod(fmt.Sprintf("%s/%05d", dir, i), unix.S_IFREG|0o644, 0))
	}
}

func TestManyEntries(t *testing.T) {
	const manyEntries = 10_000
	mnt := mount(t)
	dir := mnt + "/dir"
	makeEntries(t, dir, manyEntries)
	for range 2 { // from the filesystem, then from the kernel's cache
		entries, err := os.ReadDir(dir)
		must(t, err)
		if len(entries) != manyEntries {
			t.Fatalf("%d entries", len(entries))
		}
		for i, e := range entries {
			if e.Name() != fmt.Sprintf("%05d", i) || !e.Type().IsRegular() {
				t.Fatalf("entry %d is %s, %v", i, e.Name(), e.Type())
			}
		}
	}
	must(t, os.RemoveAll(dir))
}

// Entries that exist during the whole listing appear exactly once, whatever happens to the others meanwhile.
func TestListingWhileChanging(t *testing.T) {
	mnt := mount(t)
	dir := mnt + "/dir"
	const n = 2000
	makeEntries(t, dir, n)
	d, err := os.Open(dir)
	must(t, err)
	defer d.Close()
	seen := make(map[string]int)
	for step := 0; ; step++ {
		names, err := d.Readdirnames(100)
		for _, name := range names {
			seen[name]++
		}
		if err != nil {
			break
		}
		if step >= 100 {
			continue // else there would always be a new entry to list
		}
		// Odd entries go, in both directions from the position; new ones come.
		for _, i := range []int{2*step + 1, n - 2*step - 1} {
			if err := os.Remove(fmt.Sprintf("%s/%05d", dir, i)); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
		}
		write(t, fmt.Sprintf("%s/new%d", dir, step), "")
		must(t, os.Rename(fmt.Sprintf("%s/new%d", dir, step), fmt.Sprintf("%s/newer%d", dir, step)))
	}
	for name, count := range seen {
		if count > 1 {
			t.Errorf("%s appeared %d times", name, count)
		}
	}
	for i := 0; i < n; i += 2 {
		if name := fmt.Sprintf("%05d", i); seen[name] != 1 {
			t.Errorf("%s appeared %d times", name, seen[name])
		}
	}
}

func TestSeekInDirectory(t *testing.T) {
	mnt := mount(t)
	dir := mnt + "/dir"
	makeEntries(t, dir, 300)
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	next := func() []string {
		n, err := unix.Getdents(fd, buf)
		must(t, err)
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		return names
	}
	next()
	position, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	must(t, err)
	second := next()
	next()
	_, err = unix.Seek(fd, position, unix.SEEK_SET)
	must(t, err)
	if again := next(); !slices.Equal(again, second) {
		t.Fatalf("after seeking back: %q, first %q", again[0], second[0])
	}
	_, err = unix.Seek(fd, 0, unix.SEEK_SET)
	must(t, err)
	must(t, os.Remove(dir+"/00000"))
	if first := next(); first[0] != "00001" {
		t.Fatalf("after rewinding: %q", first[0])
	}
}

func TestDotEntries(t *testing.T) {
	mnt := mount(t)
	must(t, os.MkdirAll(mnt+"/a/b", 0o755))
	must(t, os.Mkdir(mnt+"/c", 0o755))
	must(t, os.Rename(mnt+"/a/b", mnt+"/c/b"))
	fd, err := unix.Open(mnt+"/c/b", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	n, err := unix.Getdents(fd, buf)
	must(t, err)
	entries := dirents(buf[:n])
	if entries["."] != stat(t, mnt+"/c/b").Ino || entries[".."] != stat(t, mnt+"/c").Ino || len(entries) != 2 {
		t.Fatalf("got %v", entries)
	}
}

// dirents maps names to inode numbers.
func dirents(buf []byte) map[string]uint64 {
	entries := make(map[string]uint64)
	for len(buf) > 0 {
		length := int(buf[16]) | int(buf[17])<<8
		var ino uint64
		for i := range 8 {
			ino |= uint64(buf[i]) << (8 * i)
		}
		entries[unix.ByteSliceToString(buf[19:length])] = ino
		buf = buf[length:]
	}
	return entries
}

// A removed directory that is open, or somebody's working directory, stays usable and empty.
func TestRemovedOpenDirectory(t *testing.T) {
	mnt := mount(t)
	must(t, os.Mkdir(mnt+"/d", 0o755))
	fd, err := unix.Open(mnt+"/d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, os.Remove(mnt+"/d"))
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	if st.Nlink != 0 {
		t.Fatalf("%d links", st.Nlink)
	}
	wantErr(t, unix.Mkdirat(fd, "x", 0o755), unix.ENOENT)
}

func TestDirectoryErrors(t *testing.T) {
	mnt := mount(t)
	must(t, os.MkdirAll(mnt+"/d/below", 0o755))
	write(t, mnt+"/f", "")
	wantErr(t, unix.Rmdir(mnt+"/d"), unix.ENOTEMPTY)
	wantErr(t, unix.Rmdir(mnt+"/f"), unix.ENOTDIR)
	wantErr(t, unix.Unlink(mnt+"/d"), unix.EISDIR)
	wantErr(t, unix.Mkdir(mnt+"/f", 0o755), unix.EEXIST)
	wantErr(t, unix.Mkdir(mnt+"/f/x", 0o755), unix.ENOTDIR)
	wantErr(t, unix.Rename(mnt+"/f", mnt+"/d"), unix.EISDIR)
	wantErr(t, unix.Rename(mnt+"/d", mnt+"/f"), unix.ENOTDIR)
	wantErr(t, unix.Rename(mnt+"/d", mnt+"/d/below/x"), unix.EINVAL)
	wantErr(t, unix.Link(mnt+"/d", mnt+"/e"), unix.EPERM)
}
