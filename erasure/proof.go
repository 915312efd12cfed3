package erasure

import (
	"encoding/binary"
	"fmt"

	"lukechampine.com/blake3/guts"
)

// A hash tree has groups of coded bytes as leaves and 64-byte inner nodes (the
// chaining values of both children). The layout after the coded root is that
// of Bao with groups of 16 chunks, see FORMAT.md, "Outboard and range proof".
const (
	nodeBytes       = 64
	proofHeadBytes  = 32 + 8 // coded root, number of coded bytes
	codedRootOffset = 0
	lengthOffset    = 32
)

// treeBytes returns the length of the inner nodes of a tree over size bytes.
func treeBytes(size int) int { return (size/GroupBytes - 1) * nodeBytes }

// OutboardBytes returns the length of the outboard of a shard with shardBytes
// coded bytes: 40 for 16 KiB, 4,072 for 1 MiB.
func OutboardBytes(shardBytes int) int { return proofHeadBytes + treeBytes(shardBytes) }

// Outboard returns the hash tree of a shard's coded bytes, which a node stores
// beside the shard to answer ranges without reading it whole. len(coded) must
// be one of ShardSizes. The caller owns the result.
func Outboard(coded []byte) ([]byte, error) {
	if err := invalid("coded bytes", shardViolations(len(coded))); err != nil {
		return nil, fmt.Errorf("erasure: outboard: %w", err)
	}
	outboard := make([]byte, OutboardBytes(len(coded)))
	root := hashSubtree(coded, 0, guts.FlagRoot, outboard[proofHeadBytes:])
	putCV(outboard[codedRootOffset:], root)
	binary.LittleEndian.PutUint64(outboard[lengthOffset:], uint64(len(coded)))
	return outboard, nil
}

// OutboardRoot returns the coded root that an outboard starts with. It checks
// the outboard's shape, not its hashes.
func OutboardRoot(outboard []byte) ([32]byte, error) {
	if _, err := outboardShardBytes(outboard); err != nil {
		return [32]byte{}, err
	}
	return [32]byte(outboard), nil
}

func outboardShardBytes(outboard []byte) (int, error) {
	if len(outboard) < proofHeadBytes {
		return 0, fmt.Errorf("erasure: outboard: %w: %d bytes", ErrCorrupt, len(outboard))
	}
	shardBytes := binary.LittleEndian.Uint64(outboard[lengthOffset:])
	for _, size := range ShardSizes() {
		if shardBytes == uint64(size) && len(outboard) == OutboardBytes(size) {
			return size, nil
		}
	}
	return 0, fmt.Errorf("erasure: outboard: %w: %d bytes for a shard of %d", ErrCorrupt, len(outboard), shardBytes)
}

// GroupRange returns the whole groups that cover coded bytes [off, off+n):
// the bytes that Prove needs and that a proof carries.
func GroupRange(off, n int) (from, to int) {
	from = off / GroupBytes * GroupBytes
	to = (off + n + GroupBytes - 1) / GroupBytes * GroupBytes
	return from, to
}

func checkRange(shardBytes, off, n int) error {
	violations := shardViolations(shardBytes)
	if off < 0 || n < 1 || off > shardBytes || n > shardBytes-off {
		violations = append(violations, fmt.Sprintf("bytes %d+%d must be a range of at least one byte within %d", off, n, shardBytes))
	}
	return invalid("range", violations)
}

// ProofBytes returns the exact length of the proof for coded bytes
// [off, off+n) of a shard, n >= 1 and within the shard, else ErrInvalid.
func ProofBytes(shardBytes, off, n int) (int, error) {
	if err := checkRange(shardBytes, off, n); err != nil {
		return 0, fmt.Errorf("erasure: proof: %w", err)
	}
	from, to := GroupRange(off, n)
	return proofHeadBytes + proofTreeBytes(0, shardBytes, from, to), nil
}

// proofTreeBytes returns the length of groups and inner nodes that the subtree
// at [pos, pos+size) adds to a proof of groups [from, to).
func proofTreeBytes(pos, size, from, to int) int {
	switch {
	case pos >= to || from >= pos+size:
		return 0
	case from <= pos && pos+size <= to:
		return size + treeBytes(size)
	}
	half := size / 2
	return nodeBytes + proofTreeBytes(pos, half, from, to) + proofTreeBytes(pos+half, half, from, to)
}

