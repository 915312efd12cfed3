// Package faultfs is a cache.FS in memory for tests: it fails on purpose, fills
// up, and shows what a power loss would leave.
//
//	disk := faultfs.New()
//	disk.OnCall(func(n int, op, name string) error { if n == 17 { return syscall.EIO }; return nil })
//	after := disk.CrashClone(faultfs.KeepRandom(rng)) // what the disk may hold after a power loss now
//
// The model is harsher than common file systems: until Sync each 512-byte
// sector of each write is kept or lost on its own, until SyncDir each creation,
// rename and removal is, and a file's Sync does not make its name durable. A
// failed Sync loses the bytes it was to flush, for every later Sync too, while
// reads still show them.
package faultfs

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"sync"
	"syscall"

	"github.com/defs-fs/defs/cache"
)

const sectorBytes = 512

// Keep decides whether one unsynced sector or directory change survives.
type Keep func() bool

// KeepNone loses everything unsynced, KeepAll nothing.
func KeepNone() bool { return false }
func KeepAll() bool  { return true }

// KeepRandom keeps about half.
func KeepRandom(rng *rand.Rand) Keep { return func() bool { return rng.IntN(2) == 0 } }

// FS is one disk. It knows no directories beyond names.
type FS struct {
	mu       sync.Mutex
	onCall   func(n int, op, name string) error
	onRead   func(name string) error
	calls    int
	capacity int64            // 0: unlimited
	names    map[string]*node // as seen by the running system
	durable  map[string]*node
	pending  []change
}

// change is an unsynced change of a name: to nil when it was removed.
type change struct {
	name string
	to   *node
}

type node struct {
	data, durable []byte
	pending       []edit
}

// edit is an unsynced write, or with data nil a change of size.
type edit struct {
	off  int64
	data []byte
}

// New returns an empty disk.
func New() *FS {
	return &FS{names: make(map[string]*node), durable: make(map[string]*node)}
}

// OnCall sets a function that runs before each call that changes or flushes
// something, n counting them from 1. The call fails with its error; a failing
// write still writes its first half.
func (d *FS) OnCall(fn func(n int, op, name string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.onCall = fn
}

// OnRead sets a function that runs before each read of a file's content, which
// fails with its error.
func (d *FS) OnRead(fn func(name string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.onRead = fn
}

// SetCapacity makes calls that grow the files' sum beyond so many bytes fail
// with ENOSPC; 0 is unlimited.
func (d *FS) SetCapacity(bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.capacity = bytes
}

// CrashClone returns a new disk with what is durable, and what keep lets survive.
func (d *FS) CrashClone(keep Keep) *FS {
	d.mu.Lock()
	defer d.mu.Unlock()
	names := maps.Clone(d.durable)
	for _, c := range d.pending {
		if !keep() {
			continue
		}
		if names[c.name] = c.to; c.to == nil {
			delete(names, c.name)
		}
	}
	clone := New()
	for _, name := range slices.Sorted(maps.Keys(names)) {
		data := slices.Clone(names[name].durable)
		for _, e := range names[name].pending {
			data = e.crash(data, keep)
		}
		clone.names[name] = &node{data: data, durable: slices.Clone(data)}
	}
	clone.durable = maps.Clone(clone.names)
	return clone
}

// KillClone returns the disk as it is after the death of the process that uses
// it: nothing is lost, and what was not durable still is not.
func (d *FS) KillClone() *FS {
	d.mu.Lock()
	defer d.mu.Unlock()
	copies := map[*node]*node{nil: nil}
	copyOf := func(n *node) *node {
		if copies[n] == nil && n != nil {
			copies[n] = &node{data: slices.Clone(n.data), durable: slices.Clone(n.durable), pending: slices.Clone(n.pending)}
		}
		return copies[n]
	}
	clone := New()
	for name, n := range d.names {
		clone.names[name] = copyOf(n)
	}
	for name, n := range d.durable {
		clone.durable[name] = copyOf(n)
	}
	for _, c := range d.pending {
		clone.pending = append(clone.pending, change{c.name, copyOf(c.to)})
	}
	return clone
}

// Read returns the current bytes of a file.
func (d *FS) Read(name string) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.names[name].data)
}

// Names lists all files, sorted.
func (d *FS) Names() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.names))
}

// Write replaces or creates a file, durably and without OnCall.
func (d *FS) Write(name string, data []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := &node{data: slices.Clone(data), durable: slices.Clone(data)}
	d.names[name], d.durable[name] = n, n
}

// Delete removes a file, durably and without OnCall.
func (d *FS) Delete(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.names, name)
	delete(d.durable, name)
}

// call runs OnCall without the lock, so that it may use the disk.
func (d *FS) call(op, name string) error {
	d.mu.Lock()
	d.calls++
	n, fn := d.calls, d.onCall
	d.mu.Unlock()
	if fn != nil {
		if err := fn(n, op, name); err != nil {
			return fmt.Errorf("%s %s: %w", op, name, err)
		}
	}
	return nil
}

func (d *FS) MkdirAll(string) error { return nil }

