package volume

import (
	"context"
	"math"
	"strings"
	"syscall"

	"github.com/defs-fs/defs/metastore"
)

const (
	nameMaxBytes   = 255
	targetMaxBytes = 4095
	nlinkMax       = math.MaxInt32
)

// Bits of metastore.Inode.Flags.
const (
	// flagXattrs: the inode has, or once had, extended attributes. Without it none are looked up.
	flagXattrs = 1 << iota
	// flagLinkable: made by O_TMPFILE and never linked, so that a first link may still be made.
	flagLinkable
)

// Create describes a new inode.
type Create struct {
	Mode     uint32 // S_IFMT type and permission bits, before the umask
	Umask    uint32 // applied unless the parent has a default ACL
	UID, GID uint32 // a set-group-id parent replaces GID
	Rdev     uint32 // of a device
	Target   string // of a symbolic link
	Excl     bool   // fail where a regular file of the name exists; else that file is returned
}

// Lookup finds a name in a directory.
func (v *Volume) Lookup(ctx context.Context, parent Ino, name string) (Attr, error) {
	v.foreground.note()
	d, n, err := v.lookup(parent, name)
	if err != nil {
		return Attr{}, wrap("lookup", parent, err)
	}
	return attr(d.Ino, &n), nil
}

func (v *Volume) lookup(parent Ino, name string) (metastore.Dirent, metastore.Inode, error) {
	if len(name) > nameMaxBytes {
		return metastore.Dirent{}, metastore.Inode{}, NameTooLong
	}
	d, err := v.names.get(parent, name)
	if err == NotExist {
		p, err := v.inodes.get(parent)
		switch {
		case err == NotExist:
			return d, p, Stale
		case err != nil:
			return d, p, err
		case !isDir(p.Mode):
			return d, p, NotDir
		}
		return d, p, NotExist
	}
	if err != nil {
		return d, metastore.Inode{}, err
	}
	n, err := v.inodes.get(d.Ino)
	return d, n, err // NotExist where the name went away meanwhile
}

// checkName accepts what can be a new entry's name.
func checkName(name string) error {
	switch {
	case len(name) > nameMaxBytes:
		return NameTooLong
	case name == "":
		return NotExist
	case name == "." || name == "..":
		return Exist
	case strings.ContainsAny(name, "/\x00"):
		return Invalid
	}
	return nil
}

// directory returns an inode that entries can be added to or taken from.
func (t *tx) directory(ino Ino) (metastore.Inode, error) {
	n, err := t.inode(ino)
	switch {
	case err == NotExist:
		return n, Stale
	case err != nil:
		return n, err
	case !isDir(n.Mode):
		return n, NotDir
	case n.Nlink == 0:
		return n, NotExist // removed while open
	}
	return n, nil
}

// entry returns a name's entry; NotExist when there is none.
func (t *tx) entry(parent Ino, name string) (metastore.Dirent, error) {
	if len(name) > nameMaxBytes {
		return metastore.Dirent{}, NameTooLong
	}
	return t.v.names.load(parent, name)
}

// stamp marks a directory's entries as changed now.
func (t *tx) stamp(dir *metastore.Inode) { dir.Mtime, dir.Ctime = t.now, t.now }

// Create makes a regular file, directory, symbolic link, fifo, socket or device, by the type in c.Mode.
func (v *Volume) Create(ctx context.Context, parent Ino, name string, c Create) (Attr, error) {
	const op = "create"
	if err := checkName(name); err != nil {
		return Attr{}, wrap(op, parent, err)
	}
	if err := c.check(); err != nil {
		return Attr{}, wrap(op, parent, err)
	}
	if err := v.waitRoom(ctx, recordBytes+len(c.Target)); err != nil {
		return Attr{}, wrap(op, parent, err)
	}
	var a Attr
	_, err := v.commit(func(t *tx) error {
		dir, err := t.directory(parent)
		if err != nil {
			return err
		}
		switch d, err := t.entry(parent, name); {
		case err == nil && !c.Excl && c.Mode&syscall.S_IFMT == syscall.S_IFREG && d.Type == syscall.DT_REG:
			n, err := t.inode(d.Ino)
			if err != nil {
				return err
			}
			a = attr(d.Ino, &n)
			return errUnchanged
		case err == nil:
			return Exist
		case err != NotExist:
			return err
		}
		ino, n, err := t.newInode(parent, &dir, c)
		if err != nil {
			return err
		}
		if isDir(n.Mode) {
			if dir.Nlink >= nlinkMax {
				return TooManyLinks
			}
			n.Nlink = 2
			dir.Nlink++
		}
		t.stamp(&dir)
		t.putInode(parent, dir)
		t.putInode(ino, n)
		t.addEntry(parent, metastore.Dirent{Ino: ino, Type: direntType(n.Mode), Cookie: uint64(ino), Name: name})
		a = attr(ino, &n)
		return nil
	})
	return a, wrap(op, parent, err)
}

