package volume

import (
	"context"
	"syscall"

	"github.com/defs-fs/defs/metastore"
)

// RenameFlags are those of renameat2(2).
type RenameFlags uint32

const (
	RenameNoReplace RenameFlags = 1 // RENAME_NOREPLACE: fail where the new name exists
	RenameExchange  RenameFlags = 2 // RENAME_EXCHANGE: swap two names that both exist
)

// Rename moves a name, over what holds the new one where that is allowed, in one record: after a crash either the
// old or the new state is found. Two names of one inode are left as they are.
func (v *Volume) Rename(ctx context.Context, fromDir Ino, from string, toDir Ino, to string, flags RenameFlags) error {
	const op = "rename"
	if flags != 0 && flags != RenameNoReplace && flags != RenameExchange {
		return wrap(op, fromDir, Invalid)
	}
	for _, name := range []string{from, to} {
		switch err := checkName(name); err {
		case nil:
		case Exist: // "." or ".."
			return wrap(op, fromDir, Invalid)
		default:
			return wrap(op, fromDir, err)
		}
	}
	if err := v.waitRoom(ctx, recordBytes); err != nil {
		return wrap(op, fromDir, err)
	}
	_, err := v.commit(func(t *tx) error {
		return t.rename(fromDir, from, toDir, to, flags)
	})
	return wrap(op, fromDir, err)
}

func (t *tx) rename(fromDir Ino, from string, toDir Ino, to string, flags RenameFlags) error {
	for _, dir := range []Ino{fromDir, toDir} {
		if _, err := t.directory(dir); err != nil {
			return err
		}
	}
	moved, err := t.entry(fromDir, from)
	if err != nil {
		return err
	}
	replaced, err := t.entry(toDir, to)
	free := err == NotExist
	switch {
	case free && flags == RenameExchange:
		return NotExist
	case err != nil && !free:
		return err
	case !free && flags == RenameNoReplace:
		return Exist
	case !free && moved.Ino == replaced.Ino:
		return errUnchanged
	}
	if err := t.checkOutside(moved, toDir); err != nil {
		return err
	}
	switch {
	case free:
		return t.move(fromDir, moved, toDir, to)
	case flags == RenameExchange:
		return t.exchange(fromDir, moved, toDir, replaced)
	}
	switch movedDir, replacedDir := moved.Type == syscall.DT_DIR, replaced.Type == syscall.DT_DIR; {
	case movedDir && !replacedDir:
		return NotDir
	case !movedDir && replacedDir:
		return IsDir
	case replacedDir:
		if err := t.checkEmpty(replaced.Ino); err != nil {
			return err
		}
		t.deleteEntry(toDir, replaced)
		if err := t.dropDirectory(replaced.Ino); err != nil {
			return err
		}
		if err := t.addSubdirectories(toDir, -1); err != nil {
			return err
		}
	default:
		t.deleteEntry(toDir, replaced)
		if err := t.dropLink(replaced.Ino); err != nil {
			return err
		}
	}
	return t.move(fromDir, moved, toDir, to)
}

// move gives an entry a new place that is free. It keeps its cookie, which no other entry of the volume has, so that
// a listing in progress does not meet it again at the end.
func (t *tx) move(fromDir Ino, moved metastore.Dirent, toDir Ino, to string) error {
	t.deleteEntry(fromDir, moved)
	if fromDir != toDir {
		if err := t.reparent(moved, fromDir, toDir); err != nil {
			return err
		}
	}
	moved.Name = to
	t.addEntry(toDir, moved)
	return t.stampMoved(fromDir, toDir, moved.Ino)
}

// exchange swaps what two names stand for.
func (t *tx) exchange(fromDir Ino, a metastore.Dirent, toDir Ino, b metastore.Dirent) error {
	if err := t.checkOutside(b, fromDir); err != nil {
		return err
	}
	if fromDir != toDir {
		if err := t.reparent(a, fromDir, toDir); err != nil {
			return err
		}
		if err := t.reparent(b, toDir, fromDir); err != nil {
			return err
		}
	}
	t.deleteEntry(fromDir, a)
	t.deleteEntry(toDir, b)
	t.addEntry(fromDir, metastore.Dirent{Name: a.Name, Cookie: a.Cookie, Ino: b.Ino, Type: b.Type})
	t.addEntry(toDir, metastore.Dirent{Name: b.Name, Cookie: b.Cookie, Ino: a.Ino, Type: a.Type})
	return t.stampMoved(fromDir, toDir, a.Ino, b.Ino)
}

// reparent tells an inode of its new directory, and moves the two link counts that hang on a directory's "..".
func (t *tx) reparent(d metastore.Dirent, from, to Ino) error {
	n, err := t.inode(d.Ino)
	if err != nil {
		return err
	}
	n.Parent = to
	t.putInode(d.Ino, n)
	if d.Type != syscall.DT_DIR {
		return nil
	}
	if err := t.addSubdirectories(from, -1); err != nil {
		return err
	}
	return t.addSubdirectories(to, +1)
}

// addSubdirectories changes a directory's link count, which counts its subdirectories' "..".
func (t *tx) addSubdirectories(dir Ino, delta int) error {
	n, err := t.inode(dir)
	if err != nil {
		return err
	}
	if delta > 0 && n.Nlink >= nlinkMax {
		return TooManyLinks
	}
	n.Nlink = uint32(int(n.Nlink) + delta)
	t.putInode(dir, n)
	return nil
}

// stampMoved sets the times a rename changes: those of both directories' entries, and ctime of what moved.
func (t *tx) stampMoved(fromDir, toDir Ino, moved ...Ino) error {
	for _, ino := range moved {
		n, err := t.inode(ino)
		if err != nil {
			return err
		}
		n.Ctime = t.now
		t.putInode(ino, n)
	}
	for _, ino := range []Ino{fromDir, toDir} {
		n, err := t.inode(ino)
		if err != nil {
			return err
		}
		t.stamp(&n)
		t.putInode(ino, n)
	}
	return nil
}

// checkOutside refuses to move a directory below itself.
func (t *tx) checkOutside(moved metastore.Dirent, dir Ino) error {
	if moved.Type != syscall.DT_DIR {
		return nil
	}
	for dir != RootIno {
		if dir == moved.Ino {
			return Invalid
		}
		n, err := t.inode(dir)
		if err != nil {
			return err
		}
		dir = n.Parent
	}
	return nil
}
