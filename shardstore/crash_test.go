package shardstore

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

// faultFile is a pack file whose flushes can be made to fail or hang, and
// which knows how much of it has been flushed.
type faultFile struct {
	File
	path   string
	faults *faults
}

type faults struct {
	mu       sync.Mutex
	synced   map[string]int64
	hold     chan struct{} // when set, Sync waits for it and then fails
	syncErr  error
	writeErr error
}

func (fs *faults) open(path string, create bool) (File, error) {
	f, err := OSFile(path, create)
	return faultFile{f, path, fs}, err
}

func (f faultFile) Sync() error {
	f.faults.mu.Lock()
	hold, err := f.faults.hold, f.faults.syncErr
	f.faults.mu.Unlock()
	if hold != nil {
		<-hold
		return errors.New("power is gone")
	}
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err := errors.Join(err, f.File.Sync()); err != nil {
		return err
	}
	f.faults.mu.Lock()
	f.faults.synced[f.path] = max(f.faults.synced[f.path], size)
	f.faults.mu.Unlock()
	return nil
}

func (f faultFile) WriteVecAt(bufs [][]byte, off int64) error {
	f.faults.mu.Lock()
	err := f.faults.writeErr
	f.faults.mu.Unlock()
	if err != nil {
		half := len(bufs) / 2
		return errors.Join(f.File.WriteVecAt(bufs[:half], off), err)
	}
	return f.File.WriteVecAt(bufs, off)
}

