package conformance

import (
	"syscall"

	"golang.org/x/sys/unix"
)

func chmodCases() []testCase {
	return []testCase{
		{op: "chmod", name: "every bit of every kind, and ctime", run: everyBit},
		{op: "chmod", name: "who may", others: true, run: chmodBy},
		{op: "chmod", name: "set-group-ID is for members of the group", others: true, run: chmodSetGroupID},
		{op: "chmod", name: "all modes", long: true, run: func(t *T) {
			t.file("file", "")
			for m := range mode(0o10000) {
				t.want(0, unix.Chmod("file", uint32(m)))
				equal(t, "mode", t.permissions("file"), m)
			}
		}},
		{op: "chmod", name: "of what is open, read only", run: func(t *T) {
			t.file("file", "")
			fd := t.open("file", unix.O_RDONLY, 0)
			t.want(0, unix.Fchmod(fd, 0o200))
			equal(t, "mode", mode(t.fstat(fd).Mode&0o7777), 0o200)
			_, err := unix.Read(fd, make([]byte, 1))
			t.want(0, err)
		}},
	}
}

func everyBit(t *T) {
	for _, k := range t.kinds() {
		if k.mode == unix.S_IFLNK {
			continue
		}
		t.must(k.make("x"))
		for bit := mode(1); bit < 0o10000; bit <<= 1 {
			t.row("%s, mode %#o", k.name, uint32(bit))
			before := t.stamps("x")
			t.want(0, unix.Chmod("x", uint32(bit|k.mode2())))
			st := t.lstat("x")
			equal(t, "mode", mode(st.Mode), mode(k.mode)|bit)
			t.that(stampsOf(st).ctime >= before.ctime && stampsOf(st).mtime == before.mtime, "times")
		}
		t.changes("x", "c", func() error { return unix.Chmod("x", 0o644) })
		t.changes("x", "c", func() error { return unix.Chmod("x", 0o644) })
		t.must(removeEither("x"))
	}
}

// mode2 is the type, which chmod must not look at.
func (k kind) mode2() mode { return mode(k.mode) }

func chmodBy(t *T) {
	t.must(unix.Chmod(".", 0o777))
	for _, k := range kinds {
		if k.mode == unix.S_IFLNK {
			continue
		}
		t.must(k.make("x"))
		t.own("x", alice, 0o777)
		for _, c := range []struct {
			who  user
			want syscall.Errno
		}{{root, 0}, {alice, 0}, {bob, unix.EPERM}, {carol, unix.EPERM}} {
			t.row("%s of alice, by %s", k.name, c.who.name)
			before := t.stamps("x")
			t.tick()
			t.want(c.want, t.as(c.who, func() error { return unix.Chmod("x", 0o700) }))
			if c.want != 0 {
				equal(t, "times after a failure", t.stamps("x"), before)
			}
			t.must(unix.Chmod("x", 0o777))
			for _, m := range []mode{0o1777, 0o4777} {
				t.want(c.want, t.as(c.who, func() error { return unix.Chmod("x", uint32(m)) }))
				if c.want == 0 {
					equal(t, "mode", t.permissions("x"), m)
				}
			}
			t.must(unix.Chmod("x", 0o777))
		}
		t.must(removeEither("x"))
	}
}

func chmodSetGroupID(t *T) {
	t.must(unix.Chmod(".", 0o777))
	for _, k := range kinds {
		if k.mode == unix.S_IFLNK {
			continue
		}
		for _, row := range []struct {
			by, owner user
			group     int
			kept      bool
		}{
			{root, alice, bob.gid, true},
			{alice, alice, alice.gid, true},
			{alice, alice, team, true},
			{alice, alice, bob.gid, false},
			{bob, bob, team, false},
		} {
			t.row("%s of %s, group %d, by %s", k.name, row.owner.name, row.group, row.by.name)
			t.must(k.make("x"))
			t.must(unix.Chown("x", row.owner.uid, row.group))
			want := mode(0o755)
			if row.kept {
				want = 0o2755
			}
			t.want(0, t.as(row.by, func() error { return unix.Chmod("x", 0o2755) }))
			equal(t, "mode", t.permissions("x"), want)
			t.must(removeEither("x"))
		}
	}
}
