package erasure

import (
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/reedsolomon"
)

const (
	// With more than this many data or parity shards the library reaches its
	// fast path only through its parallel code.
	oneGoroutineShardsMax = 10
	// The library never forgets an inverted matrix. Up to this many shards the
	// possible loss patterns fit a few megabytes; beyond it matrices are
	// inverted anew each time.
	inversionCacheShardsMax = 16

	codesMax = 64
)

// Code encodes and rebuilds stripes of k data and m parity shards. It is safe
// for concurrent use. Building one costs 5 µs for 4+2, 25 µs for 10+4 and 12 ms
// for 100+100: keep it, see Codes.
type Code struct {
	k, m   int
	shards reedsolomon.Encoder // (k, m)
	salt   reedsolomon.Encoder // (k, m+1): the same first m parity rows and the salt's
}

// New returns the code for k data and m parity shards, 1 to 100 each.
func New(k, m int) (*Code, error) {
	if err := invalid(fmt.Sprintf("code %d+%d", k, m), countViolations(k, m)); err != nil {
		return nil, err
	}
	shards, err := newEncoder(k, m)
	if err != nil {
		return nil, err
	}
	salt, err := newEncoder(k, m+1)
	if err != nil {
		return nil, err
	}
	return &Code{k: k, m: m, shards: shards, salt: salt}, nil
}

func newEncoder(k, m int) (reedsolomon.Encoder, error) {
	options := []reedsolomon.Option{
		reedsolomon.WithInversionCache(k+m <= inversionCacheShardsMax),
		reedsolomon.WithMaxGoroutines(1), // stripes run side by side; splitting one costs more CPU in all
	}
	if k > oneGoroutineShardsMax || m > oneGoroutineShardsMax {
		options = append(options, reedsolomon.WithMaxGoroutines(2), reedsolomon.WithMinSplitSize(1<<10))
	}
	encoder, err := reedsolomon.New(k, m, options...)
	if err != nil {
		return nil, fmt.Errorf("erasure: code %d+%d: %w", k, m, err)
	}
	return encoder, nil
}

// Codes keeps the codes in use, at most 64. The zero value is ready; it is
// safe for concurrent use and must not be copied.
type Codes struct {
	mu    sync.Mutex // guards codes
	codes map[[2]int]*Code
}

// Get returns the code for k data and m parity shards, building it at first use.
func (c *Codes) Get(k, m int) (*Code, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := [2]int{k, m}
	if code, ok := c.codes[key]; ok {
		return code, nil
	}
	code, err := New(k, m)
	if err != nil {
		return nil, err
	}
	if c.codes == nil {
		c.codes = make(map[[2]int]*Code)
	}
	if len(c.codes) >= codesMax {
		for old := range c.codes { // any one: a pool uses far fewer than codesMax geometries
			delete(c.codes, old)
			break
		}
	}
	c.codes[key] = code
	return code, nil
}

// K returns the number of data shards.
func (c *Code) K() int { return c.k }

// M returns the number of parity shards.
func (c *Code) M() int { return c.m }

// Encode fills shards[k:] from shards[:k]. len(shards) == k+m, equal lengths
// of at least one byte; the parity slices are overwritten.
func (c *Code) Encode(shards [][]byte) error {
	if err := c.shards.Encode(shards); err != nil {
		return fmt.Errorf("erasure: encode %d+%d: %w: %w", c.k, c.m, ErrInvalid, err)
	}
	return nil
}

// Reconstruct rebuilds missing shards in place. len(shards) == k+m; a nil or
// empty slice is missing, all others have equal lengths and at least k are
// present, else ErrTooFewShards. An empty slice with capacity is filled where
// it is; others are allocated and belong to the caller. want selects the
// shards to rebuild, len(want) == k+m; nil rebuilds all.
//
// The code works byte by byte, so equal ranges of the shards, or whole bodies
// with their columns, are rebuilt by the same call. Nothing here notices a
// wrong shard: verify each before.
func (c *Code) Reconstruct(shards [][]byte, want []bool) error {
	if err := c.checkPresent(shards); err != nil {
		return fmt.Errorf("erasure: reconstruct %d+%d: %w", c.k, c.m, err)
	}
	var err error
	switch {
	case want == nil:
		err = c.shards.Reconstruct(shards)
	case len(want) != c.k+c.m:
		err = fmt.Errorf("want has %d entries for %d shards", len(want), c.k+c.m)
	default:
		err = c.shards.ReconstructSome(shards, want)
	}
	if err != nil {
		return fmt.Errorf("erasure: reconstruct %d+%d: %w: %w", c.k, c.m, ErrInvalid, err)
	}
	return nil
}

// checkPresent reports a wrong number of slices, or fewer than k present.
func (c *Code) checkPresent(shards [][]byte) error {
	if len(shards) != c.k+c.m {
		return fmt.Errorf("%w: %d slices for %d shards", ErrInvalid, len(shards), c.k+c.m)
	}
	present := 0
	for _, shard := range shards {
		if len(shard) > 0 {
			present++
		}
	}
	if present < c.k {
		return fmt.Errorf("%w: %d present, %d needed", ErrTooFewShards, present, c.k)
	}
	return nil
}

