package seal

import (
	"crypto/ed25519"
	"encoding/binary"
	"fmt"

	"github.com/zeebo/blake3"
)

const (
	headKeyVersion = 1
	headVersion    = 1

	// HeadKeyBytes is the length of a marshalled HeadKey.
	HeadKeyBytes = 1 + 32 + 32
	// SealedHeadBytesMax bounds the sealed body of a head on disk and wire.
	SealedHeadBytesMax = 1 << 20
)

// HeadKey signs and seals the heads of one device slot. A device stores the
// key of its own slot; the 24 words give those of all slots.
type HeadKey struct {
	Sign ed25519.PrivateKey
	Seal [32]byte
}

// Marshal returns HeadKeyBytes bytes, to be stored sealed.
func (h HeadKey) Marshal() []byte {
	out := append([]byte{headKeyVersion}, h.Sign.Seed()...)
	return append(out, h.Seal[:]...)
}

// UnmarshalHeadKey reads what Marshal wrote.
func UnmarshalHeadKey(data []byte) (HeadKey, error) {
	if len(data) != HeadKeyBytes || data[0] != headKeyVersion {
		return HeadKey{}, fmt.Errorf("seal: unmarshal head key of %d bytes: %w: not a head key of version %d", len(data), ErrMalformed, headKeyVersion)
	}
	return HeadKey{Sign: ed25519.NewKeyFromSeed(data[1:33]), Seal: [32]byte(data[33:])}, nil
}

// Public returns the Ed25519 key that the head shows.
func (h HeadKey) Public() ed25519.PublicKey { return h.Sign.Public().(ed25519.PublicKey) }

// Address is where nodes keep the head: HeadAddress of the public key.
func (h HeadKey) Address() [32]byte { return HeadAddress(h.Public()) }

// HeadAddress is BLAKE3("defs head v1" ‖ key): only the holder of the key can
// sign a head for its address.
func HeadAddress(key ed25519.PublicKey) [32]byte {
	h := blake3.New()
	_, _ = h.WriteString("defs head v1")
	_, _ = h.Write(key)
	return [32]byte(h.Sum(nil))
}

// SealHead seals the body of head number seq; never twice the same bytes.
func (h HeadKey) SealHead(seq uint64, body []byte) ([]byte, error) {
	if len(body) > SealedHeadBytesMax-recordOverheadBytes {
		return nil, fmt.Errorf("seal: seal head %d: %w: body is %d bytes, at most %d fit", seq, ErrInvalid, len(body), SealedHeadBytesMax-recordOverheadBytes)
	}
	sealed, err := sealRecord(&h.Seal, h.headInfo(seq), body)
	if err != nil {
		return nil, fmt.Errorf("seal: seal head %d: %w", seq, err)
	}
	return sealed, nil
}

// OpenHead opens what SealHead made for the same sequence number.
func (h HeadKey) OpenHead(seq uint64, sealed []byte) ([]byte, error) {
	if len(sealed) > SealedHeadBytesMax {
		return nil, fmt.Errorf("seal: open head %d: %w: %d bytes, at most %d allowed", seq, ErrMalformed, len(sealed), SealedHeadBytesMax)
	}
	body, err := openRecord(&h.Seal, h.headInfo(seq), sealed)
	if err != nil {
		return nil, fmt.Errorf("seal: open head %d: %w", seq, err)
	}
	return body, nil
}

func (h HeadKey) headInfo(seq uint64) string {
	address := h.Address()
	info := append([]byte("defs head body v1"), address[:]...)
	return string(binary.BigEndian.AppendUint64(info, seq))
}

// Head holds the fields of a head that its signature covers. The caller moves
// them from and to its wire message.
type Head struct {
	Key      ed25519.PublicKey // 32 bytes
	Sequence uint64            // from 1, one more than the previous head's
	Previous [32]byte          // Hash of the previous head; zero for the first
	Sealed   []byte            // from SealHead
}

// canonical are the bytes that are signed and hashed. Sealed comes last and
// everything before it has a fixed length, so nothing is ambiguous.
func (h *Head) canonical() []byte {
	address := HeadAddress(h.Key)
	out := make([]byte, 0, 23+4+32+32+8+32+len(h.Sealed))
	out = append(out, "defs head signature v1"...)
	out = binary.BigEndian.AppendUint32(out, headVersion)
	out = append(out, address[:]...)
	out = append(out, h.Key...)
	out = binary.BigEndian.AppendUint64(out, h.Sequence)
	out = append(out, h.Previous[:]...)
	return append(out, h.Sealed...)
}

// Hash names this head in the next one.
func (h *Head) Hash() [32]byte { return blake3.Sum256(h.canonical()) }

// SignHead returns the 64-byte signature of head, whose Key it sets.
func (h HeadKey) SignHead(head *Head) []byte {
	head.Key = h.Public()
	return ed25519.Sign(h.Sign, head.canonical())
}

// Verify checks that head may be stored at address: the address is that of its
// key, the signature is the key's, lengths are within bounds. It needs no
// secret; nodes call it too.
func (h *Head) Verify(address, signature []byte) error {
	if len(h.Key) != ed25519.PublicKeySize || len(signature) != ed25519.SignatureSize || len(h.Sealed) > SealedHeadBytesMax {
		return fmt.Errorf("seal: verify head %d: %w: key of %d, signature of %d, body of %d bytes", h.Sequence, ErrMalformed, len(h.Key), len(signature), len(h.Sealed))
	}
	if want := HeadAddress(h.Key); string(want[:]) != string(address) {
		return fmt.Errorf("seal: verify head %d: %w: its key does not belong to address %x", h.Sequence, ErrNotAuthentic, address)
	}
	if !ed25519.Verify(h.Key, h.canonical(), signature) {
		return fmt.Errorf("seal: verify head %d: %w: wrong signature", h.Sequence, ErrNotAuthentic)
	}
	return nil
}
