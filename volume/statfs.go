package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/metastore"
)

// Stat is what statfs shows.
type Stat struct {
	BlockBytes          uint32
	Blocks, Free, Avail uint64 // in units of BlockBytes
	Files, FilesFree    uint64
	NameMaxBytes        uint32
}

const statBlockBytes = 4096

// capacity is what the pool offers the volume, of user's bytes after coding.
type capacity struct{ freeBytes uint64 }

// StatFS returns what the volume holds and what it could still take: the pool's room, and until that is known the
// room of the disk that the journal is on.
func (v *Volume) StatFS(ctx context.Context) (Stat, error) {
	var free uint64
	if c := v.capacity.Load(); c != nil {
		free = c.freeBytes
	} else {
		var disk unix.Statfs_t
		if err := unix.Statfs(v.dir, &disk); err != nil {
			return Stat{}, wrap("statfs", 0, err)
		}
		free = disk.Bavail * uint64(disk.Bsize)
	}
	v.mu.Lock()
	used, next := v.usage, v.nextID
	v.mu.Unlock()
	s := Stat{
		BlockBytes: statBlockBytes, Free: free / statBlockBytes, Avail: free / statBlockBytes,
		FilesFree: 1<<48 - next, NameMaxBytes: nameMaxBytes,
	}
	s.Blocks = (used.bytes+statBlockBytes-1)/statBlockBytes + s.Free
	s.Files = used.inodes + s.FilesFree
	return s, nil
}

// usage counts what the volume holds: bytes that extents cover, and inodes. Each record that changes it stores it.
type usage struct{ bytes, inodes uint64 }

// usageName is the metastore's name for it: 8 bytes each, big-endian.
const usageName = "usage"

func (u usage) plus(bytes, inodes int64) usage {
	return usage{u.bytes + uint64(bytes), u.inodes + uint64(inodes)}
}

func (u usage) marshal() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, u.bytes), u.inodes)
}

// readUsage reads the stored figures, or counts where there are none.
func readUsage(r metastore.Reader) (u usage, err error) {
	b, err := r.Meta(usageName)
	if errors.Is(err, metastore.ErrNotFound) {
		err = r.Inodes(func(_ Ino, n metastore.Inode) bool {
			u = u.plus(int64(n.Allocated), 1)
			return true
		})
		return u, err
	}
	if err == nil && len(b) != 16 {
		err = fmt.Errorf("%d bytes, not 16: %w", len(b), metastore.ErrCorrupt)
	}
	if err != nil {
		return u, fmt.Errorf("read the usage: %w", err)
	}
	return usage{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}, nil
}
