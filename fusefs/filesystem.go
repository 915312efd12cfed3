package fusefs

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/defs-fs/defs/volume"
)

// cacheTimeout is how long the kernel may trust names and attributes without asking: in effect until memory is
// short, as nothing changes behind its back.
const cacheTimeout = 365 * 24 * time.Hour

// preferredIOBytes is what programs learn from st_blksize; larger requests cost less per byte.
const preferredIOBytes = 128 << 10

const nameBytesMax = 255

// quick is the context of requests that never wait for anything but local reads.
var quick = context.Background()

// filesystem answers the kernel's requests. It is stateless; see the package comment.
type filesystem struct {
	fuse.RawFileSystem // answers ENOSYS to what is not here, POLL and locks among it
	volume             *volume.Volume
	logger             *slog.Logger
}

func newFilesystem(o Options) *filesystem {
	return &filesystem{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		volume:        o.Volume,
		logger:        o.Logger,
	}
}

func (f *filesystem) String() string { return "defs" }

// status maps an error of the volume to the kernel's status. What the volume cannot explain is logged, because the
// program only sees EIO.
func (f *filesystem) status(operation string, node uint64, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	errno := volume.Errno(err)
	if errno == syscall.EIO {
		f.logger.Error("operation failed", "op", operation, "inode", node, "err", err)
	}
	return fuse.Status(errno)
}

// nodeStatus is status for requests that name a node and nothing else: what is missing then is the node.
func (f *filesystem) nodeStatus(operation string, node uint64, err error) fuse.Status {
	if errors.Is(err, volume.NotExist) {
		return fuse.Status(syscall.ESTALE)
	}
	return f.status(operation, node, err)
}

func setAttr(out *fuse.Attr, a *volume.Attr) {
	out.Ino = uint64(a.Ino)
	out.Size = a.Size
	out.Blocks = a.Blocks
	out.Atime, out.Atimensec = splitTime(a.Atime)
	out.Mtime, out.Mtimensec = splitTime(a.Mtime)
	out.Ctime, out.Ctimensec = splitTime(a.Ctime)
	out.Mode = a.Mode
	out.Nlink = a.Nlink
	out.Uid = a.UID
	out.Gid = a.GID
	out.Rdev = a.Rdev
	out.Blksize = preferredIOBytes
}

// setEntry fills the answer to a lookup. The kernel counts a reference for it: the caller calls Acquire.
func setEntry(out *fuse.EntryOut, a *volume.Attr) {
	out.NodeId = uint64(a.Ino)
	out.Generation = uint64(a.Gen)
	out.SetEntryTimeout(cacheTimeout)
	out.SetAttrTimeout(cacheTimeout)
	setAttr(&out.Attr, a)
}

// splitTime splits nanoseconds since the epoch; times before 1970 have negative seconds.
func splitTime(ns int64) (seconds uint64, nanoseconds uint32) {
	const second = int64(time.Second)
	s, n := ns/second, ns%second
	if n < 0 {
		s, n = s-1, n+second
	}
	return uint64(s), uint32(n)
}

// joinTime is the inverse of splitTime; a time out of the range of int64 nanoseconds becomes the nearest in it.
func joinTime(seconds uint64, nanoseconds uint32) int64 {
	const secondsMax = math.MaxInt64/int64(time.Second) - 1
	s := min(max(int64(seconds), -secondsMax), secondsMax)
	return s*int64(time.Second) + int64(nanoseconds)
}

func (f *filesystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	a, err := f.volume.GetAttr(quick, volume.Ino(in.NodeId))
	if err != nil {
		return f.nodeStatus("getattr", in.NodeId, err)
	}
	out.SetTimeout(cacheTimeout)
	setAttr(&out.Attr, &a)
	return fuse.OK
}

