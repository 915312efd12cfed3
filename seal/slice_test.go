package seal

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"github.com/defs-fs/defs/erasure"
)

var (
	testKey  = [32]byte{1}
	testSalt = [32]byte{2}
)

func testContext(length int) SliceContext {
	return SliceContext{Volume: [16]byte{3}, Stripe: erasure.StripeID{4}, Slice: 5, Epoch: 6, Length: uint32(length), Purpose: PurposeContent}
}

func noise(seed uint64, n int) []byte {
	out := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(out)
	return out
}

// sizes are 0, 1 and the neighbourhood of every segment boundary.
func sizes() *rapid.Generator[int] {
	return rapid.Custom(func(t *rapid.T) int {
		return max(0, rapid.IntRange(0, 3).Draw(t, "segments")*SegmentBytes+rapid.IntRange(-2, 2).Draw(t, "more"))
	})
}

func mustSeal(t testing.TB, c SliceContext, plain []byte) []byte {
	t.Helper()
	sealed, err := SealSlice(nil, testKey, testSalt, c, plain)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func TestSliceRoundTrips(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := sizes().Draw(rt, "size")
		plain := noise(uint64(n), n)
		c := testContext(n)
		prefix := []byte("before")
		sealed, err := SealSlice(bytes.Clone(prefix), testKey, testSalt, c, plain)
		if err != nil {
			rt.Fatal(err)
		}
		if !bytes.HasPrefix(sealed, prefix) || len(sealed) != len(prefix)+SealedBytes(n) {
			rt.Fatalf("%d bytes sealed to %d, want %d", n, len(sealed)-len(prefix), SealedBytes(n))
		}
		sealed = sealed[len(prefix):]
		opened, err := OpenSlice(bytes.Clone(prefix), testKey, testSalt, c, sealed)
		if err != nil || !bytes.Equal(opened, append(prefix, plain...)) {
			rt.Fatalf("other bytes came back: %v", err)
		}

		off := rapid.IntRange(0, n).Draw(rt, "off")
		length := rapid.IntRange(0, n-off).Draw(rt, "length")
		part, err := OpenSliceRange(bytes.Clone(prefix), testKey, testSalt, c, sealed, off, length)
		if err != nil || !bytes.Equal(part, append(prefix, plain[off:off+length]...)) {
			rt.Fatalf("range %d+%d: other bytes came back: %v", off, length, err)
		}

		first, sealedOff, sealedLen := SegmentRange(n, off, length)
		if sealedOff+sealedLen > len(sealed) || (sealedLen == 0) != (length == 0) {
			rt.Fatalf("range %d+%d is sealed %d+%d of %d", off, length, sealedOff, sealedLen, len(sealed))
		}
		if length > 0 {
			whole, err := OpenSegments(nil, testKey, testSalt, c, first, sealed[sealedOff:sealedOff+sealedLen], sealed[:CommitmentBytes])
			if err != nil || !bytes.Equal(whole[off-first*SegmentBytes:][:length], plain[off:off+length]) {
				rt.Fatalf("segments of %d+%d: other bytes came back: %v", off, length, err)
			}
		}
	})
}

// TestSegmentsOpenInAnyOrder: each where it belongs, and nowhere else.
func TestSegmentsOpenInAnyOrder(t *testing.T) {
	plain := noise(3, 3*SegmentBytes)
	plain = append(plain, 1, 2, 3)
	c := testContext(len(plain))
	sealed := mustSeal(t, c, plain)
	opener, err := NewSliceOpener(testKey, testSalt, c, sealed[:CommitmentBytes])
	if err != nil {
		t.Fatal(err)
	}
	for i := 3; i >= 0; i-- {
		_, off, n := SegmentRange(len(plain), i*SegmentBytes, 1)
		got, err := opener.Open([]byte("x"), i, sealed[off:off+n])
		if want := plain[i*SegmentBytes : min((i+1)*SegmentBytes, len(plain))]; err != nil || !bytes.Equal(got[1:], want) {
			t.Errorf("segment %d: %v", i, err)
		}
		for _, other := range []int{i - 1, i + 1} {
			if _, err := opener.Open(nil, other, sealed[off:off+n]); !errors.Is(err, ErrNotAuthentic) {
				t.Errorf("segment %d as %d: %v", i, other, err)
			}
		}
		if _, err := opener.Open(nil, i, sealed[off:off+n-1]); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("segment %d cut off: %v", i, err)
		}
	}
	if _, err := NewSliceOpener(testKey, testSalt, c, sealed[1:][:CommitmentBytes]); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another commitment: %v", err)
	}
}

