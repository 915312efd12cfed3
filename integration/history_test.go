package integration

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ledger numbers what a mount acknowledges to several loads, and knows up to
// where flushes that returned have covered it: a flush covers everything that
// was acknowledged before it was asked for, whoever asked.
type ledger struct {
	mu      sync.Mutex
	count   uint64 // acknowledged
	durable uint64 // of those, covered by a flush that returned
	cutting bool   // the power is going: what returns from here on was never heard

	// Of the last crash. What is lost must be newer than what is kept.
	powerLost bool   // else only the process died: nothing may be lost
	kept      uint64 // what was acknowledged before the newest change that is there began
	lost      uint64 // number of the oldest change that was acknowledged and is gone; 0: none
	lostCount int
}

func (l *ledger) now() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

func (l *ledger) acknowledge() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	return l.count
}

// flush flushes a file or directory, and so all that was acknowledged before.
func (l *ledger) flush(path string) error {
	return l.flushed(func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Sync()
	})
}

// flushed counts what was acknowledged before fn, a flush, as durable if that succeeds.
func (l *ledger) flushed(fn func() error) error {
	before := l.now()
	err := fn()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && l.cutting {
		err = errors.New("returned after the power was cut")
	}
	if err == nil {
		l.durable = max(l.durable, before)
	}
	return err
}

// cut is called just before the power is.
func (l *ledger) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cutting = true
}

// crashed begins the checks after a crash.
func (l *ledger) crashed(powerLost bool) {
	l.cutting = false
	l.powerLost, l.kept, l.lost, l.lostCount = powerLost, 0, 0, 0
	if !powerLost {
		l.durable = l.count
	}
}

// inOrder says whether the newest changes were lost, and no older ones.
func (l *ledger) inOrder() error {
	if l.lost > 0 && l.lost <= l.kept {
		return fmt.Errorf("change %d is lost, and one that began after %d is there", l.lost, l.kept)
	}
	return nil
}

// history is a load that changes a small tree in every way, one change after
// the other, and remembers them. After a crash the tree must be as it was after
// one of them, no older than what was promised. It goes on from there.
type history struct {
	dir    string
	ledger *ledger
	syncs  int // of 1,000 steps, so many flush

	past    *shape   // on which the changes build; all of it is durable
	changes []change // in order; only the last may be unanswered
	now     *shape   // after all that were acknowledged
	names   int      // made so far
	writes  uint64   // seeds of what is written
	kept    uint64   // the ledger's count when the newest change of past began

	wrong error // what was read while nothing had crashed

	filesChecked, bytesChecked int64
}

// change is one change, or a part of one, and what it makes of the tree.
type change struct {
	what         string
	apply        func(*shape)
	began        uint64 // so much was acknowledged before
	acknowledged uint64 // number in the ledger; 0: unanswered
	synced       bool   // it was a flush too
}

// Bounds of a history's tree.
const (
	historyFiles     = 24
	historyDirs      = 4
	historyFileBytes = 128 << 10
)

func newHistory(dir string, l *ledger) *history {
	return &history{dir: dir, ledger: l, past: &shape{objects: map[string]*object{}}, now: &shape{objects: map[string]*object{}}}
}

// make makes the directory, for good.
func (h *history) make() error {
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		return err
	}
	return h.ledger.flush(h.dir)
}

func (h *history) path(name string) string { return filepath.Join(h.dir, name) }

// do makes one change, in parts of which each is done wholly or not at all, in
// this order.
func (h *history) do(what string, call func() error, parts ...func(*shape)) error {
	c := change{what: what, began: h.ledger.now()}
	err := call()
	if err == nil {
		c.acknowledged = h.ledger.acknowledge()
	} else {
		err = fmt.Errorf("%s: %w", what, err)
	}
	for _, c.apply = range parts {
		h.changes = append(h.changes, c)
		if err == nil {
			c.apply(h.now)
		}
	}
	return err
}

// newName is a name that was never used, in one of the directories.
func (h *history) newName(dirs []string) string {
	h.names++
	return filepath.Join(dirs[rand.IntN(len(dirs))], fmt.Sprint("n", h.names))
}

