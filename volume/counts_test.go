package volume

import (
	"math/rand/v2"
	"testing"
	"unsafe"
)

func TestCountTable(t *testing.T) {
	var c countTable
	want := make(map[Ino]uint64)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200_000 {
		ino := Ino(rng.Uint64N(300))
		if rng.IntN(2) == 0 {
			ino |= 1 << 48 // of another device
		}
		n := []uint64{0, 1, 2, 254, 255, 256, 1 << 40}[rng.IntN(7)]
		c.set(ino, n)
		want[ino] = n
		other := Ino(rng.Uint64N(300))
		if got := c.get(other); got != want[other] {
			t.Fatalf("count of %d is %d, want %d", other, got, want[other])
		}
	}
	for ino := range want {
		c.set(ino, 0)
	}
	if len(c.pages)+len(c.large) > 0 {
		t.Errorf("%d pages and %d large counts of nothing", len(c.pages), len(c.large))
	}
}

// What the kernel knows of a million inodes costs few bytes each.
func TestCountTableIsSmall(t *testing.T) {
	var c countTable
	const count = 1_000_000
	for ino := range Ino(count) {
		c.set(ino, 1)
	}
	const entry = 2 * 16 // of the map of pages, with the room that it keeps
	if bytes := float64(len(c.pages)*(entry+int(unsafe.Sizeof(countPage{})))) / count; bytes > 2 || len(c.large) > 0 {
		t.Errorf("%.1f bytes an inode, %d large counts", bytes, len(c.large))
	}
}
