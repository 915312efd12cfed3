package erasure_test

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/defs-fs/defs/erasure"
	"lukechampine.com/blake3"
	"lukechampine.com/blake3/bao"
	"pgregory.net/rapid"
)

const baoGroup = 4 // 2^4 chunks of 1 KiB

// shard is one shard as a node stores it.
type shard struct {
	body, coded, outboard  []byte
	root, columnHash, tree [32]byte
}

func newShard(t testing.TB, shardBytes int) shard {
	t.Helper()
	var s shard
	s.body = randomBytes(t, byte(shardBytes>>14), erasure.ColumnBytes+shardBytes)
	s.coded = s.body[erasure.ColumnBytes:]
	var err error
	if s.outboard, err = erasure.Outboard(s.coded); err != nil {
		t.Fatal(err)
	}
	s.root, s.columnHash, s.tree = erasure.Root(s.body), erasure.ColumnHash(s.body[:erasure.ColumnBytes]), erasure.CodedRoot(s.coded)
	return s
}

func (s shard) prove(off, n int) ([]byte, error) {
	from, to := erasure.GroupRange(off, n)
	return erasure.Prove(s.coded[from:to], s.outboard, off, n)
}

// The tree is BLAKE3's own and the proofs are Bao's: checked against the
// library's implementation of both.
func TestTreeIsBao(t *testing.T) {
	for _, shardBytes := range erasure.ShardSizes()[:5] {
		s := newShard(t, shardBytes)
		if s.tree != blake3.Sum256(s.coded) {
			t.Fatalf("%d bytes: coded root is not the BLAKE3 hash", shardBytes)
		}
		outboard, root := bao.EncodeBuf(s.coded, baoGroup, true)
		if root != s.tree || !bytes.Equal(outboard, s.outboard[32:]) || !bytes.Equal(s.tree[:], s.outboard[:32]) {
			t.Fatalf("%d bytes: outboard differs from Bao's", shardBytes)
		}
		if len(s.outboard) != erasure.OutboardBytes(shardBytes) {
			t.Fatalf("%d bytes: outboard of %d", shardBytes, len(s.outboard))
		}
		if tree, err := erasure.OutboardRoot(s.outboard); err != nil || tree != s.tree {
			t.Fatalf("OutboardRoot: %x, %v", tree, err)
		}
	}
	body := []byte("domain")
	if erasure.CodedRoot(body) != blake3.Sum256(body) {
		t.Fatal("coded root of another length is not the BLAKE3 hash")
	}
	s := newShard(t, 16<<10)
	column, tree := s.columnHash, s.tree
	want := blake3.Sum256(append(append([]byte("defs shard root v1"), column[:]...), tree[:]...))
	if s.root != want {
		t.Fatal("root is not the hash of domain, column hash and coded root")
	}
}

func TestRangesVerify(t *testing.T) {
	shards := map[int]shard{}
	for _, shardBytes := range erasure.ShardSizes()[:4] {
		shards[shardBytes] = newShard(t, shardBytes)
	}
	check := func(t *rapid.T, s shard, off, n int) {
		proof, err := s.prove(off, n)
		if err != nil {
			t.Fatal(err)
		}
		if size, err := erasure.ProofBytes(len(s.coded), off, n); err != nil || size != len(proof) {
			t.Fatalf("ProofBytes %d, %v; proof of %d", size, err, len(proof))
		}
		dst := make([]byte, n)
		if err := erasure.VerifyRange(s.root, s.columnHash, len(s.coded), off, n, proof, dst); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dst, s.coded[off:off+n]) {
			t.Fatal("verified bytes differ")
		}
		from, to := erasure.GroupRange(off, n)
		if got, ok := bao.VerifySlice(proof[32:], baoGroup, uint64(from), uint64(to-from), s.tree); !ok || !bytes.Equal(got, s.coded[from:to]) {
			t.Fatal("not a Bao slice")
		}
		if bytes.Contains(proof, s.body[:erasure.ColumnBytes]) {
			t.Fatal("a data proof reveals the column")
		}
		flip := rapid.IntRange(0, len(proof)-1).Draw(t, "flip")
		proof[flip] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if err := erasure.VerifyRange(s.root, s.columnHash, len(s.coded), off, n, proof, dst); !errors.Is(err, erasure.ErrCorrupt) {
			t.Fatalf("flip at %d of %d: %v", flip, len(proof), err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		s := shards[rapid.SampledFrom(erasure.ShardSizes()[:4]).Draw(t, "shard")]
		off := rapid.IntRange(0, len(s.coded)-1).Draw(t, "off")
		n := rapid.IntRange(1, len(s.coded)-off).Draw(t, "n")
		check(t, s, off, n)
		end := len(s.coded) // ranges at the edges of the shard and of groups
		check(t, s, end-1, 1)
		check(t, s, max(0, end-erasure.GroupBytes-1), 2)
		check(t, s, 0, 1)
		check(t, s, 0, end)
	})
}