// CreateTmp makes a regular file without a name (O_TMPFILE), which Link can name. parent lends its
// set-group-id bit and default ACL. The caller holds a reference when it wants the file to live: without one it is
// removed at the next Release or Open.
func (v *Volume) CreateTmp(ctx context.Context, parent Ino, c Create) (Attr, error) {
	const op = "create unnamed"
	if c.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return Attr{}, wrap(op, parent, Invalid)
	}
	if err := v.waitRoom(ctx, recordBytes); err != nil {
		return Attr{}, wrap(op, parent, err)
	}
	var a Attr
	_, err := v.commit(func(t *tx) error {
		dir, err := t.directory(parent)
		if err != nil {
			return err
		}
		ino, n, err := t.newInode(parent, &dir, c)
		if err != nil {
			return err
		}
		n.Nlink = 0
		n.Flags |= flagLinkable
		t.putInode(ino, n)
		t.PutOrphan(ino)
		t.v.refs.keepUnnamed(ino)
		a = attr(ino, &n)
		return nil
	})
	return a, wrap(op, parent, err)
}

func (c *Create) check() error {
	switch c.Mode & syscall.S_IFMT {
	case syscall.S_IFREG, syscall.S_IFDIR, syscall.S_IFIFO, syscall.S_IFSOCK, syscall.S_IFCHR, syscall.S_IFBLK:
		return nil
	case syscall.S_IFLNK:
		switch {
		case len(c.Target) > targetMaxBytes:
			return NameTooLong
		case c.Target == "":
			return NotExist
		case strings.IndexByte(c.Target, 0) >= 0:
			return Invalid
		}
		return nil
	}
	return Invalid
}

// newInode numbers and fills a new inode of one link, with what it inherits from its directory.
func (t *tx) newInode(parent Ino, dir *metastore.Inode, c Create) (Ino, metastore.Inode, error) {
	ino := t.newID()
	n := metastore.Inode{
		Mode: c.Mode, UID: c.UID, GID: c.GID, Nlink: 1, Parent: parent,
		Atime: t.now, Mtime: t.now, Ctime: t.now, Btime: t.now, Generation: 1,
	}
	switch c.Mode & syscall.S_IFMT {
	case syscall.S_IFLNK:
		n.Mode = syscall.S_IFLNK | 0o777
		n.Target = c.Target
		n.Size = uint64(len(c.Target))
	case syscall.S_IFCHR, syscall.S_IFBLK:
		n.Rdev = c.Rdev
	}
	if dir.Mode&syscall.S_ISGID != 0 {
		n.GID = dir.GID
		if isDir(n.Mode) {
			n.Mode |= syscall.S_ISGID
		}
	}
	t.inodes++
	if isSymlink(n.Mode) {
		return ino, n, nil
	}
	return ino, n, t.inheritACL(parent, dir, ino, &n, c.Umask)
}

// Link gives a file a further name.
func (v *Volume) Link(ctx context.Context, ino, parent Ino, name string) (Attr, error) {
	const op = "link"
	if err := checkName(name); err != nil {
		return Attr{}, wrap(op, ino, err)
	}
	if err := v.waitRoom(ctx, recordBytes); err != nil {
		return Attr{}, wrap(op, ino, err)
	}
	var a Attr
	_, err := v.commit(func(t *tx) error {
		dir, err := t.directory(parent)
		if err != nil {
			return err
		}
		n, err := t.inode(ino)
		switch {
		case err == NotExist:
			return Stale
		case err != nil:
			return err
		case isDir(n.Mode):
			return Permission
		case n.Nlink == 0 && n.Flags&flagLinkable == 0:
			return NotExist
		case n.Nlink >= nlinkMax:
			return TooManyLinks
		}
		if _, err := t.entry(parent, name); err != NotExist {
			if err == nil {
				err = Exist
			}
			return err
		}
		if n.Nlink == 0 {
			t.DeleteOrphan(ino)
			n.Flags &^= flagLinkable
		}
		n.Nlink++
		n.Parent = parent
		n.Ctime = t.now
		t.stamp(&dir)
		t.putInode(ino, n)
		t.putInode(parent, dir)
		t.addEntry(parent, metastore.Dirent{Ino: ino, Type: direntType(n.Mode), Cookie: uint64(t.newID()), Name: name})
		a = attr(ino, &n)
		return nil
	})
	return a, wrap(op, ino, err)
}

