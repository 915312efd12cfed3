package metastore

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// Key prefixes. Integers in keys are big-endian, so that keys sort by number.
// Tree keys are what the log publishes; the rest is this device's own, derived
// from tree keys or cached.
const (
	prefixInode   = 'i' // i ino                       → Inode
	prefixDirent  = 'd' // d parent name               → Dirent without name
	prefixExtent  = 'e' // e ino off                   → Extent without off
	prefixXattr   = 'x' // x ino name                  → value
	prefixOrphan  = 'o' // o ino                       → nothing
	prefixStripe  = 's' // s stripe                    → StripeInfo
	prefixVolume  = 'g' // g name                      → value; counters: 8 bytes
	prefixCookie  = 'c' // c parent cookie             → Dirent without cookie (derived)
	prefixSalt    = 'k' // k stripe                    → salt
	prefixDedup   = 'h' // h hash                      → Remote
	prefixRef     = 'r' // r stripe slice ino off      → length (derived)
	prefixWrite   = 'w' // w segment ino off           → length (derived)
	prefixTouched = 't' // t generation key            → Lamport time
	prefixMeta    = 'm' // m name                      → value
)

const (
	// KeyBytesMax bounds a key.
	KeyBytesMax = 1 << 10
	// ValueBytesMax bounds a value.
	ValueBytesMax = 1 << 20
	// NameBytesMax bounds the name of a directory entry or attribute.
	NameBytesMax = 255
	// TargetBytesMax bounds the target of a symbolic link.
	TargetBytesMax = 4095
	// HolderBytesMax bounds a node id.
	HolderBytesMax = 255
)

var (
	keyApplied    = []byte("mapplied")    // journal sequence of the newest applied record
	keyGeneration = []byte("mgeneration") // current cut generation
	keySchema     = []byte("mschema")     // version of this layout
)

// IsTreeKey reports whether key belongs to the tree that the log publishes.
func IsTreeKey(key []byte) bool {
	if len(key) == 0 {
		return false
	}
	switch key[0] {
	case prefixInode, prefixDirent, prefixExtent, prefixXattr, prefixOrphan, prefixStripe, prefixVolume:
		return true
	}
	return false
}

func isLocalKey(key []byte) bool {
	if len(key) == 0 {
		return false
	}
	switch key[0] {
	case prefixCookie, prefixSalt, prefixDedup, prefixRef, prefixWrite, prefixTouched, prefixMeta:
		return true
	}
	return false
}

func key8(prefix byte, a uint64) []byte {
	k := make([]byte, 1, 24)
	k[0] = prefix
	return binary.BigEndian.AppendUint64(k, a)
}

func key88(prefix byte, a, b uint64) []byte { return binary.BigEndian.AppendUint64(key8(prefix, a), b) }

func keyName(prefix byte, a uint64, name string) []byte {
	k := make([]byte, 1, 9+len(name))
	k[0] = prefix
	return append(binary.BigEndian.AppendUint64(k, a), name...)
}

func inodeKey(ino Ino) []byte                    { return key8(prefixInode, uint64(ino)) }
func direntKey(parent Ino, name string) []byte   { return keyName(prefixDirent, uint64(parent), name) }
func cookieKey(parent Ino, cookie uint64) []byte { return key88(prefixCookie, uint64(parent), cookie) }
func extentKey(ino Ino, off uint64) []byte       { return key88(prefixExtent, uint64(ino), off) }
func xattrKey(ino Ino, name string) []byte       { return keyName(prefixXattr, uint64(ino), name) }
func orphanKey(ino Ino) []byte                   { return key8(prefixOrphan, uint64(ino)) }
func volumeKey(name string) []byte               { return append([]byte{prefixVolume}, name...) }
func stripeKey(id [16]byte) []byte               { return append([]byte{prefixStripe}, id[:]...) }
func saltKey(id [16]byte) []byte                 { return append([]byte{prefixSalt}, id[:]...) }
func dedupKey(hash [32]byte) []byte              { return append([]byte{prefixDedup}, hash[:]...) }
func writeKey(segment uint64, ino Ino, off uint64) []byte {
	return binary.BigEndian.AppendUint64(key88(prefixWrite, segment, uint64(ino)), off)
}

func refKey(r Remote, ino Ino, off uint64) []byte {
	k := make([]byte, 1, 1+16+4+8+8)
	k[0] = prefixRef
	k = append(k, r.Stripe[:]...)
	k = binary.BigEndian.AppendUint32(k, r.Slice)
	k = binary.BigEndian.AppendUint64(k, uint64(ino))
	return binary.BigEndian.AppendUint64(k, off)
}

// touchedKey appends to dst.
func touchedKey(dst []byte, generation uint64, key []byte) []byte {
	dst = append(dst, prefixTouched)
	dst = binary.BigEndian.AppendUint64(dst, generation)
	return append(dst, key...)
}

// successor returns the first key after all keys that start with prefix.
func successor(prefix []byte) []byte {
	end := append([]byte(nil), prefix...)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i]++; end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}

// ParsedKey is a tree key taken apart. Which fields are set depends on Kind.
type ParsedKey struct {
	Kind   byte // 'i', 'd', 'e', 'x', 'o', 's' or 'g'
	Ino    Ino  // inode, or parent of a 'd' key
	Off    uint64
	Name   string
	Stripe [16]byte
}

// ParseTreeKey takes a tree key apart; anything else is ErrCorrupt.
func ParseTreeKey(key []byte) (ParsedKey, error) {
	bad := fmt.Errorf("parse tree key of %d bytes: %w", len(key), ErrCorrupt)
	if !IsTreeKey(key) || len(key) > KeyBytesMax {
		return ParsedKey{}, bad
	}
	p := ParsedKey{Kind: key[0]}
	rest := key[1:]
	switch p.Kind {
	case prefixStripe:
		if len(rest) != 16 {
			return ParsedKey{}, bad
		}
		p.Stripe = [16]byte(rest)
		return p, nil
	case prefixVolume:
		if len(rest) == 0 {
			return ParsedKey{}, bad
		}
		p.Name = string(rest)
		return p, nil
	}
	if len(rest) < 8 {
		return ParsedKey{}, bad
	}
	p.Ino, rest = Ino(binary.BigEndian.Uint64(rest)), rest[8:]
	switch p.Kind {
	case prefixInode, prefixOrphan:
		if len(rest) != 0 {
			return ParsedKey{}, bad
		}
	case prefixExtent:
		if len(rest) != 8 {
			return ParsedKey{}, bad
		}
		p.Off = binary.BigEndian.Uint64(rest)
	case prefixDirent, prefixXattr:
		if len(rest) == 0 || len(rest) > NameBytesMax {
			return ParsedKey{}, bad
		}
		p.Name = string(rest)
		if p.Kind == prefixDirent && (p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/\x00")) {
			return ParsedKey{}, bad // no directory can hold it, and it must not lead out of one
		}
	}
	return p, nil
}
