package chunker

import (
	"fmt"
	"slices"

	"github.com/klauspost/compress/zstd"
)

const (
	probeSampleBytes = 4 << 10
	probeSamples     = 4
	// A chunk is stored compressed when that saves at least one part in
	// savedPart; less is not worth opening a frame for at every read.
	savedPart = 16
)

// Compressor packs chunks with zstd (RFC 8878). It holds the tables and
// buffers of its encoders and decoders, is safe for concurrent use, and needs
// no closing: it starts no goroutine.
type Compressor struct {
	encoder *zstd.Encoder
	decoder *zstd.Decoder
}

// NewCompressor returns a Compressor that lets parallel goroutines work at
// once and makes others wait.
func NewCompressor(parallel int) (*Compressor, error) {
	encoder, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(parallel),
		zstd.WithEncoderCRC(false), // the seal detects every change
		// Text in base64 or hex has no repeats, only few symbols.
		zstd.WithAllLitEntropyCompression(true),
		zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("chunker: new compressor: %w", err)
	}
	decoder, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(parallel),
		zstd.WithDecodeAllCapLimit(true)) // never more than the caller's room
	if err != nil {
		return nil, fmt.Errorf("chunker: new compressor: %w", err)
	}
	return &Compressor{encoder: encoder, decoder: decoder}, nil
}

// Probe tells whether compressing the chunk is likely to pay. It packs up to
// 4 samples of 4 KiB, spread over the chunk.
func (c *Compressor) Probe(chunk []byte) bool {
	if len(chunk) <= probeSamples*probeSampleBytes {
		return len(chunk) >= 128 // shorter ones never repay the frame
	}
	sample := make([]byte, 0, probeSamples*probeSampleBytes)
	step := (len(chunk) - probeSampleBytes) / (probeSamples - 1)
	for i := range probeSamples {
		sample = append(sample, chunk[i*step:i*step+probeSampleBytes]...)
	}
	return pays(len(c.encoder.EncodeAll(sample, nil)), len(sample))
}

// Compress appends the packed chunk to dst, or reports false and returns dst
// as it was when packing does not pay.
func (c *Compressor) Compress(dst, chunk []byte) ([]byte, bool) {
	if !c.Probe(chunk) {
		return dst, false
	}
	packed := c.encoder.EncodeAll(chunk, dst)
	if !pays(len(packed)-len(dst), len(chunk)) {
		return dst, false
	}
	return packed, true
}

func pays(packedBytes, plainBytes int) bool {
	return packedBytes <= plainBytes-plainBytes/savedPart
}

// Decompress appends the sizeBytes bytes that packed was made from to dst. It
// fails when packed holds more or less than that, and stops unpacking at most
// a few blocks of 128 KiB later.
func (c *Compressor) Decompress(dst, packed []byte, sizeBytes int) ([]byte, error) {
	if sizeBytes < 0 {
		return nil, fmt.Errorf("chunker: decompress: size of %d bytes", sizeBytes)
	}
	start := len(dst)
	dst = slices.Grow(dst, sizeBytes)
	plain, err := c.decoder.DecodeAll(packed, dst[:start:start+sizeBytes])
	if err != nil {
		return nil, fmt.Errorf("chunker: decompress %d to %d bytes: %w", len(packed), sizeBytes, err)
	}
	if len(plain)-start != sizeBytes {
		return nil, fmt.Errorf("chunker: decompress %d bytes: got %d, want %d", len(packed), len(plain)-start, sizeBytes)
	}
	return plain, nil
}
