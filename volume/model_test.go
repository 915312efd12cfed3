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

	"github.com/defs-fs/defs/internal/reference"
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

// model runs the same operations on a volume and on the reference.
type model struct {
	t     *testing.T
	v     *Volume
	dir   string
	clock *testClock
	tree  *reference.Tree
	nodes []*reference.Node // all that have a name or are open, the root first
}

var ctx = context.Background()

func (m *model) pick(r *rapid.T, dirs bool) *reference.Node {
	var list []*reference.Node
	for _, n := range m.nodes {
		if n.IsDir() == dirs && (!dirs || n.Links > 0) {
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

// want compares an error's number; 0 stands for success.
func (m *model) want(r *rapid.T, err error, errno syscall.Errno) {
	r.Helper()
	if Errno(err) != errno {
		r.Fatalf("got %v, want %d (%v)", err, errno, errno)
	}
}

// forget drops what is neither named nor open.
func (m *model) forget() {
	m.nodes = slices.DeleteFunc(m.nodes, func(n *reference.Node) bool { return n.Links == 0 && n.Opens == 0 })
}

func ino(n *reference.Node) Ino { return Ino(n.Ino) }

const modelSizeMax = 300

func (m *model) actions() map[string]func(*rapid.T) {
	off := rapid.IntRange(0, modelSizeMax)
	length := rapid.IntRange(1, 80)
	return map[string]func(*rapid.T){
		"create": func(r *rapid.T) {
			p, name := m.pick(r, true), m.name(r)
			mode := rapid.SampledFrom([]uint32{syscall.S_IFREG, syscall.S_IFREG, syscall.S_IFDIR}).Draw(r, "mode")
			a, err := m.v.Create(ctx, ino(p), name, Create{Mode: mode | 0o700, Excl: true})
			n, errno := m.tree.Create(p, name, mode|0o700)
			m.want(r, err, errno)
			if errno == 0 {
				n.Ino = uint64(a.Ino)
				m.nodes = append(m.nodes, n)
			}
		},
		"write": func(r *rapid.T) {
			n, at := m.pick(r, false), off.Draw(r, "off")
			data := rapid.SliceOfN(rapid.Byte(), 1, 80).Draw(r, "data")
			flags := WriteFlags{Append: rapid.Bool().Draw(r, "append")}
			if flags.Append && len(n.Data) > 2*modelSizeMax {
				r.Skip("long enough")
			}
			count, err := m.v.Write(ctx, ino(n), int64(at), data, flags)
			m.want(r, err, 0)
			if count != len(data) {
				r.Fatalf("wrote %d of %d", count, len(data))
			}
			if flags.Append {
				at = len(n.Data)
			}
			m.tree.Write(n, at, data)
		},
		"truncate": func(r *rapid.T) {
			n, size := m.pick(r, false), off.Draw(r, "size")
			_, err := m.v.SetAttr(ctx, ino(n), SetAttr{Valid: SetSize, Size: uint64(size)})
			m.want(r, err, 0)
			m.tree.Truncate(n, size)
		},
		"fallocate": func(r *rapid.T) {
			n, at, count := m.pick(r, false), off.Draw(r, "off"), length.Draw(r, "length")
			mode := rapid.SampledFrom([]uint32{0, FallocKeepSize, FallocPunchHole | FallocKeepSize, FallocZeroRange, FallocZeroRange | FallocKeepSize}).Draw(r, "mode")
			m.want(r, m.v.Fallocate(ctx, ino(n), mode, int64(at), int64(count), WriteFlags{}), 0)
			m.tree.Fallocate(n, mode, at, count)
		},
		"copy": func(r *rapid.T) {
			src, dst := m.pick(r, false), m.pick(r, false)
			from, to, count := off.Draw(r, "from"), off.Draw(r, "to"), length.Draw(r, "length")
			done, err := m.v.CopyRange(ctx, ino(src), int64(from), ino(dst), int64(to), int64(count), WriteFlags{})
			want, errno := m.tree.Copy(src, from, dst, to, count)
			m.want(r, err, errno)
			if done != int64(want) {
				r.Fatalf("copied %d, want %d", done, want)
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
			got, err := m.v.Seek(ctx, ino(n), int64(at), whence)
			want := at
			for want < len(n.Data) && n.Mapped[want] != data {
				want++
			}
			if at >= len(n.Data) || data && want == len(n.Data) {
				m.want(r, err, syscall.ENXIO)
				return
			}
			m.want(r, err, 0)
			if got != int64(want) {
				r.Fatalf("seek %d data %v: %d, want %d", at, data, got, want)
			}
		},
		"link": func(r *rapid.T) {
			n, p, name := m.pick(r, false), m.pick(r, true), m.name(r)
			_, err := m.v.Link(ctx, ino(n), ino(p), name)
			if n.Links == 0 { // not asked for by a kernel where the name is taken
				m.want(r, err, syscall.ENOENT)
				return
			}
			m.want(r, err, m.tree.Link(n, p, name))
		},
		"open": func(r *rapid.T) {
			n := m.pick(r, false)
			m.v.Acquire(ino(n), 1)
			n.Opens++
		},
		"close": func(r *rapid.T) {
			n := m.pick(r, false)
			if n.Opens == 0 {
				r.Skip("not open")
			}
			m.v.Release(ino(n), 1)
			n.Opens--
			m.forget()
		},
		"unlink": func(r *rapid.T) {
			p, name := m.pick(r, true), m.name(r)
			m.want(r, m.v.Unlink(ctx, ino(p), name), m.tree.Unlink(p, name))
			m.forget()
		},
		"rmdir": func(r *rapid.T) {
			p, name := m.pick(r, true), m.name(r)
			m.want(r, m.v.Rmdir(ctx, ino(p), name), m.tree.Rmdir(p, name))
			m.forget()
		},
		"rename": func(r *rapid.T) {
			p, q, from, to := m.pick(r, true), m.pick(r, true), m.name(r), m.name(r)
			flags := rapid.SampledFrom([]RenameFlags{0, 0, RenameNoReplace, RenameExchange}).Draw(r, "flags")
			m.want(r, m.v.Rename(ctx, ino(p), from, ino(q), to, flags), m.tree.Rename(p, from, q, to, int(flags)))
			m.forget()
		},
		"xattr": func(r *rapid.T) {
			n := m.pick(r, false)
			name, value := "user."+m.name(r), rapid.StringN(0, 5, -1).Draw(r, "value")
			flags := rapid.SampledFrom([]uint32{0, XattrCreate, XattrReplace, 99}).Draw(r, "flags")
			if flags == 99 {
				m.want(r, m.v.RemoveXattr(ctx, ino(n), name), m.tree.RemoveXattr(n, name))
				return
			}
			m.want(r, m.v.SetXattr(ctx, ino(n), name, []byte(value), flags), m.tree.SetXattr(n, name, value, int(flags)))
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
	for _, n := range m.nodes {
		n.Opens = 0
	}
	m.forget()
	m.compare(r)
}

func (m *model) close() {
	if err := m.v.Close(ctx); err != nil {
		m.t.Fatal(err)
	}
}

func (m *model) checkRead(r *rapid.T, n *reference.Node, at, count int) {
	r.Helper()
	got := bytes.Repeat([]byte{0xee}, count)
	read, err := m.v.Read(ctx, ino(n), int64(at), got)
	m.want(r, err, 0)
	if want := n.Read(at, count); !bytes.Equal(got[:read], want) {
		r.Fatalf("inode %d at %d: read %x, want %x", n.Ino, at, got[:read], want)
	}
}

// compare checks the whole tree.
func (m *model) compare(r *rapid.T) {
	r.Helper()
	m.v.reaper.wait()
	for _, n := range m.nodes {
		a, err := m.v.GetAttr(ctx, ino(n))
		m.want(r, err, 0)
		if n.IsDir() {
			if n.Links == 0 {
				continue
			}
			var names []string
			m.want(r, m.v.ReadDir(ctx, ino(n), 0, func(d Dirent) bool {
				names = append(names, d.Name)
				if child := n.Names[d.Name]; child == nil || ino(child) != d.Ino {
					r.Fatalf("directory %d: entry %+v", n.Ino, d)
				}
				return true
			}), 0)
			if slices.Sort(names); !slices.Equal(names, slices.Sorted(maps.Keys(n.Names))) {
				r.Fatalf("directory %d holds %q, want %q", n.Ino, names, slices.Sorted(maps.Keys(n.Names)))
			}
			continue
		}
		if a.Size != uint64(len(n.Data)) || int(a.Nlink) != n.Links {
			r.Fatalf("inode %d: %+v, want size %d, %d links", n.Ino, a, len(n.Data), n.Links)
		}
		m.checkRead(r, n, 0, len(n.Data)+10)
		names, err := m.v.ListXattr(ctx, ino(n))
		m.want(r, err, 0)
		if !slices.Equal(names, slices.Sorted(maps.Keys(n.Xattrs))) {
			r.Fatalf("inode %d: attributes %q", n.Ino, names)
		}
		for name, want := range n.Xattrs {
			if got, err := m.v.GetXattr(ctx, ino(n), name); err != nil || string(got) != want {
				r.Fatalf("inode %d: attribute %q, want %q, %v", n.Ino, got, want, err)
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
		m.tree = reference.New()
		m.tree.Root.Ino = uint64(RootIno)
		m.nodes = []*reference.Node{m.tree.Root}
		r.Repeat(m.actions())
		m.compare(r)
	})
}
