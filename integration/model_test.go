package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/internal/powercut"
	"github.com/defs-fs/defs/internal/reference"
)

// Disturbances of the model test. Each is an operation of a list too.
const (
	remounted = "remount" // unmounted in order and mounted again
	killed    = "kill"    // SIGKILL of the process that serves the mount
	powerCut  = "cut"     // of the volume's local state
	dropped   = "drop"    // of all local content: what is read after it comes from the peers
	forgotten = "forget"  // what the kernel has cached of the mount
)

var disturbances = []string{remounted, killed, powerCut, dropped, forgotten}

const (
	roundOps   = 2000 // a failing round is what is made shorter
	disturbOps = 250  // between two disturbances
	compareOps = 125  // between two looks at everything
	opTimeout  = 2 * time.Minute
	shrinkTime = 4 * time.Minute
)

// lab runs operations on a mount and on the reference.
type lab struct {
	*cluster
	disk *powercut.Disk
	fs   *executor
	now  *world

	// What a power cut may leave: base, then the operations of log one after the
	// other, at least synced of them.
	base   *world
	log    []step
	synced int

	happened map[string]int
	lost     int // operations that power cuts have taken back
	slowest  time.Duration
}

// step is an operation and what a program saw of it.
type step struct {
	op
	result
}

func newLab(t *testing.T, filesystem string) *lab {
	t.Helper()
	disk := powercut.New(t, filesystem)
	l := &lab{disk: disk, happened: make(map[string]int)}
	l.cluster = newClusterAt(t, filepath.Join(disk.Dir, "device"), "2+1", 3)
	l.fs = newExecutor(l.mnt)
	t.Cleanup(l.fs.closeAll)
	l.remount()
	l.adopt()
	return l
}

func (l *lab) remount() { l.slowest = max(l.slowest, l.mountNow()) }

// adopt starts a round: the root directory is empty, and is as it is.
func (l *lab) adopt() {
	l.t.Helper()
	found, err := l.fs.look()
	if err != nil {
		l.t.Fatal(err)
	}
	tree := reference.New()
	st := found["."].stat
	tree.Root.Ino, tree.Root.Mode, tree.Root.UID, tree.Root.GID = st.Ino, st.Mode, st.Uid, st.Gid
	tree.Root.Mtime = reference.Times{From: st.Mtim.Nano(), To: st.Mtim.Nano()}
	tree.Root.Ctime = reference.Times{From: st.Ctim.Nano(), To: st.Ctim.Nano()}
	tree.Root.Xattrs = found["."].xattrs
	l.now = &world{tree: tree}
	if err := l.now.compare(found); err != nil {
		l.t.Fatalf("a round does not start empty: %v", err)
	}
	if errno := l.fs.fsyncDir("."); errno != 0 {
		l.t.Fatal(errno)
	}
	l.settled()
}

// settled notes that nothing is lost of what is now.
func (l *lab) settled() { l.base, l.log, l.synced = l.now.clone(), nil, 0 }

// do does one operation, or one disturbance, and compares.
func (l *lab) do(o op) error {
	if slices.Contains(disturbances, o.Kind) {
		if err := l.disturb(o.Kind); err != nil {
			return fmt.Errorf("after %s: %w", o.Kind, err)
		}
		return nil
	}
	stuck := time.AfterFunc(opTimeout, func() { panic(fmt.Sprintf("an operation takes more than %v: %+v", opTimeout, o)) })
	r := l.fs.run(o)
	stuck.Stop()
	if err := l.now.apply(o, r); err != nil {
		text, _ := json.Marshal(o)
		return fmt.Errorf("%s: %w", text, err)
	}
	l.log = append(l.log, step{o, r})
	if l.flushes(o, r) {
		l.synced = len(l.log)
	}
	return nil
}

// flushes says whether an operation that was acknowledged has flushed
// everything before it.
func (l *lab) flushes(o op, r result) bool {
	switch o.Kind {
	case "parallel":
		return true
	case "fsync", "fdatasync":
		return l.now.open[o.Handle].node != nil
	case "write":
		return r.n > wholeBytes
	case "mmap":
		return len(r.data) > 0
	}
	return o.Kind == "fsyncdir" && r.errno == 0
}

// compare looks at everything in the mount, and at what is open and has no name.
func (l *lab) compare() error {
	found, err := l.fs.look()
	if err != nil {
		return err
	}
	if err := l.now.compare(found); err != nil {
		return err
	}
	for i, h := range l.now.open {
		if h.node == nil {
			continue
		}
		for _, o := range []op{{Kind: "fstat", Handle: i}, {Kind: "read", Handle: i, Len: len(h.node.Data) + 1}} {
			if err := l.now.apply(o, l.fs.run(o)); err != nil {
				return fmt.Errorf("handle %d: %w", i, err)
			}
		}
	}
	return nil
}

