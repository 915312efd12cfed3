package seal

import (
	"crypto/ed25519"
	"fmt"
)

// domain is put before the bytes that are signed, so that a signature given
// for one purpose is worth nothing for another. No domain is a prefix of
// another one.
type domain string

// The domains of the signatures that this package makes. Package wire has those
// of what travels.
const (
	domainLock   domain = "defs lock v1"   // ‖ blind ‖ version ‖ script
	domainDevice domain = "defs device v1" // ‖ entry of the device chain
)

// sign returns the 64-byte Ed25519 signature over domain ‖ message.
func (d domain) sign(key ed25519.PrivateKey, message []byte) []byte {
	return ed25519.Sign(key, append([]byte(d), message...))
}

// verify checks a signature made by sign. The key must be one the caller
// already trusts or has compared with a name it trusts (BlindOf), never just the one that came with the message.
func (d domain) verify(key ed25519.PublicKey, message, signature []byte) error {
	if len(key) != ed25519.PublicKeySize || len(signature) != ed25519.SignatureSize {
		return fmt.Errorf("seal: verify %q: %w: key of %d and signature of %d bytes", string(d), ErrMalformed, len(key), len(signature))
	}
	if !ed25519.Verify(key, append([]byte(d), message...), signature) {
		return fmt.Errorf("seal: verify %q: %w: wrong signature", string(d), ErrNotAuthentic)
	}
	return nil
}