// Statx adds the birth time. The kernel asks only for programs that want it.
func (f *filesystem) Statx(_ <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	a, err := f.volume.GetAttr(quick, volume.Ino(in.NodeId))
	if err != nil {
		return f.nodeStatus("statx", in.NodeId, err)
	}
	out.SetTimeout(cacheTimeout)
	out.Mask = statxBasicStats | statxBtime
	out.Blksize = preferredIOBytes
	out.Nlink = a.Nlink
	out.Uid, out.Gid = a.UID, a.GID
	out.Mode = uint16(a.Mode)
	out.Ino = uint64(a.Ino)
	out.Size = a.Size
	out.Blocks = a.Blocks
	out.Atime = sxTime(a.Atime)
	out.Mtime = sxTime(a.Mtime)
	out.Ctime = sxTime(a.Ctime)
	out.Btime = sxTime(a.Btime)
	out.RdevMajor, out.RdevMinor = a.Rdev>>8&0xfff, a.Rdev&0xff|a.Rdev>>12&0xfff00
	return fuse.OK
}

// Fields of statx(2) that are always answered.
const (
	statxBasicStats = 0x7ff
	statxBtime      = 0x800
)

func sxTime(ns int64) fuse.SxTime {
	s, n := splitTime(ns)
	return fuse.SxTime{Sec: s, Nsec: n}
}

func (f *filesystem) SetAttr(interrupted <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	a, err := f.volume.SetAttr(op, volume.Ino(in.NodeId), attrChange(in))
	if err != nil {
		return f.nodeStatus("setattr", in.NodeId, err)
	}
	out.SetTimeout(cacheTimeout)
	setAttr(&out.Attr, &a)
	return fuse.OK
}

func attrChange(in *fuse.SetAttrIn) volume.SetAttr {
	c := volume.SetAttr{
		Mode: in.Mode & 0o7777, UID: in.Owner.Uid, GID: in.Owner.Gid, Size: in.Size,
		Atime:    joinTime(in.Atime, in.Atimensec),
		Mtime:    joinTime(in.Mtime, in.Mtimensec),
		Ctime:    joinTime(in.Ctime, in.Ctimensec),
		KillPriv: in.Valid&fuse.FATTR_KILL_SUIDGID != 0,
	}
	set := func(mask uint32, bit volume.SetValid) bool {
		if in.Valid&mask == 0 {
			return false
		}
		c.Valid |= bit
		return true
	}
	set(fuse.FATTR_MODE, volume.SetMode)
	set(fuse.FATTR_UID, volume.SetUID)
	set(fuse.FATTR_GID, volume.SetGID)
	set(fuse.FATTR_SIZE, volume.SetSize)
	set(fuse.FATTR_CTIME, volume.SetCtime)
	if !set(fuse.FATTR_ATIME_NOW, volume.SetAtimeNow) {
		set(fuse.FATTR_ATIME, volume.SetAtime)
	}
	if !set(fuse.FATTR_MTIME_NOW, volume.SetMtimeNow) {
		set(fuse.FATTR_MTIME, volume.SetMtime)
	}
	return c
}

// Access is asked only on mounts that root alone can enter (see checksPermissions): root may do everything, except
// execute a file that nobody may execute.
func (f *filesystem) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	if in.Mask&fuse.X_OK == 0 {
		return fuse.OK
	}
	a, err := f.volume.GetAttr(quick, volume.Ino(in.NodeId))
	if err == nil && a.Mode&syscall.S_IFMT == syscall.S_IFREG && a.Mode&0o111 == 0 {
		return fuse.EACCES
	}
	return f.nodeStatus("access", in.NodeId, err)
}

func (f *filesystem) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s, err := f.volume.StatFS(quick)
	if err != nil {
		return f.status("statfs", in.NodeId, err)
	}
	*out = fuse.StatfsOut{
		Blocks: s.Blocks, Bfree: s.Free, Bavail: s.Avail,
		Files: s.Files, Ffree: s.FilesFree,
		Bsize: s.BlockBytes, Frsize: s.BlockBytes, NameLen: s.NameMaxBytes,
	}
	return fuse.OK
}

// Ioctl knows no command: FS_IOC_GETFLAGS and the like get the errno that programs expect.
func (f *filesystem) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(syscall.ENOTTY)
}
