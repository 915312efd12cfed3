package chunker

import (
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/zeebo/blake3"
)

// The worked example of FORMAT.md, "Chunker".
func TestFormatExample(t *testing.T) {
	var key [32]byte
	for i := range key {
		key[i] = byte(i)
	}
	data := make([]byte, 4096)
	h := blake3.New()
	_, _ = h.WriteString("defs chunker example")
	if _, err := h.Digest().Read(data); err != nil {
		t.Fatal(err)
	}

	c, err := New(key, Params{MinBytes: 256, AvgBytes: 512, MaxBytes: 4096})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.gear[:3], []uint64{0xef369795e6e301cd, 0x4447bc8f1e21e9fa, 0x0c852479a463bb60}; !slices.Equal(got, want) {
		t.Errorf("gear table begins %#x, want %#x", got, want)
	}
	var lengths []int
	cutAll(c, data, func(chunk []byte) { lengths = append(lengths, len(chunk)) })
	if want := []int{1232, 537, 312, 574, 715, 608, 118}; !slices.Equal(lengths, want) {
		t.Errorf("chunk lengths %d, want %d", lengths, want)
	}
	name := Hash(key, data[:lengths[0]])
	if got, want := hex.EncodeToString(name[:]), "3fea33d390aac924ac7e841c232410e6de03cef201c77d5f0454cd2e9dca40b6"; got != want {
		t.Errorf("name of the first chunk %s, want %s", got, want)
	}

	packed, err := hex.DecodeString("28b52ffd00006d0000284465465320015405032b4004")
	if err != nil {
		t.Fatal(err)
	}
	plain, err := mustCompressor(t).Decompress(nil, packed, 200)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Repeat("DeFS ", 40); string(plain) != want {
		t.Errorf("unpacked %q, want %q", plain, want)
	}
}
