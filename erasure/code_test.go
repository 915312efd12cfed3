package erasure_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/defs-fs/defs/erasure"
	"pgregory.net/rapid"
)

// randomness returns a seeded endless reader.
func randomness(seed byte) io.Reader { return rand.NewChaCha8([32]byte{seed, 1}) }

func randomBytes(t testing.TB, seed byte, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(randomness(seed), b); err != nil {
		t.Fatal(err)
	}
	return b
}

func newCode(t testing.TB, k, m int) *erasure.Code {
	t.Helper()
	code, err := erasure.New(k, m)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

func newColumns(t testing.TB, code *erasure.Code, seed byte) ([][]byte, [32]byte) {
	t.Helper()
	columns, salt, err := code.NewColumns(randomness(seed))
	if err != nil {
		t.Fatal(err)
	}
	return columns, salt
}

// stripe builds the bodies of a stripe of random data.
func stripe(t testing.TB, k, m, shardBytes int, seed byte) (code *erasure.Code, bodies [][]byte, salt [32]byte, data []byte) {
	t.Helper()
	code = newCode(t, k, m)
	columns, salt := newColumns(t, code, seed)
	data = randomBytes(t, seed, k*shardBytes)
	bodies, err := code.Build(nil, columns, data)
	if err != nil {
		t.Fatal(err)
	}
	return code, bodies, salt, data
}

// without returns the shards with those of the mask missing.
func without(shards [][]byte, lost uint) [][]byte {
	kept := make([][]byte, len(shards))
	for i, shard := range shards {
		if lost>>i&1 == 0 {
			kept[i] = shard
		}
	}
	return kept
}

func equalShards(t *testing.T, got, want [][]byte, label string) {
	t.Helper()
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("%s: shard %d differs", label, i)
		}
	}
}

// Every loss of up to m bodies, columns included, is rebuilt bit for bit; one
// more is refused.
func TestEveryLossPattern(t *testing.T) {
	for k := 1; k <= 5; k++ {
		for m := 1; m <= 4; m++ {
			code, bodies, salt, _ := stripe(t, k, m, 16<<10, byte(k*10+m))
			for i := range bodies { // a short range is the same code and keeps the test quick
				bodies[i] = bodies[i][:erasure.ColumnBytes+200]
			}
			for lost := range uint(1) << (k + m) {
				label := fmt.Sprintf("%d+%d without %b", k, m, lost)
				kept := without(bodies, lost)
				columns := make([][]byte, k+m)
				for i, body := range kept {
					if body != nil {
						columns[i] = body[:erasure.ColumnBytes]
					}
				}
				err := code.Reconstruct(kept, nil)
				gotSalt, saltErr := code.Salt(columns)
				if bits.OnesCount(lost) > m {
					if !errors.Is(err, erasure.ErrTooFewShards) || !errors.Is(saltErr, erasure.ErrTooFewShards) {
						t.Fatalf("%s: %v, salt: %v", label, err, saltErr)
					}
					continue
				}
				if err != nil || saltErr != nil {
					t.Fatalf("%s: %v, salt: %v", label, err, saltErr)
				}
				equalShards(t, kept, bodies, label)
				if gotSalt != salt {
					t.Fatalf("%s: salt differs", label)
				}
			}
		}
	}
}

func TestLargestCodes(t *testing.T) {
	for _, counts := range [][2]int{{100, 100}, {1, 100}, {100, 1}, {11, 3}, {20, 11}} {
		k, m := counts[0], counts[1]
		code, bodies, salt, data := stripe(t, k, m, 16<<10, byte(k))
		rng := rand.New(rand.NewPCG(uint64(k), uint64(m)))
		for range 3 {
			kept, columns := make([][]byte, k+m), make([][]byte, k+m)
			for _, i := range rng.Perm(k + m)[:k] {
				kept[i], columns[i] = bodies[i], bodies[i][:erasure.ColumnBytes]
			}
			if err := code.Reconstruct(kept, nil); err != nil {
				t.Fatal(err)
			}
			equalShards(t, kept, bodies, fmt.Sprint(counts))
			got, err := code.Salt(columns)
			if err != nil || got != salt {
				t.Fatalf("%v: salt %x, want %x, %v", counts, got, salt, err)
			}
		}
		for i := range k {
			if !bytes.Equal(bodies[i][erasure.ColumnBytes:], data[i*16<<10:(i+1)*16<<10]) {
				t.Fatalf("%v: data shard %d is not the data", counts, i)
			}
		}
	}
}

