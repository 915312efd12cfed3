package integration

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/internal/reference"
)

// op is one operation of the model test, or one disturbance. It names what it
// works on, not what it expects: any list of operations can be run, so that
// a failing one can be made shorter. Operations on a handle that is not open do
// nothing.
type op struct {
	Kind    string `json:"k"`
	Path    string `json:"p,omitempty"`
	Path2   string `json:"p2,omitempty"` // the new name of link and rename, the target of symlink, the name of an attribute
	Handle  int    `json:"h,omitempty"`
	Handle2 int    `json:"h2,omitempty"` // the destination of copy
	Off     int    `json:"o,omitempty"`
	Off2    int    `json:"o2,omitempty"`
	Len     int    `json:"n,omitempty"`
	Flags   int    `json:"f,omitempty"`
	Mode    uint32 `json:"m,omitempty"`
	Seed    uint64 `json:"s,omitempty"` // of content
	Threads [][]op `json:"t,omitempty"` // of "parallel": lists that do not touch the same names, handles or bytes
}

// handles is how many files may be open at a time: the lower half for
// operations one after the other, two for each thread of "parallel" above.
const (
	handles    = 16
	ownHandles = 8
	threadsMax = 3
)

// result is what a program sees of an operation.
type result struct {
	errno    syscall.Errno
	n        int
	data     []byte
	text     string
	stat     *unix.Stat_t
	ino      uint64          // of what was made
	during   reference.Times // when it ran
	parallel [][]result
}

// content returns n bytes. Some repeat, so that they are compressed or found
// again.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	if seed%4 == 0 {
		for i := range b {
			b[i] = byte(i>>3) ^ byte(seed)
		}
		return b
	}
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

// world is the reference: a tree, and what programs have open.
type world struct {
	tree *reference.Tree
	open [handles]struct {
		node *reference.Node
		end  bool // O_APPEND
	}
}

func (w *world) clone() *world {
	nodes := make([]*reference.Node, handles)
	for i, h := range w.open {
		nodes[i] = h.node
	}
	c := &world{open: w.open}
	c.tree, nodes = w.tree.Clone(nodes...)
	for i, n := range nodes {
		c.open[i].node = n
	}
	return c
}

// closeAll is what the end of a mount does to handles.
func (w *world) closeAll() {
	for i := range w.open {
		w.open[i].node = nil
	}
}

// walk follows a path. dir and name are where a new entry would be.
func (w *world) walk(p string) (dir *reference.Node, name string, n *reference.Node, errno syscall.Errno) {
	n = w.tree.Root
	if p == "." {
		return nil, "", n, 0
	}
	for part := range strings.SplitSeq(p, "/") {
		switch {
		case n == nil, n.Target != "": // all links lead to what is not there
			return nil, "", nil, syscall.ENOENT
		case !n.IsDir():
			return nil, "", nil, syscall.ENOTDIR
		}
		dir, name, n = n, part, n.Names[part]
	}
	return dir, name, n, 0
}

// find returns what is at a path; with follow a link's target, which is missing.
func (w *world) find(p string, follow bool) (*reference.Node, syscall.Errno) {
	_, _, n, errno := w.walk(p)
	if errno == 0 && (n == nil || follow && n.Target != "") {
		errno = syscall.ENOENT
	}
	return n, errno
}

// at returns where an entry is, or would be.
func (w *world) at(p string) (dir *reference.Node, name string, errno syscall.Errno) {
	dir, name, _, errno = w.walk(p)
	return dir, name, errno
}

// apply does to the reference what the operation did to the mount, and says
// how what the program saw differs from what it should have seen.
func (w *world) apply(o op, got result) error {
	if o.Kind == "parallel" {
		for i, list := range o.Threads {
			for j, part := range list {
				r := got.parallel[i][j]
				r.during = got.during // others may have been later
				if err := w.apply(part, r); err != nil {
					return fmt.Errorf("thread %d, operation %d: %w", i, j, err)
				}
			}
		}
		if got.errno != 0 {
			return fmt.Errorf("flush: %w", got.errno)
		}
		return nil
	}
	w.tree.Now = got.during
	want, err := w.expect(o, got)
	switch {
	case err != nil:
		return err
	case got.errno != want.errno:
		return fmt.Errorf("error %d (%v), want %d (%v)", got.errno, got.errno, want.errno, want.errno)
	case got.n != want.n:
		return fmt.Errorf("result %d, want %d", got.n, want.n)
	case got.text != want.text:
		return fmt.Errorf("result %q, want %q", got.text, want.text)
	}
	return sameBytes(got.data, want.data)
}

