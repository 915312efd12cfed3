package integration

import (
	"fmt"
	"math/rand/v2"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/internal/reference"
)

// generator draws operations that are likely to do something in the world as
// it is.
type generator struct {
	*rand.Rand
	w *world

	paths []string // of the world, before the operation that is drawn
}

var names = []string{"a", "b", "c", "d", "e"}

// shared is the file that the threads of "parallel" work on together, each in a
// region of its own.
const (
	shared       = "shared"
	sharedHandle = ownHandles - 1
	regionBytes  = 256 << 10
)

// next draws one operation. Some need others before them.
func (g *generator) next() []op {
	g.paths = g.paths[:0]
	var list func(p string, n *reference.Node)
	list = func(p string, n *reference.Node) {
		g.paths = append(g.paths, p)
		for _, name := range names { // in order: a seed draws the same again
			if child := n.Names[name]; child != nil {
				list(path.Join(p, name), child)
			}
		}
	}
	list(".", g.w.tree.Root)
	if g.IntN(300) == 0 {
		return g.parallel()
	}
	draw := draws[g.IntN(len(draws))]
	o := draw.with(g)
	o.Kind = draw.kind
	return []op{o}
}

// draws says what operations are made of. Those that are listed twice are drawn
// twice as often.
var draws = []struct {
	kind string
	with func(*generator) op
}{
	{"open", (*generator).open}, {"open", (*generator).open}, {"open", (*generator).open},
	{"tmpfile", func(g *generator) op {
		return op{Path: g.path(true), Handle: g.IntN(ownHandles - 1), Mode: g.mode(), Flags: g.one(0, 0, unix.O_EXCL)}
	}},
	{"close", (*generator).handle},
	{"write", (*generator).write}, {"write", (*generator).write}, {"write", (*generator).write}, {"write", (*generator).write},
	{"read", (*generator).span}, {"read", (*generator).span}, {"read", (*generator).span},
	{"mmap", func(g *generator) op { o := g.span(); o.Seed = g.seed(); return o }},
	{"ftruncate", func(g *generator) op { o := g.handle(); o.Len = g.offset(o.Handle); return o }},
	{"fallocate", func(g *generator) op {
		o := g.span()
		o.Mode = uint32(g.one(0, reference.KeepSize, reference.PunchHole|reference.KeepSize, reference.ZeroRange, reference.ZeroRange|reference.KeepSize))
		return o
	}},
	{"seek", func(g *generator) op {
		o := g.span()
		o.Len, o.Flags = 0, g.one(unix.SEEK_DATA, unix.SEEK_HOLE)
		return o
	}},
	{"copy", func(g *generator) op {
		o := g.span()
		o.Handle2 = g.handle().Handle
		o.Off2 = g.offset(o.Handle2)
		return o
	}},
	{"fstat", (*generator).handle},
	{"linkhandle", func(g *generator) op { o := g.handle(); o.Path = g.path(false); return o }},
	{"truncate", func(g *generator) op { return op{Path: g.path(false), Len: g.IntN(100_000)} }},
	{"mkdir", (*generator).newName}, {"mkdir", (*generator).newName}, {"mknod", (*generator).newName},
	{"symlink", func(g *generator) op {
		return op{Path: g.path(false), Path2: "none" + strings.Repeat("/none", g.IntN(g.one(3, 3, 818)))}
	}},
	{"unlink", (*generator).onPath}, {"unlink", (*generator).onPath}, {"rmdir", (*generator).onPath},
	{"link", (*generator).twoPaths},
	{"rename", (*generator).twoPaths}, {"rename", (*generator).twoPaths},
	{"rename", func(g *generator) op {
		o := g.twoPaths()
		o.Flags = g.one(reference.NoReplace, reference.Exchange)
		return o
	}},
	{"readdir", (*generator).onDir}, {"readlink", (*generator).onPath}, {"lstat", (*generator).onPath},
	{"chmod", func(g *generator) op { return op{Path: g.path(false), Mode: g.mode()} }},
	{"lchown", func(g *generator) op { return op{Path: g.path(false), Off: g.IntN(3), Off2: g.IntN(3)} }},
	{"utimens", func(g *generator) op { return op{Path: g.path(false), Off: g.IntN(1<<62) - 1<<60} }},
	{"setxattr", func(g *generator) op {
		o := g.xattr()
		o.Len, o.Seed, o.Flags = g.IntN(g.one(10, 300, 300, 60_000)), g.seed(), g.one(0, 0, reference.XattrCreate, reference.XattrReplace)
		return o
	}},
	{"removexattr", (*generator).xattr}, {"getxattr", (*generator).xattr},
	{"fsync", (*generator).rarely}, {"fdatasync", (*generator).rarely},
	{"fsyncdir", func(g *generator) op {
		if g.IntN(8) > 0 {
			return op{Path: "none"}
		}
		return g.onDir()
	}},
}

func (g *generator) one(values ...int) int { return values[g.IntN(len(values))] }

func (g *generator) mode() uint32 {
	return uint32(g.one(0o600, 0o600, 0o644, 0o755, 0o4755, 0o2755, 0o6711))
}

// seed draws from a few, so that content repeats.
func (g *generator) seed() uint64 { return g.Uint64N(60) }

