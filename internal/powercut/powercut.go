// Package powercut makes disks for tests whose power can be cut: a file with a
// filesystem in it, mounted through a loop device.
//
//	disk := powercut.New(t, "ext4")
//	// … programs work below disk.Dir …
//	disk.Cut()     // what was not flushed is lost; every call on the disk fails from here on
//	// … end these programs …
//	disk.Restore() // mounted again, with what a power cut at that moment leaves
//
// The cut is the shutdown request of ext4 and xfs without a flush of their log:
// pages that had not been written back and names that had not been committed
// are gone. It takes a moment, unlike a real one: a flush that is under way then
// may succeed although its bytes are gone, so only what returned before Cut was
// called counts as flushed. Needs root, loop devices, mkfs.ext4 and mkfs.xfs.
package powercut

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Filesystems are those whose power can be cut.
var Filesystems = []string{"ext4", "xfs"}

// imageBytes is the size of a disk; mkfs.xfs makes none below 300 MiB. The file
// is sparse.
const imageBytes = 1 << 30

// Disk is a mounted disk. Its methods are for one goroutine.
type Disk struct {
	Dir string // where it is mounted

	t       testing.TB
	image   string
	mounted bool
}

// New makes an empty disk and mounts it below a directory of the test. It is
// unmounted when the test ends; programs that use it must have ended before.
func New(t testing.TB, filesystem string) *Disk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a disk")
	}
	dir := t.TempDir()
	d := &Disk{Dir: filepath.Join(dir, "disk"), t: t, image: filepath.Join(dir, "image")}
	if err := d.make(filesystem); err != nil {
		t.Fatalf("make a disk of %s: %v", filesystem, err)
	}
	t.Cleanup(func() {
		if err := d.unmount(); err != nil {
			t.Errorf("clean up: %v", err)
			_ = unix.Unmount(d.Dir, unix.MNT_DETACH) // so that the directory can be removed
		}
	})
	d.mount()
	return d
}

func (d *Disk) make(filesystem string) error {
	if err := os.Mkdir(d.Dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(d.image, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(d.image, imageBytes); err != nil {
		return err
	}
	return tool("mkfs."+filesystem, "-q", d.image)
}

// mount leaves the loop device to mount(8), which frees it with the mount.
func (d *Disk) mount() {
	d.t.Helper()
	if err := tool("mount", "-o", "loop", d.image, d.Dir); err != nil {
		d.t.Fatal(err)
	}
	d.mounted = true
}

// shutdownRequest is FS_IOC_SHUTDOWN, _IOR('X', 125, u32); shutdownNoFlush
// makes it flush nothing, not even the filesystem's log (xfs_io's "shutdown").
const (
	shutdownRequest = 0x8004587d
	shutdownNoFlush = 2
)

// Cut cuts the power. Programs may be at work on the disk.
func (d *Disk) Cut() {
	d.t.Helper()
	dir, err := os.Open(d.Dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), shutdownRequest, shutdownNoFlush); err != nil {
		d.t.Fatalf("cut the power of %s: %v", d.Dir, err)
	}
}

// Restore mounts the disk again. Nobody may have files open on it.
func (d *Disk) Restore() {
	d.t.Helper()
	if err := d.unmount(); err != nil {
		d.t.Fatal(err)
	}
	d.mount()
}

// unmount waits for what programs that were killed still hold.
func (d *Disk) unmount() error {
	if !d.mounted {
		return nil
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Unmount(d.Dir, 0)
		if err == nil {
			d.mounted = false
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("unmount %s: %w", d.Dir, err)
		}
	}
}

func tool(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", args[0], err, out)
	}
	return nil
}