func sameBytes(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	return fmt.Errorf("%d bytes, want %d; they differ from byte %d on: %x…, want %x…", len(got), len(want), at,
		got[at:min(at+8, len(got))], want[at:min(at+8, len(want))])
}

func (w *world) expect(o op, got result) (want result, err error) {
	t := w.tree
	h := &w.open[o.Handle]
	if onHandle[o.Kind] && h.node == nil {
		return want, nil
	}
	var dir, n *reference.Node
	var name string
	switch o.Kind {
	case "open":
		want.errno = w.openPath(o, got)
	case "tmpfile":
		if n, want.errno = w.find(o.Path, true); want.errno != 0 {
			break
		}
		if !n.IsDir() {
			want.errno = syscall.ENOTDIR
			break
		}
		h.node, h.end = t.CreateUnnamed(n, syscall.S_IFREG|o.Mode), false
		h.node.Ino = got.ino
		h.node.Linkable = o.Flags&unix.O_EXCL == 0
	case "close":
		h.node = nil
	case "write":
		at := o.Off
		if h.end {
			at = len(h.node.Data)
		}
		want.n = o.Len
		t.Write(h.node, at, content(o.Seed, o.Len))
	case "read":
		want.data = h.node.Read(o.Off, o.Len)
	case "mmap":
		want.data = h.node.Read(o.Off, o.Len)
		if len(want.data) > 0 {
			// The kernel stamps the file at the first change of a page, with a coarse clock.
			t.Now.From -= int64(20 * time.Millisecond)
			want.data = bytes.Clone(want.data)
			t.Write(h.node, o.Off, content(o.Seed, len(want.data)))
		}
	case "ftruncate":
		t.Truncate(h.node, o.Len)
	case "fallocate":
		t.Fallocate(h.node, o.Mode, o.Off, o.Len)
	case "seek":
		return got, legalSeek(h.node.Data, o, got)
	case "copy":
		h2 := w.open[o.Handle2]
		if h2.node == nil {
			break
		}
		if h2.end {
			want.errno = syscall.EBADF
			break
		}
		want.n, want.errno = t.Copy(h.node, o.Off, h2.node, o.Off2, o.Len)
	case "fsync", "fdatasync":
	case "fstat":
		return got, w.sameStat(h.node, got.stat)
	case "linkhandle":
		if dir, name, want.errno = w.at(o.Path); want.errno == 0 {
			want.errno = t.Link(h.node, dir, name)
		}
	case "truncate":
		if n, want.errno = w.find(o.Path, true); want.errno != 0 {
			break
		}
		switch {
		case n.IsDir():
			want.errno = syscall.EISDIR
		case !n.IsRegular():
			want.errno = syscall.EINVAL
		default:
			t.Truncate(n, o.Len)
		}
	case "mkdir", "symlink", "mknod":
		if dir, name, want.errno = w.at(o.Path); want.errno != 0 {
			break
		}
		mode := map[string]uint32{"mkdir": syscall.S_IFDIR, "symlink": syscall.S_IFLNK, "mknod": syscall.S_IFSOCK}[o.Kind] | o.Mode
		if o.Kind == "mkdir" {
			mode &^= syscall.S_ISUID | syscall.S_ISGID // the kernel takes them out
		}
		if n, want.errno = t.Create(dir, name, mode); want.errno == 0 {
			n.Ino, n.Target = got.ino, o.Path2
		}
	case "unlink":
		if dir, name, want.errno = w.at(o.Path); want.errno == 0 {
			want.errno = t.Unlink(dir, name)
		}
	case "rmdir":
		if dir, name, want.errno = w.at(o.Path); want.errno == 0 {
			want.errno = t.Rmdir(dir, name)
		}
	case "link":
		if n, want.errno = w.find(o.Path, false); want.errno != 0 {
			break
		}
		if dir, name, want.errno = w.at(o.Path2); want.errno == 0 {
			want.errno = t.Link(n, dir, name)
		}
	case "rename":
		want.errno = w.rename(o)
	case "fsyncdir":
		if n, want.errno = w.find(o.Path, true); want.errno == 0 && !n.IsDir() {
			want.errno = syscall.ENOTDIR
		}
	case "readdir":
		if n, want.errno = w.find(o.Path, true); want.errno != 0 {
			break
		}
		if !n.IsDir() {
			want.errno = syscall.ENOTDIR
			break
		}
		want.text = listing(n)
	case "readlink":
		if n, want.errno = w.find(o.Path, false); want.errno == 0 && n.Target == "" {
			want.errno = syscall.EINVAL
		} else if want.errno == 0 {
			want.text = n.Target
		}
	case "lstat":
		if n, want.errno = w.find(o.Path, false); want.errno == 0 && got.errno == 0 {
			return got, w.sameStat(n, got.stat)
		}
	case "chmod":
		if n, want.errno = w.find(o.Path, true); want.errno == 0 {
			t.Chmod(n, o.Mode)
		}
	case "lchown":
		if n, want.errno = w.find(o.Path, false); want.errno == 0 {
			t.Chown(n, uint32(o.Off), uint32(o.Off2))
		}
	case "utimens":
		if n, want.errno = w.find(o.Path, false); want.errno == 0 {
			t.Changed(n)
			n.Mtime = reference.Times{From: int64(o.Off), To: int64(o.Off)}
		}
	case "setxattr", "removexattr", "getxattr":
		want = w.xattr(o)
	default:
		panic("no operation " + o.Kind)
	}
	return want, nil
}