func TestSliceRefusesWrongContext(t *testing.T) {
	plain := noise(1, SegmentBytes+100)
	c := testContext(len(plain))
	sealed := mustSeal(t, c, plain)
	for name, change := range map[string]func(*SliceContext){
		"volume":  func(c *SliceContext) { c.Volume[15]++ },
		"stripe":  func(c *SliceContext) { c.Stripe[0]++ },
		"slice":   func(c *SliceContext) { c.Slice++ },
		"epoch":   func(c *SliceContext) { c.Epoch-- },
		"length":  func(c *SliceContext) { c.Length-- },
		"purpose": func(c *SliceContext) { c.Purpose = PurposeLog },
	} {
		wrong := c
		change(&wrong)
		if _, err := OpenSlice(nil, testKey, testSalt, wrong, sealed); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("another %s: %v", name, err)
		}
		if _, err := OpenSegments(nil, testKey, testSalt, wrong, 0, sealed[CommitmentBytes:], sealed[:CommitmentBytes]); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("segments, another %s: %v", name, err)
		}
	}
	if _, err := OpenSlice(nil, [32]byte{9}, testSalt, c, sealed); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another key: %v", err)
	}
	if _, err := OpenSlice(nil, testKey, [32]byte{9}, c, sealed); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another salt: %v", err)
	}
	if _, err := SealSlice(nil, testKey, testSalt, c, plain[1:]); !errors.Is(err, ErrInvalid) {
		t.Errorf("sealed another length than the context says: %v", err)
	}
}

func TestSliceRefusesEveryChange(t *testing.T) {
	for _, n := range []int{0, 5} {
		c := testContext(n)
		sealed := mustSeal(t, c, noise(2, n))
		for i := range sealed {
			changed := bytes.Clone(sealed)
			changed[i] ^= 0x80
			if _, err := OpenSlice(nil, testKey, testSalt, c, changed); !errors.Is(err, ErrNotAuthentic) {
				t.Errorf("%d bytes: byte %d changed: %v", n, i, err)
			}
			if _, err := OpenSlice(nil, testKey, testSalt, c, sealed[:i]); !errors.Is(err, ErrNotAuthentic) {
				t.Errorf("%d bytes: cut to %d: %v", n, i, err)
			}
		}
		if _, err := OpenSlice(nil, testKey, testSalt, c, append(sealed, 0)); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("%d bytes: one more: %v", n, err)
		}
	}
}

// STREAM: segments stay where they are, and the last one is the last.
func TestSegmentsCannotMove(t *testing.T) {
	plain := make([]byte, 3*SegmentBytes) // equal segments
	c := testContext(len(plain))
	sealed := mustSeal(t, c, plain)
	body, commitment := sealed[CommitmentBytes:], sealed[:CommitmentBytes]
	open := func(first int, part []byte) error {
		_, err := OpenSegments(nil, testKey, testSalt, c, first, part, commitment)
		return err
	}
	if err := open(1, body[sealedSegmentBytes:]); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"moved forward":     open(1, body[:sealedSegmentBytes]),
		"moved back":        open(0, body[sealedSegmentBytes:2*sealedSegmentBytes]),
		"last as middle":    open(1, body[2*sealedSegmentBytes:]),
		"middle as last":    open(2, body[sealedSegmentBytes:2*sealedSegmentBytes]),
		"beyond the end":    open(3, body[:sealedSegmentBytes]),
		"before the start":  open(-1, body[:sealedSegmentBytes]),
		"more than the end": open(2, append(bytes.Clone(body[2*sealedSegmentBytes:]), body[:sealedSegmentBytes]...)),
		"half a segment":    open(0, body[:100]),
	} {
		if !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("%s: %v", name, err)
		}
	}
	short := testContext(2 * SegmentBytes)
	if _, err := OpenSegments(nil, testKey, testSalt, short, 0, body[:2*sealedSegmentBytes], commitment); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("cut at a segment boundary: %v", err)
	}
}

// AES-GCM alone would open bytes under a key they were not sealed with, if
// somebody made them so; the commitment is what refuses.
func TestCommitmentIsCompared(t *testing.T) {
	c := testContext(100)
	sealed := mustSeal(t, c, noise(3, 100))
	for _, commitment := range [][]byte{nil, sealed[:31], sealed[1:33], make([]byte, 32)} {
		if _, err := OpenSegments(nil, testKey, testSalt, c, 0, sealed[CommitmentBytes:], commitment); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("commitment of %d other bytes: %v", len(commitment), err)
		}
	}
}

