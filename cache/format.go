package cache

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// Layout of a segment file (FORMAT.md, "Segment").
const (
	pageBytes      = 4096
	slotAt         = pageBytes // two tail slots of one page each
	dataStart      = 3 * pageBytes
	headerBytes    = 92 // segment header, at offset 0
	frameBytes     = 88 // frame header
	blockBytes     = BlockBytes
	tagBytes       = 16
	formatVersion  = 1
	slotFixedBytes = 76
	slotMaxDirty   = pageBytes - slotFixedBytes - tagBytes // bytes of the dirty bitmap
	slotClosed     = 1                                     // flag of a slot

	// BlockBytes is the unit in which a record's data is sealed: one damaged
	// byte costs so many.
	BlockBytes = 16 << 10
	// MaxDataBytes and MaxMetaBytes bound one record.
	MaxDataBytes = 16 << 20
	MaxMetaBytes = 16 << 20
)

// Purposes keep the uses of one session key apart: they are the first four
// bytes of the nonce, the counter is the other eight.
const (
	purposeData uint32 = iota + 1
	purposeMeta
	purposeFrame
	purposeSlot
)

const (
	headerMagic = "DeFSsegm"
	frameMagic  = "DFrm"
	slotMagic   = "DTai"
)

var errInvalid = errors.New("does not verify")

type nonce [12]byte

func makeNonce(purpose uint32, counter uint64) (n nonce) {
	binary.BigEndian.PutUint32(n[:4], purpose)
	binary.BigEndian.PutUint64(n[4:], counter)
	return n
}

// chain is the running hash over frame headers: each value authenticates its
// header and, through it, the value before.
type chain [tagBytes]byte

func newGCM(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the key has 32 bytes
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// deviceAEAD derives the key of one use from the device key (HKDF-SHA256, RFC 5869).
func deviceAEAD(device [32]byte, use string) cipher.AEAD {
	key, err := hkdf.Key(sha256.New, device[:], nil, "defs cache v1 "+use, 32)
	if err != nil {
		panic(err) // the length is constant
	}
	return newGCM(key)
}

// deviceKeys are the uses of the device key.
type deviceKeys struct {
	header cipher.AEAD // seals session keys in segment headers; random nonces
	tail   cipher.AEAD // authenticates the tail file's slots; random nonces
}

// segmentHeader is the first page of a segment file.
type segmentHeader struct {
	ID        uint64
	CreatedNs int64 // Unix time
	Key       [32]byte
}

// encode seals the session key with the header AEAD; the fields before it are
// authenticated with it.
func (h segmentHeader) encode(aead cipher.AEAD, n nonce) []byte {
	b := make([]byte, pageBytes)
	copy(b, headerMagic)
	binary.BigEndian.PutUint16(b[8:], formatVersion)
	binary.BigEndian.PutUint64(b[16:], h.ID)
	binary.BigEndian.PutUint64(b[24:], uint64(h.CreatedNs))
	copy(b[32:44], n[:])
	aead.Seal(b[:44], n[:], h.Key[:], b[:44])
	return b
}

func decodeSegmentHeader(aead cipher.AEAD, b []byte) (h segmentHeader, err error) {
	if len(b) < headerBytes || string(b[:8]) != headerMagic {
		return h, fmt.Errorf("segment header %w: no magic", errInvalid)
	}
	if v := binary.BigEndian.Uint16(b[8:]); v != formatVersion {
		return h, fmt.Errorf("segment header %w: version %d, this program knows %d", errInvalid, v, formatVersion)
	}
	if _, err := aead.Open(h.Key[:0], b[32:44], b[44:headerBytes], b[:44]); err != nil {
		return segmentHeader{}, fmt.Errorf("segment header %w: damaged, or of another device", errInvalid)
	}
	h.ID = binary.BigEndian.Uint64(b[16:])
	h.CreatedNs = int64(binary.BigEndian.Uint64(b[24:]))
	return h, nil
}

// frameHeader precedes a record's sealed data and sealed meta.
type frameHeader struct {
	Seq        uint64
	DataNonce  uint64 // counter of the first data block; block i has DataNonce+i
	MetaNonce  uint64 // counter of the meta and of the header's own tag
	DataLength uint32 // plaintext bytes
	MetaLength uint32 // plaintext bytes
	MetaTag    [tagBytes]byte
	Prev       chain // of the frame before, in this segment or the one before
	Chain      chain
}

func (h *frameHeader) dataOffset(off int64) int64 { return off + frameBytes }
func (h *frameHeader) metaOffset(off int64) int64 {
	return off + frameBytes + sealedBytes(int(h.DataLength))
}
func (h *frameHeader) end(off int64) int64 { return h.metaOffset(off) + int64(h.MetaLength) }

// sealedBytes is the length on disk of a run of plaintext data.
func sealedBytes(plain int) int64 {
	blocks := (plain + blockBytes - 1) / blockBytes
	return int64(plain) + int64(blocks)*tagBytes
}

// frameAAD binds a header to its place: segment and offset.
func frameAAD(dst []byte, segment uint64, off int64, fields []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, segment)
	dst = binary.BigEndian.AppendUint64(dst, uint64(off))
	return append(dst, fields...)
}

