package metastore

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"pgregory.net/rapid"
)

func newTestFS(t testing.TB, inner vfs.FS) *sealedFS {
	t.Helper()
	fs, err := newSealedFS(inner, [32]byte{7}, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func readAll(t testing.TB, fs *sealedFS, name string) ([]byte, error) {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// Any sequence of writes and syncs reads back, whole and at random ranges.
func TestSealedFileRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		fs := newTestFS(t, vfs.NewMem())
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
		f, err := fs.Create("f", vfs.WriteCategoryUnspecified)
		if err != nil {
			rt.Fatal(err)
		}
		var want []byte
		for range rapid.IntRange(0, 12).Draw(rt, "writes") {
			n := rapid.SampledFrom([]int{0, 1, 100, blockBytes - 1, blockBytes, blockBytes + 1, 3 * blockBytes, 40 * blockBytes}).Draw(rt, "bytes")
			b := randomBytes(rng, n)
			want = append(want, b...)
			if got, err := f.Write(b); err != nil || got != n {
				rt.Fatalf("wrote %d of %d: %v", got, n, err)
			}
			if rapid.Bool().Draw(rt, "sync") {
				if err := f.Sync(); err != nil {
					rt.Fatal(err)
				}
			}
		}
		if info, err := f.Stat(); err != nil || info.Size() != int64(len(want)) {
			rt.Fatalf("size of the open file: %v, %v", info, err)
		}
		if err := f.Close(); err != nil {
			rt.Fatal(err)
		}
		if err := fs.Rename("f", "g"); err != nil {
			rt.Fatal(err)
		}
		if err := fs.Link("g", "h"); err != nil {
			rt.Fatal(err)
		}
		got, err := readAll(t, fs, "h")
		if err != nil || !bytes.Equal(got, want) {
			rt.Fatalf("read %d bytes, %v, want %d", len(got), err, len(want))
		}
		if info, err := fs.Stat("g"); err != nil || info.Size() != int64(len(want)) {
			rt.Fatalf("size: %v, %v, want %d", info, err, len(want))
		}
		r, err := fs.Open("g")
		if err != nil {
			rt.Fatal(err)
		}
		defer r.Close()
		for range 20 {
			off, n := rng.IntN(len(want)+10), rng.IntN(3*blockBytes)
			p := make([]byte, n)
			got, err := r.ReadAt(p, int64(off))
			expect := want[min(off, len(want)):min(off+n, len(want))]
			if !bytes.Equal(p[:got], expect) || (got < n) != errors.Is(err, io.EOF) {
				rt.Fatalf("read %d at %d: got %d, %v, want %d", n, off, got, err, len(expect))
			}
		}
	})
}

