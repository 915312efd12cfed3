package volume

import (
	"context"

	"github.com/defs-fs/defs/metastore"
)

// Dirent is one entry of a directory: inode number, DT_* type, cookie, name.
type Dirent = metastore.Dirent

// ReadDir calls fn for each entry with a cookie above after, in the order of cookies, until fn returns false.
// Cookies are at least 3 and stable: an entry that stays during a listing is met once, whatever comes and goes
// around it. "." and "..", with cookies 1 and 2, are the caller's.
func (v *Volume) ReadDir(ctx context.Context, ino Ino, after uint64, fn func(Dirent) bool) error {
	const op = "readdir"
	n, err := v.existing(ino)
	if err != nil {
		return wrap(op, ino, err)
	}
	if !isDir(n.Mode) {
		return wrap(op, ino, NotDir)
	}
	if err := v.db.ReadDir(ino, after, fn); err != nil {
		return wrap(op, ino, err)
	}
	v.accessed(ino, &n)
	return nil
}