func (d *FS) OpenFile(name string, flag int) (cache.File, error) {
	if flag&os.O_CREATE != 0 {
		if err := d.call("create", name); err != nil {
			return nil, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.names[name]
	switch {
	case n == nil && flag&os.O_CREATE == 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	case n != nil && flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrExist}
	case n == nil:
		n = &node{}
		d.setName(name, n)
	case flag&os.O_TRUNC != 0:
		n.resize(0)
	}
	return &file{disk: d, node: n, name: name}, nil
}

func (d *FS) setName(name string, n *node) {
	if d.names[name] = n; n == nil {
		delete(d.names, name)
	}
	d.pending = append(d.pending, change{name, n})
}

func (d *FS) Remove(name string) error {
	if err := d.call("remove", name); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.names[name] == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	d.setName(name, nil)
	return nil
}

func (d *FS) Rename(oldName, newName string) error {
	if err := d.call("rename", oldName); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.names[oldName]
	if n == nil {
		return &fs.PathError{Op: "rename", Path: oldName, Err: fs.ErrNotExist}
	}
	d.setName(newName, n)
	d.setName(oldName, nil)
	return nil
}

func (d *FS) ReadDir(dir string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var names []string
	for name := range d.names {
		if path.Dir(name) == path.Clean(dir) {
			names = append(names, path.Base(name))
		}
	}
	slices.Sort(names)
	return names, nil
}

func (d *FS) SyncDir(dir string) error {
	if err := d.call("syncdir", dir); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.durable, d.pending = maps.Clone(d.names), nil
	return nil
}

func (d *FS) Free(string) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.capacity == 0 {
		return math.MaxInt64, nil
	}
	return max(0, d.capacity-d.used()), nil
}

// used is the sum of the files. Callers hold mu.
func (d *FS) used() (sum int64) {
	for _, n := range d.names {
		sum += int64(len(n.data))
	}
	return sum
}

// room reports ENOSPC when n may not grow to size. Callers hold mu.
func (d *FS) room(n *node, size int64) error {
	if d.capacity == 0 || size <= int64(len(n.data)) {
		return nil
	}
	if d.used()+size-int64(len(n.data)) > d.capacity {
		return syscall.ENOSPC
	}
	return nil
}

type file struct {
	disk *FS
	node *node
	name string
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.disk.mu.Lock()
	fn := f.disk.onRead
	f.disk.mu.Unlock()
	if fn != nil {
		if err := fn(f.name); err != nil {
			return 0, fmt.Errorf("read %s: %w", f.name, err)
		}
	}
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if off >= int64(len(f.node.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.node.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if err := f.Writev([][]byte{p}, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f *file) Writev(bufs [][]byte, off int64) error {
	err := f.disk.call("write", f.name)
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	data := slices.Concat(bufs...)
	if err == nil {
		err = f.disk.room(f.node, off+int64(len(data)))
	}
	if err != nil {
		data = data[:len(data)/2]
		if f.disk.room(f.node, off+int64(len(data))) != nil {
			return err
		}
	}
	f.node.write(off, data)
	return err
}

func (f *file) Sync() error {
	err := f.disk.call("sync", f.name)
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if err == nil {
		for _, e := range f.node.pending {
			f.node.durable = e.apply(f.node.durable)
		}
	}
	f.node.pending = nil // after a failure too: the kernel takes the pages for clean, and no later Sync writes them
	return err
}

func (f *file) Allocate(size int64) error {
	if err := f.disk.call("allocate", f.name); err != nil {
		return err
	}
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if err := f.disk.room(f.node, size); err != nil {
		return err
	}
	if size > int64(len(f.node.data)) {
		f.node.resize(size)
	}
	return nil
}

func (f *file) Truncate(size int64) error {
	if err := f.disk.call("truncate", f.name); err != nil {
		return err
	}
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	f.node.resize(size)
	return nil
}

func (f *file) Size() (int64, error) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	return int64(len(f.node.data)), nil
}

func (f *file) Close() error { return nil }

func (n *node) write(off int64, data []byte) {
	if len(data) == 0 {
		return
	}
	e := edit{off, data}
	n.pending = append(n.pending, e)
	n.data = e.apply(n.data)
}

func (n *node) resize(size int64) {
	e := edit{off: size}
	n.pending = append(n.pending, e)
	n.data = e.apply(n.data)
}

func (e edit) apply(data []byte) []byte {
	if e.data == nil {
		return resized(data, int(e.off))
	}
	end := int(e.off) + len(e.data)
	if end > len(data) {
		data = resized(data, end)
	}
	copy(data[e.off:], e.data)
	return data
}

// crash applies what keep lets survive of the edit, sector by sector.
func (e edit) crash(data []byte, keep Keep) []byte {
	if e.data == nil {
		if keep() {
			return e.apply(data)
		}
		return data
	}
	for off, rest := e.off, e.data; len(rest) > 0; {
		n := min(len(rest), int(sectorBytes-off%sectorBytes))
		if keep() {
			data = edit{off, rest[:n]}.apply(data)
		}
		off, rest = off+int64(n), rest[n:]
	}
	return data
}

func resized(data []byte, size int) []byte {
	if size <= len(data) {
		return data[:size:size]
	}
	return append(data, make([]byte, size-len(data))...)
}