func (h *history) step() error {
	h.forget()
	files, dirs := h.now.names()
	if rand.IntN(1000) < h.syncs {
		return h.ledger.flush(h.path(append(files, dirs...)[rand.IntN(len(files)+len(dirs))]))
	}
	if len(files) < 4 {
		return h.create(h.newName(dirs))
	}
	name, other := files[rand.IntN(len(files))], files[rand.IntN(len(files))]
	size := len(h.now.objects[name].content)
	switch n := rand.IntN(100); {
	case n < 10 && len(files) < historyFiles:
		return h.create(h.newName(dirs))
	case n < 30:
		return h.write(name, size)
	case n < 45:
		return h.write(name, rand.IntN(size+1))
	case n < 50:
		return h.truncate(name, rand.IntN(historyFileBytes))
	case n < 53:
		return h.truncate(name, 0)
	case n < 58:
		return h.punch(name, rand.IntN(size+1), 1+rand.IntN(16<<10))
	case n < 63:
		return h.store(name, size/os.Getpagesize())
	case n < 66:
		return h.chmod(name, uint32(0o600+rand.IntN(0o100)))
	case n < 70 && len(files) < historyFiles:
		return h.link(name, h.newName(dirs))
	case n < 76:
		return h.rename(name, h.newName(dirs))
	case n < 82: // over another: old or new, never neither
		return h.rename(name, other)
	case n < 85:
		return h.exchange(name, other)
	case n < 90:
		return h.unlink(name)
	case n < 95:
		return h.directories(dirs)
	default:
		return h.read(name)
	}
}

func (h *history) create(name string) error {
	return h.do("create "+name, func() error {
		f, err := os.OpenFile(h.path(name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		return f.Close()
	}, func(s *shape) { s.objects[name] = newObject(false, 0o600) })
}

// open opens a file, calls fn, and closes it.
func (h *history) open(name string, flag int, fn func(f *os.File) error) error {
	f, err := os.OpenFile(h.path(name), flag, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return fn(f)
}

// write may be split by the kernel, between pages.
func (h *history) write(name string, off int) error {
	room := historyFileBytes - off
	if room <= 0 {
		return h.truncate(name, off/2)
	}
	h.writes++
	b := make([]byte, 1+rand.IntN(min(room, 32<<10)))
	pattern(b, h.writes, int64(off))
	var parts []func(*shape)
	for at := 0; at < len(b); {
		from, to := at, min(len(b), at+os.Getpagesize()-(off+at)%os.Getpagesize())
		parts = append(parts, func(s *shape) { s.objects[name].write(off+from, b[from:to]) })
		at = to
	}
	return h.do(fmt.Sprintf("write %s at %d, %d bytes", name, off, len(b)), func() error {
		return h.open(name, os.O_WRONLY, func(f *os.File) error {
			_, err := f.WriteAt(b, int64(off))
			return err
		})
	}, parts...)
}

// store writes one whole page through a shared mapping, and flushes it.
func (h *history) store(name string, pages int) error {
	if pages == 0 {
		return h.write(name, 0)
	}
	h.writes++
	off := rand.IntN(pages) * os.Getpagesize()
	b := make([]byte, os.Getpagesize())
	pattern(b, h.writes, int64(off))
	err := h.do(fmt.Sprintf("store %s at %d", name, off), func() error {
		return h.open(name, os.O_RDWR, func(f *os.File) (err error) {
			page, err := unix.Mmap(int(f.Fd()), int64(off), len(b), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, unix.Munmap(page)) }()
			if err := mayFault(func() { copy(page, b) }); err != nil {
				return err
			}
			return h.ledger.flushed(func() error { return unix.Msync(page, unix.MS_SYNC) })
		})
	}, func(s *shape) { s.objects[name].write(off, b) })
	h.changes[len(h.changes)-1].synced = err == nil
	return err
}

// mayFault turns the SIGBUS of a mapping that cannot be read into an error.
func mayFault(fn func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("memory: %v", r)
		}
	}()
	fn()
	return nil
}

func (h *history) truncate(name string, size int) error {
	return h.do(fmt.Sprintf("truncate %s to %d", name, size), func() error { return os.Truncate(h.path(name), int64(size)) },
		func(s *shape) { s.objects[name].resize(size) })
}

