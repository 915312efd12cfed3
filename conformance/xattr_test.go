package conformance

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func xattrCases() []testCase {
	return []testCase{
		{op: "xattr", name: "set, get, list, remove; create and replace", run: xattrBasics},
		{op: "xattr", name: "namespaces by kind of file", run: xattrNamespaces},
		{op: "xattr", name: "names: longest, empty, of no namespace, any bytes", run: xattrNames},
		{op: "xattr", name: "values: empty, of any bytes", run: xattrValues},
		{op: "xattr", name: "values of 64 KiB", beyond: "ext4 keeps a block of attributes at most", run: xattrLargest},
		{op: "xattr", name: "sizes asked for and buffers too short", run: xattrSizes},
		{op: "xattr", name: "times", run: xattrTimes},
		{op: "xattr", name: "trusted and security are root's", others: true, run: xattrPrivileged},
		{op: "xattr", name: "user attributes follow the permission bits", others: true, run: xattrPermissions},
		{op: "xattr", name: "a hundred on one file", run: func(t *T) {
			t.file("file", "")
			for i := range 100 {
				t.must(unix.Setxattr("file", fmt.Sprintf("user.%03d", i), []byte{byte(i)}, 0))
			}
			names := t.xattrs("file")
			equal(t, "names", len(names), 100)
			for i := range 100 {
				v, err := getxattr("file", fmt.Sprintf("user.%03d", i))
				t.want(0, err)
				equal(t, "value", string(v), string([]byte{byte(i)}))
				t.want(0, unix.Removexattr("file", fmt.Sprintf("user.%03d", i)))
			}
			equal(t, "names", len(t.xattrs("file")), 0)
		}},
		{op: "xattr", name: "capabilities go with a write", root: true, run: func(t *T) {
			t.file("file", "content")
			for what, change := range map[string]func() error{
				"write":     func() error { _, err := unix.Write(t.open("file", unix.O_WRONLY, 0), []byte("x")); return err },
				"truncate":  func() error { return unix.Truncate("file", 3) },
				"fallocate": func() error { return unix.Fallocate(t.open("file", unix.O_WRONLY, 0), 0, 0, 100) },
			} {
				t.row("%s", what)
				t.must(unix.Setxattr("file", "security.capability", fileCapability, 0))
				t.must(change())
				_, err := getxattr("file", "security.capability")
				t.want(unix.ENODATA, err)
			}
		}},
	}
}

func getxattr(name, attr string) ([]byte, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(name, attr, buf)
	return buf[:max(n, 0)], err
}

// xattrs lists an inode's attributes, but those that the machine's security modules add.
func (t *T) xattrs(name string) []string {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(name, buf)
	t.must(err)
	names := strings.Split(string(buf[:n]), "\x00")
	names = slices.DeleteFunc(names, func(s string) bool { return s == "" || s == "security.selinux" })
	slices.Sort(names)
	return names
}

func xattrBasics(t *T) {
	t.file("file", "")
	t.mkdir("dir", 0o755)
	for _, name := range []string{"file", "dir"} {
		t.row("%s", name)
		_, err := getxattr(name, "user.a")
		t.want(unix.ENODATA, err)
		t.want(unix.ENODATA, unix.Removexattr(name, "user.a"))
		t.want(unix.ENODATA, unix.Setxattr(name, "user.a", []byte("1"), unix.XATTR_REPLACE))
		t.want(0, unix.Setxattr(name, "user.a", []byte("1"), unix.XATTR_CREATE))
		t.want(unix.EEXIST, unix.Setxattr(name, "user.a", []byte("2"), unix.XATTR_CREATE))
		t.want(0, unix.Setxattr(name, "user.a", []byte("33"), unix.XATTR_REPLACE))
		t.want(0, unix.Setxattr(name, "user.b", []byte("4"), 0))
		t.want(0, unix.Setxattr(name, "user.b", []byte("5"), 0))
		t.want(unix.EINVAL, unix.Setxattr(name, "user.a", []byte("6"), 4))
		v, err := getxattr(name, "user.a")
		t.want(0, err)
		equal(t, "value", string(v), "33")
		equal(t, "names", strings.Join(t.xattrs(name), " "), "user.a user.b")
		t.want(0, unix.Removexattr(name, "user.a"))
		equal(t, "names", strings.Join(t.xattrs(name), " "), "user.b")
		fd := t.open(name, unix.O_RDONLY, 0)
		t.want(0, unix.Fsetxattr(fd, "user.c", []byte("by descriptor"), 0))
		n, err := unix.Fgetxattr(fd, "user.c", nil)
		t.want(0, err)
		equal(t, "size", n, 13)
		t.want(0, unix.Fremovexattr(fd, "user.c"))
	}
}

