package volume

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/defs-fs/defs/metastore"
)

// checkInvariants checks what must hold of the metastore after every operation.
func checkInvariants(t testing.TB, v *Volume) {
	t.Helper()
	type links struct{ names, subdirs uint32 }
	var total usage
	count := map[Ino]*links{RootIno: {}}
	inodes := map[Ino]metastore.Inode{}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(v.db.Inodes(func(ino Ino, n metastore.Inode) bool {
		inodes[ino] = n
		if count[ino] == nil {
			count[ino] = &links{}
		}
		return true
	}))
	local := map[metastore.Unplaced]bool{}
	for ino, n := range inodes {
		total = total.plus(int64(n.Allocated), 1)
		var end, sum uint64
		ok(v.db.Extents(ino, 0, 1<<63, func(e metastore.Extent) bool {
			if e.Off < end || e.Len == 0 || e.End() > n.Size {
				t.Errorf("inode %d of %d bytes: extent [%d,%d) after %d", ino, n.Size, e.Off, e.End(), end)
			}
			end = e.End()
			sum += uint64(e.Len)
			if e.HasLocal() && uint64(e.LocalOff)+uint64(e.Len) > uint64(e.Local.Length) {
				t.Errorf("inode %d: extent at %d reaches past its local bytes", ino, e.Off)
			}
			if !e.HasRemote {
				local[metastore.Unplaced{Segment: e.Local.Segment, Ino: ino, Off: e.Off, Len: e.Len}] = true
			}
			return true
		}))
		if sum != n.Allocated {
			t.Errorf("inode %d: extents of %d bytes, %d are counted", ino, sum, n.Allocated)
		}
		if cached, err := v.inodes.get(ino); err != nil || cached.Size != n.Size || cached.Nlink != n.Nlink || cached.Mode != n.Mode || cached.Ctime != n.Ctime {
			t.Errorf("inode %d: cache shows %+v, metastore %+v, %v", ino, cached, n, err)
		}
		if !isDir(n.Mode) {
			continue
		}
		var last uint64
		ok(v.db.ReadDir(ino, 0, func(d Dirent) bool {
			if d.Cookie <= last || d.Cookie < 3 {
				t.Errorf("directory %d: cookie %d after %d", ino, d.Cookie, last)
			}
			last = d.Cookie
			named, err := v.db.Dirent(ino, d.Name)
			if cached, cachedErr := v.names.get(ino, d.Name); err != nil || named != d || cachedErr != nil || cached != d {
				t.Errorf("directory %d: the listing shows %+v, the name leads to %+v, %v", ino, d, named, err)
			}
			child, found := inodes[d.Ino]
			if !found || direntType(child.Mode) != d.Type {
				t.Errorf("directory %d: entry of type %d for inode %d of mode %o", ino, d.Type, d.Ino, child.Mode)
				return true
			}
			count[d.Ino].names++
			if isDir(child.Mode) {
				count[ino].subdirs++
				if child.Parent != ino {
					t.Errorf("directory %d is in %d, its parent is %d", d.Ino, ino, child.Parent)
				}
			}
			return true
		}))
	}
	ok(v.db.Unplaced(0, func(u metastore.Unplaced) bool {
		if !local[u] {
			t.Errorf("listed as unplaced, but no extent: %+v", u)
		}
		delete(local, u)
		return true
	}))
	for u := range local {
		t.Errorf("unplaced, but not listed: %+v", u)
	}
	orphans := map[Ino]bool{}
	ok(v.db.Orphans(func(ino Ino) bool { orphans[ino] = true; return true }))
	for ino, n := range inodes {
		want := count[ino].names
		if isDir(n.Mode) && (want > 0 || ino == RootIno) {
			want = 2 + count[ino].subdirs
		}
		if n.Nlink != want {
			t.Errorf("inode %d: %d links, %d are counted", ino, n.Nlink, want)
		}
		if orphans[ino] != (n.Nlink == 0) {
			t.Errorf("inode %d of %d links: marked as orphan: %v", ino, n.Nlink, orphans[ino])
		}
		delete(orphans, ino)
	}
	for ino := range orphans {
		t.Errorf("inode %d is marked as orphan and does not exist", ino)
	}
	if v.usage != total {
		t.Errorf("usage %+v, counted %+v", v.usage, total)
	}
}