// onHandle names the operations that need an open handle.
var onHandle = map[string]bool{"close": true, "write": true, "read": true, "mmap": true, "ftruncate": true, "fallocate": true,
	"seek": true, "copy": true, "fsync": true, "fdatasync": true, "fstat": true, "linkhandle": true}

func (w *world) openPath(o op, got result) syscall.Errno {
	h := &w.open[o.Handle]
	dir, name, n, errno := w.walk(o.Path)
	switch {
	case errno != 0:
		return errno
	case n == nil && o.Flags&unix.O_CREAT == 0:
		return syscall.ENOENT
	case n == nil:
		if n, errno = w.tree.Create(dir, name, syscall.S_IFREG|o.Mode); errno != 0 {
			return errno
		}
		n.Ino = got.ino
	case o.Flags&(unix.O_CREAT|unix.O_EXCL) == unix.O_CREAT|unix.O_EXCL:
		return syscall.EEXIST
	case n.IsDir():
		return syscall.EISDIR
	case n.Target != "":
		return syscall.ELOOP
	case !n.IsRegular():
		return syscall.ENXIO
	case o.Flags&unix.O_TRUNC != 0:
		w.tree.Truncate(n, 0)
	}
	h.node, h.end = n, o.Flags&unix.O_APPEND != 0
	return 0
}

func (w *world) rename(o op) syscall.Errno {
	fromDir, from, errno := w.at(o.Path)
	if errno != 0 {
		return errno
	}
	toDir, to, errno := w.at(o.Path2)
	if errno != 0 {
		return errno
	}
	// The kernel looks at this before it looks at types.
	if b := toDir.Names[to]; fromDir.Names[from] != nil && b != nil && fromDir.Below(b) && o.Flags == 0 {
		return syscall.ENOTEMPTY
	}
	return w.tree.Rename(fromDir, from, toDir, to, o.Flags)
}

func (w *world) xattr(o op) (want result) {
	n, errno := w.find(o.Path, false)
	value, exists := "", false
	if errno == 0 {
		value, exists = n.Xattrs[o.Path2]
	}
	switch file := errno == 0 && (n.IsDir() || n.IsRegular()); {
	case errno != 0:
		want.errno = errno
	case o.Kind == "getxattr" && (!file || !exists):
		want.errno = syscall.ENODATA
	case o.Kind == "getxattr":
		want.data = []byte(value)
	case !file: // user.* is for files and directories only
		want.errno = syscall.EPERM
	case o.Kind == "setxattr":
		want.errno = w.tree.SetXattr(n, o.Path2, string(content(o.Seed, o.Len)), o.Flags)
	default:
		want.errno = w.tree.RemoveXattr(n, o.Path2)
	}
	return want
}

