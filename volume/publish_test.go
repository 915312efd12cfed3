package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/defs-fs/defs/internal/pooltest"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

var errCut = errors.New("the device is cut off")

// until polls a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("not in time: " + what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// published waits for a head that covers everything.
func published(t *testing.T, v *Volume) {
	t.Helper()
	p := v.network.publisher
	until(t, "a head that covers all", func() bool {
		select {
		case p.kick <- struct{}{}:
		default:
		}
		return p.published() >= v.lastChange.Load()
	})
}

// heads returns the sequence of the device's head at each node.
func (v *testVolume) heads(t *testing.T, pool *testPool) (sequences []uint64, hashes map[[32]byte]bool) {
	t.Helper()
	key, err := seal.UnmarshalHeadKey(v.dev.HeadKey)
	if err != nil {
		t.Fatal(err)
	}
	hashes = make(map[[32]byte]bool)
	for _, id := range pool.ids {
		found, _ := fetchHeads(t.Context(), v.network.transport, []placement.NodeID{id}, [][32]byte{key.Address()})
		if h := found[key.Address()]; h != nil {
			sequences = append(sequences, h.Sequence)
			hashes[h.Hash()] = true
		}
	}
	return sequences, hashes
}

// checkSums fails unless each live byte counts once.
func checkSums(t *testing.T, v *Volume) Status {
	t.Helper()
	s, err := v.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v.mu.Lock()
	total := int64(v.usage.bytes)
	v.mu.Unlock()
	if min(s.Journaled, s.Queued, s.Recoverable, s.Durable) < 0 || s.Journaled+s.Queued+s.Recoverable+s.Durable != total {
		t.Fatalf("%d bytes are live, the status says %+v", total, s)
	}
	return s
}

// TestCrashWhilePublishing stops a device at each step of publishing, as
// SIGKILL would, and goes on from what was on its disk.
func TestCrashWhilePublishing(t *testing.T) {
	for _, point := range []struct {
		name  string
		op    string
		calls int32 // that happen before the crash
	}{
		{"before anything is placed", "put_shard", 0},
		{"while shards are placed", "put_shard", 7},
		{"before the index is published", "put_index", 0},
		{"between index and commit of shards", "commit_shards", 0},
		{"before the head", "put_head", 0},
		{"head at one node", "put_head", 1},
		{"head at a majority", "put_head", 4},
		{"head at all nodes, not noted", "put_head", 6},
	} {
		t.Run(point.name, func(t *testing.T) {
			pool := newTestPool(t, 6)
			v := newTestVolume(t, pool, "rs-ratio:4+2")
			first, second := random(300_000), random(700_000)
			ino := v.put(t, "first", first)
			wait(t, v.Volume)
			if err := v.Close(ctx); err != nil {
				t.Fatal(err)
			}
			faulty := &pooltest.Faulty{Transport: pool.device(t)}
			crashed := t.TempDir()
			var armed, dead atomic.Bool
			var calls atomic.Int32
			stopped := make(chan struct{})
			crash := func() error {
				if !dead.Swap(true) {
					// The metastore first: the journal may be ahead of it.
					for _, part := range []string{"meta", "journal"} {
						if err := os.CopyFS(crashed+"/"+part, os.DirFS(v.dir+"/"+part)); err != nil {
							t.Error(err)
						}
					}
					close(stopped)
				}
				<-stopped
				return errCut
			}
			count := func(op string, after bool) error {
				switch {
				case !armed.Load() || (op != point.op && !dead.Load()):
				case dead.Load():
					return errCut
				case after && calls.Add(1) >= point.calls, !after && point.calls == 0:
					return crash()
				}
				return nil
			}
			faulty.Before = func(op string, _ placement.NodeID) error { return count(op, false) }
			faulty.After = func(op string, _ placement.NodeID) error { return count(op, true) }
			v.open(t, faulty)
			ino2 := v.put(t, "second", second)
			copy(first[1000:], "changed")
			v.write(t, ino, 1000, []byte("changed"))
			if err := v.Fsync(ctx, ino2); err != nil {
				t.Fatal(err)
			}
			armed.Store(true)
			v.network.publisher.kick <- struct{}{}
			select {
			case <-stopped:
			case <-time.After(20 * time.Second):
				t.Fatal("the point was never reached")
			}
			if err := v.Close(ctx); err != nil {
				t.Fatal(err)
			}

			v.dir = crashed
			v.open(t, pool.device(t))
			checkSums(t, v.Volume)
			wantContent(t, v.Volume, "second", second)
			wait(t, v.Volume)
			checkSums(t, v.Volume)
			sequences, hashes := v.heads(t, pool)
			if len(sequences) != len(pool.ids) || len(hashes) != 1 {
				t.Fatalf("heads %v, %d different ones", sequences, len(hashes))
			}
			if _, err := v.DropCache(ctx, false); err != nil {
				t.Fatal(err)
			}
			wantContent(t, v.Volume, "first", first)
			wantContent(t, v.Volume, "second", second)
			// The next turns must delete nothing that is needed.
			third := random(50_000)
			v.put(t, "third", third)
			wait(t, v.Volume)
			for range 3 {
				v.network.publisher.kick <- struct{}{}
			}
			if err := v.Close(ctx); err != nil {
				t.Fatal(err)
			}
			r := recoverVolume(t, pool, v.words)
			defer r.Close(ctx)
			wantContent(t, r.Volume, "first", first)
			wantContent(t, r.Volume, "second", second)
			wantContent(t, r.Volume, "third", third)
		})
	}
}