// xattrNamespaces: user attributes are for files and directories; trusted and security ones for every kind.
func xattrNamespaces(t *T) {
	for _, k := range t.kinds() {
		t.row("%s", k.name)
		t.must(k.make("x"))
		if k.mode == unix.S_IFREG || k.mode == unix.S_IFDIR {
			t.want(0, unix.Lsetxattr("x", "user.a", []byte("v"), 0))
			t.want(0, unix.Lremovexattr("x", "user.a"))
		} else {
			t.want(unix.EPERM, unix.Lsetxattr("x", "user.a", []byte("v"), 0))
			t.want(unix.EPERM, unix.Lremovexattr("x", "user.a"))
			_, err := getxattr("x", "user.a")
			t.want(unix.ENODATA, err)
		}
		for _, name := range []string{"trusted.a", "security.a"} {
			if t.base.uid != 0 {
				t.want(unix.EPERM, unix.Lsetxattr("x", name, []byte("v"), 0))
				continue
			}
			t.want(0, unix.Lsetxattr("x", name, []byte("v"), 0))
			v, err := getxattr("x", name)
			t.want(0, err)
			equal(t, "value", string(v), "v")
			equal(t, "names", strings.Join(t.xattrs("x"), " "), name)
			t.want(0, unix.Lremovexattr("x", name))
		}
		t.must(removeEither("x"))
	}
}

func xattrNames(t *T) {
	t.file("file", "")
	long := "user." + strings.Repeat("n", 250)
	t.want(0, unix.Setxattr("file", long, []byte("v"), 0))
	v, err := getxattr("file", long)
	t.want(0, err)
	equal(t, "value", string(v), "v")
	t.want(0, unix.Removexattr("file", long))
	any := "user.\x01\xff /=é\n"
	t.want(0, unix.Setxattr("file", any, []byte("v"), 0))
	equal(t, "names", strings.Join(t.xattrs("file"), " "), any)
	for _, row := range []struct {
		name string
		want syscall.Errno
	}{
		{long + "n", unix.ERANGE},
		{"", unix.ERANGE},
		{"user.", unix.EINVAL},
		{"user", unix.EOPNOTSUPP},
		{"a", unix.EOPNOTSUPP},
		{"none.a", unix.EOPNOTSUPP},
		{"USER.a", unix.EOPNOTSUPP},
		{"system.a", unix.EOPNOTSUPP},
	} {
		t.row("name %.20q", row.name)
		t.want(row.want, unix.Setxattr("file", row.name, []byte("v"), 0))
		_, err := getxattr("file", row.name)
		t.want(row.want, err)
		t.want(row.want, unix.Removexattr("file", row.name))
	}
	equal(t, "names", strings.Join(t.xattrs("file"), " "), any)
}

func xattrValues(t *T) {
	t.file("file", "")
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	for _, value := range [][]byte{{}, {0}, every, bytes.Repeat([]byte("v"), 2000)} {
		t.row("%d bytes", len(value))
		t.want(0, unix.Setxattr("file", "user.a", value, 0))
		got, err := getxattr("file", "user.a")
		t.want(0, err)
		equal(t, "value", string(got), string(value))
		equal(t, "names", strings.Join(t.xattrs("file"), " "), "user.a")
	}
}

func xattrLargest(t *T) {
	t.file("file", "")
	value := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	t.want(0, unix.Setxattr("file", "user.a", value, 0))
	got, err := getxattr("file", "user.a")
	t.want(0, err)
	t.that(bytes.Equal(got, value), "%d bytes came back, or others", len(got))
	t.want(0, unix.Setxattr("file", "user.b", value, 0))
	t.want(unix.E2BIG, unix.Setxattr("file", "user.a", append(value, 0), 0))
	for i := range 300 {
		t.must(unix.Setxattr("file", fmt.Sprintf("user.%0245d", i), nil, 0))
	}
	_, err = unix.Listxattr("file", make([]byte, 64<<10))
	t.want(unix.E2BIG, err)
}

