// Package reference is a filesystem in memory, for tests: what POSIX says of a
// tree of files after each operation, in as little code as that takes. Tests
// run the same operations on a volume or a mount and compare.
//
//	tree := reference.New()
//	file, errno := tree.Create(tree.Root, "a", syscall.S_IFREG|0o600)
//	file.Write(0, []byte("hello"))
//
// It knows no permissions and no paths. Nothing in it is safe for several
// goroutines.
package reference

import (
	"maps"
	"slices"
	"syscall"
)

// Flags of Rename, as in renameat2(2).
const (
	NoReplace = 1
	Exchange  = 2
)

// Modes of Fallocate (FALLOC_FL_*).
const (
	KeepSize  = 0x01
	PunchHole = 0x02
	ZeroRange = 0x10
)

// Flags of SetXattr, as in setxattr(2).
const (
	XattrCreate  = 1
	XattrReplace = 2
)

// Times is an interval in nanoseconds since the epoch that a time stamp lies in.
type Times struct{ From, To int64 }

// Tree is a filesystem.
type Tree struct {
	Root *Node
	Now  Times // when the next change happens
}

// Node is a file, directory, symbolic link or socket.
type Node struct {
	Ino      uint64 // as the system under test numbers it; for the caller's use
	Mode     uint32 // with the type
	UID, GID uint32
	Mtime    Times
	Ctime    Times
	Links    int  // names
	Opens    int  // handles; for the caller's use
	Linkable bool // made without a name, so that it may get its first one

	Data   []byte
	Mapped []bool           // len(Data); false in a hole
	Target string           // of a symbolic link
	Names  map[string]*Node // of a directory, else nil
	Parent *Node            // of a directory
	Xattrs map[string]string
}

// New returns a tree with an empty root directory.
func New() *Tree {
	t := &Tree{}
	t.Root = t.node(syscall.S_IFDIR | 0o755)
	t.Root.Links = 1
	return t
}

func (t *Tree) node(mode uint32) *Node {
	n := &Node{Mode: mode, Mtime: t.Now, Ctime: t.Now, Xattrs: make(map[string]string)}
	if mode&syscall.S_IFMT == syscall.S_IFDIR {
		n.Names = make(map[string]*Node)
	}
	return n
}

// Clone returns a copy that shares nothing, and where each node of extra is in it.
func (t *Tree) Clone(extra ...*Node) (*Tree, []*Node) {
	copies := make(map[*Node]*Node)
	var clone func(n *Node) *Node
	clone = func(n *Node) *Node {
		if n == nil {
			return nil
		}
		if c := copies[n]; c != nil {
			return c
		}
		c := new(Node)
		*c = *n
		copies[n] = c
		c.Data, c.Mapped, c.Xattrs = slices.Clone(n.Data), slices.Clone(n.Mapped), maps.Clone(n.Xattrs)
		c.Parent = clone(n.Parent)
		if n.IsDir() {
			c.Names = make(map[string]*Node, len(n.Names))
			for name, child := range n.Names {
				c.Names[name] = clone(child)
			}
		}
		return c
	}
	out := &Tree{Root: clone(t.Root), Now: t.Now}
	others := make([]*Node, len(extra))
	for i, n := range extra {
		others[i] = clone(n)
	}
	return out, others
}

// IsDir says whether n is a directory.
func (n *Node) IsDir() bool { return n.Names != nil }

// IsRegular says whether n is a regular file.
func (n *Node) IsRegular() bool { return n.Mode&syscall.S_IFMT == syscall.S_IFREG }

// Below says whether n is dir or lies somewhere in it.
func (n *Node) Below(dir *Node) bool {
	for ; n != nil; n = n.Parent {
		if n == dir {
			return true
		}
	}
	return false
}

// Nlink is the link count that stat shows.
func (n *Node) Nlink() int {
	if !n.IsDir() || n.Links == 0 {
		return n.Links
	}
	count := 2
	for _, child := range n.Names {
		if child.IsDir() {
			count++
		}
	}
	return count
}

