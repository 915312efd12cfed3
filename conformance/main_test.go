// Package conformance holds a POSIX suite of our own: tables of cases, by operation, that run in any directory.
//
//	go test ./conformance/
//	make posix
//
// The same cases run in a directory of the machine's own filesystem, which shows that the cases are right, and in
// mounts of a volume: as root alone, as root with other users let in, and as an ordinary user through fusermount3.
// Each run is a process with a mount namespace of its own, so that no mount outlives it; the volume is served by a
// further process, because the server of a mount must not use it (see package fusefs).
//
// Cases change credentials, working directory and umask of single threads, as the kernel does it.
package conformance

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/fusefs"
	"github.com/defs-fs/defs/volume"
)

// The test binary is its own helper: with these variables set it does one job in a process of its own.
const (
	jobVariable  = "_DEFS_CONFORMANCE_JOB"
	modeVariable = "_DEFS_CONFORMANCE_MODE" // a run's mode, in JSON
)

// longVariable asks for the long form. It names the file that the report is written to.
const longVariable = "DEFS_CONFORMANCE_REPORT"

// The main thread cannot end: it must not be one of those that a case leaves with a working directory in the mount.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	jobs := map[string]func(runMode) error{"run": runJob, "serve": serveJob, "lock": lockJob}
	job, ok := jobs[os.Getenv(jobVariable)]
	if !ok {
		os.Exit(m.Run())
	}
	var mode runMode
	err := json.Unmarshal([]byte(os.Getenv(modeVariable)), &mode)
	if err == nil {
		err = job(mode)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// runMode is where and as whom the suite runs.
type runMode struct {
	Name   string
	Native bool     // the machine's own filesystem
	User   bool     // as an ordinary user
	Others bool     // other users may enter
	Long   bool     // with the cases of the long form
	Dir    string   // for all that the run makes
	Tests  string   // directory of the tests of Go's packages; of the long form
	With   []string // mount options
}

var runModes = []runMode{
	{Name: "reference, root", Native: true, Others: true},
	{Name: "reference, user", Native: true, User: true},
	{Name: "root only"},
	{Name: "root, allow_other", Others: true},
	{Name: "user", User: true},
	{Name: "user, allow_other", User: true, Others: true},
}

func (m runMode) base() user {
	if m.User {
		return nobody
	}
	return root
}

// excludes returns why a case does not run in this mode; empty where it does.
func (m runMode) excludes(c testCase) string {
	switch {
	case c.long && !m.Long:
		return "long form only"
	case (c.root || c.others) && m.User:
		return "needs root"
	case c.others && !m.Others:
		return "needs other users"
	case c.forced != "" && !m.Native:
		return c.forced
	case c.beyond != "" && m.Native:
		return c.beyond
	}
	return ""
}

// child makes the command that does a job in a process of its own.
func (m runMode) child(job string) *exec.Cmd {
	text, err := json.Marshal(m)
	if err != nil {
		panic(err) // a struct of strings and flags
	}
	cmd := exec.Command("/proc/self/exe") // readable for every user, unlike the directory it is in
	cmd.Env = append(os.Environ(), jobVariable+"="+job, modeVariable+"="+string(text))
	cmd.Stderr = os.Stderr
	return cmd
}

func (m runMode) mountpoint() string { return filepath.Join(m.Dir, "mnt") }

// TestConformance runs the suite in every mode. A case that fails in the reference is itself wrong.
func TestConformance(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become other users and to mount for them")
	}
	report := os.Getenv(longVariable)
	var results []modeResult
	tests := t.TempDir()
	if report != "" {
		buildGoSuites(t, tests)
	}
	for _, m := range runModes {
		if (m.Native || m.User && m.Others) && report == "" {
			continue // in the long form the reference shows that the cases are right
		}
		m.Long, m.Tests = report != "", tests
		t.Run(m.Name, func(t *testing.T) { results = append(results, m.run(t)) })
	}
	if report != "" {
		if err := writeReport(report, results); err != nil {
			t.Error(err)
		}
	}
}

// modeResult is what one run has to say.
type modeResult struct {
	mode     runMode
	outcomes []outcome
}

