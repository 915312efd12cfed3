package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	smallBytes = 4 << 10
	smallDirs  = 20
	blockBytes = 4 << 10
	randTasks  = 4
	chunkBytes = 1 << 20 // of a sequential read or write
)

// turn is one filesystem doing one group of steps, once.
type turn struct {
	plan
	in     *input
	sys    system
	dir    string // empty, and removed afterwards
	step   string // that runs now, for failures
	record func(row string, value float64)
}

// group is steps that belong together, because they use the same files.
type group struct {
	name string
	run  func(*turn, context.Context) error
	// once: it takes long, and one round has to do.
	once bool
}

var groups = []group{
	{name: "sequential", run: (*turn).sequential},
	{name: "random", run: (*turn).random},
	{name: "small", run: (*turn).small},
	{name: "fsync", run: (*turn).syncedFiles},
	{name: "tree", run: (*turn).tree},
	{name: "sqlite", run: (*turn).sqlite},
	{name: "build", run: (*turn).build, once: true},
	{name: "large", run: (*turn).largeDirectory, once: true},
}

// rate runs a step that does an amount of work, and records the amount per second.
func (t *turn) rate(row string, amount float64, step func() error) error {
	t.step = row
	start := time.Now()
	if err := step(); err != nil {
		return err
	}
	t.record(row, amount/time.Since(start).Seconds())
	return nil
}

// seconds runs a step and records how long it took.
func (t *turn) seconds(row string, step func() error) error {
	t.step = row
	start := time.Now()
	if err := step(); err != nil {
		return err
	}
	t.record(row, time.Since(start).Seconds())
	return nil
}

// cold makes the next read find nothing in memory.
func (t *turn) cold(ctx context.Context) error {
	if err := syncTo(t.dir); err != nil {
		return err
	}
	if err := t.sys.remount(ctx); err != nil {
		return err
	}
	return dropKernelCaches()
}

// coldFromNodes makes the next read find nothing on this disk either. It does
// nothing for a filesystem without nodes.
func (t *turn) coldFromNodes(ctx context.Context, writtenBytes int64) (bool, error) {
	m, ok := t.sys.(*mounted)
	if !ok {
		return false, nil
	}
	if err := m.dropLocal(ctx, writtenBytes); err != nil {
		return false, err
	}
	if err := m.remount(ctx); err != nil {
		return false, err
	}
	// A reader meets peers that are there; how long finding them takes is not asked here.
	return true, errors.Join(m.awaitNodes(ctx), dropKernelCaches())
}