// Changed stamps an inode, Modified its content or entries too.
func (t *Tree) Changed(n *Node)  { n.Ctime = t.Now }
func (t *Tree) Modified(n *Node) { n.Mtime, n.Ctime = t.Now, t.Now }

// Create makes an inode of any kind with a new name.
func (t *Tree) Create(dir *Node, name string, mode uint32) (*Node, syscall.Errno) {
	switch {
	case dir.Links == 0:
		return nil, syscall.ENOENT
	case dir.Names[name] != nil:
		return nil, syscall.EEXIST
	}
	n := t.node(mode)
	n.inherit(dir)
	t.enter(dir, name, n)
	n.Links = 1
	return n, 0
}

// CreateUnnamed makes a regular file without a name in dir.
func (t *Tree) CreateUnnamed(dir *Node, mode uint32) *Node {
	n := t.node(mode)
	n.inherit(dir)
	n.Linkable = true
	return n
}

// inherit is what a set-group-ID directory does to what is made in it.
func (n *Node) inherit(dir *Node) {
	if dir.Mode&syscall.S_ISGID == 0 {
		return
	}
	n.GID = dir.GID
	if n.IsDir() {
		n.Mode |= syscall.S_ISGID
	}
}

func (t *Tree) enter(dir *Node, name string, n *Node) {
	dir.Names[name] = n
	if n.IsDir() {
		n.Parent = dir
	}
	t.Modified(dir)
}

// Link gives anything but a directory a further name.
func (t *Tree) Link(n, dir *Node, name string) syscall.Errno {
	switch {
	case dir.Links == 0, n.Links == 0 && !n.Linkable && dir.Names[name] == nil:
		return syscall.ENOENT
	case dir.Names[name] != nil:
		return syscall.EEXIST
	case n.IsDir():
		return syscall.EPERM
	}
	n.Linkable = false
	n.Links++
	t.Changed(n)
	t.enter(dir, name, n)
	return 0
}

// Unlink takes a name from anything but a directory.
func (t *Tree) Unlink(dir *Node, name string) syscall.Errno {
	switch n := dir.Names[name]; {
	case n == nil:
		return syscall.ENOENT
	case n.IsDir():
		return syscall.EISDIR
	default:
		t.remove(dir, name)
		return 0
	}
}

// Rmdir removes an empty directory.
func (t *Tree) Rmdir(dir *Node, name string) syscall.Errno {
	switch n := dir.Names[name]; {
	case n == nil:
		return syscall.ENOENT
	case !n.IsDir():
		return syscall.ENOTDIR
	case len(n.Names) > 0:
		return syscall.ENOTEMPTY
	default:
		t.remove(dir, name)
		return 0
	}
}

func (t *Tree) remove(dir *Node, name string) {
	n := dir.Names[name]
	delete(dir.Names, name)
	n.Links--
	t.Changed(n)
	t.Modified(dir)
}

// Rename moves a name, or swaps two.
func (t *Tree) Rename(fromDir *Node, from string, toDir *Node, to string, flags int) syscall.Errno {
	a, b := fromDir.Names[from], toDir.Names[to]
	switch {
	case toDir.Links == 0, a == nil, b == nil && flags == Exchange:
		return syscall.ENOENT
	case b != nil && flags == NoReplace:
		return syscall.EEXIST
	case a == b:
		return 0
	case a.IsDir() && toDir.Below(a), flags == Exchange && b.IsDir() && fromDir.Below(b):
		return syscall.EINVAL
	case flags == Exchange:
		t.enter(fromDir, from, b)
		t.enter(toDir, to, a)
		t.Changed(a)
		t.Changed(b)
		return 0
	case b != nil && a.IsDir() && !b.IsDir():
		return syscall.ENOTDIR
	case b != nil && !a.IsDir() && b.IsDir():
		return syscall.EISDIR
	case b != nil && len(b.Names) > 0:
		return syscall.ENOTEMPTY
	}
	if b != nil {
		t.remove(toDir, to)
	}
	delete(fromDir.Names, from)
	t.Modified(fromDir)
	t.enter(toDir, to, a)
	t.Changed(a)
	return 0
}

