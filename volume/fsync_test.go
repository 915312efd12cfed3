package volume

import (
	"context"
	"errors"
	"testing"
	"time"
)

// Fsync returns when a head covers the file where the directory above says so.
func TestFsyncRecoverable(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "2+1,mirror=off")
	defer v.Close(context.Background())
	dir := v.mkdir(t, RootIno, "precious")
	if err := v.SetXattr(t.Context(), dir, xattrFsync, []byte(FsyncRecoverable), 0); err != nil {
		t.Fatal(err)
	}
	ino := v.putIn(t, v.mkdir(t, dir, "below"), "file", []byte("content"))
	if err := v.Fsync(t.Context(), ino); err != nil {
		t.Fatal(err)
	}
	if at, change := v.network.publisher.published(), v.lastChange.Load(); at < change {
		t.Fatalf("fsync returned with a head of %d that does not cover change %d", at, change)
	}
	if state, err := v.FileState(t.Context(), ino); err != nil || state != StateRecoverable && state != StateDurable {
		t.Fatalf("state %s, %v", state, err)
	}
}

// The nearest of the file, the directories above and the volume decides; a restart keeps it.
func TestFsyncModeIsInherited(t *testing.T) {
	pool := newTestPool(t, 4)
	v := newTestVolume(t, pool, "2+1,mirror=off")
	defer func() { v.Close(context.Background()) }()
	outer := v.mkdir(t, RootIno, "outer")
	inner := v.mkdir(t, outer, "inner")
	file := v.putIn(t, inner, "file", []byte("content"))
	set := func(ino Ino, mode string) {
		t.Helper()
		if err := v.SetXattr(t.Context(), ino, xattrFsync, []byte(mode), 0); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want string) {
		t.Helper()
		if mode, err := v.fsyncMode(file); err != nil || mode != want {
			t.Fatalf("mode %q, %v, want %s", mode, err, want)
		}
	}
	want(FsyncJournal)
	set(outer, FsyncRecoverable)
	want(FsyncRecoverable)
	set(inner, FsyncJournal)
	want(FsyncJournal)
	set(file, FsyncRecoverable)
	want(FsyncRecoverable)
	v.reopen(t, pool)
	want(FsyncRecoverable)
	if names, err := v.ListXattr(t.Context(), file); err != nil || len(names) != 0 {
		t.Fatalf("the attribute is listed: %q, %v", names, err)
	}
	if value, err := v.GetXattr(t.Context(), file, xattrFsync); err != nil || string(value) != FsyncRecoverable {
		t.Fatalf("%q, %v", value, err)
	}
	for _, ino := range []Ino{file, inner} {
		if err := v.RemoveXattr(t.Context(), ino, xattrFsync); err != nil {
			t.Fatal(err)
		}
	}
	want(FsyncRecoverable)
	if err := v.RemoveXattr(t.Context(), file, xattrFsync); !errors.Is(err, NoAttr) {
		t.Fatalf("removed twice: %v", err)
	}
	if err := v.SetXattr(t.Context(), file, xattrFsync, []byte("never"), 0); !errors.Is(err, Invalid) {
		t.Fatalf("a mode that there is not: %v", err)
	}
}

// Without peers the wait ends with the caller, or in time, and the bytes are on this disk; when the peers are back the
// same call succeeds.
func TestFsyncWithoutPeers(t *testing.T) {
	pool := newTestPool(t, 4)
	v := newTestVolume(t, pool, "2+1,mirror=off")
	defer v.Close(context.Background())
	v.fsync = FsyncRecoverable
	for _, id := range pool.ids {
		pool.net.Kill(id)
	}
	ino := v.put(t, "file", []byte("content"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := v.Fsync(ctx, ino); !errors.Is(err, Interrupted) {
		t.Fatalf("after the caller had gone: %v", err)
	}
	v.recoverableWait = 100 * time.Millisecond
	if err := v.Fsync(t.Context(), ino); !errors.Is(err, TimedOut) {
		t.Fatalf("without peers: %v", err)
	}
	for _, id := range pool.ids {
		pool.net.Restart(id)
	}
	v.recoverableWait = time.Minute
	if err := v.Fsync(t.Context(), ino); err != nil {
		t.Fatal(err)
	}
}
