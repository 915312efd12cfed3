package volume

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
)

// Fault is one thing that Fsck found wrong. It names inodes, never files.
type Fault struct {
	Ino    Ino // 0 for the volume as a whole
	Detail string
	Lost   bool // bytes that are known to be lost, at a place where reads fail
}

// Checked is what Fsck looked at.
type Checked struct {
	Inodes, Entries, Extents int64
	LocalBytes               int64 // read from this disk and authenticated
	RemoteBytes              int64 // that only the peers have: not read
}

// Fsck checks the tree and every byte on this disk: each entry leads to an
// inode of its type, each inode is reached as often as it says, extents do not
// overlap and lie in a local segment or a known stripe, local bytes are
// authentic, and the totals are right. It changes nothing and asks no peer;
// report is called for each fault. Nothing else should change the volume
// meanwhile. Opening the volume has already verified the journal.
func (v *Volume) Fsck(ctx context.Context, report func(Fault)) (Checked, error) {
	v.mu.Lock()
	snapshot, err := v.db.Snapshot()
	total := v.usage
	v.mu.Unlock()
	if err != nil {
		return Checked{}, wrap("fsck", 0, err)
	}
	defer snapshot.Close()
	c := &checker{ctx: ctx, v: v, tree: snapshot, report: report, links: make(map[Ino]uint32), segments: make(map[uint64]bool)}
	for _, s := range v.store.Segments() {
		c.segments[s.ID] = true
	}
	for _, note := range v.store.Notes() {
		c.fault(0, "%s", note)
	}
	for _, s := range v.store.Lost() {
		c.fault(0, "segment %d is lost: %s. No record of it is needed any more; files whose only copy was in it are listed below", s.ID, s.Reason)
	}
	if err := v.db.Verify(ctx); errors.Is(err, metastore.ErrCorrupt) {
		c.fault(0, "%v; run defs fsck --repair", err)
		return c.checked, nil
	} else if err != nil {
		return c.checked, wrap("fsck", 0, err)
	}
	if err := errors.Join(c.walk(), c.inodes(total)); err != nil {
		return c.checked, wrap("fsck", 0, err)
	}
	return c.checked, nil
}

// Paths returns a path, from the root, for each of these inodes that has one.
func (v *Volume) Paths(ctx context.Context, inos map[Ino]bool) (map[Ino]string, error) {
	found := make(map[Ino]string)
	dirs := map[Ino]string{RootIno: ""}
	for len(dirs) > 0 && len(found) < len(inos) {
		next := make(map[Ino]string)
		for parent, path := range dirs {
			if err := ctx.Err(); err != nil {
				return nil, wrap("find paths", 0, err)
			}
			if err := v.db.ReadDir(parent, 0, func(e metastore.Dirent) bool {
				if inos[e.Ino] {
					found[e.Ino] = path + "/" + e.Name
				}
				if e.Type == syscall.DT_DIR {
					next[e.Ino] = path + "/" + e.Name
				}
				return true
			}); err != nil {
				return nil, wrap("find paths", parent, err)
			}
		}
		dirs = next
	}
	return found, nil
}

type checker struct {
	ctx      context.Context
	v        *Volume
	tree     *metastore.Snapshot
	report   func(Fault)
	links    map[Ino]uint32 // names that lead to an inode; for directories also "." and their children's ".."
	segments map[uint64]bool
	checked  Checked
	buf      []byte
}

func (c *checker) fault(ino Ino, format string, args ...any) {
	c.report(Fault{Ino: ino, Detail: fmt.Sprintf(format, args...)})
}

// walk follows every entry from the root and counts links.
func (c *checker) walk() error {
	c.links[RootIno] = 2
	pending := []Ino{RootIno}
	for len(pending) > 0 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		parent := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		var failed error
		err := c.tree.ReadDir(parent, 0, func(e metastore.Dirent) bool {
			c.checked.Entries++
			n, err := c.tree.Inode(e.Ino)
			if errors.Is(err, metastore.ErrNotFound) {
				c.fault(parent, "the entry with cookie %d leads to inode %d, which does not exist", e.Cookie, e.Ino)
				return true
			}
			if err != nil {
				failed = err
				return false
			}
			if e.Type != uint8(n.Mode&syscall.S_IFMT>>12) {
				c.fault(parent, "the entry with cookie %d says type %d, inode %d has mode %o", e.Cookie, e.Type, e.Ino, n.Mode)
			}
			if byName, err := c.tree.Dirent(parent, e.Name); err != nil || byName != e {
				c.fault(parent, "the entry with cookie %d is not found by its name", e.Cookie)
			}
			if n.Mode&syscall.S_IFMT != syscall.S_IFDIR {
				c.links[e.Ino]++
				return true
			}
			if c.links[e.Ino] > 0 {
				c.fault(e.Ino, "the directory has a second name, in inode %d", parent)
				return true
			}
			if n.Parent != parent {
				c.fault(e.Ino, "the directory says its parent is inode %d, it is %d", n.Parent, parent)
			}
			c.links[e.Ino] = 2
			c.links[parent]++
			pending = append(pending, e.Ino)
			return true
		})
		if err := errors.Join(err, failed); err != nil {
			return err
		}
	}
	return nil
}

