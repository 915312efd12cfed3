package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/defs-fs/defs/internal/pooltest"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/placement"
)

// damageEnv makes TestDamageTable try every case, not a sample.
const damageEnv = "DEFS_DAMAGE"

// damageBase is the closed state of a volume, an older one of it, and what is
// in it.
type damageBase struct {
	name     string
	v        *testVolume
	pool     *testPool
	old, now string // directories
	files    map[string][]byte
	placed   map[string]bool // the peers have all of it
}

var damageOptions = Options{SegmentBytes: 1 << 20}

// newDamageBase makes a volume that was published, whose first segments are
// gone, and that has cached blocks; with unplaced, also changes that no peer has.
func newDamageBase(t *testing.T, unplaced bool) *damageBase {
	pool := newTestPool(t, 4)
	v := newTestVolume(t, pool, "rs-ratio:2+1")
	b := &damageBase{v: v, pool: pool, files: map[string][]byte{}, placed: map[string]bool{}, old: t.TempDir(), now: t.TempDir(),
		name: map[bool]string{false: "placed", true: "not placed"}[unplaced]}
	put := func(name string, n int) Ino {
		b.files[name], b.placed[name] = random(n), !unplaced
		return v.put(t, name, b.files[name])
	}
	reopen := func() {
		if err := v.Close(ctx); err != nil {
			t.Fatal(err)
		}
		opened, err := OpenDevice(ctx, v.dir, v.dev, pool.device(t), damageOptions)
		if err != nil {
			t.Fatal(err)
		}
		v.Volume = opened
	}
	first := put("first", 200_000)
	put("removed", 3000)
	wait(t, v.Volume)
	reopen()
	if _, err := v.DropCache(ctx, false); err != nil {
		t.Fatal(err)
	}
	wantContent(t, v.Volume, "first", b.files["first"]) // into the cached blocks
	put("second", 150_000)
	wait(t, v.Volume)
	b.placed["first"], b.placed["second"] = true, true
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	copyState(t, v.dir, b.old)
	transport := pool.device(t)
	if unplaced {
		transport = b.readOnly(t)
	}
	var err error
	if v.Volume, err = OpenDevice(ctx, v.dir, v.dev, transport, damageOptions); err != nil {
		t.Fatal(err)
	}
	if err := v.Unlink(ctx, RootIno, "removed"); err != nil {
		t.Fatal(err)
	}
	delete(b.files, "removed")
	copy(b.files["first"][70_000:], "changed")
	v.write(t, first, 70_000, []byte("changed"))
	b.placed["first"] = !unplaced
	put("third", 100_000)
	if !unplaced {
		wait(t, v.Volume)
	}
	if err := v.Close(ctx); err != nil {
		t.Fatal(err)
	}
	copyState(t, v.dir, b.now)
	return b
}

// readOnly is a way into the pool on which nothing can be changed: many copies
// of one device use it.
func (b *damageBase) readOnly(t *testing.T) *pooltest.Faulty {
	return &pooltest.Faulty{Transport: b.pool.device(t), Before: func(op string, _ placement.NodeID) error {
		if strings.HasPrefix(op, "get") || op == "has_shards" {
			return nil
		}
		return errCut
	}}
}

// damage is one way to spoil a file; it reports whether it changed anything.
type damage struct {
	name string
	do   func(t *testing.T, b *damageBase, dir, file string) bool
}

func spoil(change func(content []byte) []byte) func(*testing.T, *damageBase, string, string) bool {
	return func(t *testing.T, _ *damageBase, dir, file string) bool {
		path := filepath.Join(dir, file)
		was, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		now := change(bytes.Clone(was))
		if bytes.Equal(was, now) {
			return false
		}
		if err := os.WriteFile(path, now, 0o600); err != nil {
			t.Fatal(err)
		}
		return true
	}
}

