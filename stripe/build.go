package stripe

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"math"
	"slices"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/seal"
)

// slicesMax bounds the slices of one stripe.
const slicesMax = 4096

// Builder collects the slices of one stripe. Not safe for concurrent use.
type Builder struct {
	policy   erasure.Policy
	purpose  metastore.Purpose
	full     erasure.Geometry
	live     int
	slices   []pending
	usedFull int // bytes laid out so far in the full geometry
}

type pending struct {
	stored     []byte // compressed or plain
	plainBytes int
	compressed bool
}

// NewBuilder starts a stripe of the policy's full geometry in the pool as it
// is now; its shards are smaller where that lets more nodes take part, and the
// policy wants them. An error says why the pool cannot take one.
func (s *Store) NewBuilder(policy erasure.Policy, purpose metastore.Purpose) (*Builder, error) {
	policy.EnsureDefaults()
	var best *Builder
	var failed error
	mirrored := false
	for _, size := range slices.Backward(erasure.ShardSizes()) {
		if size > policy.ShardBytes || size < shardBytesMin && best != nil {
			continue
		}
		live := 0
		for _, node := range s.nodes(purpose, size) {
			if node.Alive {
				live++
			}
		}
		sized := policy
		sized.ShardBytes = size
		g, m, err := sized.Geometry(live, math.MaxInt)
		switch {
		case err != nil:
			failed = err
		case best == nil || g.N() > best.full.N() || m && !mirrored:
			best, mirrored = &Builder{policy: sized, purpose: purpose, full: g, live: live}, m
		}
	}
	if best == nil {
		return nil, fmt.Errorf("%w: %w: start more nodes, or give those that are full more room", ErrTooFewNodes, failed)
	}
	return best, nil
}

// shardBytesMin is the least to which shards are made smaller for nodes that
// are nearly full.
const shardBytesMin = 64 << 10

// SliceBytesMax is the largest slice that Add takes, in stored bytes.
func (b *Builder) SliceBytesMax() int {
	data := b.full.DataBytes()
	// Overhead grows by whole segments: sizes that fit are found downwards.
	n := data
	for seal.SealedBytes(n) > data {
		n -= seal.SealedBytes(n) - data
	}
	return n
}

// Add appends a slice; it takes over stored. plainBytes is its length before
// compression. It reports the slice's number, and false when the stripe has no
// room left.
func (b *Builder) Add(stored []byte, plainBytes int, compressed bool) (slice uint32, ok bool) {
	_, end := place(b.full, b.usedFull, seal.SealedBytes(len(stored)))
	if end > b.full.DataBytes() || len(b.slices) == slicesMax {
		return 0, false
	}
	b.usedFull = end
	b.slices = append(b.slices, pending{stored, plainBytes, compressed})
	return uint32(len(b.slices) - 1), true
}

// paddingBytesMax is how much padding a stripe may have for which no second
// one is worth its index records and round trips.
const paddingBytesMax = 256 << 10

// Split divides the slices, in their order, among stripes that they nearly
// fill: a stripe of 2.6 MiB at 4+2 would leave as 3 MiB and its parity, but 2
// MiB and 0.75 MiB hold the same. Most stripes are full, and stay one. b is
// used up.
func (b *Builder) Split() []*Builder {
	var parts []*Builder
	for {
		g, _, _, used, err := b.geometry()
		if err != nil || g.DataBytes()-used <= paddingBytesMax {
			return append(parts, b) // Seal tells the error
		}
		// The largest stripe that the slices fill.
		part := &Builder{policy: b.policy, purpose: b.purpose, full: b.full, live: b.live}
		for _, size := range slices.Backward(erasure.ShardSizes()) {
			part.full.ShardBytes = size
			if part.full.DataBytes() <= used {
				break
			}
		}
		for len(b.slices) > 0 {
			next := b.slices[0]
			if _, ok := part.Add(next.stored, next.plainBytes, next.compressed); !ok {
				break
			}
			b.slices = b.slices[1:]
		}
		if part.Len() == 0 || len(b.slices) == 0 {
			b.slices = append(part.slices, b.slices...)
			return append(parts, b)
		}
		parts = append(parts, part)
	}
}

// Len counts the slices.
func (b *Builder) Len() int { return len(b.slices) }

// place returns where a sealed slice of n bytes goes in a stripe whose first
// `used` bytes are taken. A slice of at most a quarter of a shard never
// straddles two, so that reading it asks one node.
func place(g erasure.Geometry, used, n int) (start, end int) {
	start = used
	if n <= g.ShardBytes/4 && start/g.ShardBytes != (start+n-1)/g.ShardBytes {
		start = (start/g.ShardBytes + 1) * g.ShardBytes
	}
	return start, start + n
}

func layout(g erasure.Geometry, slices []pending) (offsets []int, end int) {
	offsets = make([]int, len(slices))
	for i, p := range slices {
		offsets[i], end = place(g, end, seal.SealedBytes(len(p.stored)))
	}
	return offsets, end
}

// Sealed is a stripe ready to leave. Release it when its bodies are needed no
// more.
type Sealed struct {
	ID       erasure.StripeID
	Info     metastore.StripeInfo // without holders
	Salt     [32]byte
	Slices   []metastore.Remote // one per slice, Off 0
	Bodies   [][]byte           // len == K+M, each a shard body
	Manifest *wire.Manifest

	buffers *stripeBuffers
}

// stripeBuffers is the memory in which one stripe is sealed and coded, used
// again for the next: 10 MiB at 4+2 that would be cleared and collected.
type stripeBuffers struct {
	data   []byte   // the sealed slices
	bodies [][]byte // of the shards
}