func (h *history) punch(name string, off, length int) error {
	return h.do(fmt.Sprintf("punch %s at %d, %d bytes", name, off, length), func() error {
		return h.open(name, os.O_WRONLY, func(f *os.File) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(length))
		})
	}, func(s *shape) {
		if o := s.objects[name]; off < len(o.content) {
			o.write(off, make([]byte, min(length, len(o.content)-off)))
		}
	})
}

func (h *history) chmod(name string, mode uint32) error {
	return h.do(fmt.Sprintf("chmod %s to %o", name, mode), func() error { return syscall.Chmod(h.path(name), mode) },
		func(s *shape) { s.objects[name].mode = mode })
}

func (h *history) link(name, to string) error {
	return h.do("link "+name+" to "+to, func() error { return os.Link(h.path(name), h.path(to)) },
		func(s *shape) { s.objects[to] = s.objects[name] })
}

func (h *history) unlink(name string) error {
	return h.do("unlink "+name, func() error { return syscall.Unlink(h.path(name)) }, func(s *shape) { delete(s.objects, name) })
}

func (h *history) rename(from, to string) error {
	return h.do("rename "+from+" to "+to, func() error { return syscall.Rename(h.path(from), h.path(to)) },
		func(s *shape) { s.rename(from, to) })
}

func (h *history) exchange(a, b string) error {
	return h.do("exchange "+a+" and "+b, func() error {
		return unix.Renameat2(unix.AT_FDCWD, h.path(a), unix.AT_FDCWD, h.path(b), unix.RENAME_EXCHANGE)
	}, func(s *shape) { s.objects[a], s.objects[b] = s.objects[b], s.objects[a] })
}

// directories makes, renames or removes a directory.
func (h *history) directories(dirs []string) error {
	dir := dirs[rand.IntN(len(dirs))]
	switch {
	case dir == "" && len(dirs) <= historyDirs:
		to := h.newName([]string{""})
		return h.do("mkdir "+to, func() error { return os.Mkdir(h.path(to), 0o700) },
			func(s *shape) { s.objects[to] = newObject(true, 0o700) })
	case dir == "":
		return nil
	case h.now.empty(dir):
		return h.do("rmdir "+dir, func() error { return syscall.Rmdir(h.path(dir)) }, func(s *shape) { delete(s.objects, dir) })
	default:
		return h.rename(dir, h.newName([]string{""}))
	}
}

// read compares a file with what belongs in it.
func (h *history) read(name string) error {
	got, err := readStored(h.path(name))
	if err == nil && !bytes.Equal(got, h.now.objects[name].content) {
		h.wrong = fmt.Errorf("%s was read wrong while nothing had crashed", h.path(name))
		return h.wrong
	}
	return err
}

// readStored reads a file past the kernel's cache.
func readStored(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := forgetPages(f); err != nil {
		return nil, err
	}
	return io.ReadAll(f)
}

// forget makes the changes that are durable part of the past.
func (h *history) forget() {
	h.ledger.mu.Lock()
	durable := h.ledger.durable
	h.ledger.mu.Unlock()
	count := 0
	for i, c := range h.changes {
		if c.synced || c.acknowledged > 0 && c.acknowledged <= durable {
			count = i + 1
		}
	}
	for _, c := range h.changes[:count] {
		c.apply(h.past)
		h.kept = c.began
	}
	h.changes = h.changes[count:]
}

func (h *history) check() error {
	if h.wrong != nil {
		return h.wrong
	}
	h.forget()
	got, err := readShape(h.dir)
	if err != nil {
		return err
	}
	h.filesChecked += int64(len(got.objects))
	for _, o := range got.objects {
		h.bytesChecked += int64(len(o.content))
	}
	there := got.String()
	s := h.past.clone()
	first, last := -1, -1 // the fewest and the most changes that make this tree
	for i := 0; ; i++ {
		if s.String() == there {
			if first < 0 {
				first = i
			}
			last = i
		}
		if i == len(h.changes) {
			break
		}
		h.changes[i].apply(s)
	}
	if last < 0 {
		return fmt.Errorf("%s was never like this, or not since what is durable:\n%s", h.dir, h.difference(there))
	}
	l := h.ledger
	if first > 0 {
		h.kept = h.changes[first-1].began
	}
	l.kept = max(l.kept, h.kept)
	var before uint64
	for _, c := range h.changes[last:] {
		if c.acknowledged == before || c.acknowledged == 0 {
			continue
		}
		before = c.acknowledged
		l.lostCount++
		if l.lost == 0 || before < l.lost {
			l.lost = before
		}
	}
	for _, c := range h.changes[:last] {
		c.apply(h.past)
	}
	h.now, h.changes = h.past.clone(), nil
	return nil
}

