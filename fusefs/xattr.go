package fusefs

import (
	"slices"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/defs-fs/defs/volume"
)

func (f *filesystem) GetXAttr(_ <-chan struct{}, in *fuse.InHeader, name string, dst []byte) (uint32, fuse.Status) {
	value, err := f.volume.GetXattr(quick, volume.Ino(in.NodeId), name)
	if err != nil {
		return 0, f.nodeStatus("getxattr", in.NodeId, err)
	}
	return fill(dst, value)
}

func (f *filesystem) ListXAttr(_ <-chan struct{}, in *fuse.InHeader, dst []byte) (uint32, fuse.Status) {
	names, err := f.volume.ListXattr(quick, volume.Ino(in.NodeId))
	if err != nil {
		return 0, f.nodeStatus("listxattr", in.NodeId, err)
	}
	if !privileged(in) {
		names = slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, "trusted.") })
	}
	size := 0
	for _, name := range names {
		size += len(name) + 1
	}
	list := make([]byte, 0, size)
	for _, name := range names {
		list = append(append(list, name...), 0)
	}
	return fill(dst, list)
}

// fill copies value to dst if it fits; an empty dst asks for the size only.
func fill[T string | []byte](dst []byte, value T) (uint32, fuse.Status) {
	if len(value) > len(dst) {
		return uint32(len(value)), fuse.ERANGE
	}
	return uint32(copy(dst, value)), fuse.OK
}

func (f *filesystem) SetXAttr(interrupted <-chan struct{}, in *fuse.SetXAttrIn, name string, value []byte) fuse.Status {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	ino := volume.Ino(in.NodeId)
	err := f.volume.SetXattr(op, ino, name, value, in.Flags)
	if err == nil && in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0 {
		err = f.clearSetGroupID(op, ino)
	}
	return f.nodeStatus("setxattr", in.NodeId, err)
}

// clearSetGroupID follows an ACL set by a caller outside the file's group, as chmod by that caller would.
func (f *filesystem) clearSetGroupID(op *operation, ino volume.Ino) error {
	a, err := f.volume.GetAttr(op, ino)
	if err != nil || a.Mode&syscall.S_ISGID == 0 {
		return err
	}
	_, err = f.volume.SetAttr(op, ino, volume.SetAttr{Valid: volume.SetMode, Mode: a.Mode & 0o7777 &^ syscall.S_ISGID})
	return err
}

func (f *filesystem) RemoveXAttr(interrupted <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	return f.nodeStatus("removexattr", in.NodeId, f.volume.RemoveXattr(op, volume.Ino(in.NodeId), name))
}