// modelNode is a file or directory of the reference.
type modelNode struct {
	ino    Ino
	mode   uint32
	data   []byte
	mapped []bool // len(data); false in a hole
	names  map[string]*modelNode
	parent *modelNode
	nlink  int
	opens  int
	xattrs map[string]string
}

func (n *modelNode) dir() bool { return n.names != nil }

func (n *modelNode) resize(size int) {
	for len(n.data) < size {
		n.data = append(n.data, 0)
		n.mapped = append(n.mapped, false)
	}
	n.data, n.mapped = n.data[:size], n.mapped[:size]
}

func (n *modelNode) zero(from, to int) {
	for i := from; i < min(to, len(n.data)); i++ {
		n.data[i], n.mapped[i] = 0, false
	}
}

func (n *modelNode) below(a *modelNode) bool {
	for ; n != nil; n = n.parent {
		if n == a {
			return true
		}
	}
	return false
}

// model runs the same operations on a volume and on the reference.
type model struct {
	t     *testing.T
	v     *Volume
	dir   string
	clock *testClock
	root  *modelNode
	nodes []*modelNode // all that have a name or are open, the root first
}

var ctx = context.Background()

func (m *model) pick(r *rapid.T, dirs bool) *modelNode {
	var list []*modelNode
	for _, n := range m.nodes {
		if n.dir() == dirs && (!dirs || n.nlink > 0) {
			list = append(list, n)
		}
	}
	if len(list) == 0 {
		r.Skip("no node")
	}
	return rapid.SampledFrom(list).Draw(r, "node")
}

func (m *model) name(r *rapid.T) string {
	return rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(r, "name")
}

// want compares an error's kind; -1 stands for success.
func (m *model) want(r *rapid.T, err error, kind int) {
	r.Helper()
	got := -1
	if err != nil {
		got = int(KindOf(err))
	}
	if got != kind {
		r.Fatalf("got %v, want kind %d", err, kind)
	}
}

func (m *model) drop(n *modelNode) {
	n.nlink--
	if n.nlink <= 0 && n.opens == 0 {
		m.nodes = slices.DeleteFunc(m.nodes, func(o *modelNode) bool { return o == n })
	}
}

const modelSizeMax = 300