// Unlink takes a name from anything but a directory. Without names and references the inode goes.
func (v *Volume) Unlink(ctx context.Context, parent Ino, name string) error {
	_, err := v.commit(func(t *tx) error {
		dir, err := t.directory(parent)
		if err != nil {
			return err
		}
		d, err := t.entry(parent, name)
		if err != nil {
			return err
		}
		if d.Type == syscall.DT_DIR {
			return IsDir
		}
		t.deleteEntry(parent, d)
		t.stamp(&dir)
		t.putInode(parent, dir)
		return t.dropLink(d.Ino)
	})
	return wrap("unlink", parent, err)
}

// Rmdir removes an empty directory.
func (v *Volume) Rmdir(ctx context.Context, parent Ino, name string) error {
	switch name {
	case ".":
		return wrap("rmdir", parent, Invalid)
	case "..":
		return wrap("rmdir", parent, NotEmpty)
	}
	_, err := v.commit(func(t *tx) error {
		dir, err := t.directory(parent)
		if err != nil {
			return err
		}
		d, err := t.entry(parent, name)
		if err != nil {
			return err
		}
		if d.Type != syscall.DT_DIR {
			return NotDir
		}
		if err := t.checkEmpty(d.Ino); err != nil {
			return err
		}
		t.deleteEntry(parent, d)
		dir.Nlink--
		t.stamp(&dir)
		t.putInode(parent, dir)
		return t.dropDirectory(d.Ino)
	})
	return wrap("rmdir", parent, err)
}

// checkEmpty returns NotEmpty for a directory with entries.
func (t *tx) checkEmpty(dir Ino) error {
	empty := true
	if err := t.v.db.ReadDir(dir, 0, func(metastore.Dirent) bool {
		empty = false
		return false
	}); err != nil {
		return err
	}
	if !empty {
		return NotEmpty
	}
	return nil
}

// dropLink takes one link from anything but a directory.
func (t *tx) dropLink(ino Ino) error {
	n, err := t.inode(ino)
	if err != nil {
		return err
	}
	n.Nlink--
	n.Ctime = t.now
	if n.Nlink == 0 {
		return t.orphan(ino, n)
	}
	t.putInode(ino, n)
	return nil
}

// dropDirectory unlinks an empty directory.
func (t *tx) dropDirectory(ino Ino) error {
	n, err := t.inode(ino)
	if err != nil {
		return err
	}
	n.Nlink = 0
	n.Ctime = t.now
	return t.orphan(ino, n)
}

// Readlink returns a symbolic link's target.
func (v *Volume) Readlink(ctx context.Context, ino Ino) (string, error) {
	n, err := v.existing(ino)
	if err != nil {
		return "", wrap("readlink", ino, err)
	}
	if !isSymlink(n.Mode) {
		return "", wrap("readlink", ino, Invalid)
	}
	v.accessed(ino, &n)
	return n.Target, nil
}

// Parent returns the directory that holds directory ino; the root is its own parent.
func (v *Volume) Parent(ctx context.Context, ino Ino) (Ino, error) {
	n, err := v.existing(ino)
	if err != nil {
		return 0, wrap("parent", ino, err)
	}
	if !isDir(n.Mode) {
		return 0, wrap("parent", ino, NotDir)
	}
	return n.Parent, nil
}

// existing is inodes.get for an inode that the caller has seen before: one that is gone is Stale.
func (v *Volume) existing(ino Ino) (metastore.Inode, error) {
	n, err := v.inodes.get(ino)
	if err == NotExist {
		err = Stale
	}
	return n, err
}

func isDir(mode uint32) bool     { return mode&syscall.S_IFMT == syscall.S_IFDIR }
func isRegular(mode uint32) bool { return mode&syscall.S_IFMT == syscall.S_IFREG }
func isSymlink(mode uint32) bool { return mode&syscall.S_IFMT == syscall.S_IFLNK }

// direntType is the DT_* value of a mode: on Linux the type bits shifted down.
func direntType(mode uint32) uint8 { return uint8(mode & syscall.S_IFMT >> 12) }
