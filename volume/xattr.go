package volume

import (
	"bytes"
	"context"
	"errors"
	"strings"

	"github.com/defs-fs/defs/metastore"
)

// Flags of SetXattr.
const (
	XattrCreate  = 1 // XATTR_CREATE: fail where the attribute exists
	XattrReplace = 2 // XATTR_REPLACE: fail where it does not
)

const (
	xattrValueMaxBytes = 64 << 10
	xattrCapability    = "security.capability"
	xattrAccessACL     = "system.posix_acl_access"
	xattrDefaultACL    = "system.posix_acl_default"
	// xattrOwnPrefix is the name space of attributes that the volume computes or acts upon. They are never listed,
	// so that tools which copy attributes leave them alone.
	xattrOwnPrefix = "user.defs."
)

// virtualAttribute is one attribute below xattrOwnPrefix.
type virtualAttribute struct {
	get func(ctx context.Context, ino Ino) ([]byte, error)     // a Kind such as NoAttr, or another error
	set func(ctx context.Context, ino Ino, value []byte) error // nil: read-only; a nil value removes
}

// checkXattrName accepts the names that a local filesystem takes: those of a known namespace.
func checkXattrName(name string) error {
	switch {
	case name == "" || len(name) > metastore.NameBytesMax || strings.IndexByte(name, 0) >= 0:
		return Range
	case name == xattrAccessACL || name == xattrDefaultACL:
		return nil
	}
	for _, namespace := range []string{"user.", "trusted.", "security."} {
		if rest, ok := strings.CutPrefix(name, namespace); ok {
			if rest == "" {
				return Invalid
			}
			return nil
		}
	}
	return NotSupported
}

// GetXattr returns an extended attribute's value; NoAttr where there is none.
func (v *Volume) GetXattr(ctx context.Context, ino Ino, name string) ([]byte, error) {
	const op = "getxattr"
	if err := checkXattrName(name); err != nil {
		return nil, wrap(op, ino, err)
	}
	n, err := v.existing(ino)
	if err != nil {
		return nil, wrap(op, ino, err)
	}
	if strings.HasPrefix(name, xattrOwnPrefix) {
		a, ok := v.virtual[name]
		if !ok {
			return nil, wrap(op, ino, NoAttr)
		}
		value, err := a.get(ctx, ino)
		return value, wrap(op, ino, err)
	}
	if n.Flags&flagXattrs == 0 {
		return nil, wrap(op, ino, NoAttr)
	}
	value, err := v.db.Xattr(ino, name)
	if errors.Is(err, metastore.ErrNotFound) {
		err = NoAttr
	}
	return value, wrap(op, ino, err)
}

// SetXattr sets an extended attribute of up to 64 KiB. Setting a POSIX ACL changes the mode with it.
func (v *Volume) SetXattr(ctx context.Context, ino Ino, name string, value []byte, flags uint32) error {
	const op = "setxattr"
	if err := checkXattrName(name); err != nil {
		return wrap(op, ino, err)
	}
	switch {
	case len(value) > xattrValueMaxBytes:
		return wrap(op, ino, TooBig)
	case flags&^(XattrCreate|XattrReplace) != 0 || flags == XattrCreate|XattrReplace:
		return wrap(op, ino, Invalid)
	}
	if strings.HasPrefix(name, xattrOwnPrefix) {
		return wrap(op, ino, v.setVirtual(ctx, ino, name, append([]byte{}, value...), flags))
	}
	if err := v.waitRoom(ctx, recordBytes+len(value)); err != nil {
		return wrap(op, ino, err)
	}
	_, err := v.commit(func(t *tx) error {
		n, err := t.inode(ino)
		if err == NotExist {
			err = Stale
		}
		if err != nil {
			return err
		}
		exists, err := t.hasXattr(ino, &n, name)
		switch {
		case err != nil:
			return err
		case exists && flags == XattrCreate:
			return Exist
		case !exists && flags == XattrReplace:
			return NoAttr
		}
		n.Ctime = t.now
		switch name {
		case xattrAccessACL:
			err = t.setAccessACL(ino, &n, value)
		case xattrDefaultACL:
			err = t.setDefaultACL(ino, &n, value)
		default:
			t.putXattr(ino, &n, name, value)
		}
		if err != nil {
			return err
		}
		t.putInode(ino, n)
		return nil
	})
	return wrap(op, ino, err)
}

func (v *Volume) setVirtual(ctx context.Context, ino Ino, name string, value []byte, flags uint32) error {
	a, ok := v.virtual[name]
	if !ok || a.set == nil {
		return Permission
	}
	if flags != 0 {
		switch _, err := a.get(ctx, ino); {
		case err == nil && flags == XattrCreate:
			return Exist
		case err != nil && flags == XattrReplace:
			return err
		}
	}
	return a.set(ctx, ino, value)
}

