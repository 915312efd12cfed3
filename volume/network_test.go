package volume

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/internal/pooltest"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/memnet"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

// testPool is a pool of real nodes on a network in memory.
type testPool struct {
	*pooltest.Pool
	net *memnet.Network
	ids []placement.NodeID
}

func newTestPool(t *testing.T, count int) *testPool {
	t.Helper()
	p := pooltest.New(t, count)
	return &testPool{p, p.Net, p.IDs}
}

func (p *testPool) device(t *testing.T) p2p.Transport { return p.Device(t) }

type testVolume struct {
	*Volume
	dev   *Device
	words string
	dir   string
}

func newTestVolume(t *testing.T, pool *testPool, policy string) *testVolume {
	t.Helper()
	parsed, err := erasure.ParsePolicy(policy)
	if err != nil {
		t.Fatal(err)
	}
	key, err := p2p.NewPool()
	if err != nil {
		t.Fatal(err)
	}
	id := key.ID()
	dev, words, err := NewDevice("test", parsed, id[:], key.Seed())
	if err != nil {
		t.Fatal(err)
	}
	v := &testVolume{dev: dev, words: words, dir: t.TempDir()}
	v.open(t, pool.device(t))
	return v
}

func (v *testVolume) open(t *testing.T, transport p2p.Transport) {
	t.Helper()
	opened, err := OpenDevice(t.Context(), v.dir, v.dev, transport, Options{SegmentBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v.Volume = opened
}

func (v *testVolume) reopen(t *testing.T, pool *testPool) {
	t.Helper()
	if err := v.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	v.open(t, pool.device(t))
}

func (v *testVolume) put(t *testing.T, name string, data []byte) Ino {
	t.Helper()
	a, err := v.Create(t.Context(), RootIno, name, Create{Mode: syscall.S_IFREG | 0o644})
	if err != nil {
		t.Fatal(err)
	}
	v.write(t, a.Ino, 0, data)
	return a.Ino
}

func (v *testVolume) write(t *testing.T, ino Ino, off int, data []byte) {
	t.Helper()
	for len(data) > 0 {
		n, err := v.Write(t.Context(), ino, int64(off), data[:min(len(data), 1<<20)], WriteFlags{})
		if err != nil {
			t.Fatal(err)
		}
		data, off = data[n:], off+n
	}
}

func wantContent(t *testing.T, v *Volume, name string, want []byte) {
	t.Helper()
	a, err := v.Lookup(t.Context(), RootIno, name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if a.Size != uint64(len(want)) {
		t.Fatalf("%s: %d bytes, want %d", name, a.Size, len(want))
	}
	got := make([]byte, len(want))
	for off := 0; off < len(got); {
		n, err := v.Read(t.Context(), a.Ino, int64(off), got[off:min(len(got), off+128<<10)])
		if err != nil {
			t.Fatalf("%s at %d: %v", name, off, err)
		}
		if n == 0 {
			t.Fatalf("%s: ends at %d", name, off)
		}
		off += n
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: other bytes", name)
	}
}

func wait(t *testing.T, v *Volume) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := v.WaitDurable(ctx, nil); err != nil {
		t.Fatal(err)
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func recoverVolume(t *testing.T, pool *testPool, words string) *testVolume {
	t.Helper()
	root, err := seal.RootFromWords(words)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	report, err := Recover(t.Context(), dir, root, pool.device(t), 0, Options{SegmentBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v, err := OpenDevice(t.Context(), dir, report.Device, pool.device(t), Options{SegmentBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return &testVolume{v, report.Device, words, dir}
}

// TestRoundTrip writes files of many sizes, makes them durable, and reads them
// from the peers alone, then from a machine that has only the words.
func TestRoundTrip(t *testing.T) {
	for _, policy := range []string{"file:1+2", "slice:1+2", "rs-size:4+2", "rs-ratio:4+2", "auto"} {
		t.Run(policy, func(t *testing.T) {
			pool := newTestPool(t, 6)
			v := newTestVolume(t, pool, policy)
			files := map[string][]byte{}
			for _, n := range []int{0, 1, 31, 4096, 65535, 65536, 65537, 1 << 20, 5<<20 + 17} {
				name := fmt.Sprintf("f%d", n)
				files[name] = random(n)
				v.put(t, name, files[name])
			}
			files["text"] = bytes.Repeat([]byte("the same words again "), 50_000)
			v.put(t, "text", files["text"])
			wait(t, v.Volume)
			s, err := v.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if s.Journaled != 0 || s.Queued != 0 || s.Recoverable != 0 || s.Durable == 0 || s.Lost != 0 || s.SurvivesNodes < 2 {
				t.Fatalf("status %+v", s)
			}
			if _, err := v.DropCache(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			if st := v.store.Stats(); st.CleanBytes != 0 {
				t.Errorf("%d clean bytes are left", st.CleanBytes)
			}
			for _, seg := range v.store.Segments() {
				if !seg.Active {
					t.Errorf("segment %d is left", seg.ID)
				}
			}
			for name, data := range files {
				wantContent(t, v.Volume, name, data)
			}
			v.reopen(t, pool)
			for name, data := range files {
				wantContent(t, v.Volume, name, data)
			}
			if err := v.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
			r := recoverVolume(t, pool, v.words)
			for name, data := range files {
				wantContent(t, r.Volume, name, data)
			}
			// The recovered device goes on, and can be recovered in turn.
			files["later"] = random(100_000)
			r.put(t, "later", files["later"])
			if err := r.Unlink(t.Context(), RootIno, "f1"); err != nil {
				t.Fatal(err)
			}
			delete(files, "f1")
			wait(t, r.Volume)
			if err := r.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
			r = recoverVolume(t, pool, v.words)
			defer r.Close(context.Background())
			for name, data := range files {
				wantContent(t, r.Volume, name, data)
			}
			if _, err := r.Lookup(t.Context(), RootIno, "f1"); !errors.Is(err, NotExist) {
				t.Fatalf("deleted file after recovery: %v", err)
			}
		})
	}
}

// TestReadsThroughFailures reads while as many nodes as the policy survives
// are dead, stalled or lying, in every combination of two.
func TestReadsThroughFailures(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	data := random(3<<20 + 5)
	v.put(t, "file", data)
	v.put(t, "small", data[:5000])
	wait(t, v.Volume)
	faults := map[string]func(placement.NodeID){
		"killed": pool.net.Kill,
		"lying": func(id placement.NodeID) {
			pool.net.Corrupt(id, func(op string, body []byte) {
				if len(body) > 0 {
					body[len(body)/2] ^= 1
				}
			})
		},
	}
	for name, fault := range faults {
		for a := range 6 {
			b := (a + 1) % 6
			t.Run(fmt.Sprintf("%s %d and %d", name, a, b), func(t *testing.T) {
				if _, err := v.DropCache(t.Context(), false); err != nil {
					t.Fatal(err)
				}
				for _, i := range []int{a, b} {
					fault(pool.ids[i])
					defer pool.net.Corrupt(pool.ids[i], nil)
					defer pool.net.Restart(pool.ids[i])
				}
				wantContent(t, v.Volume, "file", data)
				wantContent(t, v.Volume, "small", data[:5000])
			})
		}
	}
	t.Run("four killed", func(t *testing.T) {
		if _, err := v.DropCache(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			pool.net.Kill(pool.ids[i])
			defer pool.net.Restart(pool.ids[i])
		}
		a, err := v.Lookup(t.Context(), RootIno, "file")
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := v.Read(t.Context(), a.Ino, 0, make([]byte, 3<<20)); !errors.Is(err, IO) {
			t.Fatalf("read with 2 of 6 nodes: %v", err)
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Fatalf("the read took %v", took)
		}
	})
	// One of them comes back: everything can be read again.
	wantContent(t, v.Volume, "file", data)
}

// TestLostHints reads after every holder that the device remembers is wrong:
// keepers answer.
func TestLostHints(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	data := random(2 << 20)
	v.put(t, "file", data)
	wait(t, v.Volume)
	if _, err := v.DropCache(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if _, err := v.commit(func(x *tx) error {
		x.background = true
		return v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
			for i := range s.Holders {
				s.Holders[i] = metastore.Holder{Primary: "nobody"}
			}
			x.PutStripe(id, s)
			x.Delete(append([]byte{'k'}, id[:]...))
			return true
		})
	}); err != nil {
		t.Fatal(err)
	}
	v.reopen(t, pool)
	wantContent(t, v.Volume, "file", data)
}

// TestCutUnderLoad recovers a volume whose files were rewritten while it was
// being published: what comes back is one state that existed.
func TestCutUnderLoad(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:2+2")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := mathrand.New(mathrand.NewPCG(seed, 1))
	ino := v.put(t, "counter", bytes.Repeat([]byte{0}, 300_000))
	model := bytes.Repeat([]byte{0}, 300_000)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			off := rng.IntN(len(model) - 5000)
			part := bytes.Repeat([]byte{byte(i)}, 1+rng.IntN(5000))
			copy(model[off:], part)
			if _, err := v.Write(context.Background(), ino, int64(off), part, WriteFlags{}); err != nil {
				t.Error(err)
				return
			}
			if i%7 == 0 {
				if _, err := v.SetAttr(context.Background(), ino, SetAttr{Valid: SetSize, Size: uint64(len(model) - 1000)}); err != nil {
					t.Error(err)
					return
				}
				clear(model[len(model)-1000:])
				if _, err := v.SetAttr(context.Background(), ino, SetAttr{Valid: SetSize, Size: uint64(len(model))}); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	for range 5 {
		wait(t, v.Volume)
	}
	close(stop)
	<-done
	wait(t, v.Volume)
	wantContent(t, v.Volume, "counter", model)
	if _, err := v.DropCache(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	wantContent(t, v.Volume, "counter", model)
	if err := v.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	r := recoverVolume(t, pool, v.words)
	defer r.Close(context.Background())
	wantContent(t, r.Volume, "counter", model)
}

// TestModeFile finds that in mode "file" no stripe holds bytes of two files,
// and in mode "slice" small files share one.
func TestModeFile(t *testing.T) {
	for policy, shared := range map[string]bool{"file:1+2": false, "slice:1+2": true} {
		t.Run(policy, func(t *testing.T) {
			pool := newTestPool(t, 4)
			v := newTestVolume(t, pool, policy)
			defer func() { v.Close(context.Background()) }()
			inos := []Ino{v.put(t, "a", random(3000)), v.put(t, "b", random(3000)), v.put(t, "c", random(3000))}
			wait(t, v.Volume)
			files := map[[16]byte]int{}
			for _, ino := range inos {
				if err := v.db.Extents(ino, 0, 1<<62, func(e metastore.Extent) bool { files[e.Remote.Stripe]++; return true }); err != nil {
					t.Fatal(err)
				}
			}
			if got := len(files) < len(inos); got != shared {
				t.Fatalf("3 files in %d stripes", len(files))
			}
		})
	}
}

// TestStatusAfterRestart finds the same figures before any peer was asked, and
// stripes whose nodes are silent out of reach, not lost.
func TestStatusAfterRestart(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	v.put(t, "file", random(1<<20))
	wait(t, v.Volume)
	v.reopen(t, pool)
	s, err := v.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.Durable != 1<<20 || s.SurvivesNodes != 2 {
		t.Errorf("after a restart: %+v", s)
	}
	for _, id := range pool.ids[:3] {
		pool.net.Kill(id)
		defer pool.net.Restart(id)
	}
	if s, err = v.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.Lost != 0 || s.Unreachable+s.Degraded != s.Stripes {
		t.Errorf("with silent nodes: %+v", s)
	}
	for _, id := range pool.ids {
		pool.net.Kill(id)
		pool.net.Bury(id)
	}
	if s, err = v.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.Lost != s.Stripes {
		t.Errorf("with dead nodes: %+v", s)
	}
}
