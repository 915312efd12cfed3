package chunker

import (
	"bytes"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"
)

func mustCompressor(t testing.TB) *Compressor {
	t.Helper()
	c, err := NewCompressor(2)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// text returns n bytes that pack well.
func text(seed uint64, n int) []byte {
	out := noise(seed, n)
	for i := range out {
		out[i] = "etaoin shrdlu\n"[out[i]%14]
	}
	return out
}

func TestCompressRoundTrips(t *testing.T) {
	c := mustCompressor(t)
	rapid.Check(t, func(rt *rapid.T) {
		chunk := content(rt, 200_000)
		if rapid.Bool().Draw(rt, "text") {
			chunk = text(uint64(len(chunk)), len(chunk))
		}
		prefix := noise(1, rapid.IntRange(0, 300).Draw(rt, "prefix"))
		packed, ok := c.Compress(bytes.Clone(prefix), chunk)
		if !bytes.HasPrefix(packed, prefix) {
			rt.Fatal("what was in dst is gone")
		}
		if !ok {
			if len(packed) != len(prefix) {
				rt.Fatal("dst changed although packing does not pay")
			}
			return
		}
		if !pays(len(packed)-len(prefix), len(chunk)) {
			rt.Fatalf("%d bytes packed to %d", len(chunk), len(packed)-len(prefix))
		}
		plain, err := c.Decompress(bytes.Clone(prefix), packed[len(prefix):], len(chunk))
		if err != nil {
			rt.Fatal(err)
		}
		if !bytes.Equal(plain[:len(prefix)], prefix) || !bytes.Equal(plain[len(prefix):], chunk) {
			rt.Fatal("other bytes came back")
		}
	})
}

func TestProbe(t *testing.T) {
	c := mustCompressor(t)
	if c.Probe(noise(1, 1<<20)) {
		t.Error("noise is said to pack")
	}
	if !c.Probe(text(1, 1<<20)) {
		t.Error("text is said not to pack")
	}
	if !c.Probe(make([]byte, 4<<20)) {
		t.Error("zeros are said not to pack")
	}
	if c.Probe(nil) || c.Probe(make([]byte, 20)) {
		t.Error("a few bytes are said to repay a frame")
	}
}

func TestDecompressIsBounded(t *testing.T) {
	c := mustCompressor(t)
	const bombBytes = 256 << 20
	packed, ok := c.Compress(nil, make([]byte, 4<<20))
	if !ok {
		t.Fatal("zeros do not pack")
	}
	for _, size := range []int{-1, 0, 1, 4<<20 - 1, 4<<20 + 1} {
		if _, err := c.Decompress(nil, packed, size); err == nil {
			t.Errorf("4 MiB accepted as %d bytes", size)
		}
	}
	if _, err := c.Decompress(nil, packed[:len(packed)-1], 4<<20); err == nil {
		t.Error("a cut frame was accepted")
	}

	// A frame without a length that unpacks to far more than it says.
	var bomb bytes.Buffer
	w, err := zstd.NewWriter(&bomb, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	for range bombBytes / len(zeros) {
		if _, err := w.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := c.Decompress(nil, bomb.Bytes(), 1<<20); err == nil {
		t.Fatal("256 MiB accepted as 1 MiB")
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 16<<20 {
		t.Errorf("unpacking a bomb of 256 MiB into 1 MiB allocates %d bytes", got)
	}
}

func FuzzDecompress(f *testing.F) {
	c := mustCompressor(f)
	packed, _ := c.Compress(nil, text(1, 5000))
	f.Add(packed, 5000)
	f.Add([]byte{}, 0)
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd}, 100)
	f.Fuzz(func(t *testing.T, packed []byte, size int) {
		size = min(size, 1<<20)
		plain, err := c.Decompress(nil, packed, size)
		if err == nil && len(plain) != size {
			t.Fatalf("%d bytes came back, want %d", len(plain), size)
		}
	})
}

func BenchmarkCompress(b *testing.B) {
	c := mustCompressor(b)
	for _, input := range []struct {
		name  string
		chunk []byte
	}{{"text", text(1, 1<<20)}, {"noise", noise(1, 1<<20)}} {
		b.Run(input.name, func(b *testing.B) {
			buffer := make([]byte, 0, 2<<20)
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			for b.Loop() {
				c.Compress(buffer, input.chunk)
			}
		})
	}
}

func BenchmarkDecompress(b *testing.B) {
	c := mustCompressor(b)
	packed, _ := c.Compress(nil, text(1, 1<<20))
	buffer := make([]byte, 0, 1<<20)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Decompress(buffer, packed, 1<<20); err != nil {
			b.Fatal(err)
		}
	}
}
