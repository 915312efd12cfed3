package conformance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// testCase is one row of the suite. It runs in an empty directory of its own.
type testCase struct {
	op     string // the operation, a section of the report
	name   string
	root   bool // needs a caller who may do everything
	others bool // and other users beside
	long   bool // only in the long form
	// forced says why no filesystem behind FUSE can pass: the case is run on the reference alone.
	forced string
	// beyond says why the reference cannot pass: the case is run in mounts alone.
	beyond string
	run    func(*T)
}

// cases is the whole suite.
func cases() []testCase {
	return slices.Concat(
		pathCases(), permissionCases(), stickyCases(),
		openCases(), makeCases(), linkCases(), removeCases(), renameCases(),
		chmodCases(), chownCases(), utimensCases(),
		xattrCases(), aclCases(), dataCases(), readdirCases(), lockCases(), mmapCases(), statCases(),
		outsideCases(),
	)
}

// stuckAfter is how long a case may take. One that is stuck ends the run: its thread cannot be taken back.
const stuckAfter = 2 * time.Minute

// outcome is what a case has to say.
type outcome struct {
	Op, Name string
	Checks   int
	Failures []string `json:",omitempty"`
	stuck    bool
}

// T is one case being run. Its methods are called by one goroutine at a time.
type T struct {
	outcome
	dir  string // where the case runs: the working directory of its threads
	base user   // who runs it
	fds  []int  // to close at its end
	maps [][]byte
	rows string // prefix of messages: the row of a table
}

// runCase runs one case as base in a new directory below root.
func runCase(c testCase, root string, number int, base user) outcome {
	dir := filepath.Join(root, fmt.Sprintf("case%d", number))
	if err := as(base, root, func() error { return unix.Mkdir(dir, 0o755) }); err != nil {
		return outcome{Op: c.op, Name: c.name, Failures: []string{fmt.Sprintf("make the directory of the case: %v", err)}}
	}
	return runIn(c, dir, base)
}

// runIn runs one case as base in dir.
func runIn(c testCase, dir string, base user) outcome {
	t := &T{outcome: outcome{Op: c.op, Name: c.name}, dir: dir, base: base}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := as(base, t.dir, func() (err error) {
			defer func() {
				if ended, ok := recover().(endOfCase); ok {
					err = ended
				}
			}()
			defer t.closeAll()
			c.run(t)
			return nil
		}); err != nil {
			t.Failures = append(t.Failures, err.Error())
		}
	}()
	select {
	case <-done:
		return t.outcome
	case <-time.After(stuckAfter):
		return outcome{Op: c.op, Name: c.name, Failures: []string{fmt.Sprintf("stuck for %v", stuckAfter)}, stuck: true}
	}
}

// endOfCase is the panic that ends a case which cannot go on.
type endOfCase struct{ error }

func (t *T) failf(format string, args ...any) {
	_, file, line, _ := runtime.Caller(2)
	t.Failures = append(t.Failures, fmt.Sprintf("%s:%d: %s%s", filepath.Base(file), line, t.rows, fmt.Sprintf(format, args...)))
}

// row names the row of a table that the following checks are about.
func (t *T) row(format string, args ...any) { t.rows = fmt.Sprintf(format, args...) + ": " }

// want checks the error of a call; 0 is success.
func (t *T) want(want syscall.Errno, err error) {
	t.Checks++
	if got := errnoOf(err); got != want {
		t.failf("got %s, want %s", errnoName(got), errnoName(want))
	}
}

// wantAny is want where several errors are right.
func (t *T) wantAny(err error, wants ...syscall.Errno) {
	t.Checks++
	if got := errnoOf(err); !slices.Contains(wants, got) {
		t.failf("got %s, want one of %v", errnoName(got), wants)
	}
}

// equal checks a value.
func equal[V comparable](t *T, what string, got, want V) {
	t.Checks++
	if got != want {
		t.failf("%s is %v, want %v", what, show(got), show(want))
	}
}

// that checks a condition.
func (t *T) that(ok bool, format string, args ...any) {
	t.Checks++
	if !ok {
		t.failf(format, args...)
	}
}

