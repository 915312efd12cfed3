package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/internal/reference"
)

// executor does operations on a mount, through system calls.
type executor struct {
	root string
	fds  [handles]int // -1: not open
}

func newExecutor(root string) *executor {
	x := &executor{root: root}
	for i := range x.fds {
		x.fds[i] = -1
	}
	return x
}

func (x *executor) closeAll() {
	for i, fd := range x.fds {
		if fd >= 0 {
			unix.Close(fd) // of a mount that is gone: fails, and closes
			x.fds[i] = -1
		}
	}
}

// wholeBytes is how much one write may carry to be one request of the kernel,
// and so one change for a crash. What is longer is flushed at once.
const wholeBytes = 128 << 10

// run does an operation and notes when.
func (x *executor) run(o op) (r result) {
	began := time.Now().UnixNano()
	if o.Kind == "parallel" {
		r.parallel = make([][]result, len(o.Threads))
		var working sync.WaitGroup
		for i, list := range o.Threads {
			working.Go(func() {
				for _, part := range list {
					r.parallel[i] = append(r.parallel[i], x.run(part))
				}
			})
		}
		working.Wait()
		r.errno = x.fsyncDir(".")
	} else {
		err := x.do(o, &r)
		if err != nil && !errors.As(err, &r.errno) {
			r.text = err.Error() // differs from what is wanted, whatever that is
		}
	}
	r.during = reference.Times{From: began, To: time.Now().UnixNano()}
	return r
}

func (x *executor) do(o op, r *result) (err error) {
	p := filepath.Join(x.root, o.Path)
	fd := x.fds[o.Handle]
	if onHandle[o.Kind] && fd < 0 {
		return nil
	}
	switch o.Kind {
	case "open", "tmpfile":
		flags := unix.O_RDWR | unix.O_NOFOLLOW | unix.O_CLOEXEC | o.Flags
		if o.Kind == "tmpfile" {
			flags = unix.O_RDWR | unix.O_TMPFILE | unix.O_CLOEXEC | o.Flags
		}
		opened, err := unix.Open(p, flags, o.Mode)
		if err != nil {
			return err
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		x.fds[o.Handle] = opened
		var st unix.Stat_t
		err = unix.Fstat(opened, &st)
		r.ino = st.Ino
		return err
	case "close":
		x.fds[o.Handle] = -1
		return unix.Close(fd)
	case "write":
		r.n, err = unix.Pwrite(fd, content(o.Seed, o.Len), int64(o.Off))
		if err == nil && o.Len > wholeBytes {
			err = unix.Fsync(fd)
		}
		return err
	case "read":
		r.data = make([]byte, o.Len)
		n, err := unix.Pread(fd, r.data, int64(o.Off))
		r.data = r.data[:max(n, 0)]
		return err
	case "mmap":
		r.data, err = x.mmap(fd, o)
		return err
	case "ftruncate":
		return unix.Ftruncate(fd, int64(o.Len))
	case "fallocate":
		return unix.Fallocate(fd, o.Mode, int64(o.Off), int64(o.Len))
	case "seek":
		n, err := unix.Seek(fd, int64(o.Off), o.Flags)
		r.n = int(max(n, 0))
		return err
	case "copy":
		if x.fds[o.Handle2] < 0 {
			return nil
		}
		from, to := int64(o.Off), int64(o.Off2)
		n, err := unix.CopyFileRange(fd, &from, x.fds[o.Handle2], &to, o.Len, 0)
		r.n = max(n, 0)
		return err
	case "fsync":
		return unix.Fsync(fd)
	case "fdatasync":
		return unix.Fdatasync(fd)
	case "fstat":
		r.stat = new(unix.Stat_t)
		return unix.Fstat(fd, r.stat)
	case "linkhandle":
		return unix.Linkat(unix.AT_FDCWD, fmt.Sprint("/proc/self/fd/", fd), unix.AT_FDCWD, p, unix.AT_SYMLINK_FOLLOW)
	case "truncate":
		return unix.Truncate(p, int64(o.Len))
	case "mkdir":
		return made(p, r, unix.Mkdir(p, o.Mode))
	case "symlink":
		return made(p, r, unix.Symlink(o.Path2, p))
	case "mknod":
		return made(p, r, unix.Mknod(p, unix.S_IFSOCK|o.Mode, 0))
	case "unlink":
		return unix.Unlink(p)
	case "rmdir":
		return unix.Rmdir(p)
	case "link":
		return unix.Link(p, filepath.Join(x.root, o.Path2))
	case "rename":
		return unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, filepath.Join(x.root, o.Path2), uint(o.Flags))
	case "fsyncdir":
		if errno := x.fsyncDir(o.Path); errno != 0 {
			return errno
		}
		return nil
	case "readdir":
		r.text, err = listDir(p)
		return err
	case "readlink":
		buf := make([]byte, 4096)
		n, err := unix.Readlink(p, buf)
		r.text = string(buf[:max(n, 0)])
		return err
	case "lstat":
		r.stat = new(unix.Stat_t)
		return unix.Lstat(p, r.stat)
	case "chmod":
		return unix.Chmod(p, o.Mode)
	case "lchown":
		return unix.Lchown(p, o.Off, o.Off2)
	case "utimens":
		at := unix.NsecToTimespec(int64(o.Off))
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
	case "setxattr":
		return unix.Lsetxattr(p, o.Path2, content(o.Seed, o.Len), o.Flags)
	case "removexattr":
		return unix.Lremovexattr(p, o.Path2)
	case "getxattr":
		r.data, err = getxattr(p, o.Path2)
		return err
	}
	panic("no operation " + o.Kind)
}