// No two slices share a key, a commitment or a byte of ciphertext by design.
func TestSliceKeysAreSingleUse(t *testing.T) {
	seen := map[[32]byte]string{}
	for slice := range uint32(50) {
		for salt := range byte(3) {
			c := testContext(0)
			c.Slice = slice
			sealed, err := SealSlice(nil, testKey, [32]byte{salt}, c, nil)
			if err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprintf("slice %d, salt %d", slice, salt)
			if twin, ok := seen[[32]byte(sealed)]; ok {
				t.Fatalf("%s has the key of %s", name, twin)
			}
			seen[[32]byte(sealed)] = name
		}
	}
}

func TestOpenSliceRangeBounds(t *testing.T) {
	c := testContext(1000)
	sealed := mustSeal(t, c, noise(4, 1000))
	for _, r := range [][2]int{{-1, 1}, {0, -1}, {0, 1001}, {1000, 1}, {1001, 0}, {1, int(^uint(0) >> 1)}} {
		if _, err := OpenSliceRange(nil, testKey, testSalt, c, sealed, r[0], r[1]); !errors.Is(err, ErrInvalid) {
			t.Errorf("range %d+%d: %v", r[0], r[1], err)
		}
	}
	if _, err := OpenSliceRange(nil, testKey, testSalt, c, sealed[1:], 0, 1); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("a byte is missing: %v", err)
	}
}

func TestOpenSliceUsesTheRoomItIsGiven(t *testing.T) {
	plain := noise(5, 1<<20)
	c := testContext(len(plain))
	sealed := mustSeal(t, c, plain)
	room := make([]byte, 0, len(plain))
	opened, err := OpenSlice(room, testKey, testSalt, c, sealed)
	if err != nil || &opened[0] != &room[:1][0] {
		t.Fatalf("opened elsewhere: %v", err)
	}
	part, err := OpenSliceRange(room, testKey, testSalt, c, sealed, 3*SegmentBytes+7, 100)
	if err != nil || &part[0] != &room[:1][0] || !bytes.Equal(part, plain[3*SegmentBytes+7:][:100]) {
		t.Fatalf("range opened elsewhere: %v", err)
	}
}

func FuzzOpenSlice(f *testing.F) {
	c := testContext(10)
	sealed := mustSeal(f, c, noise(6, 10))
	f.Add(sealed, uint32(10), 0)
	f.Add([]byte{}, uint32(0), -1)
	f.Fuzz(func(t *testing.T, data []byte, length uint32, first int) {
		c := c
		c.Length = length
		if _, err := OpenSlice(nil, testKey, testSalt, c, data); err == nil && !bytes.Equal(data, sealed) {
			t.Fatal("a forged slice was opened")
		}
		_, _ = OpenSliceRange(nil, testKey, testSalt, c, data, first, 5)
		if len(data) >= CommitmentBytes {
			opened, err := OpenSegments(nil, testKey, testSalt, c, first, data[CommitmentBytes:], data[:CommitmentBytes])
			if err == nil && len(opened) > 0 && !bytes.Equal(data, sealed) {
				t.Fatal("a forged segment was opened")
			}
		}
	})
}

func BenchmarkSealSlice(b *testing.B) {
	for _, n := range []int{4 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n>>10, "K"), func(b *testing.B) {
			plain := noise(1, n)
			buffer := make([]byte, 0, SealedBytes(n))
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := SealSlice(buffer, testKey, testSalt, testContext(n), plain); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkOpenSlice(b *testing.B) {
	for _, n := range []int{4 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n>>10, "K"), func(b *testing.B) {
			sealed := mustSeal(b, testContext(n), noise(1, n))
			buffer := make([]byte, 0, n+SegmentBytes)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := OpenSlice(buffer, testKey, testSalt, testContext(n), sealed); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkOpenSliceRange4K(b *testing.B) {
	const n = 1 << 20
	sealed := mustSeal(b, testContext(n), noise(1, n))
	buffer := make([]byte, 0, 2*SegmentBytes)
	b.SetBytes(4 << 10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := OpenSliceRange(buffer, testKey, testSalt, testContext(n), sealed, 300<<10, 4<<10); err != nil {
			b.Fatal(err)
		}
	}
}
