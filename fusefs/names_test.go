package fusefs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/volume"
)

func TestRenameFlags(t *testing.T) {
	mnt := mount(t)
	a, b := mnt+"/a", mnt+"/b"
	rename := func(from, to string, flags uint) error {
		return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags)
	}
	write(t, a, "A")
	write(t, b, "B")
	wantErr(t, rename(a, b, unix.RENAME_NOREPLACE), unix.EEXIST)
	must(t, rename(a, b, unix.RENAME_EXCHANGE))
	wantContent(t, a, "B")
	wantContent(t, b, "A")
	wantErr(t, rename(a, mnt+"/missing", unix.RENAME_EXCHANGE), unix.ENOENT)
	wantErr(t, rename(a, b, unix.RENAME_WHITEOUT), unix.EINVAL)
	wantErr(t, rename(a, b, unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE), unix.EINVAL)
	must(t, rename(a, mnt+"/c", unix.RENAME_NOREPLACE))
	wantErr(t, unix.Access(a, unix.F_OK), unix.ENOENT)

	// A directory and a file change places, and with them the link counts of their parents.
	must(t, os.MkdirAll(mnt+"/p/dir", 0o755))
	must(t, os.MkdirAll(mnt+"/q", 0o755))
	write(t, mnt+"/q/file", "F")
	must(t, rename(mnt+"/p/dir", mnt+"/q/file", unix.RENAME_EXCHANGE))
	if p, q := stat(t, mnt+"/p").Nlink, stat(t, mnt+"/q").Nlink; p != 2 || q != 3 {
		t.Fatalf("link counts %d and %d, want 2 and 3", p, q)
	}
	wantErr(t, os.Rename(mnt+"/q", mnt+"/q/file/below"), unix.EINVAL)
}

func TestRenameOverOpenFile(t *testing.T) {
	mnt := mount(t)
	write(t, mnt+"/old", "old content")
	write(t, mnt+"/new", "new content")
	f, err := os.OpenFile(mnt+"/old", os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	must(t, os.Rename(mnt+"/new", mnt+"/old"))
	wantContent(t, mnt+"/old", "new content")
	var st unix.Stat_t
	must(t, unix.Fstat(int(f.Fd()), &st))
	if st.Nlink != 0 {
		t.Fatalf("the replaced file has %d links", st.Nlink)
	}
	_, err = f.WriteAt([]byte("OLD"), 0)
	must(t, err)
	buf := make([]byte, 11)
	_, err = f.ReadAt(buf, 0)
	must(t, err)
	if string(buf) != "OLD content" {
		t.Fatalf("the replaced file holds %q", buf)
	}
}

func TestUnlinkedOpenFile(t *testing.T) {
	mnt, server := mountServer(t)
	f, err := os.Create(mnt + "/f")
	must(t, err)
	defer f.Close()
	_, err = f.WriteString("still here")
	must(t, err)
	ino := volume.Ino(stat(t, mnt+"/f").Ino)
	must(t, os.Remove(mnt+"/f"))
	must(t, server.InvalidateContent(ino, 0, 0))
	_, err = f.WriteAt([]byte("!"), 10)
	must(t, err)
	must(t, f.Sync())
	must(t, f.Truncate(1<<20))
	buf := make([]byte, 12)
	_, err = f.ReadAt(buf, 0)
	must(t, err)
	if string(buf) != "still here!\x00" {
		t.Fatalf("got %q", buf)
	}
	// The descriptor can still be opened again through /proc, but not linked back.
	again, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	must(t, err)
	defer again.Close()
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, mnt+"/g", unix.AT_SYMLINK_FOLLOW)
	wantErr(t, err, unix.ENOENT)
}

func TestTmpfile(t *testing.T) {
	mnt := mount(t)
	fd, err := unix.Open(mnt, unix.O_TMPFILE|unix.O_RDWR, 0o640)
	must(t, err)
	f := os.NewFile(uintptr(fd), "tmpfile")
	defer f.Close()
	_, err = f.WriteString("content")
	must(t, err)
	if names, err := os.ReadDir(mnt); err != nil || len(names) != 0 {
		t.Fatalf("the nameless file is listed: %v, %v", names, err)
	}
	must(t, unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, mnt+"/f", unix.AT_SYMLINK_FOLLOW))
	wantContent(t, mnt+"/f", "content")
	if st := stat(t, mnt+"/f"); st.Nlink != 1 || st.Mode != unix.S_IFREG|0o640 {
		t.Fatalf("%d links, mode %o", st.Nlink, st.Mode)
	}
}

func TestNames(t *testing.T) {
	mnt := mount(t)
	for _, name := range []string{strings.Repeat("n", 255), "\xff\xfe not UTF-8", "new\nline", "ü", "...", "-"} {
		write(t, filepath.Join(mnt, name), name)
		wantContent(t, filepath.Join(mnt, name), name)
	}
	long := filepath.Join(mnt, strings.Repeat("n", 256))
	for operation, err := range map[string]error{
		"open":    os.WriteFile(long, nil, 0o644),
		"mkdir":   os.Mkdir(long, 0o755),
		"symlink": os.Symlink("x", long),
		"link":    os.Link(filepath.Join(mnt, "ü"), long),
		"rename":  os.Rename(filepath.Join(mnt, "ü"), long),
		"unlink":  unix.Unlink(long),
		"stat":    unix.Access(long, unix.F_OK),
	} {
		if !errors.Is(err, syscall.ENAMETOOLONG) {
			t.Errorf("%s: %v", operation, err)
		}
	}
}