// encode writes the header into b (frameBytes long) and sets h.Chain.
func (h *frameHeader) encode(aead cipher.AEAD, segment uint64, off int64, b []byte) {
	clear(b)
	copy(b, frameMagic)
	b[4] = formatVersion
	binary.BigEndian.PutUint64(b[8:], h.Seq)
	binary.BigEndian.PutUint64(b[16:], h.DataNonce)
	binary.BigEndian.PutUint64(b[24:], h.MetaNonce)
	binary.BigEndian.PutUint32(b[32:], h.DataLength)
	binary.BigEndian.PutUint32(b[36:], h.MetaLength)
	copy(b[40:56], h.MetaTag[:])
	copy(b[56:72], h.Prev[:])
	var aad [16 + 72]byte
	n := makeNonce(purposeFrame, h.MetaNonce)
	aead.Seal(h.Chain[:0], n[:], nil, frameAAD(aad[:0], segment, off, b[:72]))
	copy(b[72:88], h.Chain[:])
}

// decodeFrameHeader verifies the header that lies at off in the segment. The
// lengths of a header that verifies are within MaxDataBytes and MaxMetaBytes.
func decodeFrameHeader(aead cipher.AEAD, segment uint64, off int64, b []byte) (h frameHeader, err error) {
	if len(b) < frameBytes || string(b[:4]) != frameMagic {
		return h, fmt.Errorf("frame header %w: no magic", errInvalid)
	}
	if b[4] != formatVersion {
		return h, fmt.Errorf("frame header %w: version %d, this program knows %d", errInvalid, b[4], formatVersion)
	}
	h.Seq = binary.BigEndian.Uint64(b[8:])
	h.DataNonce = binary.BigEndian.Uint64(b[16:])
	h.MetaNonce = binary.BigEndian.Uint64(b[24:])
	h.DataLength = binary.BigEndian.Uint32(b[32:])
	h.MetaLength = binary.BigEndian.Uint32(b[36:])
	copy(h.MetaTag[:], b[40:56])
	copy(h.Prev[:], b[56:72])
	copy(h.Chain[:], b[72:88])
	var aad [16 + 72]byte
	n := makeNonce(purposeFrame, h.MetaNonce)
	if _, err := aead.Open(nil, n[:], b[72:88], frameAAD(aad[:0], segment, off, b[:72])); err != nil {
		return frameHeader{}, fmt.Errorf("frame header %w: wrong tag", errInvalid)
	}
	if h.DataLength > MaxDataBytes || h.MetaLength > MaxMetaBytes {
		return frameHeader{}, fmt.Errorf("frame header %w: lengths %d and %d are over the limits", errInvalid, h.DataLength, h.MetaLength)
	}
	return h, nil
}

// blockName is what a data block is sealed under. The nonce, unique in the
// session, names the run; the associated data binds the block to its place in
// it: the run's plaintext length and the block's number.
type blockName struct {
	nonce nonce
	aad   [8]byte
}

func (b *blockName) set(first uint64, length uint32, index int) {
	b.nonce = makeNonce(purposeData, first+uint64(index))
	binary.BigEndian.PutUint32(b.aad[:4], length)
	binary.BigEndian.PutUint32(b.aad[4:], uint32(index))
}

func metaAAD(seq uint64) (aad [8]byte) {
	binary.BigEndian.PutUint64(aad[:], seq)
	return aad
}

// position is a place in the journal: the end of the frame Seq. The zero
// position is the start of an empty journal.
type position struct {
	Seq     uint64
	Segment uint64
	Offset  int64 // end of the frame in its segment
	Chain   chain // of that frame
}

