package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/internal/powercut"
)

// crashes returns how often a crash test crashes something: as DEFS_CRASHES
// says, else a few times.
func crashes(t *testing.T, few int) int {
	text := os.Getenv("DEFS_CRASHES")
	if text == "" {
		return few
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("DEFS_CRASHES=%q is no count", text)
	}
	return n
}

// remountMax is how long a mount may take to come back after a crash.
const remountMax = 5 * time.Second

// The process that serves the mount is killed in the middle of work. What was
// acknowledged is there when it is back, and nothing is half done.
func TestMountKilled(t *testing.T) {
	newCrasher(t, nil).run(crashes(t, 20))
}

// The power of the volume's disk is cut in the middle of work. What a flush
// that returned has covered is there afterwards; of the rest the newest changes
// may be gone, each wholly.
func TestPowerCut(t *testing.T) {
	for _, filesystem := range powercut.Filesystems {
		t.Run(filesystem, func(t *testing.T) {
			newCrasher(t, powercut.New(t, filesystem)).run((crashes(t, 20) + 1) / len(powercut.Filesystems))
		})
	}
}

// crasher crashes a mount again and again under the same loads, which go on
// from what each crash has left.
type crasher struct {
	*cluster
	disk   *powercut.Disk // of the volume; nil: the mount's process is killed
	source string         // is copied
	ledger ledger

	histories []*history
	loads     []load

	// Figures.
	faults, unsynced, unpublished int // faults; those that hit changes that no flush had covered, and bytes that no head had
	records, lost, acknowledged   int // unsynced records hit; changes lost that nobody had flushed; changes acknowledged
	slowest                       time.Duration
}

func newCrasher(t *testing.T, disk *powercut.Disk) *crasher {
	c := &crasher{disk: disk}
	device := ""
	if disk != nil {
		device = filepath.Join(disk.Dir, "device")
	}
	c.cluster = newClusterAt(t, device, "4+2", 6)
	c.source = filepath.Join(c.dir, "source")
	if err := os.Mkdir(c.source, 0o700); err != nil {
		t.Fatal(err)
	}
	makeTree(t, c.source)
	c.mountNow()
	for i := range 4 {
		h := newHistory(filepath.Join(c.mnt, fmt.Sprint("history-", i)), &c.ledger)
		if err := h.make(); err != nil {
			t.Fatal(err)
		}
		c.histories = append(c.histories, h)
		c.loads = append(c.loads, h)
	}
	c.loads = append(c.loads,
		&database{path: c.mnt + "/delete.db", mode: "delete"},
		&database{path: c.mnt + "/wal.db", mode: "wal"})
	return c
}

func (c *crasher) run(faults int) {
	t := c.t
	for round := 0; c.faults < faults; round++ {
		c.round(round)
		if t.Failed() {
			t.Fatalf("in round %d, after %d faults", round, c.faults)
		}
	}
	var files, bytes int64
	for _, h := range c.histories {
		files, bytes = files+h.filesChecked, bytes+h.bytesChecked
	}
	t.Logf("%d faults, of which %d hit changes that were not flushed (%d records) and %d hit bytes that were not published",
		c.faults, c.unsynced, c.records, c.unpublished)
	t.Logf("%d changes acknowledged; %d that nobody had flushed were lost, none that was, none wrong; %d files with %d MiB compared; slowest mount %v",
		c.acknowledged, c.lost, files, bytes>>20, c.slowest.Round(time.Millisecond))
	if c.unsynced == 0 || c.unpublished == 0 {
		t.Error("no fault hit anything that was at risk")
	}
	if c.disk != nil && c.lost == 0 {
		t.Error("the power cuts have cost nothing: they did not cut")
	}
	if c.slowest > remountMax {
		t.Errorf("a mount took %v to come back, at most %v was promised", c.slowest, remountMax)
	}

	// Also once it comes from the peers.
	t.Logf("durable after %v", c.waitDurable(2*time.Minute).Round(time.Millisecond))
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	c.unmount()
	c.mountNow()
	c.check("from the peers", c.loads)
	c.unmount()
	c.fsck()
}

