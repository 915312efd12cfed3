package metastore

import (
	"encoding/binary"
	"fmt"

	"github.com/defs-fs/defs/cache"
)

// valueVersion opens every value that this package lays out itself. See
// FORMAT.md, "Metastore", for the byte tables.
const valueVersion = 1

// decoder reads fixed-width fields and remembers the first failure.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || len(d.b) < n {
		d.bad = true
		return nil
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) u8() uint8 {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if b := d.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) id() (id [16]byte) {
	copy(id[:], d.take(16))
	return id
}

func (d *decoder) require(ok bool) {
	if !ok {
		d.bad = true
	}
}

// end reports the first failure, or bytes left over.
func (d *decoder) end(what string) error {
	if d.bad || len(d.b) != 0 {
		return fmt.Errorf("decode %s: %w", what, ErrCorrupt)
	}
	return nil
}

// MarshalBinary returns the value of an "i" key.
func (n Inode) MarshalBinary() ([]byte, error) {
	if len(n.Target) > TargetBytesMax || len(n.Policy) > NameBytesMax {
		return nil, fmt.Errorf("encode inode: target of %d bytes, policy of %d: too long", len(n.Target), len(n.Policy))
	}
	b := make([]byte, 0, 1+20+16+32+16+3+len(n.Target)+len(n.Policy))
	b = append(b, valueVersion)
	for _, v := range [...]uint32{n.Mode, n.UID, n.GID, n.Rdev, n.Nlink} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	for _, v := range [...]uint64{n.Size, n.Allocated, uint64(n.Atime), uint64(n.Mtime), uint64(n.Ctime), uint64(n.Btime)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	b = binary.BigEndian.AppendUint32(b, n.Generation)
	b = binary.BigEndian.AppendUint32(b, n.Flags)
	b = binary.BigEndian.AppendUint64(b, uint64(n.Parent))
	b = binary.BigEndian.AppendUint16(b, uint16(len(n.Target)))
	b = append(b, n.Target...)
	b = append(b, uint8(len(n.Policy)))
	return append(b, n.Policy...), nil
}

// UnmarshalBinary decodes what MarshalBinary returned.
func (n *Inode) UnmarshalBinary(b []byte) error {
	d := decoder{b: b}
	d.require(d.u8() == valueVersion)
	n.Mode, n.UID, n.GID, n.Rdev, n.Nlink = d.u32(), d.u32(), d.u32(), d.u32(), d.u32()
	n.Size, n.Allocated = d.u64(), d.u64()
	n.Atime, n.Mtime, n.Ctime, n.Btime = int64(d.u64()), int64(d.u64()), int64(d.u64()), int64(d.u64())
	n.Generation, n.Flags, n.Parent = d.u32(), d.u32(), Ino(d.u64())
	target := int(d.u16())
	d.require(target <= TargetBytesMax)
	n.Target = string(d.take(target))
	n.Policy = string(d.take(int(d.u8())))
	return d.end("inode")
}

// encodeDirent returns the value of a "d" key, which holds the name itself.
func encodeDirent(e Dirent) []byte {
	b := make([]byte, 0, 18)
	b = append(b, valueVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Ino))
	b = append(b, e.Type)
	return binary.BigEndian.AppendUint64(b, e.Cookie)
}

func decodeDirent(name string, b []byte) (Dirent, error) {
	d := decoder{b: b}
	d.require(d.u8() == valueVersion)
	e := Dirent{Ino: Ino(d.u64()), Type: d.u8(), Cookie: d.u64(), Name: name}
	d.require(len(name) > 0 && len(name) <= NameBytesMax)
	return e, d.end("directory entry")
}

// encodeListing returns the value of a "c" key, which holds the cookie itself.
func encodeListing(e Dirent) []byte {
	b := make([]byte, 0, 10+len(e.Name))
	b = append(b, valueVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Ino))
	b = append(b, e.Type)
	return append(b, e.Name...)
}

func decodeListing(cookie uint64, b []byte) (Dirent, error) {
	d := decoder{b: b}
	d.require(d.u8() == valueVersion)
	e := Dirent{Ino: Ino(d.u64()), Type: d.u8(), Cookie: cookie}
	d.require(len(d.b) > 0 && len(d.b) <= NameBytesMax)
	e.Name = string(d.take(len(d.b)))
	return e, d.end("directory listing")
}

const (
	extentLocal      = 1 << 0
	extentRemote     = 1 << 1
	extentCompressed = 1 << 2
)

// encodeExtent returns the value of an "e" key, which holds the offset itself.
func encodeExtent(e Extent) []byte {
	var flags byte
	if e.HasLocal() {
		flags |= extentLocal
	}
	if e.HasRemote {
		flags |= extentRemote
		if e.Remote.Compressed {
			flags |= extentCompressed
		}
	}
	b := make([]byte, 0, 14+28+36)
	b = append(b, valueVersion, flags)
	b = binary.BigEndian.AppendUint32(b, e.Len)
	b = binary.BigEndian.AppendUint64(b, e.Seq)
	if e.HasLocal() {
		b = binary.BigEndian.AppendUint64(b, e.Local.Segment)
		b = binary.BigEndian.AppendUint32(b, e.Local.Offset)
		b = binary.BigEndian.AppendUint32(b, e.Local.Length)
		b = binary.BigEndian.AppendUint64(b, e.Local.Nonce)
		b = binary.BigEndian.AppendUint32(b, e.LocalOff)
	}
	if e.HasRemote {
		b = appendRemote(b, e.Remote)
	}
	return b
}