func (l *lab) disturb(kind string) error {
	switch kind {
	case forgotten:
		if err := l.fs.forget(); err != nil {
			return err
		}
	case dropped:
		if err := l.dropLocal(); err != nil {
			return err
		}
	case remounted:
		l.fs.closeAll()
		l.now.closeAll()
		l.unmount()
		l.remount()
	case killed:
		l.killMount()
		l.fs.closeAll()
		l.now.closeAll()
		if l.happened[kind]%3 == 0 { // else the mount is the first to open what is left
			l.fsck()
		}
		l.remount()
	case powerCut:
		l.disk.Cut()
		l.killMount()
		l.fs.closeAll()
		l.disk.Restore()
		if l.happened[kind]%3 == 0 {
			l.fsck()
		}
		l.remount()
		if err := l.recovered(); err != nil {
			return err
		}
	}
	l.happened[kind]++
	if err := l.compare(); err != nil {
		return err
	}
	if kind == remounted || kind == killed || kind == powerCut {
		// A killed process has flushed nothing, and the next cut may come soon.
		if errno := l.fs.fsyncDir("."); errno != 0 {
			return errno
		}
		l.settled()
	}
	return nil
}

// recovered finds out which of the states that it may be a power cut has left.
func (l *lab) recovered() error {
	found, err := l.fs.look()
	if err != nil {
		return err
	}
	w := l.base
	var first error
	for i := 0; ; i++ {
		if i >= l.synced {
			err := w.compare(found)
			if err == nil {
				l.lost += len(l.log) - i
				w.closeAll()
				l.now = w
				return nil
			}
			if first == nil {
				first = err
			}
		}
		if i == len(l.log) {
			return fmt.Errorf("the state is none of the %d that the cut may leave; the last differs: %w; the flushed one: %w", i-l.synced+1, err, first)
		}
		_ = w.apply(l.log[i].op, l.log[i].result) // compared when it was done
	}
}

// dropLocal waits for the peers to have everything and removes it here. Files
// that are open and have no name never leave, and keep what lies beside them:
// they are closed first, and gone a moment later.
func (l *lab) dropLocal() error {
	const handle = handles - 1
	list := []op{
		{Kind: "open", Path: "ballast", Handle: handle, Flags: unix.O_CREAT, Mode: 0o600},
		{Kind: "write", Handle: handle, Len: 5000, Seed: 1},
		{Kind: "close", Handle: handle},
	}
	for i, h := range l.now.open {
		if h.node != nil && h.node.Links == 0 {
			list = append(list, op{Kind: "close", Handle: i})
		}
	}
	for _, o := range list {
		if err := l.do(o); err != nil {
			return err
		}
	}
	eventually(l.t, time.Minute, "local content can be dropped", func() bool {
		l.waitDurable(time.Minute)
		var d control.Dropped
		if err := l.control(30*time.Second, func(ctx context.Context, client *control.Client) (err error) {
			d, err = client.DropCache(ctx, false)
			return err
		}); err != nil {
			l.t.Fatal(err)
		}
		return d.Bytes > 0
	})
	return l.fs.forget()
}

// clear removes everything, by operations.
func (l *lab) clear() error {
	var list []op
	for i := range l.now.open {
		list = append(list, op{Kind: "close", Handle: i})
	}
	var remove func(p string, n *reference.Node)
	remove = func(p string, n *reference.Node) {
		for name, child := range n.Names {
			remove(path.Join(p, name), child)
		}
		switch {
		case n == l.now.tree.Root:
		case n.IsDir():
			list = append(list, op{Kind: "rmdir", Path: p})
		default:
			list = append(list, op{Kind: "unlink", Path: p})
		}
	}
	remove(".", l.now.tree.Root)
	for _, o := range list {
		if err := l.do(o); err != nil {
			return err
		}
	}
	return nil
}

// replay runs a list on a new volume and says what went wrong.
func replay(t *testing.T, filesystem string, list []op) error {
	l := newLab(t, filesystem)
	for i, o := range list {
		if err := l.do(o); err != nil {
			return fmt.Errorf("operation %d: %w", i, err)
		}
	}
	return l.compare()
}

