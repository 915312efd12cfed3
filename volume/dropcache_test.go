package volume

import (
	"context"
	"testing"
)

// TestDropCacheKeepsWhatThePoolCannotGive drops the cache, of written and of fetched
// bytes, while all nodes or too many of them are silent, seen or not yet seen as such.
func TestDropCacheKeepsWhatThePoolCannotGive(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	data := random(3<<20 + 5)
	v.put(t, "file", data)
	wait(t, v.Volume)
	for _, source := range []string{"written here", "fetched"} {
		for _, down := range []int{6, 3} {
			for _, id := range pool.ids[:down] {
				pool.net.Kill(id)
			}
			d, err := v.DropCache(t.Context(), false)
			if err != nil {
				t.Fatal(err)
			}
			if d.KeptBytes < int64(len(data)) || d.Stripes == 0 || d.Answering != 6-down || d.Nodes != 6 {
				t.Errorf("%s, %d nodes down: %+v", source, down, d)
			}
			wantContent(t, v.Volume, "file", data)
			for _, id := range pool.ids[:down] {
				pool.net.Restart(id)
			}
		}
		if d, err := v.DropCache(t.Context(), false); err != nil || d.KeptBytes != 0 || d.Bytes < int64(len(data)) {
			t.Errorf("%s, all nodes answer: %+v, %v", source, d, err)
		}
		wantContent(t, v.Volume, "file", data) // from the nodes: fetched, for the next round
		v.reopen(t, pool)                      // which waits until it is on disk
	}
	for _, id := range pool.ids {
		pool.net.Kill(id)
	}
	if d, err := v.DropCache(t.Context(), true); err != nil || d.KeptBytes != 0 || d.Bytes < int64(len(data)) {
		t.Errorf("forced: %+v, %v", d, err)
	}
}