// Release gives the memory of a stripe's bodies back to the store.
func (s *Store) Release(st *Sealed) {
	s.buffers.Put(st.buffers)
	st.buffers, st.Bodies = nil, nil
}

// Seal seals and codes the slices of b. Every attempt draws a new stripe id,
// new columns and so new keys: nothing is ever sealed twice with one key.
func (s *Store) Seal(b *Builder) (*Sealed, error) {
	g, mirrored, offsets, used, err := b.geometry()
	if err != nil {
		return nil, err
	}
	out := &Sealed{Slices: make([]metastore.Remote, len(b.slices))}
	rand.Read(out.ID[:])
	epoch := s.o.Epoch()
	keys, err := s.Keys(out.ID, epoch, seal.FirstLockVersion)
	if err != nil {
		return nil, err
	}
	bundle, err := s.o.Bundle(epoch)
	if err != nil {
		return nil, err
	}
	code, err := s.codes.Get(g.K, g.M)
	if err != nil {
		return nil, err
	}
	columns, salt, err := code.NewColumns(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("stripe %v: columns: %w", out.ID, err)
	}
	out.Salt = salt

	buffers, _ := s.buffers.Get().(*stripeBuffers)
	if buffers == nil {
		buffers = new(stripeBuffers)
	}
	out.buffers = buffers
	buffers.data = slices.Grow(buffers.data[:0], g.DataBytes())
	data := buffers.data[:g.DataBytes()]
	pad, err := newKeyStream()
	if err != nil {
		return nil, err
	}
	end := 0
	for i, p := range b.slices {
		// Padding looks like sealed bytes, so that nodes cannot see how full
		// a stripe is.
		pad.Read(data[end:offsets[i]])
		c := s.sliceContext(out.ID, uint32(i), epoch, b.purpose, len(p.stored))
		sealedBytes := seal.SealedBytes(len(p.stored))
		dst := data[offsets[i] : offsets[i] : offsets[i]+sealedBytes]
		if _, err := seal.SealSlice(dst, sliceKey(bundle, b.purpose), salt, c, p.stored); err != nil {
			return nil, fmt.Errorf("stripe %v: seal slice %d: %w", out.ID, i, err)
		}
		end = offsets[i] + sealedBytes
		out.Slices[i] = metastore.Remote{
			Stripe: out.ID, Slice: uint32(i), StripeOff: uint32(offsets[i]),
			StoredLen: uint32(len(p.stored)), SliceLen: uint32(p.plainBytes), Compressed: p.compressed,
		}
	}
	pad.Read(data[end:])
	if out.Bodies, err = code.Build(buffers.bodies, columns, data); err != nil {
		return nil, fmt.Errorf("stripe %v: encode: %w", out.ID, err)
	}
	buffers.bodies = out.Bodies
	out.Manifest = &wire.Manifest{K: uint32(g.K), M: uint32(g.M), ShardBytes: uint32(g.ShardBytes)}
	roots := make([][32]byte, len(out.Bodies))
	for i, body := range out.Bodies {
		roots[i] = erasure.Root(body)
		out.Manifest.Roots = append(out.Manifest.Roots, roots[i][:])
	}
	if err := out.Manifest.Sign(keys.Index); err != nil {
		return nil, fmt.Errorf("stripe %v: %w", out.ID, err)
	}
	out.Info = metastore.StripeInfo{
		Purpose: b.purpose, K: g.K, M: g.M, ShardBytes: uint32(g.ShardBytes), UsedBytes: uint64(used),
		Epoch: epoch, LockVersion: seal.FirstLockVersion, Mirrored: mirrored, Roots: roots,
	}
	return out, nil
}

// geometry finds the smallest geometry that holds the slices.
func (b *Builder) geometry() (g erasure.Geometry, mirrored bool, offsets []int, used int, err error) {
	want := 0
	for _, p := range b.slices {
		want += seal.SealedBytes(len(p.stored))
	}
	for {
		if g, mirrored, err = b.policy.Geometry(b.live, want); err != nil {
			return g, false, nil, 0, fmt.Errorf("%w: %w", ErrTooFewNodes, err)
		}
		offsets, used = layout(g, b.slices)
		if used <= g.DataBytes() {
			return g, mirrored, offsets, used, nil
		}
		if g == b.full {
			return g, false, nil, 0, fmt.Errorf("stripe layout: %d bytes in %d", used, g.DataBytes())
		}
		want = g.DataBytes() + 1
	}
}

func (s *Store) sliceContext(id erasure.StripeID, slice, epoch uint32, purpose metastore.Purpose, storedBytes int) seal.SliceContext {
	p := seal.PurposeContent
	if purpose == metastore.PurposeLog {
		p = seal.PurposeLog
	}
	return seal.SliceContext{Volume: s.o.Volume, Stripe: id, Slice: slice, Epoch: epoch, Length: uint32(storedBytes), Purpose: p}
}

// sliceKey is the bundle's key for what the stripe holds.
func sliceKey(b *seal.Bundle, purpose metastore.Purpose) [32]byte {
	if purpose == metastore.PurposeLog {
		return b.Metadata
	}
	return b.Content
}

// keyStream is the key stream of a throw-away key: as good as random, at the
// speed of AES.
type keyStream struct{ cipher.Stream }

func newKeyStream() (keyStream, error) {
	var seed [32]byte
	rand.Read(seed[:])
	block, err := aes.NewCipher(seed[:16])
	if err != nil {
		return keyStream{}, err
	}
	return keyStream{cipher.NewCTR(block, seed[16:])}, nil
}

// Read fills p; it never fails.
func (k keyStream) Read(p []byte) (int, error) {
	clear(p)
	k.XORKeyStream(p, p)
	return len(p), nil
}