// inodes checks each inode against the links found, its extents, and the totals.
func (c *checker) inodes(total usage) error {
	orphans := make(map[Ino]bool)
	if err := c.tree.Orphans(func(ino Ino) bool { orphans[ino] = true; return true }); err != nil {
		return err
	}
	var sum usage
	var failed error
	err := c.tree.Inodes(func(ino Ino, n metastore.Inode) bool {
		c.checked.Inodes++
		if n.Nlink != c.links[ino] {
			c.fault(ino, "the link count is %d, %d names lead here", n.Nlink, c.links[ino])
		}
		if n.Nlink == 0 && !orphans[ino] {
			c.fault(ino, "nothing leads here, and it is not marked for removal")
		}
		allocated, err := c.extents(ino)
		if err != nil {
			failed = err
			return false
		}
		if allocated != n.Allocated {
			c.fault(ino, "extents hold %d bytes, the inode says %d", allocated, n.Allocated)
		}
		sum = sum.plus(int64(n.Allocated), 1)
		return true
	})
	if err := errors.Join(err, failed); err != nil {
		return err
	}
	if sum != total {
		c.fault(0, "inodes and bytes are %d and %d, the totals say %d and %d", sum.inodes, sum.bytes, total.inodes, total.bytes)
	}
	return nil
}

func (c *checker) extents(ino Ino) (allocated uint64, err error) {
	var end uint64
	var failed error
	err = c.tree.Extents(ino, 0, 1<<63, func(e metastore.Extent) bool {
		if failed = c.ctx.Err(); failed != nil {
			return false
		}
		c.checked.Extents++
		allocated += uint64(e.Len)
		if e.Off < end {
			c.fault(ino, "the extents at %d overlap", e.Off)
		}
		end = e.End()
		if failed = c.content(ino, e); failed != nil {
			return false
		}
		return true
	})
	return allocated, errors.Join(err, failed)
}

// content checks that an extent's bytes are somewhere, and reads them where
// they are on this disk.
func (c *checker) content(ino Ino, e metastore.Extent) error {
	if e.HasRemote {
		_, err := c.tree.Stripe(e.Remote.Stripe)
		switch {
		case errors.Is(err, metastore.ErrNotFound):
			c.fault(ino, "the extent at %d is in stripe %x, which is not known", e.Off, e.Remote.Stripe)
		case err != nil:
			return err
		}
		if uint64(e.Remote.Off)+uint64(e.Len) > uint64(e.Remote.SliceLen) {
			c.fault(ino, "the extent at %d goes past the end of its slice", e.Off)
		}
	}
	if e.Lost() {
		c.report(Fault{Ino: ino, Detail: fmt.Sprintf("%d bytes at %d are lost", e.Len, e.Off), Lost: true})
		return nil
	}
	if !e.HasLocal() || !c.segments[e.Local.Segment] {
		if !e.HasRemote {
			c.fault(ino, "the extent at %d is in segment %d, which is not on this disk, and nowhere else", e.Off, e.Local.Segment)
			return nil
		}
		c.checked.RemoteBytes += int64(e.Len)
		return nil
	}
	if uint64(e.LocalOff)+uint64(e.Len) > uint64(e.Local.Length) {
		c.fault(ino, "the extent at %d goes past the end of its record in segment %d", e.Off, e.Local.Segment)
		return nil
	}
	const step = 1 << 20
	if c.buf == nil {
		c.buf = make([]byte, step)
	}
	for at := 0; at < int(e.Len); at += step {
		part := c.buf[:min(step, int(e.Len)-at)]
		err := c.v.store.ReadAt(e.Local, int(e.LocalOff)+at, part)
		switch {
		case errors.Is(err, cache.ErrEvicted) && e.HasRemote:
			c.checked.RemoteBytes += int64(int(e.Len) - at)
			return nil
		case errors.Is(err, cache.ErrCorrupt), errors.Is(err, cache.ErrEvicted):
			c.fault(ino, "the extent at %d: %v", e.Off, err)
			return nil
		case err != nil:
			return err
		}
		c.checked.LocalBytes += int64(len(part))
	}
	return nil
}