// NewColumns draws the columns of one attempt at a stripe: k·32 bytes from
// random, then m parity columns, and the salt that belongs to them. The
// columns belong to the caller. Every attempt needs new columns.
func (c *Code) NewColumns(random io.Reader) (columns [][]byte, salt [32]byte, err error) {
	n := c.k + c.m
	buffer := make([]byte, (n+1)*ColumnBytes)
	coordinates := make([][]byte, n+1)
	for i := range coordinates {
		coordinates[i] = buffer[i*ColumnBytes : (i+1)*ColumnBytes : (i+1)*ColumnBytes]
	}
	if _, err := io.ReadFull(random, buffer[:c.k*ColumnBytes]); err != nil {
		return nil, salt, fmt.Errorf("erasure: draw columns: %w", err)
	}
	if err := c.salt.Encode(coordinates); err != nil {
		return nil, salt, fmt.Errorf("erasure: encode columns %d+%d: %w", c.k, c.m, err)
	}
	copy(salt[:], coordinates[n])
	clear(coordinates[n]) // the salt is a secret: no second copy beside the columns
	return coordinates[:n:n], salt, nil
}

// Salt computes a stripe's salt from any k of its columns. len(columns) ==
// k+m, nil for a missing one, 32 bytes each, else ErrInvalid; fewer than k
// give ErrTooFewShards. columns is left as it is. Verify each column before
// (VerifyColumn): a wrong one gives a wrong salt.
func (c *Code) Salt(columns [][]byte) ([32]byte, error) {
	var salt [32]byte
	if err := c.checkPresent(columns); err != nil {
		return salt, fmt.Errorf("erasure: salt %d+%d: %w", c.k, c.m, err)
	}
	n := c.k + c.m
	for i, column := range columns {
		if len(column) != 0 && len(column) != ColumnBytes {
			return salt, fmt.Errorf("erasure: salt: %w: column %d has %d bytes, not %d", ErrInvalid, i, len(column), ColumnBytes)
		}
	}
	coordinates := append(make([][]byte, 0, n+1), columns...)
	coordinates = append(coordinates, salt[:0])
	want := make([]bool, n+1)
	want[n] = true
	if err := c.salt.ReconstructSome(coordinates, want); err != nil {
		return salt, fmt.Errorf("erasure: salt %d+%d: %w: %w", c.k, c.m, ErrInvalid, err)
	}
	return salt, nil
}

// Build returns the n bodies of a stripe, column and coded bytes each. columns
// come from NewColumns; len(data) is k times one of ShardSizes. Every byte of
// data reaches nodes as it is: fill what no slice covers with random bytes,
// because zeros would show how full the stripe is.
//
// dst may be the result of an earlier Build whose bodies are no longer used:
// they are written over where they are large enough, else new ones are
// allocated. The bodies belong to the caller; data and columns are copied.
func (c *Code) Build(dst [][]byte, columns [][]byte, data []byte) ([][]byte, error) {
	if err := c.checkBuild(columns, data); err != nil {
		return nil, fmt.Errorf("erasure: build %d+%d: %w", c.k, c.m, err)
	}
	shardBytes := len(data) / c.k
	bodies := reuseBodies(dst, c.k+c.m, ColumnBytes+shardBytes)
	coded := make([][]byte, len(bodies))
	for i, body := range bodies {
		copy(body, columns[i])
		coded[i] = body[ColumnBytes:]
	}
	for i := range c.k {
		copy(coded[i], data[i*shardBytes:])
	}
	if err := c.Encode(coded); err != nil {
		return nil, err
	}
	return bodies, nil
}

func (c *Code) checkBuild(columns [][]byte, data []byte) error {
	var violations []string
	if len(columns) != c.k+c.m {
		violations = append(violations, fmt.Sprintf("%d columns for %d shards", len(columns), c.k+c.m))
	}
	for i, column := range columns {
		if len(column) != ColumnBytes {
			violations = append(violations, fmt.Sprintf("column %d has %d bytes, not %d", i, len(column), ColumnBytes))
		}
	}
	if len(data)%c.k != 0 {
		violations = append(violations, fmt.Sprintf("%d bytes of data do not fill %d equal shards", len(data), c.k))
	} else {
		violations = append(violations, shardViolations(len(data)/c.k)...)
	}
	return invalid("arguments", violations)
}

func reuseBodies(dst [][]byte, n, bodyBytes int) [][]byte {
	bodies := make([][]byte, 0, n)
	for _, body := range dst {
		if cap(body) >= bodyBytes && len(bodies) < n {
			bodies = append(bodies, body[:bodyBytes])
		}
	}
	if len(bodies) < n {
		bodies = append(bodies, reedsolomon.AllocAligned(n-len(bodies), bodyBytes)...)
	}
	return bodies
}
