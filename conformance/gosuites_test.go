package conformance

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// goSuites are packages of Go whose own tests run in the mounts.
var goSuites = []string{"os", "path/filepath", "io/fs", "io/ioutil", "archive/tar"}

const goSuitesOp = "tests of Go's packages"

// goSuitesExcluded are tests that cannot pass, and why.
var goSuitesExcluded = map[string]string{
	"TestNonpollableDeadline": "wants a deadline of a regular file to be refused, and the kernel lets files of FUSE be polled",
}

func suiteFile(dir, pkg string) string {
	return filepath.Join(dir, strings.ReplaceAll(pkg, "/", "-")+".test")
}

// buildGoSuites builds the tests into dir, for every user.
func buildGoSuites(t *testing.T, dir string) {
	t.Helper()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, pkg := range goSuites {
		if out, err := exec.Command("go", "test", "-c", "-o", suiteFile(dir, pkg), pkg).CombinedOutput(); err != nil {
			t.Fatalf("build the tests of %s: %v\n%s", pkg, err, out)
		}
	}
}

// goSuites runs the tests as the mode's user with their temporary files in the mount.
func (m runMode) goSuites() (outcomes []outcome, err error) {
	u := m.base()
	skip := make([]string, 0, len(goSuitesExcluded))
	for name := range goSuitesExcluded {
		skip = append(skip, "^"+name+"$")
	}
	slices.Sort(skip)
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return outcomes, fmt.Errorf("go env: %w", err)
	}
	for _, pkg := range goSuites {
		dir := filepath.Join(m.mountpoint(), "go-"+strings.ReplaceAll(pkg, "/", "-"))
		if err := as(u, m.mountpoint(), func() error { return os.Mkdir(dir, 0o755) }); err != nil {
			return outcomes, err
		}
		cmd := exec.Command(suiteFile(m.Tests, pkg), "-test.v", "-test.short", "-test.timeout=10m", "-test.skip="+strings.Join(skip, "|"))
		cmd.Dir = filepath.Join(strings.TrimSpace(string(goroot)), "src", pkg)
		cmd.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: u.credential(), Pdeathsig: syscall.SIGKILL}
		out, ended := cmd.CombinedOutput()
		failed := false
		for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
			if name, ok := strings.CutPrefix(lines.Text(), "--- PASS: "); ok {
				outcomes = append(outcomes, outcome{Op: goSuitesOp, Name: pkg + "." + word(name), Checks: 1})
			} else if name, ok := strings.CutPrefix(lines.Text(), "--- FAIL: "); ok {
				failed = true
				outcomes = append(outcomes, outcome{Op: goSuitesOp, Name: pkg + "." + word(name), Checks: 1, Failures: []string{"failed"}})
			}
		}
		if ended != nil {
			err = fmt.Errorf("tests of %s: %w", pkg, ended)
			if text := string(out); !failed || len(text) < 1<<20 {
				fmt.Fprintln(os.Stderr, text[max(0, len(text)-20_000):])
			}
		}
	}
	return outcomes, err
}
