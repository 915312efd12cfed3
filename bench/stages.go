package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// stage is one part of the data path, measured by a benchmark of its package.
type stage struct {
	name      string
	benchmark string // without the prefix "Benchmark"
}

// stagesOf lists the stages by package.
var stagesOf = []struct {
	pkg    string
	stages []stage
}{
	{"chunker", []stage{{"cut", "Next"}, {"cut a file of 4 KiB", "CutSmallFile"}, {"name of a slice", "Hash"}}},
	{"seal", []stage{
		{"seal slice of 64 KiB", "SealSlice/64K"}, {"seal slice of 1 MiB", "SealSlice/1024K"},
		{"open slice of 64 KiB", "OpenSlice/64K"}, {"open slice of 1 MiB", "OpenSlice/1024K"}, {"open 4 KiB of a slice", "OpenSliceRange4K"},
	}},
	{"erasure", []stage{
		{"build stripe, 4+2 of 1 MiB", "Build/4+2×1MiB"}, {"build stripe, 10+4 of 256 KiB", "Build/10+4×256KiB"},
		{"encode, 4+2 of 1 MiB", "Encode/4+2×1MiB"}, {"rebuild 4 of 10+4", "Reconstruct/10+4×256KiB"},
		{"root of a shard of 1 MiB", "Root/1024KiB"}, {"verify a shard of 1 MiB", "VerifyCoded/1024KiB"}, {"verify a range of 64 KiB", "VerifyRange/64KiB"},
	}},
	{"cache", []stage{
		{"append 4 KiB", "Append/4KiB"}, {"append 1 MiB", "Append/1024KiB"}, {"append and sync", "Sync/1"}, {"append and sync, 16 at once", "Sync/16"},
		{"read 4 KiB", "ReadAt/4KiB"}, {"read 1 MiB", "ReadAt/1024KiB"},
	}},
	{"metastore", []stage{
		{"make record of a create", "Create/record"}, {"apply record of a create", "Create/apply"},
		{"get inode, in memory", "Inode/memory"}, {"get inode, from a table", "Inode/table"},
		{"get extents, in memory", "Extents/memory"}, {"get extents, from a table", "Extents/table"},
	}},
	{"shardstore", []stage{{"put a shard of 1 MiB", "PutShard1MiB"}, {"read a shard of 1 MiB", "ReadShard/1MiB"}}},
	{"p2p", []stage{{"get 1 MiB over TCP, 4 at once", "Call/get/tcp/1024KiB/4"}, {"put 1 MiB over TCP, 4 at once", "Call/put/tcp/1024KiB/4"}}},
}

// sample is one line of a benchmark's output.
type sample struct{ nsPerOp, mbPerSec float64 }

// stages runs the benchmarks of every stage and prints one line for each. It
// returns the MB/s of those that have them, by package and benchmark.
func stages(ctx context.Context, root string, p plan, out io.Writer) (map[string]float64, error) {
	speeds := map[string]float64{}
	count, each, limit := 3, "300ms", 6*time.Minute
	if p.quick {
		count, each, limit = 1, "50ms", time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "stage\tmedian\tunit\tspread")
	for _, group := range stagesOf {
		samples, err := runBenchmarks(ctx, root, group.pkg, group.stages, count, each)
		for _, s := range group.stages {
			fmt.Fprintf(w, "%s: %s\t%s\n", group.pkg, s.name, describe(samples[s.benchmark]))
			var values []float64
			for _, sample := range samples[s.benchmark] {
				values = append(values, sample.mbPerSec)
			}
			slices.Sort(values)
			speeds[group.pkg+" "+s.benchmark] = median(values)
		}
		if err != nil {
			fmt.Fprintf(w, "# %s: %v\n", group.pkg, err)
		}
	}
	return speeds, w.Flush()
}

// runBenchmarks returns the samples by the name of the benchmark.
func runBenchmarks(ctx context.Context, root, pkg string, wanted []stage, count int, each string) (map[string][]sample, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run=^$", "-bench="+pattern(wanted), "-benchtime="+each, "-count="+strconv.Itoa(count), "./"+pkg)
	cmd.Dir = root
	cmd.WaitDelay = time.Second
	output, err := cmd.CombinedOutput()
	samples := parseBenchmarks(output)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("stopped: %w", ctx.Err())
	}
	return samples, err
}

// pattern is a -bench expression that matches the wanted benchmarks.
func pattern(wanted []stage) string {
	var names []string
	for _, s := range wanted {
		var levels []string
		for _, level := range strings.Split("Benchmark"+s.benchmark, "/") {
			levels = append(levels, "^"+regexp.QuoteMeta(level)+"$")
		}
		names = append(names, strings.Join(levels, "/"))
	}
	return strings.Join(names, "|")
}

// benchmarkLine is "BenchmarkName-2  100  123 ns/op  45 MB/s ...".
var benchmarkLine = regexp.MustCompile(`^Benchmark(\S+?)(?:-\d+)?\s+\d+\s+(.*)$`)

func parseBenchmarks(output []byte) map[string][]sample {
	samples := map[string][]sample{}
	for lines := bufio.NewScanner(bytes.NewReader(output)); lines.Scan(); {
		match := benchmarkLine.FindStringSubmatch(lines.Text())
		if match == nil {
			continue
		}
		var s sample
		fields := strings.Fields(match[2])
		for i := 0; i+1 < len(fields); i += 2 {
			v, err := strconv.ParseFloat(fields[i], 64)
			switch {
			case err != nil:
			case fields[i+1] == "ns/op":
				s.nsPerOp = v
			case fields[i+1] == "MB/s":
				s.mbPerSec = v
			}
		}
		samples[match[1]] = append(samples[match[1]], s)
	}
	return samples
}

// describe is "median, unit, spread", separated by tabs.
func describe(samples []sample) string {
	var values []float64
	unit := "ops/s"
	for _, s := range samples {
		switch {
		case s.mbPerSec > 0:
			unit = "MB/s"
			values = append(values, s.mbPerSec)
		case s.nsPerOp > 0:
			values = append(values, 1e9/s.nsPerOp)
		}
	}
	if len(values) == 0 {
		return "-\t-\t"
	}
	slices.Sort(values)
	line := figure(median(values)) + "\t" + unit + "\t"
	if len(values) > 1 {
		line += figure(values[0]) + "–" + figure(values[len(values)-1])
	}
	return line
}
