package conformance

import (
	"fmt"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pathCall is a system call that takes a path. "file", "directory" and "link" (to file) are there to be its other
// argument.
type pathCall struct {
	name  string
	makes bool // makes the name: it must be free
	call  func(path string) error
}

var pathCalls = []pathCall{
	{"open", false, func(p string) error { return openClose(p, unix.O_RDONLY, 0) }},
	{"open for writing", false, func(p string) error { return openClose(p, unix.O_WRONLY, 0) }},
	{"open O_PATH", false, func(p string) error { return openClose(p, unix.O_PATH, 0) }},
	{"create", true, func(p string) error { return openClose(p, unix.O_CREAT|unix.O_WRONLY, 0o644) }},
	{"mkdir", true, func(p string) error { return unix.Mkdir(p, 0o755) }},
	{"mkfifo", true, func(p string) error { return unix.Mkfifo(p, 0o644) }},
	{"mknod", true, func(p string) error { return unix.Mknod(p, unix.S_IFREG|0o644, 0) }},
	{"symlink", true, func(p string) error { return unix.Symlink("file", p) }},
	{"link to", true, func(p string) error { return unix.Link("file", p) }},
	{"link from", false, func(p string) error { return unix.Link(p, "linked") }},
	{"rename from", false, func(p string) error { return unix.Rename(p, "renamed") }},
	{"rename to", true, func(p string) error { return unix.Rename("file", p) }},
	{"unlink", false, func(p string) error { return unix.Unlink(p) }},
	{"rmdir", false, func(p string) error { return unix.Rmdir(p) }},
	{"chdir", false, func(p string) error { return unix.Chdir(p) }},
	{"chmod", false, func(p string) error { return unix.Chmod(p, 0o644) }},
	{"chown", false, func(p string) error { return unix.Chown(p, -1, -1) }},
	{"lchown", false, func(p string) error { return unix.Lchown(p, -1, -1) }},
	{"truncate", false, func(p string) error { return unix.Truncate(p, 0) }},
	{"stat", false, func(p string) error { return unix.Stat(p, new(unix.Stat_t)) }},
	{"lstat", false, func(p string) error { return unix.Lstat(p, new(unix.Stat_t)) }},
	{"statx", false, func(p string) error {
		return unix.Statx(unix.AT_FDCWD, p, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, new(unix.Statx_t))
	}},
	{"statfs", false, func(p string) error { return unix.Statfs(p, new(unix.Statfs_t)) }},
	{"access", false, func(p string) error { return unix.Access(p, unix.F_OK) }},
	{"readlink", false, func(p string) error { _, err := unix.Readlink(p, make([]byte, 10)); return err }},
	{"utimensat", false, func(p string) error { return unix.UtimesNanoAt(unix.AT_FDCWD, p, nil, 0) }},
	{"setxattr", false, func(p string) error { return unix.Setxattr(p, "user.a", []byte("x"), 0) }},
	{"getxattr", false, func(p string) error { _, err := unix.Getxattr(p, "user.a", nil); return err }},
	{"listxattr", false, func(p string) error { _, err := unix.Listxattr(p, nil); return err }},
	{"removexattr", false, func(p string) error { return unix.Removexattr(p, "user.a") }},
}

func pathCases() []testCase {
	var out []testCase
	for _, c := range pathCalls {
		out = append(out,
			testCase{op: "paths", name: c.name + ": a wrong path", run: c.wrongPaths},
			testCase{op: "paths", name: c.name + ": a component that the caller may not search", others: true, run: c.noSearch})
	}
	return append(out,
		testCase{op: "paths", name: "names of 255 bytes, of any bytes", run: anyNames},
		testCase{op: "paths", name: "paths of PATH_MAX", run: longestPaths},
		testCase{op: "paths", name: "40 symbolic links, and one more", run: linkChains},
		testCase{op: "paths", name: "trailing slashes and dots", run: trailingSlashes},
		testCase{op: "paths", name: "addresses out of the caller's memory", run: wrongAddresses},
	)
}

func (c pathCall) wrongPaths(t *T) {
	t.file("file", "content")
	t.mkdir("directory", 0o755)
	t.must(unix.Mkfifo("fifo", 0o644))
	t.must(unix.Symlink("file", "link"))
	t.must(unix.Symlink("nowhere", "dangling"))
	t.must(unix.Symlink("loop2", "loop1"))
	t.must(unix.Symlink("loop1", "loop2"))
	long := strings.Repeat("n", 256)
	for _, row := range []struct {
		what, path string
		want       syscall.Errno
	}{
		{"the empty path", "", unix.ENOENT},
		{"a missing component", "missing/name", unix.ENOENT},
		{"a component behind a dangling link", "dangling/name", unix.ENOENT},
		{"a file as a component", "file/name", unix.ENOTDIR},
		{"a fifo as a component", "fifo/name", unix.ENOTDIR},
		{"a link to a file as a component", "link/name", unix.ENOTDIR},
		{"a file, then two dots", "file/../name", unix.ENOTDIR},
		{"a name of 256 bytes", long, unix.ENAMETOOLONG},
		{"a name of 256 bytes in a directory", "directory/" + long, unix.ENAMETOOLONG},
		{"a component of 256 bytes", long + "/name", unix.ENAMETOOLONG},
		{"a path of 4096 bytes", strings.Repeat("./", 2047) + "ab", unix.ENAMETOOLONG},
		{"a path of 10000 bytes", strings.Repeat("directory/", 1000), unix.ENAMETOOLONG},
		{"a loop of links as a component", "loop1/name", unix.ELOOP},
	} {
		t.row("%s", row.what)
		t.want(row.want, c.call(row.path))
	}
	if !c.makes {
		t.row("a missing name")
		t.want(unix.ENOENT, c.call("missing"))
		t.want(unix.ENOENT, c.call("directory/missing"))
	}
}

// noSearch: each kind of caller needs its own x bit of each directory on the way.
func (c pathCall) noSearch(t *T) {
	for i, row := range []struct {
		caller user
		mode   mode
	}{{alice, 0o677}, {carol, 0o767}, {bob, 0o776}} {
		dir := fmt.Sprintf("dir%d", i)
		t.mkdir(dir, 0o755)
		t.mkdir(dir+"/inner", 0o777)
		t.file(dir+"/inner/there", "content")
		t.own(dir+"/inner/there", row.caller, 0o644)
		t.own(dir, alice, row.mode)
		t.must(unix.Chmod(".", 0o777))
		t.file("file", "content")
		t.own("file", row.caller, 0o644)
		t.row("%s in a directory of alice with mode %o", row.caller.name, row.mode)
		for _, path := range []string{"/inner", "/inner/there", "/inner/missing"} {
			t.want(unix.EACCES, t.as(row.caller, func() error { return c.call(dir + path) }))
		}
	}
}

func anyNames(t *T) {
	names := []string{
		strings.Repeat("x", 255), strings.Repeat("ü", 127) + "x", " ", "\n", "\x01", "\xff\xfe", "a\xc3", "-", "~", "\\", "*?[", "...", ".x", "é", "e\u0301",
		"con", "a:b", "ＦＵＬＬ", "\u202e", "🙂", "A", "a",
	}
	for c := 1; c < 256; c++ {
		if c != '/' && c != '.' && !strings.ContainsRune(" \n\x01-~Aa\\", rune(c)) {
			names = append(names, string([]byte{byte(c)}))
		}
	}
	for _, name := range names {
		t.row("name %.20q", name)
		t.want(0, openClose(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
		t.want(unix.EEXIST, unix.Mkdir(name, 0o755))
		t.want(0, unix.Lstat(name, new(unix.Stat_t)))
	}
	t.rows = ""
	found := make(map[string]bool)
	for _, e := range t.list(".") {
		found[e.name] = true
	}
	for _, name := range names {
		t.that(found[name], "%.20q is not listed", name)
		t.want(0, unix.Unlink(name))
	}
	t.that(len(found) == len(names)+2, "%d entries listed, want %d", len(found), len(names)+2)
}

// longestPaths: 4,095 bytes are the most that a call takes; deeper directories are reached step by step.
func longestPaths(t *T) {
	name := strings.Repeat("d", 255)
	path := ""
	for range 15 {
		path += name
		t.must(unix.Mkdir(path, 0o755))
		path += "/"
	}
	last := path + strings.Repeat("f", 4095-len(path))
	t.want(0, openClose(last, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
	t.want(0, unix.Stat(last, new(unix.Stat_t)))
	t.want(0, unix.Rename(last, last[:4094]))
	t.want(unix.ENAMETOOLONG, unix.Rename(last[:4094], last+"f"))
	t.want(0, unix.Unlink(last[:4094]))

	name = strings.Repeat("e", 255)
	for range 40 {
		t.must(unix.Mkdir(name, 0o755))
		t.must(unix.Chdir(name))
	}
	t.want(0, openClose("here", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
	t.want(0, unix.Rename("here", "there"))
	t.want(0, unix.Stat("there", new(unix.Stat_t)))
	_, err := unix.Getcwd(make([]byte, 1<<16))
	t.want(unix.ENAMETOOLONG, err)
}

func linkChains(t *T) {
	t.file("link0", "the end")
	for i := 1; i <= 41; i++ {
		t.must(unix.Symlink(fmt.Sprintf("link%d", i-1), fmt.Sprintf("link%d", i)))
	}
	for _, c := range []pathCall{{name: "open", call: func(p string) error { return openClose(p, unix.O_RDONLY, 0) }},
		{name: "stat", call: func(p string) error { return unix.Stat(p, new(unix.Stat_t)) }},
		{name: "chmod", call: func(p string) error { return unix.Chmod(p, 0o600) }},
		{name: "truncate", call: func(p string) error { return unix.Truncate(p, 3) }}} {
		t.row("%s", c.name)
		t.want(0, c.call("link40"))
		t.want(unix.ELOOP, c.call("link41"))
	}
	t.row("calls that do not follow")
	t.want(0, unix.Lstat("link41", new(unix.Stat_t)))
	t.want(0, unix.Unlink("link41"))
	t.must(unix.Symlink("self", "self"))
	t.want(unix.ELOOP, unix.Stat("self", new(unix.Stat_t)))
	t.want(unix.ELOOP, openClose("self", unix.O_CREAT|unix.O_WRONLY, 0o644))
	t.want(0, unix.Rename("self", "renamed"))
}

func trailingSlashes(t *T) {
	t.file("file", "content")
	t.mkdir("directory", 0o755)
	t.mkdir("empty", 0o755)
	t.file("directory/inside", "content")
	t.must(unix.Symlink("directory", "link"))
	t.must(unix.Symlink("file", "filelink"))
	for _, row := range []struct {
		what string
		err  error
		want syscall.Errno
	}{
		{"stat file/", unix.Stat("file/", new(unix.Stat_t)), unix.ENOTDIR},
		{"open file/", openClose("file/", unix.O_RDONLY, 0), unix.ENOTDIR},
		{"unlink file/", unix.Unlink("file/"), unix.ENOTDIR},
		{"unlink filelink/", unix.Unlink("filelink/"), unix.ENOTDIR},
		{"chmod file/", unix.Chmod("file/", 0o644), unix.ENOTDIR},
		{"truncate file/", unix.Truncate("file/", 0), unix.ENOTDIR},
		{"rename file/ to x", unix.Rename("file/", "x"), unix.ENOTDIR},
		{"rename file to x/", unix.Rename("file", "x/"), unix.ENOTDIR},
		{"link file to x/", unix.Link("file", "x/"), unix.ENOENT},
		{"symlink x/", unix.Symlink("file", "x/"), unix.ENOENT},
		{"mkfifo x/", unix.Mkfifo("x/", 0o644), unix.ENOENT},
		{"create x/", openClose("x/", unix.O_CREAT|unix.O_WRONLY, 0o644), unix.EISDIR},
		{"mkdir x/", unix.Mkdir("x/", 0o755), 0},
		{"rename x/ to y/", unix.Rename("x/", "y/"), 0},
		{"rmdir y/", unix.Rmdir("y/"), 0},
		{"stat directory/", unix.Stat("directory/", new(unix.Stat_t)), 0},
		{"stat link/", unix.Stat("link/", new(unix.Stat_t)), 0},
		{"rmdir link/", unix.Rmdir("link/"), unix.ENOTDIR},
		{"rmdir link", unix.Rmdir("link"), unix.ENOTDIR},
		{"rmdir directory/.", unix.Rmdir("directory/."), unix.EINVAL},
		{"rmdir directory/..", unix.Rmdir("directory/.."), unix.ENOTEMPTY},
		{"unlink directory/.", unix.Unlink("directory/."), unix.EISDIR},
		{"unlink directory/..", unix.Unlink("directory/.."), unix.EISDIR},
		{"mkdir .", unix.Mkdir(".", 0o755), unix.EEXIST},
		{"mkdir ..", unix.Mkdir("..", 0o755), unix.EEXIST},
		{"mkdir directory/.", unix.Mkdir("directory/.", 0o755), unix.EEXIST},
		{"rename directory/. to x", unix.Rename("directory/.", "x"), unix.EBUSY},
		{"rename directory to empty/.", unix.Rename("directory", "empty/."), unix.EBUSY},
		{"rename directory/.. to x", unix.Rename("directory/..", "x"), unix.EBUSY},
		{"link file to empty/.", unix.Link("file", "empty/."), unix.EEXIST},
		{"symlink empty/..", unix.Symlink("file", "empty/.."), unix.EEXIST},
		{"create directory/.", openClose("directory/.", unix.O_CREAT|unix.O_WRONLY, 0o644), unix.EISDIR},
	} {
		t.row("%s", row.what)
		t.want(row.want, row.err)
	}
}

func wrongAddresses(t *T) {
	t.file("file", "content")
	fd := t.open("file", unix.O_RDWR, 0)
	const nowhere = ^uintptr(0) &^ 0xfff
	name := []byte("file\x00")
	good := uintptr(unsafe.Pointer(&name[0]))
	for _, row := range []struct {
		name       string
		call       uintptr
		a, b, c, d uintptr
	}{
		{"open", unix.SYS_OPEN, nowhere, 0, 0, 0},
		{"mkdir", unix.SYS_MKDIR, nowhere, 0o755, 0, 0},
		{"rmdir", unix.SYS_RMDIR, nowhere, 0, 0, 0},
		{"unlink", unix.SYS_UNLINK, nowhere, 0, 0, 0},
		{"link from", unix.SYS_LINK, nowhere, good, 0, 0},
		{"link to", unix.SYS_LINK, good, nowhere, 0, 0},
		{"symlink target", unix.SYS_SYMLINK, nowhere, good, 0, 0},
		{"symlink", unix.SYS_SYMLINK, good, nowhere, 0, 0},
		{"rename from", unix.SYS_RENAME, nowhere, good, 0, 0},
		{"rename to", unix.SYS_RENAME, good, nowhere, 0, 0},
		{"chmod", unix.SYS_CHMOD, nowhere, 0o644, 0, 0},
		{"chown", unix.SYS_CHOWN, nowhere, 0, 0, 0},
		{"truncate", unix.SYS_TRUNCATE, nowhere, 0, 0, 0},
		{"stat", unix.SYS_STAT, nowhere, good, 0, 0},
		{"stat into", unix.SYS_STAT, good, nowhere, 0, 0},
		{"statfs into", unix.SYS_STATFS, good, nowhere, 0, 0},
		{"mknod", unix.SYS_MKNOD, nowhere, unix.S_IFIFO | 0o644, 0, 0},
		{"utimensat times", unix.SYS_UTIMENSAT, ^uintptr(99), good, nowhere, 0},
		{"read into", unix.SYS_READ, uintptr(fd), nowhere, 5, 0},
		{"write from", unix.SYS_WRITE, uintptr(fd), nowhere, 5, 0},
		{"pread into", unix.SYS_PREAD64, uintptr(fd), nowhere, 5, 0},
		{"pwrite from", unix.SYS_PWRITE64, uintptr(fd), nowhere, 5, 0},
		{"getdents into", unix.SYS_GETDENTS64, uintptr(t.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)), nowhere, 4096, 0},
	} {
		t.row("%s", row.name)
		_, _, e := unix.Syscall6(row.call, row.a, row.b, row.c, row.d, 0, 0)
		t.want(unix.EFAULT, e)
	}
	equal(t, "content", t.content("file"), "content")
}