// round works, crashes at a random moment, sometimes once more while mounting
// again, and looks for what must be there.
func (c *crasher) round(round int) {
	t := c.t
	syncs := []int{0, 10, 100}[rand.IntN(3)]
	for _, h := range c.histories {
		h.syncs = syncs
	}
	loads := c.loads
	if round%4 == 0 {
		dir := filepath.Join(c.mnt, fmt.Sprint("copies-", round))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.RemoveAll(dir); err != nil && !t.Failed() {
				t.Error(err)
			}
		}()
		loads = append(loads[:len(loads):len(loads)], &copier{source: c.source + "/dir-2", dir: dir + "/copy", ledger: &c.ledger})
	}
	before := c.ledger.now()
	powerLost := c.crashUnder(loads, int64(20+rand.IntN(1500)))
	c.acknowledged += int(c.ledger.now() - before)
	if rand.IntN(4) == 0 {
		c.startMount()
		time.Sleep(rand.N(100 * time.Millisecond)) // a random moment
		c.fault()
	}
	if round%2 == 1 { // else the mount itself is the first to open what the crash left
		c.fsck()
	}
	c.slowest = max(c.slowest, c.mountNow())
	c.ledger.crashed(powerLost)
	c.check(fmt.Sprint("round ", round), loads)
	c.lost += c.ledger.lostCount
}

func (c *crasher) check(when string, loads []load) {
	c.t.Helper()
	for _, l := range loads {
		if err := l.check(); err != nil {
			c.t.Errorf("%s: %v", when, err)
		}
	}
	if err := c.ledger.inOrder(); err != nil {
		c.t.Errorf("%s: %v", when, err)
	}
}

// fault crashes what the test is about. The mount's process is gone afterwards.
func (c *crasher) fault() {
	if c.disk != nil {
		c.ledger.cut()
		c.disk.Cut()
	}
	c.killMount()
	if c.disk != nil {
		c.disk.Restore()
	}
	c.faults++
}

// crashUnder runs the loads and crashes the mount when they have done so many
// steps: in the middle of work, of publishing, of evicting, or of unmounting.
// No load may fail before. It returns whether power was lost.
func (c *crasher) crashUnder(loads []load, stepsMin int64) (powerLost bool) {
	t := c.t
	t.Helper()
	var steps atomic.Int64
	var crashed, finish atomic.Bool
	var working sync.WaitGroup
	for _, l := range loads {
		working.Go(func() {
			for !finish.Load() {
				if err := l.step(); err != nil {
					if !crashed.Load() {
						t.Errorf("an operation failed before the crash: %v", err)
					}
					return
				}
				steps.Add(1)
			}
		})
	}
	again := func(ask func(context.Context, *control.Client) error) { // until the crash
		working.Go(func() {
			for !crashed.Load() {
				if err := c.control(time.Minute, ask); err != nil && !crashed.Load() {
					t.Errorf("before the crash: %v", err)
					return
				}
			}
		})
	}
	unmounting := false
	switch rand.IntN(8) {
	case 0, 1:
		again(func(ctx context.Context, client *control.Client) error {
			return client.WaitDurable(ctx, func(control.Status) {})
		})
	case 2:
		again(func(ctx context.Context, client *control.Client) error {
			_, err := client.DropCache(ctx, false)
			return err
		})
	case 3:
		unmounting = true
	}
	eventually(t, 5*time.Minute, "the loads work", func() bool { return steps.Load() >= stepsMin || t.Failed() })
	if unmounting {
		finish.Store(true)
		working.Wait()
	}
	status := c.status()
	if status.Journal.UnflushedRecords > 0 {
		c.unsynced++
		c.records += int(status.Journal.UnflushedRecords)
	}
	if status.Bytes.Journaled+status.Bytes.Queued > 0 {
		c.unpublished++
	}
	crashed.Store(true)
	if unmounting {
		working.Go(func() { _, _ = try(toolTimeout, program("defs"), "umount", c.mnt) })
		time.Sleep(rand.N(50 * time.Millisecond)) // a random moment
		powerLost = c.disk != nil && c.mount.running()
	} else {
		powerLost = c.disk != nil
	}
	c.fault()
	working.Wait()
	for _, l := range loads {
		l.close()
	}
	return powerLost
}

