package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// load is work that knows what has been acknowledged to it. Its memory of that
// is outside the mount, so that it can tell after a crash what is missing.
type load interface {
	// step does one operation. An error says that the operation may have
	// happened or not; there are no more steps after one.
	step() error
	// check looks for everything that was acknowledged.
	check() error
	// close gives up open files.
	close()
}

// toolTimeout bounds what a tool may take in a step or check.
const toolTimeout = 60 * time.Second

// pattern fills b with the bytes that belong at an offset of a file.
func pattern(b []byte, seed uint64, off int64) {
	var word [8]byte
	for i := 0; i < len(b); {
		at := uint64(off) + uint64(i)
		binary.LittleEndian.PutUint64(word[:], (at/8+1)*0x9e3779b97f4a7c15^seed*0xbf58476d1ce4e5b9)
		i += copy(b[i:], word[at%8:])
	}
}

// appender writes at the end of a file, and calls fsync now and then or never.
type appender struct {
	path    string
	seed    uint64
	sync    bool
	file    *os.File
	written int64 // acknowledged by write
	tried   int64
}

func (a *appender) step() (err error) {
	if a.file == nil {
		if a.file, err = os.OpenFile(a.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err != nil {
			return err
		}
	}
	b := make([]byte, 1+rand.IntN(64<<10))
	pattern(b, a.seed, a.written)
	a.tried = a.written + int64(len(b))
	n, err := a.file.Write(b)
	a.written += int64(n)
	if err == nil && a.sync {
		err = a.file.Sync()
	}
	return err
}

func (a *appender) check() error {
	f, err := os.Open(a.path)
	if err != nil {
		if a.file == nil && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	if int64(len(b)) < a.written || int64(len(b)) > a.tried {
		return fmt.Errorf("%s has %d bytes, %d were acknowledged and %d tried", a.path, len(b), a.written, a.tried)
	}
	want := make([]byte, len(b))
	pattern(want, a.seed, 0)
	if at := difference(b, want); at >= 0 {
		return fmt.Errorf("%s differs at %d of %d bytes, %d acknowledged", a.path, at, len(b), a.written)
	}
	return nil
}

func (a *appender) close() { a.file.Close() }

func difference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// overwriter writes blocks of a file in place.
type overwriter struct {
	path         string
	file         *os.File
	acknowledged [overwriterBlocks]uint64 // version of each block
	tried        [overwriterBlocks]uint64
	version      uint64
}

const (
	overwriterBlocks = 128
	blockBytes       = 4096
)

func (o *overwriter) step() (err error) {
	if o.file == nil {
		if o.file, err = os.OpenFile(o.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err != nil {
			return err
		}
	}
	o.version++
	i := rand.IntN(overwriterBlocks)
	b := make([]byte, blockBytes)
	pattern(b, o.version, 0)
	o.tried[i] = o.version
	if _, err = o.file.WriteAt(b, int64(i)*blockBytes); err != nil {
		return err
	}
	o.acknowledged[i] = o.version
	return nil
}

func (o *overwriter) check() error {
	got, err := os.ReadFile(o.path)
	if err != nil {
		if o.version <= 1 && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	got = append(got, make([]byte, max(0, overwriterBlocks*blockBytes-len(got)))...)
	want := make([]byte, blockBytes)
	for i := range o.acknowledged {
		block := got[i*blockBytes:][:blockBytes]
		matches := false
		for _, version := range []uint64{o.acknowledged[i], o.tried[i]} {
			clear(want)
			if version > 0 {
				pattern(want, version, 0)
			}
			matches = matches || bytes.Equal(block, want)
		}
		if !matches {
			return fmt.Errorf("%s: block %d is neither version %d, which was acknowledged, nor %d", o.path, i, o.acknowledged[i], o.tried[i])
		}
	}
	return nil
}

func (o *overwriter) close() { o.file.Close() }

// replacer writes a new file and renames it over the old one, as editors do.
// The old or the new content must be there, whole.
type replacer struct {
	path                string
	sync                bool
	acknowledged, tried uint64
}

func (r *replacer) content(version uint64) []byte {
	b := make([]byte, 100+version*977%50000)
	pattern(b, version, 0)
	return b
}

func (r *replacer) step() error {
	r.tried = r.acknowledged + 1
	f, err := os.Create(r.path + ".new")
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(r.content(r.tried)); err != nil {
		return err
	}
	if r.sync {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(r.path+".new", r.path); err != nil {
		return err
	}
	r.acknowledged = r.tried
	return nil
}

func (r *replacer) check() error {
	b, err := os.ReadFile(r.path)
	if err != nil {
		if r.acknowledged == 0 && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if !bytes.Equal(b, r.content(r.acknowledged)) && !bytes.Equal(b, r.content(r.tried)) {
		return fmt.Errorf("%s: %d bytes are neither version %d, which was acknowledged, nor %d", r.path, len(b), r.acknowledged, r.tried)
	}
	return nil
}

func (r *replacer) close() {}

// gardener makes, links, renames and removes names in a directory.
type gardener struct {
	dir     string
	names   map[string]bool // that must be there
	unsure  map[string]bool // touched by the operation that failed
	counter int
}

func (g *gardener) step() error {
	if g.names == nil {
		if err := os.Mkdir(g.dir, 0o700); err != nil {
			return err
		}
		g.names, g.unsure = map[string]bool{}, map[string]bool{}
	}
	g.counter++
	name := fmt.Sprint("n", g.counter)
	path := filepath.Join(g.dir, name)
	var old string
	for n := range g.names {
		old = n
		break
	}
	clear(g.unsure)
	g.unsure[name], g.unsure[old] = true, true
	var err error
	gone := false
	switch {
	case old == "" || g.counter%4 < 2:
		err = os.Mkdir(path, 0o700)
	case g.counter%4 == 2:
		err, gone = os.Rename(filepath.Join(g.dir, old), path), true
	default:
		err, gone = os.Remove(filepath.Join(g.dir, old)), true
		name = ""
	}
	if err != nil {
		return err
	}
	if gone {
		delete(g.names, old)
	}
	if name != "" {
		g.names[name] = true
	}
	clear(g.unsure)
	return nil
}

func (g *gardener) check() error {
	entries, err := os.ReadDir(g.dir)
	if g.names == nil && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, e := range entries {
		there[e.Name()] = true
		if !g.names[e.Name()] && !g.unsure[e.Name()] {
			return fmt.Errorf("%s: %s was removed and is there", g.dir, e.Name())
		}
	}
	for name := range g.names {
		if !there[name] && !g.unsure[name] {
			return fmt.Errorf("%s: %s was made and is gone", g.dir, name)
		}
	}
	return nil
}

func (g *gardener) close() {}

// database runs SQLite transactions, each in a process of its own, whose exit
// code acknowledges it.
type database struct {
	path                string
	mode                string // of the journal: delete or wal
	acknowledged, tried int
}

func (d *database) step() error {
	statement := fmt.Sprintf("PRAGMA synchronous=FULL; BEGIN; INSERT INTO t VALUES (%d, hex(randomblob(500))); INSERT INTO t VALUES (-%d, 'x'); COMMIT;", d.tried+1, d.tried+1)
	if d.tried == 0 {
		statement = "PRAGMA journal_mode=" + d.mode + "; CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, note TEXT); " + statement
	}
	d.tried++
	if _, err := try(toolTimeout, "sqlite3", "-bail", d.path, statement); err != nil {
		return err
	}
	d.acknowledged++
	return nil
}

func (d *database) check() error {
	if d.acknowledged == 0 {
		return nil
	}
	out, err := try(toolTimeout, "sqlite3", d.path, "PRAGMA integrity_check; SELECT count(*), max(id), min(id) FROM t;")
	if err != nil {
		return err
	}
	for _, n := range []int{d.acknowledged, d.tried} {
		if out == fmt.Sprintf("ok\n%d|%d|-%d\n", 2*n, n, n) {
			return nil
		}
	}
	return fmt.Errorf("%s: %d transactions were acknowledged, %d tried; integrity check and count, max, min: %q", d.path, d.acknowledged, d.tried, out)
}

func (d *database) close() {}

// copier copies a tree again and again with cp -a.
type copier struct {
	source, dir string
	copied      int // whole copies that were acknowledged
}

func (c *copier) step() error {
	if _, err := try(toolTimeout, "cp", "-a", c.source, fmt.Sprint(c.dir, "-", c.copied)); err != nil {
		return err
	}
	c.copied++
	return nil
}

func (c *copier) check() error {
	for i := range c.copied {
		out, err := try(toolTimeout, "rsync", "-naHX", "--checksum", "--delete", "--itemize-changes", c.source+"/", fmt.Sprint(c.dir, "-", i, "/"))
		if err != nil {
			return err
		}
		if out != "" {
			return fmt.Errorf("copy %d differs: %s", i, strings.TrimSpace(out))
		}
	}
	return nil
}

func (c *copier) close() {}
