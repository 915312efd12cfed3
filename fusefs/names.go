package fusefs

import (
	"errors"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/defs-fs/defs/volume"
)

const nameTooLong = fuse.Status(syscall.ENAMETOOLONG)

// Lookup answers a missing name with an entry of node 0, so that the kernel remembers that it is missing.
// "." and ".." come from open_by_handle_at and NFS only.
func (f *filesystem) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if len(name) > nameBytesMax {
		return nameTooLong
	}
	var a volume.Attr
	var err error
	switch name {
	case ".":
		a, err = f.volume.GetAttr(quick, volume.Ino(in.NodeId))
		if err == nil && a.Nlink == 0 {
			err = volume.Stale // removed, only not yet forgotten
		}
	case "..":
		var parent volume.Ino
		if parent, err = f.volume.Parent(quick, volume.Ino(in.NodeId)); err == nil {
			a, err = f.volume.GetAttr(quick, parent)
		}
	default:
		a, err = f.volume.Lookup(quick, volume.Ino(in.NodeId), name)
		if errors.Is(err, volume.NotExist) {
			out.NodeId = 0
			out.SetEntryTimeout(cacheTimeout)
			return fuse.OK
		}
	}
	if err != nil {
		return f.nodeStatus("lookup", in.NodeId, err)
	}
	f.enter(out, &a)
	return fuse.OK
}

// enter answers with an entry and counts the kernel's reference to it.
func (f *filesystem) enter(out *fuse.EntryOut, a *volume.Attr) {
	f.volume.Acquire(a.Ino, 1)
	setEntry(out, a)
}

func (f *filesystem) Forget(node, lookups uint64) {
	f.volume.Release(volume.Ino(node), lookups)
}

// create makes any kind of inode, with the caller as its owner, and enters it.
func (f *filesystem) create(interrupted <-chan struct{}, operation string, in *fuse.InHeader, name string, c volume.Create, out *fuse.EntryOut) fuse.Status {
	if len(name) > nameBytesMax {
		return nameTooLong
	}
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	c.UID, c.GID = in.Uid, in.Gid
	a, err := f.volume.Create(op, volume.Ino(in.NodeId), name, c)
	if err != nil {
		return f.status(operation, in.NodeId, err)
	}
	f.enter(out, &a)
	return fuse.OK
}

func (f *filesystem) Create(interrupted <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	c := volume.Create{
		Mode:  syscall.S_IFREG | in.Mode&0o7777,
		Umask: in.Umask,
		Excl:  in.Flags&syscall.O_EXCL != 0,
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return f.create(interrupted, "create", &in.InHeader, name, c, &out.EntryOut)
}

func (f *filesystem) Tmpfile(interrupted <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	a, err := f.volume.CreateTmp(op, volume.Ino(in.NodeId), volume.Create{
		Mode:  syscall.S_IFREG | in.Mode&0o7777,
		Umask: in.Umask,
		UID:   in.Uid,
		GID:   in.Gid,
	})
	if err != nil {
		return f.status("tmpfile", in.NodeId, err)
	}
	f.enter(&out.EntryOut, &a)
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

func (f *filesystem) Mknod(interrupted <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	c := volume.Create{Mode: in.Mode, Umask: in.Umask, Rdev: in.Rdev, Excl: true}
	return f.create(interrupted, "mknod", &in.InHeader, name, c, out)
}

func (f *filesystem) Mkdir(interrupted <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	c := volume.Create{Mode: syscall.S_IFDIR | in.Mode&0o7777, Umask: in.Umask, Excl: true}
	return f.create(interrupted, "mkdir", &in.InHeader, name, c, out)
}

func (f *filesystem) Symlink(interrupted <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	c := volume.Create{Mode: syscall.S_IFLNK | 0o777, Target: target, Excl: true}
	return f.create(interrupted, "symlink", in, name, c, out)
}

func (f *filesystem) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	target, err := f.volume.Readlink(quick, volume.Ino(in.NodeId))
	return []byte(target), f.nodeStatus("readlink", in.NodeId, err)
}

func (f *filesystem) Link(interrupted <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if len(name) > nameBytesMax {
		return nameTooLong
	}
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	a, err := f.volume.Link(op, volume.Ino(in.Oldnodeid), volume.Ino(in.NodeId), name)
	if err != nil {
		return f.status("link", in.NodeId, err)
	}
	f.enter(out, &a)
	return fuse.OK
}

func (f *filesystem) Unlink(interrupted <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	return f.status("unlink", in.NodeId, f.volume.Unlink(op, volume.Ino(in.NodeId), name))
}

func (f *filesystem) Rmdir(interrupted <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	return f.status("rmdir", in.NodeId, f.volume.Rmdir(op, volume.Ino(in.NodeId), name))
}

// Rename serves renameat2 as well. There is no whiteout: its flag is refused.
func (f *filesystem) Rename(interrupted <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if len(to) > nameBytesMax {
		return nameTooLong
	}
	const known = volume.RenameNoReplace | volume.RenameExchange
	flags := volume.RenameFlags(in.Flags)
	if flags&^known != 0 || flags == known {
		return fuse.EINVAL
	}
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	err := f.volume.Rename(op, volume.Ino(in.NodeId), from, volume.Ino(in.Newdir), to, flags)
	return f.status("rename", in.NodeId, err)
}
