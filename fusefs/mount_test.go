package fusefs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/volume"
)

// The test binary is its own helper: with DEFS_TEST_HELPER set it does one job in a process of its own.
const helperVariable = "DEFS_TEST_HELPER"

func TestMain(m *testing.M) {
	syscall.Umask(0o022)
	if job := os.Getenv(helperVariable); job != "" {
		if err := runHelper(job, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runHelper(job string, args []string) error {
	switch job {
	case "serve":
		return helpServe(args[0], args[1])
	case "mmap":
		return helpMmap(args[0])
	default:
		return fmt.Errorf("no job %q", job)
	}
}

// helper runs the test binary for one job.
func helper(t *testing.T, job string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...) // readable for every user, unlike the directory it is in
	cmd.Env = append(os.Environ(), helperVariable+"="+job)
	cmd.Stderr = os.Stderr
	return cmd
}

// helpServe mounts the volume in dir until standard input ends.
func helpServe(dir, mountpoint string) error {
	vol, err := volume.Open(context.Background(), volume.Options{Dir: dir, Key: testKey, RootUID: uint32(os.Geteuid()), RootGID: uint32(os.Getegid())})
	if err != nil {
		return err
	}
	server, err := Mount(context.Background(), Options{Volume: vol, Mountpoint: mountpoint})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	return errors.Join(server.Unmount(), vol.Close(context.Background()))
}

// serving is a mount served by another process.
type serving struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

func serve(t *testing.T, dir, mountpoint string, uid uint32) *serving {
	t.Helper()
	cmd := helper(t, "serve", dir, mountpoint)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	s := &serving{cmd, stdin}
	t.Cleanup(func() { s.kill(); syscall.Unmount(mountpoint, syscall.MNT_DETACH) })
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the serving process said %q, %v", line, err)
	}
	return s
}

func (s *serving) stop(t *testing.T) {
	t.Helper()
	s.stdin.Close()
	must(t, s.cmd.Wait())
}

func (s *serving) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

var testKey = [32]byte{1}

// mount mounts a new volume for the length of the test and returns the mountpoint.
func mount(t testing.TB, change ...func(*Options)) string {
	t.Helper()
	mnt, _ := mountServer(t, change...)
	return mnt
}

func mountServer(t testing.TB, change ...func(*Options)) (string, *Server) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to change owners and to mount with suid and dev")
	}
	dir := t.TempDir()
	mnt := filepath.Join(dir, "mnt")
	must(t, os.Mkdir(mnt, 0o755))
	must(t, os.Chmod(filepath.Dir(dir), 0o755)) // for tests as an ordinary user
	ctx := context.Background()
	logger := slog.New(slog.NewTextHandler(t.Output(), nil))
	vol, err := volume.Open(ctx, volume.Options{Dir: filepath.Join(dir, "local"), Key: testKey, Logger: logger})
	must(t, err)
	o := Options{Volume: vol, Mountpoint: mnt, Logger: logger}
	for _, f := range change {
		f(&o)
	}
	server, err := Mount(ctx, o)
	if err != nil {
		t.Fatal(errors.Join(err, vol.Close(ctx)))
	}
	must(t, server.raw.WaitMount()) // these tests open files of the mount in the process that serves it
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
			syscall.Unmount(mnt, syscall.MNT_DETACH)
			return
		}
		if err := vol.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return mnt, server
}

// forOthers mounts with the permission checks and ACLs that a mount for several users has.
func forOthers(o *Options) { o.AllowOther = true }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err error, want syscall.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

func write(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

func wantContent(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	must(t, err)
	if string(got) != want {
		t.Fatalf("content of %d bytes, want %d: %.40q, want %.40q", len(got), len(want), got, want)
	}
}

func stat(t *testing.T, path string) *unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return &st
}

func TestOptionsValidate(t *testing.T) {
	o := Options{Mountpoint: "relative", ReadAheadKiB: -1}
	o.EnsureDefaults()
	err := o.Validate()
	if err == nil || !strings.Contains(err.Error(), "absolute") || !strings.Contains(err.Error(), "read-ahead") {
		t.Fatalf("not every fault is reported: %v", err)
	}
	if _, err := Mount(context.Background(), Options{Mountpoint: "/"}); err == nil {
		t.Fatal("mounted without a volume")
	}
}