// TestHeadIsRepeated: a node that missed the head gets the same one later, also
// after a restart of the device, which changes nothing at the others.
func TestHeadIsRepeated(t *testing.T) {
	pool := newTestPool(t, 7)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	v.put(t, "file", random(100_000))
	wait(t, v.Volume)
	pool.net.Kill(pool.ids[3])
	v.put(t, "other", random(1000))
	published(t, v.Volume)
	pool.net.Restart(pool.ids[3])
	wait(t, v.Volume)
	if sequences, hashes := v.heads(t, pool); len(sequences) != 7 || len(hashes) != 1 {
		t.Fatalf("heads %v, %d different ones", sequences, len(hashes))
	}
	before, _ := v.heads(t, pool)
	v.reopen(t, pool)
	wait(t, v.Volume)
	after, hashes := v.heads(t, pool)
	if len(hashes) != 1 || after[0] != before[0] {
		t.Fatalf("heads before the restart %v, after it %v", before, after)
	}
	if s := checkSums(t, v.Volume); s.SurvivesNodes < 2 || s.Durable != 101_000 {
		t.Fatalf("after a restart: %+v", s)
	}
	v.Close(ctx)
}

// TestFirstHeadFails: the list of devices that an earlier attempt has stored
// does not stand in the way of the next.
func TestFirstHeadFails(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	var calls atomic.Int32
	v.open(t, &pooltest.Faulty{Transport: pool.device(t), Before: func(op string, _ placement.NodeID) error {
		// Six calls store the list, the next six the head.
		if op == "put_head" && calls.Add(1) > 6 && calls.Load() <= 12 {
			return errCut
		}
		return nil
	}})
	data := random(10_000)
	v.put(t, "file", data)
	wait(t, v.Volume)
	v.Close(ctx)
	r := recoverVolume(t, pool, v.words)
	defer r.Close(ctx)
	wantContent(t, r.Volume, "file", data)
}

// TestRestoredImage goes on from a copy of the local state that is older than
// the published head.
func TestRestoredImage(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	old := random(200_000)
	v.put(t, "old", old)
	wait(t, v.Volume)
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	image := t.TempDir()
	if err := os.CopyFS(image, os.DirFS(v.dir)); err != nil {
		t.Fatal(err)
	}
	v.open(t, pool.device(t))
	for range 3 {
		v.put(t, "newer", random(1000))
		wait(t, v.Volume)
		if err := v.Unlink(ctx, RootIno, "newer"); err != nil {
			t.Fatal(err)
		}
		wait(t, v.Volume)
	}
	last, _ := v.heads(t, pool)
	v.Close(ctx)

	v.dir = image
	v.open(t, pool.device(t))
	data := random(30_000)
	v.put(t, "after", data)
	wait(t, v.Volume)
	now, hashes := v.heads(t, pool)
	if len(hashes) != 1 || now[0] <= last[0] {
		t.Fatalf("heads %v after %v", now, last)
	}
	v.Close(ctx)
	r := recoverVolume(t, pool, v.words)
	defer r.Close(ctx)
	wantContent(t, r.Volume, "old", old)
	wantContent(t, r.Volume, "after", data)
}

