// Package volume is the data path of a DeFS volume.
package volume

import (
	"context"
	"log/slog"
	"time"
)

type Ino uint64

// RootIno is the inode number of the root directory.
const RootIno Ino = 1

// Options configures the local part of a volume.
type Options struct {
	Dir             string   // local state of this device: journal/ and meta/ are made below it
	Key             [32]byte // seals everything under Dir
	Device          uint16   // slot of this device; the upper 16 bits of the inode numbers it makes
	RootUID         uint32   // owner of the root directory of a new volume
	RootGID         uint32
	JournalMaxBytes int64 // hard cap of dirty bytes; 0 = the store's default
	CleanMaxBytes   int64 // bound of the clean cache; 0 = the store's default
	SegmentBytes    int64 // 0 = the store's default
	NoAtime         bool  // never record access times; else as relatime
	Clock           func() time.Time
	Logger          *slog.Logger
}

type Volume struct{}

func Open(ctx context.Context, o Options) (*Volume, error) { return nil, nil }
func (v *Volume) Close(ctx context.Context) error          { return nil }
func (v *Volume) Sync(ctx context.Context) error           { return nil }

// SetValid bits say which fields of a SetAttr are to be set.
type SetValid uint32

const (
	SetMode SetValid = 1 << iota
	SetUID
	SetGID
	SetSize
	SetAtime // Atime is set to the given time
	SetMtime
	SetCtime
	SetAtimeNow // Atime is set to the volume's clock
	SetMtimeNow
)

// SetAttr is a change of attributes.
type SetAttr struct {
	Valid               SetValid
	Mode, UID, GID      uint32 // Mode: permission bits with setuid, setgid, sticky; the type is kept
	Size                uint64
	Atime, Mtime, Ctime int64 // nanoseconds since the epoch
	KillPriv            bool  // a truncation by a caller without CAP_FSETID: clear setuid and setgid
}

// Attr is what stat shows of an inode.
type Attr struct {
	Ino                        Ino
	Mode                       uint32 // S_IFMT type and permission bits
	UID, GID, Rdev, Nlink      uint32
	Size                       uint64
	Blocks                     uint64 // 512-byte units of allocated content
	Atime, Mtime, Ctime, Btime int64  // nanoseconds since the epoch
	Gen                        uint32 // generation; inode numbers are never reused
}

// Create describes a new inode.
type Create struct {
	Mode     uint32 // S_IFMT type and permission bits, before the umask
	Umask    uint32 // applied unless the parent has a default ACL
	UID, GID uint32
	Rdev     uint32
	Target   string // of a symbolic link
	Excl     bool   // a regular file that exists is an error; else it is returned
}

type RenameFlags uint32

const (
	RenameNoReplace RenameFlags = 1 // RENAME_NOREPLACE
	RenameExchange  RenameFlags = 2 // RENAME_EXCHANGE
)

// WriteFlags modify a write, a fallocate or a range copy.
type WriteFlags struct {
	KillPriv bool // caller without CAP_FSETID: clear setuid, and setgid where the group may execute
	Append   bool // write at the end of the file, whatever the offset
}

// Fallocate modes (FALLOC_FL_*).
const (
	FallocKeepSize  = 0x01
	FallocPunchHole = 0x02
	FallocZeroRange = 0x10
)

// Whence of Seek.
const (
	SeekData = 3
	SeekHole = 4
)

// Dirent is one entry of a directory.
type Dirent struct {
	Ino    Ino
	Type   uint8 // DT_*
	Cookie uint64
	Name   string
}

// Xattr flags of SetXattr.
const (
	XattrCreate  = 1
	XattrReplace = 2
)

// Stat is what statfs shows.
type Stat struct {
	BlockBytes          uint32
	Blocks, Free, Avail uint64 // in BlockBytes
	Files, FilesFree    uint64
	NameMax             uint32
}

func (v *Volume) Lookup(ctx context.Context, parent Ino, name string) (Attr, error) {
	return Attr{}, nil
}
func (v *Volume) GetAttr(ctx context.Context, ino Ino) (Attr, error)            { return Attr{}, nil }
func (v *Volume) SetAttr(ctx context.Context, ino Ino, s SetAttr) (Attr, error) { return Attr{}, nil }
func (v *Volume) Create(ctx context.Context, parent Ino, name string, c Create) (Attr, error) {
	return Attr{}, nil
}
func (v *Volume) CreateTmp(ctx context.Context, parent Ino, c Create) (Attr, error) {
	return Attr{}, nil
}
func (v *Volume) Link(ctx context.Context, ino, parent Ino, name string) (Attr, error) {
	return Attr{}, nil
}
func (v *Volume) Unlink(ctx context.Context, parent Ino, name string) error { return nil }
func (v *Volume) Rmdir(ctx context.Context, parent Ino, name string) error  { return nil }
func (v *Volume) Rename(ctx context.Context, fromDir Ino, from string, toDir Ino, to string, flags RenameFlags) error {
	return nil
}
func (v *Volume) Readlink(ctx context.Context, ino Ino) (string, error) { return "", nil }

// Acquire counts n references to an inode: one for each lookup count of the kernel and each open handle.
func (v *Volume) Acquire(ino Ino, n uint64) {}

// Release gives n references back.
func (v *Volume) Release(ino Ino, n uint64) {}

func (v *Volume) Read(ctx context.Context, ino Ino, off int64, dst []byte) (int, error) {
	return 0, nil
}
func (v *Volume) Write(ctx context.Context, ino Ino, off int64, data []byte, f WriteFlags) (int, error) {
	return 0, nil
}
func (v *Volume) Fsync(ctx context.Context, ino Ino) error { return nil }
func (v *Volume) Fallocate(ctx context.Context, ino Ino, mode uint32, off, n int64, f WriteFlags) error {
	return nil
}
func (v *Volume) Seek(ctx context.Context, ino Ino, off int64, whence int) (int64, error) {
	return 0, nil
}
func (v *Volume) CopyRange(ctx context.Context, src Ino, srcOff int64, dst Ino, dstOff, n int64, f WriteFlags) (int64, error) {
	return 0, nil
}

// ReadDir calls fn for each entry with a cookie above after, in cookie order, until fn returns false.
// Real cookies are at least 3; "." and ".." are the caller's, with cookies 1 and 2.
func (v *Volume) ReadDir(ctx context.Context, ino Ino, after uint64, fn func(Dirent) bool) error {
	return nil
}

// Parent returns the directory that holds directory ino; the root is its own parent.
func (v *Volume) Parent(ctx context.Context, ino Ino) (Ino, error) { return 0, nil }

func (v *Volume) GetXattr(ctx context.Context, ino Ino, name string) ([]byte, error) { return nil, nil }
func (v *Volume) SetXattr(ctx context.Context, ino Ino, name string, value []byte, flags uint32) error {
	return nil
}
func (v *Volume) ListXattr(ctx context.Context, ino Ino) ([]string, error)    { return nil, nil }
func (v *Volume) RemoveXattr(ctx context.Context, ino Ino, name string) error { return nil }
func (v *Volume) StatFS(ctx context.Context) (Stat, error)                    { return Stat{}, nil }
