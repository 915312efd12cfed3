package cache

import (
	"os"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// maxIdleFiles bounds the open files that nobody reads at the moment.
const maxIdleFiles = 128

// handle is an open file shared by its users. It is closed when it has left the
// LRU and its last user has released it, so a file may be removed under readers.
type handle struct {
	File
	users int
	out   bool // left the LRU
}

// handles keeps files open, the least recently used ones being closed.
type handles struct {
	fs     FS
	mu     sync.Mutex // guards lru and the handles' fields; held across open and close
	lru    *simplelru.LRU[string, *handle]
	closed bool
}

func newHandles(fs FS) *handles {
	lru, err := simplelru.NewLRU(maxIdleFiles, func(_ string, h *handle) {
		h.out = true
		if h.users == 0 {
			h.Close()
		}
	})
	if err != nil {
		panic(err) // the size is a positive constant
	}
	return &handles{fs: fs, lru: lru}
}

// acquire opens name, or shares the open file. flag is as in os.OpenFile.
// Callers release the handle.
func (hs *handles) acquire(name string, flag int) (*handle, error) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if hs.closed {
		return nil, ErrClosed
	}
	if flag&os.O_CREATE == 0 {
		if h, ok := hs.lru.Get(name); ok {
			h.users++
			return h, nil
		}
	}
	f, err := hs.fs.OpenFile(name, flag)
	if err != nil {
		return nil, err
	}
	h := &handle{File: f, users: 1}
	hs.lru.Remove(name)
	hs.lru.Add(name, h)
	return h, nil
}

func (hs *handles) release(h *handle) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h.users--
	if h.users == 0 && h.out {
		h.Close()
	}
}

// forget drops a file that was removed.
func (hs *handles) forget(name string) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	hs.lru.Remove(name)
}

// close closes all files as soon as their users are done, and opens no more.
func (hs *handles) close() {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	hs.closed = true
	hs.lru.Purge()
}