// Chmod sets the permission bits, with setuid, setgid and sticky.
func (t *Tree) Chmod(n *Node, mode uint32) {
	n.Mode = n.Mode&syscall.S_IFMT | mode
	t.Changed(n)
}

// Chown sets the owner. What is no directory loses setuid, and setgid where the
// group may execute.
func (t *Tree) Chown(n *Node, uid, gid uint32) {
	n.UID, n.GID = uid, gid
	if !n.IsDir() {
		n.Mode &^= syscall.S_ISUID
		if n.Mode&syscall.S_IXGRP != 0 {
			n.Mode &^= syscall.S_ISGID
		}
	}
	t.Changed(n)
}

// Write stores data at off.
func (t *Tree) Write(n *Node, off int, data []byte) {
	if len(data) == 0 {
		return
	}
	n.resize(max(len(n.Data), off+len(data)))
	copy(n.Data[off:], data)
	for i := range data {
		n.Mapped[off+i] = true
	}
	t.Modified(n)
}

// Truncate sets the size.
func (t *Tree) Truncate(n *Node, size int) {
	n.resize(size)
	t.Modified(n)
}

func (n *Node) resize(size int) {
	if grow := size - len(n.Data); grow > 0 {
		n.Data = append(n.Data, make([]byte, grow)...)
		n.Mapped = append(n.Mapped, make([]bool, grow)...)
		return
	}
	n.Data, n.Mapped = n.Data[:size], n.Mapped[:size]
}

// Fallocate changes the space of a range. No space is reserved.
func (t *Tree) Fallocate(n *Node, mode uint32, off, length int) {
	if mode&(PunchHole|ZeroRange) != 0 {
		end := min(off+length, len(n.Data))
		clear(n.Data[min(off, end):end])
		clear(n.Mapped[min(off, end):end])
	}
	if mode&KeepSize == 0 {
		n.resize(max(len(n.Data), off+length))
	}
	t.Modified(n)
}

// Copy copies a range between files or within one, holes included, and returns
// its length.
func (t *Tree) Copy(src *Node, from int, dst *Node, to, length int) (int, syscall.Errno) {
	length = max(min(length, len(src.Data)-from), 0)
	if length == 0 {
		return 0, 0
	}
	if src == dst && from < to+length && to < from+length {
		return 0, syscall.EINVAL
	}
	dst.resize(max(len(dst.Data), to+length))
	copy(dst.Data[to:], src.Data[from:from+length])
	copy(dst.Mapped[to:], src.Mapped[from:from+length])
	t.Modified(dst)
	return length, 0
}

// Read returns what a read of the range sees. It stays the node's.
func (n *Node) Read(off, length int) []byte {
	end := min(off+length, len(n.Data))
	return n.Data[min(off, end):end]
}

// SetXattr sets an extended attribute.
func (t *Tree) SetXattr(n *Node, name, value string, flags int) syscall.Errno {
	_, exists := n.Xattrs[name]
	switch {
	case exists && flags == XattrCreate:
		return syscall.EEXIST
	case !exists && flags == XattrReplace:
		return syscall.ENODATA
	}
	n.Xattrs[name] = value
	t.Changed(n)
	return 0
}

// RemoveXattr removes an extended attribute.
func (t *Tree) RemoveXattr(n *Node, name string) syscall.Errno {
	if _, exists := n.Xattrs[name]; !exists {
		return syscall.ENODATA
	}
	delete(n.Xattrs, name)
	t.Changed(n)
	return 0
}
