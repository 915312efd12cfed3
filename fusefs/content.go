package fusefs

import (
	"math"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/defs-fs/defs/volume"
)

const fileTooLarge = fuse.Status(syscall.EFBIG)

// Open is answered "not implemented", once per mount: the kernel then opens files by itself, keeps their pages and
// sends no RELEASE. Requests carry the node, which is all that is needed.
func (f *filesystem) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

// Release is for files created before the first Open.
func (f *filesystem) Release(<-chan struct{}, *fuse.ReleaseIn) {}

// Flush has nothing to do at close: writes go through. After this answer the kernel does not ask again; it still
// writes pages that were changed through mmap, and reports their errors.
func (f *filesystem) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (f *filesystem) Read(interrupted <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if in.Offset > math.MaxInt64-uint64(len(buf)) {
		return nil, fuse.EINVAL
	}
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	n, err := f.volume.Read(op, volume.Ino(in.NodeId), int64(in.Offset), buf)
	if err != nil {
		return nil, f.nodeStatus("read", in.NodeId, err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// Writev gets the bytes of one WRITE, in one piece. The kernel has computed the offset of O_APPEND writes: it alone
// knows the order of the writers.
func (f *filesystem) Writev(interrupted <-chan struct{}, in *fuse.WriteIn, pieces [][]byte) (uint32, fuse.Status) {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	flags := volume.WriteFlags{KillPriv: in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0}
	written := 0
	for _, data := range pieces {
		if in.Offset > math.MaxInt64-uint64(written+len(data)) {
			return uint32(written), fileTooLarge
		}
		n, err := f.volume.Write(op, volume.Ino(in.NodeId), int64(in.Offset)+int64(written), data, flags)
		written += n
		if err != nil && written > 0 {
			break // what has been written counts; the next request meets the error
		}
		if err != nil {
			return 0, f.nodeStatus("write", in.NodeId, err)
		}
	}
	return uint32(written), fuse.OK
}

// Fsync ends early only for a program that is being killed: it must not take a signal for a failed flush.
func (f *filesystem) Fsync(interrupted <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	return f.nodeStatus("fsync", in.NodeId, f.volume.Fsync(op, volume.Ino(in.NodeId)))
}

func (f *filesystem) FsyncDir(interrupted <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return f.Fsync(interrupted, in)
}

// privileged guesses whether the caller has the capabilities of root, where the kernel does not tell.
func privileged(in *fuse.InHeader) bool { return in.Uid == 0 }

func (f *filesystem) Fallocate(interrupted <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if in.Offset > math.MaxInt64 || in.Length > math.MaxInt64-in.Offset {
		return fileTooLarge
	}
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	flags := volume.WriteFlags{KillPriv: !privileged(&in.InHeader)}
	err := f.volume.Fallocate(op, volume.Ino(in.NodeId), in.Mode, int64(in.Offset), int64(in.Length), flags)
	return f.nodeStatus("fallocate", in.NodeId, err)
}

func (f *filesystem) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if in.Offset > math.MaxInt64 {
		return fuse.Status(syscall.ENXIO)
	}
	off, err := f.volume.Seek(quick, volume.Ino(in.NodeId), int64(in.Offset), int(in.Whence))
	if err != nil {
		return f.nodeStatus("lseek", in.NodeId, err)
	}
	out.Offset = uint64(off)
	return fuse.OK
}

func (f *filesystem) CopyFileRange(interrupted <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	// The answer has 32 bits; a whole number of pages keeps what follows aligned.
	const lengthMax = math.MaxUint32 &^ (1<<20 - 1)
	length := min(in.Len, lengthMax)
	if in.OffIn > math.MaxInt64-length || in.OffOut > math.MaxInt64-length {
		return 0, fileTooLarge
	}
	op := newOperation(interrupted, in.Pid)
	defer op.end()
	flags := volume.WriteFlags{KillPriv: !privileged(&in.InHeader)}
	n, err := f.volume.CopyRange(op, volume.Ino(in.NodeId), int64(in.OffIn), volume.Ino(in.NodeIdOut), int64(in.OffOut), int64(length), flags)
	if err != nil {
		return 0, f.nodeStatus("copy_file_range", in.NodeId, err)
	}
	return uint32(n), fuse.OK
}
