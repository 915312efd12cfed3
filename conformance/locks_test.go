package conformance

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func lockCases() []testCase {
	return []testCase{
		{op: "locks", name: "flock: shared, exclusive, by descriptor", run: flocks},
		{op: "locks", name: "flock: waits, and is interrupted", run: flockWaits},
		{op: "locks", name: "open file description locks: ranges, by descriptor", run: descriptionLocks},
		{op: "locks", name: "POSIX locks: of another process, found and refused", run: posixLocks},
		{op: "locks", name: "POSIX locks: a wait ends when the lock goes", run: posixLockWaits},
		{op: "locks", name: "POSIX locks: a wait is interrupted by a signal", run: posixLockInterrupted},
		{op: "locks", name: "leases", run: func(t *T) {
			t.file("file", "")
			fd := t.open("file", unix.O_RDONLY, 0)
			_, err := unix.FcntlInt(uintptr(fd), unix.F_GETLEASE, 0)
			t.want(0, err)
		}},
	}
}

func flocks(t *T) {
	t.file("file", "")
	a, b := t.open("file", unix.O_RDONLY, 0), t.open("file", unix.O_RDWR, 0)
	t.want(0, unix.Flock(a, unix.LOCK_SH))
	t.want(0, unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB))
	t.want(unix.EWOULDBLOCK, unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB))
	t.want(0, unix.Flock(a, unix.LOCK_UN))
	t.want(0, unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB))
	t.want(unix.EWOULDBLOCK, unix.Flock(a, unix.LOCK_SH|unix.LOCK_NB))
	duplicate, err := unix.FcntlInt(uintptr(b), unix.F_DUPFD_CLOEXEC, 0)
	t.must(err)
	t.close(b)
	t.want(unix.EWOULDBLOCK, unix.Flock(a, unix.LOCK_SH|unix.LOCK_NB)) // the duplicate holds it
	t.must(unix.Close(duplicate))
	t.want(0, unix.Flock(a, unix.LOCK_EX|unix.LOCK_NB))
	t.want(0, unix.Flock(t.openDir(), unix.LOCK_EX|unix.LOCK_NB))
	t.want(unix.EINVAL, unix.Flock(a, 77))
}

func (t *T) openDir() int { return t.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0) }

func flockWaits(t *T) {
	t.file("file", "")
	a, b := t.open("file", unix.O_RDONLY, 0), t.open("file", unix.O_RDONLY, 0)
	t.want(0, unix.Flock(a, unix.LOCK_EX))
	got := t.interruptible(func() error { return unix.Flock(b, unix.LOCK_EX) })
	t.want(unix.EINTR, got(true))
	got = t.interruptible(func() error { return unix.Flock(b, unix.LOCK_EX) })
	t.want(0, unix.Flock(a, unix.LOCK_UN))
	t.want(0, got(false))
}

// interruptible runs a call that waits on a thread of its own. The function that it returns says how the call ended,
// after signals to the thread, or by itself.
func (t *T) interruptible(call func() error) func(interrupt bool) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1)
	t.must(withoutRestart(unix.SIGUSR1))
	thread, ended := make(chan int, 1), make(chan error, 1)
	go func() {
		ended <- t.as(t.base, func() error {
			thread <- unix.Gettid()
			return call()
		})
	}()
	tid := <-thread
	return func(interrupt bool) error {
		defer signal.Stop(signals)
		again := time.NewTicker(20 * time.Millisecond) // the call may not have begun to wait
		defer again.Stop()
		deadline := time.After(20 * time.Second)
		for {
			select {
			case err := <-ended:
				return err
			case <-deadline:
				return errors.New("still waiting after 20 s")
			case <-again.C:
				if interrupt {
					unix.Tgkill(os.Getpid(), tid, unix.SIGUSR1)
				}
			}
		}
	}
}

// withoutRestart makes a signal end system calls that wait: the handler of a Go program restarts them.
func withoutRestart(s syscall.Signal) error {
	type action struct { // the kernel's struct sigaction
		_, flags, _ uintptr // handler, flags, restorer
		_           uint64  // mask
	}
	var a [1]action
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), 0, uintptr(pointer(a[:])), 8, 0, 0); e != 0 {
		return e
	}
	a[0].flags &^= 0x10000000 // SA_RESTART
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(pointer(a[:])), 0, 8, 0, 0); e != 0 {
		return e
	}
	return nil
}

func writeLock(start, length int64) *unix.Flock_t {
	return &unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: start, Len: length}
}