// made notes the inode number of what was made.
func made(p string, r *result, err error) error {
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Lstat(p, &st)
	r.ino = st.Ino
	return err
}

// mmap reads and overwrites what the file has of a range, through a shared
// mapping, and flushes it.
func (x *executor) mmap(fd int, o op) (old []byte, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	n := min(o.Len, int(st.Size)-o.Off)
	if n <= 0 {
		return nil, nil
	}
	skip := o.Off % os.Getpagesize()
	m, err := unix.Mmap(fd, int64(o.Off-skip), skip+n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	old = slices.Clone(m[skip:])
	copy(m[skip:], content(o.Seed, n))
	return old, errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m))
}

func (x *executor) fsyncDir(p string) syscall.Errno {
	fd, err := unix.Open(filepath.Join(x.root, p), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(unix.Fsync(fd), unix.Close(fd))
	}
	var errno syscall.Errno
	errors.As(err, &errno)
	return errno
}

func listDir(p string) (string, error) {
	d, err := os.OpenFile(p, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return "", err
	}
	var lines []string
	for _, e := range entries {
		kind := map[os.FileMode]int{0: unix.S_IFREG, os.ModeDir: unix.S_IFDIR, os.ModeSymlink: unix.S_IFLNK, os.ModeSocket: unix.S_IFSOCK}[e.Type()]
		lines = append(lines, fmt.Sprintf("%s:%o ", e.Name(), kind))
	}
	slices.Sort(lines)
	return strings.Join(lines, ""), nil
}

func getxattr(p, name string) ([]byte, error) {
	b := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(p, name, b)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}

// look returns everything that is in the mount, by path.
func (x *executor) look() (map[string]*found, error) {
	all := make(map[string]*found)
	read := make(map[uint64][]byte) // by inode: a file of several names is read once
	var look func(p string) error
	look = func(p string) error {
		full := filepath.Join(x.root, p)
		f := &found{xattrs: make(map[string]string)}
		all[p] = f
		if err := unix.Lstat(full, &f.stat); err != nil {
			return fmt.Errorf("lstat %s: %w", p, err)
		}
		buf := make([]byte, 4096)
		n, err := unix.Llistxattr(full, buf)
		if err != nil {
			return fmt.Errorf("list attributes of %s: %w", p, err)
		}
		for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
			if name == "" {
				continue
			}
			value, err := getxattr(full, name)
			if err != nil {
				return fmt.Errorf("attribute of %s: %w", p, err)
			}
			f.xattrs[name] = string(value)
		}
		switch f.stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			var ok bool
			if f.data, ok = read[f.stat.Ino]; !ok {
				if f.data, err = os.ReadFile(full); err != nil {
					return fmt.Errorf("read %s: %w", p, err)
				}
				read[f.stat.Ino] = f.data
			}
		case unix.S_IFLNK:
			f.target, err = os.Readlink(full)
		case unix.S_IFDIR:
			if f.listing, err = listDir(full); err != nil {
				return fmt.Errorf("list %s: %w", p, err)
			}
			for entry := range strings.FieldsSeq(f.listing) {
				name, _, _ := strings.Cut(entry, ":")
				if err := look(filepath.Join(p, name)); err != nil {
					return err
				}
			}
		}
		return err
	}
	return all, look(".")
}

// forget makes the kernel drop what it has cached of the mount: names, inodes
// and pages that nobody holds, and the pages of open files.
func (x *executor) forget() error {
	for _, fd := range x.fds {
		if fd >= 0 {
			if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
				return err
			}
		}
	}
	return unix.Mount("", x.root, "", unix.MS_REMOUNT, "")
}
