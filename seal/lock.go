package seal

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	"github.com/zeebo/blake3"
	"golang.org/x/crypto/ripemd160" //nolint:staticcheck // part of the P2PKH standard

	"github.com/defs-fs/defs/erasure"
)

// FirstLockVersion is the version of a stripe's first lock.
const FirstLockVersion uint32 = 1

const (
	// LockScriptBytesMax is the length of the longest lock script.
	LockScriptBytesMax = p2pkScriptBytes
	// UnlockBytesMax is the length of the longest unlocking script.
	UnlockBytesMax = 1 + derBytesMax + 1 + secp256k1.PubKeyBytesLenCompressed

	p2pkhScriptBytes = 25
	p2pkScriptBytes  = 35
	derBytesMin      = 8
	derBytesMax      = 71 // low S: R may need a leading zero byte, S never does

	opDup         = 0x76
	opEqualVerify = 0x88
	opHash160     = 0xa9
	opCheckSig    = 0xac
)

// LockKind is the form of a lock script.
type LockKind uint8

const (
	// P2PKH shows only a hash of the key until the lock is first opened:
	// DUP HASH160 <20 bytes> EQUALVERIFY CHECKSIG. The default.
	P2PKH LockKind = 1
	// P2PK shows the key: <33 bytes> CHECKSIG.
	P2PK LockKind = 2
)

// Lock says who may delete or relock the shards of a stripe and read their
// salt columns. The first version is signed by the stripe's index key, each
// later one by the key of the version before it.
type Lock struct {
	Version uint32 // from FirstLockVersion, one more each time
	Script  []byte // P2PKH or P2PK, standard encoding
	PrevSig []byte // version 1: Ed25519 signature, 64 bytes; later: unlocking script of the previous lock
}

// NewLock returns the stripe's first lock for the keys of FirstLockVersion.
func (k *StripeKeys) NewLock(kind LockKind) (Lock, error) {
	script, err := newScript(k.Lock.PubKey(), kind)
	if err != nil {
		return Lock{}, err
	}
	l := Lock{Version: FirstLockVersion, Script: script}
	l.PrevSig = domainLock.sign(k.Index, l.message(k.Blind))
	return l, nil
}

// NextLock returns the lock that replaces l, for the keys of version
// l.Version+1; k holds the keys of l.
func (k *StripeKeys) NextLock(l Lock, next *StripeKeys, kind LockKind) (Lock, error) {
	previous, err := l.kind()
	if err != nil {
		return Lock{}, err
	}
	script, err := newScript(next.Lock.PubKey(), kind)
	if err != nil {
		return Lock{}, err
	}
	n := Lock{Version: l.Version + 1, Script: script}
	n.PrevSig = newUnlock(k.Lock, previous, n.digest(k.Blind))
	return n, nil
}

// VerifyFirst checks that l is the first lock of the stripe of index, whose
// BlindOf the caller has compared with the blind id it knows.
func (l Lock) VerifyFirst(index ed25519.PublicKey) error {
	if err := l.validate(); err != nil {
		return err
	}
	if l.Version != FirstLockVersion {
		return fmt.Errorf("seal: verify first lock: %w: version is %d", ErrNotAuthentic, l.Version)
	}
	if err := domainLock.verify(index, l.message(BlindOf(index)), l.PrevSig); err != nil {
		return fmt.Errorf("seal: verify first lock: %w", err)
	}
	return nil
}

// VerifyNext checks that next may replace l: its version is one higher and it
// is signed by the key that opens l. Lower and equal versions are refused, so
// that a rebuilt shard never brings an old lock back.
func (l Lock) VerifyNext(blind erasure.BlindID, next Lock) error {
	if err := next.validate(); err != nil {
		return err
	}
	if next.Version == 0 || next.Version-1 != l.Version {
		return fmt.Errorf("seal: verify next lock of %x: %w: version %d after %d", blind[:], ErrNotAuthentic, next.Version, l.Version)
	}
	if err := l.open(next.digest(blind), next.PrevSig); err != nil {
		return fmt.Errorf("seal: verify lock version %d of %x: %w", next.Version, blind[:], err)
	}
	return nil
}

// message binds a lock version to its stripe; its domain goes in front.
func (l Lock) message(blind erasure.BlindID) []byte {
	out := append([]byte(nil), blind[:]...)
	out = binary.BigEndian.AppendUint32(out, l.Version)
	return append(out, l.Script...)
}

func (l Lock) digest(blind erasure.BlindID) [32]byte {
	return blake3.Sum256(append([]byte(domainLock), l.message(blind)...))
}

