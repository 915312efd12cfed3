package cache

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// OSFS is the FS of the operating system (Linux).
type OSFS struct{}

func (OSFS) MkdirAll(dir string) error            { return os.MkdirAll(dir, 0o700) }
func (OSFS) Remove(name string) error             { return os.Remove(name) }
func (OSFS) Rename(oldName, newName string) error { return os.Rename(oldName, newName) }

func (OSFS) OpenFile(name string, flag int) (File, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (OSFS) ReadDir(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (OSFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (OSFS) Free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// osFile adds the Linux calls that os.File lacks.
type osFile struct{ *os.File }

func (f osFile) Writev(bufs [][]byte, off int64) error {
	for {
		n, err := unix.Pwritev(int(f.Fd()), bufs, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("pwritev %s: %w", f.Name(), err)
		}
		if n == 0 {
			return fmt.Errorf("pwritev %s: %w", f.Name(), io.ErrShortWrite)
		}
		off += int64(n)
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if len(bufs) == 0 {
			return nil
		}
		// A disk that fills up cuts a write short; what is left says why.
		bufs = append([][]byte{bufs[0][n:]}, bufs[1:]...)
	}
}

func (f osFile) Sync() error {
	return f.retry("fdatasync", func() error { return unix.Fdatasync(int(f.Fd())) })
}

func (f osFile) Allocate(size int64) error {
	err := f.retry("fallocate", func() error { return unix.Fallocate(int(f.Fd()), 0, 0, size) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		return f.Truncate(size) // a full disk then shows at the write
	}
	return err
}

func (f osFile) retry(op string, call func() error) error {
	for {
		err := call()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", op, f.Name(), err)
		}
		return nil
	}
}

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
