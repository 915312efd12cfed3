package fusefs

import (
	"bytes"
	"encoding/binary"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func getXattr(t *testing.T, path, name string) string {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, name, buf)
	must(t, err)
	return string(buf[:n])
}

func TestXattr(t *testing.T) {
	mnt := mount(t)
	f := mnt + "/f"
	write(t, f, "")
	must(t, unix.Setxattr(f, "user.a", []byte("one"), unix.XATTR_CREATE))
	wantErr(t, unix.Setxattr(f, "user.a", nil, unix.XATTR_CREATE), unix.EEXIST)
	wantErr(t, unix.Setxattr(f, "user.b", nil, unix.XATTR_REPLACE), unix.ENODATA)
	must(t, unix.Setxattr(f, "user.a", []byte("two"), unix.XATTR_REPLACE))
	must(t, unix.Setxattr(f, "user.empty", nil, 0))
	large := bytes.Repeat([]byte("x"), 64<<10)
	must(t, unix.Setxattr(f, "trusted.large", large, 0))
	wantErr(t, unix.Setxattr(f, "user.larger", make([]byte, 64<<10+1), 0), unix.E2BIG)
	must(t, unix.Setxattr(f, "security.x", []byte("s"), 0))
	if got := getXattr(t, f, "user.a"); got != "two" {
		t.Fatalf("got %q", got)
	}
	if got := getXattr(t, f, "user.empty"); got != "" {
		t.Fatalf("got %q", got)
	}
	if got := getXattr(t, f, "trusted.large"); got != string(large) {
		t.Fatalf("a value of %d bytes", len(got))
	}
	_, err := unix.Getxattr(f, "trusted.large", make([]byte, 10))
	wantErr(t, err, unix.ERANGE)
	if n, err := unix.Getxattr(f, "trusted.large", nil); err != nil || n != len(large) {
		t.Fatalf("size %d, %v", n, err)
	}
	buf := make([]byte, 1000)
	n, err := unix.Listxattr(f, buf)
	must(t, err)
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	if want := []string{"security.x", "trusted.large", "user.a", "user.empty"}; !slices.Equal(names, want) {
		t.Fatalf("listed: %q", names)
	}
	must(t, unix.Removexattr(f, "user.a"))
	wantErr(t, unix.Removexattr(f, "user.a"), unix.ENODATA)
	_, err = unix.Getxattr(f, "user.a", buf)
	wantErr(t, err, unix.ENODATA)
}

// Writing clears a file's capabilities, as on every filesystem.
func TestWriteClearsCapability(t *testing.T) {
	mnt := mount(t)
	f := mnt + "/f"
	write(t, f, "program")
	capability := append([]byte{0, 0, 0, 2}, make([]byte, 16)...) // VFS_CAP_REVISION_2
	must(t, unix.Setxattr(f, "security.capability", capability, 0))
	write(t, f, "other program")
	_, err := unix.Getxattr(f, "security.capability", capability)
	wantErr(t, err, unix.ENODATA)
}