// must ends the case where its ground is not as it should be.
func (t *T) must(err error) {
	if err != nil {
		_, file, line, _ := runtime.Caller(1)
		panic(endOfCase{fmt.Errorf("%s:%d: %s%w", filepath.Base(file), line, t.rows, err)})
	}
}

func show(v any) any {
	switch v := v.(type) {
	case mode:
		return fmt.Sprintf("%#o", uint32(v))
	case string:
		if len(v) > 60 {
			return fmt.Sprintf("%.60q… of %d bytes", v, len(v))
		}
		return fmt.Sprintf("%q", v)
	}
	return v
}

// mode is the st_mode of a file, shown in octal.
type mode uint32

// errnoOf returns the number behind an error; 0 for success.
func errnoOf(err error) syscall.Errno {
	var e syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e
	}
	return syscall.EBADMSG // no number: cannot be what a case wants
}

func errnoName(e syscall.Errno) string {
	if e == 0 {
		return "success"
	}
	return unix.ErrnoName(e)
}

// user is who makes a call.
type user struct {
	name     string
	uid, gid int
	groups   []int
}

// credential is for processes. None where the thread that starts one is u's already.
func (u user) credential() *syscall.Credential {
	if unix.Geteuid() != 0 {
		return nil
	}
	c := &syscall.Credential{Uid: uint32(u.uid), Gid: uint32(u.gid)}
	for _, g := range u.groups {
		c.Groups = append(c.Groups, uint32(g))
	}
	return c
}

// The cast: numbers that no account should have; and the account that runs the suite as an ordinary user, since
// fusermount3 mounts for accounts alone.
var (
	nobody = user{"nobody", 65534, 65534, []int{team}}
	root   = user{"root", 0, 0, nil}
	alice  = user{"alice", 31001, 31001, []int{31100}}
	bob    = user{"bob", 31002, 31002, nil}
	carol  = user{"carol", 31003, 31003, []int{31001}} // in alice's group
)

// team is the supplementary group of alice and nobody.
const team = 31100

// as runs f with the credentials of u, in dir, with an empty umask, on a thread that ends with it.
func as(u user, dir string, f func() error) error {
	type result struct {
		err      error
		panicked any
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		var r result
		defer func() {
			r.panicked = recover()
			done <- r
		}()
		if r.err = become(u, dir); r.err == nil {
			r.err = f()
		}
	}()
	r := <-done
	if r.panicked != nil {
		panic(r.panicked)
	}
	return r.err
}

// as runs f as another user in the case's directory.
func (t *T) as(u user, f func() error) error { return as(u, t.dir, f) }

// become changes the calling thread alone: the kernel knows no credentials of processes.
func become(u user, dir string) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the working directory: %w", err)
	}
	unix.Umask(0)
	groups := make([]uint32, 0, len(u.groups)+1)
	for _, g := range u.groups {
		groups = append(groups, uint32(g))
	}
	if os.Geteuid() == 0 {
		if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(pointer(groups)), 0); e != 0 {
			return fmt.Errorf("setgroups: %w", e)
		}
		id := uintptr(u.gid)
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); e != 0 {
			return fmt.Errorf("setresgid: %w", e)
		}
		id = uintptr(u.uid)
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); e != 0 {
			return fmt.Errorf("setresuid: %w", e)
		}
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter the directory as %s: %w", u.name, err)
	}
	return nil
}

// What cases use to set their ground. Names are relative to the case's directory.

func (t *T) file(name, content string) {
	t.must(os.WriteFile(name, []byte(content), 0o644))
}

func (t *T) mkdir(name string, m mode) { t.must(unix.Mkdir(name, uint32(m))) }

// own makes name belong to u, with the given bits.
func (t *T) own(name string, u user, m mode) {
	t.must(unix.Lchown(name, u.uid, u.gid))
	if t.lstat(name).Mode&unix.S_IFMT != unix.S_IFLNK {
		t.must(unix.Chmod(name, uint32(m)))
	}
}

func (t *T) lstat(name string) *unix.Stat_t {
	var st unix.Stat_t
	t.must(unix.Lstat(name, &st))
	return &st
}