func (m runMode) run(t *testing.T) modeResult {
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil { // every user has to pass
			t.Fatal(err)
		}
	}
	m.Dir = dir
	cmd := m.child("run")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	result := modeResult{mode: m}
	lines := json.NewDecoder(out)
	for {
		var o outcome
		if err := lines.Decode(&o); err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
		for _, failure := range o.Failures {
			t.Errorf("%s: %s: %s", o.Op, o.Name, failure)
		}
		result.outcomes = append(result.outcomes, o)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the run ended with: %v", err)
	}
	checks := 0
	for _, o := range result.outcomes {
		checks += o.Checks
	}
	t.Logf("%d cases, %d checks", len(result.outcomes), checks)
	return result
}

// runJob runs the suite in one mode and writes the outcomes to standard output.
func runJob(m runMode) error {
	signal.Ignore(unix.SIGXFSZ) // for writes past RLIMIT_FSIZE
	where := m.mountpoint()
	owner := m.base()
	if err := errors.Join(os.Mkdir(where, 0o755), os.Chown(where, owner.uid, owner.gid)); err != nil {
		return err
	}
	if m.Others {
		if err := os.Chmod(where, 0o777); err != nil {
			return err
		}
	}
	results := json.NewEncoder(os.Stdout)
	if m.Native {
		return m.runCases(results)
	}
	if err := m.preparePrivate(); err != nil {
		return err
	}
	stop, err := m.serve()
	if err != nil {
		return err
	}
	err = m.runCases(results)
	outcomes, failed := m.goFuseSuite()
	if m.Long {
		of, err := m.goSuites()
		outcomes, failed = append(outcomes, of...), errors.Join(failed, err)
	}
	for _, o := range outcomes {
		failed = errors.Join(failed, results.Encode(o))
	}
	if err := errors.Join(err, failed, stop()); err != nil {
		return err
	}
	return m.mounts(func(o outcome) error { return results.Encode(o) })
}

// runCases runs the suite's cases and writes what they say.
func (m runMode) runCases(results *json.Encoder) error {
	for i, c := range cases() {
		if m.excludes(c) != "" {
			continue
		}
		o := runCase(c, m.mountpoint(), i, m.base())
		if err := results.Encode(o); err != nil {
			return err
		}
		if o.stuck {
			return fmt.Errorf("%s: %s: stuck", c.op, c.name)
		}
	}
	return nil
}

// serve mounts the run's volume from a process of its own; stop unmounts it.
func (m runMode) serve() (stop func() error, err error) {
	cmd := m.child("serve")
	uid, gid := uint32(m.base().uid), uint32(m.base().gid)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}, Pdeathsig: syscall.SIGKILL}
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "ready\n" {
		return nil, fmt.Errorf("the serving process said %q: %w", line, errors.Join(err, cmd.Wait()))
	}
	return func() error { return errors.Join(input.Close(), cmd.Wait()) }, nil
}

// preparePrivate makes the directory of the volume, and makes the namespace of this process private, with a /dev/fuse for every user in it, as udev makes
// it, and leave to use allow_other.
func (m runMode) preparePrivate() error {
	local := filepath.Join(m.Dir, "local")
	if err := errors.Join(os.Mkdir(local, 0o700), os.Chown(local, m.base().uid, m.base().gid)); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	device := filepath.Join(m.Dir, "fuse")
	conf := filepath.Join(m.Dir, "fuse.conf")
	return errors.Join(
		unix.Mknod(device, unix.S_IFCHR, int(unix.Mkdev(10, 229))),
		unix.Chmod(device, 0o666),
		unix.Mount(device, "/dev/fuse", "", unix.MS_BIND, ""),
		os.WriteFile(conf, []byte("user_allow_other\n"), 0o644),
		unix.Mount(conf, "/etc/fuse.conf", "", unix.MS_BIND, ""),
	)
}

// serveJob mounts a volume until standard input ends.
func serveJob(m runMode) error {
	ctx := context.Background()
	key := [32]byte{1}
	has := func(option string) bool { return slices.Contains(m.With, option) }
	vol, err := volume.Open(ctx, volume.Options{
		Dir: filepath.Join(m.Dir, "local"), Key: key, RootUID: uint32(os.Geteuid()), RootGID: uint32(os.Getegid()), NoAtime: has("noatime"),
	})
	if err != nil {
		return err
	}
	server, err := fusefs.Mount(ctx, fusefs.Options{
		Volume: vol, Mountpoint: m.mountpoint(), AllowOther: m.Others,
		ReadOnly: has("ro"), NoAtime: has("noatime"), NoSuid: has("nosuid"), NoDev: has("nodev"), NoExec: has("noexec"),
	})
	if err != nil {
		return errors.Join(err, vol.Close(ctx))
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	return errors.Join(server.Unmount(), vol.Close(ctx))
}