func (m *model) actions() map[string]func(*rapid.T) {
	off := rapid.IntRange(0, modelSizeMax)
	length := rapid.IntRange(1, 80)
	return map[string]func(*rapid.T){
		"create": func(r *rapid.T) {
			p, name := m.pick(r, true), m.name(r)
			mode := rapid.SampledFrom([]uint32{syscall.S_IFREG, syscall.S_IFREG, syscall.S_IFDIR}).Draw(r, "mode")
			a, err := m.v.Create(ctx, p.ino, name, Create{Mode: mode | 0o700, Excl: true})
			if p.names[name] != nil {
				m.want(r, err, int(Exist))
				return
			}
			m.want(r, err, -1)
			n := &modelNode{ino: a.Ino, mode: a.Mode, nlink: 1, parent: p, xattrs: map[string]string{}}
			if isDir(mode) {
				n.names = map[string]*modelNode{}
			}
			p.names[name] = n
			m.nodes = append(m.nodes, n)
		},
		"write": func(r *rapid.T) {
			n, at := m.pick(r, false), off.Draw(r, "off")
			data := rapid.SliceOfN(rapid.Byte(), 1, 80).Draw(r, "data")
			flags := WriteFlags{Append: rapid.Bool().Draw(r, "append")}
			if flags.Append && len(n.data) > 2*modelSizeMax {
				r.Skip("long enough")
			}
			count, err := m.v.Write(ctx, n.ino, int64(at), data, flags)
			m.want(r, err, -1)
			if count != len(data) {
				r.Fatalf("wrote %d of %d", count, len(data))
			}
			if flags.Append {
				at = len(n.data)
			}
			n.resize(max(len(n.data), at+len(data)))
			copy(n.data[at:], data)
			for i := range data {
				n.mapped[at+i] = true
			}
		},
		"truncate": func(r *rapid.T) {
			n, size := m.pick(r, false), off.Draw(r, "size")
			_, err := m.v.SetAttr(ctx, n.ino, SetAttr{Valid: SetSize, Size: uint64(size)})
			m.want(r, err, -1)
			n.resize(size)
		},
		"fallocate": func(r *rapid.T) {
			n, at, count := m.pick(r, false), off.Draw(r, "off"), length.Draw(r, "length")
			mode := rapid.SampledFrom([]uint32{0, FallocKeepSize, FallocPunchHole | FallocKeepSize, FallocZeroRange, FallocZeroRange | FallocKeepSize}).Draw(r, "mode")
			m.want(r, m.v.Fallocate(ctx, n.ino, mode, int64(at), int64(count), WriteFlags{}), -1)
			if mode&(FallocPunchHole|FallocZeroRange) != 0 {
				n.zero(at, at+count)
			}
			if mode&FallocKeepSize == 0 {
				n.resize(max(len(n.data), at+count))
			}
		},
		"copy": func(r *rapid.T) {
			src, dst := m.pick(r, false), m.pick(r, false)
			from, to, count := off.Draw(r, "from"), off.Draw(r, "to"), length.Draw(r, "length")
			done, err := m.v.CopyRange(ctx, src.ino, int64(from), dst.ino, int64(to), int64(count), WriteFlags{})
			count = max(min(count, len(src.data)-from), 0)
			if src == dst && count > 0 && from < to+count && to < from+count {
				m.want(r, err, int(Invalid))
				return
			}
			m.want(r, err, -1)
			if done != int64(count) {
				r.Fatalf("copied %d, want %d", done, count)
			}
			if count > 0 {
				dst.resize(max(len(dst.data), to+count))
				copy(dst.data[to:], src.data[from:from+count])
				copy(dst.mapped[to:], src.mapped[from:from+count])
			}
		},
		"read": func(r *rapid.T) {
			n, at, count := m.pick(r, false), off.Draw(r, "off"), length.Draw(r, "length")
			m.checkRead(r, n, at, count)
		},
		"seek": func(r *rapid.T) {
			n, at := m.pick(r, false), off.Draw(r, "off")
			data := rapid.Bool().Draw(r, "data")
			whence := map[bool]int{true: SeekData, false: SeekHole}[data]
			got, err := m.v.Seek(ctx, n.ino, int64(at), whence)
			want := at
			for want < len(n.data) && n.mapped[want] != data {
				want++
			}
			if at >= len(n.data) || data && want == len(n.data) {
				m.want(r, err, int(NoData))
				return
			}
			m.want(r, err, -1)
			if got != int64(want) {
				r.Fatalf("seek %d data %v: %d, want %d", at, data, got, want)
			}
		},
		"link": func(r *rapid.T) {
			n, p, name := m.pick(r, false), m.pick(r, true), m.name(r)
			_, err := m.v.Link(ctx, n.ino, p.ino, name)
			switch {
			case n.nlink == 0:
				m.want(r, err, int(NotExist))
			case p.names[name] != nil:
				m.want(r, err, int(Exist))
			default:
				m.want(r, err, -1)
				p.names[name] = n
				n.nlink++
			}
		},
		"open": func(r *rapid.T) {
			n := m.pick(r, false)
			m.v.Acquire(n.ino, 1)
			n.opens++
		},
		"close": func(r *rapid.T) {
			n := m.pick(r, false)
			if n.opens == 0 {
				r.Skip("not open")
			}
			m.v.Release(n.ino, 1)
			n.opens--
			if n.nlink == 0 && n.opens == 0 {
				m.nodes = slices.DeleteFunc(m.nodes, func(o *modelNode) bool { return o == n })
			}
		},
		"unlink": func(r *rapid.T) {
			p, name := m.pick(r, true), m.name(r)
			err := m.v.Unlink(ctx, p.ino, name)
			switch n := p.names[name]; {
			case n == nil:
				m.want(r, err, int(NotExist))
			case n.dir():
				m.want(r, err, int(IsDir))
			default:
				m.want(r, err, -1)
				delete(p.names, name)
				m.drop(n)
			}
		},
		"rmdir": func(r *rapid.T) {
			p, name := m.pick(r, true), m.name(r)
			err := m.v.Rmdir(ctx, p.ino, name)
			switch n := p.names[name]; {
			case n == nil:
				m.want(r, err, int(NotExist))
			case !n.dir():
				m.want(r, err, int(NotDir))
			case len(n.names) > 0:
				m.want(r, err, int(NotEmpty))
			default:
				m.want(r, err, -1)
				delete(p.names, name)
				m.drop(n)
			}
		},
		"rename": func(r *rapid.T) {
			p, q := m.pick(r, true), m.pick(r, true)
			flags := rapid.SampledFrom([]RenameFlags{0, 0, RenameNoReplace, RenameExchange}).Draw(r, "flags")
			m.rename(r, p, m.name(r), q, m.name(r), flags)
		},
		"xattr": func(r *rapid.T) {
			n := m.pick(r, false)
			name, value := "user."+m.name(r), rapid.StringN(0, 5, -1).Draw(r, "value")
			flags := rapid.SampledFrom([]uint32{0, XattrCreate, XattrReplace, 99}).Draw(r, "flags")
			_, exists := n.xattrs[name]
			if flags == 99 {
				err := m.v.RemoveXattr(ctx, n.ino, name)
				m.want(r, err, map[bool]int{true: -1, false: int(NoAttr)}[exists])
				delete(n.xattrs, name)
				return
			}
			err := m.v.SetXattr(ctx, n.ino, name, []byte(value), flags)
			switch {
			case exists && flags == XattrCreate:
				m.want(r, err, int(Exist))
			case !exists && flags == XattrReplace:
				m.want(r, err, int(NoAttr))
			default:
				m.want(r, err, -1)
				n.xattrs[name] = value
			}
		},
		"reopen": func(r *rapid.T) {
			switch rapid.IntRange(0, 7).Draw(r, "how") {
			case 0:
				m.reopen(r, false)
			case 1, 2:
				m.reopen(r, true)
			}
		},
		"": func(r *rapid.T) {}, // the whole is compared at the end and around each reopening
	}
}

