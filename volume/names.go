package volume

import (
	"errors"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/defs-fs/defs/metastore"
)

const nameCacheEntries = 16384

// nameTable is a bounded cache of directory entries, and of names that are free: the metastore is slow to say so
// of a name that comes and goes often, as lock files do. The stripe of the directory's inode guards a name.
type nameTable struct {
	db     *metastore.DB
	inodes *inodeTable
	cache  *lru.Cache[nameKey, metastore.Dirent] // Ino 0: the name is free
}

type nameKey struct {
	parent Ino
	name   string
}

type changedName struct {
	parent Ino
	entry  metastore.Dirent
	free   bool
}

func newNameTable(inodes *inodeTable) *nameTable {
	c, err := lru.New[nameKey, metastore.Dirent](nameCacheEntries)
	if err != nil {
		panic(err) // only a size below 1 fails
	}
	return &nameTable{db: inodes.db, inodes: inodes, cache: c}
}

// get returns an entry to a reader that holds no lock; NotExist when there is none.
func (nt *nameTable) get(parent Ino, name string) (metastore.Dirent, error) {
	if d, ok := nt.cache.Get(nameKey{parent, name}); ok {
		return found(d)
	}
	l := nt.inodes.lock(parent)
	l.RLock()
	defer l.RUnlock()
	return nt.load(parent, name)
}

// load is get for a caller that keeps changes of the directory out: by v.mu or by its stripe's lock.
func (nt *nameTable) load(parent Ino, name string) (metastore.Dirent, error) {
	key := nameKey{parent, name}
	if d, ok := nt.cache.Get(key); ok {
		return found(d)
	}
	d, err := nt.db.Dirent(parent, name)
	if err != nil && !errors.Is(err, metastore.ErrNotFound) {
		return d, err
	}
	nt.cache.Add(key, d) // the zero Dirent when there is none
	return found(d)
}

func found(d metastore.Dirent) (metastore.Dirent, error) {
	if d.Ino == 0 {
		return d, NotExist
	}
	return d, nil
}

// replace makes the cache show what was applied. The caller holds the directories' stripes.
func (nt *nameTable) replace(changed []changedName) {
	for i := range changed {
		c := &changed[i]
		key := nameKey{c.parent, c.entry.Name}
		if c.free {
			nt.cache.Add(key, metastore.Dirent{})
		} else {
			nt.cache.Add(key, c.entry)
		}
	}
}