func damages() []damage {
	var all []damage
	for _, at := range []int{0, 1, 3, 10, 25, 50, 75, 90, 100} { // hundredths of the file
		all = append(all, damage{fmt.Sprintf("bit flipped at %d%%", at), spoil(func(b []byte) []byte {
			if len(b) > 0 {
				b[min(len(b)*at/100, len(b)-1)] ^= 0x10
			}
			return b
		})})
	}
	for _, page := range []int{4096 + 60, 8192 + 60, 12288 + 60} {
		all = append(all, damage{fmt.Sprintf("bit flipped at byte %d", page), spoil(func(b []byte) []byte {
			if len(b) > page {
				b[page] ^= 1
			}
			return b
		})})
	}
	return append(all,
		damage{"cut in half", spoil(func(b []byte) []byte { return b[:len(b)/2] })},
		damage{"last byte cut off", spoil(func(b []byte) []byte { return b[:max(len(b)-1, 0)] })},
		damage{"emptied", spoil(func([]byte) []byte { return nil })},
		damage{"zeroed", spoil(func(b []byte) []byte { clear(b); return b })},
		damage{"deleted", func(t *testing.T, _ *damageBase, dir, file string) bool {
			return os.Remove(filepath.Join(dir, file)) == nil
		}},
		damage{"swapped with its neighbour", func(t *testing.T, _ *damageBase, dir, file string) bool {
			other := neighbour(t, dir, file)
			if other == "" {
				return false
			}
			path := filepath.Join(dir, file)
			err := errors.Join(os.Rename(path, path+".x"), os.Rename(other, path), os.Rename(path+".x", other))
			if err != nil {
				t.Fatal(err)
			}
			return true
		}},
		damage{"copied over its neighbour", func(t *testing.T, _ *damageBase, dir, file string) bool {
			other := neighbour(t, dir, file)
			if other == "" {
				return false
			}
			content, err := os.ReadFile(filepath.Join(dir, file))
			if err = errors.Join(err, os.WriteFile(other, content, 0o600)); err != nil {
				t.Fatal(err)
			}
			return true
		}},
		damage{"copied to a new number", func(t *testing.T, _ *damageBase, dir, file string) bool {
			if !strings.Contains(file, "0") {
				return false
			}
			content, err := os.ReadFile(filepath.Join(dir, file))
			to := filepath.Join(dir, strings.Replace(file, "0", "1", 1))
			if err = errors.Join(err, os.WriteFile(to, content, 0o600)); err != nil {
				t.Fatal(err)
			}
			return true
		}},
		damage{"replaced by an older copy", func(t *testing.T, b *damageBase, dir, file string) bool {
			older, err := os.ReadFile(filepath.Join(b.old, file))
			if err != nil {
				return false
			}
			return spoil(func([]byte) []byte { return older })(t, b, dir, file)
		}},
	)
}

// neighbour returns the next file of the same kind, "" where there is none.
func neighbour(t *testing.T, dir, file string) string {
	t.Helper()
	ext := filepath.Ext(file)
	prefix, _, _ := strings.Cut(filepath.Base(file), "-")
	entries, err := os.ReadDir(filepath.Join(dir, filepath.Dir(file)))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if p, _, _ := strings.Cut(e.Name(), "-"); e.Name() != filepath.Base(file) && filepath.Ext(e.Name()) == ext && (ext != "" || p == prefix) {
			return filepath.Join(dir, filepath.Dir(file), e.Name())
		}
	}
	return ""
}

// TestDamageTable spoils each file of a volume's local state in each way. The
// volume then opens, or says what to do and opens after a repair, or says why
// it cannot be repaired; it has the right names, and right bytes or errors.
func TestDamageTable(t *testing.T) {
	total := map[string]int{}
	refusals := map[string]int{}
	for _, unplaced := range []bool{false, true} {
		b := newDamageBase(t, unplaced)
		var files []string
		for _, part := range []string{"journal", "meta"} {
			entries, err := os.ReadDir(filepath.Join(b.now, part))
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if e.Name() != "LOCK" {
					files = append(files, filepath.Join(part, e.Name()))
				}
			}
		}
		transport := b.readOnly(t)
		n := 0
		for _, file := range files {
			for _, d := range damages() {
				if n++; os.Getenv(damageEnv) == "" && n%11 != 0 {
					continue
				}
				dir := filepath.Join(t.TempDir(), "volume")
				copyState(t, b.now, dir)
				if !d.do(t, b, dir, file) {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/%s", b.name, file, d.name), func(t *testing.T) {
					outcome, refusal := b.tryDamaged(t, dir, transport)
					total[outcome]++
					if refusal != "" {
						refusals[refusal]++
						t.Log(refusal)
					}
				})
				os.RemoveAll(dir)
			}
		}
	}
	for _, outcome := range slices.Sorted(maps.Keys(total)) {
		t.Logf("%4d %s", total[outcome], outcome)
	}
	if total["opened, all is right"] == 0 || total["refused, then repaired, all is right"] == 0 {
		t.Error("the table does not reach opening and repairing")
	}
}

