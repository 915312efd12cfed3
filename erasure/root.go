package erasure

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/zeebo/blake3"
	"lukechampine.com/blake3/guts"
)

// rootDomain separates shard roots from all other uses of BLAKE3.
const rootDomain = "defs shard root v1"

// CRC returns the CRC32C (RFC 3720) of a body. It finds accidents, not liars.
func CRC(body []byte) uint32 {
	return crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
}

// ColumnHash returns the BLAKE3 hash of a column.
func ColumnHash(column []byte) [32]byte { return blake3.Sum256(column) }

// CodedRoot returns the BLAKE3 hash of a shard's coded bytes, which is the
// root of its hash tree. Package zeebo/blake3 hashes them more than twice as
// fast as guts does where there is no AVX-512, but has no trees.
func CodedRoot(coded []byte) [32]byte { return blake3.Sum256(coded) }

// JoinRoot returns the root of a shard: BLAKE3(domain ‖ columnHash ‖
// codedRoot). See FORMAT.md, "Shard root".
func JoinRoot(columnHash, codedRoot [32]byte) [32]byte {
	var input [len(rootDomain) + 64]byte
	copy(input[:], rootDomain)
	copy(input[len(rootDomain):], columnHash[:])
	copy(input[len(rootDomain)+32:], codedRoot[:])
	return blake3.Sum256(input[:])
}

// Root returns the root of a body (column and coded bytes), the hash by which
// a manifest names the shard.
func Root(body []byte) [32]byte {
	split := min(ColumnBytes, len(body))
	return JoinRoot(ColumnHash(body[:split]), CodedRoot(body[split:]))
}

// VerifyBody checks a whole body against its root, without a proof.
func VerifyBody(root [32]byte, body []byte) error {
	if Root(body) != root {
		return fmt.Errorf("erasure: verify body: %w: %d bytes do not match the root", ErrCorrupt, len(body))
	}
	return nil
}

// VerifyCoded checks all coded bytes of a shard against its root, without a
// proof and without the column.
func VerifyCoded(root, columnHash [32]byte, coded []byte) error {
	if JoinRoot(columnHash, CodedRoot(coded)) != root {
		return fmt.Errorf("erasure: verify coded bytes: %w: %d bytes do not match the root", ErrCorrupt, len(coded))
	}
	return nil
}

// VerifyColumn checks a column against its shard's root; codedRoot is the
// shard's CodedRoot, from the reply that brought the column.
func VerifyColumn(root [32]byte, column []byte, codedRoot [32]byte) error {
	if len(column) != ColumnBytes {
		return fmt.Errorf("erasure: verify column: %w: %d bytes, not %d", ErrCorrupt, len(column), ColumnBytes)
	}
	if JoinRoot(ColumnHash(column), codedRoot) != root {
		return fmt.Errorf("erasure: verify column: %w: it does not match the root", ErrCorrupt)
	}
	return nil
}

// hashSubtree returns the chaining value of the tree over data, whose length
// is GroupBytes times a power of two and which starts at pos in the shard.
// nodes receives the inner nodes in pre-order, 64 bytes each.
func hashSubtree(data []byte, pos int, flags uint32, nodes []byte) [8]uint32 {
	if len(data) == GroupBytes {
		return hashGroup(data, pos, flags)
	}
	half := len(data) / 2
	own, below := nodes[:nodeBytes], nodes[nodeBytes:]
	left := hashSubtree(data[:half], pos, 0, below[:treeBytes(half)])
	right := hashSubtree(data[half:], pos+half, 0, below[treeBytes(half):])
	putCV(own[:32], left)
	putCV(own[32:], right)
	return guts.ChainingValue(guts.ParentNode(left, right, &guts.IV, flags))
}

// hashGroup returns the chaining value of the group that starts at pos.
func hashGroup(group []byte, pos int, flags uint32) [8]uint32 {
	node := guts.CompressBuffer((*[GroupBytes]byte)(group), GroupBytes, &guts.IV, uint64(pos/guts.ChunkSize), 0)
	node.Flags |= flags
	return guts.ChainingValue(node)
}

func putCV(dst []byte, cv [8]uint32) {
	for i, word := range cv {
		binary.LittleEndian.PutUint32(dst[4*i:], word)
	}
}

func getCV(src []byte) (cv [8]uint32) {
	for i := range cv {
		cv[i] = binary.LittleEndian.Uint32(src[4*i:])
	}
	return cv
}
