package conformance

import (
	"encoding/binary"
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func aclCases() []testCase {
	return []testCase{
		{op: "acl", name: "an access list and the mode are one", run: aclAndMode},
		{op: "acl", name: "named users and groups, and the mask", others: true, run: aclDecides},
		{op: "acl", name: "a default list is inherited instead of the umask", run: aclDefault},
		{op: "acl", name: "set-group-ID goes where the owner is not in the group", others: true, run: aclSetGroupID},
		{op: "acl", name: "who may set them", others: true, run: aclBy},
		{op: "acl", name: "wrong lists, and objects that take none", run: aclWrong},
		{op: "acl", name: "times", run: func(t *T) {
			t.file("file", "")
			list := acl{{userObj, 6, none}, {namedUser, 4, 7}, {groupObj, 4, none}, {maskObj, 4, none}, {otherObj, 4, none}}
			t.changes("file", "c", func() error { return setACL("file", accessACL, list) })
			t.changes("file", "c", func() error { return unix.Removexattr("file", accessACL) })
		}},
	}
}

const (
	accessACL  = "system.posix_acl_access"
	defaultACL = "system.posix_acl_default"

	userObj, namedUser, groupObj, namedGroup, maskObj, otherObj = 1, 2, 4, 8, 16, 32

	none = 1<<32 - 1 // the id of entries without one
)

type acl []struct {
	tag, perm uint16
	id        uint32
}

func (a acl) bytes() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range a {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

func setACL(name, which string, a acl) error { return unix.Setxattr(name, which, a.bytes(), 0) }

// aclOf returns a list as text, "u:6 u7:4 g:4 m:4 o:4"; empty where there is none.
func (t *T) aclOf(name, which string) string {
	b, err := getxattr(name, which)
	if err == unix.ENODATA {
		return ""
	}
	t.must(err)
	letters := map[uint16]string{userObj: "u", namedUser: "u", groupObj: "g", namedGroup: "g", maskObj: "m", otherObj: "o"}
	var out []string
	for b = b[4:]; len(b) > 0; b = b[8:] {
		tag, id := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint32(b[4:])
		word := letters[tag]
		if id != none {
			word += fmt.Sprint(id)
		}
		out = append(out, fmt.Sprintf("%s:%d", word, binary.LittleEndian.Uint16(b[2:])))
	}
	return strings.Join(out, " ")
}

func aclAndMode(t *T) {
	t.file("file", "")
	equal(t, "list", t.aclOf("file", accessACL), "")
	t.want(unix.ENODATA, func() error { _, err := getxattr("file", accessACL); return err }())
	t.want(0, setACL("file", accessACL, acl{{userObj, 7, none}, {namedUser, 6, 7}, {groupObj, 4, none}, {namedGroup, 5, 8}, {maskObj, 6, none}, {otherObj, 1, none}}))
	equal(t, "mode", t.permissions("file"), 0o761)
	t.want(0, unix.Chmod("file", 0o640))
	equal(t, "list after chmod", t.aclOf("file", accessACL), "u:6 u7:6 g:4 g8:5 m:4 o:0")
	equal(t, "mode", t.permissions("file"), 0o640)
	t.want(0, unix.Chmod("file", 0o4755))
	equal(t, "list after chmod", t.aclOf("file", accessACL), "u:7 u7:6 g:4 g8:5 m:5 o:5")
	equal(t, "mode", t.permissions("file"), 0o4755)
	t.that(strings.Contains(strings.Join(t.xattrs("file"), " "), accessACL), "the list is not listed")
	t.want(0, setACL("file", accessACL, acl{{userObj, 6, none}, {groupObj, 5, none}, {otherObj, 4, none}}))
	equal(t, "list that says no more than a mode", t.aclOf("file", accessACL), "")
	equal(t, "mode", t.permissions("file"), 0o4654)
	t.want(0, setACL("file", accessACL, acl{{userObj, 6, none}, {groupObj, 5, none}, {maskObj, 7, none}, {otherObj, 4, none}}))
	equal(t, "mode", t.permissions("file"), 0o4674)
	equal(t, "list", t.aclOf("file", accessACL), "u:6 g:5 m:7 o:4")
	t.want(0, unix.Removexattr("file", accessACL))
	equal(t, "mode without the list", t.permissions("file"), 0o4674)
	t.want(unix.ENODATA, func() error { _, err := getxattr("file", accessACL); return err }())
	t.want(0, setACL("file", accessACL, nil))
	if t.base.uid != 0 {
		// The owner is bound by the list.
		t.want(0, setACL("file", accessACL, acl{{userObj, 0, none}, {namedUser, 6, uint32(t.base.uid)}, {groupObj, 6, none}, {maskObj, 6, none}, {otherObj, 6, none}}))
		t.want(unix.EACCES, openClose("file", unix.O_RDONLY, 0))
	}
}

func aclDecides(t *T) {
	t.file("file", "content")
	t.must(unix.Chown("file", 5, 6))
	dave := user{"dave", 31004, 31004, nil}
	list := func(user, group, mask, other uint16) acl {
		return acl{{userObj, 0, none}, {namedUser, user, uint32(bob.uid)}, {groupObj, 0, none}, {namedGroup, group, uint32(alice.gid)}, {maskObj, mask, none}, {otherObj, other, none}}
	}
	for user := range uint16(8) {
		for _, row := range []struct{ group, mask, other uint16 }{{7 - user, 7, 0}, {user, 5, 7}, {0, 2, 7}, {7, 1, 7 - user}} {
			t.row("user %o, group %o, mask %o, others %o", user, row.group, row.mask, row.other)
			t.must(setACL("file", accessACL, list(user, row.group, row.mask, row.other)))
			for _, c := range []struct {
				who  userType
				bits uint16
			}{{bob, user & row.mask}, {alice, row.group & row.mask}, {carol, row.group & row.mask}, {dave, row.other}} {
				t.must(t.as(c.who, func() error { bitsAllow(t, "file", mode(c.bits)); return nil }))
			}
		}
	}
}

type userType = user

func aclDefault(t *T) {
	t.mkdir("dir", 0o755)
	t.want(0, setACL("dir", defaultACL, acl{{userObj, 7, none}, {namedUser, 7, 7}, {groupObj, 5, none}, {maskObj, 7, none}, {otherObj, 1, none}}))
	equal(t, "mode of the directory", t.permissions("dir"), 0o755)
	unix.Umask(0o077)
	t.want(0, openClose("dir/file", unix.O_CREAT|unix.O_WRONLY, 0o666))
	t.want(0, unix.Mkdir("dir/sub", 0o777))
	t.want(0, unix.Mkfifo("dir/fifo", 0o622))
	t.want(0, unix.Symlink("x", "dir/link"))
	t.want(0, openClose("dir/private", unix.O_CREAT|unix.O_WRONLY, 0o600))
	fd := t.open("dir", unix.O_TMPFILE|unix.O_RDWR, 0o666)
	unix.Umask(0)
	equal(t, "mode of a file", t.permissions("dir/file"), 0o660)
	equal(t, "list of a file", t.aclOf("dir/file", accessACL), "u:6 u7:7 g:5 m:6 o:0")
	equal(t, "mode of a directory", t.permissions("dir/sub"), 0o771)
	equal(t, "list of a directory", t.aclOf("dir/sub", accessACL), "u:7 u7:7 g:5 m:7 o:1")
	equal(t, "default list of a directory", t.aclOf("dir/sub", defaultACL), "u:7 u7:7 g:5 m:7 o:1")
	equal(t, "mode of a fifo", t.permissions("dir/fifo"), 0o620)
	equal(t, "mode of a link", t.permissions("dir/link"), 0o777)
	equal(t, "mode of a private file", t.permissions("dir/private"), 0o600)
	equal(t, "list of a private file", t.aclOf("dir/private", accessACL), "u:6 u7:7 g:5 m:0 o:0")
	equal(t, "mode of a file without a name", mode(t.fstat(fd).Mode&0o7777), 0o660)
	t.row("a default list that says no more than a mode")
	t.want(0, setACL("dir", defaultACL, acl{{userObj, 7, none}, {groupObj, 5, none}, {otherObj, 4, none}}))
	unix.Umask(0o777)
	t.want(0, openClose("dir/plain", unix.O_CREAT|unix.O_WRONLY, 0o666))
	t.want(0, unix.Mkdir("dir/plaindir", 0o777))
	unix.Umask(0)
	equal(t, "mode of a file", t.permissions("dir/plain"), 0o644)
	equal(t, "list of a file", t.aclOf("dir/plain", accessACL), "")
	equal(t, "mode of a directory", t.permissions("dir/plaindir"), 0o754)
	equal(t, "default list of a directory", t.aclOf("dir/plaindir", defaultACL), "u:7 g:5 o:4")
	t.row("removed")
	t.want(0, unix.Removexattr("dir", defaultACL))
	unix.Umask(0o022)
	t.want(0, openClose("dir/after", unix.O_CREAT|unix.O_WRONLY, 0o666))
	unix.Umask(0)
	equal(t, "mode of a file", t.permissions("dir/after"), 0o644)
	t.want(0, setACL("dir", defaultACL, nil))
}

func aclSetGroupID(t *T) {
	list := acl{{userObj, 7, none}, {namedUser, 7, 7}, {groupObj, 7, none}, {maskObj, 7, none}, {otherObj, 5, none}}
	for _, row := range []struct {
		by    user
		group int
		want  mode
	}{{root, bob.gid, 0o2775}, {alice, alice.gid, 0o2775}, {alice, team, 0o2775}, {alice, bob.gid, 0o775}} {
		for _, k := range kinds[:2] {
			t.row("%s of group %d, list set by %s", k.name, row.group, row.by.name)
			t.must(k.make("x"))
			t.must(unix.Chown("x", alice.uid, row.group))
			t.must(unix.Chmod("x", 0o2755))
			t.want(0, t.as(row.by, func() error { return setACL("x", accessACL, list) }))
			equal(t, "mode", t.permissions("x"), row.want)
			t.must(removeEither("x"))
		}
	}
}

func aclBy(t *T) {
	t.file("file", "")
	t.mkdir("dir", 0o777)
	t.own("file", alice, 0o666)
	t.own("dir", alice, 0o777)
	list := acl{{userObj, 6, none}, {namedUser, 4, 7}, {groupObj, 4, none}, {maskObj, 4, none}, {otherObj, 6, none}}
	for _, row := range []struct {
		by   user
		want syscall.Errno
	}{{bob, unix.EPERM}, {carol, unix.EPERM}, {alice, 0}, {root, 0}} {
		t.row("%s", row.by.name)
		t.must(t.as(row.by, func() error {
			t.want(row.want, setACL("file", accessACL, list))
			t.want(row.want, setACL("dir", defaultACL, list))
			return nil
		}))
		if row.want == 0 {
			t.must(t.as(bob, func() error {
				t.want(unix.EPERM, unix.Removexattr("file", accessACL))
				t.want(unix.EPERM, unix.Removexattr("dir", defaultACL))
				_, err := getxattr("file", accessACL)
				t.want(0, err)
				return nil
			}))
			t.must(t.as(row.by, func() error {
				t.want(0, unix.Removexattr("file", accessACL))
				t.want(0, unix.Removexattr("dir", defaultACL))
				return nil
			}))
		}
	}
}

func aclWrong(t *T) {
	t.file("file", "")
	t.must(unix.Symlink("file", "link"))
	good := acl{{userObj, 6, none}, {groupObj, 4, none}, {otherObj, 4, none}}
	t.want(unix.EACCES, setACL("file", defaultACL, good))
	_, err := getxattr("file", defaultACL)
	t.want(unix.ENODATA, err)
	t.want(unix.EOPNOTSUPP, unix.Lsetxattr("link", accessACL, good.bytes(), 0))
	for what, list := range map[string]acl{
		"no owner":               {{groupObj, 4, none}, {otherObj, 4, none}},
		"no others":              {{userObj, 6, none}, {groupObj, 4, none}},
		"no mask":                {{userObj, 6, none}, {namedUser, 4, 7}, {groupObj, 4, none}, {otherObj, 4, none}},
		"two owners":             {{userObj, 6, none}, {userObj, 6, none}, {groupObj, 4, none}, {otherObj, 4, none}},
		"not in order":           {{otherObj, 4, none}, {groupObj, 4, none}, {userObj, 6, none}},
		"a permission too large": {{userObj, 8, none}, {groupObj, 4, none}, {otherObj, 4, none}},
		"an unknown tag":         {{userObj, 6, none}, {3, 4, 7}, {groupObj, 4, none}, {otherObj, 4, none}},
	} {
		t.row("%s", what)
		t.want(unix.EINVAL, setACL("file", accessACL, list))
	}
	t.row("bytes")
	t.wantAny(unix.Setxattr("file", accessACL, []byte{1, 0, 0, 0}, 0), unix.EOPNOTSUPP, unix.EINVAL)
	t.want(unix.EINVAL, unix.Setxattr("file", accessACL, append(good.bytes(), 1), 0))
	equal(t, "mode", t.permissions("file"), 0o644)
	equal(t, "list", t.aclOf("file", accessACL), "")
}