func TestMountFlags(t *testing.T) {
	mnt := mount(t, func(o *Options) { o.ReadOnly, o.NoSuid, o.NoDev, o.NoExec, o.NoAtime = true, true, true, true, true })
	wantErr(t, os.Mkdir(mnt+"/d", 0o755), unix.EROFS)
	var st unix.Statfs_t
	must(t, unix.Statfs(mnt, &st))
	const want = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC | unix.ST_NOATIME
	if st.Flags&want != want {
		t.Fatalf("mount flags %#x, want %#x among them", st.Flags, want)
	}
	if st.Namelen != nameBytesMax || st.Blocks == 0 {
		t.Fatalf("statfs: names of %d bytes, %d blocks", st.Namelen, st.Blocks)
	}
}

func TestMountRefusesWhatIsNoDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "")
	for _, path := range []string{file, file + ".missing"} {
		if _, err := MountRaw(context.Background(), nil, Options{Mountpoint: path}); err == nil {
			t.Fatalf("mounted at %s", filepath.Base(path))
		}
	}
}

func TestReadAhead(t *testing.T) {
	mnt := mount(t, func(o *Options) { o.ReadAheadKiB = 512 })
	dev := stat(t, mnt).Dev
	got, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev)))
	must(t, err)
	if string(got) != "512\n" {
		t.Fatalf("read-ahead is %q KiB", got)
	}
}

func TestUnmountWhileBusy(t *testing.T) {
	mnt, server := mountServer(t)
	write(t, mnt+"/f", "x")
	f, err := os.Open(mnt + "/f")
	must(t, err)
	wantErr(t, server.Unmount(), unix.EBUSY)
	must(t, f.Close())
	must(t, server.Unmount())
	must(t, server.Unmount())
	must(t, server.Wait())
}

// A program that is just leaving does not keep the mount.
func TestUnmountWaitsForWhoLeaves(t *testing.T) {
	mnt, server := mountServer(t)
	write(t, mnt+"/f", "x")
	f, err := os.Open(mnt + "/f")
	must(t, err)
	time.AfterFunc(busyWait/2, func() { f.Close() })
	must(t, server.Unmount())
}

// A copy of the mount in another mount namespace, in use there, does not keep the process: it is cut off.
func TestUnmountOfCopies(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a mount namespace")
	}
	for _, leave := range map[string]func(*Server) error{"Unmount": (*Server).Unmount, "Detach": (*Server).Detach} {
		mnt, server := mountServer(t)
		write(t, mnt+"/f", "x")
		other := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
			`exec 3<"$1" && cat "$1" && echo && read line && ! cat "$1" 2>&1`, "sh", mnt+"/f")
		input, err := other.StdinPipe()
		must(t, err)
		output, err := other.StdoutPipe()
		must(t, err)
		must(t, other.Start())
		lines := bufio.NewReader(output)
		if line, err := lines.ReadString('\n'); line != "x\n" {
			t.Fatalf("the other namespace reads %q, %v", line, err)
		}
		began := time.Now()
		must(t, leave(server))
		must(t, server.Wait())
		if took := time.Since(began); took > copiesWait+10*time.Second {
			t.Errorf("took %v", took)
		}
		_, err = io.WriteString(input, "\n")
		must(t, err)
		said, _ := lines.ReadString('\n')
		if !strings.Contains(said, "not connected") && !strings.Contains(said, "abort") {
			t.Errorf("afterwards the other namespace reads %q", said)
		}
		must(t, other.Wait())
	}
}

// Detach cuts off programs that keep the mount busy.
func TestDetach(t *testing.T) {
	mnt, server := mountServer(t)
	write(t, mnt+"/f", "x")
	f, err := os.Open(mnt + "/f")
	must(t, err)
	must(t, server.Detach())
	must(t, server.Wait())
	if _, err := f.Stat(); err != nil && !errors.Is(err, unix.ENOTCONN) {
		t.Error(err)
	}
	_, err = f.WriteAt([]byte("y"), 0)
	if err == nil {
		t.Error("written to a mount that is gone")
	}
	must(t, f.Close())
	must(t, server.Detach())
	must(t, server.Unmount())
}

func TestUnmountFromOutside(t *testing.T) {
	mnt, server := mountServer(t)
	must(t, unix.Unmount(mnt, 0))
	must(t, server.Wait())
	must(t, server.Unmount())
}

func TestInvalidate(t *testing.T) {
	mnt, server := mountServer(t)
	write(t, mnt+"/f", "old")
	must(t, server.InvalidateContent(volume.Ino(stat(t, mnt+"/f").Ino), 0, 0))
	must(t, server.InvalidateContent(1<<40, 0, 0)) // nothing known of it
	must(t, server.InvalidateEntry(volume.RootIno, "f"))
	must(t, server.InvalidateEntry(volume.RootIno, "never seen"))
	wantContent(t, mnt+"/f", "old")
}