// Random operations on a mount do what they do in a filesystem in memory,
// across remounts, kills, power cuts, and with content that only peers have.
func TestModel(t *testing.T) {
	total := number(t, "DEFS_MODEL_OPS", 4000)
	seed := uint64(number(t, "DEFS_MODEL_SEED", int(time.Now().UnixNano()>>10)))
	for _, filesystem := range powercut.Filesystems {
		t.Run(filesystem, func(t *testing.T) {
			if file := os.Getenv("DEFS_MODEL_REPLAY"); file != "" {
				list, err := readOps(file)
				if err == nil {
					err = replay(t, filesystem, list)
				}
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var round []op
			if !t.Run("run", func(t *testing.T) { runModel(t, filesystem, seed, total/len(powercut.Filesystems), &round) }) {
				reduce(t, filesystem, seed, round)
			}
		})
	}
}

// reduce makes a failing round as short as it gets, and shows it.
func reduce(t *testing.T, filesystem string, seed uint64, round []op) {
	fails := func(list []op) bool {
		return !t.Run("again", func(t *testing.T) {
			if err := replay(t, filesystem, list); err != nil {
				t.Fatal(err)
			}
		})
	}
	if fails(round) {
		round = shrink(round, time.Now().Add(shrinkTime), fails)
	} else {
		t.Log("the failing round does not fail on a new volume")
	}
	file := filepath.Join(os.TempDir(), fmt.Sprintf("model-%s-%d.json", filesystem, seed))
	if err := writeOps(file, round); err != nil {
		t.Error(err)
	}
	t.Errorf("DEFS_MODEL_SEED=%d: %d operations fail; DEFS_MODEL_REPLAY=%s runs them again", seed, len(round), file)
	for _, o := range round[:min(len(round), 50)] {
		text, _ := json.Marshal(o)
		t.Log(string(text))
	}
}

func number(t *testing.T, variable string, otherwise int) int {
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q is no number", variable, text)
	}
	return n
}

// runModel runs the rounds. round is what the one that runs has done.
func runModel(t *testing.T, filesystem string, seed uint64, total int, round *[]op) {
	l := newLab(t, filesystem)
	rng := rand.New(rand.NewPCG(seed, 1))
	var kinds []string // that are still to come
	began := time.Now()
	fail := func(done int, err error) {
		if err != nil {
			t.Fatalf("DEFS_MODEL_SEED=%d, operation %d: %v", seed, done, err)
		}
	}
	for done := 0; done < total; {
		*round = nil
		for i := 0; i < roundOps && done < total; i++ {
			var next []op
			if i%disturbOps == disturbOps-1 {
				if len(kinds) == 0 {
					kinds = slices.Clone(disturbances)
					rng.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
				}
				next, kinds = []op{{Kind: kinds[0]}}, kinds[1:]
			} else {
				next = (&generator{Rand: rng, w: l.now}).next()
			}
			for _, o := range next {
				*round = append(*round, o)
				fail(done, l.do(o))
				done += 1
				for _, list := range o.Threads {
					done += len(list)
				}
			}
			if i%compareOps == 0 {
				fail(done, l.compare())
			}
		}
		fail(done, l.compare())
		fail(done, l.clear())
		l.adopt()
		if t.Failed() {
			return
		}
	}
	l.fs.closeAll()
	l.unmount()
	l.fsck()
	t.Logf("DEFS_MODEL_SEED=%d: %d operations in %v; %v; power cuts took back %d operations that nobody had flushed; slowest mount %v",
		seed, total, time.Since(began).Round(time.Second), l.happened, l.lost, l.slowest.Round(time.Millisecond))
	for _, kind := range disturbances {
		if l.happened[kind] == 0 {
			t.Errorf("there was no %s", kind)
		}
	}
	if l.lost == 0 {
		t.Error("no power cut has lost anything")
	}
}

// shrink removes operations as long as what is left still fails.
func shrink(list []op, until time.Time, fails func([]op) bool) []op {
	for size := len(list) / 2; size > 0; size /= 2 {
		for at := 0; at < len(list) && time.Now().Before(until); {
			without := slices.Concat(list[:at], list[min(at+size, len(list)):])
			if fails(without) {
				list = without
			} else {
				at += size
			}
		}
	}
	return list
}

func readOps(file string) (list []op, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return list, json.Unmarshal(b, &list)
}

func writeOps(file string, list []op) error {
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}

// A failing list becomes as short as it can be.
func TestShrink(t *testing.T) {
	var list []op
	for i := range 100 {
		list = append(list, op{Kind: "write", Off: i})
	}
	has := func(list []op, off int) bool {
		return slices.ContainsFunc(list, func(o op) bool { return o.Off == off })
	}
	short := shrink(list, time.Now().Add(time.Minute), func(list []op) bool { return has(list, 17) && has(list, 80) })
	if len(short) != 2 {
		t.Errorf("%d operations are left", len(short))
	}
}
