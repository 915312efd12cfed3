package command

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// A process in the background is the same program, started again with the same
// arguments, and a pipe as its fourth descriptor: it writes daemonReady, or the
// text of its error, and closes it.
const (
	daemonVariable = "_DEFS_IN_BACKGROUND"
	daemonPipeFD   = 3
	daemonReady    = "ready\n"
	answerBytesMax = 64 << 10
	logBytesMax    = 16 << 20 // a larger log is put aside at start; one old log is kept
)

func isDaemon() bool { return os.Getenv(daemonVariable) != "" }

// openDaemonPipe returns what tells the parent how it went; nil in a process in
// the foreground.
func openDaemonPipe() *os.File {
	if !isDaemon() {
		return nil
	}
	syscall.CloseOnExec(daemonPipeFD)
	return os.NewFile(daemonPipeFD, "parent")
}

// tellParent ends the parent's wait. Later calls do nothing.
func (a *app) tellParent(how string) {
	if a.parent != nil {
		fmt.Fprint(a.parent, how)
		a.parent.Close()
		a.parent = nil
	}
}

// detach starts this program again in the background and returns when the mount
// answers, or with the child's error and exit code.
func (a *app) detach(m mounting) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	logPath := filepath.Join(m.dir, "log", "mount.log")
	log, err := openLog(logPath)
	if err != nil {
		return err
	}
	defer log.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	child := exec.Command(self, os.Args[1:]...)
	child.Args[0] = os.Args[0] // the name may say that it is mount(8)'s helper
	child.Env = append(os.Environ(), daemonVariable+"=1")
	child.Stdout, child.Stderr = log, log
	child.ExtraFiles = []*os.File{write}
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = child.Start()
	write.Close()
	if err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	// The pipe ends when the child has written, or has ended.
	answer, err := io.ReadAll(io.LimitReader(read, answerBytesMax))
	if err == nil && string(answer) == daemonReady {
		return child.Process.Release()
	}
	err = child.Wait()
	code := max(child.ProcessState.ExitCode(), exitFailed)
	if len(answer) == 0 {
		return &exitError{code, fmt.Errorf("the mount did not start: %w; its log is %s", err, logPath)}
	}
	return &exitError{code, errors.New(string(answer))}
}

func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil && info.Size() > logBytesMax {
		if err := os.Rename(path, path+".old"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
}