// putXattr stores a copy of value.
func (t *tx) putXattr(ino Ino, n *metastore.Inode, name string, value []byte) {
	n.Flags |= flagXattrs
	t.PutXattr(ino, name, bytes.Clone(value))
}

func (t *tx) hasXattr(ino Ino, n *metastore.Inode, name string) (bool, error) {
	if n.Flags&flagXattrs == 0 {
		return false, nil
	}
	_, err := t.v.db.Xattr(ino, name)
	if errors.Is(err, metastore.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// removeXattr removes an attribute where it exists.
func (t *tx) removeXattr(ino Ino, n *metastore.Inode, name string) error {
	exists, err := t.hasXattr(ino, n, name)
	if exists {
		t.DeleteXattr(ino, name)
	}
	return err
}

// ListXattr returns the names of an inode's attributes, sorted.
func (v *Volume) ListXattr(ctx context.Context, ino Ino) ([]string, error) {
	n, err := v.existing(ino)
	if err != nil || n.Flags&flagXattrs == 0 {
		return nil, wrap("listxattr", ino, err)
	}
	var names []string
	err = v.db.Xattrs(ino, func(name string, _ []byte) bool {
		if !strings.HasPrefix(name, xattrOwnPrefix) {
			names = append(names, name)
		}
		return true
	})
	return names, wrap("listxattr", ino, err)
}

// RemoveXattr removes an attribute; NoAttr where there is none. An ACL that is not there is removed all the same: it
// is only the mode in another form.
func (v *Volume) RemoveXattr(ctx context.Context, ino Ino, name string) error {
	const op = "removexattr"
	if err := checkXattrName(name); err != nil {
		return wrap(op, ino, err)
	}
	if strings.HasPrefix(name, xattrOwnPrefix) {
		return wrap(op, ino, v.setVirtual(ctx, ino, name, nil, 0))
	}
	_, err := v.commit(func(t *tx) error {
		n, err := t.inode(ino)
		if err == NotExist {
			err = Stale
		}
		if err != nil {
			return err
		}
		exists, err := t.hasXattr(ino, &n, name)
		switch {
		case err != nil:
			return err
		case exists:
			t.DeleteXattr(ino, name)
		case name != xattrAccessACL && name != xattrDefaultACL:
			return NoAttr
		}
		n.Ctime = t.now
		t.putInode(ino, n)
		return nil
	})
	return wrap(op, ino, err)
}

// setAccessACL stores an access ACL and makes the mode agree; one that says no more than a mode is kept as the mode.
func (t *tx) setAccessACL(ino Ino, n *metastore.Inode, value []byte) error {
	if isSymlink(n.Mode) {
		return NotSupported
	}
	a, err := parseACL(value)
	if err != nil {
		return err
	}
	if len(a) == 0 {
		return t.removeXattr(ino, n, xattrAccessACL)
	}
	n.Mode = n.Mode&^0o777 | a.mode()
	if a.minimal() {
		return t.removeXattr(ino, n, xattrAccessACL)
	}
	t.putXattr(ino, n, xattrAccessACL, value)
	return nil
}

// setDefaultACL stores what new entries of a directory inherit.
func (t *tx) setDefaultACL(ino Ino, n *metastore.Inode, value []byte) error {
	a, err := parseACL(value)
	if err != nil {
		return err
	}
	if len(a) == 0 {
		return t.removeXattr(ino, n, xattrDefaultACL)
	}
	if !isDir(n.Mode) {
		return Permission
	}
	t.putXattr(ino, n, xattrDefaultACL, value)
	return nil
}

// chmodACL makes an access ACL agree with a mode just set.
func (t *tx) chmodACL(ino Ino, n *metastore.Inode) error {
	a, err := t.acl(ino, n, xattrAccessACL)
	if err != nil || a == nil {
		return err
	}
	a.setMode(n.Mode)
	t.putXattr(ino, n, xattrAccessACL, a.marshal())
	return nil
}

// inheritACL gives a new inode what its directory's default ACL says; without one the umask applies.
func (t *tx) inheritACL(dirIno Ino, dir *metastore.Inode, ino Ino, n *metastore.Inode, umask uint32) error {
	a, err := t.acl(dirIno, dir, xattrDefaultACL)
	if err != nil {
		return err
	}
	if a == nil {
		n.Mode &^= umask & 0o777
		return nil
	}
	if isDir(n.Mode) {
		t.putXattr(ino, n, xattrDefaultACL, a.marshal())
	}
	a.limit(n.Mode)
	n.Mode = n.Mode&^0o777 | a.mode()
	if !a.minimal() {
		t.putXattr(ino, n, xattrAccessACL, a.marshal())
	}
	return nil
}

// acl reads a stored ACL; nil where there is none.
func (t *tx) acl(ino Ino, n *metastore.Inode, name string) (acl, error) {
	if n.Flags&flagXattrs == 0 {
		return nil, nil
	}
	b, err := t.v.db.Xattr(ino, name)
	if errors.Is(err, metastore.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseACL(b)
}
