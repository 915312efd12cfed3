package seal

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hpke"
	"encoding/binary"
	"fmt"
)

// wrapVersion is the first byte of wrapped secrets: HPKE base mode with
// DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and AES-256-GCM (RFC 9180).
const wrapVersion = 1

// WrapOverheadBytes is what WrapTo adds: version, encapsulated key, tag.
const WrapOverheadBytes = 1 + 32 + 16

// Recovery holds the keys that the 24 words give directly. The embedded
// WrapKey opens what was wrapped to the recovery key.
type Recovery struct {
	*WrapKey
	authority ed25519.PrivateKey
	peer      ed25519.PrivateKey
	heads     [32]byte
}

// Recovery derives the recovery keys.
func (r Root) Recovery() (*Recovery, error) {
	wrapSeed := derive32(r[:], "defs recovery wrap v1")
	key, err := hpke.DHKEM(ecdh.X25519()).DeriveKeyPair(wrapSeed[:])
	if err != nil {
		return nil, fmt.Errorf("seal: derive recovery key: %w", err)
	}
	authority := derive32(r[:], "defs authority v1")
	peer := derive32(r[:], "defs recovery peer v1")
	return &Recovery{
		WrapKey:   &WrapKey{key: key},
		authority: ed25519.NewKeyFromSeed(authority[:]),
		peer:      ed25519.NewKeyFromSeed(peer[:]),
		heads:     derive32(r[:], "defs heads v1"),
	}, nil
}

// Authority is the key that signs the entries of the device chain.
func (r *Recovery) Authority() ed25519.PrivateKey { return r.authority }

// Peer is the identity with which a machine that has only the words joins the
// pool.
func (r *Recovery) Peer() ed25519.PrivateKey { return r.peer }

// HeadKey is the key of the head of one device slot. Slot 0 is the volume's
// own head, which lists the devices.
func (r *Recovery) HeadKey(slot uint16) HeadKey {
	info := string(binary.BigEndian.AppendUint16([]byte("defs head key v1"), slot))
	keys := derive(r.heads[:], nil, info, 64)
	return HeadKey{Sign: ed25519.NewKeyFromSeed(keys[:32]), Seal: [32]byte(keys[32:])}
}

// WrapKey is a private HPKE key: of a device, or the recovery key.
type WrapKey struct{ key hpke.PrivateKey }

// NewWrapKey draws a device's key.
func NewWrapKey() (*WrapKey, error) {
	key, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("seal: draw wrap key: %w", err)
	}
	return &WrapKey{key: key}, nil
}

// ParseWrapKey reads the 32 bytes of Bytes.
func ParseWrapKey(private []byte) (*WrapKey, error) {
	key, err := hpke.DHKEM(ecdh.X25519()).NewPrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("seal: parse wrap key: %w: %w", ErrMalformed, err)
	}
	return &WrapKey{key: key}, nil
}

// Bytes returns the private key, 32 bytes, to be stored sealed.
func (k *WrapKey) Bytes() ([]byte, error) { return k.key.Bytes() }

// PublicKey returns the 32 bytes to give to WrapTo.
func (k *WrapKey) PublicKey() []byte { return k.key.PublicKey().Bytes() }

// WrapTo encrypts secret so that only the holder of the private key of pub can
// read it, and only under the same info, which names the purpose. The result
// is len(secret) + WrapOverheadBytes long and never twice the same. It does
// not say who wrapped it: whatever carries it must be signed.
func WrapTo(pub []byte, info string, secret []byte) ([]byte, error) {
	key, err := hpke.DHKEM(ecdh.X25519()).NewPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("seal: wrap to key of %d bytes: %w: %w", len(pub), ErrMalformed, err)
	}
	sealed, err := hpke.Seal(key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(info), secret)
	if err != nil {
		return nil, fmt.Errorf("seal: wrap: %w", err)
	}
	return append([]byte{wrapVersion}, sealed...), nil
}

// Unwrap opens what WrapTo made for this key and info. The secret comes back
// with exactly the length it had.
func (k *WrapKey) Unwrap(info string, wrapped []byte) ([]byte, error) {
	if len(wrapped) < WrapOverheadBytes || wrapped[0] != wrapVersion {
		return nil, fmt.Errorf("seal: unwrap %d bytes: %w: not a wrapped secret of version %d", len(wrapped), ErrMalformed, wrapVersion)
	}
	secret, err := hpke.Open(k.key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(info), wrapped[1:])
	if err != nil {
		return nil, fmt.Errorf("seal: unwrap %d bytes: %w: wrapped to another key, for another purpose, or changed", len(wrapped), ErrNotAuthentic)
	}
	return secret, nil
}
