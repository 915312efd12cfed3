package command

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// A process in the background is the same program, started again with the same
// arguments, and a pipe as its fourth descriptor: it writes daemonReady, or the
// text of its error, and closes it.
const (
	daemonVariable = "DEFS_IN_BACKGROUND"
	daemonPipeFD   = 3
	daemonReady    = "ready\n"
	logBytesMax    = 16 << 20 // a larger log is put aside at start; one old log is kept
)

func isDaemon() bool { return os.Getenv(daemonVariable) != "" }

// daemonPipe returns what tells the parent that the mount is ready; nil in a
// process in the foreground.
func daemonPipe() (*os.File, error) {
	if !isDaemon() {
		return nil, nil
	}
	os.Unsetenv(daemonVariable)
	syscall.CloseOnExec(daemonPipeFD)
	f := os.NewFile(daemonPipeFD, "parent")
	if f == nil {
		return nil, errors.New("start in the background: no pipe to the parent")
	}
	return f, nil
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
	mark, _ := log.Seek(0, io.SeekEnd)
	err = child.Start()
	write.Close()
	if err != nil {
		return fmt.Errorf("start in the background: %w", err)
	}
	// The pipe ends when the child has written, or has ended.
	answer, err := io.ReadAll(io.LimitReader(read, 64))
	if err == nil && string(answer) == daemonReady {
		return child.Process.Release()
	}
	err = child.Wait()
	said := make([]byte, 4096)
	if n, _ := log.ReadAt(said, mark); n > 0 {
		err = errors.New(strings.TrimSpace(string(said[:n])))
	}
	code := max(child.ProcessState.ExitCode(), exitFailed)
	return &exitError{code, fmt.Errorf("the mount did not start: %w (its log is %s)", err, logPath)}
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