// difference tells a person how a tree differs from the newest one.
func (h *history) difference(there string) string {
	want := strings.Split(h.now.String(), "\n")
	got := strings.Split(there, "\n")
	var b strings.Builder
	for _, line := range want {
		if !slices.Contains(got, line) {
			fmt.Fprintf(&b, "acknowledged %s\n", line)
		}
	}
	for _, line := range got {
		if !slices.Contains(want, line) {
			fmt.Fprintf(&b, "there        %s\n", line)
		}
	}
	for i, c := range h.changes[max(0, len(h.changes)-40):] {
		fmt.Fprintf(&b, "%d: %s, acknowledged as %d\n", i, c.what, c.acknowledged)
	}
	return b.String()
}

func (h *history) close() {}

// shape is a tree: paths and what they lead to. Hard links share an object.
type shape struct{ objects map[string]*object }

type object struct {
	dir     bool
	mode    uint32
	content []byte // never changed in place
	sum     uint64 // of content
}

var sumSeed = maphash.MakeSeed()

func newObject(dir bool, mode uint32) *object {
	o := &object{dir: dir, mode: mode}
	o.set(nil)
	return o
}

func (o *object) set(content []byte) { o.content, o.sum = content, maphash.Bytes(sumSeed, content) }

func (o *object) resize(size int) {
	content := make([]byte, size)
	copy(content, o.content)
	o.set(content)
}

func (o *object) write(off int, b []byte) {
	content := make([]byte, max(len(o.content), off+len(b)))
	copy(content, o.content)
	copy(content[off:], b)
	o.set(content)
}

// names lists files, and directories with the root, sorted.
func (s *shape) names() (files, dirs []string) {
	dirs = []string{""}
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		if s.objects[name].dir {
			dirs = append(dirs, name)
		} else {
			files = append(files, name)
		}
	}
	return files, dirs
}

func (s *shape) empty(dir string) bool {
	for name := range s.objects {
		if strings.HasPrefix(name, dir+"/") {
			return false
		}
	}
	return true
}

// rename moves a name, and what is below it. Two names of one file stay.
func (s *shape) rename(from, to string) {
	if s.objects[from] == s.objects[to] {
		return
	}
	for _, name := range slices.Collect(maps.Keys(s.objects)) {
		if rest, below := strings.CutPrefix(name, from); below && (rest == "" || rest[0] == '/') {
			s.objects[to+rest] = s.objects[name]
			delete(s.objects, name)
		}
	}
}

func (s *shape) clone() *shape {
	copies := map[*object]*object{}
	c := &shape{objects: make(map[string]*object, len(s.objects))}
	for name, o := range s.objects {
		if copies[o] == nil {
			same := *o
			copies[o] = &same
		}
		c.objects[name] = copies[o]
	}
	return c
}

// String is the same for trees that cannot be told apart.
func (s *shape) String() string {
	var b strings.Builder
	first := map[*object]string{} // the first name of each
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		o := s.objects[name]
		if first[o] == "" {
			first[o] = name
		}
		fmt.Fprintf(&b, "%s is %s: directory %v, mode %o, %d bytes %x\n", name, first[o], o.dir, o.mode, len(o.content), o.sum)
	}
	return b.String()
}

// readShape reads a directory tree.
func readShape(dir string) (*shape, error) {
	s := &shape{objects: map[string]*object{}}
	inodes := map[uint64]*object{}
	return s, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		o := inodes[stat.Ino]
		if o == nil {
			o = newObject(stat.Mode&unix.S_IFMT == unix.S_IFDIR, stat.Mode&0o7777)
			if !o.dir {
				content, err := readStored(path)
				if err != nil {
					return err
				}
				if int64(len(content)) != stat.Size {
					return fmt.Errorf("%s: %d bytes read, its size is %d", path, len(content), stat.Size)
				}
				o.set(content)
			}
			inodes[stat.Ino] = o
		}
		s.objects[name] = o
		return nil
	})
}
