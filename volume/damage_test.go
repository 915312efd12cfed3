package volume

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
)

// flip changes one bit of a file.
func flip(t *testing.T, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 0x10
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func segmentFiles(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "journal", "segment-*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("segments: %v, %v", files, err)
	}
	return files
}

// cutOff closes the volume, and opens it where no node answers.
func (v *testVolume) cutOff(t *testing.T, pool *testPool) {
	t.Helper()
	for _, id := range pool.ids {
		pool.net.Kill(id)
	}
	v.reopen(t, pool)
}

func (p *testPool) restart() {
	for _, id := range p.ids {
		p.net.Restart(id)
	}
}

// readable tells which blocks of a file are read, and fails where one has
// other bytes than want.
func readable(t *testing.T, v *Volume, name string, want []byte) (blocks []bool) {
	t.Helper()
	a, err := v.Lookup(ctx, RootIno, name)
	if err != nil || a.Size != uint64(len(want)) {
		t.Fatalf("%s: %d bytes of %d: %v", name, a.Size, len(want), err)
	}
	for at := 0; at < len(want); at += cache.BlockBytes {
		part := want[at:min(len(want), at+cache.BlockBytes)]
		got := make([]byte, len(part))
		n, err := v.Read(ctx, a.Ino, int64(at), got)
		switch {
		case err == nil && (n != len(part) || !bytes.Equal(got, part)):
			t.Fatalf("%s at %d: wrong bytes", name, at)
		case err != nil && !errors.Is(err, IO):
			t.Fatalf("%s at %d: %v", name, at, err)
		}
		blocks = append(blocks, err == nil)
	}
	return blocks
}

func countTrue(blocks []bool) (n int) {
	for _, ok := range blocks {
		if ok {
			n++
		}
	}
	return n
}

// TestDamagedLocalBytesAreReadFromPeers: what the peers have is read from them.
func TestDamagedLocalBytesAreReadFromPeers(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	data := random(1 << 20)
	v.put(t, "file", data)
	wait(t, v.Volume)
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	flip(t, segmentFiles(t, v.dir)[0], 300_000)
	v.open(t, pool.device(t))
	defer func() { v.Close(ctx) }()
	wantContent(t, v.Volume, "file", data)
	if n := v.store.Stats().DamagedReads; n == 0 {
		t.Error("no damaged read is counted")
	}
	if s := checkSums(t, v.Volume); !strings.Contains(s.Problem, "fsck") {
		t.Errorf("the status does not tell: %+v", s)
	}
}

// TestDamagedBytesHoldNothingUp: bytes that were damaged before they were
// placed are lost, in blocks; all else is published, and nobody reads zeros.
func TestDamagedBytesHoldNothingUp(t *testing.T) {
	for _, policy := range []string{"rs-ratio:4+2", "file:1+2"} {
		t.Run(policy, func(t *testing.T) {
			pool := newTestPool(t, 6)
			v := newTestVolume(t, pool, policy)
			v.cutOff(t, pool)
			damaged, whole := random(1<<20), random(500_000)
			ino := v.put(t, "damaged", damaged)
			v.put(t, "whole", whole)
			if err := v.Close(ctx); err != nil {
				t.Fatal(err)
			}
			files := segmentFiles(t, v.dir)
			flip(t, files[len(files)-1], 300_000)
			pool.restart()
			v.open(t, pool.device(t))
			var lost *lostError
			if err := v.WaitDurable(ctx, nil); !errors.As(err, &lost) || lost.bytes != cache.BlockBytes {
				t.Fatalf("waiting for durability: %v", err)
			}
			blocks := len(readable(t, v.Volume, "damaged", damaged))
			if n := countTrue(readable(t, v.Volume, "damaged", damaged)); n != blocks-1 {
				t.Fatalf("%d of %d blocks can be read", n, blocks)
			}
			checkSums(t, v.Volume)
			r := recoverVolume(t, pool, v.words)
			wantContent(t, r.Volume, "whole", whole)
			if n := countTrue(readable(t, r.Volume, "damaged", damaged)); n != blocks-1 {
				t.Errorf("%d of %d blocks can be read after a recovery", n, blocks)
			}
			if _, wrong := faults(t, r.Volume); !strings.Contains(wrong, "16384 bytes at") {
				t.Errorf("fsck after a recovery: %q", wrong)
			}
			if err := r.Close(ctx); err != nil {
				t.Fatal(err)
			}
			// Written anew, the file is whole again, here and there.
			damaged = random(1 << 20)
			v.write(t, ino, 0, damaged)
			wait(t, v.Volume)
			wantContent(t, v.Volume, "damaged", damaged)
			if _, wrong := faults(t, v.Volume); wrong != "" {
				t.Error(wrong)
			}
			if err := v.Close(ctx); err != nil {
				t.Fatal(err)
			}
			r = recoverVolume(t, pool, v.words)
			defer r.Close(ctx)
			wantContent(t, r.Volume, "damaged", damaged)
			if _, wrong := faults(t, r.Volume); wrong != "" {
				t.Error(wrong)
			}
		})
	}
}

