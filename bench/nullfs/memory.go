package main

import (
	"sort"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// memory is the filesystem: inodes in a map, contents in blocks. Operations that it lacks get ENOSYS.
type memory struct {
	fuse.RawFileSystem
	journal *journal // nil without one

	mu    sync.RWMutex // guards nodes, next and what the nodes hold except blocks
	nodes map[uint64]*node
	next  uint64
}

type node struct {
	attr   fuse.Attr
	target string
	parent uint64 // of a directory
	lookup uint64

	children map[string]*entry // of a directory
	listing  []*entry          // the same and removed ones, by cookie
	removed  int
	cookie   uint64

	data   sync.RWMutex // guards blocks; taken before memory.mu
	blocks map[uint64][]byte
}

type entry struct {
	name    string
	node    uint64
	mode    uint32
	cookie  uint64
	removed bool
}

const (
	blockBytes   = 64 << 10
	cacheTimeout = 365 * 24 * time.Hour
)

func newMemory() *memory {
	m := &memory{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		nodes:         make(map[uint64]*node),
		next:          fuse.FUSE_ROOT_ID,
	}
	root := m.add(syscall.S_IFDIR|0o755, &fuse.InHeader{})
	root.parent = fuse.FUSE_ROOT_ID
	return m
}

// add makes a node that belongs to the caller. m.mu is held.
func (m *memory) add(mode uint32, in *fuse.InHeader) *node {
	n := &node{attr: fuse.Attr{Ino: m.next, Mode: mode, Nlink: 1, Owner: in.Owner, Blksize: 128 << 10}}
	n.attr.SetTimes(now(), now(), now())
	if n.isDir() {
		n.attr.Nlink = 2
		n.children = make(map[string]*entry)
		n.cookie = 2
	}
	m.nodes[m.next] = n
	m.next++
	return n
}

func now() *time.Time {
	t := time.Now()
	return &t
}

func (n *node) isDir() bool { return n.attr.Mode&syscall.S_IFMT == syscall.S_IFDIR }

func (n *node) link(name string, child *node) {
	n.cookie++
	e := &entry{name: name, node: child.attr.Ino, mode: child.attr.Mode, cookie: n.cookie}
	n.children[name] = e
	n.listing = append(n.listing, e)
	if child.isDir() {
		child.parent = n.attr.Ino
		n.attr.Nlink++
	}
	n.attr.SetTimes(nil, now(), now())
}

func (n *node) unlink(e *entry) {
	delete(n.children, e.name)
	e.removed = true
	if n.removed++; n.removed > 64 && n.removed > len(n.listing)/2 {
		kept := n.listing[:0]
		for _, e := range n.listing {
			if !e.removed {
				kept = append(kept, e)
			}
		}
		clear(n.listing[len(kept):])
		n.listing, n.removed = kept, 0
	}
	if e.mode&syscall.S_IFMT == syscall.S_IFDIR {
		n.attr.Nlink--
	}
	n.attr.SetTimes(nil, now(), now())
}

// drop takes one name from a node and frees it when the kernel has forgotten it too.
func (m *memory) drop(n *node) {
	n.attr.Nlink--
	if n.isDir() {
		n.attr.Nlink = 0
	}
	n.attr.SetTimes(nil, nil, now())
	m.free(n)
}

func (m *memory) free(n *node) {
	if n.attr.Nlink == 0 && n.lookup == 0 {
		delete(m.nodes, n.attr.Ino)
	}
}

func (n *node) enter(out *fuse.EntryOut) {
	n.lookup++
	out.NodeId = n.attr.Ino
	out.SetEntryTimeout(cacheTimeout)
	out.SetAttrTimeout(cacheTimeout)
	out.Attr = n.attr
}

func (m *memory) String() string { return "nullfs" }

func (m *memory) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.nodes[in.NodeId].children[name]; e != nil {
		m.nodes[e.node].enter(out)
		return fuse.OK
	}
	out.SetEntryTimeout(cacheTimeout)
	return fuse.OK
}

