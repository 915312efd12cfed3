package volume

import (
	"sync"
	"time"

	"github.com/defs-fs/defs/metastore"
)

const (
	// eraseInline is how many extents an unlink removes itself before it leaves the rest to the reaper.
	eraseInline = 64
	// reapQueueMax bounds the orphans that wait in memory; more are found again in the metastore.
	reapQueueMax = 4096
	// reapBatch is how many orphans one record removes at most.
	reapBatch = 64
)

// references counts who may still use an inode without a name.
type references struct {
	mu      sync.Mutex
	counts  countTable
	orphans map[Ino]struct{} // referenced, without a name: removed with the last reference
}

// Acquire counts n references to an inode: the kernel's lookups and open handles. An inode without a name lives as
// long as it has references.
func (v *Volume) Acquire(ino Ino, n uint64) {
	r := &v.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts.set(ino, r.counts.get(ino)+n)
}

// Release gives n references back.
func (v *Volume) Release(ino Ino, n uint64) {
	if v.refs.release(ino, n) {
		v.reaper.add(ino)
	}
}

func (r *references) release(ino Ino, n uint64) (orphaned bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if count := r.counts.get(ino); count > n {
		r.counts.set(ino, count-n)
		return false
	}
	r.counts.set(ino, 0)
	_, orphaned = r.orphans[ino]
	delete(r.orphans, ino)
	return orphaned
}

// keep notes an inode that has lost its last name and reports whether references keep it, or will: an inode made
// without a name is kept until its first reference comes and goes.
func (r *references) keep(ino Ino) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts.get(ino) == 0 {
		_, unnamed := r.orphans[ino]
		return unnamed
	}
	r.orphans[ino] = struct{}{}
	return true
}

// keepUnnamed notes an inode that never had a name.
func (r *references) keepUnnamed(ino Ino) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.orphans[ino] = struct{}{}
}

// orphan deals with an inode whose last name this mutation takes: it is marked, and removed at once where nobody
// uses it and it is small.
func (t *tx) orphan(ino Ino, n metastore.Inode) error {
	if !t.v.refs.keep(ino) {
		_, erased, err := t.erase(ino, n, eraseInline)
		if err != nil || erased {
			return err
		}
		t.reaps = append(t.reaps, ino)
	} else {
		t.putInode(ino, n)
	}
	t.PutOrphan(ino)
	return nil
}

// erase removes an inode's extents and attributes, budget of them at most, and with the last one the inode itself.
func (t *tx) erase(ino Ino, n metastore.Inode, budget int) (used int, erased bool, err error) {
	erased = true
	if n.Allocated > 0 {
		err = t.v.extents.overlapping(ino, 0, n.Size, func(e metastore.Extent) bool {
			if used == budget {
				erased = false
				return false
			}
			used++
			t.DeleteExtent(ino, e)
			n.Allocated -= uint64(e.Len)
			t.bytes -= int64(e.Len)
			return true
		})
	}
	if err != nil || !erased {
		t.putInode(ino, n)
		return used, false, err
	}
	if n.Flags&flagXattrs != 0 {
		if err := t.v.db.Xattrs(ino, func(name string, _ []byte) bool {
			if used == budget {
				erased = false
				return false
			}
			used++
			t.DeleteXattr(ino, name)
			return true
		}); err != nil || !erased {
			t.putInode(ino, n)
			return used, false, err
		}
	}
	t.inodes--
	t.deleteInode(ino)
	return used, true, nil
}

// reaper removes inodes that have neither name nor reference, in records of bounded size. What a crash or a full
// queue leaves is found again by the marks in the metastore.
type reaper struct {
	v    *Volume
	wake chan struct{}
	quit chan struct{}
	done chan struct{}

	mu    sync.Mutex
	queue []Ino
	scan  bool // look for marks in the metastore
	busy  bool
	idle  *sync.Cond
}

func startReaper(v *Volume) *reaper {
	r := &reaper{v: v, wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}), scan: true}
	r.idle = sync.NewCond(&r.mu)
	go r.run()
	r.signal()
	return r
}

func (r *reaper) stop() {
	close(r.quit)
	<-r.done
}

func (r *reaper) add(ino Ino) {
	r.mu.Lock()
	if len(r.queue) < reapQueueMax {
		r.queue = append(r.queue, ino)
	} else {
		r.scan = true
	}
	r.mu.Unlock()
	r.signal()
}

func (r *reaper) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// wait returns when nothing is left to remove, or removing has failed.
func (r *reaper) wait() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.busy || len(r.queue) > 0 || r.scan {
		r.idle.Wait()
	}
}

func (r *reaper) run() {
	defer close(r.done)
	for {
		select {
		case <-r.quit:
			return
		case <-r.wake:
		}
		for more := true; more; {
			if !r.letPass() {
				return
			}
			more = r.step()
		}
	}
}

// letPass lets a burst of operations by the application go first, for at most 100 ms. It returns false when the
// reaper is to end.
func (r *reaper) letPass() bool {
	for range 10 {
		seen := r.v.foreground.begun.Load()
		select {
		case <-r.quit:
			return false
		case <-time.After(10 * time.Millisecond):
		}
		if r.v.foreground.begun.Load() == seen {
			break
		}
	}
	return true
}

// step removes one batch and reports whether there is more to do.
func (r *reaper) step() bool {
	r.mu.Lock()
	batch := append([]Ino(nil), r.queue[:min(len(r.queue), reapBatch)]...)
	r.queue = r.queue[len(batch):]
	scan := r.scan && len(batch) == 0
	if scan {
		r.scan = false
	}
	r.busy = true
	r.mu.Unlock()

	var err error
	var left []Ino
	if scan {
		left, err = r.find()
	} else if len(batch) > 0 {
		left, err = r.reap(batch)
	}
	if err != nil {
		r.v.log.Error("inodes without a name were not removed; the next mount tries again", "cause", err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	r.busy = false
	if err != nil {
		r.queue, r.scan = nil, false
	} else {
		r.queue = append(left, r.queue...)
	}
	more := len(r.queue) > 0 || r.scan
	if !more {
		r.idle.Broadcast()
	}
	return more
}

// find lists marked inodes, and asks for another scan where there are too many for the queue.
func (r *reaper) find() (found []Ino, err error) {
	more := false
	err = r.v.db.Orphans(func(ino Ino) bool {
		if r.v.refs.keep(ino) {
			return true
		}
		if len(found) == reapQueueMax {
			more = true
			return false
		}
		found = append(found, ino)
		return true
	})
	r.mu.Lock()
	r.scan = r.scan || more
	r.mu.Unlock()
	return found, err
}

// reap removes a batch and returns what is not finished.
func (r *reaper) reap(batch []Ino) (left []Ino, err error) {
	_, err = r.v.commit(func(t *tx) error {
		budget := extentsPerRecord
		for i, ino := range batch {
			n, err := t.inode(ino)
			if err == NotExist || err == nil && n.Nlink > 0 || r.v.refs.keep(ino) {
				continue
			}
			if err != nil {
				return err
			}
			used, erased, err := t.erase(ino, n, budget)
			if err != nil {
				return err
			}
			if !erased {
				left = batch[i:]
				return nil
			}
			t.DeleteOrphan(ino)
			budget -= used
		}
		return nil
	})
	return left, err
}
