package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/defs-fs/defs/erasure"
)

const (
	// SegmentBytes is the plaintext length of a segment, the unit in which a
	// slice can be opened. The last one of a slice may be shorter.
	SegmentBytes = 64 << 10
	// CommitmentBytes is the length of the key commitment that a sealed slice
	// begins with.
	CommitmentBytes = 32

	tagBytes           = 16
	sealedSegmentBytes = SegmentBytes + tagBytes
	contextBytes       = 1 + 16 + 16 + 4 + 4 + 4
)

// What a slice holds; part of SliceContext.
const (
	PurposeContent byte = 1 // file content
	PurposeLog     byte = 2 // log segments and checkpoints
)

// SliceContext says which slice it is. Every field is bound into key,
// commitment and tags, so a slice opens only as what it was sealed as.
type SliceContext struct {
	Volume  [16]byte
	Stripe  erasure.StripeID
	Slice   uint32 // number within the stripe
	Epoch   uint32
	Length  uint32 // plaintext bytes
	Purpose byte
}

func (c SliceContext) encode() [contextBytes]byte {
	var b [contextBytes]byte
	b[0] = c.Purpose
	copy(b[1:], c.Volume[:])
	copy(b[17:], c.Stripe[:])
	binary.BigEndian.PutUint32(b[33:], c.Epoch)
	binary.BigEndian.PutUint32(b[37:], c.Slice)
	binary.BigEndian.PutUint32(b[41:], c.Length)
	return b
}

func (c SliceContext) segments() int {
	return max(1, (int(c.Length)+SegmentBytes-1)/SegmentBytes)
}

// SealedBytes is the sealed length of a slice of plain bytes: the commitment
// and 16 bytes for each segment; a slice of 0 bytes is one empty segment.
func SealedBytes(plain int) int {
	segments := max(1, (plain+SegmentBytes-1)/SegmentBytes)
	return CommitmentBytes + plain + segments*tagBytes
}

// SegmentRange says what to fetch to read plaintext [off, off+n) of a slice of
// lengthBytes: sealed bytes [sealedOff, sealedOff+sealedLen), which begin with
// segment first. n == 0 needs nothing: sealedLen == 0.
func SegmentRange(lengthBytes, off, n int) (first, sealedOff, sealedLen int) {
	if n <= 0 {
		return 0, CommitmentBytes, 0
	}
	first = off / SegmentBytes
	last := (off + n - 1) / SegmentBytes
	sealedOff = CommitmentBytes + first*sealedSegmentBytes
	end := min(CommitmentBytes+(last+1)*sealedSegmentBytes, SealedBytes(lengthBytes))
	return first, sealedOff, end - sealedOff
}

// sliceKey is the single-use key of one slice with what goes along.
//
// Key and commitment are the two halves of one HKDF output whose input is the
// content key, the stripe's salt and the whole context. AES-GCM alone lets
// somebody craft bytes that open under two keys; with the commitment compared
// first that needs a collision of SHA-256.
type sliceKey struct {
	aead       cipher.AEAD
	commitment [CommitmentBytes]byte
	context    [contextBytes]byte
}

func newSliceKey(contentKey, salt *[32]byte, c SliceContext) (sliceKey, error) {
	k := sliceKey{context: c.encode()}
	var info [13 + contextBytes]byte
	copy(info[:], "defs slice v1")
	copy(info[13:], k.context[:])
	out := derive(contentKey[:], salt[:], string(info[:]), 64)
	block, err := aes.NewCipher(out[:32])
	if err != nil {
		return k, err
	}
	if k.aead, err = cipher.NewGCM(block); err != nil {
		return k, err
	}
	copy(k.commitment[:], out[32:])
	return k, nil
}

// setSegmentNonce makes nonce the STREAM nonce (Hoang, Reyhanitabar, Rogaway,
// Vizár 2015) of a segment: 7 zero bytes, for the key is used once, the number
// of the segment and whether it is the last. So segments cannot be reordered,
// dropped or cut off.
func setSegmentNonce(nonce []byte, segment int, last bool) {
	binary.BigEndian.PutUint32(nonce[7:], uint32(segment))
	nonce[11] = 0
	if last {
		nonce[11] = 1
	}
}

// SealSlice appends the sealed slice, SealedBytes(len(plain)) bytes, to dst.
// len(plain) == c.Length. A (contentKey, salt, c.Slice) must never be used for
// a second plaintext: each attempt at a stripe draws a new salt. plain and the
// free part of dst must not overlap.
func SealSlice(dst []byte, contentKey, salt [32]byte, c SliceContext, plain []byte) ([]byte, error) {
	if uint64(len(plain)) != uint64(c.Length) {
		return nil, fmt.Errorf("seal: slice %d of stripe %x: %w: context says %d bytes, got %d", c.Slice, c.Stripe[:], ErrInvalid, c.Length, len(plain))
	}
	k, err := newSliceKey(&contentKey, &salt, c)
	if err != nil {
		return nil, fmt.Errorf("seal: slice %d of stripe %x: %w", c.Slice, c.Stripe[:], err)
	}
	dst = slices.Grow(dst, SealedBytes(len(plain)))
	dst = append(dst, k.commitment[:]...)
	segments := c.segments()
	nonce := make([]byte, 12)
	for i := range segments {
		from := i * SegmentBytes
		setSegmentNonce(nonce, i, i == segments-1)
		dst = k.aead.Seal(dst, nonce, plain[from:min(from+SegmentBytes, len(plain))], k.context[:])
	}
	return dst, nil
}