func appendRemote(b []byte, r Remote) []byte {
	b = append(b, r.Stripe[:]...)
	for _, v := range [...]uint32{r.Slice, r.StripeOff, r.StoredLen, r.SliceLen, r.Off} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func (d *decoder) remote(compressed bool) Remote {
	return Remote{Stripe: d.id(), Slice: d.u32(), StripeOff: d.u32(), StoredLen: d.u32(), SliceLen: d.u32(),
		Off: d.u32(), Compressed: compressed}
}

func decodeExtent(off uint64, b []byte) (Extent, error) {
	d := decoder{b: b}
	d.require(d.u8() == valueVersion)
	flags := d.u8()
	d.require(flags&^(extentLocal|extentRemote|extentCompressed) == 0)
	d.require(flags&extentCompressed == 0 || flags&extentRemote != 0)
	e := Extent{Off: off, Len: d.u32(), Seq: d.u64()}
	d.require(e.Len > 0)
	if flags&extentLocal != 0 {
		e.Local = cache.Ref{Segment: d.u64(), Offset: d.u32(), Length: d.u32(), Nonce: d.u64()}
		e.LocalOff = d.u32()
		d.require(uint64(e.LocalOff)+uint64(e.Len) <= uint64(e.Local.Length))
	}
	if flags&extentRemote != 0 {
		e.HasRemote = true
		e.Remote = d.remote(flags&extentCompressed != 0)
		d.require(uint64(e.Remote.Off)+uint64(e.Len) <= uint64(e.Remote.SliceLen))
	}
	return e, d.end("extent")
}

const (
	stripeMirrored = 1 << iota
	stripeComplete
	stripeCondemned
)

// MarshalBinary returns the value of an "s" key.
func (s StripeInfo) MarshalBinary() ([]byte, error) {
	if (s.Purpose != PurposeContent && s.Purpose != PurposeLog) || s.K < 1 || s.K > 100 || s.M < 0 || s.M > 100 || len(s.Holders) != s.K+s.M || len(s.Roots) != s.K+s.M ||
		s.IndexAcks < 0 || s.IndexAcks > 255 || s.IndexKeepers < 0 || s.IndexKeepers > 255 {
		return nil, fmt.Errorf("encode stripe: %d+%d shards with %d holders, %d of %d keepers: out of range",
			s.K, s.M, len(s.Holders), s.IndexAcks, s.IndexKeepers)
	}
	var flags byte
	if s.Mirrored {
		flags |= stripeMirrored
	}
	if s.Complete {
		flags |= stripeComplete
	}
	if s.Condemned {
		flags |= stripeCondemned
	}
	b := make([]byte, 0, 40+len(s.Holders)*142)
	b = append(b, valueVersion, byte(s.Purpose), byte(s.K), byte(s.M), flags, byte(s.IndexAcks), byte(s.IndexKeepers))
	b = binary.BigEndian.AppendUint32(b, s.ShardBytes)
	b = binary.BigEndian.AppendUint64(b, s.UsedBytes)
	b = binary.BigEndian.AppendUint32(b, s.Epoch)
	b = binary.BigEndian.AppendUint32(b, s.LockVersion)
	b = binary.BigEndian.AppendUint64(b, s.CreatedSeq)
	for _, h := range s.Holders {
		for _, id := range [...]string{h.Primary, h.Mirror} {
			if len(id) > HolderBytesMax {
				return nil, fmt.Errorf("encode stripe: node id of %d bytes: too long", len(id))
			}
			b = append(b, uint8(len(id)))
			b = append(b, id...)
		}
	}
	for i := range s.Roots {
		b = append(b, s.Roots[i][:]...)
	}
	return b, nil
}

// UnmarshalBinary decodes what MarshalBinary returned.
func (s *StripeInfo) UnmarshalBinary(b []byte) error {
	d := decoder{b: b}
	d.require(d.u8() == valueVersion)
	s.Purpose = Purpose(d.u8())
	d.require(s.Purpose == PurposeContent || s.Purpose == PurposeLog)
	s.K, s.M = int(d.u8()), int(d.u8())
	d.require(s.K >= 1 && s.K <= 100 && s.M <= 100)
	flags := d.u8()
	d.require(flags&^(stripeMirrored|stripeComplete|stripeCondemned) == 0)
	s.Mirrored, s.Complete, s.Condemned = flags&stripeMirrored != 0, flags&stripeComplete != 0, flags&stripeCondemned != 0
	s.IndexAcks, s.IndexKeepers = int(d.u8()), int(d.u8())
	s.ShardBytes, s.UsedBytes, s.Epoch, s.LockVersion, s.CreatedSeq = d.u32(), d.u64(), d.u32(), d.u32(), d.u64()
	if d.bad {
		return d.end("stripe")
	}
	s.Holders = make([]Holder, s.K+s.M)
	for i := range s.Holders {
		s.Holders[i] = Holder{Primary: string(d.take(int(d.u8()))), Mirror: string(d.take(int(d.u8())))}
	}
	s.Roots = make([][32]byte, s.K+s.M)
	for i := range s.Roots {
		copy(s.Roots[i][:], d.take(32))
	}
	return d.end("stripe")
}

// encodeDedup returns the value of an "h" key: where a slice with this hash is.
func encodeDedup(r Remote) []byte {
	b := make([]byte, 0, 2+36)
	b = append(b, valueVersion, 0)
	if r.Compressed {
		b[1] = 1
	}
	return appendRemote(b, r)
}

func decodeDedup(b []byte) (Remote, error) {
	d := decoder{b: b}
	d.require(d.u8() == valueVersion)
	flags := d.u8()
	d.require(flags <= 1)
	r := d.remote(flags == 1)
	return r, d.end("dedup entry")
}

func decodeU64(b []byte) (uint64, error) {
	d := decoder{b: b}
	v := d.u64()
	return v, d.end("number")
}

func decodeU32(b []byte) (uint32, error) {
	d := decoder{b: b}
	v := d.u32()
	return v, d.end("length")
}
