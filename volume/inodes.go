package volume

import (
	"errors"
	"math/bits"
	"sync"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/defs-fs/defs/metastore"
)

const (
	inodeCacheEntries = 16384
	inodeStripes      = 128
	pendingAtimesMax  = 512 // symbolic links among them make large records
	relatimeNs        = 24 * 60 * 60 * 1e9
)

// inodeTable is the way to inodes: a bounded cache in front of the metastore, a lock that makes a change of an
// inode and its extents atomic to readers, and access times not journaled yet.
type inodeTable struct {
	db     *metastore.DB
	cache  *lru.Cache[Ino, metastore.Inode]
	stripe [inodeStripes]sync.RWMutex // of an inode: held while a record that changes it is applied

	mu     sync.Mutex // guards atimes
	atimes map[Ino]int64
}

func newInodeTable(db *metastore.DB) *inodeTable {
	c, err := lru.New[Ino, metastore.Inode](inodeCacheEntries)
	if err != nil {
		panic(err) // only a size below 1 fails
	}
	return &inodeTable{db: db, cache: c, atimes: make(map[Ino]int64)}
}

func (it *inodeTable) lock(ino Ino) *sync.RWMutex { return &it.stripe[uint64(ino)%inodeStripes] }

// get returns an inode to a reader that holds no lock; NotExist when there is none.
func (it *inodeTable) get(ino Ino) (metastore.Inode, error) {
	if n, ok := it.cache.Get(ino); ok {
		return n, nil
	}
	l := it.lock(ino)
	l.RLock()
	defer l.RUnlock()
	return it.load(ino)
}

// load is get for a caller that keeps changes of the inode out: by v.mu or by its stripe's lock.
func (it *inodeTable) load(ino Ino) (metastore.Inode, error) {
	if n, ok := it.cache.Get(ino); ok {
		return n, nil
	}
	n, err := it.db.Inode(ino)
	if errors.Is(err, metastore.ErrNotFound) {
		return n, NotExist
	}
	if err != nil {
		return n, err
	}
	it.mu.Lock()
	if at, ok := it.atimes[ino]; ok {
		n.Atime = at
	}
	it.mu.Unlock()
	it.cache.Add(ino, n)
	return n, nil
}

// stripeSet is a set of the table's stripes.
type stripeSet [inodeStripes / 64]uint64

func (set *stripeSet) add(ino Ino) {
	i := uint64(ino) % inodeStripes
	set[i/64] |= 1 << (i % 64)
}

// lockAll keeps readers of the inodes in these stripes out. Only the holder of v.mu calls it, and readers hold one
// stripe at most, so the order does not matter.
func (it *inodeTable) lockAll(set stripeSet) {
	for word, left := range set {
		for ; left != 0; left &= left - 1 {
			it.stripe[word*64+bits.TrailingZeros64(left)].Lock()
		}
	}
}

func (it *inodeTable) unlockAll(set stripeSet) {
	for word, left := range set {
		for ; left != 0; left &= left - 1 {
			it.stripe[word*64+bits.TrailingZeros64(left)].Unlock()
		}
	}
}

// replace makes the cache show what was applied. The caller holds the stripes of changed.
func (it *inodeTable) replace(changed []changedInode) {
	for i := range changed {
		c := &changed[i]
		if c.deleted {
			it.cache.Remove(c.ino)
		} else {
			it.cache.Add(c.ino, c.n)
		}
	}
	it.mu.Lock()
	if len(it.atimes) > 0 {
		for i := range changed {
			delete(it.atimes, changed[i].ino)
		}
	}
	it.mu.Unlock()
}

// touch records an access by the rule of relatime: when the access time is not after the last change, or a day
// old. The new time is journaled with the inode's next change, at Sync, at Close, or when enough have gathered,
// which touch reports.
func (it *inodeTable) touch(ino Ino, n *metastore.Inode, now int64) (full bool) {
	if n.Atime > n.Mtime && n.Atime > n.Ctime && now-n.Atime < relatimeNs {
		return false
	}
	l := it.lock(ino)
	l.RLock()
	defer l.RUnlock()
	cur, err := it.load(ino)
	if err != nil || now <= cur.Atime {
		return false
	}
	cur.Atime = now
	it.mu.Lock()
	defer it.mu.Unlock()
	if len(it.atimes) >= pendingAtimesMax {
		return true
	}
	it.atimes[ino] = now
	it.cache.Add(ino, cur)
	return len(it.atimes) == pendingAtimesMax
}

// pending returns the access times not journaled yet.
func (it *inodeTable) pending() []Ino {
	it.mu.Lock()
	defer it.mu.Unlock()
	inos := make([]Ino, 0, len(it.atimes))
	for ino := range it.atimes {
		inos = append(inos, ino)
	}
	return inos
}
