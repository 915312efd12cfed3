package fusefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// busyWait is how long Unmount waits for a mount that is in use. The kernel itself lets go of a file when close
	// returns; but a child between fork and exec has copies of its parent's descriptors, and whoever looks at the
	// mountpoint, such as df, uses it for a moment.
	busyWait = 2 * time.Second
	busyPoll = 10 * time.Millisecond
	// copiesWait is how long a filesystem that has been unmounted is still served where it is mounted elsewhere: in
	// another mount namespace, or by a bind mount.
	copiesWait = 2 * time.Second
	// abortWait is how long requests may take to end after the connection has been cut. Reads that wait for peers take
	// up to 25 s.
	abortWait = 30 * time.Second
)

// Unmount detaches the filesystem and returns when the last request has been answered, in bounded time. It fails, and
// the mount goes on, while programs have files or working directories in it. Where the filesystem is also mounted
// elsewhere, in another mount namespace or by a bind mount, it is cut off there after 2 s: programs get ENOTCONN. Wait
// tells where that cannot be done. Unmounting twice is no error.
func (s *Server) Unmount() error {
	s.unmountMu.Lock()
	defer s.unmountMu.Unlock()
	for deadline := time.Now().Add(busyWait); ; time.Sleep(busyPoll) {
		if !s.isMounted() {
			break
		}
		err := unmount(s.mountpoint)
		if err == nil {
			break
		}
		if time.Now().After(deadline) && s.isMounted() {
			if errors.Is(err, unix.EBUSY) || strings.Contains(err.Error(), "busy") { // the latter from fusermount3
				err = fmt.Errorf("%w: close the files and leave the directories that programs use there, then try again", err)
			}
			return fmt.Errorf("unmount %s: %w", s.mountpoint, err)
		}
	}
	s.drain(copiesWait)
	return nil
}

// Detach is Unmount for a mount that programs keep busy: they are cut off, and get ENOTCONN.
func (s *Server) Detach() error {
	s.unmountMu.Lock()
	defer s.unmountMu.Unlock()
	if s.isMounted() {
		if err := detach(s.mountpoint); err != nil && s.isMounted() {
			return fmt.Errorf("detach %s: %w", s.mountpoint, err)
		}
	}
	s.drain(0)
	return nil
}

// Wait returns when the filesystem has been unmounted, by Unmount or from outside, and serves nobody any more. The
// error says that it may still serve programs: that lasts until the process ends.
func (s *Server) Wait() error {
	<-s.done
	return s.err
}

// Done is closed when Wait would return.
func (s *Server) Done() <-chan struct{} { return s.done }

// isMounted says whether the filesystem is at its mountpoint. From outside it may have been unmounted, and another one
// mounted there.
func (s *Server) isMounted() bool {
	select {
	case <-s.done:
		return false
	default:
	}
	path, err := resolveMountpoint(s.mountpoint)
	if err != nil {
		return true // unmount will tell
	}
	mounts, err := mountsAt(path)
	return err != nil || slices.ContainsFunc(mounts, func(m mounted) bool { return m.device == s.device || s.device == "" })
}

// drain returns when the last request has been answered. After grace it cuts off whoever still has the filesystem.
func (s *Server) drain(grace time.Duration) {
	select {
	case <-s.done:
		return
	case <-time.After(grace):
	}
	s.logger.Warn("unmounted, but still in use in another mount namespace or below a bind mount: cut off there")
	if err := abort(s.device); err != nil {
		s.end(fmt.Errorf("%s is still mounted in another mount namespace, and is cut off there when this process ends: %w", s.mountpoint, err))
		return
	}
	select {
	case <-s.done:
	case <-time.After(abortWait):
		s.end(fmt.Errorf("requests to %s have not ended within %v after it was unmounted", s.mountpoint, abortWait))
	}
}

// abort cuts the kernel's connection to the filesystem on a device, through fusectl (the kernel's
// filesystems/fuse.rst). Where that is not mounted, root reaches it through a mount that has no place in the tree.
func abort(device string) error {
	_, minor, found := strings.Cut(device, ":")
	if !found {
		return errors.New("its device is not known")
	}
	err := os.WriteFile(filepath.Join("/sys/fs/fuse/connections", minor, "abort"), []byte("1"), 0)
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	fs, openErr := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if openErr != nil {
		return errors.Join(err, fmt.Errorf("open fusectl: %w", openErr))
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("create fusectl: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("mount fusectl: %w", err)
	}
	defer unix.Close(mount)
	file, err := unix.Openat(mount, minor+"/abort", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open connection %s of fusectl: %w", minor, err)
	}
	defer unix.Close(file)
	_, err = unix.Write(file, []byte("1"))
	return err
}

// unmount unmounts what nobody uses.
func unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if !errors.Is(err, syscall.EPERM) {
		return err
	}
	return fusermount("-u", path)
}

// detach unmounts even where programs still have files open.
func detach(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if !errors.Is(err, syscall.EPERM) {
		return err
	}
	return fusermount("-u", "-z", path)
}

// fusermount has an ordinary user's mounts changed.
func fusermount(args ...string) error {
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("fusermount3: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
