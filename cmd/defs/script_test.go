package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/cmd/internal/command"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"defs":       main,
		"defs-mount": func() { os.Exit(command.Mount(os.Args[1:], command.OS(), false)) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("XDG_DATA_HOME", env.WorkDir+"/share")
			env.Setenv("XDG_CONFIG_HOME", env.WorkDir+"/config")
			return nil
		},
		Condition: func(name string) (bool, error) {
			if name != "mounts" {
				return false, errors.New("unknown condition")
			}
			_, err := os.Stat("/dev/fuse")
			return err == nil && os.Geteuid() == 0, nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"code":   code,
			"await":  await,
			"detach": detach,
			"keep":   keep,
			"until":  until,
			"signal": signal,
		},
	})
}

// code NUMBER COMMAND ARGS... runs a command that has to end with a code.
func code(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if neg || got != want {
		ts.Fatalf("exit code is %d, want %d", got, want)
	}
}

// keep VARIABLE sets a variable to what the last command printed.
func keep(ts *testscript.TestScript, neg bool, args []string) {
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}

// await FILE waits until a file has content.
func await(ts *testscript.TestScript, neg bool, args []string) {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if info, err := os.Stat(ts.MkAbs(args[0])); err == nil && info.Size() > 0 {
			return
		}
	}
	ts.Fatalf("%s does not come", args[0])
}

// detach PATH unmounts at the end of the script, whatever happened.
func detach(ts *testscript.TestScript, neg bool, args []string) {
	path := ts.MkAbs(args[0])
	ts.Defer(func() { syscall.Unmount(path, syscall.MNT_DETACH) })
}

// until TEXT COMMAND ARGS... repeats a command until its output has the text.
func until(ts *testscript.TestScript, neg bool, args []string) {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err := ts.Exec(args[1], args[2:]...); err == nil && strings.Contains(ts.ReadFile("stdout"), args[0]) {
			return
		}
	}
	ts.Fatalf("%q does not come", args[0])
}

// signal NAME VOLUME sends a signal to the process that has mounted the volume
// in the background last. It returns after the end of a process that it kills.
func signal(ts *testscript.TestScript, neg bool, args []string) {
	log := ts.ReadFile(filepath.Join(args[1], "log", "mount.log"))
	pids := regexp.MustCompile(`msg=mounted pid=([0-9]+)`).FindAllStringSubmatch(log, -1)
	if len(pids) == 0 {
		ts.Fatalf("%s has not been mounted", args[1])
	}
	pid, err := strconv.Atoi(pids[len(pids)-1][1])
	ts.Check(err)
	number := unix.SignalNum("SIG" + args[0])
	ts.Check(syscall.Kill(pid, number))
	for deadline := time.Now().Add(30 * time.Second); number == syscall.SIGKILL && syscall.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)); err == nil && len(threads) == 1 && strings.Contains(string(state), ") Z ") {
			return // has ended, and nobody waits for it
		}
		if time.Now().After(deadline) {
			ts.Fatalf("process %d does not end", pid)
		}
	}
}