// TestNodeDiesBetweenPlaceAndPublish: what was placed on it goes into stripes
// that the smaller pool can take.
func TestNodeDiesBetweenPlaceAndPublish(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	v.put(t, "before", random(1000))
	wait(t, v.Volume)
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	var armed atomic.Bool
	v.open(t, &pooltest.Faulty{Transport: pool.device(t), Before: func(op string, _ placement.NodeID) error {
		if op == "commit_shards" && armed.Swap(false) {
			pool.net.Kill(pool.ids[2])
		}
		return nil
	}})
	defer func() { v.Close(ctx) }()
	data := random(900_000)
	v.put(t, "file", data)
	armed.Store(true)
	published(t, v.Volume)
	if armed.Load() {
		t.Fatal("the node was not killed")
	}
	checkSums(t, v.Volume)
	a, err := v.Lookup(ctx, RootIno, "file")
	if err != nil {
		t.Fatal(err)
	}
	if err := v.db.Extents(a.Ino, 0, 1<<62, func(e metastore.Extent) bool {
		info, err := v.db.Stripe(e.Remote.Stripe)
		if err != nil || !e.HasRemote || info.IndexAcks == 0 || v.network.stripes.Health(&info).Shards < min(info.K+info.M, info.K+2) {
			t.Errorf("extent at %d: %+v %v", e.Off, info, err)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.DropCache(ctx, false); err != nil {
		t.Fatal(err)
	}
	wantContent(t, v.Volume, "file", data)
}

// TestFileOfTinyWrites publishes a file whose extents do not fit one record.
func TestFileOfTinyWrites(t *testing.T) {
	pool := newTestPool(t, 3)
	v := newTestVolume(t, pool, "rs-ratio:2+1")
	ino := v.put(t, "log", nil)
	line := make([]byte, 100)
	const lines = 41_000 // zeros: the chunker finds no place to cut
	for i := range lines {
		if _, err := v.Write(ctx, ino, int64(i*len(line)), line, WriteFlags{}); err != nil {
			t.Fatal(err)
		}
	}
	wait(t, v.Volume)
	if _, err := v.DropCache(ctx, false); err != nil {
		t.Fatal(err)
	}
	wantContent(t, v.Volume, "log", make([]byte, lines*len(line)))
	v.Close(ctx)
	r := recoverVolume(t, pool, v.words)
	defer r.Close(ctx)
	wantContent(t, r.Volume, "log", make([]byte, lines*len(line)))
}

// TestStatusNamesMissingKeepers: what is not durable for want of keepers says so,
// and no longer once they are there.
func TestStatusNamesMissingKeepers(t *testing.T) {
	pool := newTestPool(t, 3)
	v := newTestVolume(t, pool, "slice:1+1")
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	var mute atomic.Bool
	mute.Store(true)
	v.open(t, &pooltest.Faulty{Transport: pool.device(t), Before: func(op string, id placement.NodeID) error {
		if op == "put_index" && id == pool.ids[0] && mute.Load() {
			return errors.New("no")
		}
		return nil
	}})
	defer v.Close(ctx)
	v.put(t, "file", random(1000))
	problem := func() string {
		select {
		case v.network.publisher.kick <- struct{}{}:
		default:
		}
		s, err := v.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s.Problem
	}
	until(t, "the status names the keepers", func() bool { return strings.Contains(problem(), "2 of 3 keepers") })
	mute.Store(false)
	wait(t, v.Volume)
	if p := problem(); p != "" {
		t.Errorf("durable, and yet: %s", p)
	}
}

// TestCloseWhilePublishing: Close waits neither for peers that hang nor leaves
// a goroutine behind.
func TestCloseWhilePublishing(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	var reached atomic.Bool
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	v.open(t, &pooltest.Faulty{Transport: pool.device(t), Before: func(op string, _ placement.NodeID) error {
		if op == "put_shard" && !reached.Swap(true) {
			for _, id := range pool.ids {
				pool.net.Stall(id)
			}
		}
		return nil
	}})
	v.put(t, "file", random(9<<20))
	v.network.publisher.kick <- struct{}{}
	until(t, "a shard on its way", reached.Load)
	started := time.Now()
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(started); took > 5*time.Second {
		t.Errorf("closing took %v", took)
	}
	stacks := make([]byte, 4<<20)
	until(t, "the volume's goroutines to end", func() bool {
		s := string(stacks[:runtime.Stack(stacks, true)])
		return !strings.Contains(s, "volume.(*publisher)") && !strings.Contains(s, "stripe.(*Store)")
	})
	for _, id := range pool.ids {
		pool.net.Resume(id)
	}
}

// TestStatusAddsUp samples the status while files are written, rewritten,
// published and deleted.
func TestStatusAddsUp(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(ctx) }()
	var fail atomic.Bool
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	v.open(t, &pooltest.Faulty{Transport: pool.device(t), Before: func(op string, _ placement.NodeID) error {
		if op == "put_head" && fail.Load() {
			return errCut
		}
		return nil
	}})
	if s := checkSums(t, v.Volume); s.Journaled+s.Queued+s.Recoverable+s.Durable != 0 {
		t.Fatalf("empty volume: %+v", s)
	}
	data := random(1 << 20)
	v.put(t, "a", data)
	if s := checkSums(t, v.Volume); s.Recoverable+s.Durable != 0 {
		t.Fatalf("nothing is published: %+v", s)
	}
	wait(t, v.Volume)
	// Everything is placed, and no head says so.
	fail.Store(true)
	v.put(t, "b", bytes.Repeat(random(1000), 500))
	v.network.publisher.kick <- struct{}{}
	until(t, "the attempt to fail", func() bool { return checkSums(t, v.Volume).Problem != "" })
	s := checkSums(t, v.Volume)
	if s.Journaled+s.Queued != 500_000 || s.Recoverable+s.Durable != 1<<20 {
		t.Fatalf("placed without a head: %+v", s)
	}
	fail.Store(false)
	if err := v.Unlink(ctx, RootIno, "a"); err != nil {
		t.Fatal(err)
	}
	checkSums(t, v.Volume)
	waitCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := v.WaitDurable(waitCtx, func(Status) { checkSums(t, v.Volume) }); err != nil {
		t.Fatal(err)
	}
	if s := checkSums(t, v.Volume); s.Durable != 500_000 {
		t.Fatalf("at the end: %+v", s)
	}
}
