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
	"sync"

	"github.com/zeebo/blake3"
)

// Params are the bounds of chunk lengths, in bytes.
type Params struct {
	MinBytes int // no chunk is shorter, but the last of a stream
	AvgBytes int // lengths gather around it; their mean is a little more
	MaxBytes int // no chunk is longer
}

// DefaultParams give chunks of 85 KiB on average on random data. A change
// makes about one and a half chunks new, so larger ones would store more at
// each small change; smaller ones would make the metadata of large files
// longer and the seal of each slice dearer.
func DefaultParams() Params {
	return Params{MinBytes: 32 << 10, AvgBytes: 64 << 10, MaxBytes: 256 << 10}
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

// Cutter finds content-defined cuts. Its cuts do not change after New, and it
// may be used by many goroutines at once.
type Cutter struct {
	params  Params
	gear    [256]uint64 // share of each byte value in the hash
	hard    uint64      // a cut before AvgBytes needs a hash below this
	easy    uint64      // a cut after AvgBytes needs a hash below this
	buffers sync.Pool   // of *[]byte, 2*MaxBytes long; for Cut, or each small file would cost a new one
}

// New returns a Cutter whose cuts nobody can predict without the key.
func New(key [32]byte, p Params) (*Cutter, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	c := &Cutter{params: p}
	c.buffers.New = func() any {
		buffer := make([]byte, 2*p.MaxBytes)
		return &buffer
	}
	h := blake3.NewDeriveKey("defs chunker gear v1")
	_, _ = h.Write(key[:])
	var table [256 * 8]byte
	if _, err := h.Digest().Read(table[:]); err != nil {
		return nil, fmt.Errorf("chunker: derive gear table: %w", err)
	}
	for i := range c.gear {
		c.gear[i] = binary.LittleEndian.Uint64(table[8*i:])
	}
	// Normalised chunking: cuts are 2 times rarer than one in AvgBytes before
	// AvgBytes and 2 times more frequent after it, which gathers the lengths
	// around it. The 4 times of the paper gather more, but then the cuts of
	// two versions of a file take longer to meet again after a change.
	perByte := ^uint64(0) / uint64(p.AvgBytes)
	c.hard, c.easy = perByte/2, perByte*2
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
// looks at the top bits, in which most bytes have a share. The loop is written
// out so that a byte costs a load, an addition, a shift and a comparison.
func (c *Cutter) scan(data []byte, at int, hash, limit uint64) (int, uint64) {
	gear := &c.gear
	rest := data[at:]
	for len(rest) >= 4 {
		b := (*[4]byte)(rest)
		if hash = hash<<1 + gear[b[0]]; hash < limit {
			return len(data) - len(rest) + 1, hash
		}
		if hash = hash<<1 + gear[b[1]]; hash < limit {
			return len(data) - len(rest) + 2, hash
		}
		if hash = hash<<1 + gear[b[2]]; hash < limit {
			return len(data) - len(rest) + 3, hash
		}
		if hash = hash<<1 + gear[b[3]]; hash < limit {
			return len(data) - len(rest) + 4, hash
		}
		rest = rest[4:]
	}
	for i, b := range rest {
		if hash = hash<<1 + gear[b]; hash < limit {
			return len(data) - len(rest) + i + 1, hash
		}
	}
	return 0, hash
}

// Cut reads r to its end and calls emit with each chunk in turn. A chunk is
// valid until emit returns. An empty stream has no chunks. An error of r or
// emit ends the work and is returned wrapped.
func (c *Cutter) Cut(r io.Reader, emit func(chunk []byte) error) error {
	pooled := c.buffers.Get().(*[]byte)
	defer c.buffers.Put(pooled)
	buffer := *pooled
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
