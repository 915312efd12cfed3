package wire

import (
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/zeebo/blake3"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/seal"
)

// Domain strings of what a stripe's index key signs. FORMAT.md, "Wire".
const (
	domainManifest = "defs manifest v1"
	domainHolders  = "defs holders v1"
	domainCommit   = "defs commit v1"
	domainHead     = "defs head signature v1"
)

// Limits that every decoder of these messages enforces.
const (
	ShardsMax     = 200      // k+m of one stripe
	ShardBytesMax = 32 << 20 // coded bytes of one shard
	// IndexNumber is the shard number by which DeleteShards names a stripe's
	// index record, on its keepers.
	IndexNumber  = 255
	HeadBytesMax = 1<<20 - 4<<10     // sealed bytes of one head; with the rest it fits one message
	LookupMax    = 256               // stripes in one broadcast
	BatchMax     = 256               // entries in one batched request
	nodeIDMax    = 128               // bytes of a node id
	movesMax     = 4 * ShardsMax     // holder moves kept in one record
	scriptMax    = 128               // bytes of a lock script
	lockSigMax   = 128               // bytes of a lock's previous signature
	BodyBytesMax = ShardBytesMax * 2 // raw bytes behind one message
)

// ErrSignature is returned by every Verify whose signature or binding fails.
var ErrSignature = errors.New("wire: signature does not verify")

// Sign completes m with the index key: index_key, blind and signature.
func (m *Manifest) Sign(key ed25519.PrivateKey) error {
	public := key.Public().(ed25519.PublicKey)
	blind := seal.BlindOf(public)
	m.Version, m.IndexKey, m.Blind, m.Signature = 1, public, blind[:], nil
	msg, err := m.signed()
	if err != nil {
		return err
	}
	m.Signature = ed25519.Sign(key, msg)
	return nil
}

// Verify checks shapes (len(Roots) == K+M, 32 bytes each), the binding of
// blind to the index key, and the signature.
func (m *Manifest) Verify() error {
	n := int(m.GetK()) + int(m.GetM())
	switch {
	case m == nil || m.Version != 1:
		return errors.New("wire: manifest of an unknown version")
	case m.K < 1 || n > ShardsMax || len(m.Roots) != n:
		return fmt.Errorf("wire: manifest with %d+%d shards and %d roots", m.K, m.M, len(m.Roots))
	case m.ShardBytes == 0 || m.ShardBytes > ShardBytesMax:
		return fmt.Errorf("wire: manifest with shards of %d bytes", m.ShardBytes)
	case len(m.IndexKey) != ed25519.PublicKeySize || len(m.Blind) != 32:
		return errors.New("wire: manifest with a key or name of the wrong length")
	}
	for _, r := range m.Roots {
		if len(r) != 32 {
			return errors.New("wire: manifest with a root of the wrong length")
		}
	}
	if seal.BlindOf(m.IndexKey) != erasure.BlindID(m.Blind) {
		return fmt.Errorf("manifest name: %w", ErrSignature)
	}
	msg, err := m.signed()
	if err != nil {
		return err
	}
	if !ed25519.Verify(m.IndexKey, msg, m.Signature) {
		return fmt.Errorf("manifest: %w", ErrSignature)
	}
	return nil
}

// signed is the byte string under a manifest's signature: fixed order and
// widths, so that no two encoders disagree.
func (m *Manifest) signed() ([]byte, error) {
	b := make([]byte, 0, len(domainManifest)+64+16+32*len(m.Roots))
	b = append(b, domainManifest...)
	b = append(b, m.Blind...)
	b = append(b, m.IndexKey...)
	b = binary.BigEndian.AppendUint32(b, m.K)
	b = binary.BigEndian.AppendUint32(b, m.M)
	b = binary.BigEndian.AppendUint32(b, m.ShardBytes)
	for _, r := range m.Roots {
		if len(r) != 32 {
			return nil, errors.New("wire: manifest with a root of the wrong length")
		}
		b = append(b, r...)
	}
	return b, nil
}

// SignHolders signs the holder list of r, whose manifest is complete.
func (r *IndexRecord) SignHolders(key ed25519.PrivateKey) {
	r.Signature = ed25519.Sign(key, r.signed())
}