// OpenSlice appends the plaintext of a whole sealed slice, c.Length bytes, to
// dst; it allocates no buffer when dst has the room. On error, which wraps
// ErrNotAuthentic for anything but the right bytes, it returns nil.
func OpenSlice(dst []byte, contentKey, salt [32]byte, c SliceContext, sealed []byte) ([]byte, error) {
	if len(sealed) != SealedBytes(int(c.Length)) {
		return nil, sliceError(c, "sealed slice is %d bytes, want %d", len(sealed), SealedBytes(int(c.Length)))
	}
	return OpenSegments(dst, contentKey, salt, c, 0, sealed[CommitmentBytes:], sealed[:CommitmentBytes])
}

// OpenSliceRange appends plaintext [off, off+n) of a whole sealed slice to
// dst and opens only the segments it touches. It allocates no buffer when dst
// has room for n bytes rounded out to whole segments.
func OpenSliceRange(dst []byte, contentKey, salt [32]byte, c SliceContext, sealed []byte, off, n int) ([]byte, error) {
	if len(sealed) != SealedBytes(int(c.Length)) {
		return nil, sliceError(c, "sealed slice is %d bytes, want %d", len(sealed), SealedBytes(int(c.Length)))
	}
	if off < 0 || n < 0 || off > int(c.Length) || n > int(c.Length)-off {
		return nil, fmt.Errorf("seal: open slice %d of stripe %x: %w: range %d+%d outside of %d bytes", c.Slice, c.Stripe[:], ErrInvalid, off, n, c.Length)
	}
	if n == 0 {
		return dst, nil
	}
	first, sealedOff, sealedLen := SegmentRange(int(c.Length), off, n)
	start := len(dst)
	dst, err := OpenSegments(dst, contentKey, salt, c, first, sealed[sealedOff:sealedOff+sealedLen], sealed[:CommitmentBytes])
	if err != nil {
		return nil, err
	}
	// Segments come whole: move the wanted bytes to where they were asked for.
	skip := off - first*SegmentBytes
	copy(dst[start:], dst[start+skip:start+skip+n])
	return dst[:start+n], nil
}

// OpenSegments appends the whole plaintext of the segments in part, of which
// the first is segment number first, to dst (see SegmentRange). commitment is
// the first CommitmentBytes of the sealed slice; a caller that reads ranges
// keeps it. It allocates no buffer when dst has the room.
func OpenSegments(dst []byte, contentKey, salt [32]byte, c SliceContext, first int, part, commitment []byte) ([]byte, error) {
	o, err := NewSliceOpener(contentKey, salt, c, commitment)
	if err != nil {
		return nil, err
	}
	total := c.segments()
	if first < 0 || first >= total {
		return nil, sliceError(c, "segment %d of %d", first, total)
	}
	tags := (len(part) + sealedSegmentBytes - 1) / sealedSegmentBytes * tagBytes
	dst = slices.Grow(dst, max(0, len(part)-tags))
	for i := first; len(part) > 0; i++ {
		size := o.sealedBytes(i)
		if i >= total || len(part) < size {
			return nil, sliceError(c, "%d bytes are not whole segments from number %d of %d", len(part), i, total)
		}
		if dst, err = o.Open(dst, i, part[:size]); err != nil {
			return nil, err
		}
		part = part[size:]
	}
	return dst, nil
}

// SliceOpener opens segments of one sealed slice, one by one and in any order.
// It is safe for concurrent use.
type SliceOpener struct {
	key     sliceKey
	context SliceContext
}

// NewSliceOpener derives the slice's key and compares its commitment, the first
// CommitmentBytes of the sealed slice. Another commitment is ErrNotAuthentic.
func NewSliceOpener(contentKey, salt [32]byte, c SliceContext, commitment []byte) (*SliceOpener, error) {
	k, err := newSliceKey(&contentKey, &salt, c)
	if err != nil {
		return nil, fmt.Errorf("seal: open slice %d of stripe %x: %w", c.Slice, c.Stripe[:], err)
	}
	if subtle.ConstantTimeCompare(commitment, k.commitment[:]) != 1 {
		return nil, sliceError(c, "key commitment differs: sealed with another key, salt or context")
	}
	return &SliceOpener{k, c}, nil
}

// sealedBytes is the sealed length of a segment.
func (o *SliceOpener) sealedBytes(segment int) int {
	if total := o.context.segments(); segment == total-1 {
		return int(o.context.Length) - (total-1)*SegmentBytes + tagBytes
	}
	return sealedSegmentBytes
}

// Open appends the plaintext of a segment to dst, which must not overlap
// sealed; it allocates nothing when dst has the room. On error, which wraps
// ErrNotAuthentic, it returns nil.
func (o *SliceOpener) Open(dst []byte, segment int, sealed []byte) ([]byte, error) {
	total := o.context.segments()
	if segment < 0 || segment >= total || len(sealed) != o.sealedBytes(segment) {
		return nil, sliceError(o.context, "%d bytes are not segment %d of %d", len(sealed), segment, total)
	}
	nonce := make([]byte, 12)
	setSegmentNonce(nonce, segment, segment == total-1)
	dst, err := o.key.aead.Open(dst, nonce, sealed, o.key.context[:])
	if err != nil {
		return nil, sliceError(o.context, "segment %d of %d does not verify", segment, total)
	}
	return dst, nil
}

func sliceError(c SliceContext, format string, args ...any) error {
	return fmt.Errorf("seal: open slice %d of stripe %x: %w: %s", c.Slice, c.Stripe[:], ErrNotAuthentic, fmt.Sprintf(format, args...))
}
