// Package seal holds every secret of a volume and everything done with one:
// the 24 words and what is derived from them, the key bundles of the epochs,
// the sealing of slices, heads and local records, the locks that decide who
// may delete a shard, and the signed list of devices. FORMAT.md, "Seal".
//
// The keys form one tree:
//
//	24 words → Root → Recovery: authority (device chain), wrap key (HPKE),
//	                  pool identity, one HeadKey per device slot
//	random Bundle per epoch {content, metadata, dedup, lock}, wrapped by HPKE
//	                  to each device and to the recovery key
//	content key + stripe salt + slice number → slice key, used once
//	lock key + stripe id → index key, blind id, lock key, repair key
//
// A slice is sealed and opened like this:
//
//	c := seal.SliceContext{Volume: v, Stripe: id, Slice: 3, Epoch: 1,
//		Length: uint32(len(plain)), Purpose: seal.PurposeContent}
//	sealed, err := seal.SealSlice(nil, bundle.Content, salt, c, plain)
//	plain, err = seal.OpenSlice(buffer[:0], bundle.Content, salt, c, sealed)
//
// The package is pure: it starts no goroutine, keeps no state and touches
// neither disk, network nor clock. Functions that take a dst append to it, as
// append does; everything else that is returned belongs to the caller.
// Randomness that must be unpredictable but need not be repeatable comes from
// crypto/rand. There is nothing here to lose in a crash.
package seal

import (
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
)

// The kinds of failure, to be tested with errors.Is.
var (
	// ErrNotAuthentic: the bytes were not made with this key and context, or
	// were changed since. Trying again with the same bytes cannot help.
	ErrNotAuthentic = errors.New("not authentic")
	// ErrMalformed: the bytes are not an encoding of the expected thing.
	ErrMalformed = errors.New("malformed")
	// ErrInvalid: an argument is outside what the function accepts.
	ErrInvalid = errors.New("invalid argument")
	// ErrWords: the recovery words are not 24 words with a good checksum.
	ErrWords = errors.New("wrong recovery words")
)

// derive returns sizeBytes of HKDF-SHA256 (RFC 5869) output. It cannot fail:
// every size used here is far below the limit of 255 hashes, and secrets are
// 32 bytes or more.
func derive(secret, salt []byte, info string, sizeBytes int) []byte {
	key, err := hkdf.Key(sha256.New, secret, salt, info, sizeBytes)
	if err != nil {
		panic(fmt.Sprintf("seal: derive %d bytes: %v", sizeBytes, err))
	}
	return key
}

// derive32 is derive for the usual 32-byte key without a salt.
func derive32(secret []byte, info string) [32]byte {
	return [32]byte(derive(secret, nil, info, 32))
}
