package volume

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
)

// Kind says what went wrong, in the file system's terms. Errno maps it, once, to the number a program sees.
type Kind uint8

// The kinds of error. Every error that the volume returns to a caller carries one.
const (
	IO           Kind = iota // local or remote storage failed; the message says which
	NotExist                 // no such name, or the parent is gone
	Exist                    // the name is taken
	NotDir                   // a directory was needed
	IsDir                    // anything but a directory was needed
	NotEmpty                 // the directory holds entries
	Invalid                  // an argument that no state could accept
	NameTooLong              // a name over 255 bytes or a symlink target over 4,095
	NoSpace                  // the journal is at its hard cap
	ReadOnly                 // a flush failed earlier, or the volume was opened read-only
	FileTooLarge             // past 8 EiB - 1
	TooBig                   // an extended attribute value over 64 KiB
	NoAttr                   // no such extended attribute
	Range                    // the caller's buffer or name length is out of range
	Stale                    // an inode number that no longer exists
	Interrupted              // the caller's context was cancelled
	NotSupported             // an operation this file system does not have
	Permission               // the operation is never allowed on this object
	CrossDevice              // a link or rename out of the volume
	Loop                     // a symbolic link where none may be
	TooManyLinks             // the link count is at its limit
	NoData                   // a seek past the last data or hole
	TimedOut                 // the peers did not answer in time; nothing is lost
)

var kinds = [...]struct {
	text  string
	errno syscall.Errno
}{
	IO:           {"input/output error", syscall.EIO},
	NotExist:     {"no such entry", syscall.ENOENT},
	Exist:        {"entry exists", syscall.EEXIST},
	NotDir:       {"not a directory", syscall.ENOTDIR},
	IsDir:        {"is a directory", syscall.EISDIR},
	NotEmpty:     {"directory not empty", syscall.ENOTEMPTY},
	Invalid:      {"invalid argument", syscall.EINVAL},
	NameTooLong:  {"name too long", syscall.ENAMETOOLONG},
	NoSpace:      {"no space left in the journal", syscall.ENOSPC},
	ReadOnly:     {"volume is read-only", syscall.EROFS},
	FileTooLarge: {"file too large", syscall.EFBIG},
	TooBig:       {"attribute value too large", syscall.E2BIG},
	NoAttr:       {"no such attribute", syscall.ENODATA},
	Range:        {"out of range", syscall.ERANGE},
	Stale:        {"inode no longer exists", syscall.ESTALE},
	Interrupted:  {"interrupted", syscall.EINTR},
	NotSupported: {"not supported", syscall.EOPNOTSUPP},
	Permission:   {"operation not permitted", syscall.EPERM},
	CrossDevice:  {"crosses volumes", syscall.EXDEV},
	Loop:         {"is a symbolic link", syscall.ELOOP},
	TooManyLinks: {"too many links", syscall.EMLINK},
	NoData:       {"no data or hole past this offset", syscall.ENXIO},
	TimedOut:     {"timed out", syscall.ETIMEDOUT},
}

// String names the kind in plain words.
func (k Kind) String() string {
	if int(k) < len(kinds) {
		return kinds[k].text
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Error is an operation that failed: what was tried, on which inode, and what kind of failure it was.
// It never holds a file's name.
type Error struct {
	Op   string
	Kind Kind
	Ino  Ino   // 0 when no inode is concerned
	Err  error // the cause, or nil
}

// Error formats as "op inode N: kind: cause".
func (e *Error) Error() string {
	s := e.Op
	if e.Ino != 0 {
		s = fmt.Sprintf("%s inode %d", s, uint64(e.Ino))
	}
	s += ": " + e.Kind.String()
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes errors.Is(err, NotExist) and the like work on every error of the volume.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// Error makes a Kind usable as a target of errors.Is.
func (k Kind) Error() string { return k.String() }

// KindOf returns the kind that err carries; IO for an error that carries none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	return IO
}

// Errno maps an error to the number that a program sees; 0 for nil.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if k := KindOf(err); int(k) < len(kinds) {
		return kinds[k].errno
	}
	return syscall.EIO
}

// wrap gives an error its operation, inode and kind; nil stays nil.
func wrap(op string, ino Ino, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := err.(*Error); ok {
		return e
	}
	if k, ok := err.(Kind); ok {
		return &Error{Op: op, Kind: k, Ino: ino}
	}
	kind := KindOf(err)
	switch {
	case kind != IO:
	case errors.Is(err, cache.ErrNoSpace), errors.Is(err, syscall.ENOSPC):
		kind = NoSpace
	case errors.Is(err, cache.ErrReadOnly), errors.Is(err, metastore.ErrFailed):
		kind = ReadOnly
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		kind = Interrupted
	}
	return &Error{Op: op, Kind: kind, Ino: ino, Err: err}
}
