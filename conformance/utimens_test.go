package conformance

import (
	"math"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func utimensCases() []testCase {
	return []testCase{
		{op: "utimensat", name: "who may set which times", others: true, run: utimensBy},
		{op: "utimensat", name: "the owner, with and without write permission", run: func(t *T) {
			t.file("file", "")
			t.must(unix.Chmod("file", 0o400))
			t.want(0, utimens("file", nil))
			t.want(0, utimens("file", &[2]unix.Timespec{at(1), at(2)}))
		}},
		{op: "utimensat", name: "now, omitted, given", run: utimensForms},
		{op: "utimensat", name: "every kind, nanoseconds", run: utimensKinds},
		{op: "utimensat", name: "times long ago and far away", run: utimensRange},
		{op: "utimensat", name: "wrong arguments", run: func(t *T) {
			t.file("file", "")
			for _, ns := range []int64{-1, 1e9, math.MaxInt64, unix.UTIME_NOW + 2} {
				t.want(unix.EINVAL, utimens("file", &[2]unix.Timespec{{Sec: 1, Nsec: ns}, at(1)}))
				t.want(unix.EINVAL, utimens("file", &[2]unix.Timespec{at(1), {Sec: 1, Nsec: ns}}))
			}
			t.want(unix.EINVAL, unix.UtimesNanoAt(unix.AT_FDCWD, "file", nil, 1<<30))
			t.want(unix.ENOENT, utimens("missing", nil))
		}},
	}
}

var (
	timeNow  = unix.Timespec{Nsec: unix.UTIME_NOW}
	timeOmit = unix.Timespec{Nsec: unix.UTIME_OMIT}
)

func at(seconds int64) unix.Timespec { return unix.Timespec{Sec: seconds, Nsec: 123456789} }

func utimens(name string, times *[2]unix.Timespec) error {
	if times == nil {
		return unix.UtimesNanoAt(unix.AT_FDCWD, name, nil, unix.AT_SYMLINK_NOFOLLOW)
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, name, times[:], unix.AT_SYMLINK_NOFOLLOW)
}

// utimensBy: the owner and root set any time; who may only write sets both to now.
func utimensBy(t *T) {
	t.must(unix.Chmod(".", 0o777))
	for _, k := range kinds {
		if k.mode == unix.S_IFLNK {
			continue
		}
		for _, row := range []struct {
			by                   user
			mode                 mode
			now, given, omitBoth syscall.Errno
		}{
			{root, 0, 0, 0, 0},
			{alice, 0o444, 0, 0, 0},
			{alice, 0, 0, 0, 0},
			{bob, 0o666, 0, unix.EPERM, 0},
			{bob, 0o644, unix.EACCES, unix.EPERM, 0},
			{carol, 0o664, 0, unix.EPERM, 0},
			{carol, 0o646, unix.EACCES, unix.EPERM, 0},
		} {
			t.row("%s of alice with mode %#o, by %s", k.name, uint32(row.mode), row.by.name)
			t.must(k.make("x"))
			t.own("x", alice, row.mode)
			before := t.stamps("x")
			t.must(t.as(row.by, func() error {
				t.want(row.now, utimens("x", nil))
				t.want(row.now, utimens("x", &[2]unix.Timespec{timeNow, timeNow}))
				t.want(row.given, utimens("x", &[2]unix.Timespec{at(1), at(2)}))
				t.want(row.given, utimens("x", &[2]unix.Timespec{timeNow, timeOmit}))
				t.want(row.given, utimens("x", &[2]unix.Timespec{timeOmit, timeNow}))
				t.want(row.given, utimens("x", &[2]unix.Timespec{at(1), timeOmit}))
				t.want(row.given, utimens("x", &[2]unix.Timespec{timeNow, at(2)}))
				t.want(row.omitBoth, utimens("x", &[2]unix.Timespec{timeOmit, timeOmit}))
				return nil
			}))
			if row.now != 0 && row.given != 0 {
				equal(t, "times after failures", t.stamps("x"), before)
			}
			t.must(removeEither("x"))
		}
	}
}

func utimensForms(t *T) {
	t.file("file", "content")
	t.want(0, utimens("file", &[2]unix.Timespec{at(100), at(200)}))
	equal(t, "atime", t.stamps("file").atime, 100_123456789)
	equal(t, "mtime", t.stamps("file").mtime, 200_123456789)
	t.changes("file", "ac", func() error { return utimens("file", &[2]unix.Timespec{at(300), timeOmit}) })
	t.changes("file", "mc", func() error { return utimens("file", &[2]unix.Timespec{timeOmit, at(400)}) })
	t.changes("file", "", func() error { return utimens("file", &[2]unix.Timespec{timeOmit, timeOmit}) })
	t.changes("file", "ac", func() error { return utimens("file", &[2]unix.Timespec{timeNow, timeOmit}) })
	t.changes("file", "mc", func() error { return utimens("file", &[2]unix.Timespec{timeOmit, timeNow}) })
	before := time.Now().Add(-time.Second).UnixNano()
	t.changes("file", "amc", func() error { return utimens("file", nil) })
	s := t.stamps("file")
	t.that(s.atime == s.mtime && s.mtime == s.ctime && s.atime > before, "now is %+v", s)
	fd := t.open("file", unix.O_RDONLY, 0)
	t.want(0, unix.Futimes(fd, []unix.Timeval{{Sec: 5, Usec: 7}, {Sec: 6, Usec: 8}}))
	equal(t, "atime by descriptor", t.stamps("file").atime, 5_000007000)
	equal(t, "mtime by descriptor", t.stamps("file").mtime, 6_000008000)
}

func utimensKinds(t *T) {
	for _, k := range t.kinds() {
		t.row("%s", k.name)
		t.must(k.make("x"))
		t.changes("x", "amc", func() error { return utimens("x", &[2]unix.Timespec{{Sec: 1e9, Nsec: 1}, {Sec: 1e9, Nsec: 999999999}}) })
		equal(t, "atime", t.stamps("x").atime, 1e18+1)
		equal(t, "mtime", t.stamps("x").mtime, 1e18+999999999)
		t.must(removeEither("x"))
	}
	t.row("through a link")
	t.file("file", "")
	t.must(unix.Symlink("file", "link"))
	before := t.stamps("link").mtime
	t.want(0, unix.UtimesNanoAt(unix.AT_FDCWD, "link", []unix.Timespec{at(1), at(2)}, 0))
	equal(t, "mtime of the link", t.stamps("link").mtime, before)
	equal(t, "mtime of the file", t.stamps("file").mtime, 2_123456789)
}

func utimensRange(t *T) {
	t.file("file", "")
	for _, s := range []int64{0, 1, -1, -1e9, math.MinInt32 + 1, math.MaxInt32, math.MaxInt32 + 1, math.MaxUint32, math.MaxUint32 + 1, 7258118400} {
		t.row("%d seconds", s)
		t.want(0, utimens("file", &[2]unix.Timespec{{Sec: s, Nsec: 5}, {Sec: s, Nsec: 999999999}}))
		st := t.lstat("file")
		equal(t, "atime", st.Atim, unix.Timespec{Sec: s, Nsec: 5})
		equal(t, "mtime", st.Mtim, unix.Timespec{Sec: s, Nsec: 999999999})
	}
}