// Prove returns the proof for coded bytes [off, off+n) of a shard, n >= 1.
// groups are the coded bytes of GroupRange(off, n), outboard is the shard's.
// The proof carries the groups; it belongs to the caller. Prove checks shapes,
// not hashes: the receiver does.
func Prove(groups, outboard []byte, off, n int) ([]byte, error) {
	shardBytes, err := outboardShardBytes(outboard)
	if err != nil {
		return nil, err
	}
	size, err := ProofBytes(shardBytes, off, n)
	if err != nil {
		return nil, err
	}
	from, to := GroupRange(off, n)
	if len(groups) != to-from {
		return nil, fmt.Errorf("erasure: prove: %w: %d bytes of groups, not %d", ErrInvalid, len(groups), to-from)
	}
	p := prover{from: from, to: to, groups: groups, proof: make([]byte, 0, size)}
	p.proof = append(p.proof, outboard[:proofHeadBytes]...)
	p.subtree(0, shardBytes, outboard[proofHeadBytes:])
	return p.proof, nil
}

type prover struct {
	from, to int
	groups   []byte // not yet written
	proof    []byte
}

func (p *prover) subtree(pos, size int, nodes []byte) {
	if pos >= p.to || p.from >= pos+size {
		return
	}
	if size == GroupBytes {
		p.proof = append(p.proof, p.groups[:GroupBytes]...)
		p.groups = p.groups[GroupBytes:]
		return
	}
	half := size / 2
	p.proof = append(p.proof, nodes[:nodeBytes]...)
	p.subtree(pos, half, nodes[nodeBytes:nodeBytes+treeBytes(half)])
	p.subtree(pos+half, half, nodes[nodeBytes+treeBytes(half):])
}

// VerifyRange checks a proof for coded bytes [off, off+n) of a shard with the
// given root and column hash, and copies these n bytes to dst, len(dst) == n.
// A proof that does not match gives ErrCorrupt; dst then holds nothing that
// was not verified, but is incomplete.
func VerifyRange(root, columnHash [32]byte, shardBytes, off, n int, proof, dst []byte) error {
	size, err := ProofBytes(shardBytes, off, n)
	if err != nil {
		return err
	}
	if len(dst) != n {
		return fmt.Errorf("erasure: verify range: %w: %d bytes of room for %d", ErrInvalid, len(dst), n)
	}
	// The length fixes where everything lies, so that no read below can run over.
	if len(proof) != size {
		return fmt.Errorf("erasure: verify range: %w: proof of %d bytes, not %d", ErrCorrupt, len(proof), size)
	}
	if claimed := binary.LittleEndian.Uint64(proof[lengthOffset:]); claimed != uint64(shardBytes) {
		return fmt.Errorf("erasure: verify range: %w: proof for a shard of %d bytes, not %d", ErrCorrupt, claimed, shardBytes)
	}
	if JoinRoot(columnHash, [32]byte(proof)) != root {
		return fmt.Errorf("erasure: verify range: %w: the coded root does not match the root", ErrCorrupt)
	}
	v := verifier{off: off, end: off + n, proof: proof[proofHeadBytes:], dst: dst}
	if !v.subtree(getCV(proof[codedRootOffset:]), 0, shardBytes, guts.FlagRoot) {
		return fmt.Errorf("erasure: verify range: %w: bytes %d+%d do not match the root", ErrCorrupt, off, n)
	}
	return nil
}

type verifier struct {
	off, end int
	proof    []byte // not yet read
	dst      []byte // bytes [off, end)
}

// subtree checks the subtree over [pos, pos+size) against its chaining value.
func (v *verifier) subtree(cv [8]uint32, pos, size int, flags uint32) bool {
	if pos >= v.end || v.off >= pos+size {
		return true // outside the range: not in the proof
	}
	if size == GroupBytes {
		group := v.proof[:GroupBytes]
		v.proof = v.proof[GroupBytes:]
		if hashGroup(group, pos, flags) != cv {
			return false
		}
		from, to := max(pos, v.off), min(pos+size, v.end)
		copy(v.dst[from-v.off:], group[from-pos:to-pos])
		return true
	}
	left, right := getCV(v.proof), getCV(v.proof[32:])
	v.proof = v.proof[nodeBytes:]
	if guts.ChainingValue(guts.ParentNode(left, right, &guts.IV, flags)) != cv {
		return false
	}
	half := size / 2
	return v.subtree(left, pos, half, 0) && v.subtree(right, pos+half, half, 0)
}
