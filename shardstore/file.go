package shardstore

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// File is a pack file. Tests give one that fails or forgets unflushed bytes.
type File interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteVecAt(bufs [][]byte, off int64) error // all of it, or an error
	Size() (int64, error)
	Truncate(size int64) error
	Punch(off, n int64) error // give the bytes back; they read as zeros
	Sync() error              // data and size reach the device
	Close() error
}

// OpenFile opens a pack file; create fails when the file exists.
type OpenFile func(path string, create bool) (File, error)

// OSFile opens a file of the operating system.
func OSFile(path string, create bool) (File, error) {
	flag := os.O_RDWR
	if create {
		flag |= os.O_CREATE | os.O_EXCL
	}
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

type osFile struct{ *os.File }

func (f osFile) WriteVecAt(bufs [][]byte, off int64) error {
	rest := make([][]byte, 0, len(bufs))
	for _, b := range bufs {
		if len(b) > 0 {
			rest = append(rest, b)
		}
	}
	for len(rest) > 0 {
		n, err := unix.Pwritev(int(f.Fd()), rest, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("pwritev", err)
		}
		off += int64(n)
		for n > 0 {
			if n < len(rest[0]) {
				rest[0] = rest[0][n:]
				break
			}
			n -= len(rest[0])
			rest = rest[1:]
		}
	}
	return nil
}

func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f osFile) Punch(off, n int64) error {
	return os.NewSyscallError("fallocate", unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n))
}

func (f osFile) Sync() error { return os.NewSyscallError("fdatasync", unix.Fdatasync(int(f.Fd()))) }

// packFiles keeps a bounded number of pack files open. Safe for concurrent use.
type packFiles struct {
	path     func(id uint64) string
	openFile OpenFile
	max      int

	mu    sync.Mutex // guards what follows
	clock uint64
	open  map[uint64]*openPack
}

type openPack struct {
	File
	id   uint64
	refs int
	used uint64
}

// acquire returns the pack's file; release must follow.
func (p *packFiles) acquire(id uint64) (*openPack, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.open[id]
	if f == nil {
		file, err := p.openFile(p.path(id), false)
		if err != nil {
			return nil, err
		}
		f = &openPack{File: file, id: id}
		p.open[id] = f
	}
	p.clock++
	f.used = p.clock
	f.refs++
	p.evict()
	return f, nil
}

func (p *packFiles) release(f *openPack) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f.refs--
	p.evict()
}

// evict closes the longest unused files above the limit.
func (p *packFiles) evict() {
	for len(p.open) > p.max {
		var oldest *openPack
		for _, f := range p.open {
			if f.refs == 0 && (oldest == nil || f.used < oldest.used) {
				oldest = f
			}
		}
		if oldest == nil {
			return
		}
		delete(p.open, oldest.id)
		oldest.Close() // read only: nothing to lose
	}
}

// forget closes a pack that is to be removed; nobody may be using it.
func (p *packFiles) forget(id uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f := p.open[id]; f != nil {
		delete(p.open, id)
		f.Close() // read only: nothing to lose
	}
}

func (p *packFiles) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, f := range p.open {
		f.Close()
		delete(p.open, id)
	}
}