// tryDamaged opens, or repairs and opens, a damaged copy and looks at all of it.
func (b *damageBase) tryDamaged(t *testing.T, dir string, transport *pooltest.Faulty) (outcome, refusal string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	v, err := OpenDevice(ctx, dir, b.v.dev, transport, damageOptions)
	var how string
	if err == nil {
		// What is wrong may only show when it is looked at.
		lost, right := b.look(t, v, true)
		_, wrong := faults(t, v)
		if err := v.Close(ctx); err != nil && right {
			t.Errorf("closing: %v", err)
		}
		switch {
		case right && !lost && wrong == "":
			return "opened, all is right", ""
		case right && lost:
			how = "opened, with errors for what is damaged"
		case right:
			how = "opened, all is right, fsck tells of the damage"
		default:
			how = "opened, with errors for all"
		}
		if wrong == "" {
			t.Errorf("%s, and fsck finds nothing", how)
		}
	} else {
		how = "refused"
		if !strings.Contains(err.Error(), "fsck --repair") {
			t.Errorf("refused without advice: %v", err)
		}
	}
	if _, err := Repair(ctx, dir, b.v.dev, transport, damageOptions); err != nil {
		if !errors.Is(err, errUnrepairable) {
			t.Errorf("repair: %v", err)
		}
		return how + ", cannot be repaired and says so", err.Error()
	}
	if v, err = OpenDevice(ctx, dir, b.v.dev, transport, damageOptions); err != nil {
		t.Fatalf("opening after a repair: %v", err)
	}
	defer v.Close(ctx)
	if _, _, err := v.RepairContent(ctx); err != nil {
		t.Errorf("repair of content: %v", err)
	}
	lost, _ := b.look(t, v, false)
	if _, err := v.Fsck(ctx, func(f Fault) {
		if !f.Lost {
			t.Errorf("after a repair: %+v", f)
		}
	}); err != nil {
		t.Error(err)
	}
	if lost {
		return how + ", then repaired, errors for what nobody has", ""
	}
	return how + ", then repaired, all is right", ""
}

// look compares names and bytes. lost: some cannot be read. right: the tree
// can be read; where it must not be so, mayFail is set.
func (b *damageBase) look(t *testing.T, v *Volume, mayFail bool) (lost, right bool) {
	t.Helper()
	var names []string
	err := v.db.ReadDir(RootIno, 0, func(e metastore.Dirent) bool { names = append(names, e.Name); return true })
	if err != nil {
		if !mayFail {
			t.Errorf("list: %v", err)
		}
		return false, false
	}
	slices.Sort(names)
	if want := slices.Sorted(maps.Keys(b.files)); !slices.Equal(names, want) {
		t.Errorf("names are %q, want %q", names, want)
		return false, false
	}
	for name, want := range b.files {
		a, err := v.Lookup(t.Context(), RootIno, name)
		if err != nil {
			if !mayFail {
				t.Errorf("%s: %v", name, err)
			}
			return false, false
		}
		if a.Size != uint64(len(want)) {
			t.Errorf("%s: %d bytes, want %d", name, a.Size, len(want))
			continue
		}
		if ok := readable(t, v, name, want); countTrue(ok) < len(ok) {
			lost = true
			if b.placed[name] {
				t.Errorf("%s: %d of %d blocks can be read, and the peers have all", name, countTrue(ok), len(ok))
			}
		}
	}
	return lost, true
}
