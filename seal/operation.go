package seal

import (
	"encoding/binary"
	"fmt"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/zeebo/blake3"

	"github.com/defs-fs/defs/erasure"
)

// OperationKind says what an Operation asks for.
type OperationKind uint8

// The operations that need the lock opened.
const (
	OpDelete  OperationKind = 1 // delete the shard
	OpRelock  OperationKind = 2 // replace the lock by its next version
	OpColumns OperationKind = 3 // read the shard's salt column
)

// Operation is what an unlocking script authorises: one act on one shard at
// one node, once. The node checks, besides Lock.Verify, that Nonce is the one
// it drew for this connection, that Expiry is ahead and that Counter is higher
// than every one it has seen on the connection.
type Operation struct {
	Kind    OperationKind
	Blind   erasure.BlindID
	Index   uint8  // shard number
	Node    string // id of the node asked, at most 255 bytes
	Nonce   []byte // of the connection, at most 255 bytes
	Expiry  int64  // unix seconds
	Counter uint64
}

// Digest is BLAKE3 over "defs operation v1" and every field in an encoding
// that is the same for no two operations. FORMAT.md, "Operation".
func (o Operation) Digest() ([32]byte, error) {
	if o.Kind < OpDelete || o.Kind > OpColumns || len(o.Node) > 255 || len(o.Nonce) > 255 {
		return [32]byte{}, fmt.Errorf("seal: operation of kind %d on %x: %w: node of %d, nonce of %d bytes", o.Kind, o.Blind[:], ErrInvalid, len(o.Node), len(o.Nonce))
	}
	b := append(make([]byte, 0, 160), "defs operation v1"...)
	b = append(b, byte(o.Kind))
	b = append(b, o.Blind[:]...)
	b = append(b, o.Index, byte(len(o.Node)))
	b = append(b, o.Node...)
	b = append(b, byte(len(o.Nonce)))
	b = append(b, o.Nonce...)
	b = binary.BigEndian.AppendUint64(b, uint64(o.Expiry))
	b = binary.BigEndian.AppendUint64(b, o.Counter)
	return blake3.Sum256(b), nil
}

// Sign returns the unlocking script for op on a stripe whose lock is of the
// given kind and belongs to key.
func Sign(key *secp256k1.PrivateKey, kind LockKind, op Operation) ([]byte, error) {
	digest, err := op.Digest()
	if err != nil {
		return nil, err
	}
	return newUnlock(key, kind, digest), nil
}

// Verify checks that unlock opens the lock for exactly this operation.
func (l Lock) Verify(op Operation, unlock []byte) error {
	digest, err := op.Digest()
	if err != nil {
		return err
	}
	if err := l.open(digest, unlock); err != nil {
		return fmt.Errorf("seal: unlock shard %d of %x: %w", op.Index, op.Blind[:], err)
	}
	return nil
}
