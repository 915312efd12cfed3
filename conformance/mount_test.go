package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mountCase mounts the volume of earlier mounts again, with options.
type mountCase struct {
	name string
	with []string
	root bool // needs root
	run  func(t *T)
}

var mountCases = []mountCase{
	{"what the next ones look at is made", nil, false, makeSample},
	{"ro refuses every change", []string{"ro"}, false, readOnly},
	{"noatime records no reads", []string{"noatime"}, false, noAtime},
	{"a read after a mount sets atime, by the rule of relatime", nil, false, relatime},
	{"noexec runs nothing", []string{"noexec"}, false, func(t *T) {
		t.want(unix.EACCES, run(t.dir, t.base, "./program"))
		t.want(unix.EACCES, unix.Faccessat(unix.AT_FDCWD, "program", unix.X_OK, unix.AT_EACCESS))
	}},
	{"without noexec programs run", nil, false, func(t *T) { t.want(0, run(t.dir, t.base, "./program")) }},
	{"nodev opens no device", []string{"nodev"}, true, func(t *T) { t.want(unix.EACCES, openClose("null", unix.O_RDONLY, 0)) }},
	{"without nodev devices are opened", nil, true, func(t *T) { t.want(0, openClose("null", unix.O_RDONLY, 0)) }},
	{"nosuid and the others are shown", []string{"nosuid", "nodev", "noexec", "ro"}, false, func(t *T) {
		const want = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
		equal(t, "flags", t.statfsFlags()&want, want)
	}},
	{"an ordinary mount's flags", nil, false, func(t *T) {
		want := int64(0)
		if t.base.uid != 0 {
			want = unix.ST_NOSUID | unix.ST_NODEV // what fusermount3 insists on
		}
		equal(t, "flags", t.statfsFlags()&(unix.ST_RDONLY|unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC), want)
	}},
	{"a killed program leaves nothing stuck", nil, false, killedPrograms},
	{"everything is as it was: numbers, times, modes, attributes, content", nil, false, checkSample},
}

func (t *T) statfsFlags() int64 {
	var st unix.Statfs_t
	t.must(unix.Statfs(".", &st))
	return st.Flags
}

