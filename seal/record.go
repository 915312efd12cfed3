package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"io"
)

const (
	recordVersion       = 1
	recordSaltBytes     = 32
	recordPrefixBytes   = 1 + recordSaltBytes + CommitmentBytes
	recordOverheadBytes = recordPrefixBytes + tagBytes
)

// sealRecord seals one small body under a long-lived key. Each call draws a
// salt and derives a key of its own from it, so that no nonce has to be
// counted: a machine restored from an old image may seal under an old sequence
// number again.
//
//	version 1 ‖ salt 32 ‖ commitment 32 ‖ AES-256-GCM(body), nonce 0, AAD = info
func sealRecord(key *[32]byte, info string, body []byte) ([]byte, error) {
	out := make([]byte, recordPrefixBytes, recordOverheadBytes+len(body))
	out[0] = recordVersion
	salt := out[1 : 1+recordSaltBytes]
	if _, err := rand.Read(salt); err != nil {
		return nil, err
	}
	aead, commitment, err := recordKey(key, salt, info)
	if err != nil {
		return nil, err
	}
	copy(out[1+recordSaltBytes:], commitment)
	return aead.Seal(out, make([]byte, aead.NonceSize()), body, []byte(info)), nil
}

func openRecord(key *[32]byte, info string, sealed []byte) ([]byte, error) {
	if len(sealed) < recordOverheadBytes || sealed[0] != recordVersion {
		return nil, fmt.Errorf("%w: %d bytes are not a sealed record of version %d", ErrMalformed, len(sealed), recordVersion)
	}
	aead, commitment, err := recordKey(key, sealed[1:1+recordSaltBytes], info)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(commitment, sealed[1+recordSaltBytes:recordPrefixBytes]) != 1 {
		return nil, fmt.Errorf("%w: key commitment differs: sealed with another key or for another purpose", ErrNotAuthentic)
	}
	body, err := aead.Open(nil, make([]byte, aead.NonceSize()), sealed[recordPrefixBytes:], []byte(info))
	if err != nil {
		return nil, fmt.Errorf("%w: changed since it was sealed", ErrNotAuthentic)
	}
	return body, nil
}

func recordKey(key *[32]byte, salt []byte, info string) (cipher.AEAD, []byte, error) {
	out := derive(key[:], salt, "defs record v1 "+info, 64)
	block, err := aes.NewCipher(out[:32])
	if err != nil {
		return nil, nil, err
	}
	aead, err := cipher.NewGCM(block)
	return aead, out[32:], err
}

// LocalKey is a key of a device, for what never leaves its disk.
type LocalKey [32]byte

// NewLocalKey draws a key from random, which is crypto/rand outside of tests.
func NewLocalKey(random io.Reader) (LocalKey, error) {
	var k LocalKey
	if _, err := io.ReadFull(random, k[:]); err != nil {
		return k, fmt.Errorf("seal: draw local key: %w", err)
	}
	return k, nil
}

// Derive returns the key for one purpose, a constant without zero bytes, and
// one object, named by id (any bytes, or none). It is the same each time.
func (k LocalKey) Derive(purpose string, id []byte) LocalKey {
	return LocalKey(derive32(k[:], "defs local key v1 "+purpose+"\x00"+string(id)))
}

// AEAD returns AES-256-GCM under the key, safe for concurrent use: 12-byte
// nonces, which the caller must never repeat under one key, and 16-byte tags.
func (k LocalKey) AEAD() cipher.AEAD {
	block, err := aes.NewCipher(k[:])
	if err == nil {
		var aead cipher.AEAD
		if aead, err = cipher.NewGCM(block); err == nil {
			return aead
		}
	}
	panic(fmt.Sprintf("seal: AES-256-GCM with a key of 32 bytes: %v", err))
}

// Seal seals a small record (such as another key) for one purpose; each call
// uses a key of its own. The result is 81 bytes longer than body.
func (k LocalKey) Seal(purpose string, body []byte) ([]byte, error) {
	sealed, err := sealRecord((*[32]byte)(&k), "defs local v1 "+purpose, body)
	if err != nil {
		return nil, fmt.Errorf("seal: seal local record: %w", err)
	}
	return sealed, nil
}

// Open opens what Seal made with the same key and purpose.
func (k LocalKey) Open(purpose string, sealed []byte) ([]byte, error) {
	body, err := openRecord((*[32]byte)(&k), "defs local v1 "+purpose, sealed)
	if err != nil {
		return nil, fmt.Errorf("seal: open local record: %w", err)
	}
	return body, nil
}
