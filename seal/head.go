package seal

import (
	"crypto/ed25519"
	"encoding/binary"
	"fmt"

	"github.com/zeebo/blake3"
)

const (
	headKeyVersion = 1

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