func dropKernelCaches() error {
	if os.Geteuid() != 0 {
		return nil // said once, at the start
	}
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// syncTo writes the filesystem of dir to its disk.
func syncTo(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

func (t *turn) sequential(ctx context.Context) error {
	path, data := filepath.Join(t.dir, "sequential"), t.in.random[:t.seqMiB<<20]
	mb := float64(len(data)) / 1e6
	read := func() error { return readAll(path, nil) }
	if err := t.rate(rowSeqWrite, mb, func() error { return writeAll(path, data) }); err != nil {
		return err
	}
	t.step = rowSeqCold
	if err := t.cold(ctx); err != nil {
		return err
	}
	if err := t.rate(rowSeqCold, mb, read); err != nil {
		return err
	}
	if err := t.rate(rowSeqWarm, mb, read); err != nil {
		return err
	}
	t.step = rowSeqNodes
	fromNodes, err := t.coldFromNodes(ctx, int64(len(data)))
	if err != nil {
		return err
	}
	if fromNodes {
		if err := t.rate(rowSeqNodes, mb, read); err != nil {
			return err
		}
	}
	return readAll(path, data)
}

// writeAll writes data in large requests, and fsyncs.
func writeAll(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	for len(data) > 0 {
		n := min(chunkBytes, len(data))
		if _, err := f.Write(data[:n]); err != nil {
			return errors.Join(err, f.Close())
		}
		data = data[n:]
	}
	return errors.Join(f.Sync(), f.Close())
}

// readAll reads a file in large requests. With want it compares.
func readAll(path string, want []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, chunkBytes)
	for off := 0; ; {
		n, err := io.ReadFull(f, buf)
		if want != nil && (off+n > len(want) || !bytes.Equal(buf[:n], want[off:off+n])) {
			return fmt.Errorf("THE DATA READ IS NOT THE DATA WRITTEN, in the MiB at %d", off>>20)
		}
		off += n
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			if want != nil && off != len(want) {
				return fmt.Errorf("THE DATA READ IS NOT THE DATA WRITTEN: %d bytes of %d", off, len(want))
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// random reads each block of a file once in random order, then writes them so.
func (t *turn) random(ctx context.Context) error {
	path := filepath.Join(t.dir, "random")
	t.step = rowRandRead
	if err := writeAll(path, t.in.random[:t.randMiB<<20]); err != nil {
		return err
	}
	if err := t.cold(ctx); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return err
	}
	if err := t.blocks(ctx, rowRandRead, f.ReadAt, nil); err != nil {
		return err
	}
	return t.blocks(ctx, rowRandWrite, f.WriteAt, f.Sync)
}

// blocks records how many blocks a second are accessed; with finish, as
// rowRandSync, also with its time.
func (t *turn) blocks(ctx context.Context, row string, access func([]byte, int64) (int, error), finish func() error) error {
	t.step = row
	start := time.Now()
	var done atomic.Int64
	errs := make([]error, randTasks+1)
	var wg sync.WaitGroup
	perTask := t.randMiB << 20 / blockBytes / randTasks
	for task := range randTasks {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(task), 1))
			buf := make([]byte, blockBytes)
			for _, block := range rng.Perm(perTask) {
				if time.Since(start) > t.randTime || ctx.Err() != nil {
					return
				}
				if _, errs[task] = access(buf, int64(task*perTask+block)*blockBytes); errs[task] != nil {
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	accessed := time.Since(start)
	if finish != nil {
		errs[randTasks] = finish()
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	t.record(row, float64(done.Load())/accessed.Seconds())
	if finish != nil {
		t.record(rowRandSync, float64(done.Load())/time.Since(start).Seconds())
	}
	return nil
}

// small is done by the programs that people use; a loop in this process would
// make creating on the native filesystem three times as fast.
func (t *turn) small(ctx context.Context) error {
	root := filepath.Join(t.dir, "small")
	perDir := t.files / smallDirs
	files := perDir * smallDirs
	t.step = rowCreate
	// One file for each directory; split(1) cuts it into small files there.
	parts := make([]string, smallDirs)
	for i := range parts {
		parts[i] = filepath.Join(t.in.scratch, fmt.Sprintf("part-%d", i))
		off := i * perDir * smallBytes
		if err := os.WriteFile(parts[i], t.in.random[off:off+perDir*smallBytes], 0o600); err != nil {
			return err
		}
	}
	err := t.rate(rowCreate, float64(files), func() error {
		if err := quietly(ctx, "mkdir", root); err != nil {
			return err
		}
		for i, part := range parts {
			dir := filepath.Join(root, fmt.Sprintf("d%02d", i))
			if err := errors.Join(quietly(ctx, "mkdir", dir), quietly(ctx, "split", "-b", fmt.Sprint(smallBytes), "-a", "4", "-d", part, dir+"/f")); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	t.step = rowStat
	if err := t.cold(ctx); err != nil {
		return err
	}
	entries := files + smallDirs + 1
	if err := t.rate(rowStat, float64(entries), func() error {
		out, err := program(ctx, "find", root, "-printf", "%s %y %m %T@ %p\n").Output()
		if n := bytes.Count(out, []byte("\n")); err == nil && n != entries {
			err = fmt.Errorf("%d entries of %d", n, entries)
		}
		return err
	}); err != nil {
		return err
	}
	t.step = rowRead
	if err := t.cold(ctx); err != nil {
		return err
	}
	read := func() error {
		out, err := program(ctx, "sh", "-c", `find "$1" -type f -print0 | xargs -0 cat`, "-", root).Output()
		if err == nil && len(out) != files*smallBytes {
			err = fmt.Errorf("%d bytes of %d", len(out), files*smallBytes)
		}
		return err
	}
	if err := t.rate(rowRead, float64(files), read); err != nil {
		return err
	}
	t.step = rowReadNodes
	fromNodes, err := t.coldFromNodes(ctx, int64(files)*smallBytes*4) // the metadata of the tree stays here
	if err != nil {
		return err
	}
	if fromNodes {
		if err := t.rate(rowReadNodes, float64(files), read); err != nil {
			return err
		}
	}
	// Half of the files is removed by rm, after each was renamed and the other half unlinked.
	var names []string
	if names, err = filepath.Glob(filepath.Join(root, "*", "f*")); err != nil {
		return err
	}
	if err := t.rate(rowRename, float64(len(names)), func() error {
		for i, name := range names {
			names[i] = filepath.Join(filepath.Dir(name), "renamed-"+filepath.Base(name))
			if err := os.Rename(name, names[i]); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	half := names[:len(names)/2]
	if err := t.rate(rowUnlink, float64(len(half)), func() error {
		for _, name := range half {
			if err := os.Remove(name); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return t.rate(rowDelete, float64(len(names)-len(half)), func() error { return quietly(ctx, "rm", "-rf", root) })
}

const (
	syncThreads = 16
	syncFiles   = 200 // of one thread
)

// syncedFiles makes small files that are flushed one by one.
func (t *turn) syncedFiles(ctx context.Context) error {
	create := func(dir string, files int) error {
		for i := range files {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := writeAll(filepath.Join(dir, fmt.Sprintf("f%04d", i)), t.in.random[:smallBytes]); err != nil {
				return err
			}
		}
		return nil
	}
	one := filepath.Join(t.dir, "one")
	if err := os.Mkdir(one, 0o755); err != nil {
		return err
	}
	if err := t.rate(rowCreateSync, syncFiles, func() error { return create(one, syncFiles) }); err != nil {
		return err
	}
	for i := range syncThreads {
		if err := os.Mkdir(filepath.Join(t.dir, fmt.Sprint(i)), 0o755); err != nil {
			return err
		}
	}
	return t.rate(rowCreateMany, syncThreads*syncFiles, func() error {
		var group errgroup.Group
		for i := range syncThreads {
			group.Go(func() error { return create(filepath.Join(t.dir, fmt.Sprint(i)), syncFiles) })
		}
		return group.Wait()
	})
}

// largeDirectory lists a directory of many empty files.
func (t *turn) largeDirectory(ctx context.Context) error {
	dir := filepath.Join(t.dir, "large")
	t.step = rowReaddir
	if err := makeFiles(ctx, dir, t.entries); err != nil {
		return err
	}
	if err := t.cold(ctx); err != nil {
		return err
	}
	if err := t.rate(rowReaddir, float64(t.entries), func() error {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer d.Close()
		names, err := d.Readdirnames(-1)
		if err == nil && len(names) != t.entries {
			err = fmt.Errorf("%d entries of %d", len(names), t.entries)
		}
		return err
	}); err != nil {
		return err
	}
	t.step = rowFind
	if err := t.cold(ctx); err != nil {
		return err
	}
	return t.rate(rowFind, float64(t.entries), func() error {
		out, err := program(ctx, "find", dir, "-type", "f", "-printf", "%s %T@ %p\n").Output()
		if n := bytes.Count(out, []byte("\n")); err == nil && n != t.entries {
			err = fmt.Errorf("%d entries of %d", n, t.entries)
		}
		return err
	})
}

// makeFiles makes a directory of empty files.
func makeFiles(ctx context.Context, dir string, files int) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for i := range files {
		if i%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := unix.Mknod(filepath.Join(dir, fmt.Sprintf("entry-%07d", i)), unix.S_IFREG|0o644, 0); err != nil {
			return err
		}
	}
	return nil
}

// build compiles a program with everything that it imports: sources, build
// cache and result are in the filesystem, the toolchain is not.
func (t *turn) build(ctx context.Context) error {
	dir := filepath.Join(t.dir, "build")
	t.step = rowBuild
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"go.mod":  "module example.org/build\n",
		"main.go": "package main\n\nimport (\n\t\"encoding/json\"\n\t\"os\"\n)\n\nfunc main() { _ = json.NewEncoder(os.Stdout).Encode(os.Args) }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return t.seconds(rowBuild, func() error {
		cmd := program(ctx, "go", "build", "-C", dir, "-o", "build", ".")
		cmd.Env = append(cmd.Env, "GOCACHE="+filepath.Join(t.dir, "cache"), "GOTMPDIR="+t.dir, "GOFLAGS=", "GOWORK=off")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("go build: %w: %s", err, out)
		}
		return nil
	})
}

func (t *turn) tree(ctx context.Context) error {
	dir := filepath.Join(t.dir, "tree")
	err := t.seconds(rowUntar, func() error {
		return errors.Join(os.Mkdir(dir, 0o755), quietly(ctx, "tar", "--no-same-owner", "-xf", t.in.tree, "-C", dir))
	})
	if err != nil || t.in.repo == "" {
		return err
	}
	clone := filepath.Join(t.dir, "clone")
	if err := t.seconds(rowClone, func() error {
		return quietly(ctx, "git", "-c", "safe.directory=*", "clone", "-q", "file://"+t.in.repo, clone)
	}); err != nil {
		return err
	}
	return t.seconds(rowStatus, func() error {
		out, err := program(ctx, "git", "-c", "safe.directory=*", "-C", clone, "status", "--porcelain").Output()
		if err == nil && len(out) > 0 {
			err = errors.New("git finds changes in a new clone")
		}
		return err
	})
}

func (t *turn) sqlite(ctx context.Context) error {
	db := filepath.Join(t.dir, "t.db")
	if err := t.rate(rowSQLite, float64(t.txs), func() error { return quietly(ctx, "sqlite3", "-bail", db, ".read "+t.in.sql) }); err != nil {
		return err
	}
	out, err := program(ctx, "sqlite3", db, "select count(*) from t; pragma integrity_check").Output()
	if want := fmt.Sprintf("%d\nok\n", t.txs); err == nil && string(out) != want {
		err = fmt.Errorf("the database says %q", out)
	}
	return err
}

func quietly(ctx context.Context, args ...string) error {
	out, err := program(ctx, args...).CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%s: %w: %s", args[0], err, lines[len(lines)-1])
	}
	return nil
}