func (m *memory) Forget(id, lookups uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := m.nodes[id]; n != nil && id != fuse.FUSE_ROOT_ID {
		n.lookup -= min(lookups, n.lookup)
		m.free(n)
	}
}

func (m *memory) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	m.mu.RLock()
	defer m.mu.RUnlock()
	out.SetTimeout(cacheTimeout)
	out.Attr = m.nodes[in.NodeId].attr
	return fuse.OK
}

func (m *memory) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := m.node(in.NodeId)
	if size, ok := in.GetSize(); ok {
		n.truncate(size)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if size, ok := in.GetSize(); ok {
		n.attr.Size = size
		n.attr.SetTimes(nil, now(), nil)
	}
	if mode, ok := in.GetMode(); ok {
		n.attr.Mode = n.attr.Mode&syscall.S_IFMT | mode
	}
	if uid, ok := in.GetUID(); ok {
		n.attr.Uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.attr.Gid = gid
	}
	if t, ok := in.GetATime(); ok {
		n.attr.SetTimes(&t, nil, nil)
	}
	if t, ok := in.GetMTime(); ok {
		n.attr.SetTimes(nil, &t, nil)
	}
	n.attr.SetTimes(nil, nil, now())
	out.SetTimeout(cacheTimeout)
	out.Attr = n.attr
	return fuse.OK
}

func (m *memory) create(in *fuse.InHeader, mode uint32, name, target string, out *fuse.EntryOut) fuse.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir := m.nodes[in.NodeId]
	if dir.children[name] != nil {
		return fuse.Status(syscall.EEXIST)
	}
	n := m.add(mode, in)
	n.target = target
	n.attr.Size = uint64(len(target))
	dir.link(name, n)
	n.enter(out)
	return fuse.OK
}

func (m *memory) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return m.create(&in.InHeader, syscall.S_IFREG|in.Mode&0o7777&^in.Umask, name, "", &out.EntryOut)
}

func (m *memory) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return m.create(&in.InHeader, in.Mode&^in.Umask, name, "", out)
}

func (m *memory) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return m.create(&in.InHeader, syscall.S_IFDIR|in.Mode&0o7777&^in.Umask, name, "", out)
}

func (m *memory) Symlink(_ <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return m.create(in, syscall.S_IFLNK|0o777, name, target, out)
}

func (m *memory) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	return []byte(m.node(in.NodeId).target), fuse.OK
}

func (m *memory) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.nodes[in.Oldnodeid]
	n.attr.Nlink++
	m.nodes[in.NodeId].link(name, n)
	n.enter(out)
	return fuse.OK
}

func (m *memory) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return m.remove(in.NodeId, name)
}

func (m *memory) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return m.remove(in.NodeId, name)
}

func (m *memory) remove(parent uint64, name string) fuse.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir := m.nodes[parent]
	e := dir.children[name]
	if e == nil {
		return fuse.ENOENT
	}
	n := m.nodes[e.node]
	if len(n.children) > 0 {
		return fuse.Status(syscall.ENOTEMPTY)
	}
	dir.unlink(e)
	m.drop(n)
	return fuse.OK
}

func (m *memory) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if in.Flags != 0 {
		return fuse.EINVAL
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	source, target := m.nodes[in.NodeId], m.nodes[in.Newdir]
	e := source.children[from]
	if e == nil {
		return fuse.ENOENT
	}
	if old := target.children[to]; old != nil {
		if len(m.nodes[old.node].children) > 0 {
			return fuse.Status(syscall.ENOTEMPTY)
		}
		target.unlink(old)
		m.drop(m.nodes[old.node])
	}
	source.unlink(e)
	target.link(to, m.nodes[e.node])
	return fuse.OK
}

func (m *memory) node(id uint64) *node {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.nodes[id]
}

func (m *memory) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

func (m *memory) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

func (m *memory) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (m *memory) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	if m.journal != nil && m.journal.sync() != nil {
		return fuse.EIO
	}
	return fuse.OK
}