func TestProofsOfOthersAreRefused(t *testing.T) {
	s, other := newShard(t, 64<<10), newShard(t, 256<<10)
	verify := func(s shard, shardBytes, off, n int, proof []byte) error {
		return erasure.VerifyRange(s.root, s.columnHash, shardBytes, off, n, proof, make([]byte, max(n, 0)))
	}
	proof, err := s.prove(16<<10, 100)
	if err != nil {
		t.Fatal(err)
	}
	last, err := s.prove(48<<10, 100)
	if err != nil {
		t.Fatal(err)
	}
	otherProof, err := other.prove(16<<10, 100)
	if err != nil {
		t.Fatal(err)
	}
	wrongColumn := s
	wrongColumn.columnHash[0] ^= 1
	for name, err := range map[string]error{
		"another shard's proof":    verify(s, 64<<10, 16<<10, 100, otherProof),
		"another range's proof":    verify(s, 64<<10, 16<<10, 100, last),
		"same groups, truncated":   verify(s, 64<<10, 16<<10, 100, proof[:len(proof)-1]),
		"same groups, one more":    verify(s, 64<<10, 16<<10, 100, append(proof[:len(proof):len(proof)], 0)),
		"no proof":                 verify(s, 64<<10, 16<<10, 100, nil),
		"another column":           verify(wrongColumn, 64<<10, 16<<10, 100, proof),
		"another size":             verify(s, 256<<10, 16<<10, 100, proof),
		"outboard of nothing":      onlyError(erasure.OutboardRoot(nil)),
		"outboard cut short":       onlyError(erasure.OutboardRoot(s.outboard[:100])),
		"outboard of another":      onlyError(erasure.OutboardRoot(append(s.outboard[:40:40], other.outboard[40:]...))),
		"body of another":          erasure.VerifyBody(s.root, other.body),
		"body cut to nothing":      erasure.VerifyBody(s.root, nil),
		"coded bytes of another":   erasure.VerifyCoded(s.root, s.columnHash, other.coded),
		"column of another":        erasure.VerifyColumn(s.root, other.body[:32], s.tree),
		"column with another rest": erasure.VerifyColumn(s.root, s.body[:32], other.tree),
		"short column":             erasure.VerifyColumn(s.root, s.body[:31], s.tree),
	} {
		if !errors.Is(err, erasure.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, err := range map[string]error{
		"empty range":     verify(s, 64<<10, 0, 0, proof),
		"negative length": verify(s, 64<<10, 0, -1, proof),
		"negative offset": verify(s, 64<<10, -1, 2, proof),
		"past the end":    verify(s, 64<<10, 64<<10-1, 2, proof),
		"at the end":      verify(s, 64<<10, 64<<10, 1, proof),
		"overflow":        onlyError(erasure.ProofBytes(64<<10, math.MaxInt, math.MaxInt)),
		"odd shard":       onlyError(erasure.ProofBytes(64<<10+1, 0, 1)),
		"room too small":  erasure.VerifyRange(s.root, s.columnHash, 64<<10, 16<<10, 100, proof, make([]byte, 99)),
		"odd outboard":    onlyError(erasure.Outboard(s.coded[1:])),
		"missing groups":  onlyError(erasure.Prove(s.coded[:16<<10], s.outboard, 0, 16<<10+1)),
		"prove nothing":   onlyError(erasure.Prove(nil, s.outboard, 5, 0)),
	} {
		if !errors.Is(err, erasure.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := erasure.VerifyBody(s.root, s.body); err != nil {
		t.Error(err)
	}
	if err := erasure.VerifyCoded(s.root, s.columnHash, s.coded); err != nil {
		t.Error(err)
	}
	if err := erasure.VerifyColumn(s.root, s.body[:32], s.tree); err != nil {
		t.Error(err)
	}
}

func onlyError[T any](_ T, err error) error { return err }

// Flipping any byte of a body changes its root; the CRC notices it too.
func TestRootCoversTheBody(t *testing.T) {
	s := newShard(t, 16<<10)
	crc := erasure.CRC(s.body)
	for i := 0; i < len(s.body); i += 1 + i/40 {
		s.body[i] ^= 0x80
		if erasure.Root(s.body) == s.root || erasure.CRC(s.body) == crc {
			t.Fatalf("flip at %d went unnoticed", i)
		}
		s.body[i] ^= 0x80
	}
	if got := erasure.CRC([]byte("123456789")); got != 0xe3069283 { // RFC 3720, B.4
		t.Fatalf("CRC32C check value %08x", got)
	}
}

// TestWorkedExample decodes the example of the format document.
func TestWorkedExample(t *testing.T) {
	want := readExample(t)
	code := newCode(t, 2, 1)
	sequence := make([]byte, 2*erasure.ColumnBytes)
	for i := range sequence {
		sequence[i] = byte(i)
	}
	columns, salt, err := code.NewColumns(bytes.NewReader(sequence))
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 2*64<<10)
	for i := range data {
		data[i] = byte(i % 251)
	}
	bodies, err := code.Build(nil, columns, data)
	if err != nil {
		t.Fatal(err)
	}
	parity := bodies[2]
	outboard, err := erasure.Outboard(parity[erasure.ColumnBytes:])
	if err != nil {
		t.Fatal(err)
	}
	proof, err := erasure.Prove(parity[erasure.ColumnBytes+48<<10:], outboard, 65000, 100)
	if err != nil {
		t.Fatal(err)
	}
	root := erasure.Root(parity)
	codedRoot, columnHash := erasure.CodedRoot(parity[erasure.ColumnBytes:]), erasure.ColumnHash(parity[:erasure.ColumnBytes])
	crc := erasure.CRC(parity)
	for name, got := range map[string][]byte{
		"column 2":         columns[2],
		"salt":             salt[:],
		"coded 2, first 8": parity[erasure.ColumnBytes : erasure.ColumnBytes+8],
		"crc32c 2":         {byte(crc >> 24), byte(crc >> 16), byte(crc >> 8), byte(crc)},
		"column hash 2":    columnHash[:],
		"coded root 2":     codedRoot[:],
		"root 2":           root[:],
		"outboard 2":       outboard,
		"proof head":       proof[:len(proof)-erasure.GroupBytes],
	} {
		if !bytes.Equal(got, want[name]) {
			t.Errorf("%s: %x, the example says %x", name, got, want[name])
		}
	}
	// The reader's side, from the example's bytes alone.
	exampleProof := append(bytes.Clone(want["proof head"]), parity[erasure.ColumnBytes+48<<10:]...)
	dst := make([]byte, 100)
	err = erasure.VerifyRange([32]byte(want["root 2"]), [32]byte(want["column hash 2"]), 64<<10, 65000, 100, exampleProof, dst)
	if err != nil {
		t.Fatal(err)
	}
	got, err := code.Salt([][]byte{nil, sequence[32:], want["column 2"]})
	if err != nil || !bytes.Equal(got[:], want["salt"]) {
		t.Fatalf("salt from columns 1 and 2: %x, %v", got, err)
	}
}

// readExample reads lines "name = hex", a value going on in lines that begin
// with a space.
func readExample(t *testing.T) map[string][]byte {
	t.Helper()
	file, err := os.Open("testdata/example.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	values := map[string][]byte{}
	name := ""
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		text := lines.Text()
		if before, after, ok := strings.Cut(text, "="); ok {
			name, text = strings.TrimSpace(before), after
		}
		value, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		values[name] = append(values[name], value...)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return values
}

func FuzzVerifyRange(f *testing.F) {
	s := newShard(f, 64<<10)
	for _, r := range [][2]int{{0, 1}, {16<<10 - 1, 2}, {48 << 10, 16 << 10}, {0, 64 << 10}, {5, 0}} {
		proof, _ := s.prove(r[0], r[1])
		f.Add(r[0], r[1], proof)
	}
	f.Fuzz(func(t *testing.T, off, n int, proof []byte) {
		dst := make([]byte, max(0, min(n, 64<<10)))
		err := erasure.VerifyRange(s.root, s.columnHash, 64<<10, off, n, proof, dst)
		switch {
		case err == nil:
			if !bytes.Equal(dst, s.coded[off:off+n]) {
				t.Fatalf("accepted wrong bytes for %d+%d", off, n)
			}
		case !errors.Is(err, erasure.ErrCorrupt) && !errors.Is(err, erasure.ErrInvalid):
			t.Fatal(err)
		}
	})
}

// A stored outboard may come back damaged: shapes are checked, hashes are the
// reader's.
func FuzzProve(f *testing.F) {
	s := newShard(f, 64<<10)
	f.Add(s.outboard, 0, 64<<10)
	f.Add(s.outboard[:40], 5, 1)
	f.Fuzz(func(t *testing.T, outboard []byte, off, n int) {
		if n < 0 || n > 64<<10 || off < 0 || off > 64<<10-n {
			off, n = 0, 1
		}
		from, to := erasure.GroupRange(off, n)
		proof, err := erasure.Prove(s.coded[from:to], outboard, off, n)
		if err != nil {
			if !errors.Is(err, erasure.ErrCorrupt) && !errors.Is(err, erasure.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		dst := make([]byte, n)
		err = erasure.VerifyRange(s.root, s.columnHash, 64<<10, off, n, proof, dst)
		if err == nil && !bytes.Equal(dst, s.coded[off:off+n]) {
			t.Fatal("accepted wrong bytes")
		}
	})
}
