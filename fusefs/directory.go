package fusefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/defs-fs/defs/volume"
)

// Cookies of the two entries that every directory has; the volume's own are larger.
const (
	cookieDot    = 1
	cookieDotDot = 2
)

// OpenDir is answered "not implemented": the kernel then opens directories by itself and caches their listings
// until the directory changes. A position is a cookie, so there is nothing to keep between requests.
func (f *filesystem) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

func (f *filesystem) ReleaseDir(*fuse.ReleaseIn) {}

func (f *filesystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(in, out.AddDirEntry)
}

// ReadDirPlus adds the attributes, which saves the kernel a lookup of each name. The kernel takes each entry as
// looked up, except "." and "..". An entry that vanishes in between is sent without attributes.
func (f *filesystem) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(in, func(e fuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		if e.Off == cookieDot || e.Off == cookieDotDot {
			return true
		}
		if a, err := f.volume.GetAttr(quick, volume.Ino(e.Ino)); err == nil {
			f.enter(entry, &a)
		}
		return true
	})
}

// list adds entries after the cookie in.Offset until add refuses one or there are no more.
func (f *filesystem) list(in *fuse.ReadIn, add func(fuse.DirEntry) bool) fuse.Status {
	dir := volume.Ino(in.NodeId)
	if in.Offset < cookieDot && !add(fuse.DirEntry{Name: ".", Ino: in.NodeId, Mode: fuse.S_IFDIR, Off: cookieDot}) {
		return fuse.OK
	}
	if in.Offset < cookieDotDot {
		parent, err := f.volume.Parent(quick, dir)
		if err != nil {
			return f.nodeStatus("readdir", in.NodeId, err)
		}
		if !add(fuse.DirEntry{Name: "..", Ino: uint64(parent), Mode: fuse.S_IFDIR, Off: cookieDotDot}) {
			return fuse.OK
		}
	}
	err := f.volume.ReadDir(quick, dir, max(in.Offset, cookieDotDot), func(e volume.Dirent) bool {
		return add(fuse.DirEntry{Name: e.Name, Ino: uint64(e.Ino), Mode: uint32(e.Type) << 12, Off: e.Cookie})
	})
	return f.nodeStatus("readdir", in.NodeId, err)
}