// A killed process leaves a stale mount. The next mount cleans it and shows what the first one acknowledged.
func TestKilledAndMountedAgain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	mnt := filepath.Join(dir, "mnt with space")
	must(t, os.Mkdir(mnt, 0o755))

	first := serve(t, dir+"/local", mnt, 0)
	if cleaned, err := CleanStale(mnt); cleaned || err != nil {
		t.Fatalf("a live mount was cleaned: %v, %v", cleaned, err)
	}
	content := strings.Repeat("written and not flushed ", 10_000)
	write(t, mnt+"/f", content)
	must(t, os.Mkdir(mnt+"/d", 0o700))
	inode := stat(t, mnt+"/f").Ino
	first.kill()
	wantErr(t, unix.Statfs(mnt, new(unix.Statfs_t)), unix.ENOTCONN)

	second := serve(t, dir+"/local", mnt, 0)
	wantContent(t, mnt+"/f", content)
	if got := stat(t, mnt+"/f").Ino; got != inode {
		t.Fatalf("inode number %d became %d", inode, got)
	}
	if mode := stat(t, mnt+"/d").Mode; mode != unix.S_IFDIR|0o700 {
		t.Fatalf("mode %o", mode)
	}
	second.kill()
	if cleaned, err := CleanStale(mnt); !cleaned || err != nil {
		t.Fatalf("the stale mount was not cleaned: %v, %v", cleaned, err)
	}
	if cleaned, err := CleanStale(mnt); cleaned || err != nil {
		t.Fatalf("cleaned where nothing is mounted: %v, %v", cleaned, err)
	}
	serve(t, dir+"/local", mnt, 0).stop(t)
}

// An ordinary user mounts with fusermount3.
func TestMountAsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	needs(t, "fusermount3")
	if info, err := os.Stat("/dev/fuse"); err != nil || info.Mode().Perm() != 0o666 {
		t.Skip("/dev/fuse is for root only on this machine")
	}
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o755))
	mnt := filepath.Join(dir, "mnt")
	must(t, os.Mkdir(mnt, 0o755))
	must(t, os.Chown(mnt, someone, someone))
	must(t, os.Chown(dir, someone, someone))
	s := serve(t, dir+"/local", mnt, someone)
	asSomeone(t, func() {
		write(t, mnt+"/f", "mine")
		must(t, os.Chmod(mnt+"/f", 0))
		_, err := os.Open(mnt + "/f")
		wantErr(t, err, unix.EACCES)
		must(t, os.Chmod(mnt+"/f", 0o600))
		wantContent(t, mnt+"/f", "mine")
	})
	s.kill()
	// The next mount cleans what the killed one left. Only its user can tell that it is stale.
	serve(t, dir+"/local", mnt, someone).stop(t)
}

func TestParseMounts(t *testing.T) {
	const table = `22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw
42 27 0:39 / /a\040b rw - ext4 /dev/vda rw
43 42 0:40 / /a\040b rw,nosuid - fuse.defs defs rw,user_id=0
`
	got, err := parseMounts(strings.NewReader(table))
	must(t, err)
	if len(got) != 3 || got[1].path != "/a b" || got[2] != (mounted{"0:40", "/a b", fsType, "defs"}) {
		t.Fatalf("got %v", got)
	}
	if _, err := parseMounts(strings.NewReader("nonsense\n")); err == nil {
		t.Fatal("nonsense was accepted")
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("43 42 0:40 / /a\\040b rw,nosuid - fuse.defs defs rw\n", "/a b")
	f.Add("1 - ", "")
	f.Fuzz(func(t *testing.T, table, path string) {
		parseMounts(strings.NewReader(table))
		if got := unescapeMountPath(path); len(got) > len(path) {
			t.Fatalf("unescaping made %q longer", path)
		}
	})
}

func TestSplitTime(t *testing.T) {
	for _, ns := range []int64{0, 1, -1, 1e9, -1e9, 1234567890123456789, -1234567890123456789} {
		s, n := splitTime(ns)
		if n >= 1e9 || joinTime(s, n) != ns {
			t.Errorf("%d ns became %d s %d ns", ns, int64(s), n)
		}
	}
	if joinTime(1<<62, 0) < 0 {
		t.Error("a time far away became one before 1970")
	}
}

// uncache makes the kernel forget the content of a file, so that the next read comes from the filesystem.
func uncache(t *testing.T, server *Server, path string) {
	t.Helper()
	must(t, server.InvalidateContent(volume.Ino(stat(t, path).Ino), 0, 0))
}