// posixACL encodes tag, permission and id triples as acl(5) sets them.
func posixACL(entries ...[3]uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

const (
	userObj, user, groupObj, mask, other = 0x01, 0x02, 0x04, 0x10, 0x20
	noID                                 = 1<<32 - 1
	someone                              = 65534 // nobody: fusermount3 wants a user who has a name
)

func TestACL(t *testing.T) {
	for mode, change := range map[string]func(*Options){"root only": func(*Options) {}, "for others": forOthers} {
		t.Run(mode, func(t *testing.T) {
			mnt := mount(t, change)
			must(t, os.Mkdir(mnt+"/d", 0o755))
			inherit := posixACL([3]uint32{userObj, 7, noID}, [3]uint32{user, 6, someone}, [3]uint32{groupObj, 5, noID},
				[3]uint32{mask, 7, noID}, [3]uint32{other, 0, noID})
			must(t, unix.Setxattr(mnt+"/d", "system.posix_acl_default", inherit, 0))

			// The default ACL replaces the umask, and limits what the mode asks for.
			fd, err := unix.Open(mnt+"/d/f", unix.O_CREAT|unix.O_WRONLY, 0o666)
			must(t, err)
			must(t, unix.Close(fd))
			if got := stat(t, mnt+"/d/f").Mode; got != unix.S_IFREG|0o660 {
				t.Fatalf("mode of the new file %o", got)
			}
			want := posixACL([3]uint32{userObj, 6, noID}, [3]uint32{user, 6, someone}, [3]uint32{groupObj, 5, noID},
				[3]uint32{mask, 6, noID}, [3]uint32{other, 0, noID})
			if got := getXattr(t, mnt+"/d/f", "system.posix_acl_access"); got != string(want) {
				t.Fatalf("ACL of the new file %x", got)
			}
			must(t, os.Mkdir(mnt+"/d/sub", 0o700))
			if got := getXattr(t, mnt+"/d/sub", "system.posix_acl_default"); got != string(inherit) {
				t.Fatalf("default ACL of the new directory %x", got)
			}

			// chmod changes the mask; setting an ACL changes the mode.
			must(t, os.Chmod(mnt+"/d/f", 0o600))
			want = posixACL([3]uint32{userObj, 6, noID}, [3]uint32{user, 6, someone}, [3]uint32{groupObj, 5, noID},
				[3]uint32{mask, 0, noID}, [3]uint32{other, 0, noID})
			if got := getXattr(t, mnt+"/d/f", "system.posix_acl_access"); got != string(want) {
				t.Fatalf("ACL after chmod %x", got)
			}
			minimal := posixACL([3]uint32{userObj, 6, noID}, [3]uint32{groupObj, 4, noID}, [3]uint32{other, 4, noID})
			must(t, unix.Setxattr(mnt+"/d/f", "system.posix_acl_access", minimal, 0))
			if got := stat(t, mnt+"/d/f").Mode; got != unix.S_IFREG|0o644 {
				t.Fatalf("mode %o", got)
			}
		})
	}
}

func TestPermissionsForOthers(t *testing.T) {
	mnt := mount(t, forOthers)
	must(t, os.Chmod(mnt, 0o755))
	write(t, mnt+"/secret", "root's own")
	must(t, os.Chmod(mnt+"/secret", 0o600))
	write(t, mnt+"/shared", "x")
	must(t, os.Chmod(mnt+"/shared", 0o600))
	must(t, unix.Setxattr(mnt+"/shared", "system.posix_acl_access", posixACL([3]uint32{userObj, 6, noID},
		[3]uint32{user, 4, someone}, [3]uint32{groupObj, 0, noID}, [3]uint32{mask, 4, noID}, [3]uint32{other, 0, noID}), 0))
	must(t, os.Mkdir(mnt+"/drop", 0o777))
	must(t, unix.Chmod(mnt+"/drop", 0o1777))
	write(t, mnt+"/drop/root", "")
	asSomeone(t, func() {
		wantErr(t, unix.Access(mnt+"/secret", unix.R_OK), unix.EACCES)
		_, err := os.Open(mnt + "/secret")
		wantErr(t, err, unix.EACCES)
		_, err = os.ReadFile(mnt + "/shared")
		must(t, err)
		_, err = os.OpenFile(mnt+"/shared", os.O_WRONLY, 0)
		wantErr(t, err, unix.EACCES)
		wantErr(t, os.Mkdir(mnt+"/d", 0o755), unix.EACCES)
		wantErr(t, os.Remove(mnt+"/drop/root"), unix.EPERM)
		write(t, mnt+"/drop/mine", "")
	})
	if st := stat(t, mnt+"/drop/mine"); st.Uid != someone || st.Gid != someone {
		t.Fatalf("owner %d:%d", st.Uid, st.Gid)
	}
}

func TestExecutePermissionForRoot(t *testing.T) {
	mnt := mount(t)
	write(t, mnt+"/f", "")
	wantErr(t, unix.Access(mnt+"/f", unix.X_OK), unix.EACCES)
	must(t, unix.Access(mnt+"/f", unix.R_OK|unix.W_OK))
	must(t, os.Chmod(mnt+"/f", 0o711))
	must(t, unix.Access(mnt+"/f", unix.X_OK))
}

func TestSetGroupID(t *testing.T) {
	mnt := mount(t, forOthers)
	must(t, os.Mkdir(mnt+"/d", 0o777))
	must(t, os.Chown(mnt+"/d", 0, 777))
	must(t, unix.Chmod(mnt+"/d", 0o2777))
	asSomeone(t, func() {
		write(t, mnt+"/d/f", "")
		must(t, os.Mkdir(mnt+"/d/sub", 0o755))
	})
	if st := stat(t, mnt+"/d/f"); st.Gid != 777 || st.Mode != unix.S_IFREG|0o644 {
		t.Fatalf("file: group %d, mode %o", st.Gid, st.Mode)
	}
	if st := stat(t, mnt+"/d/sub"); st.Gid != 777 || st.Mode != unix.S_IFDIR|0o2755 {
		t.Fatalf("directory: group %d, mode %o", st.Gid, st.Mode)
	}
}

func TestPrivilegesCleared(t *testing.T) {
	mnt := mount(t, forOthers)
	must(t, os.Chmod(mnt, 0o755))
	f := mnt + "/f"
	for name, change := range map[string]func() error{
		"write": func() error {
			fd, err := unix.Open(f, unix.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			_, err = unix.Write(fd, []byte("x"))
			return err
		},
		"truncate":   func() error { return unix.Truncate(f, 100) },
		"open trunc": func() error { return os.WriteFile(f, nil, 0) },
		"fallocate": func() error {
			fd, err := unix.Open(f, unix.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Fallocate(fd, 0, 0, 1000)
		},
	} {
		write(t, f, "program")
		must(t, os.Chown(f, someone, someone))
		must(t, unix.Chmod(f, 0o6777))
		asSomeone(t, func() { must(t, change()) })
		if mode := stat(t, f).Mode; mode != unix.S_IFREG|0o777 {
			t.Errorf("%s left mode %o", name, mode)
		}
	}
	must(t, unix.Chmod(f, 0o6777))
	write(t, f, "by root")
	if mode := stat(t, f).Mode; mode != unix.S_IFREG|0o6777 {
		t.Errorf("root's write left mode %o", mode)
	}
	must(t, os.Chown(f, 0, 0))
	if mode := stat(t, f).Mode; mode != unix.S_IFREG|0o777 {
		t.Errorf("chown left mode %o", mode)
	}
}

// asSomeone runs f as an ordinary user, in a thread of its own that ends afterwards. The functions of package
// syscall would change the ids of all threads.
func asSomeone(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		for _, call := range [][4]uintptr{
			{syscall.SYS_SETGROUPS, 0, 0, 0},
			{syscall.SYS_SETRESGID, someone, someone, someone},
			{syscall.SYS_SETRESUID, someone, someone, someone},
		} {
			if _, _, errno := syscall.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
				t.Error(errno)
				return
			}
		}
		f()
	}()
	<-done
	if t.Failed() {
		t.FailNow()
	}
}
