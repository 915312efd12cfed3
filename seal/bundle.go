package seal

import (
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/zeebo/blake3"

	"github.com/defs-fs/defs/erasure"
)

// bundleVersion is the first byte of a marshalled Bundle.
const bundleVersion = 1

// BundleBytes is the length of a marshalled Bundle.
const BundleBytes = 1 + 4 + 4*32

// Bundle holds the keys of one epoch. Removing a device starts a new epoch, so
// that the device can read nothing written later.
type Bundle struct {
	Epoch    uint32   // from 1
	Content  [32]byte // of slices of file content
	Metadata [32]byte // of slices of the log
	Dedup    [32]byte // of chunk hashes and chunk boundaries
	Lock     [32]byte // of the per-stripe keys
}

// NewBundle draws the keys of an epoch from random, which is crypto/rand
// outside of tests.
func NewBundle(epoch uint32, random io.Reader) (*Bundle, error) {
	if epoch == 0 {
		return nil, fmt.Errorf("seal: new bundle: %w: epochs count from 1", ErrInvalid)
	}
	b := &Bundle{Epoch: epoch}
	for _, key := range [][]byte{b.Content[:], b.Metadata[:], b.Dedup[:], b.Lock[:]} {
		if _, err := io.ReadFull(random, key); err != nil {
			return nil, fmt.Errorf("seal: new bundle: draw keys: %w", err)
		}
	}
	return b, nil
}

// Marshal returns BundleBytes bytes, to be wrapped with WrapTo.
func (b *Bundle) Marshal() []byte {
	out := make([]byte, 0, BundleBytes)
	out = append(out, bundleVersion)
	out = binary.BigEndian.AppendUint32(out, b.Epoch)
	out = append(out, b.Content[:]...)
	out = append(out, b.Metadata[:]...)
	out = append(out, b.Dedup[:]...)
	return append(out, b.Lock[:]...)
}

// UnmarshalBundle reads what Marshal wrote.
func UnmarshalBundle(data []byte) (*Bundle, error) {
	if len(data) != BundleBytes || data[0] != bundleVersion {
		return nil, fmt.Errorf("seal: unmarshal bundle of %d bytes: %w: not a bundle of version %d", len(data), ErrMalformed, bundleVersion)
	}
	b := &Bundle{Epoch: binary.BigEndian.Uint32(data[1:])}
	if b.Epoch == 0 {
		return nil, fmt.Errorf("seal: unmarshal bundle: %w: epoch 0", ErrMalformed)
	}
	for i, key := range []*[32]byte{&b.Content, &b.Metadata, &b.Dedup, &b.Lock} {
		copy(key[:], data[5+32*i:])
	}
	return b, nil
}

// StripeKeys are the keys of one stripe. They are derived, never stored.
type StripeKeys struct {
	Index ed25519.PrivateKey    // signs manifest, holders and commit
	Blind erasure.BlindID       // the name under which nodes know the stripe
	Lock  *secp256k1.PrivateKey // opens the lock of this version
}

// StripeKeys derives the keys of a stripe at a lock version (from
// FirstLockVersion). Lock changes with the version; Index and Blind
// do not, because shards and keepers are found by them.
func (b *Bundle) StripeKeys(id erasure.StripeID, version uint32) (*StripeKeys, error) {
	indexSeed := b.stripeKey("defs stripe index v1", id, 0)
	index := ed25519.NewKeyFromSeed(indexSeed[:])
	lockSeed := b.stripeKey("defs stripe lock v1", id, version)
	var scalar secp256k1.ModNScalar
	if overflow := scalar.SetBytes(&lockSeed); overflow != 0 || scalar.IsZero() {
		// One in 2^127: the stripe must be given another id.
		return nil, fmt.Errorf("seal: derive lock key of stripe %x: %w: not a key of the curve; use a new stripe id", id[:], ErrInvalid)
	}
	return &StripeKeys{
		Index: index,
		Blind: BlindOf(index.Public().(ed25519.PublicKey)),
		Lock:  secp256k1.NewPrivateKey(&scalar),
	}, nil
}

func (b *Bundle) stripeKey(purpose string, id erasure.StripeID, version uint32) [32]byte {
	info := append([]byte(purpose), id[:]...)
	return derive32(b.Lock[:], string(binary.BigEndian.AppendUint32(info, version)))
}

// BlindOf returns the blind id of the stripe that index signs for:
// BLAKE3("defs blind v1" ‖ index). Whoever checks a manifest compares it, so
// that a key taken from a reply proves nothing by itself.
func BlindOf(index ed25519.PublicKey) erasure.BlindID {
	h := blake3.New()
	_, _ = h.WriteString("defs blind v1")
	_, _ = h.Write(index)
	return erasure.BlindID(h.Sum(nil))
}
