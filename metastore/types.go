package metastore

import (
	"math"

	"github.com/defs-fs/defs/cache"
)

// Ino numbers an inode: 16-bit device slot ‖ 48-bit counter.
type Ino uint64

// RootIno is the inode of the volume's top directory.
const RootIno Ino = 1

// NewIno builds an inode number from a device slot and that device's counter
// (48 bits).
func NewIno(slot uint16, counter uint64) Ino {
	return Ino(uint64(slot)<<48 | counter&(1<<48-1))
}

// Slot returns the slot of the device that made the inode.
func (i Ino) Slot() uint16 { return uint16(i >> 48) }

// Inode is what the tree knows about one file, directory or other node.
type Inode struct {
	Mode       uint32 // type and permission bits as in stat(2)
	UID, GID   uint32
	Rdev       uint32
	Nlink      uint32
	Size       uint64 // bytes
	Allocated  uint64 // bytes that extents cover; kept by the volume
	Atime      int64  // ns since 1970
	Mtime      int64
	Ctime      int64
	Btime      int64
	Generation uint32
	Flags      uint32 // the volume's own
	Parent     Ino    // directory; of a file the one that it was named in last
	Target     string // of symbolic links, at most 4095 bytes
	Policy     string // storage policy of a directory, "" inherits
}

// Dirent is one name in a directory.
type Dirent struct {
	Ino    Ino
	Type   uint8  // DT_* as in readdir(3)
	Cookie uint64 // position in the listing; unique in the directory, never reused
	Name   string // 1 to 255 bytes
}

// Remote tells where placed bytes are: in which slice of which stripe.
type Remote struct {
	Stripe     [16]byte
	Slice      uint32 // number of the slice in the stripe
	StripeOff  uint32 // of the sealed slice in the stripe's data, bytes
	StoredLen  uint32 // bytes that were sealed: SliceLen, or fewer when compressed
	SliceLen   uint32 // bytes of the whole slice before compression
	Compressed bool
	Off        uint32 // of the extent's first byte in the slice before compression
}

// Extent maps a run of a file's bytes to where they are kept. Extents of one
// file never overlap; what none covers reads as zeros.
type Extent struct {
	Off       uint64    // in the file, bytes
	Len       uint32    // bytes, at least 1
	Seq       uint64    // journal sequence of the write
	Local     cache.Ref // in the local segment store; the zero Ref when not there
	LocalOff  uint32    // of the extent's first byte in Local's plaintext
	HasRemote bool      // Remote is set: the bytes are placed in a stripe
	Remote    Remote
}

// Lost reports whether the extent's bytes are nowhere: its only copy was
// damaged. It keeps its place in the file, so that reads fail there.
func (e Extent) Lost() bool { return !e.HasRemote && !e.HasLocal() }

// HasLocal reports whether the extent refers to the local segment store.
func (e Extent) HasLocal() bool { return e.Local.Length != 0 }

// End returns the offset in the file after the extent's last byte.
func (e Extent) End() uint64 { return e.Off + uint64(e.Len) }

// Holder names the nodes that keep one shard; "" where there is none (yet).
type Holder struct {
	Primary, Mirror string // node ids
}

// Purpose of a stripe.
type Purpose uint8

const (
	PurposeContent Purpose = iota + 1 // file content
	PurposeLog                        // log segments and checkpoints
)

// StripeInfo is what a device remembers of one stripe.
type StripeInfo struct {
	Purpose      Purpose
	K, M         int // 1 to 100 each
	ShardBytes   uint32
	UsedBytes    uint64 // of the stripe's data that sealed slices fill
	Epoch        uint32 // of the key bundle
	LockVersion  uint32
	Mirrored     bool       // the policy wants a mirror of every shard
	Complete     bool       // every shard (and mirror) is placed and every keeper has the index record
	Condemned    bool       // dropped by a cut; deleted once a published head has dropped it
	IndexAcks    int        // keepers that acknowledged the index record
	IndexKeepers int        // keepers it was sent to
	CreatedSeq   uint64     // journal sequence when the stripe was sealed, or CreatedElsewhere
	Holders      []Holder   // one per shard, len == K+M
	Roots        [][32]byte // one per shard, len == K+M: what its bytes are verified against
}

// CreatedElsewhere is the CreatedSeq of a stripe that another device of the
// volume has sealed. Whether that one still needs it cannot be known here.
const CreatedElsewhere = math.MaxUint64

// Placed counts the shards with a primary.
func (s StripeInfo) Placed() int {
	n := 0
	for _, h := range s.Holders {
		if h.Primary != "" {
			n++
		}
	}
	return n
}

// Unplaced is a run of a file's bytes that no stripe has.
type Unplaced struct {
	Segment uint64 // that has them; 0 where they are lost
	Ino     Ino
	Off     uint64 // in the file
	Len     uint32
}

// Reference is an extent's use of a slice.
type Reference struct {
	Stripe [16]byte
	Slice  uint32
	Ino    Ino
	Off    uint64 // in the file
	Len    uint32
}

// Counters of the volume, kept under "g" keys. The running value lives in the
// volume; it may store a bound ahead of the value, so that not every create
// writes it.
const (
	CounterIno    = "next-ino"
	CounterCookie = "next-cookie"
)
