package conformance

import (
	"syscall"

	"golang.org/x/sys/unix"
)

func chownCases() []testCase {
	return []testCase{
		{op: "chown", name: "who may give what to whom", others: true, run: chownBy},
		{op: "chown", name: "set-user-ID, set-group-ID and capabilities go", others: true, run: chownClears},
		{op: "chown", name: "links themselves and what they point to", root: true, run: func(t *T) {
			t.file("file", "")
			t.must(unix.Symlink("file", "link"))
			t.want(0, unix.Lchown("link", 7, 8))
			equal(t, "owner of the link", t.lstat("link").Uid, 7)
			equal(t, "group of the link", t.lstat("link").Gid, 8)
			equal(t, "owner of the file", t.lstat("file").Uid, 0)
			t.want(0, unix.Chown("link", 9, 10))
			equal(t, "owner of the link", t.lstat("link").Uid, 7)
			equal(t, "owner of the file", t.lstat("file").Uid, 9)
			t.want(0, unix.Chown("file", 1<<31+5, 1<<32-2))
			equal(t, "a large owner", t.lstat("file").Uid, 1<<31+5)
			equal(t, "a large group", t.lstat("file").Gid, 1<<32-2)
		}},
		{op: "chown", name: "to oneself", run: func(t *T) {
			for _, k := range t.kinds() {
				t.row("%s", k.name)
				t.must(k.make("x"))
				t.changes("x", "c", func() error { return unix.Lchown("x", t.base.uid, t.base.gid) })
				t.changes("x", "c", func() error { return unix.Lchown("x", t.base.uid, -1) })
				t.changes("x", "c", func() error { return unix.Lchown("x", -1, t.base.gid) })
				t.changes("x", "c", func() error { return unix.Lchown("x", -1, -1) })
				t.must(removeEither("x"))
			}
		}},
	}
}

func chownBy(t *T) {
	t.must(unix.Chmod(".", 0o777))
	for _, k := range kinds {
		t.must(k.make("x"))
		for _, row := range []struct {
			by       user
			uid, gid int
			want     syscall.Errno
		}{
			{root, 5, 6, 0},
			{root, 5, -1, 0},
			{root, -1, 6, 0},
			{alice, alice.uid, alice.gid, 0},
			{alice, -1, alice.gid, 0},
			{alice, alice.uid, -1, 0},
			{alice, -1, team, 0},
			{alice, alice.uid, team, 0},
			{alice, -1, bob.gid, unix.EPERM},
			{alice, -1, 0, unix.EPERM},
			{alice, bob.uid, -1, unix.EPERM},
			{alice, bob.uid, alice.gid, unix.EPERM},
			{alice, 0, -1, unix.EPERM},
			{bob, bob.uid, -1, unix.EPERM},
			{bob, -1, bob.gid, unix.EPERM},
			{bob, alice.uid, -1, unix.EPERM},
			{bob, -1, alice.gid, unix.EPERM},
			{carol, -1, alice.gid, unix.EPERM},
			{bob, bob.uid, bob.gid, unix.EPERM},
		} {
			t.row("%s of alice: %s sets %d:%d", k.name, row.by.name, row.uid, row.gid)
			t.must(unix.Lchown("x", alice.uid, alice.gid))
			before := t.stamps("x")
			if row.want != 0 {
				t.tick()
			}
			t.want(row.want, t.as(row.by, func() error { return unix.Lchown("x", row.uid, row.gid) }))
			st := t.lstat("x")
			uid, gid := uint32(alice.uid), uint32(alice.gid)
			if row.want != 0 {
				equal(t, "times after a failure", stampsOf(st), before)
			} else {
				if row.uid >= 0 {
					uid = uint32(row.uid)
				}
				if row.gid >= 0 {
					gid = uint32(row.gid)
				}
			}
			equal(t, "owner", st.Uid, uid)
			equal(t, "group", st.Gid, gid)
		}
		t.must(removeEither("x"))
	}
}

// chownClears: set-user-ID always goes, set-group-ID where the group may execute; of directories neither.
func chownClears(t *T) {
	t.must(unix.Chmod(".", 0o777))
	for _, by := range []user{root, alice} {
		for _, to := range []struct{ uid, gid int }{{alice.uid, alice.gid}, {alice.uid, -1}, {-1, alice.gid}, {-1, team}, {-1, -1}} {
			for _, row := range []struct{ before, after mode }{
				{0o4755, 0o755}, {0o2755, 0o755}, {0o6755, 0o755}, {0o6555, 0o555}, {0o6710, 0o710}, {0o1755, 0o1755}, {0o4644, 0o644}, {0o2644, 0o2644}, {0o6644, 0o2644}, {0o6701, 0o2701},
			} {
				t.row("%s sets %d:%d of a file of mode %#o", by.name, to.uid, to.gid, uint32(row.before))
				t.file("x", "")
				t.own("x", alice, row.before)
				t.want(0, t.as(by, func() error { return unix.Chown("x", to.uid, to.gid) }))
				equal(t, "mode", t.permissions("x"), row.after)
				t.must(unix.Unlink("x"))
				t.mkdir("x", 0o755)
				t.own("x", alice, row.before)
				t.want(0, t.as(by, func() error { return unix.Chown("x", to.uid, to.gid) }))
				equal(t, "mode of a directory", t.permissions("x"), row.before)
				t.must(unix.Rmdir("x"))
			}
		}
	}
	t.row("a capability")
	t.file("x", "")
	t.must(unix.Setxattr("x", "security.capability", fileCapability, 0))
	t.want(0, unix.Chown("x", alice.uid, -1))
	_, err := unix.Getxattr("x", "security.capability", make([]byte, 100))
	t.want(unix.ENODATA, err)
}

// fileCapability is cap_net_bind_service+ep in the form of the extended attribute.
var fileCapability = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
