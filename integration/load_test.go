package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
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

// database runs SQLite transactions, each in a process of its own, whose exit
// code acknowledges it. What was acknowledged survives a power cut, also where
// the end of a transaction is a name that is removed (EXTRA).
type database struct {
	path                string
	mode                string // of the journal: delete or wal
	acknowledged, tried int
}

func (d *database) step() error {
	d.tried = d.acknowledged + 1
	statement := fmt.Sprintf("PRAGMA journal_mode=%s; PRAGMA synchronous=EXTRA; CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, note TEXT); "+
		"BEGIN; INSERT INTO t VALUES (%d, hex(randomblob(500))); INSERT INTO t VALUES (-%d, 'x'); COMMIT;", d.mode, d.tried, d.tried)
	if _, err := try(toolTimeout, "sqlite3", "-bail", d.path, statement); err != nil {
		return err
	}
	d.acknowledged = d.tried
	return nil
}

// check goes on from what it finds.
func (d *database) check() error {
	if d.tried == 0 {
		return nil
	}
	out, err := try(toolTimeout, "sqlite3", "-bail", d.path, "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, note TEXT); PRAGMA integrity_check; SELECT count(*), max(id), min(id) FROM t;")
	if err != nil {
		return err
	}
	for n := d.acknowledged; n <= d.tried; n++ {
		if out == fmt.Sprintf("ok\n%d|%d|-%d\n", 2*n, n, n) || n == 0 && out == "ok\n0||\n" {
			d.acknowledged = n
			return nil
		}
	}
	return fmt.Errorf("%s: %d transactions were acknowledged, %d tried; integrity check and count, max, min: %q", d.path, d.acknowledged, d.tried, out)
}

func (d *database) close() {}

// copier copies a tree again and again with cp -a, and flushes each copy.
type copier struct {
	source, dir string
	ledger      *ledger
	copied      int // whole copies that were acknowledged
}

func (c *copier) step() error {
	dir := fmt.Sprint(c.dir, "-", c.copied)
	if _, err := try(toolTimeout, "cp", "-a", c.source, dir); err != nil {
		return err
	}
	if err := c.ledger.flush(dir); err != nil {
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