func descriptionLocks(t *T) {
	t.file("file", "0123456789")
	a, b := t.open("file", unix.O_RDWR, 0), t.open("file", unix.O_RDWR, 0)
	lock := func(fd int, typ int16, start, length int64) error {
		l := writeLock(start, length)
		l.Type = typ
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, l)
	}
	t.want(0, lock(a, unix.F_WRLCK, 0, 5))
	t.want(unix.EAGAIN, lock(b, unix.F_RDLCK, 4, 1))
	t.want(0, lock(b, unix.F_WRLCK, 5, 0)) // to the end, wherever that is
	t.want(unix.EAGAIN, lock(a, unix.F_WRLCK, 1<<40, 1))
	found := writeLock(0, 1)
	t.want(0, unix.FcntlFlock(uintptr(b), unix.F_OFD_GETLK, found))
	equal(t, "type of the lock found", found.Type, unix.F_WRLCK)
	equal(t, "length of the lock found", found.Len, 5)
	t.want(0, lock(a, unix.F_UNLCK, 1, 2)) // splits it
	t.want(0, lock(b, unix.F_RDLCK, 1, 2))
	t.want(unix.EAGAIN, lock(b, unix.F_RDLCK, 0, 2))
	got := t.interruptible(func() error { return unix.FcntlFlock(uintptr(b), unix.F_OFD_SETLKW, writeLock(0, 1)) })
	t.want(unix.EINTR, got(true))
	got = t.interruptible(func() error { return unix.FcntlFlock(uintptr(b), unix.F_OFD_SETLKW, writeLock(0, 1)) })
	t.close(a)
	t.want(0, got(false))
	t.want(unix.EBADF, unix.FcntlFlock(uintptr(t.open("file", unix.O_RDONLY, 0)), unix.F_OFD_SETLK, writeLock(0, 1)))
	t.want(unix.EINVAL, lock(b, 77, 0, 1))
	t.want(unix.EINVAL, lock(b, unix.F_WRLCK, -1, 1))
}

// holder is a process that holds a POSIX lock on "file", bytes 0 to 99.
type holder struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// lockJob locks the file m.Dir until standard input ends. It waits for the lock.
func lockJob(m runMode) error {
	f, err := os.OpenFile(m.Dir, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLKW, writeLock(0, 100)); err != nil {
		return err
	}
	fmt.Println("locked")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// hold starts a process that takes the lock; locked is closed when it has it.
func (t *T) hold() (h *holder, locked chan struct{}) {
	cmd := runMode{Dir: t.dir + "/file"}.child("lock")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: t.base.credential(), Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	t.must(err)
	stdout, err := cmd.StdoutPipe()
	t.must(err)
	t.must(cmd.Start())
	locked = make(chan struct{})
	go func() {
		if line, _ := bufio.NewReader(stdout).ReadString('\n'); line == "locked\n" {
			close(locked)
		}
	}()
	return &holder{cmd, stdin}, locked
}

func (t *T) soon(c chan struct{}, what string) {
	select {
	case <-c:
		t.Checks++
	case <-time.After(20 * time.Second):
		t.failf("%s", what)
	}
}

func posixLocks(t *T) {
	t.file("file", "0123456789")
	fd := t.open("file", unix.O_RDWR, 0)
	h, locked := t.hold()
	t.soon(locked, "no lock")
	set := func(start, length int64) error {
		return unix.FcntlFlock(uintptr(fd), unix.F_SETLK, writeLock(start, length))
	}
	t.want(unix.EAGAIN, set(0, 10))
	t.want(unix.EAGAIN, set(99, 1))
	t.want(0, set(100, 10))
	found := writeLock(50, 1000)
	t.want(0, unix.FcntlFlock(uintptr(fd), unix.F_GETLK, found))
	equal(t, "process of the lock", int(found.Pid), h.cmd.Process.Pid)
	equal(t, "its start", found.Start, 0)
	equal(t, "its length", found.Len, 100)
	t.want(unix.EAGAIN, unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, writeLock(0, 1)))
	t.want(0, unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)) // another kind of lock
	t.must(h.cmd.Process.Kill())
	h.cmd.Wait()
	t.want(0, set(0, 10)) // the lock went with its process
	t.close(t.open("file", unix.O_RDONLY, 0))
	// Closing any descriptor of the file gives all the process's locks back.
	h, locked = t.hold()
	t.soon(locked, "a lock stayed after close")
	t.must(h.stdin.Close())
	t.want(0, h.cmd.Wait())
}

func posixLockWaits(t *T) {
	t.file("file", "")
	first, locked := t.hold()
	t.soon(locked, "no lock")
	second, secondLocked := t.hold()
	third, _ := t.hold()
	// A process that is killed while it waits ends.
	t.must(third.cmd.Process.Signal(unix.SIGTERM))
	ended := make(chan struct{})
	go func() { third.cmd.Wait(); close(ended) }()
	t.soon(ended, "a process that waits for a lock cannot be ended")
	select {
	case <-secondLocked:
		t.failf("two processes hold the lock")
	default:
	}
	t.must(first.stdin.Close())
	t.want(0, first.cmd.Wait())
	t.soon(secondLocked, "the lock does not go on")
	t.must(second.stdin.Close())
	t.want(0, second.cmd.Wait())
}

func posixLockInterrupted(t *T) {
	t.file("file", "")
	fd := t.open("file", unix.O_RDWR, 0)
	h, locked := t.hold()
	t.soon(locked, "no lock")
	got := t.interruptible(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_SETLKW, writeLock(0, 1)) })
	t.want(unix.EINTR, got(true))
	got = t.interruptible(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_SETLKW, writeLock(0, 1)) })
	t.must(h.stdin.Close())
	t.want(0, got(false))
	t.want(0, h.cmd.Wait())
}
