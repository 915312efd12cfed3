package volume

import (
	"context"
	"syscall"

	"github.com/defs-fs/defs/metastore"
)

// Attr is what stat shows of an inode.
type Attr struct {
	Ino                        Ino
	Mode                       uint32 // S_IFMT type and permission bits
	UID, GID, Rdev, Nlink      uint32
	Size                       uint64 // bytes
	Blocks                     uint64 // allocated content in units of 512 bytes
	Atime, Mtime, Ctime, Btime int64  // nanoseconds since the epoch
	Gen                        uint32 // generation; always 1, as inode numbers are never used again
}

// SetValid says which fields of a SetAttr are to be set.
type SetValid uint32

const (
	SetMode SetValid = 1 << iota
	SetUID
	SetGID
	SetSize
	SetAtime // to SetAttr.Atime
	SetMtime // to SetAttr.Mtime
	SetCtime // to SetAttr.Ctime
	SetAtimeNow
	SetMtimeNow
)

// SetAttr is a change of attributes.
type SetAttr struct {
	Valid               SetValid
	Mode, UID, GID      uint32 // Mode: permission bits with setuid, setgid and sticky; the type is kept
	Size                uint64 // bytes
	Atime, Mtime, Ctime int64  // nanoseconds since the epoch
	KillPriv            bool   // a truncation by a caller without CAP_FSETID: clear setuid and setgid
}

// directoryBytes is the size shown for every directory.
const directoryBytes = 4096

func attr(ino Ino, n *metastore.Inode) Attr {
	a := Attr{
		Ino: ino, Mode: n.Mode, UID: n.UID, GID: n.GID, Rdev: n.Rdev, Nlink: n.Nlink,
		Size: n.Size, Blocks: (n.Allocated + 511) / 512,
		Atime: n.Atime, Mtime: n.Mtime, Ctime: n.Ctime, Btime: n.Btime, Gen: n.Generation,
	}
	if isDir(n.Mode) {
		a.Size = directoryBytes
	}
	return a
}

// GetAttr returns an inode's attributes; Stale where the inode no longer exists.
func (v *Volume) GetAttr(ctx context.Context, ino Ino) (Attr, error) {
	v.foreground.note()
	n, err := v.existing(ino)
	if err != nil {
		return Attr{}, wrap("getattr", ino, err)
	}
	return attr(ino, &n), nil
}

// SetAttr changes attributes, all or none (a cut of a file with very many extents is taken in steps, each a
// shorter file). A change of owner or group, or a call with nothing to set (which is what chown(-1, -1) is by the
// time it comes here), clears setuid and setgid of anything but a directory.
func (v *Volume) SetAttr(ctx context.Context, ino Ino, s SetAttr) (Attr, error) {
	const op = "setattr"
	if s.Valid&SetSize != 0 {
		if s.Size > fileMaxBytes {
			return Attr{}, wrap(op, ino, FileTooLarge)
		}
		v.foreground.begin()
		defer v.foreground.end()
		if err := v.shrink(ino, s.Size); err != nil {
			return Attr{}, wrap(op, ino, err)
		}
	}
	var a Attr
	_, err := v.commit(func(t *tx) error {
		n, err := t.inode(ino)
		if err == NotExist {
			err = Stale
		}
		if err != nil {
			return err
		}
		if err := t.setAttr(ino, &n, s); err != nil {
			return err
		}
		t.putInode(ino, n)
		a = attr(ino, &n)
		return nil
	})
	return a, wrap(op, ino, err)
}

func (t *tx) setAttr(ino Ino, n *metastore.Inode, s SetAttr) error {
	if s.Valid&SetSize != 0 {
		if err := t.truncate(ino, n, s.Size); err != nil {
			return err
		}
		n.Mtime = t.now
		if err := t.dropPrivileges(ino, n, s.KillPriv); err != nil {
			return err
		}
	}
	if s.Valid&SetUID != 0 {
		n.UID = s.UID
	}
	if s.Valid&SetGID != 0 {
		n.GID = s.GID
	}
	if (s.Valid == 0 || s.Valid&(SetUID|SetGID) != 0) && !isDir(n.Mode) {
		if err := t.dropPrivileges(ino, n, true); err != nil {
			return err
		}
	}
	if s.Valid&SetMode != 0 {
		n.Mode = n.Mode&syscall.S_IFMT | s.Mode&0o7777
		if err := t.chmodACL(ino, n); err != nil {
			return err
		}
	}
	switch {
	case s.Valid&SetAtimeNow != 0:
		n.Atime = t.now
	case s.Valid&SetAtime != 0:
		n.Atime = s.Atime
	}
	switch {
	case s.Valid&SetMtimeNow != 0:
		n.Mtime = t.now
	case s.Valid&SetMtime != 0:
		n.Mtime = s.Mtime
	}
	n.Ctime = t.now
	if s.Valid&SetCtime != 0 {
		n.Ctime = s.Ctime
	}
	return nil
}

// dropPrivileges takes away what a change of content or owner may not leave: the file capability always, and with
// setIDs the setuid bit, and the setgid bit where the group may execute (without that it means mandatory locking).
func (t *tx) dropPrivileges(ino Ino, n *metastore.Inode, setIDs bool) error {
	if setIDs {
		n.Mode &^= syscall.S_ISUID
		if n.Mode&syscall.S_IXGRP != 0 {
			n.Mode &^= syscall.S_ISGID
		}
	}
	return t.removeXattr(ino, n, xattrCapability)
}

// accessed records a read of an inode's content for its access time.
func (v *Volume) accessed(ino Ino, n *metastore.Inode) {
	if v.noAtime {
		return
	}
	if !v.inodes.touch(ino, n, v.clock().UnixNano()) {
		return
	}
	if err := v.flushAtimes(); err != nil {
		v.log.Warn("access times were not journaled", "cause", err)
	}
}

// flushAtimes journals the access times that wait.
func (v *Volume) flushAtimes() error {
	inos := v.inodes.pending()
	if len(inos) == 0 {
		return nil
	}
	_, err := v.commit(func(t *tx) error {
		for _, ino := range inos {
			n, err := t.inode(ino)
			if err == NotExist {
				continue
			}
			if err != nil {
				return err
			}
			t.putInode(ino, n)
		}
		return nil
	})
	return err
}
