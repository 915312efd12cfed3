package erasure

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// StripeID names a stripe inside its volume. It is random and never leaves the
// devices in clear.
type StripeID [16]byte

// String returns the id in hexadecimal.
func (id StripeID) String() string { return hex.EncodeToString(id[:]) }

// BlindID is the name under which nodes know a stripe.
type BlindID [32]byte

// String returns the id in hexadecimal.
func (id BlindID) String() string { return hex.EncodeToString(id[:]) }

const (
	// ColumnBytes is the length of the column at the start of every body.
	ColumnBytes = 32
	// GroupBytes is the unit of proofs: the leaves of the hash tree over the
	// coded bytes are groups of this length (16 BLAKE3 chunks).
	GroupBytes = 16 << 10
	// DefaultShardBytes is the shard size of full stripes unless a policy says
	// otherwise.
	DefaultShardBytes = 1 << 20

	shardsMax = 100 // of each kind, data and parity
)

// Kinds of error. Test for them with errors.Is.
var (
	// ErrInvalid marks geometries, policies and arguments that break a rule.
	ErrInvalid = errors.New("invalid")
	// ErrTooFewNodes means that the pool cannot hold the smallest stripe that
	// the policy allows.
	ErrTooFewNodes = errors.New("too few live nodes")
	// ErrTooFewShards means that fewer than k shards or columns are present.
	ErrTooFewShards = errors.New("too few shards")
	// ErrCorrupt means that bytes do not match the root they are claimed for.
	ErrCorrupt = errors.New("corrupt shard")
)

// ShardSizes returns the allowed coded bytes per shard, ascending. All are
// powers of two and whole groups. Sizes over 1 MiB are used only where a
// policy asks for them.
func ShardSizes() []int {
	return []int{16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20, 16 << 20, 32 << 20}
}

// Geometry is the shape of one stripe: K data shards and M parity shards of
// ShardBytes coded bytes each.
type Geometry struct {
	K, M       int // 1 to 100 each
	ShardBytes int // coded bytes of a shard, one of ShardSizes
}

// N returns the number of shards.
func (g Geometry) N() int { return g.K + g.M }

// DataBytes returns how many sealed bytes the stripe holds.
func (g Geometry) DataBytes() int { return g.K * g.ShardBytes }

// BodyBytes returns the length of a shard's body: column and coded bytes.
func (g Geometry) BodyBytes() int { return ColumnBytes + g.ShardBytes }

// String returns the geometry as in "4+2×1MiB".
func (g Geometry) String() string {
	return fmt.Sprintf("%d+%d×%s", g.K, g.M, formatBytes(g.ShardBytes))
}

// Validate returns an error that lists every rule the geometry breaks, or nil.
func (g Geometry) Validate() error {
	violations := countViolations(g.K, g.M)
	violations = append(violations, shardViolations(g.ShardBytes)...)
	return invalid("geometry "+g.String(), violations)
}

func countViolations(k, m int) []string {
	var violations []string
	if k < 1 || k > shardsMax {
		violations = append(violations, fmt.Sprintf("data shards K must be 1 to %d, not %d", shardsMax, k))
	}
	if m < 1 || m > shardsMax {
		violations = append(violations, fmt.Sprintf("parity shards M must be 1 to %d, not %d", shardsMax, m))
	}
	return violations
}

func isShardSize(n int) bool { return slices.Contains(ShardSizes(), n) }

func shardViolations(shardBytes int) []string {
	if isShardSize(shardBytes) {
		return nil
	}
	sizes := ShardSizes()
	names := make([]string, len(sizes))
	for i, size := range sizes {
		names[i] = formatBytes(size)
	}
	return []string{fmt.Sprintf("shard size must be one of %s, not %s", strings.Join(names, ", "), formatBytes(shardBytes))}
}

// invalid joins violations into one error, or returns nil when there are none.
func invalid(subject string, violations []string) error {
	if len(violations) == 0 {
		return nil
	}
	return fmt.Errorf("%w %s: %s", ErrInvalid, subject, strings.Join(violations, "; "))
}

func formatBytes(n int) string {
	switch {
	case n > 0 && n%(1<<20) == 0:
		return fmt.Sprintf("%dMiB", n>>20)
	case n > 0 && n%(1<<10) == 0:
		return fmt.Sprintf("%dKiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}
