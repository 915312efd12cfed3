package volume

import (
	"slices"
	"sort"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/defs-fs/defs/metastore"
)

const (
	// windowBytes is the part of a file whose extents are kept together.
	windowBytes = 256 << 10
	// windowExtentsMax bounds the extents of one window: where a file is in smaller pieces, none are kept.
	windowExtentsMax = 1024
	// windowReadMax is the longest range that is looked up here. A longer one costs little per byte in the metastore.
	windowReadMax = 64 << 10
	// extentCacheMax bounds the extents that are kept; each takes about 100 bytes, and each window counts as two more.
	extentCacheMax = 128 << 10
)

// extentTable is a bounded cache of the extents of parts of files that are read or written in small pieces: the
// metastore takes longer to find them than all else that such an operation does. The stripe of the inode guards its
// extents.
type extentTable struct {
	db *metastore.DB

	mu      sync.Mutex // guards what follows, but not the extents of the windows
	windows *simplelru.LRU[windowKey, *window]
	held    int // by all windows, in the unit of extentCacheMax
}

// windowKey names a part of a file: [number × windowBytes, (number + 1) × windowBytes).
type windowKey struct {
	ino    Ino
	number uint64
}

// window is all extents that overlap such a part, in order of offsets. Only the holder of v.mu and of the inode's
// stripe changes it.
type window struct{ extents []metastore.Extent }

func (w *window) cost() int { return 2 + len(w.extents) }

// find returns the place of the first extent that ends after off.
func (w *window) find(off uint64) int {
	return sort.Search(len(w.extents), func(i int) bool { return w.extents[i].End() > off })
}

type changedExtent struct {
	ino     Ino
	e       metastore.Extent
	deleted bool
}

func newExtentTable(db *metastore.DB) *extentTable {
	et := &extentTable{db: db}
	var err error
	et.windows, err = simplelru.NewLRU(extentCacheMax, func(_ windowKey, w *window) { et.held -= w.cost() })
	if err != nil {
		panic(err) // only a size below 1 fails
	}
	return et
}

// overlapping calls fn for each extent that overlaps [from, to), in order of offsets, until it returns false. The
// caller keeps changes of the inode out: by v.mu or by its stripe's lock.
func (et *extentTable) overlapping(ino Ino, from, to uint64, fn func(metastore.Extent) bool) error {
	if from < to && to-from > windowReadMax {
		return et.db.Extents(ino, from, to, fn)
	}
	for at := from; at < to; {
		key := windowKey{ino, at / windowBytes}
		w, err := et.window(key)
		if err != nil {
			return err
		}
		for _, e := range w.extents[w.find(at):] {
			if e.Off >= to {
				return nil
			}
			// What began before a later window was in the one before.
			if (e.Off >= at || at == from) && !fn(e) {
				return nil
			}
		}
		at = (key.number + 1) * windowBytes
	}
	return nil
}

func (et *extentTable) window(key windowKey) (*window, error) {
	et.mu.Lock()
	w, ok := et.windows.Get(key)
	et.mu.Unlock()
	if ok {
		return w, nil
	}
	w = &window{}
	from := key.number * windowBytes
	if err := et.db.Extents(key.ino, from, from+windowBytes, func(e metastore.Extent) bool {
		w.extents = append(w.extents, e)
		return true
	}); err != nil {
		return nil, err
	}
	et.keep(key, w)
	return w, nil
}

// keep stores a window that is not there yet, unless it is too large.
func (et *extentTable) keep(key windowKey, w *window) {
	et.mu.Lock()
	defer et.mu.Unlock()
	if len(w.extents) > windowExtentsMax || et.windows.Contains(key) {
		return
	}
	et.windows.Add(key, w)
	et.held += w.cost()
	et.shrink()
}

func (et *extentTable) shrink() {
	for et.held > extentCacheMax {
		et.windows.RemoveOldest()
	}
}

// noteEmpty saves the look at the extents of a small file that is being written: it has none yet.
func (et *extentTable) noteEmpty(ino Ino) { et.keep(windowKey{ino: ino}, &window{}) }

// replace makes the cache show what was applied. The caller holds the stripes of the changed inodes.
func (et *extentTable) replace(changed []changedExtent) {
	if len(changed) == 0 {
		return
	}
	et.mu.Lock()
	defer et.mu.Unlock()
	for i := range changed {
		c := &changed[i]
		for number := c.e.Off / windowBytes; number*windowBytes < c.e.End(); number++ {
			key := windowKey{c.ino, number}
			w, ok := et.windows.Peek(key)
			if !ok {
				continue
			}
			et.held -= w.cost()
			w.change(c)
			et.held += w.cost()
			if len(w.extents) > windowExtentsMax {
				et.windows.Remove(key)
			}
		}
	}
	et.shrink()
}

func (w *window) change(c *changedExtent) {
	i := w.find(c.e.Off)
	switch there := i < len(w.extents) && w.extents[i].Off == c.e.Off; {
	case there && c.deleted:
		w.extents = slices.Delete(w.extents, i, i+1)
	case there:
		w.extents[i] = c.e
	case !c.deleted:
		w.extents = slices.Insert(w.extents, i, c.e)
	}
}
