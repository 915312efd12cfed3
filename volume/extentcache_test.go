package volume

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/defs-fs/defs/metastore"
)

// The cache must never differ from the metastore, whatever changes extents, and must stay bounded.
func TestExtentCacheAgreesWithMetastore(t *testing.T) {
	f := newFS(t)
	rng := rand.New(rand.NewPCG(1, 2))
	inos := []Ino{f.file(RootIno, "a"), f.file(RootIno, "b")}
	const fileBytes = 4 * windowBytes
	pick := func(n int64) int64 { return rng.Int64N(n) }
	list := func(extents func(Ino, uint64, uint64, func(metastore.Extent) bool) error, ino Ino, from, to uint64) (all []metastore.Extent) {
		f.ok(extents(ino, from, to, func(e metastore.Extent) bool { all = append(all, e); return true }))
		return all
	}
	for i := range 4000 {
		ino := inos[pick(2)]
		switch pick(20) {
		case 0:
			_, err := f.SetAttr(f.ctx, ino, SetAttr{Valid: SetSize, Size: uint64(pick(fileBytes))})
			f.ok(err)
		case 1:
			f.ok(f.Fallocate(f.ctx, ino, FallocPunchHole|FallocKeepSize, pick(fileBytes), 1+pick(2*windowBytes), WriteFlags{}))
		case 2:
			_, err := f.CopyRange(f.ctx, inos[0], pick(fileBytes), inos[1], pick(fileBytes), 1+pick(windowBytes), WriteFlags{})
			f.ok(err)
		case 3:
			_, err := f.Write(f.ctx, ino, pick(fileBytes), make([]byte, 1+pick(2*windowBytes)), WriteFlags{})
			f.ok(err)
		default:
			_, err := f.Write(f.ctx, ino, pick(fileBytes), make([]byte, 1+pick(8<<10)), WriteFlags{})
			f.ok(err)
		}
		ino = inos[pick(2)]
		from := uint64(pick(fileBytes))
		to := from + 1 + uint64(pick(windowReadMax))
		want, got := list(f.db.Extents, ino, from, to), list(f.extents.overlapping, ino, from, to)
		if !slices.Equal(got, want) {
			t.Fatalf("after %d changes, inode %d from %d to %d:\n%+v\nthe metastore has\n%+v", i+1, ino, from, to, got, want)
		}
	}
	held := 0
	for _, w := range f.extents.windows.Values() {
		held += w.cost()
		if len(w.extents) > windowExtentsMax {
			t.Errorf("a window of %d extents is kept", len(w.extents))
		}
	}
	if held != f.extents.held || held > extentCacheMax {
		t.Errorf("%d are held, counted as %d, of %d at most", held, f.extents.held, extentCacheMax)
	}
}