func TestReconstructRangesAndWanted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k, m := rapid.IntRange(1, 12).Draw(t, "k"), rapid.IntRange(1, 12).Draw(t, "m")
		code, err := erasure.New(k, m)
		if err != nil {
			t.Fatal(err)
		}
		size := rapid.IntRange(1, 3000).Draw(t, "size")
		shards := make([][]byte, k+m)
		source := randomness(byte(size))
		for i := range shards {
			shards[i] = make([]byte, size)
			if i < k {
				io.ReadFull(source, shards[i])
			}
		}
		if err := code.Encode(shards); err != nil {
			t.Fatal(err)
		}
		from := rapid.IntRange(0, size-1).Draw(t, "from")
		to := rapid.IntRange(from+1, size).Draw(t, "to")
		order := rapid.Permutation(indexes(k+m)).Draw(t, "order")
		kept, want := make([][]byte, k+m), make([]bool, k+m)
		for _, i := range order[:k] {
			kept[i] = shards[i][from:to]
		}
		buffer := make([]byte, 0, to-from)
		kept[order[k]] = buffer // an empty slice with room is filled in place
		for _, i := range order[k:] {
			want[i] = rapid.Bool().Draw(t, "want")
		}
		want[order[k]] = true
		if err := code.Reconstruct(kept, want); err != nil {
			t.Fatal(err)
		}
		if &kept[order[k]][0] != &buffer[:1][0] {
			t.Fatal("room given was not used")
		}
		for i := range shards {
			present := want[i] || len(kept[i]) > 0
			if present && !bytes.Equal(kept[i], shards[i][from:to]) {
				t.Fatalf("shard %d differs", i)
			}
			if !want[i] && kept[i] != nil && !isAmong(order[:k], i) {
				t.Fatalf("shard %d was rebuilt unasked", i)
			}
		}
	})
}

func indexes(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return all
}

func isAmong(list []int, x int) bool {
	for _, y := range list {
		if x == y {
			return true
		}
	}
	return false
}

// gfMul multiplies in GF(2^8) modulo x^8+x^4+x^3+x^2+1, bit by bit.
func gfMul(a, b byte) byte {
	var product byte
	for ; b != 0; b >>= 1 {
		if b&1 != 0 {
			product ^= a
		}
		carry := a & 0x80
		a <<= 1
		if carry != 0 {
			a ^= 0x1d
		}
	}
	return product
}

func gfInverse(a byte) byte {
	for b := 1; b < 256; b++ {
		if gfMul(a, byte(b)) == 1 {
			return byte(b)
		}
	}
	panic("zero has no inverse")
}

// interpolate returns P(x) of the polynomial with P(xs[i]) = ys[i] and degree
// below len(xs).
func interpolate(xs, ys []byte, x byte) byte {
	var sum byte
	for i := range xs {
		term := ys[i]
		for j := range xs {
			if j != i {
				term = gfMul(term, gfMul(x^xs[j], gfInverse(xs[i]^xs[j])))
			}
		}
		sum ^= term
	}
	return sum
}

// The format says: coordinate i of byte b is P(i) for the polynomial through
// the data; the salt is P(n). Checked against an independent computation.
func TestCodeIsInterpolation(t *testing.T) {
	for _, counts := range [][2]int{{1, 1}, {2, 1}, {4, 2}, {10, 4}, {7, 12}, {100, 100}} {
		k, m := counts[0], counts[1]
		columns, salt := newColumns(t, newCode(t, k, m), 3)
		xs, ys := make([]byte, k), make([]byte, k)
		for b := range 4 {
			for i := range k {
				xs[i], ys[i] = byte(i), columns[i][b]
			}
			for i := k; i < k+m; i += 1 + m/5 {
				if got := interpolate(xs, ys, byte(i)); got != columns[i][b] {
					t.Fatalf("%v: coordinate %d, byte %d: %02x, want %02x", counts, i, b, columns[i][b], got)
				}
			}
			if got := interpolate(xs, ys, byte(k+m)); got != salt[b] {
				t.Fatalf("%v: salt byte %d: %02x, want %02x", counts, b, salt[b], got)
			}
		}
	}
}

// k-1 columns are consistent with every value of every byte of the salt, each
// with exactly one remaining column: they tell nothing about it.
func TestFewerColumnsTellNothing(t *testing.T) {
	const k, m = 4, 2
	columns, _ := newColumns(t, newCode(t, k, m), 9)
	known := []byte{0, 3, 5} // k-1 of the coordinates
	ys := make([]byte, 0, k)
	for _, x := range known {
		ys = append(ys, columns[x][0])
	}
	seen := map[byte]bool{}
	for salt := range 256 {
		seen[interpolate(append(known[:3:3], k+m), append(ys[:3:3], byte(salt)), 1)] = true
	}
	if len(seen) != 256 {
		t.Fatalf("the 256 salts give only %d values of a missing column", len(seen))
	}
}

func TestColumnsAreFresh(t *testing.T) {
	code := newCode(t, 4, 2)
	source := randomness(5)
	first, firstSalt, err := code.NewColumns(source)
	if err != nil {
		t.Fatal(err)
	}
	second, secondSalt, err := code.NewColumns(source)
	if err != nil {
		t.Fatal(err)
	}
	if firstSalt == secondSalt || bytes.Equal(first[0], second[0]) || bytes.Equal(first[5], second[5]) {
		t.Fatal("two attempts share a column or the salt")
	}
	if _, _, err := code.NewColumns(bytes.NewReader(make([]byte, 4*32-1))); err == nil {
		t.Fatal("a short source of randomness went unnoticed")
	}
}