func (m *model) rename(r *rapid.T, p *modelNode, from string, q *modelNode, to string, flags RenameFlags) {
	err := m.v.Rename(ctx, p.ino, from, q.ino, to, flags)
	a, b := p.names[from], q.names[to]
	switch {
	case a == nil, b == nil && flags == RenameExchange:
		m.want(r, err, int(NotExist))
	case b != nil && flags == RenameNoReplace:
		m.want(r, err, int(Exist))
	case a == b:
		m.want(r, err, -1)
	case a.dir() && q.below(a), flags == RenameExchange && b.dir() && p.below(b):
		m.want(r, err, int(Invalid))
	case flags == RenameExchange:
		m.want(r, err, -1)
		p.names[from], q.names[to] = b, a
		a.parent, b.parent = q, p
	case b != nil && a.dir() && !b.dir():
		m.want(r, err, int(NotDir))
	case b != nil && !a.dir() && b.dir():
		m.want(r, err, int(IsDir))
	case b != nil && b.dir() && len(b.names) > 0:
		m.want(r, err, int(NotEmpty))
	default:
		m.want(r, err, -1)
		delete(p.names, from)
		q.names[to] = a
		a.parent = q
		if b != nil {
			m.drop(b)
		}
	}
}

// reopen closes the volume, or leaves it as a killed process would, and opens it again.
func (m *model) reopen(r *rapid.T, kill bool) {
	m.compare(r)
	if kill {
		next := m.t.TempDir()
		copyState(m.t, m.dir, next)
		m.close()
		m.dir = next
	} else {
		m.close()
	}
	m.v = openAt(m.t, m.dir, m.clock)
	for _, n := range slices.Clone(m.nodes) {
		n.opens = 0
		if n.nlink == 0 {
			n.nlink = 1
			m.drop(n)
		}
	}
	m.compare(r)
}

