package stripe

import (
	"slices"
	"testing"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/seal"
)

// TestGoldenLayout is the example of FORMAT.md, "Stripe layout".
func TestGoldenLayout(t *testing.T) {
	g := erasure.Geometry{K: 3, M: 1, ShardBytes: 16 << 10}
	var list []pending
	for _, n := range []int{4000, 11_000, 2000, 15_000} {
		if got := seal.SealedBytes(n); got != n+48 {
			t.Errorf("%d bytes sealed are %d", n, got)
		}
		list = append(list, pending{stored: make([]byte, n)})
	}
	offsets, used := layout(g, list)
	if want := []int{0, 4048, 16_384, 18_432}; !slices.Equal(offsets, want) || used != 33_480 {
		t.Errorf("offsets %v, %d bytes used; want %v, 33480", offsets, used, want)
	}
}