// After a crash a file that was synced while it grew reads as a prefix that
// has at least what was synced; no byte is ever wrong.
func TestSealedFileCrash(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 5))
		mem := vfs.NewCrashableMem()
		fs := newTestFS(t, mem)
		f, err := fs.Create("f", vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		dir, err := fs.OpenDir("")
		if err != nil {
			t.Fatal(err)
		}
		// As Pebble does: the file is synced once before its name counts.
		if err := errors.Join(f.Sync(), dir.Sync()); err != nil {
			t.Fatal(err)
		}
		var want []byte
		synced := 0
		for range 1 + rng.IntN(8) {
			b := randomBytes(rng, rng.IntN(5*blockBytes))
			want = append(want, b...)
			if _, err := f.Write(b); err != nil {
				t.Fatal(err)
			}
			if rng.IntN(2) == 0 {
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
				synced = len(want)
			}
		}
		w := f.(*sealedWriter)
		if err := errors.Join(w.seal(), w.flush()); err != nil {
			t.Fatal(err)
		}
		clone := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		got, err := readAll(t, newTestFS(t, clone), "f")
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if len(got) < synced || !bytes.HasPrefix(want, got) {
			t.Fatalf("seed %d: read %d bytes of %d, %d synced", seed, len(got), len(want), synced)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A flipped bit or a cut end gives an error, or at the unsynced end a prefix.
func TestSealedFileDamage(t *testing.T) {
	rng := rand.New(rand.NewPCG(6, 6))
	for _, syncEach := range []bool{false, true} {
		mem := vfs.NewMem()
		fs := newTestFS(t, mem)
		f, err := fs.Create("f", vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		want := []byte{}
		for range 6 {
			b := randomBytes(rng, 3000)
			want = append(want, b...)
			if _, err := f.Write(b); err != nil {
				t.Fatal(err)
			}
			if syncEach {
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		raw := rawFile(t, mem, "f")
		for range 400 {
			bad := bytes.Clone(raw)
			if rng.IntN(4) == 0 {
				bad = bad[:rng.IntN(len(bad)-1)+1]
			} else {
				bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
			}
			damaged := vfs.NewMem()
			putRawFile(t, damaged, "f", bad)
			got, err := readAll(t, newTestFS(t, damaged), "f")
			if err == nil && !bytes.HasPrefix(want, got) {
				t.Fatal("wrong bytes without an error")
			}
			if err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("got %v", err)
			}
		}
	}
}

func TestSealedFileKeysDiffer(t *testing.T) {
	mem := vfs.NewMem()
	fs := newTestFS(t, mem)
	secret := bytes.Repeat([]byte("canary"), 2000)
	for _, name := range []string{"a", "b"} {
		f, err := fs.Create(name, vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(secret); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	a, b := rawFile(t, mem, "a"), rawFile(t, mem, "b")
	if bytes.Contains(a, []byte("canary")) || bytes.Equal(a[headerBytes:], b[headerBytes:]) {
		t.Error("content shows")
	}
	// Slots of one file are no slots of another, nor of another place.
	swapped := append(bytes.Clone(a[:headerBytes]), b[headerBytes:]...)
	moved := append(bytes.Clone(a[:headerBytes]), a[headerBytes+slotBytes:headerBytes+2*slotBytes]...)
	moved = append(moved, a[headerBytes:headerBytes+slotBytes]...)
	for name, raw := range map[string][]byte{"swapped": swapped, "moved": moved} {
		damaged := vfs.NewMem()
		putRawFile(t, damaged, "f", raw)
		if got, err := readAll(t, newTestFS(t, damaged), "f"); err == nil && len(got) > 0 {
			t.Errorf("%s slots were read", name)
		}
	}
	other, err := newSealedFS(mem, [32]byte{8}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open("a"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another key: got %v", err)
	}
}

func TestSealedFileRefusesRewriting(t *testing.T) {
	fs := newTestFS(t, vfs.NewMem())
	if _, err := fs.OpenReadWrite("f", vfs.WriteCategoryUnspecified); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
	f, err := fs.Create("old", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	g, err := fs.ReuseForWrite("old", "new", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := fs.Open("old"); err == nil {
		t.Error("the old name is still there")
	}
}

func rawFile(t testing.TB, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func putRawFile(t testing.TB, fs vfs.FS, name string, b []byte) {
	t.Helper()
	f, err := fs.Create(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func FuzzSealedFile(f *testing.F) {
	mem := vfs.NewMem()
	fs := newTestFS(f, mem)
	w, err := fs.Create("f", vfs.WriteCategoryUnspecified)
	if err != nil {
		f.Fatal(err)
	}
	for range 3 {
		if _, err := w.Write([]byte("some bytes")); err != nil {
			f.Fatal(err)
		}
		if err := w.Sync(); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	raw := rawFile(f, mem, "f")
	f.Add(raw, uint32(0), byte(0))
	f.Add(raw[:headerBytes+5], uint32(0), byte(0))
	f.Fuzz(func(t *testing.T, b []byte, at uint32, flip byte) {
		if len(b) > 0 {
			b = bytes.Clone(b)
			b[int(at)%len(b)] ^= flip
		}
		damaged := vfs.NewMem()
		putRawFile(t, damaged, "f", b)
		got, err := readAll(t, newTestFS(t, damaged), "f")
		if err == nil && !bytes.HasPrefix([]byte("some bytessome bytessome bytes"), got) {
			t.Errorf("read %q", got)
		}
	})
}