func TestNodes(t *testing.T) {
	mnt := mount(t)
	device := unix.Mkdev(0x123, 0x45678)
	for name, mode := range map[string]uint32{"fifo": unix.S_IFIFO | 0o600, "socket": unix.S_IFSOCK | 0o755,
		"char": unix.S_IFCHR | 0o644, "block": unix.S_IFBLK | 0o660, "file": unix.S_IFREG | 0o444} {
		path := filepath.Join(mnt, name)
		must(t, unix.Mknod(path, mode, int(device)))
		st := stat(t, path)
		if st.Mode != mode&^0o022 {
			t.Errorf("%s: mode %o, want %o", name, st.Mode, mode&^0o022)
		}
		if isDevice := mode&unix.S_IFMT == unix.S_IFCHR || mode&unix.S_IFMT == unix.S_IFBLK; isDevice && st.Rdev != device {
			t.Errorf("%s: device %#x, want %#x", name, st.Rdev, device)
		}
		wantErr(t, unix.Mknod(path, mode, int(device)), unix.EEXIST)
	}
	// The null device works through the mount.
	must(t, unix.Mknod(mnt+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	write(t, mnt+"/null", "gone")
	wantContent(t, mnt+"/null", "")
}

func TestSymlinks(t *testing.T) {
	mnt := mount(t)
	target := strings.Repeat("t/", 2047) + "t"
	must(t, os.Symlink(target, mnt+"/long"))
	for range 2 { // from the filesystem, then from the kernel's cache
		got, err := os.Readlink(mnt + "/long")
		must(t, err)
		if got != target {
			t.Fatalf("a target of %d bytes", len(got))
		}
	}
	if st := stat(t, mnt+"/long"); st.Size != int64(len(target)) || st.Mode != unix.S_IFLNK|0o777 {
		t.Fatalf("size %d, mode %o", st.Size, st.Mode)
	}
	must(t, os.Symlink("loop", mnt+"/loop"))
	_, err := os.Open(mnt + "/loop")
	wantErr(t, err, unix.ELOOP)
}

func TestBirthTime(t *testing.T) {
	mnt := mount(t)
	write(t, mnt+"/f", "x")
	must(t, os.Chmod(mnt+"/f", 0o600))
	var st unix.Statx_t
	must(t, unix.Statx(unix.AT_FDCWD, mnt+"/f", 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st))
	if st.Mask&unix.STATX_BTIME == 0 || st.Btime.Sec == 0 {
		t.Fatalf("no birth time: mask %#x", st.Mask)
	}
	if birth, change := st.Btime.Sec*1e9+int64(st.Btime.Nsec), st.Ctime.Sec*1e9+int64(st.Ctime.Nsec); birth >= change {
		t.Fatalf("born at %d, changed at %d", birth, change)
	}
}

func TestSetTimes(t *testing.T) {
	mnt, server := mountServer(t)
	write(t, mnt+"/f", "x")
	times := []unix.Timespec{{Sec: -5, Nsec: 999_999_999}, {Sec: 1 << 32, Nsec: 1}}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, mnt+"/f", times, 0))
	uncache(t, server, mnt+"/f")
	if st := stat(t, mnt+"/f"); st.Atim != times[0] || st.Mtim != times[1] {
		t.Fatalf("got %v and %v", st.Atim, st.Mtim)
	}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, mnt+"/f", []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}}, 0))
	if st := stat(t, mnt+"/f"); st.Atim.Sec < 1e9 || st.Mtim != times[1] {
		t.Fatalf("got %v and %v", st.Atim, st.Mtim)
	}
}

// A handle made by name_to_handle_at finds its file after the kernel has forgotten it.
func TestFileHandle(t *testing.T) {
	mnt, server := mountServer(t)
	must(t, os.MkdirAll(mnt+"/a/b", 0o755))
	write(t, mnt+"/a/b/f", "found")
	root, err := unix.Open(mnt, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(root)
	handle, _, err := unix.NameToHandleAt(root, "a/b/f", 0)
	must(t, err)
	must(t, server.InvalidateEntry(volume.RootIno, "a"))
	fd, err := unix.OpenByHandleAt(root, handle, unix.O_RDONLY)
	must(t, err)
	f := os.NewFile(uintptr(fd), "by handle")
	defer f.Close()
	buf := make([]byte, 5)
	_, err = f.Read(buf)
	must(t, err)
	if string(buf) != "found" {
		t.Fatalf("got %q", buf)
	}
	must(t, os.Remove(mnt+"/a/b/f"))
	must(t, f.Close())
	for deadline := time.Now().Add(10 * time.Second); ; {
		fd, err := unix.OpenByHandleAt(root, handle, unix.O_RDONLY)
		if err == nil { // the kernel has the inode still
			must(t, unix.Close(fd))
			if time.Now().Before(deadline) {
				continue
			}
		}
		wantErr(t, err, unix.ESTALE)
		break
	}
}

func TestUnknownIoctl(t *testing.T) {
	mnt := mount(t)
	f, err := os.Create(mnt + "/f")
	must(t, err)
	defer f.Close()
	_, err = unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	wantErr(t, err, unix.ENOTTY)
	_, err = unix.IoctlGetInt(int(f.Fd()), 0x1234)
	wantErr(t, err, unix.ENOTTY)
}
