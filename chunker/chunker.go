// Package chunker decides where the content of a file is cut into slices, and
// whether a slice is compressed.
//
// Files written front to back are cut where their content says so (FastCDC,
// Xia et al., USENIX ATC 2016 and IEEE TPDS 2020), so that a new version of a
// file has most chunks in common with the old one; files rewritten in place
// are cut at fixed, aligned offsets. The cuts depend on a secret key of the
// volume, and chunk lengths never leave the machine. FORMAT.md, "Chunker".
//
//	cutter, err := chunker.New(bundle.Dedup, chunker.DefaultParams())
//	err = cutter.Cut(file, func(chunk []byte) error {
//		name := chunker.Hash(bundle.Dedup, chunk) // same name, same bytes
//		…
//	})
//
// The package is pure. It starts no goroutine, and a stream of any length is
// cut in a buffer of twice Params.MaxBytes. There is nothing to lose in a
// crash.
package chunker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/blake3"
)

// Params are the bounds of chunk lengths, in bytes.
type Params struct {
	MinBytes int // no chunk is shorter, but the last of a stream
	AvgBytes int // aimed at
	MaxBytes int // no chunk is longer
}

// DefaultParams suit slices of at most 4 MiB.
func DefaultParams() Params {
	return Params{MinBytes: 256 << 10, AvgBytes: 1 << 20, MaxBytes: 4 << 20}
}

// gearBytes is how many bytes back the rolling hash sees: each shift moves a
// byte's share one bit up and finally out of the 64 bits.
const gearBytes = 64

// Validate names everything that is wrong with p.
func (p Params) Validate() error {
	var errs []error
	if p.MinBytes < gearBytes {
		errs = append(errs, fmt.Errorf("minimum of %d bytes is below %d", p.MinBytes, gearBytes))
	}
	if p.AvgBytes <= p.MinBytes {
		errs = append(errs, fmt.Errorf("average of %d bytes is not above the minimum of %d", p.AvgBytes, p.MinBytes))
	}
	if p.MaxBytes <= p.AvgBytes {
		errs = append(errs, fmt.Errorf("maximum of %d bytes is not above the average of %d", p.MaxBytes, p.AvgBytes))
	}
	if p.MaxBytes > 1<<30 {
		errs = append(errs, fmt.Errorf("maximum of %d bytes is above 1 GiB", p.MaxBytes))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("chunker: parameters: %w", err)
	}
	return nil
}

// Cutter finds content-defined cuts. It does not change after New and may be
// used by many goroutines at once.
type Cutter struct {
	params Params
	gear   [256]uint64 // share of each byte value in the hash
	gear2  [256]uint64 // the same, shifted by one
	hard   uint64      // a cut before AvgBytes needs a hash below this
	easy   uint64      // a cut after AvgBytes needs a hash below this
}

// New returns a Cutter whose cuts nobody can predict without the key.
func New(key [32]byte, p Params) (*Cutter, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	c := &Cutter{params: p}
	h := blake3.NewDeriveKey("defs chunker gear v1")
	_, _ = h.Write(key[:])
	var table [256 * 8]byte
	if _, err := h.Digest().Read(table[:]); err != nil {
		return nil, fmt.Errorf("chunker: derive gear table: %w", err)
	}
	for i := range c.gear {
		c.gear[i] = binary.LittleEndian.Uint64(table[8*i:])
		c.gear2[i] = c.gear[i] << 1
	}
	// Normalised chunking, level 2: cuts are 4 times rarer than one in
	// AvgBytes before the average and 4 times more frequent after it, which
	// gathers the lengths around it.
	perByte := ^uint64(0) / uint64(p.AvgBytes)
	c.hard, c.easy = perByte/4, perByte*4
	return c, nil
}

// Params returns what New was given.
func (c *Cutter) Params() Params { return c.params }

// Next returns the length of the chunk that data begins with, or 0 when it
// takes more data to tell: when data is shorter than MaxBytes and final, which
// says that the stream ends with data, is false. The answer depends on the
// bytes of the chunk alone. len(data) == 0 gives 0.
func (c *Cutter) Next(data []byte, final bool) int {
	p := &c.params
	if len(data) < p.MaxBytes && !final {
		return 0
	}
	if len(data) <= p.MinBytes {
		return len(data)
	}
	end := min(len(data), p.MaxBytes)
	// The hash at a cut depends on the last gearBytes bytes only, so the
	// minimum is skipped but for those.
	at := p.MinBytes - gearBytes
	var hash uint64
	for ; at < p.MinBytes; at++ {
		hash = hash<<1 + c.gear[data[at]]
	}
	if avg := min(end, p.AvgBytes); at < avg {
		var cut int
		if cut, hash = c.scan(data[:avg], at, hash, c.hard); cut > 0 {
			return cut
		}
		at = avg
	}
	if cut, _ := c.scan(data[:end], at, hash, c.easy); cut > 0 {
		return cut
	}
	return end
}

// scan rolls the hash over data[at:] and returns the offset after the first
// byte at which it is below limit, or 0 and the hash at the end. Comparing
// looks at the top bits, in which most bytes have a share. Two bytes are
// taken at a time: the second hash does not wait for the first.
func (c *Cutter) scan(data []byte, at int, hash, limit uint64) (int, uint64) {
	for ; at+1 < len(data); at += 2 {
		a, b := data[at], data[at+1]
		first := hash<<1 + c.gear[a]
		hash = hash<<2 + (c.gear2[a] + c.gear[b])
		if first < limit {
			return at + 1, first
		}
		if hash < limit {
			return at + 2, hash
		}
	}
	if at < len(data) {
		if hash = hash<<1 + c.gear[data[at]]; hash < limit {
			return at + 1, hash
		}
	}
	return 0, hash
}

// Cut reads r to its end and calls emit with each chunk in turn. A chunk is
// valid until emit returns. An empty stream has no chunks. An error of r or
// emit ends the work and is returned wrapped.
func (c *Cutter) Cut(r io.Reader, emit func(chunk []byte) error) error {
	buffer := make([]byte, 2*c.params.MaxBytes)
	from, to, final := 0, 0, false
	for {
		n := c.Next(buffer[from:to], final)
		if n > 0 {
			if err := emit(buffer[from : from+n]); err != nil {
				return fmt.Errorf("chunker: emit chunk of %d bytes: %w", n, err)
			}
			from += n
			continue
		}
		if final {
			return nil
		}
		// Less than MaxBytes are left: move them to the front and fill up.
		to = copy(buffer, buffer[from:to])
		from = 0
		got, err := io.ReadFull(r, buffer[to:])
		to += got
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			final = true
		case err != nil:
			return fmt.Errorf("chunker: read: %w", err)
		}
	}
}

// Hash names a chunk for deduplication within the volume: BLAKE3 keyed with
// the epoch's dedup key, so that the name says nothing without the key.
func Hash(dedupKey [32]byte, chunk []byte) [32]byte {
	h, err := blake3.NewKeyed(dedupKey[:])
	if err != nil { // only for keys that are not 32 bytes long
		panic(fmt.Sprintf("chunker: keyed hash: %v", err))
	}
	_, _ = h.Write(chunk)
	return [32]byte(h.Sum(nil))
}
