package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/defs-fs/defs/internal/pooltest"
)

// TestSmallNodeFillsUp has one node too small for what comes: it refuses, and
// the others take everything.
func TestSmallNodeFillsUp(t *testing.T) {
	sized := pooltest.NewSized(t, append(slices.Repeat([]uint64{32 << 20}, 6), 4<<20)...)
	pool := &testPool{sized, sized.Net, sized.IDs}
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	// Placement is random, and rarely takes the small one.
	for i := 0; sized.Stores[sized.IDs[6]].Usage().Shards == 0; i++ {
		if i == 200 {
			t.Fatal("200 stripes, and none has a shard on the small node")
		}
		v.put(t, fmt.Sprint("first-", i), random(64<<10))
		wait(t, v.Volume)
	}
	data := random(24 << 20)
	v.put(t, "file", data)
	wait(t, v.Volume)
	u := sized.Stores[sized.IDs[6]].Usage()
	if u.UsedBytes > u.CapacityBytes || u.Shards == 0 {
		t.Errorf("the small node: %+v", u)
	}
	if s, err := v.Status(t.Context()); err != nil || s.Degraded != 0 || s.SurvivesNodes < 2 {
		t.Errorf("status %+v, %v", s, err)
	}
	if _, err := v.DropCache(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	wantContent(t, v.Volume, "file", data)
}

// TestSmallPools stores a little in pools of very small nodes.
func TestSmallPools(t *testing.T) {
	for _, capacity := range []uint64{2 << 20, 4 << 20, 64 << 20} {
		t.Run(fmt.Sprint(capacity>>20, " MiB"), func(t *testing.T) {
			sized := pooltest.NewSized(t, slices.Repeat([]uint64{capacity}, 6)...)
			pool := &testPool{sized, sized.Net, sized.IDs}
			v := newTestVolume(t, pool, "rs-ratio:4+2")
			data := random(1 << 20)
			v.put(t, "file", data)
			wait(t, v.Volume)
			if s, err := v.Status(t.Context()); err != nil || s.SurvivesNodes < 2 {
				t.Errorf("status %+v, %v", s, err)
			}
			if err := v.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
			r := recoverVolume(t, pool, v.words)
			defer r.Close(context.Background())
			wantContent(t, r.Volume, "file", data)
		})
	}
}

// TestFullPool writes more than a pool takes. What is stored stays readable,
// the problem is named, and a deletion is published all the same: the volume
// is durable again without what did not fit.
func TestFullPool(t *testing.T) {
	const capacity = 8 << 20
	sized := pooltest.NewSized(t, slices.Repeat([]uint64{capacity}, 6)...)
	pool := &testPool{sized, sized.Net, sized.IDs}
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	small := random(1 << 20)
	v.put(t, "small", small)
	wait(t, v.Volume)
	v.put(t, "large", random(50<<20))
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	if err := v.WaitDurable(ctx, nil); err == nil {
		t.Fatal("50 MiB are durable in 32")
	}
	s, err := v.Status(t.Context())
	if err != nil || s.Problem == "" || s.Durable >= 50<<20 {
		t.Errorf("status %+v, %v", s, err)
	}
	t.Logf("problem: %s", s.Problem)
	for id, store := range sized.Stores {
		if u := store.Usage(); u.UsedBytes > u.CapacityBytes {
			t.Errorf("%s holds %d of %d bytes", id, u.UsedBytes, u.CapacityBytes)
		}
	}
	if err := v.Unlink(t.Context(), RootIno, "large"); err != nil {
		t.Fatal(err)
	}
	wait(t, v.Volume)
	if err := v.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	r := recoverVolume(t, pool, v.words)
	defer r.Close(context.Background())
	wantContent(t, r.Volume, "small", small)
	if _, err := r.Lookup(t.Context(), RootIno, "large"); !errors.Is(err, NotExist) {
		t.Errorf("deleted file after recovery: %v", err)
	}
}