func (l Lock) kind() (LockKind, error) {
	s := l.Script
	switch {
	case len(s) == p2pkhScriptBytes && s[0] == opDup && s[1] == opHash160 && s[2] == 20 && s[23] == opEqualVerify && s[24] == opCheckSig:
		return P2PKH, nil
	case len(s) == p2pkScriptBytes && s[0] == secp256k1.PubKeyBytesLenCompressed && s[34] == opCheckSig:
		return P2PK, nil
	}
	return 0, fmt.Errorf("seal: lock script of %d bytes: %w: neither P2PKH nor P2PK", len(s), ErrMalformed)
}

// validate bounds and checks what came from disk or wire.
func (l Lock) validate() error {
	kind, err := l.kind()
	if err != nil {
		return err
	}
	if kind == P2PK {
		if _, err := secp256k1.ParsePubKey(l.Script[1:34]); err != nil {
			return fmt.Errorf("seal: lock script: %w: %w", ErrMalformed, err)
		}
	}
	return nil
}

func newScript(key *secp256k1.PublicKey, kind LockKind) ([]byte, error) {
	pub := key.SerializeCompressed()
	switch kind {
	case P2PKH:
		script := append([]byte{opDup, opHash160, 20}, hash160(pub)...)
		return append(script, opEqualVerify, opCheckSig), nil
	case P2PK:
		script := append([]byte{secp256k1.PubKeyBytesLenCompressed}, pub...)
		return append(script, opCheckSig), nil
	}
	return nil, fmt.Errorf("seal: new lock: %w: kind %d", ErrInvalid, kind)
}

// hash160 is RIPEMD-160(SHA-256(b)), as the P2PKH script says.
func hash160(b []byte) []byte {
	sum := sha256.Sum256(b)
	h := ripemd160.New()
	_, _ = h.Write(sum[:])
	return h.Sum(nil)
}

// newUnlock returns the unlocking script: <signature> for P2PK, <signature>
// <key> for P2PKH. Both are short enough for pushes of one length byte. There
// is no transaction, hence no hash-type byte after the signature.
func newUnlock(key *secp256k1.PrivateKey, kind LockKind, digest [32]byte) []byte {
	der := ecdsa.Sign(key, digest[:]).Serialize()
	unlock := append([]byte{byte(len(der))}, der...)
	if kind == P2PKH {
		unlock = append(unlock, secp256k1.PubKeyBytesLenCompressed)
		unlock = append(unlock, key.PubKey().SerializeCompressed()...)
	}
	return unlock
}

// open checks that unlock opens l for digest. The key comes from the lock
// alone: P2PK shows it, P2PKH shows the hash it must have.
func (l Lock) open(digest [32]byte, unlock []byte) error {
	kind, err := l.kind()
	if err != nil {
		return err
	}
	der, rest, err := pop(unlock, derBytesMin, derBytesMax)
	if err != nil {
		return err
	}
	var pub []byte
	switch kind {
	case P2PK:
		pub = l.Script[1:34]
	case P2PKH:
		if pub, rest, err = pop(rest, secp256k1.PubKeyBytesLenCompressed, secp256k1.PubKeyBytesLenCompressed); err != nil {
			return err
		}
		if !bytes.Equal(hash160(pub), l.Script[3:23]) {
			return fmt.Errorf("%w: the key is not the one the lock names", ErrNotAuthentic)
		}
	}
	if len(rest) != 0 {
		return fmt.Errorf("%w: %d bytes after the unlocking script", ErrMalformed, len(rest))
	}
	key, err := secp256k1.ParsePubKey(pub)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	signature, err := ecdsa.ParseDERSignature(der)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	// One signature, one encoding: Serialize gives strict DER with low S.
	if !bytes.Equal(signature.Serialize(), der) {
		return fmt.Errorf("%w: signature is not canonical low-S DER", ErrMalformed)
	}
	if !signature.Verify(digest[:], key) {
		return fmt.Errorf("%w: wrong signature", ErrNotAuthentic)
	}
	return nil
}

// pop takes one push of sizeMin..sizeMax bytes off a script.
func pop(script []byte, sizeMin, sizeMax int) (data, rest []byte, err error) {
	if len(script) == 0 {
		return nil, nil, fmt.Errorf("%w: unlocking script ends early", ErrMalformed)
	}
	size := int(script[0])
	if size < sizeMin || size > sizeMax || size > len(script)-1 {
		return nil, nil, fmt.Errorf("%w: push of %d bytes with %d left, want %d to %d", ErrMalformed, size, len(script)-1, sizeMin, sizeMax)
	}
	return script[1 : 1+size], script[1+size:], nil
}
