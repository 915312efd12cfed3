// Package integration tests the whole system from outside: the real programs
// as real processes, real mounts, the tools that people use, and the faults
// that happen.
//
//	go test ./integration/
//	DEFS_CRASHES=1000 go test -run 'Killed|PowerCut' -v ./integration/
//	DEFS_MODEL_OPS=100000 go test -run TestModel -v ./integration/
//
// Each test has a cluster of its own in one temporary directory: storage nodes,
// a volume, a mount. TestMain runs the tests in a child process and sweeps when
// that has ended, however it ended: mounts, processes and files do not outlive
// the run. Nothing waits by sleeping; every wait has a condition and a deadline.
package integration

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// directoryVariable tells the child where the run's files are. The programs are
// in bin below it.
const directoryVariable = "_DEFS_INTEGRATION_DIRECTORY"

func TestMain(m *testing.M) {
	if os.Getenv(directoryVariable) != "" {
		os.Exit(m.Run())
	}
	code, err := supervise()
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// supervise builds the programs, runs this test binary again as a child, and
// sweeps.
func supervise() (code int, err error) {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM) // the child gets a Ctrl-C too; what it leaves is swept here
	dir, err := os.MkdirTemp("", "defs-integration-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, sweep(dir)) }()
	build := exec.Command("go", append(append([]string{"build"}, buildFlags...), "-o", filepath.Join(dir, "bin")+"/", "./cmd/defs", "./cmd/defs-mount")...)
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	child := exec.Command(os.Args[0], os.Args[1:]...)
	child.Env = append(os.Environ(), directoryVariable+"="+dir, "TMPDIR="+dir) // disks that tests make are swept too
	if os.Geteuid() == 0 {
		// Mounts of its own: nobody else on the machine can keep one busy, and
		// they go with the last process.
		child.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	}
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := child.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	select {
	case <-ended:
	case s := <-interrupted:
		child.Process.Signal(s)
		<-ended
	}
	return max(child.ProcessState.ExitCode(), 0), signaled(child.ProcessState)
}

// signaled returns an error for a process that a signal has ended.
func signaled(state *os.ProcessState) error {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return fmt.Errorf("the tests were ended by: %v", status.Signal())
	}
	return nil
}

// sweep detaches every mount below dir, ends every process that runs a program
// below it, and removes it.
func sweep(dir string) error {
	var errs []error
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		target, err := os.Readlink(exe)
		if err != nil || !strings.HasPrefix(target, dir+"/") {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(exe, "/proc/%d/exe", &pid); err == nil {
			errs = append(errs, fmt.Errorf("process %d was left behind: %s", pid, filepath.Base(target)), syscall.Kill(pid, syscall.SIGKILL))
		}
	}
	mounts, err := mountsBelow(dir)
	errs = append(errs, err)
	for _, m := range mounts {
		errs = append(errs, fmt.Errorf("a mount was left behind: %s", m), unix.Unmount(m, unix.MNT_DETACH))
	}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
}

// mountsBelow lists mountpoints below dir, newest first.
func mountsBelow(dir string) (points []string, err error) {
	f, err := os.Open("/proc/self/mountinfo") // proc_pid_mountinfo(5)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			points = append([]string{fields[4]}, points...)
		}
	}
	return points, lines.Err()
}