// Verify checks the manifest, the holder list's shape and its signature. It
// does not judge Moves, which the keeper that added them vouches for.
func (r *IndexRecord) Verify() error {
	if err := r.GetManifest().Verify(); err != nil {
		return err
	}
	n := r.Manifest.K + r.Manifest.M
	if len(r.Holders) > int(n) || len(r.Moves) > movesMax {
		return fmt.Errorf("wire: index record with %d holders of %d shards and %d moves", len(r.Holders), n, len(r.Moves))
	}
	for _, h := range r.Holders {
		if h.Index >= n || len(h.Primary) > nodeIDMax || len(h.Mirror) > nodeIDMax {
			return fmt.Errorf("wire: index record with a bad holder of shard %d", h.Index)
		}
	}
	for _, m := range r.Moves {
		if m.Index >= n || len(m.From) > nodeIDMax || len(m.To) > nodeIDMax {
			return fmt.Errorf("wire: index record with a bad move of shard %d", m.Index)
		}
	}
	if l := r.Lock; l != nil && (len(l.Script) > scriptMax || len(l.PreviousSignature) > lockSigMax) {
		return errors.New("wire: index record with an oversized lock")
	}
	if !ed25519.Verify(r.Manifest.IndexKey, r.signed(), r.Signature) {
		return fmt.Errorf("index record: %w", ErrSignature)
	}
	return nil
}

func (r *IndexRecord) signed() []byte {
	b := append([]byte(domainHolders), r.Manifest.GetBlind()...)
	b = binary.BigEndian.AppendUint64(b, r.Version)
	mirrored := byte(0)
	if r.Mirrored {
		mirrored = 1
	}
	b = append(b, mirrored)
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.Holders)))
	for _, h := range r.Holders {
		b = binary.BigEndian.AppendUint32(b, h.Index)
		b = appendString(b, h.Primary)
		b = appendString(b, h.Mirror)
	}
	lock, version := r.Lock.GetScript(), r.Lock.GetVersion()
	b = binary.BigEndian.AppendUint32(b, version)
	return appendString(b, string(lock))
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// NewCommit makes the shards of the stripe behind key permanent.
func NewCommit(key ed25519.PrivateKey) *Commit {
	blind := seal.BlindOf(key.Public().(ed25519.PublicKey))
	return &Commit{Blind: blind[:], Signature: ed25519.Sign(key, append([]byte(domainCommit), blind[:]...))}
}

// Verify checks the commit against the index key of the stored manifest.
func (c *Commit) Verify(indexKey ed25519.PublicKey) error {
	if len(indexKey) != ed25519.PublicKeySize || !ed25519.Verify(indexKey, append([]byte(domainCommit), c.GetBlind()...), c.GetSignature()) {
		return fmt.Errorf("commit: %w", ErrSignature)
	}
	return nil
}

// Sign completes h with the head key: address, key and signature.
func (h *Head) Sign(key ed25519.PrivateKey) {
	public := key.Public().(ed25519.PublicKey)
	address := seal.HeadAddress(public)
	h.Version, h.Key, h.Address = 1, public, address[:]
	h.Signature = ed25519.Sign(key, h.signed())
}

// Verify checks shapes, that the address belongs to the key, and the signature.
func (h *Head) Verify() error {
	switch {
	case h == nil || h.Version != 1:
		return errors.New("wire: head of an unknown version")
	case len(h.Key) != ed25519.PublicKeySize || len(h.Address) != 32:
		return errors.New("wire: head with a key or address of the wrong length")
	case len(h.Previous) != 0 && len(h.Previous) != 32:
		return errors.New("wire: head with a previous hash of the wrong length")
	case len(h.Sealed) > HeadBytesMax:
		return fmt.Errorf("wire: head of %d sealed bytes, at most %d", len(h.Sealed), HeadBytesMax)
	case seal.HeadAddress(h.Key) != [32]byte(h.Address):
		return fmt.Errorf("head address: %w", ErrSignature)
	case !ed25519.Verify(h.Key, h.signed(), h.Signature):
		return fmt.Errorf("head: %w", ErrSignature)
	}
	return nil
}

func (h *Head) signed() []byte {
	b := append([]byte(domainHead), h.Address...)
	b = binary.BigEndian.AppendUint64(b, h.Sequence)
	b = appendString(b, string(h.Previous))
	return appendString(b, string(h.Sealed))
}

// Hash is what the next head's Previous holds: BLAKE3 of the signed bytes.
func (h *Head) Hash() [32]byte { return blake3.Sum256(h.signed()) }

// Clone returns a deep copy.
func (r *IndexRecord) Clone() *IndexRecord { return proto.Clone(r).(*IndexRecord) }