// Salts with leading zero bytes come back whole.
func TestSaltKeepsLeadingZeros(t *testing.T) {
	code := newCode(t, 3, 2)
	zeros := 0
	for seed := range 2000 {
		source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 7})
		columns, salt, err := code.NewColumns(source)
		if err != nil {
			t.Fatal(err)
		}
		if salt[0] != 0 {
			continue
		}
		zeros++
		got, err := code.Salt(without(columns, 0b00101))
		if err != nil || got != salt {
			t.Fatalf("salt %x, want %x, %v", got, salt, err)
		}
	}
	if zeros == 0 {
		t.Fatal("no salt began with a zero byte")
	}
}

func TestOneDataShardHasNoThreshold(t *testing.T) {
	columns, salt := newColumns(t, newCode(t, 1, 3), 4)
	for i, column := range columns {
		if !bytes.Equal(column, salt[:]) {
			t.Fatalf("column %d differs from the salt", i)
		}
	}
}

func TestBuildReusesBodies(t *testing.T) {
	code := newCode(t, 4, 2)
	columns, _ := newColumns(t, code, 1)
	large, err := code.Build(nil, columns, randomBytes(t, 1, 4*64<<10))
	if err != nil {
		t.Fatal(err)
	}
	data := randomBytes(t, 2, 4*16<<10)
	fresh, err := code.Build(nil, columns, data)
	if err != nil {
		t.Fatal(err)
	}
	reused, err := code.Build(large, columns, data)
	if err != nil {
		t.Fatal(err)
	}
	equalShards(t, reused, fresh, "reused")
	if &reused[0][0] != &large[0][0] {
		t.Fatal("large enough bodies were not reused")
	}
	again, err := code.Build([][]byte{make([]byte, 5)}, columns, data)
	if err != nil {
		t.Fatal(err)
	}
	equalShards(t, again, fresh, "small bodies offered")
}

func TestBadArguments(t *testing.T) {
	for _, counts := range [][2]int{{0, 1}, {1, 0}, {101, 1}, {1, 101}, {-1, -1}} {
		if _, err := erasure.New(counts[0], counts[1]); !errors.Is(err, erasure.ErrInvalid) {
			t.Errorf("New%v: %v", counts, err)
		}
	}
	code := newCode(t, 2, 1)
	columns, _ := newColumns(t, code, 1)
	data := make([]byte, 2*16<<10)
	short := [][]byte{columns[0], columns[1][:31], columns[2]}
	shards := func(sizes ...int) [][]byte {
		out := make([][]byte, len(sizes))
		for i, size := range sizes {
			out[i] = make([]byte, size)
		}
		return out
	}
	build := func(columns [][]byte, data []byte) error {
		_, err := code.Build(nil, columns, data)
		return err
	}
	salt := func(columns [][]byte) error {
		_, err := code.Salt(columns)
		return err
	}
	for name, err := range map[string]error{
		"build: too few columns":   build(columns[:2], data),
		"build: short column":      build(short, data),
		"build: no data":           build(columns, nil),
		"build: odd data":          build(columns, data[1:]),
		"build: no size class":     build(columns, data[:2*16<<9]),
		"salt: too many columns":   salt(append(columns[:3:3], columns[0])),
		"salt: short column":       salt(short),
		"encode: unequal shards":   code.Encode(shards(5, 6, 5)),
		"encode: too few shards":   code.Encode(shards(5, 5)),
		"encode: empty shards":     code.Encode(shards(0, 0, 0)),
		"reconstruct: one more":    code.Reconstruct(shards(5, 5, 5, 5), nil),
		"reconstruct: unequal":     code.Reconstruct(shards(5, 6, 0), nil),
		"reconstruct: short want":  code.Reconstruct(shards(5, 5, 0), []bool{true}),
		"reconstruct: want for k":  code.Reconstruct(shards(5, 0, 5), []bool{false, true}),
		"reconstruct: none at all": code.Reconstruct(nil, nil),
	} {
		if !errors.Is(err, erasure.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCodesIsBoundedAndConcurrent(t *testing.T) {
	var codes erasure.Codes
	first, err := codes.Get(4, 2)
	if err != nil {
		t.Fatal(err)
	}
	if second, _ := codes.Get(4, 2); second != first {
		t.Fatal("the code was built twice")
	}
	if _, err := codes.Get(0, 2); !errors.Is(err, erasure.ErrInvalid) {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for k := 1; k <= 40; k++ {
				code, err := codes.Get(k, 1+worker)
				if err != nil || code.K() != k || code.M() != 1+worker {
					t.Errorf("Get(%d, %d): %v", k, 1+worker, err)
				}
			}
		})
	}
	wg.Wait()
}
