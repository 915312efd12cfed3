// Command bench measures DeFS: its stages one by one, and a mount of it beside
// the native filesystem and a FUSE filesystem that does nothing (bench/nullfs).
//
//	go run ./bench            everything, at most 25 minutes
//	go run ./bench -quick     small sizes, at most 3 minutes
//	go run ./bench -stages    the stages alone
//
// The filesystems take turns, step by step and round by round, so that what
// else the machine does hits all of them; a ratio is the median of the ratios
// of each round. What needs larger or distant pools is measured on DeFS alone.
// As root it measures on the disk and on an ext4 whose
// image is in memory, where no disk hides what the filesystem itself costs.
//
// The real programs run: `defs node` with a pool of nodes, and `defs-mount`.
// Everything is in scratch directories that are removed at the end, with their
// mounts and processes; what a killed run has left is removed by the next one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// plan says how much work is done.
type plan struct {
	quick    bool
	dir      string // for what is measured on the disk
	stages   bool   // only the stages
	mounts   bool   // only the mounts
	rounds   int
	seqMiB   int
	randMiB  int
	randTime time.Duration
	files    int // of 4 KiB
	txs      int
	entries  int // of a large directory, and files whose storage is measured
	// With so much the start is measured.
	startFiles, startMiB int
	copyGiB              int // copied to find the peak memory; 0 = not done
	limit                time.Duration
	turn                 time.Duration // the longest turn of one filesystem at one group of steps
	policy               string
	groups               string
	place                string
	profiles             string // directory; "" for none
}

func main() {
	p := plan{rounds: 3, seqMiB: 512, randMiB: 256, randTime: 5 * time.Second, files: 2000, txs: 200, entries: 100_000, startFiles: 1_000_000, startMiB: 10 << 10, copyGiB: 10, limit: 25 * time.Minute, turn: 90 * time.Second, policy: "4+2"}
	for _, arg := range os.Args[1:] {
		if arg == "-quick" || arg == "--quick" {
			p = plan{rounds: 3, seqMiB: 64, randMiB: 16, randTime: time.Second, files: 500, txs: 50, entries: 2000, startFiles: 5000, startMiB: 512, limit: 3 * time.Minute, turn: 20 * time.Second, policy: "4+2"}
		}
	}
	flag.BoolVar(&p.quick, "quick", false, "small sizes, at most 3 minutes")
	flag.BoolVar(&p.stages, "stages", false, "measure the stages alone")
	flag.BoolVar(&p.mounts, "mounts", false, "measure the mounts alone")
	flag.StringVar(&p.dir, "dir", "/var/tmp", "`directory` on the disk to measure on")
	flag.IntVar(&p.rounds, "rounds", p.rounds, "rounds of each group of steps")
	flag.IntVar(&p.seqMiB, "seq", p.seqMiB, "MiB of the sequential file")
	flag.IntVar(&p.files, "files", p.files, "small files")
	flag.IntVar(&p.copyGiB, "copy", p.copyGiB, "GiB to copy for the peak memory; 0 leaves it out")
	flag.DurationVar(&p.limit, "limit", p.limit, "the longest time for everything")
	flag.StringVar(&p.groups, "groups", "", "groups of steps to measure, separated by commas: "+groupNames())
	flag.StringVar(&p.place, "place", "", "measure there alone: memory or disk")
	flag.StringVar(&p.profiles, "profiles", "", "`directory` for CPU profiles of the mount, for go tool pprof")
	flag.Parse()
	if flag.NArg() > 0 || p.rounds < 1 || p.seqMiB < 1 || p.files < 20 || p.copyGiB < 0 {
		flag.Usage()
		os.Exit(64)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, p); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// cleanupReserve is kept of the time limit for unmounting and removing.
const cleanupReserve = 10 * time.Second

func run(ctx context.Context, p plan) (err error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, p.limit-cleanupReserve)
	defer cancel()
	if p.profiles != "" {
		if err := os.MkdirAll(p.profiles, 0o755); err != nil {
			return err
		}
	}
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	s, err := newScratch(p.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()

	fmt.Printf("# %s, kernel %s, %d cores, %s, load %s\n", time.Now().UTC().Format(time.RFC3339), kernel(), runtime.NumCPU(), runtime.Version(), load())
	defer func() {
		fmt.Printf("# load at the end %s, took %s\n", load(), time.Since(start).Round(time.Second))
	}()
	var speeds map[string]float64
	if !p.mounts {
		if speeds, err = stages(ctx, root, p, os.Stdout); err != nil {
			return err
		}
	}
	if p.stages {
		return nil
	}
	build := exec.CommandContext(ctx, "go", "build", "-o", s.bin()+"/", "./cmd/defs", "./cmd/defs-mount", "./bench/nullfs")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", errors.Join(err, ctx.Err()), out)
	}
	in, err := newInput(ctx, s, p)
	if err != nil {
		return err
	}
	places := []*place{s.onDisk()}
	if memory, err := s.inMemory(ctx, p); err != nil {
		fmt.Printf("# no ext4 in memory: %v\n", err)
	} else {
		places = []*place{memory, s.onDisk()} // in this order, for the time limit
	}
	if p.place != "" {
		places = slices.DeleteFunc(places, func(at *place) bool { return at.name != p.place })
	}
	for i, at := range places {
		deadline, _ := ctx.Deadline()
		share, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(len(places)-i))
		err := measure(share, s, p, at, in, speeds)
		cancel()
		if err != nil {
			return err
		}
	}
	return nil
}

// moduleRoot is the directory of go.mod.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env: %w", err)
	}
	path := strings.TrimSpace(string(out))
	if path == "" || path == os.DevNull {
		return "", errors.New("run it inside the source tree")
	}
	return filepath.Dir(path), nil
}

func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

func kernel() string {
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}
