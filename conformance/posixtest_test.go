package conformance

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

const goFuseOp = "go-fuse's posixtest"

// goFuseExcluded are tests of go-fuse's suite that cannot pass, and why.
var goFuseExcluded = map[string]string{
	"FcntlFlockLocksFile": "wants a process to conflict with its own POSIX lock, which no kernel does",
}

// goFuseDirectory is set in the process that runs go-fuse's suite.
const goFuseDirectory = "_DEFS_CONFORMANCE_POSIXTEST"

// goFuseSuite runs go-fuse's suite in a process of the mode's user: it takes a *testing.T, and uses threads at will.
func (m runMode) goFuseSuite() ([]outcome, error) {
	cmd := m.child("")
	cmd.Args = append(cmd.Args, "-test.run=^TestGoFuse$", "-test.v")
	dir := filepath.Join(m.mountpoint(), "posixtest")
	u := m.base()
	if err := as(u, m.mountpoint(), func() error { return os.Mkdir(dir, 0o755) }); err != nil {
		return nil, err
	}
	cmd.Env = append(cmd.Env, goFuseDirectory+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(u.uid), Gid: uint32(u.gid)}, Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout = &out
	ended := cmd.Run()
	var outcomes []outcome
	for lines := bufio.NewScanner(&out); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		if name, ok := strings.CutPrefix(line, "--- PASS: TestGoFuse/"); ok {
			outcomes = append(outcomes, outcome{Op: goFuseOp, Name: word(name), Checks: 1})
		} else if name, ok := strings.CutPrefix(line, "--- FAIL: TestGoFuse/"); ok {
			outcomes = append(outcomes, outcome{Op: goFuseOp, Name: word(name), Checks: 1, Failures: []string{"failed"}})
		} else if name, ok := strings.CutPrefix(line, "--- SKIP: TestGoFuse/"); ok {
			outcomes = append(outcomes, outcome{Op: goFuseOp, Name: word(name), Failures: []string{"skipped itself"}})
		}
	}
	if want := len(posixtest.All) - len(goFuseExcluded); len(outcomes) != want || ended != nil {
		return outcomes, fmt.Errorf("go-fuse's suite: %d of %d tests ended, %w:\n%s", len(outcomes), want, ended, out.Bytes())
	}
	return outcomes, nil
}

func word(s string) string { return strings.Fields(s)[0] }

// TestGoFuse runs go-fuse's suite, each test in a directory of its own.
func TestGoFuse(t *testing.T) {
	dir := os.Getenv(goFuseDirectory)
	if dir == "" {
		t.Skip("runs in the mounts of TestConformance")
	}
	for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
		if goFuseExcluded[name] != "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			own := filepath.Join(dir, name)
			if err := os.Mkdir(own, 0o755); err != nil {
				t.Fatal(err)
			}
			posixtest.All[name](t, own)
		})
	}
}
