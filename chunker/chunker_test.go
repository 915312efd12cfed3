package chunker

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	"github.com/zeebo/blake3"
	"pgregory.net/rapid"
)

// small are bounds that make many chunks of little data.
var small = Params{MinBytes: 256, AvgBytes: 1024, MaxBytes: 4096}

// noise returns n pseudo-random bytes that depend on seed alone.
func noise(seed uint64, n int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	out := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(out)
	return out
}

func mustNew(t testing.TB, key [32]byte, p Params) *Cutter {
	t.Helper()
	c, err := New(key, p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func chunksOf(t testing.TB, c *Cutter, r io.Reader) [][]byte {
	t.Helper()
	var chunks [][]byte
	if err := c.Cut(r, func(chunk []byte) error {
		chunks = append(chunks, bytes.Clone(chunk))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return chunks
}

// content draws bytes of several natures: random, few values, all the same.
func content(t *rapid.T, sizeMax int) []byte {
	data := noise(rapid.Uint64().Draw(t, "seed"), rapid.IntRange(0, sizeMax).Draw(t, "size"))
	mask := rapid.SampledFrom([]byte{0xff, 0x03, 0x00}).Draw(t, "mask")
	for i := range data {
		data[i] &= mask
	}
	return data
}

func TestChunksReassembleWithinBounds(t *testing.T) {
	c := mustNew(t, [32]byte{1}, small)
	rapid.Check(t, func(rt *rapid.T) {
		data := content(rt, 40_000)
		chunks := chunksOf(t, c, bytes.NewReader(data))
		if got := bytes.Join(chunks, nil); !bytes.Equal(got, data) {
			rt.Fatalf("%d bytes reassemble to %d others", len(data), len(got))
		}
		for i, chunk := range chunks {
			if len(chunk) > small.MaxBytes || len(chunk) == 0 || len(chunk) < small.MinBytes && i < len(chunks)-1 {
				rt.Fatalf("chunk %d of %d has %d bytes", i, len(chunks), len(chunk))
			}
		}
		if len(data) <= small.MinBytes && len(data) > 0 && len(chunks) != 1 {
			rt.Fatalf("%d bytes gave %d chunks", len(data), len(chunks))
		}
	})
}

// However the bytes arrive, the cuts are the same.
func TestCutsDoNotDependOnReads(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		c := mustNew(t, [32]byte{byte(rapid.IntRange(0, 3).Draw(rt, "key"))}, small)
		data := content(rt, 30_000)
		want := chunksOf(t, c, bytes.NewReader(data))

		for _, r := range []io.Reader{
			iotest.HalfReader(bytes.NewReader(data)),
			iotest.DataErrReader(bytes.NewReader(data)),
			io.MultiReader(bytes.NewReader(data[:len(data)/3]), bytes.NewReader(data[len(data)/3:])),
		} {
			if got := chunksOf(t, c, r); !equalChunks(got, want) {
				rt.Fatalf("%T gives other cuts", r)
			}
		}

		var got [][]byte
		for rest := data; len(rest) > 0; {
			// At least MaxBytes, or all there is.
			window := rest[:min(len(rest), small.MaxBytes+rapid.IntRange(0, 5000).Draw(rt, "window"))]
			n := c.Next(window, len(window) == len(rest))
			if n == 0 {
				rt.Fatalf("no chunk in %d bytes", len(window))
			}
			got, rest = append(got, rest[:n]), rest[n:]
		}
		if !equalChunks(got, want) {
			rt.Fatal("Next gives other cuts than Cut")
		}
	})
}

func equalChunks(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

// The fast scan finds the first offset that the definition names.
func TestNextMatchesDefinition(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := Params{MinBytes: rapid.IntRange(64, 70).Draw(rt, "min")}
		p.AvgBytes = p.MinBytes + rapid.IntRange(1, 70).Draw(rt, "avg")
		p.MaxBytes = p.AvgBytes + rapid.IntRange(1, 400).Draw(rt, "max")
		c := mustNew(t, [32]byte{7}, p)
		data := content(rt, 2*p.MaxBytes)
		if got, want := c.Next(data, true), definition(c, data); got != want {
			rt.Fatalf("cut of %d bytes after %d, defined to be after %d", len(data), got, want)
		}
	})
}

// definition is the sentence of FORMAT.md as code: cut after the first byte,
// at MinBytes+1 or later, at which the hash of the 64 bytes before is below
// the limit.
func definition(c *Cutter, data []byte) int {
	p := c.Params()
	if len(data) <= p.MinBytes {
		return len(data)
	}
	end := min(len(data), p.MaxBytes)
	for n := p.MinBytes + 1; n <= end; n++ {
		var hash uint64
		for i, b := range data[n-gearBytes : n] {
			hash += c.gear[b] << (gearBytes - 1 - i)
		}
		limit := c.hard
		if n > p.AvgBytes {
			limit = c.easy
		}
		if hash < limit {
			return n
		}
	}
	return end
}

func TestNextAsksForMore(t *testing.T) {
	c := mustNew(t, [32]byte{1}, small)
	data := noise(1, small.MaxBytes)
	if n := c.Next(data[:small.MaxBytes-1], false); n != 0 {
		t.Fatalf("chunk of %d bytes told without all that decide it", n)
	}
	if n := c.Next(data, false); n == 0 {
		t.Fatal("no chunk in the greatest length of one")
	}
	if n := c.Next(nil, true); n != 0 {
		t.Fatalf("chunk of %d bytes in nothing", n)
	}
}

func TestKeyDecidesCuts(t *testing.T) {
	data := noise(2, 1<<20)
	a := chunksOf(t, mustNew(t, [32]byte{1}, small), bytes.NewReader(data))
	b := chunksOf(t, mustNew(t, [32]byte{2}, small), bytes.NewReader(data))
	ends := map[int]bool{}
	at := 0
	for _, chunk := range a {
		at += len(chunk)
		ends[at] = true
	}
	common := 0
	at = 0
	for _, chunk := range b {
		at += len(chunk)
		if ends[at] {
			common++
		}
	}
	if common > len(b)/20 {
		t.Fatalf("%d of %d cuts are the same under another key", common, len(b))
	}
}

func TestLengthsGatherAroundAverage(t *testing.T) {
	c := mustNew(t, [32]byte{3}, DefaultParams())
	data := noise(3, 64<<20)
	lengths := 0
	atMax := 0
	chunks := 0
	for rest := data; len(rest) > 0; chunks++ {
		n := c.Next(rest, true)
		lengths += n
		if n == c.Params().MaxBytes {
			atMax++
		}
		rest = rest[n:]
	}
	mean := float64(lengths) / float64(chunks) / float64(c.Params().AvgBytes)
	t.Logf("%d chunks, mean %.2f of AvgBytes, %d at the maximum", chunks, mean, atMax)
	if mean < 1.1 || mean > 1.6 || atMax > chunks/50 {
		t.Fatalf("mean %.2f of AvgBytes, %d of %d chunks at the maximum", mean, atMax, chunks)
	}
}

// One percent of a document of 100 MiB changes in at most ten places, each
// overwritten, grown or shrunk: at least 95 percent of its bytes are in chunks
// that the old version had.
func TestEditsStayLocal(t *testing.T) {
	const size = 100 << 20
	c := mustNew(t, [32]byte{4}, DefaultParams())
	document := noise(4, size)
	known := map[[32]byte]bool{}
	cutAll(c, document, func(chunk []byte) { known[blake3.Sum256(chunk)] = true })

	for round, regions := range []int{1, 10} {
		random := rand.New(rand.NewPCG(5, uint64(round)))
		var edited []byte
		part := size / regions
		change := size / 100 / regions
		for r := range regions {
			old := document[r*part : (r+1)*part]
			at := random.IntN(part - change)
			edited = append(edited, old[:at]...)
			switch kind := r % 3; kind {
			case 0: // overwritten
				edited = append(edited, noise(random.Uint64(), change)...)
				edited = append(edited, old[at+change:]...)
			case 1: // grown
				edited = append(edited, noise(random.Uint64(), change)...)
				edited = append(edited, old[at:]...)
			default: // shrunk
				edited = append(edited, old[at+change:]...)
			}
		}
		fresh := 0
		cutAll(c, edited, func(chunk []byte) {
			if !known[blake3.Sum256(chunk)] {
				fresh += len(chunk)
			}
		})
		// The changed bytes themselves, and on each side of a region up to a
		// few chunks until the cuts fall together again.
		share := float64(fresh) / float64(len(edited))
		t.Logf("%d regions: %.1f %% of the bytes are new", regions, 100*share)
		if bound := 0.02 + float64(regions)*0.003; share > bound {
			t.Errorf("%d regions: %.1f %% of the bytes are new", regions, 100*share)
		}
	}
}

func cutAll(c *Cutter, data []byte, emit func([]byte)) {
	for len(data) > 0 {
		n := c.Next(data, true)
		emit(data[:n])
		data = data[n:]
	}
}

// A prefix inserted into any document moves cuts only until they meet again.
func TestCutsMeetAgain(t *testing.T) {
	c := mustNew(t, [32]byte{5}, small)
	rapid.Check(t, func(rt *rapid.T) {
		data := noise(rapid.Uint64().Draw(rt, "seed"), 200_000)
		at := rapid.IntRange(0, 100_000).Draw(rt, "at")
		insert := noise(rapid.Uint64().Draw(rt, "insert"), rapid.IntRange(1, 3000).Draw(rt, "bytes"))
		edited := bytes.Join([][]byte{data[:at], insert, data[at:]}, nil)
		known := map[[32]byte]bool{}
		cutAll(c, data, func(chunk []byte) { known[blake3.Sum256(chunk)] = true })
		fresh := 0
		cutAll(c, edited, func(chunk []byte) {
			if !known[blake3.Sum256(chunk)] {
				fresh += len(chunk)
			}
		})
		if fresh > len(insert)+20*small.MaxBytes {
			rt.Fatalf("%d bytes inserted, %d in new chunks", len(insert), fresh)
		}
	})
}

func TestCutReportsErrors(t *testing.T) {
	c := mustNew(t, [32]byte{1}, small)
	broken := errors.New("broken")
	err := c.Cut(io.MultiReader(bytes.NewReader(noise(1, 10_000)), iotest.ErrReader(broken)), func([]byte) error { return nil })
	if !errors.Is(err, broken) {
		t.Fatalf("read error lost: %v", err)
	}
	calls := 0
	err = c.Cut(bytes.NewReader(noise(1, 10_000)), func([]byte) error { calls++; return broken })
	if !errors.Is(err, broken) || calls != 1 {
		t.Fatalf("emit error lost after %d calls: %v", calls, err)
	}
}

func TestParamsValidate(t *testing.T) {
	if err := DefaultParams().Validate(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []Params{
		{}, {MinBytes: 63, AvgBytes: 100, MaxBytes: 200}, {MinBytes: 100, AvgBytes: 100, MaxBytes: 200},
		{MinBytes: 100, AvgBytes: 200, MaxBytes: 200}, {MinBytes: 100, AvgBytes: 200, MaxBytes: 1<<30 + 1}, {MinBytes: -1, AvgBytes: 1, MaxBytes: 2},
	} {
		if _, err := New([32]byte{}, p); err == nil {
			t.Errorf("%+v accepted", p)
		}
	}
}

func TestHashNeedsKey(t *testing.T) {
	chunk := noise(1, 100_000)
	a, b := Hash([32]byte{1}, chunk), Hash([32]byte{2}, chunk)
	if a == b || a == blake3.Sum256(chunk) {
		t.Fatal("the key makes no difference")
	}
	if a != Hash([32]byte{1}, bytes.Clone(chunk)) {
		t.Fatal("same chunk, same key, other name")
	}
}

func TestFixedCut(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		size := rapid.IntRange(1, 5000).Draw(rt, "size")
		off := rapid.Int64Range(0, 1<<40).Draw(rt, "off")
		length := rapid.Int64Range(-1, 100_000).Draw(rt, "length")
		length = min(length, int64(size)*50)
		at, last := off, Range{}
		for r := range FixedCut(off, length, size) {
			if r.Off != at || r.Len < 1 || r.Len > size {
				rt.Fatalf("range %+v at %d", r, at)
			}
			if r.Off != off && r.Off%int64(size) != 0 {
				rt.Fatalf("range %+v begins unaligned", r)
			}
			at, last = at+int64(r.Len), r
		}
		if at != off+max(0, length) {
			rt.Fatalf("covers up to %d, want %d (last %+v)", at, off+length, last)
		}
	})
	for range FixedCut(0, 1<<60, 1) {
		break // stops when asked
	}
}

func BenchmarkNext(b *testing.B) {
	data := noise(1, 32<<20)
	c := mustNew(b, [32]byte{1}, DefaultParams())
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		cutAll(c, data, func([]byte) {})
	}
}

func BenchmarkCutReader(b *testing.B) {
	data := noise(1, 64<<20)
	c := mustNew(b, [32]byte{1}, DefaultParams())
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if err := c.Cut(bytes.NewReader(data), func([]byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCutSmallFile(b *testing.B) {
	data := noise(1, 4<<10)
	c := mustNew(b, [32]byte{1}, DefaultParams())
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Cut(bytes.NewReader(data), func([]byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHash(b *testing.B) {
	data := noise(1, 1<<20)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		Hash([32]byte{1}, data)
	}
}