func xattrSizes(t *T) {
	t.file("file", "")
	n, err := unix.Listxattr("file", nil)
	t.want(0, err)
	equal(t, "size of no list", n, 0)
	t.must(unix.Setxattr("file", "user.abc", []byte("12345"), 0))
	for _, row := range []struct {
		size, want int
		errno      syscall.Errno
	}{{0, 5, 0}, {1, -1, unix.ERANGE}, {4, -1, unix.ERANGE}, {5, 5, 0}, {6, 5, 0}, {64 << 10, 5, 0}} {
		n, err := unix.Getxattr("file", "user.abc", make([]byte, row.size))
		t.want(row.errno, err)
		equal(t, "size", n, row.want)
	}
	for _, row := range []struct {
		size, want int
		errno      syscall.Errno
	}{{0, 9, 0}, {1, -1, unix.ERANGE}, {8, -1, unix.ERANGE}, {9, 9, 0}, {100, 9, 0}} {
		n, err := unix.Listxattr("file", make([]byte, row.size))
		t.want(row.errno, err)
		equal(t, "size of the list", n, row.want)
	}
}

func xattrTimes(t *T) {
	t.file("file", "")
	t.changes("file", "c", func() error { return unix.Setxattr("file", "user.a", []byte("v"), 0) })
	t.changes("file", "c", func() error { return unix.Setxattr("file", "user.a", []byte("w"), 0) })
	t.changes("file", "", func() error { _, err := getxattr("file", "user.a"); return err })
	t.changes("file", "", func() error { _, err := unix.Listxattr("file", nil); return err })
	t.changes("file", "c", func() error { return unix.Removexattr("file", "user.a") })
	before := t.stamps("file")
	t.tick()
	t.want(unix.ENODATA, unix.Removexattr("file", "user.a"))
	t.want(unix.ENODATA, unix.Setxattr("file", "user.a", nil, unix.XATTR_REPLACE))
	equal(t, "times after failures", t.stamps("file"), before)
}

// xattrPrivileged: others neither see nor set trusted attributes; security ones they see.
func xattrPrivileged(t *T) {
	t.file("file", "")
	t.own("file", alice, 0o666)
	for _, name := range []string{"trusted.a", "security.a", "user.a"} {
		t.must(unix.Setxattr("file", name, []byte("v"), 0))
	}
	equal(t, "names for root", strings.Join(t.xattrs("file"), " "), "security.a trusted.a user.a")
	t.must(t.as(alice, func() error {
		_, err := getxattr("file", "trusted.a")
		t.want(unix.ENODATA, err)
		_, err = getxattr("file", "security.a")
		t.want(0, err)
		for _, name := range []string{"trusted.a", "security.a"} {
			t.want(unix.EPERM, unix.Setxattr("file", name, []byte("w"), 0))
			t.want(unix.EPERM, unix.Removexattr("file", name))
		}
		equal(t, "names for others", strings.Join(t.xattrs("file"), " "), "security.a user.a")
		return nil
	}))
}

func xattrPermissions(t *T) {
	t.file("file", "")
	for _, row := range []struct {
		mode     mode
		get, set syscall.Errno
	}{{0o600, unix.EACCES, unix.EACCES}, {0o604, unix.ENODATA, unix.EACCES}, {0o602, unix.EACCES, 0}, {0o606, unix.ENODATA, 0}} {
		t.row("mode %o", uint32(row.mode))
		t.own("file", alice, row.mode)
		t.must(t.as(bob, func() error {
			_, err := getxattr("file", "user.a")
			t.want(row.get, err)
			t.want(row.set, unix.Setxattr("file", "user.a", nil, 0))
			_, err = unix.Listxattr("file", nil)
			t.want(0, err)
			if row.set == 0 {
				t.want(0, unix.Removexattr("file", "user.a"))
			}
			return nil
		}))
	}
	t.row("a sticky directory of alice")
	t.mkdir("dir", 0o777)
	t.own("dir", alice, 0o1777)
	t.want(unix.EPERM, t.as(bob, func() error { return unix.Setxattr("dir", "user.a", nil, 0) }))
	t.want(0, t.as(alice, func() error { return unix.Setxattr("dir", "user.a", nil, 0) }))
	t.want(0, unix.Setxattr("dir", "user.b", nil, 0))
}