// mounts runs the mount cases, each in a mount of its own.
func (m runMode) mounts(report func(outcome) error) error {
	for _, c := range mountCases {
		if c.root && m.User {
			continue
		}
		m.With = c.with
		stop, err := m.serve()
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		o := runIn(testCase{op: "mount", name: c.name, run: c.run}, m.mountpoint(), m.base())
		if err := errors.Join(report(o), stop()); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// sampleNames are what makeSample makes; sampleFile keeps what stat said of them.
const sampleStats = ".stats"

func sampleNames(t *T) []string {
	names := []string{"program", "dir", "dir/inner", "set-id", "attributes", "hard", "sparse", "unlinked-before-it-was-read"}
	for _, k := range t.kinds() {
		names = append(names, "a "+k.name)
	}
	return names
}

func makeSample(t *T) {
	t.file("program", "#!/bin/sh\nexit 0\n")
	t.must(unix.Chmod("program", 0o755))
	for _, k := range t.kinds() {
		t.must(k.make("a " + k.name))
		t.must(utimens("a "+k.name, &[2]unix.Timespec{at(1e9), at(1e9 + 1)}))
	}
	t.mkdir("dir", 0o2750)
	t.mkdir("dir/inner", 0o1777)
	t.file("set-id", "content")
	t.must(unix.Chmod("set-id", 0o6755))
	t.file("attributes", "content")
	t.must(unix.Setxattr("attributes", "user.a", bytes.Repeat([]byte("v"), 3000), 0))
	t.must(setACL("attributes", accessACL, acl{{userObj, 6, none}, {namedUser, 4, 7}, {groupObj, 4, none}, {maskObj, 4, none}, {otherObj, 4, none}}))
	t.must(unix.Link("attributes", "hard"))
	fd := t.open("sparse", unix.O_CREAT|unix.O_RDWR, 0o600)
	t.pwrite(fd, "far", 1<<40)
	t.file("unlinked-before-it-was-read", "content")
	if t.base.uid == 0 {
		t.must(unix.Mknod("null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	}
	t.file(sampleStats, "")
	t.file(sampleStats, sample(t))
}

// sample describes the sample but for times of access, which the cases in between change.
func sample(t *T) string {
	var b bytes.Buffer
	for _, name := range sampleNames(t) {
		st := t.lstat(name)
		fmt.Fprintln(&b, name, st.Ino, st.Mode, st.Nlink, st.Uid, st.Gid, st.Size, st.Rdev, st.Blocks, st.Mtim, st.Ctim, t.statx(name).Btime, t.xattrs(name))
		if t.base.uid == 0 {
			h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, name, 0)
			t.must(err)
			fmt.Fprintln(&b, h.Bytes()) // number and generation
		}
	}
	return b.String()
}

func checkSample(t *T) {
	equal(t, "what stat says", sample(t), t.content(sampleStats))
	equal(t, "content", t.content("set-id"), "content")
	v, err := getxattr("attributes", "user.a")
	t.want(0, err)
	equal(t, "size of the attribute", len(v), 3000)
	equal(t, "list", t.aclOf("attributes", accessACL), "u:6 u7:4 g:4 m:4 o:4")
	equal(t, "inode of the second name", t.lstat("hard").Ino, t.lstat("attributes").Ino)
	fd := t.open("sparse", unix.O_RDONLY, 0)
	equal(t, "content far away", t.pread(fd, 10, 1<<40), "far")
	off, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	t.want(0, err)
	t.that(off > 1<<39, "data at %d", off)
}

func readOnly(t *T) {
	before := t.content(sampleStats)
	for _, c := range pathCalls {
		if !c.makes {
			continue
		}
		t.row("%s", c.name)
		if c.name == "link to" || c.name == "rename to" {
			continue // want "file"
		}
		t.want(unix.EROFS, c.call("new"))
	}
	for what, call := range map[string]func() error{
		"link":                func() error { return unix.Link("program", "new") },
		"rename":              func() error { return unix.Rename("program", "new") },
		"rename over":         func() error { return unix.Rename("program", "set-id") },
		"unlink":              func() error { return unix.Unlink("program") },
		"rmdir":               func() error { return unix.Rmdir("dir/inner") },
		"chmod":               func() error { return unix.Chmod("program", 0o700) },
		"chown":               func() error { return unix.Chown("program", t.base.uid, t.base.gid) },
		"truncate":            func() error { return unix.Truncate("program", 0) },
		"utimensat":           func() error { return utimens("program", nil) },
		"setxattr":            func() error { return unix.Setxattr("program", "user.a", nil, 0) },
		"removexattr":         func() error { return unix.Removexattr("attributes", "user.a") },
		"setting a list":      func() error { return setACL("program", accessACL, nil) },
		"open for writing":    func() error { return openClose("program", unix.O_WRONLY, 0) },
		"open for both":       func() error { return openClose("program", unix.O_RDWR, 0) },
		"open to cut":         func() error { return openClose("program", unix.O_RDONLY|unix.O_TRUNC, 0) },
		"open to append":      func() error { return openClose("program", unix.O_WRONLY|unix.O_APPEND, 0) },
		"create over":         func() error { return openClose("program", unix.O_CREAT|unix.O_WRONLY, 0o644) },
		"O_TMPFILE":           func() error { return openClose(".", unix.O_TMPFILE|unix.O_RDWR, 0o644) },
		"access for writing":  func() error { return unix.Access("program", unix.W_OK) },
		"exchange":            func() error { return exchange("program", "set-id") },
		"a directory's times": func() error { return utimens("dir", nil) },
	} {
		t.row("%s", what)
		t.want(unix.EROFS, call())
	}
	t.rows = ""
	t.want(unix.EEXIST, unix.Mkdir("dir", 0o755))
	t.want(0, openClose("program", unix.O_RDONLY|unix.O_CREAT, 0o644))
	t.want(0, openClose("a fifo", unix.O_RDWR, 0)) // what goes through a fifo is not in the filesystem
	t.want(0, unix.Access("program", unix.R_OK))
	equal(t, "what stat says", sample(t), before)
}

func noAtime(t *T) {
	before := t.stamps("set-id").atime
	t.tick()
	equal(t, "content", t.content("set-id"), "content")
	t.list("dir")
	equal(t, "atime", t.stamps("set-id").atime, before)
	t.that(t.statfsFlags()&unix.ST_NOATIME != 0, "the mount does not say noatime")
}

// relatime: a read counts when the last one was before the last change, or a day ago.
func relatime(t *T) {
	before := t.stamps("set-id")
	t.tick()
	t.content("set-id")
	after := t.stamps("set-id")
	t.that(after.atime > before.atime, "atime is not changed by a first read")
	equal(t, "mtime", after.mtime, before.mtime)
	equal(t, "ctime", after.ctime, before.ctime)
}

// killedPrograms kills programs in the middle of large writes and reads; each must end at once.
func killedPrograms(t *T) {
	for _, script := range []string{
		"exec cat /dev/zero > big",
		"while :; do cat big > /dev/null; done",
		"while :; do : > short; rm short; done",
		"exec dd if=/dev/zero of=big2 bs=64M oflag=direct",
	} {
		t.row("%s", script)
		cmd := exec.Command("sh", "-c", script)
		cmd.Dir = t.dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: t.base.credential(), Pdeathsig: syscall.SIGKILL}
		t.must(cmd.Start())
		name := filepath.Join(t.dir, "big")
		for start := time.Now(); time.Since(start) < 5*time.Second; time.Sleep(5 * time.Millisecond) {
			if info, err := os.Stat(name); err == nil && info.Size() > 20<<20 {
				break // it is in the middle
			}
		}
		t.must(cmd.Process.Signal(unix.SIGKILL))
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		t.soon(ended, "the killed program does not end")
	}
	t.rows = ""
	for _, name := range []string{"big", "big2", "short"} {
		if exists(name) {
			t.want(0, unix.Unlink(name))
		}
	}
}