// The loads notice what a crash must not do. This needs no mount.
func TestLoadsNotice(t *testing.T) {
	truncate := func(path string) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, info.Size()-1)
	}
	for name, test := range map[string]struct {
		load   func(path string) load
		damage func(path string) error
	}{
		"an end cut off":        {func(p string) load { return &appender{path: p} }, truncate},
		"a lost transaction":    {func(p string) load { return &database{path: p, mode: "delete"} }, deleteLast},
		"a file lost in a copy": {func(p string) load { return &copier{source: ".", dir: p, ledger: &ledger{}} }, func(p string) error { return os.Remove(p + "-1/main_test.go") }},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x")
			l := test.load(path)
			for range 22 {
				if err := l.step(); err != nil {
					t.Fatal(err)
				}
			}
			l.close()
			if err := l.check(); err != nil {
				t.Fatal(err)
			}
			if err := test.damage(path); err != nil {
				t.Fatal(err)
			}
			if err := l.check(); err == nil {
				t.Error("not noticed")
			}
		})
	}
}

func deleteLast(path string) error {
	_, err := try(toolTimeout, "sqlite3", path, "DELETE FROM t WHERE id = (SELECT max(id) FROM t);")
	return err
}

// A history notices what is not as it was left, and what a power cut must not
// take; what it may take is counted.
func TestHistoryNotices(t *testing.T) {
	begin := func(t *testing.T) *history {
		h := newHistory(filepath.Join(t.TempDir(), "x"), &ledger{})
		if err := h.make(); err != nil {
			t.Fatal(err)
		}
		return h
	}
	work := func(t *testing.T, h *history, steps int) {
		t.Helper()
		for range steps {
			if err := h.step(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, damage := range map[string]func(dir, file string) error{
		"a byte too many": func(_, file string) error {
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.Write([]byte{0})
			return err
		},
		"a lost name":      func(_, file string) error { return os.Remove(file) },
		"a name come back": func(dir, _ string) error { return os.WriteFile(dir+"/n1.back", nil, 0o600) },
		"a changed mode":   func(_, file string) error { return os.Chmod(file, 0o100) },
		"another link":     func(dir, file string) error { return os.Link(file, dir+"/n") },
	} {
		t.Run(name, func(t *testing.T) {
			h := begin(t)
			work(t, h, 300)
			h.ledger.crashed(false)
			if err := h.check(); err != nil {
				t.Fatal(err)
			}
			files, _ := h.now.names()
			if err := damage(h.dir, h.path(files[0])); err != nil {
				t.Fatal(err)
			}
			if err := h.check(); err == nil {
				t.Error("not noticed")
			}
		})
	}
	for _, flushed := range []bool{false, true} {
		t.Run(fmt.Sprint("changes lost, flushed ", flushed), func(t *testing.T) {
			h := begin(t)
			work(t, h, 100)
			if err := h.ledger.flush(h.dir); err != nil {
				t.Fatal(err)
			}
			run(t, toolTimeout, "cp", "-a", h.dir, h.dir+".old")
			if err := h.create(h.newName([]string{""})); err != nil {
				t.Fatal(err)
			}
			if flushed {
				if err := h.ledger.flush(h.dir); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.RemoveAll(h.dir); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(h.dir+".old", h.dir); err != nil {
				t.Fatal(err)
			}
			h.ledger.crashed(true)
			if err := h.check(); (err != nil) != flushed {
				t.Error(err)
			}
			if !flushed && h.ledger.lostCount != 1 {
				t.Errorf("%d lost", h.ledger.lostCount)
			}
		})
	}
}
