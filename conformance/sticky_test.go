package conformance

import (
	"syscall"

	"golang.org/x/sys/unix"
)

func stickyCases() []testCase {
	return []testCase{
		{op: "sticky directories", name: "who may take, move and replace names of whom", others: true, run: stickyDirectories},
		{op: "sticky directories", name: "one's own", run: func(t *T) {
			t.mkdir("dir", 0o1777)
			t.file("dir/a", "")
			t.want(0, unix.Rename("dir/a", "dir/b"))
			t.want(0, unix.Unlink("dir/b"))
			equal(t, "mode", t.permissions("dir"), 0o1777)
		}},
	}
}

// stickyDirectories: only root, the directory's owner and the object's owner may take a name out of it.
func stickyDirectories(t *T) {
	t.must(unix.Chmod(".", 0o777))
	for _, dirOwner := range []user{root, alice, bob} {
		for _, owner := range []user{alice, bob} {
			for _, caller := range []user{root, alice, bob, carol} {
				for _, k := range kinds {
					t.row("%s in a directory of %s takes %s's %s", caller.name, dirOwner.name, owner.name, k.name)
					var want syscall.Errno
					if caller.uid != 0 && caller.uid != dirOwner.uid && caller.uid != owner.uid {
						want = unix.EPERM
					}
					sticky(t, dirOwner, owner, caller, k, want)
				}
			}
		}
	}
}

func sticky(t *T, dirOwner, owner, caller user, k kind, want syscall.Errno) {
	t.mkdir("sticky", 0o777)
	t.own("sticky", dirOwner, 0o1777)
	t.mkdir("free", 0o777)
	t.must(k.make("sticky/object"))
	t.own("sticky/object", owner, 0o777)
	t.must(t.as(caller, func() error {
		t.want(want, unix.Rename("sticky/object", "sticky/renamed"))
		if want == 0 {
			t.want(0, unix.Rename("sticky/renamed", "sticky/object"))
		}
		t.want(want, unix.Rename("sticky/object", "free/object"))
		if want == 0 {
			t.want(0, unix.Rename("free/object", "sticky/object"))
		}
		// Over the object, from a directory where everything is allowed.
		t.want(0, k.makeBy("free/mine", caller))
		t.want(want, unix.Rename("free/mine", "sticky/object"))
		t.want(want, unix.Renameat2(unix.AT_FDCWD, "sticky/object", unix.AT_FDCWD, "sticky/object2", unix.RENAME_NOREPLACE))
		if want == 0 {
			t.want(0, unix.Rename("sticky/object2", "sticky/object"))
			if k.mode == unix.S_IFDIR {
				t.want(0, unix.Rmdir("sticky/object"))
			} else {
				t.want(0, unix.Unlink("sticky/object"))
			}
			return nil
		}
		if k.mode == unix.S_IFDIR {
			t.want(want, unix.Rmdir("sticky/object"))
		} else {
			t.want(want, unix.Unlink("sticky/object"))
		}
		t.want(want, unix.Renameat2(unix.AT_FDCWD, "free/mine", unix.AT_FDCWD, "sticky/object", unix.RENAME_EXCHANGE))
		return nil
	}))
	for _, name := range []string{"sticky/object", "free/mine"} {
		if unix.Unlink(name) == unix.EISDIR {
			t.must(unix.Rmdir(name))
		}
	}
	t.must(unix.Rmdir("sticky"))
	t.must(unix.Rmdir("free"))
}

// makeBy makes the kind where the caller can, and a file, which may as well replace it, where not.
func (k kind) makeBy(name string, caller user) error {
	if k.root && caller.uid != 0 {
		return kinds[0].make(name)
	}
	return k.make(name)
}
