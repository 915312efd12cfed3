package volume

import (
	"bytes"
	"context"
	"encoding/hex"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestXattrs(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	if names, err := f.ListXattr(f.ctx, ino); err != nil || len(names) != 0 {
		t.Errorf("%q, %v", names, err)
	}
	_, err := f.GetXattr(f.ctx, ino, "user.a")
	f.want(err, NoAttr)
	f.want(f.SetXattr(f.ctx, ino, "user.a", nil, XattrReplace), NoAttr)
	f.ok(f.SetXattr(f.ctx, ino, "user.a", []byte("1"), XattrCreate))
	f.want(f.SetXattr(f.ctx, ino, "user.a", []byte("2"), XattrCreate), Exist)
	f.ok(f.SetXattr(f.ctx, ino, "user.a", []byte("2"), XattrReplace))
	f.ok(f.SetXattr(f.ctx, ino, "user.empty", nil, 0))
	big := bytes.Repeat([]byte{7}, xattrValueMaxBytes)
	f.ok(f.SetXattr(f.ctx, ino, "user.big", big, 0))
	longName := "user." + strings.Repeat("n", 250)
	f.ok(f.SetXattr(f.ctx, ino, longName, []byte("long"), 0))
	f.ok(f.SetXattr(f.ctx, ino, "trusted.\xff", []byte("t"), 0))
	for name, want := range map[string][]byte{"user.a": []byte("2"), "user.empty": {}, "user.big": big, longName: []byte("long")} {
		if got, err := f.GetXattr(f.ctx, ino, name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%.20s: %d bytes, %v", name, len(got), err)
		}
	}
	names, err := f.ListXattr(f.ctx, ino)
	f.ok(err)
	if want := []string{"trusted.\xff", "user.a", "user.big", "user.empty", longName}; !slices.Equal(names, want) {
		t.Errorf("%q", names)
	}
	for _, c := range []struct {
		name  string
		bytes int
		flags uint32
		kind  Kind
	}{
		{"user.huge", xattrValueMaxBytes + 1, 0, TooBig},
		{"", 0, 0, Range},
		{"user." + strings.Repeat("n", 251), 0, 0, Range},
		{"user.x\x00", 0, 0, Range},
		{"user.x", 0, XattrCreate | XattrReplace, Invalid},
		{"user.x", 0, 4, Invalid},
	} {
		f.want(f.SetXattr(f.ctx, ino, c.name, make([]byte, c.bytes), c.flags), c.kind)
	}
	f.ok(f.RemoveXattr(f.ctx, ino, "user.a"))
	f.want(f.RemoveXattr(f.ctx, ino, "user.a"), NoAttr)
	f.want(f.SetXattr(f.ctx, 999, "user.a", nil, 0), Stale)
	_, err = f.ListXattr(f.ctx, 999)
	f.want(err, Stale)
}

func TestOwnXattrsAreNeverListed(t *testing.T) {
	f := newFS(t)
	set := []byte("unset")
	f.virtual = map[string]virtualAttribute{
		"user.defs.test": {
			get: func(_ context.Context, ino Ino) ([]byte, error) { return set, nil },
			set: func(_ context.Context, ino Ino, value []byte) error { set = value; return nil },
		},
		"user.defs.fixed": {get: func(_ context.Context, ino Ino) ([]byte, error) { return []byte("x"), nil }},
	}
	f.ok(f.SetXattr(f.ctx, RootIno, "user.defs.test", []byte("v"), 0))
	if got, err := f.GetXattr(f.ctx, RootIno, "user.defs.test"); err != nil || string(got) != "v" {
		t.Errorf("%q, %v", got, err)
	}
	f.ok(f.RemoveXattr(f.ctx, RootIno, "user.defs.test"))
	if set != nil {
		t.Error("not removed")
	}
	f.want(f.SetXattr(f.ctx, RootIno, "user.defs.fixed", nil, 0), Permission)
	f.want(f.SetXattr(f.ctx, RootIno, "user.defs.unknown", nil, 0), Permission)
	_, err := f.GetXattr(f.ctx, RootIno, "user.defs.unknown")
	f.want(err, NoAttr)
	if names, err := f.ListXattr(f.ctx, RootIno); err != nil || len(names) != 0 {
		t.Errorf("%q, %v", names, err)
	}
}

// aclHex holds values as setfacl(1) writes them.
var aclHex = map[string]string{
	// user::rwx user:1000:rw- group::r-x mask::rwx other::r--
	"named user": "02000000" + "01000700ffffffff" + "02000600e8030000" + "04000500ffffffff" + "10000700ffffffff" + "20000400ffffffff",
	// user::rw- group::r-- other::---
	"minimal": "02000000" + "01000600ffffffff" + "04000400ffffffff" + "20000000ffffffff",
	"empty":   "02000000",
	// no mask beside a named user
	"no mask": "02000000" + "01000700ffffffff" + "02000600e8030000" + "04000500ffffffff" + "20000400ffffffff",
	"version": "01000000",
	"odd":     "0200000001000700",
	"tag":     "02000000" + "03000700ffffffff",
	"perm":    "02000000" + "01000800ffffffff" + "04000400ffffffff" + "20000000ffffffff",
}

func aclValue(t testing.TB, name string) []byte {
	t.Helper()
	b, err := hex.DecodeString(aclHex[name])
	if err != nil || len(b) == 0 {
		t.Fatal(name, err)
	}
	return b
}

func TestACLAndModeAgree(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	mode := func(want uint32) {
		t.Helper()
		if got := f.attr(ino).Mode & 0o7777; got != want {
			t.Errorf("mode %o, want %o", got, want)
		}
	}
	f.set(ino, SetAttr{Valid: SetMode, Mode: 0o2600})
	f.ok(f.SetXattr(f.ctx, ino, xattrAccessACL, aclValue(t, "named user"), 0))
	mode(0o2774)
	f.set(ino, SetAttr{Valid: SetMode, Mode: 0o640})
	got, err := f.GetXattr(f.ctx, ino, xattrAccessACL)
	f.ok(err)
	// chmod sets owner, mask and others; the group's own entry stays.
	want := "02000000" + "01000600ffffffff" + "02000600e8030000" + "04000500ffffffff" + "10000400ffffffff" + "20000000ffffffff"
	if hex.EncodeToString(got) != want {
		t.Errorf("after chmod %x", got)
	}
	f.ok(f.SetXattr(f.ctx, ino, xattrAccessACL, aclValue(t, "minimal"), 0))
	mode(0o640)
	_, err = f.GetXattr(f.ctx, ino, xattrAccessACL)
	f.want(err, NoAttr)
	f.ok(f.SetXattr(f.ctx, ino, xattrAccessACL, aclValue(t, "empty"), 0))
	for _, bad := range []string{"no mask", "version", "odd", "tag", "perm"} {
		f.want(f.SetXattr(f.ctx, ino, xattrAccessACL, aclValue(t, bad), 0), Invalid)
	}
	f.want(f.SetXattr(f.ctx, ino, xattrDefaultACL, aclValue(t, "minimal"), 0), Permission)
	mode(0o640)
}

func TestACLInheritance(t *testing.T) {
	f := newFS(t)
	dir := f.mkdir(RootIno, "d")
	f.ok(f.SetXattr(f.ctx, dir, xattrDefaultACL, aclValue(t, "named user"), 0))
	file, err := f.Create(f.ctx, dir, "file", Create{Mode: syscall.S_IFREG | 0o666, Umask: 0o077})
	f.ok(err)
	if file.Mode&0o777 != 0o664 {
		t.Errorf("file mode %o: the umask does not apply, the list does", file.Mode&0o777)
	}
	got, err := f.GetXattr(f.ctx, file.Ino, xattrAccessACL)
	f.ok(err)
	want := "02000000" + "01000600ffffffff" + "02000600e8030000" + "04000500ffffffff" + "10000600ffffffff" + "20000400ffffffff"
	if hex.EncodeToString(got) != want {
		t.Errorf("file list %x", got)
	}
	_, err = f.GetXattr(f.ctx, file.Ino, xattrDefaultACL)
	f.want(err, NoAttr)
	sub, err := f.Create(f.ctx, dir, "sub", Create{Mode: syscall.S_IFDIR | 0o700})
	f.ok(err)
	got, err = f.GetXattr(f.ctx, sub.Ino, xattrDefaultACL)
	f.ok(err)
	if hex.EncodeToString(got) != aclHex["named user"] {
		t.Errorf("subdirectory default %x", got)
	}
	if sub.Mode&0o777 != 0o700 {
		t.Errorf("subdirectory mode %o", sub.Mode&0o777)
	}
	link, err := f.Create(f.ctx, dir, "link", Create{Mode: syscall.S_IFLNK, Target: "x"})
	f.ok(err)
	if names, _ := f.ListXattr(f.ctx, link.Ino); len(names) != 0 {
		t.Errorf("a symbolic link inherited %q", names)
	}
	f.ok(f.SetXattr(f.ctx, dir, xattrDefaultACL, aclValue(t, "minimal"), 0))
	file, err = f.Create(f.ctx, dir, "plain", Create{Mode: syscall.S_IFREG | 0o666, Umask: 0o777})
	f.ok(err)
	if names, _ := f.ListXattr(f.ctx, file.Ino); file.Mode&0o777 != 0o640 || len(names) != 0 {
		t.Errorf("mode %o, attributes %q", file.Mode&0o777, names)
	}
}

func FuzzParseACL(f *testing.F) {
	for name := range aclHex {
		f.Add(aclValue(f, name))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseACL(b)
		if err != nil || len(a) == 0 {
			return
		}
		if !bytes.Equal(a.marshal(), b) {
			t.Errorf("%x became %x", b, a.marshal())
		}
		a.setMode(0o751)
		if a.mode() != 0o751 || a.check() != nil {
			t.Errorf("%x: mode %o", b, a.mode())
		}
	})
}
