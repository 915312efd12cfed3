package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	scratchPrefix   = "defs-bench-"
	memoryDir       = "/dev/shm"
	imageBytesSpare = 7 << 30 // of the image in memory, beside what the sequential file takes everywhere
)

// scratch owns every file, mount and process of a run.
type scratch struct {
	disk   string // directory on the disk
	memory string // directory in memory, or on the disk where there is none
	undo   []func() error
	locks  []*os.File // held while the run lives: what nobody locks is left over
}

// place is a filesystem on which all three are measured.
type place struct {
	name string
	dir  string
}

func newScratch(dir string) (*scratch, error) {
	s := &scratch{}
	for _, parent := range []string{dir, memoryDir} {
		if err := removeLeftovers(parent); err != nil {
			return nil, fmt.Errorf("left over by an earlier run: %w", err)
		}
	}
	var err error
	if s.disk, err = s.directory(dir); err != nil {
		return nil, errors.Join(err, s.close())
	}
	if s.memory, err = s.directory(memoryDir); err != nil {
		s.memory = s.disk
	}
	return s, nil
}

// directory makes a locked directory that close removes.
func (s *scratch) directory(parent string) (string, error) {
	dir, err := os.MkdirTemp(parent, scratchPrefix)
	if err != nil {
		return "", err
	}
	s.undo = append(s.undo, func() error { return os.RemoveAll(dir) })
	lock, err := lockDirectory(dir)
	if err != nil {
		return "", err
	}
	s.locks = append(s.locks, lock)
	return dir, nil
}

func (s *scratch) bin() string { return filepath.Join(s.disk, "bin") }

// close stops, unmounts and removes, the last made first.
func (s *scratch) close() error {
	var errs []error
	for _, undo := range slices.Backward(s.undo) {
		errs = append(errs, undo())
	}
	for _, lock := range s.locks {
		errs = append(errs, lock.Close())
	}
	s.undo, s.locks = nil, nil
	return errors.Join(errs...)
}

func (s *scratch) onDisk() *place { return &place{"disk", s.disk} }

// inMemory makes an ext4 whose image is a file in memory.
func (s *scratch) inMemory(ctx context.Context, p plan) (*place, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("only root can mount it")
	}
	if s.memory == s.disk {
		return nil, errors.New("there is no " + memoryDir)
	}
	image, mountpoint := filepath.Join(s.memory, "image"), filepath.Join(s.disk, "memory")
	f, err := os.Create(image)
	if err != nil {
		return nil, err
	}
	// Native, the local copy and 1.5 times as much on the nodes, of two rounds.
	bytes := int64(p.seqMiB)<<20*8 + imageBytesSpare
	if err := errors.Join(f.Truncate(bytes), f.Close(), os.Mkdir(mountpoint, 0o700)); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", image).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	// mount(8) frees the loop device when the mount goes.
	if out, err := exec.CommandContext(ctx, "mount", "-o", "loop,noatime,discard", image, mountpoint).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mount: %w: %s", err, out)
	}
	s.undo = append(s.undo, func() error { return unmountBelow(mountpoint) })
	return &place{"memory", mountpoint}, nil
}

func lockDirectory(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// removeLeftovers removes the scratch directories that no run holds.
func removeLeftovers(parent string) error {
	dirs, err := filepath.Glob(filepath.Join(parent, scratchPrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		lock, err := lockDirectory(dir)
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue // another run's
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, unmountBelow(dir), os.RemoveAll(dir), lock.Close())
	}
	return errors.Join(errs...)
}

// unmountBelow detaches every mount at or below dir, the innermost first.
func unmountBelow(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	var points []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && (fields[4] == dir || strings.HasPrefix(fields[4], dir+"/")) {
			points = append(points, fields[4])
		}
	}
	var errs []error
	for _, point := range slices.Backward(points) {
		err := unix.Unmount(point, 0)
		if err != nil {
			err = unix.Unmount(point, unix.MNT_DETACH)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// isMountpoint says whether another filesystem than that of its parent is at dir.
func isMountpoint(dir string) bool {
	var here, above unix.Stat_t
	return unix.Stat(dir, &here) == nil && unix.Stat(filepath.Dir(dir), &above) == nil && here.Dev != above.Dev
}