func (m *memory) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.OK }

func (m *memory) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	m.mu.RLock()
	n := m.nodes[in.NodeId]
	size := n.attr.Size
	m.mu.RUnlock()
	if in.Offset >= size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	buf = buf[:min(uint64(len(buf)), size-in.Offset)]
	n.data.RLock()
	defer n.data.RUnlock()
	for done := 0; done < len(buf); {
		off := in.Offset + uint64(done)
		part := buf[done:min(len(buf), done+blockBytes-int(off%blockBytes))]
		copied := 0
		if block := n.blocks[off/blockBytes]; int(off%blockBytes) < len(block) {
			copied = copy(part, block[off%blockBytes:])
		}
		clear(part[copied:])
		done += len(part)
	}
	return fuse.ReadResultData(buf), fuse.OK
}

func (m *memory) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if m.journal != nil && m.journal.append(data) != nil {
		return 0, fuse.EIO
	}
	n := m.node(in.NodeId)
	n.data.Lock()
	defer n.data.Unlock()
	if n.blocks == nil {
		n.blocks = make(map[uint64][]byte)
	}
	for done := 0; done < len(data); {
		off := in.Offset + uint64(done)
		block := n.blocks[off/blockBytes]
		if block == nil {
			// A small file does not take a whole block.
			block = make([]byte, min(blockBytes, max(4096, len(data)-done)))
		}
		if need := min(blockBytes, int(off%blockBytes)+len(data)-done); need > len(block) {
			grown := make([]byte, blockBytes)
			copy(grown, block)
			block = grown
		}
		n.blocks[off/blockBytes] = block
		done += copy(block[off%blockBytes:], data[done:])
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n.attr.Size = max(n.attr.Size, in.Offset+uint64(len(data)))
	n.attr.Blocks = (n.attr.Size + 511) / 512
	n.attr.SetTimes(nil, now(), now())
	return uint32(len(data)), fuse.OK
}

func (n *node) truncate(size uint64) {
	n.data.Lock()
	defer n.data.Unlock()
	for i, block := range n.blocks {
		if start := i * blockBytes; start >= size {
			delete(n.blocks, i)
		} else if keep := size - start; keep < uint64(len(block)) {
			clear(block[keep:])
		}
	}
}

func (m *memory) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if mode := m.nodes[in.NodeId].attr.Mode; in.Mask&fuse.X_OK != 0 && mode&syscall.S_IFMT == syscall.S_IFREG && mode&0o111 == 0 {
		return fuse.EACCES
	}
	return fuse.OK
}

func (m *memory) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Blocks: 1 << 30, Bfree: 1 << 29, Bavail: 1 << 29, Files: 1 << 30, Ffree: 1 << 29,
		Bsize: 4096, Frsize: 4096, NameLen: 255}
	return fuse.OK
}

func (m *memory) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	m.mu.RLock()
	defer m.mu.RUnlock()
	m.list(in, out.AddDirEntry)
	return fuse.OK
}

func (m *memory) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list(in, func(e fuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(e)
		if entry != nil && e.Off > 2 {
			m.nodes[e.Ino].enter(entry)
		}
		return entry != nil
	})
	return fuse.OK
}

func (m *memory) list(in *fuse.ReadIn, add func(fuse.DirEntry) bool) {
	n := m.nodes[in.NodeId]
	if in.Offset < 1 && !add(fuse.DirEntry{Name: ".", Ino: in.NodeId, Mode: syscall.S_IFDIR, Off: 1}) {
		return
	}
	if in.Offset < 2 && !add(fuse.DirEntry{Name: "..", Ino: n.parent, Mode: syscall.S_IFDIR, Off: 2}) {
		return
	}
	first := sort.Search(len(n.listing), func(i int) bool { return n.listing[i].cookie > in.Offset })
	for _, e := range n.listing[first:] {
		if !e.removed && !add(fuse.DirEntry{Name: e.name, Ino: e.node, Mode: e.mode, Off: e.cookie}) {
			return
		}
	}
}