// image copies the packs as they are now; each 512-byte sector that was never
// flushed survives with the given chance.
func (fs *faults) image(t *rapid.T, from, to string, chance float64, rng *rand.Rand) {
	if err := os.MkdirAll(filepath.Join(to, "packs"), 0o700); err != nil {
		t.Fatal(err)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	paths, _ := filepath.Glob(filepath.Join(from, "packs", "*"))
	for _, p := range append(paths, filepath.Join(from, "store.id")) {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		rel, _ := filepath.Rel(from, p)
		if filepath.Ext(p) == ".pack" {
			synced, known := fs.synced[p]
			if !known && rng.Float64() < 0.3 {
				continue // the directory entry was not flushed either
			}
			end := synced + int64(rng.Float64()*float64(int64(len(b))-synced))
			if rng.IntN(2) == 0 {
				end = int64(len(b))
			}
			b = b[:end]
			for i := synced; i < end; i += 512 - i%512 {
				if rng.Float64() >= chance {
					clear(b[i:min(end, i+512-i%512)])
				}
			}
		}
		if err := os.WriteFile(filepath.Join(to, rel), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// What was answered is there after power loss, whatever became of the rest.
func TestPowerLoss(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		chance := rapid.SampledFrom([]float64{0, 0.5, 0.97, 1}).Draw(t, "chance")
		dir, err := os.MkdirTemp("", "shardstore")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		from, to := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		fs := &faults{synced: map[string]int64{}}
		o := testOptions(from)
		o.OpenFile, o.PackBytes = fs.open, 1<<17
		s, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		n := rapid.IntRange(0, 12).Draw(t, "answered")
		var answered []Shard
		for i := range n {
			sh := testShard(i, 1+rng.IntN(60_000))
			if err := s.PutShard(ctx, sh); err != nil {
				t.Fatal(err)
			}
			answered = append(answered, sh)
		}
		hold := make(chan struct{})
		fs.mu.Lock()
		fs.hold = hold
		fs.mu.Unlock()
		var wg sync.WaitGroup
		lost := rapid.IntRange(0, 8).Draw(t, "unanswered")
		for i := range lost {
			sh := testShard(100+i, 1+rng.IntN(60_000))
			wg.Go(func() {
				if err := s.PutShard(ctx, sh); err == nil {
					panic("answered without a flush")
				}
			})
		}
		for { // until all of them are in the page cache
			s.mu.Lock()
			at := s.lastSeq
			s.mu.Unlock()
			if at >= uint64(n+lost) {
				break
			}
		}
		fs.image(t, from, to, chance, rng)
		close(hold)
		wg.Wait()
		s.Close()

		o.Dir, o.OpenFile = to, OSFile
		for range 2 { // the second time after a clean close
			s, err = Open(o)
			if err != nil {
				t.Fatal(err)
			}
			if s.Usage().CorruptRecords != 0 {
				t.Fatal("a torn tail is reported as corruption")
			}
			for _, sh := range answered {
				r, err := s.ReadShard(sh.Key, 0, 0, nil)
				if err != nil || string(r.Coded) != string(sh.Body[columnBytes:]) {
					t.Fatalf("answered shard: %v", err)
				}
			}
			err = s.Shards(Key{}, func(i ShardInfo) bool {
				if _, err := s.ReadShard(i.Key, 0, 0, nil); err != nil {
					t.Fatalf("a shard in the index cannot be read: %v", err)
				}
				return true
			})
			sh := testShard(1000+len(answered), 20_000)
			if err := errors.Join(err, s.PutShard(ctx, sh), s.Close()); err != nil {
				t.Fatal(err)
			}
			answered = append(answered, sh)
		}
	})
}

func TestFailedFlushIsFinal(t *testing.T) {
	fs := &faults{synced: map[string]int64{}}
	o := testOptions(t.TempDir())
	o.OpenFile = fs.open
	s := mustOpen(t, o)
	good := testShard(1, 1000)
	if err := s.PutShard(ctx, good); err != nil {
		t.Fatal(err)
	}
	set := func(err error) { fs.mu.Lock(); fs.syncErr = err; fs.mu.Unlock() }
	set(errors.New("input/output error"))
	if err := s.PutShard(ctx, testShard(2, 1000)); !errors.Is(err, ErrFailed) {
		t.Fatalf("put with a failing flush: %v", err)
	}
	set(nil)
	if err := s.PutShard(ctx, testShard(3, 1000)); !errors.Is(err, ErrFailed) {
		t.Fatalf("put after a failed flush: %v", err)
	}
	checkShard(t, s, good)
}

func TestFailedWriteLeavesNothing(t *testing.T) {
	fs := &faults{synced: map[string]int64{}}
	o := testOptions(t.TempDir())
	o.OpenFile = fs.open
	s := mustOpen(t, o)
	set := func(err error) { fs.mu.Lock(); fs.writeErr = err; fs.mu.Unlock() }
	set(fmt.Errorf("write: %w", os.ErrDeadlineExceeded))
	if err := s.PutShard(ctx, testShard(1, 30_000)); err == nil {
		t.Fatal("failed write answered")
	}
	set(nil)
	sh := testShard(2, 30_000)
	if err := errors.Join(s.PutShard(ctx, sh), s.Close(), os.RemoveAll(filepath.Join(o.Dir, "index"))); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, o)
	checkShard(t, s, sh)
	if u := s.Usage(); u.Shards != 1 || u.CorruptRecords != 0 {
		t.Fatalf("%+v", u)
	}
}

// One flipped bit costs at most the record it is in, with the index kept and
// with the index lost.
func TestBitFlips(t *testing.T) {
	base := t.TempDir()
	o := testOptions(base)
	o.PackBytes = 1 << 17
	s := mustOpen(t, o)
	var all []Shard
	for i := range 12 {
		sh := testShard(i, 20_000+i)
		if err := s.PutShard(ctx, sh); err != nil {
			t.Fatal(err)
		}
		all = append(all, sh)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	packs, _ := filepath.Glob(filepath.Join(base, "packs", "*"))
	rng := rand.New(rand.NewPCG(3, 3))
	for round := range 40 {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(base)); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "packs", filepath.Base(packs[rng.IntN(len(packs))]))
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bit := rng.IntN(8 * len(b))
		if round < 10 {
			bit = 8*packHeaderBytes + rng.IntN(8*recordHeaderBytes) // the first header
		}
		b[bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if round%2 == 0 {
			if err := os.RemoveAll(filepath.Join(dir, "index")); err != nil {
				t.Fatal(err)
			}
		}
		o.Dir = dir
		s, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		bad := 0
		for _, sh := range all {
			r, err := s.ReadShard(sh.Key, 0, 0, nil)
			switch {
			case err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotFound):
				t.Fatal(err)
			case err != nil:
				bad++
				// Healing puts it back, whether the index knows it or not.
				if err := s.ReplaceShard(ctx, sh); err != nil {
					t.Fatal(err)
				}
				checkShard(t, s, sh)
			case string(r.Coded) != string(sh.Body[columnBytes:]):
				t.Fatal("damaged bytes were returned")
			}
		}
		if bad > 1 {
			t.Fatalf("bit %d of %s cost %d shards", bit, filepath.Base(path), bad)
		}
		if u := s.Usage(); bad == 1 && u.CorruptRecords == 0 {
			t.Fatalf("damage at bit %d is not reported", bit)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestIndexDamageIsRebuilt(t *testing.T) {
	o := testOptions(t.TempDir())
	s := mustOpen(t, o)
	sh := testShard(1, 50_000)
	if err := errors.Join(s.PutShard(ctx, sh), s.Close()); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(filepath.Join(o.Dir, "index", "*"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for i := range b {
			b[i] ^= 0x5a
		}
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = mustOpen(t, o)
	checkShard(t, s, sh)
}

// The store's id keeps bytes that others chose from being taken for records.
func TestForgedRecordInsideBody(t *testing.T) {
	o := testOptions(t.TempDir())
	s := mustOpen(t, o)
	forged := recordHeader{Kind: kindDelete, Store: [8]byte{1}, Seq: 100, Meta: 33}
	sh := testShard(1, 64<<10)
	for off := columnBytes; off+64 < len(sh.Body); off += 64 {
		copy(sh.Body[off:], forged.encode())
	}
	next := testShard(2, 1000)
	if err := errors.Join(s.PutShard(ctx, sh), s.PutShard(ctx, next), s.Close(), os.RemoveAll(filepath.Join(o.Dir, "index"))); err != nil {
		t.Fatal(err)
	}
	flipByte(t, filepath.Join(o.Dir, "packs", "0000000000000001.pack"), packHeaderBytes+9)
	s = mustOpen(t, o)
	checkShard(t, s, next)
	if u := s.Usage(); u.Shards != 1 || u.CorruptRecords != 1 {
		t.Fatalf("%+v", u)
	}
}

func flipByte(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0xff
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// A killed process loses nothing that it answered.
func TestSIGKILL(t *testing.T) {
	if dir := os.Getenv("SHARDSTORE_KILLED"); dir != "" {
		killedChild(dir)
	}
	dir := t.TempDir()
	o := testOptions(dir)
	next := 0
	for range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSIGKILL$")
		cmd.Env = append(os.Environ(), "SHARDSTORE_KILLED="+dir, fmt.Sprintf("SHARDSTORE_FIRST=%d", next))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var answered []int
		for len(answered) < 60 && lines.Scan() {
			var n int
			if _, err := fmt.Sscanf(lines.Text(), "stored %d", &n); err == nil {
				answered = append(answered, n)
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
			var n int
			if _, err := fmt.Sscanf(lines.Text(), "stored %d", &n); err == nil {
				answered = append(answered, n)
			}
		}
		cmd.Wait() // killed
		if len(answered) < 60 {
			t.Fatalf("child stored only %d shards", len(answered))
		}
		s, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range answered {
			checkShard(t, s, testShard(n, 1000+n*37%30_000))
			next = max(next, n+100)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func killedChild(dir string) {
	var first int
	fmt.Sscan(os.Getenv("SHARDSTORE_FIRST"), &first)
	s, err := Open(testOptions(dir))
	if err != nil {
		fmt.Println("open:", err)
		os.Exit(1)
	}
	var next atomic.Int64
	next.Store(int64(first))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				n := int(next.Add(1))
				if err := s.PutShard(ctx, testShard(n, 1000+n*37%30_000)); err != nil {
					fmt.Println("put:", err)
					os.Exit(1)
				}
				fmt.Printf("stored %d\n", n)
			}
		})
	}
	wg.Wait()
}