// tailSlot is one of two alternating pages that hold the highest position whose
// flush had returned when the slot was written.
type tailSlot struct {
	Generation uint64 // the slot of the higher one is the newer
	position
	// Closed says that the store was closed: no frame follows the position.
	// Only the tail file has it, and what follows.
	Closed bool
	// Dirty lists the segments up to position.Segment that must exist.
	Dirty []uint64
}

// encode fills one page. place is the segment that holds the slot, 0 for the
// tail file. Dirty is sorted and spans at most slotMaxDirty*8 ids.
func (t *tailSlot) encode(aead cipher.AEAD, n nonce, place uint64) ([]byte, error) {
	var base uint64
	var bitmap []byte
	if len(t.Dirty) > 0 {
		base = t.Dirty[0]
		span := t.Dirty[len(t.Dirty)-1] - base + 1
		if span > slotMaxDirty*8 {
			return nil, fmt.Errorf("the journal spans %d segments, at most %d fit its tail", span, slotMaxDirty*8)
		}
		bitmap = make([]byte, (span+7)/8)
		for _, id := range t.Dirty {
			bitmap[(id-base)/8] |= 1 << ((id - base) % 8)
		}
	}
	page := make([]byte, pageBytes)
	copy(page, slotMagic)
	page[4] = formatVersion
	if t.Closed {
		page[5] = slotClosed
	}
	binary.BigEndian.PutUint16(page[6:], uint16(len(bitmap)))
	binary.BigEndian.PutUint64(page[8:], t.Generation)
	binary.BigEndian.PutUint64(page[16:], t.Seq)
	binary.BigEndian.PutUint64(page[24:], t.Segment)
	binary.BigEndian.PutUint64(page[32:], uint64(t.Offset))
	copy(page[40:56], t.Chain[:])
	binary.BigEndian.PutUint64(page[56:], base)
	copy(page[64:76], n[:])
	end := slotFixedBytes + copy(page[slotFixedBytes:], bitmap)
	aead.Seal(page[:end], n[:], nil, slotAAD(place, page[:end]))
	return page, nil
}

func slotAAD(place uint64, fields []byte) []byte {
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(fields)), place), fields...)
}

func decodeTailSlot(aead cipher.AEAD, place uint64, page []byte) (t tailSlot, err error) {
	if len(page) < pageBytes || string(page[:4]) != slotMagic {
		return t, fmt.Errorf("tail slot %w: no magic", errInvalid)
	}
	if page[4] != formatVersion {
		return t, fmt.Errorf("tail slot %w: version %d, this program knows %d", errInvalid, page[4], formatVersion)
	}
	bitmapBytes := int(binary.BigEndian.Uint16(page[6:]))
	if bitmapBytes > slotMaxDirty {
		return t, fmt.Errorf("tail slot %w: bitmap of %d bytes", errInvalid, bitmapBytes)
	}
	end := slotFixedBytes + bitmapBytes
	if _, err := aead.Open(nil, page[64:76], page[end:end+tagBytes], slotAAD(place, page[:end])); err != nil {
		return t, fmt.Errorf("tail slot %w: wrong tag", errInvalid)
	}
	t.Closed = page[5]&slotClosed != 0
	t.Generation = binary.BigEndian.Uint64(page[8:])
	t.Seq = binary.BigEndian.Uint64(page[16:])
	t.Segment = binary.BigEndian.Uint64(page[24:])
	t.Offset = int64(binary.BigEndian.Uint64(page[32:]))
	copy(t.Chain[:], page[40:56])
	base := binary.BigEndian.Uint64(page[56:])
	for i, bits := range page[slotFixedBytes:end] {
		for bit := range 8 {
			if bits&(1<<bit) != 0 {
				t.Dirty = append(t.Dirty, base+uint64(i*8+bit))
			}
		}
	}
	return t, nil
}

// newestSlot decodes two pages and returns the newer valid slot. found is false
// when neither was ever written; torn is true when something is written and
// none is valid.
func newestSlot(aead cipher.AEAD, place uint64, pages []byte) (t tailSlot, found, torn bool) {
	written := false
	for i := range 2 {
		page := pages[i*pageBytes : (i+1)*pageBytes]
		slot, err := decodeTailSlot(aead, place, page)
		if err != nil {
			written = written || !allZero(page)
			continue
		}
		if !found || slot.Generation > t.Generation {
			t, found = slot, true
		}
	}
	return t, found, written && !found
}

func allZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}
