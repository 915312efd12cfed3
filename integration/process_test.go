package integration

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// program returns the path of one of the programs under test.
func program(name string) string {
	return filepath.Join(os.Getenv(directoryVariable), "bin", name)
}

// process is a program that runs in the background. Its output goes to a file.
type process struct {
	t     *testing.T
	name  string
	log   string
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has been waited for
}

// spawn starts a process. The kernel kills it when the tests end, at the latest.
func spawn(t *testing.T, name, log string, args ...string) *process {
	t.Helper()
	f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := &process{t: t, name: name, log: log, cmd: exec.Command(args[0], args[1:]...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.Env = environment()
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		defer close(p.ended)
		p.cmd.Wait()
	}()
	return p
}

// environment keeps the settings of the person who runs the tests out of them.
func environment() []string {
	dir := os.Getenv(directoryVariable)
	inherited := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "DEFS_") })
	return append(inherited, "XDG_CONFIG_HOME="+dir+"/xdg", "XDG_DATA_HOME="+dir+"/xdg", "XDG_STATE_HOME="+dir+"/xdg",
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
		"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.org", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.org")
}

func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// signal sends a signal. A process that has ended is no error.
func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Errorf("signal %s: %v", p.name, err)
	}
}

// kill ends the process as a crash does, and waits for that.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.ended
}

// waitEnd waits for the process to end by itself.
func (p *process) waitEnd(timeout time.Duration) {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(timeout):
		p.t.Fatalf("%s has not ended within %v", p.name, timeout)
	}
}

// tail returns the end of what the process has written.
func (p *process) tail() string {
	b, _ := os.ReadFile(p.log)
	if len(b) > 4000 {
		b = b[len(b)-4000:]
	}
	return string(b)
}

// eventually polls until condition holds. It returns how long that took.
func eventually(t *testing.T, timeout time.Duration, what string, condition func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	for !condition() {
		if time.Since(began) > timeout {
			t.Fatalf("not within %v: %s", timeout, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(began)
}

// run runs a tool to its end and returns its standard output. It fails the test
// when the tool fails.
func run(t *testing.T, timeout time.Duration, args ...string) string {
	t.Helper()
	out, err := try(timeout, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try runs a tool to its end and returns its standard output.
func try(timeout time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = environment()
	cmd.WaitDelay = time.Second
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return out.String(), &toolError{args, errors.Join(ctx.Err(), err), out.String() + problems.String()}
	}
	return out.String(), nil
}

// toolError says which tool failed, and what it said.
type toolError struct {
	args []string
	err  error
	said string
}

func (e *toolError) Error() string {
	said := e.said
	if len(said) > 2000 {
		said = said[:2000] + "…"
	}
	return filepath.Base(e.args[0]) + ": " + e.err.Error() + ": " + said
}

func (e *toolError) Unwrap() error { return e.err }

// exitCodeOf returns the code with which the tool has ended, or -1.
func exitCodeOf(e *toolError) int {
	var exit *exec.ExitError
	if errors.As(e.err, &exit) {
		return exit.ExitCode()
	}
	return -1
}