// path draws one that exists, with a good chance.
func (g *generator) path(dir bool) string {
	for range 3 {
		p := g.paths[g.IntN(len(g.paths))]
		if dir {
			if n, _ := g.w.find(p, false); n.IsDir() {
				return p
			}
		} else if p != "." {
			return p
		}
	}
	return g.newName().Path
}

// newName draws a name in a directory that exists, or below what is none.
func (g *generator) newName() op {
	parent := g.paths[g.IntN(len(g.paths))]
	if n, _ := g.w.find(parent, false); strings.Count(parent, "/") >= 2 || !n.IsDir() && g.IntN(10) > 0 {
		parent = "."
	}
	return op{Path: path.Join(parent, names[g.IntN(len(names))]), Mode: g.mode()}
}

func (g *generator) onPath() op { return op{Path: g.path(false)} }
func (g *generator) onDir() op  { return op{Path: g.path(true)} }
func (g *generator) xattr() op {
	return op{Path: g.path(g.IntN(2) == 0), Path2: "user." + names[g.IntN(3)]}
}

func (g *generator) twoPaths() op {
	o := op{Path: g.path(false), Path2: g.path(false)}
	if g.IntN(2) == 0 {
		o.Path2 = g.newName().Path
	}
	return o
}

func (g *generator) open() op {
	o := op{Path: g.path(false), Handle: g.IntN(ownHandles - 1), Mode: g.mode()}
	if g.IntN(2) == 0 {
		o = op{Path: g.newName().Path, Handle: o.Handle, Mode: o.Mode, Flags: unix.O_CREAT | g.one(0, unix.O_EXCL)}
	}
	o.Flags |= g.one(0, 0, unix.O_TRUNC) | g.one(0, 0, 0, unix.O_APPEND) | g.one(0, 0, 0, unix.O_DIRECT)
	return o
}

// handle draws one that is open, with a good chance.
func (g *generator) handle() (o op) {
	for range 3 {
		if o.Handle = g.IntN(ownHandles); g.w.open[o.Handle].node != nil {
			break
		}
	}
	return o
}

// rarely is for operations after which little can be lost.
func (g *generator) rarely() op {
	if g.IntN(8) > 0 {
		return op{Handle: handles - 1} // never open outside of "parallel"
	}
	return g.handle()
}

// offset draws one in a file, or somewhat past its end.
func (g *generator) offset(handle int) int {
	size := 0
	if n := g.w.open[handle].node; n != nil {
		size = len(n.Data)
	}
	off := g.IntN(min(size, 2<<20) + g.one(1, 100, 5000, 5000, 300_000))
	return off &^ (g.one(1, 1, 512, 4096) - 1)
}

// span draws a range of an open file.
func (g *generator) span() op {
	o := g.handle()
	o.Off = g.offset(o.Handle)
	o.Len = 1 + g.IntN(g.one(10, 600, 10_000, 10_000, 70_000, wholeBytes))
	if g.IntN(4) == 0 {
		o.Len = (o.Len + 4095) &^ 4095
	}
	return o
}

func (g *generator) write() op {
	o := g.span()
	o.Seed = g.seed()
	if g.IntN(200) == 0 {
		o.Len = 1 + g.IntN(3<<20)
	}
	return o
}

// parallel draws lists for threads: each works on names of its own, and in its
// region of the shared file.
func (g *generator) parallel() []op {
	all := op{Kind: "parallel"}
	before := []op{
		{Kind: "open", Path: shared, Handle: sharedHandle, Flags: unix.O_CREAT, Mode: 0o600},
		{Kind: "ftruncate", Handle: sharedHandle, Len: threadsMax*regionBytes + 1},
	}
	for i := range 2 + g.IntN(threadsMax-1) {
		own, common := ownHandles+2*i, ownHandles+2*i+1
		dir := fmt.Sprint("thread-", i)
		before = append(before, op{Kind: "mkdir", Path: dir, Mode: 0o755})
		thread := []op{{Kind: "open", Path: shared, Handle: common, Flags: g.one(0, unix.O_DIRECT)}}
		name := func() string { return path.Join(dir, names[g.IntN(len(names))]) }
		for range 10 + g.IntN(20) {
			in := op{Handle: common, Off: i*regionBytes + g.IntN(regionBytes-1), Seed: g.seed()}
			in.Len = 1 + g.IntN(min((i+1)*regionBytes-in.Off, wholeBytes))
			mine := op{Handle: own, Off: g.IntN(50_000), Len: 1 + g.IntN(50_000), Seed: g.seed()}
			kinds := []op{in, in, in, in, mine, mine, mine, {Path: name(), Handle: own, Flags: unix.O_CREAT, Mode: 0o600},
				{Path: name()}, {Path: name(), Path2: name(), Flags: g.one(0, reference.Exchange)}, {Path: name(), Path2: name()}, {Path: dir}}
			which := g.IntN(len(kinds))
			o := kinds[which]
			o.Kind = []string{"write", "read", "mmap", "fallocate", "write", "read", "ftruncate", "open", "unlink", "rename", "link", "readdir"}[which]
			if o.Kind == "fallocate" {
				o.Mode = reference.PunchHole | reference.KeepSize
			}
			thread = append(thread, o)
		}
		thread = append(thread, op{Kind: "close", Handle: own}, op{Kind: "close", Handle: common})
		all.Threads = append(all.Threads, thread)
	}
	return append(before, all)
}