// permissions returns the lower twelve bits of the mode.
func (t *T) permissions(name string) mode { return mode(t.lstat(name).Mode & 0o7777) }

func (t *T) fstat(fd int) *unix.Stat_t {
	var st unix.Stat_t
	t.must(unix.Fstat(fd, &st))
	return &st
}

// open opens a file until the end of the case.
func (t *T) open(name string, flags int, m mode) int {
	fd, err := unix.Open(name, flags|unix.O_CLOEXEC, uint32(m))
	t.must(err)
	t.fds = append(t.fds, fd)
	return fd
}

// close closes what open opened, before the end of the case.
func (t *T) close(fd int) {
	t.fds = slices.DeleteFunc(t.fds, func(open int) bool { return open == fd })
	t.must(unix.Close(fd))
}

func (t *T) closeAll() {
	for _, m := range t.maps {
		unix.Munmap(m)
	}
	for _, fd := range t.fds {
		unix.Close(fd)
	}
}

func (t *T) content(name string) string {
	b, err := os.ReadFile(name)
	t.must(err)
	return string(b)
}

// exists says whether a name is there.
func exists(name string) bool {
	var st unix.Stat_t
	return unix.Lstat(name, &st) == nil
}

// openClose opens and closes.
func openClose(name string, flags int, m mode) error {
	fd, err := unix.Open(name, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, uint32(m))
	if err == nil {
		err = unix.Close(fd)
	}
	return err
}

// kinds are the types of files, and how they are made.
var kinds = []kind{
	{"file", unix.S_IFREG, false, func(n string) error { return openClose(n, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644) }},
	{"directory", unix.S_IFDIR, false, func(n string) error { return unix.Mkdir(n, 0o755) }},
	{"fifo", unix.S_IFIFO, false, func(n string) error { return unix.Mkfifo(n, 0o644) }},
	{"socket", unix.S_IFSOCK, false, func(n string) error { return unix.Mknod(n, unix.S_IFSOCK|0o644, 0) }},
	{"character device", unix.S_IFCHR, true, func(n string) error { return unix.Mknod(n, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3))) }},
	{"block device", unix.S_IFBLK, true, func(n string) error { return unix.Mknod(n, unix.S_IFBLK|0o644, int(unix.Mkdev(7, 9))) }},
	{"symbolic link", unix.S_IFLNK, false, func(n string) error { return unix.Symlink("nowhere", n) }},
}

type kind struct {
	name string
	mode uint32
	root bool // only root can make it
	make func(name string) error
}

// kinds returns the types that the case's user can make.
func (t *T) kinds() []kind {
	return slices.DeleteFunc(slices.Clone(kinds), func(k kind) bool { return k.root && t.base.uid != 0 })
}

// stamps are the times of a file, in nanoseconds.
type stamps struct{ atime, mtime, ctime int64 }

func stampsOf(st *unix.Stat_t) stamps {
	return stamps{st.Atim.Nano(), st.Mtim.Nano(), st.Ctim.Nano()}
}

func (t *T) stamps(name string) stamps { return stampsOf(t.lstat(name)) }

// tick waits until a file that changes now gets other times than one that changed before.
func (t *T) tick() {
	coarse := func() int64 {
		var ts unix.Timespec
		t.must(unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts))
		return ts.Nano()
	}
	for start := coarse(); coarse() == start; {
		time.Sleep(time.Millisecond)
	}
}

// changes checks which times of name a call changes: a, m and c.
func (t *T) changes(name, which string, call func() error) {
	before := t.stamps(name)
	t.tick()
	err := call()
	after := t.stamps(name)
	t.Checks++
	var got strings.Builder
	for _, c := range []struct {
		letter        string
		before, after int64
	}{{"a", before.atime, after.atime}, {"m", before.mtime, after.mtime}, {"c", before.ctime, after.ctime}} {
		if c.after != c.before {
			got.WriteString(c.letter)
		}
		if c.letter == "c" && c.after < c.before {
			t.failf("time %s of %s goes backwards", c.letter, name)
		}
	}
	if err != nil {
		t.failf("%v", err)
	}
	if got.String() != which {
		t.failf("times of %s changed: %q, want %q", name, got.String(), which)
	}
}