// legalSeek checks the answer of SEEK_DATA and SEEK_HOLE: holes read as zeros,
// and zeros need not be a hole.
func legalSeek(data []byte, o op, got result) error {
	if o.Off >= len(data) {
		if got.errno != syscall.ENXIO {
			return fmt.Errorf("seek past the end: %d, error %v", got.n, got.errno)
		}
		return nil
	}
	zeros := func(from, to int) error {
		for i, b := range data[from:to] {
			if b != 0 {
				return fmt.Errorf("seek: %d, error %v, but byte %d is data", got.n, got.errno, from+i)
			}
		}
		return nil
	}
	switch {
	case o.Flags == unix.SEEK_DATA && got.errno == syscall.ENXIO:
		return zeros(o.Off, len(data))
	case got.errno != 0, got.n < o.Off, got.n > len(data), got.n == len(data) && o.Flags == unix.SEEK_DATA:
		return fmt.Errorf("seek from %d of %d: %d, error %v", o.Off, len(data), got.n, got.errno)
	case o.Flags == unix.SEEK_DATA:
		return zeros(o.Off, got.n)
	case got.n < len(data):
		return zeros(got.n, got.n+1)
	}
	return nil
}

// listing describes a directory's entries.
func listing(dir *reference.Node) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(dir.Names)) {
		fmt.Fprintf(&b, "%s:%o ", name, dir.Names[name].Mode&syscall.S_IFMT)
	}
	return b.String()
}

func (w *world) sameStat(n *reference.Node, st *unix.Stat_t) error {
	size := int64(len(n.Data) + len(n.Target))
	if n.IsDir() {
		size = st.Size
	}
	mode := n.Mode
	if n.Target != "" {
		mode = syscall.S_IFLNK | 0o777
	}
	got := fmt.Sprintf("inode %d, mode %o, %d:%d, %d links, %d bytes", st.Ino, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size)
	want := fmt.Sprintf("inode %d, mode %o, %d:%d, %d links, %d bytes", n.Ino, mode, n.UID, n.GID, n.Nlink(), size)
	if got != want {
		return fmt.Errorf("%s; want %s", got, want)
	}
	for _, stamp := range []struct {
		name string
		got  int64
		want reference.Times
	}{{"mtime", st.Mtim.Nano(), n.Mtime}, {"ctime", st.Ctim.Nano(), n.Ctime}} {
		if stamp.got < stamp.want.From || stamp.got > stamp.want.To {
			return fmt.Errorf("%s is %d, want %d to %d", stamp.name, stamp.got, stamp.want.From, stamp.want.To)
		}
	}
	return nil
}

// compare says how what was found in the mount differs from the reference.
func (w *world) compare(found map[string]*found) error {
	seen := 0
	var check func(p string, n *reference.Node) error
	check = func(p string, n *reference.Node) error {
		f := found[p]
		if f == nil {
			return fmt.Errorf("%s is not there", p)
		}
		seen++
		if err := w.sameStat(n, &f.stat); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if err := sameBytes(f.data, n.Data); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if f.target != n.Target || !maps.Equal(f.xattrs, n.Xattrs) {
			return fmt.Errorf("%s: target %q, attributes of %v; want %q, %v", p, f.target, slices.Sorted(maps.Keys(f.xattrs)), n.Target, slices.Sorted(maps.Keys(n.Xattrs)))
		}
		if n.IsDir() && f.listing != listing(n) {
			return fmt.Errorf("%s holds %q, want %q", p, f.listing, listing(n))
		}
		for name, child := range n.Names {
			if err := check(path.Join(p, name), child); err != nil {
				return err
			}
		}
		return nil
	}
	if err := check(".", w.tree.Root); err != nil {
		return err
	}
	if seen != len(found) {
		return fmt.Errorf("%d names, want %d", len(found), seen)
	}
	return nil
}

// found is what one name of the mount leads to.
type found struct {
	stat    unix.Stat_t
	data    []byte
	target  string
	listing string
	xattrs  map[string]string
}
