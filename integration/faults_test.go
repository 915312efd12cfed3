package integration

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// operationMax is how long any operation of an application may take.
const operationMax = 30 * time.Second

// coldFiles are files whose bytes are with the peers, to be read again and again.
type coldFiles struct {
	c     *cluster
	count int
	bytes int64 // of each
}

func (f *coldFiles) path(i int) string { return filepath.Join(f.c.mnt, "cold", fmt.Sprint(i)) }

func (f *coldFiles) make() {
	f.c.t.Helper()
	if err := os.Mkdir(filepath.Join(f.c.mnt, "cold"), 0o700); err != nil {
		f.c.t.Fatal(err)
	}
	for i := range f.count {
		if err := os.WriteFile(f.path(i), f.content(i), 0o600); err != nil {
			f.c.t.Fatal(err)
		}
	}
}

// content is what belongs in a file. Each second one does not compress.
func (f *coldFiles) content(i int) []byte {
	b := make([]byte, f.bytes)
	if i%2 == 0 {
		rand.NewChaCha8([32]byte{byte(i)}).Read(b)
	} else {
		pattern(b, uint64(i), 0)
	}
	return b
}

// read reads one file past the kernel's cache and compares.
func (f *coldFiles) read(i int) error {
	want := f.content(i)
	got, err := readStored(f.path(i))
	if err != nil {
		return err
	}
	if len(got) != len(want) {
		return fmt.Errorf("file %d has %d bytes, not %d", i, len(got), len(want))
	}
	if at := difference(got, want); at >= 0 {
		return fmt.Errorf("file %d differs at %d", i, at)
	}
	return nil
}

// phase works while something is wrong: it reads cold files, writes and syncs
// new ones, until there were enough of both. Nothing may fail or take long.
func (f *coldFiles) phase(name string, operations int) {
	t := f.c.t
	t.Helper()
	var reads, writes atomic.Int64
	var slowestRead, slowestWrite time.Duration
	var working sync.WaitGroup
	began := time.Now()
	enough := func(n *atomic.Int64) bool { return n.Load() >= int64(operations) || t.Failed() }
	timed := func(slowest *time.Duration, what string, operation func() error) {
		began := time.Now()
		if err := operation(); err != nil {
			t.Errorf("%s: %s after %v: %v", name, what, time.Since(began), err)
		}
		if took := time.Since(began); took > *slowest {
			*slowest = took
		}
	}
	working.Go(func() {
		for !enough(&reads) {
			if err := f.c.dropCache(); err != nil {
				t.Error(err)
			}
			timed(&slowestRead, "read", func() error { return f.read(rand.IntN(f.count)) })
			reads.Add(1)
		}
	})
	working.Go(func() {
		l := &appender{path: filepath.Join(f.c.mnt, "written "+name), seed: 7, sync: true}
		defer func() { l.close() }()
		for !enough(&writes) || !enough(&reads) {
			timed(&slowestWrite, "write", l.step)
			writes.Add(1)
		}
		timed(&slowestWrite, "check", l.check)
	})
	working.Wait()
	t.Logf("%-28s %4d cold reads, slowest %6v; %5d synced writes, slowest %6v; %v", name,
		reads.Load(), slowestRead.Round(time.Millisecond), writes.Load(), slowestWrite.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	if slowestRead > operationMax || slowestWrite > operationMax {
		t.Errorf("%s: an operation took longer than %v", name, operationMax)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// Nodes are killed, stopped, and lie about what they store. The application
// that uses the mount notices nothing but time.
func TestNodesFail(t *testing.T) {
	c := newCluster(t, "4+2", 8)
	c.mountNow()
	c.waitNodes(8)
	f := &coldFiles{c: c, count: 12, bytes: 3<<20 + 17}
	f.make()
	c.waitDurable(time.Minute)

	f.phase("all well", 20)
	c.nodes[0].kill()
	c.nodes[1].kill()
	f.phase("two killed", 20)
	f.phase("two dead", 20)
	c.startNode(0)
	c.startNode(1)
	c.waitNodes(8)
	f.phase("two back", 10)

	c.nodes[2].stop()
	f.phase("one stopped", 20)
	c.nodes[3].stop()
	f.phase("two stopped", 20)
	c.nodes[2].resume()
	c.nodes[3].resume()
	c.waitNodes(8)

	t.Logf("%d bits flipped in two running nodes", c.nodes[4].lie(t)+c.nodes[5].lie(t))
	f.phase("two lie", 20)
	c.nodes[4].kill()
	c.nodes[4].lie(t)
	c.startNode(4)
	f.phase("one lied while it was down", 20)
	t.Logf("durable after %v", c.waitDurable(time.Minute).Round(time.Millisecond))
	c.unmount()
}

// A node that holds what is needed is killed while it is being read from, and
// another one dies while it is written to.
func TestNodesFailUnderWay(t *testing.T) {
	c := newCluster(t, "4+2", 7)
	c.mountNow()
	c.waitNodes(7)
	const fileBytes = 24 << 20
	f := &coldFiles{c: c, count: 2, bytes: fileBytes}
	f.make()
	c.waitDurable(time.Minute)
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	for i, harm := range []func(){
		c.nodes[1].kill,
		c.nodes[2].stop,
	} {
		file, err := os.Open(f.path(i))
		if err != nil {
			t.Fatal(err)
		}
		if err := forgetPages(file); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		buffer := make([]byte, 64<<10)
		want := f.content(i)
		var slowest time.Duration
		harmed := false
		for off := 0; ; {
			if off >= fileBytes/8 && !harmed {
				harm()
				harmed = true
			}
			began := time.Now()
			n, err := file.Read(buffer)
			slowest = max(slowest, time.Since(began))
			if at := difference(buffer[:n], want[off:]); at >= 0 {
				t.Errorf("file %d differs at %d", i, off+at)
			}
			off += n
			if errors.Is(err, io.EOF) && off == fileBytes {
				break
			}
			if err != nil {
				t.Fatalf("read at %d: %v", off, err)
			}
		}
		file.Close()
		t.Logf("file %d: read in %v, slowest read %v", i, time.Since(began).Round(time.Millisecond), slowest.Round(time.Millisecond))
		if slowest > operationMax {
			t.Errorf("a read took %v", slowest)
		}
	}
	c.nodes[2].resume()
	c.startNode(1)
	c.waitNodes(7)

	// While a backlog is on its way.
	l := &appender{path: c.mnt + "/backlog", seed: 3}
	for i := range 600 {
		if i == 300 {
			c.nodes[3].kill()
		}
		if err := l.step(); err != nil {
			t.Fatal(err)
		}
	}
	c.waitRecoverable(time.Minute)
	c.startNode(3)
	t.Logf("durable after %v", c.waitDurable(time.Minute).Round(time.Millisecond))
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	if err := forgetPages(l.file); err != nil {
		t.Fatal(err)
	}
	l.close()
	if err := l.check(); err != nil {
		t.Error(err)
	}
	c.unmount()
}