func (m *model) close() {
	if err := m.v.Close(ctx); err != nil {
		m.t.Fatal(err)
	}
}

func (m *model) checkRead(r *rapid.T, n *modelNode, at, count int) {
	r.Helper()
	got := bytes.Repeat([]byte{0xee}, count)
	read, err := m.v.Read(ctx, n.ino, int64(at), got)
	m.want(r, err, -1)
	at = min(at, len(n.data))
	if want := n.data[at:min(at+count, len(n.data))]; !bytes.Equal(got[:read], want) {
		r.Fatalf("inode %d at %d: read %x, want %x", n.ino, at, got[:read], want)
	}
}

// compare checks the whole tree.
func (m *model) compare(r *rapid.T) {
	r.Helper()
	m.v.reaper.wait()
	for _, n := range m.nodes {
		a, err := m.v.GetAttr(ctx, n.ino)
		m.want(r, err, -1)
		if n.dir() {
			if n.nlink == 0 {
				continue
			}
			var names []string
			m.want(r, m.v.ReadDir(ctx, n.ino, 0, func(d Dirent) bool {
				names = append(names, d.Name)
				if child := n.names[d.Name]; child == nil || child.ino != d.Ino {
					r.Fatalf("directory %d: entry %+v", n.ino, d)
				}
				return true
			}), -1)
			if slices.Sort(names); !slices.Equal(names, slices.Sorted(maps.Keys(n.names))) {
				r.Fatalf("directory %d holds %q, want %q", n.ino, names, slices.Sorted(maps.Keys(n.names)))
			}
			continue
		}
		if a.Size != uint64(len(n.data)) || int(a.Nlink) != n.nlink {
			r.Fatalf("inode %d: %+v, want size %d, %d links", n.ino, a, len(n.data), n.nlink)
		}
		m.checkRead(r, n, 0, len(n.data)+10)
		names, err := m.v.ListXattr(ctx, n.ino)
		m.want(r, err, -1)
		if !slices.Equal(names, slices.Sorted(maps.Keys(n.xattrs))) {
			r.Fatalf("inode %d: attributes %q", n.ino, names)
		}
		for name, want := range n.xattrs {
			if got, err := m.v.GetXattr(ctx, n.ino, name); err != nil || string(got) != want {
				r.Fatalf("inode %d: attribute %q, want %q, %v", n.ino, got, want, err)
			}
		}
	}
	checkInvariants(failer{m.t, r}, m.v)
}

// failer sends failures of a helper to rapid, so that it shrinks them.
type failer struct {
	testing.TB
	r *rapid.T
}

func (f failer) Helper()                           {}
func (f failer) Errorf(format string, args ...any) { f.r.Errorf(format, args...) }
func (f failer) Fatal(args ...any)                 { f.r.Fatal(fmt.Sprint(args...)) }

// TestModel runs random operations on a volume and on a reference in memory, with remounts and kills between.
func TestModel(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		m := &model{t: t, dir: t.TempDir(), clock: newTestClock()}
		m.v = openAt(t, m.dir, m.clock)
		defer func() { m.close() }()
		m.root = &modelNode{ino: RootIno, names: map[string]*modelNode{}, nlink: 1}
		m.nodes = []*modelNode{m.root}
		r.Repeat(m.actions())
		m.compare(r)
	})
}
