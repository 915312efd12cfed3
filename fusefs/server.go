package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/defs-fs/defs/volume"
)

// maxWriteBytes bounds one read or write request; the kernel takes no larger ones by default.
const maxWriteBytes = 1 << 20

// capabilities are asked of the kernel beside go-fuse's defaults.
const capabilities = fuse.CAP_DONT_MASK | // default ACLs replace the umask, so the mask is applied here
	fuse.CAP_HANDLE_KILLPRIV_V2 | // else every write asks for security.capability first
	fuse.CAP_SETXATTR_EXT | // tells when setting an ACL has to clear set-group-ID
	fuse.CAP_READDIRPLUS_AUTO |
	fuse.CAP_ASYNC_DIO |
	fuse.CAP_EXPORT_SUPPORT // open_by_handle_at and NFS

// Server is a mounted filesystem. Its methods may be called by any goroutine.
type Server struct {
	mountpoint string
	device     string // MAJOR:MINOR of the mount; "" if unknown
	raw        *fuse.Server
	logger     *slog.Logger

	unmountMu sync.Mutex // one Unmount or Detach at a time

	finish sync.Once
	done   chan struct{} // closed when the last request has been answered, or that was given up
	err    error         // why it was given up; set before done is closed
}

// Mount shows o.Volume at o.Mountpoint and returns when the mount answers. It cleans a stale mount of an earlier
// process first. Nothing is mounted when ctx has ended already.
func Mount(ctx context.Context, o Options) (*Server, error) {
	if o.Volume == nil {
		return nil, errors.New("mount: no volume given")
	}
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	return MountRaw(ctx, newFilesystem(o), o)
}

// MountRaw mounts any raw filesystem with the same options towards the kernel as Mount; o.Volume is not used.
// Benchmarks compare with it.
func MountRaw(ctx context.Context, raw fuse.RawFileSystem, o Options) (*Server, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	if _, err := CleanStale(o.Mountpoint); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	if info, err := os.Stat(o.Mountpoint); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	} else if !info.IsDir() {
		return nil, fmt.Errorf("mount: %s is not a directory", o.Mountpoint)
	}

	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	connection, err := fuse.NewServer(raw, o.Mountpoint, mountOptions(o))
	if err != nil && o.AllowOther && os.Geteuid() != 0 && !usersMayAllowOther() {
		err = errors.Join(err, fmt.Errorf("an ordinary user may not let others in (allow_other): an administrator allows it by a line %s in %s", allowOtherLine, fuseConfig))
	}
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", o.Mountpoint, err)
	}
	s := &Server{mountpoint: o.Mountpoint, raw: connection, logger: o.Logger, done: make(chan struct{})}
	go func() {
		connection.Serve()
		s.end(nil)
	}()
	// The mount table tells the device, not the mount: a process that is killed while it waits for an answer of its
	// own mount never ends, because the connection that it would have to answer stays open until it has ended.
	if s.device, err = deviceOf(o.Mountpoint); err != nil {
		o.Logger.Warn("the mount is not in the mount table", "err", err)
		return s, nil
	}
	s.raiseReadAhead(o.ReadAheadKiB)
	return s, nil
}

// end closes done, once.
func (s *Server) end(err error) {
	s.finish.Do(func() {
		s.err = err
		close(s.done)
	})
}

const (
	fuseConfig     = "/etc/fuse.conf"
	allowOtherLine = "user_allow_other"
)

// usersMayAllowOther says whether fusermount3 lets mounts of ordinary users be open to others.
func usersMayAllowOther() bool {
	config, err := os.ReadFile(fuseConfig)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(config)) {
		if strings.TrimSpace(line) == allowOtherLine {
			return true
		}
	}
	return false
}

// checksPermissions says whether the kernel checks permission bits and ACLs ("default_permissions"). A mount that
// only root can enter has nothing to check but execution, which Access does, and saves much: the kernel reads a
// directory's attributes again before the check that follows each change of the directory, one more request for
// each file created, renamed or removed.
func checksPermissions(o Options) bool { return o.AllowOther || os.Geteuid() != 0 }

func mountOptions(o Options) *fuse.MountOptions {
	flags := uintptr(syscall.MS_MGC_VAL) // zero would mean nosuid,nodev; this value the kernel ignores
	var words []string
	root := os.Geteuid() == 0
	if checksPermissions(o) {
		words = append(words, "default_permissions")
	}
	for _, option := range []struct {
		set  bool
		flag uintptr
		word string
	}{
		{o.ReadOnly, syscall.MS_RDONLY, "ro"},
		{o.NoAtime, syscall.MS_NOATIME, "noatime"},
		{o.NoSuid, syscall.MS_NOSUID, "nosuid"},
		{o.NoDev, syscall.MS_NODEV, "nodev"},
		{o.NoExec, syscall.MS_NOEXEC, "noexec"},
	} {
		switch {
		case !option.set:
		case root:
			flags |= option.flag
		default:
			words = append(words, option.word)
		}
	}
	return &fuse.MountOptions{
		AllowOther:               o.AllowOther,
		Options:                  words,
		FsName:                   o.FsName,
		Name:                     "defs",
		MaxWrite:                 maxWriteBytes,
		MaxBackground:            32, // read-ahead requests in flight; each holds up to a MiB
		ExplicitDataCacheControl: true,
		EnableSymlinkCaching:     true,
		EnableAcl:                checksPermissions(o), // without: ACLs are stored and inherited, but not cached
		DisableSplice:            true,                 // the bytes are in memory
		DirectMountStrict:        root,                 // an ordinary user goes through fusermount3
		DirectMountFlags:         flags,
		ExtraCapabilities:        capabilities,
		Logger:                   slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn),
	}
}

// raiseReadAhead raises the kernel's read-ahead, which starts at 128 KiB.
func (s *Server) raiseReadAhead(kib int) {
	file := filepath.Join("/sys/class/bdi", s.device, "read_ahead_kb")
	if err := os.WriteFile(file, []byte(strconv.Itoa(kib)), 0); err != nil {
		s.logger.Debug("read-ahead stays at the kernel's default: only root can raise it", "err", err)
	}
}

// InvalidateContent makes the kernel forget the attributes of ino and its cached bytes from off, for length bytes
// (0: to the end). Call it after a change that did not come through this mount. It must not be called while
// serving a request for the same inode.
func (s *Server) InvalidateContent(ino volume.Ino, off, length int64) error {
	return invalidated(s.raw.InodeNotify(uint64(ino), off, length))
}

// InvalidateEntry makes the kernel forget what it knows of a name, that it does not exist included. Call it after
// a change of the name that did not come through this mount, and InvalidateContent for the parent.
func (s *Server) InvalidateEntry(parent volume.Ino, name string) error {
	return invalidated(s.raw.EntryNotify(uint64(parent), name))
}

// invalidated treats "nothing cached" as success.
func invalidated(status fuse.Status) error {
	if status.Ok() || status == fuse.ENOENT {
		return nil
	}
	return fmt.Errorf("invalidate: %w", syscall.Errno(status))
}
