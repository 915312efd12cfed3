package shardstore

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// brokenFS makes no files.
type brokenFS struct{ vfs.FS }

func (brokenFS) Create(string, vfs.DiskWriteCategory) (vfs.File, error) { return nil, unix.EIO }

// A store whose index cannot be written is closed all the same, and what was
// answered is there when the disk is well again.
func TestIndexCannotBeWritten(t *testing.T) {
	o := testOptions(t.TempDir())
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	sh := testShard(1, 1000)
	if err := s.PutShard(ctx, sh); err != nil {
		t.Fatal(err)
	}
	s.indexFS.FS = brokenFS{s.indexFS.FS}
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	select {
	case err := <-closed:
		if !errors.Is(err, unix.EIO) {
			t.Errorf("close: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("close hangs")
	}
	checkShard(t, mustOpen(t, o), sh)
}

// On a full disk puts are refused, what is stored is served, and the index is
// not tried again without rest. When there is room again, all goes on.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a disk")
	}
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	o := testOptions(filepath.Join(dir, "store"))
	o.Disk = func(string) (free, total uint64, err error) { return 1 << 40, 1 << 40, nil } // others fill it unseen
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Close() }()
	var stored []Shard
	put := func() error {
		sh := testShard(len(stored), 100_000)
		if err := s.PutShard(ctx, sh); err != nil {
			return err
		}
		stored = append(stored, sh)
		return nil
	}
	fill := func() {
		t.Helper()
		for {
			if err := put(); errors.Is(err, ErrFull) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
			if len(stored) > 1000 {
				t.Fatal("the disk takes everything")
			}
		}
	}
	fill()
	rest, err := os.Create(filepath.Join(dir, "rest")) // not a byte for the index either
	if err != nil {
		t.Fatal(err)
	}
	for n := 64 << 10; n > 0; {
		if _, err := rest.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	rest.Close()
	if err := s.flushIndex(); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("flush of the index: %v", err)
	}
	failures := 0
	for until := time.After(5 * indexRetry / 2); until != nil; {
		select {
		case <-s.indexFS.failed:
			failures++
		case <-until:
			until = nil
		}
	}
	if failures == 0 || failures > 4 {
		t.Errorf("the index was tried %d times in %v", failures, 5*indexRetry/2)
	}
	for _, sh := range stored {
		checkShard(t, s, sh)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := s.index.Flush(); err != nil {
		t.Fatal(err)
	}
	before := len(stored)
	fill()
	if len(stored) == before {
		t.Error("no room although a file was removed")
	}
	if err := errors.Join(os.Remove(rest.Name()), s.Close()); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(o); err != nil {
		t.Fatal(err)
	}
	for _, sh := range stored {
		checkShard(t, s, sh)
	}
}