// TestMissingSegments: a volume mounts without a segment whose records are in
// the metastore. What it alone held is told of, and never read as something else.
func TestMissingSegments(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	placed, unplaced := random(600_000), random(300_000)
	v.put(t, "placed", placed)
	wait(t, v.Volume)
	v.cutOff(t, pool)
	if err := v.Fsync(ctx, v.put(t, "unplaced", unplaced)); err != nil {
		t.Fatal(err)
	}
	killed := t.TempDir()
	copyState(t, v.dir, killed)
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for _, file := range segmentFiles(t, v.dir) {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	pool.restart()
	v.open(t, pool.device(t))
	wantContent(t, v.Volume, "placed", placed)
	if n := countTrue(readable(t, v.Volume, "unplaced", unplaced)); n != 0 {
		t.Errorf("%d blocks are read from a file that is gone", n)
	}
	if _, wrong := faults(t, v.Volume); !strings.Contains(wrong, "is lost: the file is missing") || !strings.Contains(wrong, "nowhere else") {
		t.Errorf("fsck says %q", wrong)
	}
	later := random(50_000)
	v.put(t, "later", later)
	var lost *lostError
	if err := v.WaitDurable(t.Context(), nil); !errors.As(err, &lost) || lost.bytes != int64(len(unplaced)) {
		t.Errorf("waiting for durability: %v", err)
	}
	v.reopen(t, pool)
	defer func() { v.Close(ctx) }()
	wantContent(t, v.Volume, "placed", placed)
	wantContent(t, v.Volume, "later", later)

	// Records that only the segment had are not passed over.
	files := segmentFiles(t, killed)
	if err := os.Remove(files[len(files)-1]); err != nil {
		t.Fatal(err)
	}
	_, err := OpenDevice(ctx, killed, v.dev, pool.device(t), Options{SegmentBytes: 8 << 20})
	if err == nil || !strings.Contains(err.Error(), "fsck --repair") || !errors.Is(err, cache.ErrCorrupt) {
		t.Errorf("opening without needed records: %v", err)
	}
}

// repair repairs the closed volume and opens it.
func (v *testVolume) repair(t *testing.T, pool *testPool) (notes string) {
	t.Helper()
	all, err := Repair(t.Context(), v.dir, v.dev, pool.device(t), Options{SegmentBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v.open(t, pool.device(t))
	if _, _, err := v.RepairContent(t.Context()); err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

// damageMeta flips a bit in each of the metastore's larger files.
func damageMeta(t *testing.T, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "meta", "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		if st, err := os.Stat(file); err == nil && st.Size() > 200 {
			flip(t, file, 150)
		}
	}
}

// TestMetastoreIsMadeAnewFromTheJournal needs no peer while the journal has
// all records.
func TestMetastoreIsMadeAnewFromTheJournal(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	data := random(300_000)
	v.put(t, "file", data)
	wait(t, v.Volume)
	v.cutOff(t, pool)
	v.put(t, "later", data[:1000])
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	damageMeta(t, v.dir)
	if _, err := OpenDevice(ctx, v.dir, v.dev, pool.device(t), Options{}); err == nil || !strings.Contains(err.Error(), "fsck --repair") {
		t.Errorf("opening a damaged metastore: %v", err)
	}
	if notes := v.repair(t, pool); !strings.Contains(notes, "from the journal") || !strings.Contains(notes, "meta.damaged-") {
		t.Error(notes)
	}
	defer func() { v.Close(ctx) }()
	wantContent(t, v.Volume, "file", data)
	wantContent(t, v.Volume, "later", data[:1000])
	if _, wrong := faults(t, v.Volume); wrong != "" {
		t.Error(wrong)
	}
	pool.restart()
	wait(t, v.Volume)
}

// TestMetastoreIsMadeAnewFromTheHead: where the first records are gone, the
// tree of the last head and the records behind it give all that there was.
func TestMetastoreIsMadeAnewFromTheHead(t *testing.T) {
	for _, behind := range []bool{false, true} {
		t.Run(map[bool]string{false: "all published", true: "changes behind the head"}[behind], func(t *testing.T) {
			pool := newTestPool(t, 6)
			v := newTestVolume(t, pool, "rs-ratio:4+2")
			files := map[string][]byte{}
			put := func(name string, n int) Ino {
				files[name] = random(n)
				return v.put(t, name, files[name])
			}
			first := put("first", 300_000)
			second := put("second", 500_000)
			put("gone", 10_000)
			wait(t, v.Volume)
			v.reopen(t, pool)
			if _, err := v.DropCache(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			put("third", 70_000)
			wait(t, v.Volume)
			used := v.network.publisher.sequenceUsed
			next := v.nextID
			if behind {
				v.cutOff(t, pool)
				copy(files["first"][1000:], "changed")
				v.write(t, first, 1000, []byte("changed"))
				files["second"] = files["second"][:200_001]
				if _, err := v.SetAttr(ctx, second, SetAttr{Valid: SetSize, Size: 200_001}); err != nil {
					t.Fatal(err)
				}
				put("fourth", 90_000)
				if err := v.Unlink(ctx, RootIno, "gone"); err != nil {
					t.Fatal(err)
				}
				delete(files, "gone")
				if err := v.Rename(ctx, RootIno, "third", RootIno, "renamed", 0); err != nil {
					t.Fatal(err)
				}
				files["renamed"] = files["third"]
				delete(files, "third")
			}
			if err := v.Close(ctx); err != nil {
				t.Fatal(err)
			}
			damageMeta(t, v.dir)
			if behind {
				if _, err := Repair(ctx, v.dir, v.dev, pool.device(t), Options{SegmentBytes: 8 << 20}); err == nil || !strings.Contains(err.Error(), "majority") {
					t.Errorf("repair without nodes: %v", err)
				}
			}
			pool.restart()
			if notes := v.repair(t, pool); !strings.Contains(notes, "from head") {
				t.Error(notes)
			}
			check := func(v *Volume) {
				t.Helper()
				for name, data := range files {
					wantContent(t, v, name, data)
				}
				entries := 0
				if err := v.db.ReadDir(RootIno, 0, func(metastore.Dirent) bool { entries++; return true }); err != nil || entries != len(files) {
					t.Errorf("%d entries, want %d: %v", entries, len(files), err)
				}
				if _, wrong := faults(t, v); wrong != "" {
					t.Error(wrong)
				}
				checkInvariants(t, v)
			}
			check(v.Volume)
			if v.network.publisher.sequenceUsed < used || v.nextID < next {
				t.Errorf("head sequence %d after %d, inode %d after %d", v.network.publisher.sequenceUsed, used, v.nextID, next)
			}
			put("later", 40_000)
			wait(t, v.Volume)
			check(v.Volume)
			if err := v.Close(ctx); err != nil {
				t.Fatal(err)
			}
			r := recoverVolume(t, pool, v.words)
			defer r.Close(ctx)
			check(r.Volume)
		})
	}
}

// TestLostLocalStateReplacesNothing: with the device file alone a volume must
// not pass for an empty one, nor take the place of what is published.
func TestLostLocalStateReplacesNothing(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	data := random(100_000)
	v.put(t, "file", data)
	wait(t, v.Volume)
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"meta", "journal"} {
		if err := os.RemoveAll(filepath.Join(v.dir, part)); err != nil {
			t.Fatal(err)
		}
	}
	v.open(t, pool.device(t))
	v.put(t, "other", data[:100])
	until(t, "the volume to refuse", func() bool { return v.failure() != nil })
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	r := recoverVolume(t, pool, v.words)
	wantContent(t, r.Volume, "file", data)
	if err := r.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"meta", "journal"} {
		if err := os.RemoveAll(filepath.Join(v.dir, part)); err != nil {
			t.Fatal(err)
		}
	}
	v.repair(t, pool)
	wantContent(t, v.Volume, "file", data)
	wait(t, v.Volume)
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
}
