package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// bar is what DeFS is held against in a row: factor times the slowest of the
// systems, in the same round. For times, the longest of each system's time
// times its own factor is allowed.
type bar struct {
	terms []term
}

type term struct {
	factor float64
	system string
}

func atLeast(factor float64, systems ...string) bar {
	var b bar
	for _, s := range systems {
		b.terms = append(b.terms, term{factor, s})
	}
	return b
}

// withinTimes allows 1.5 times the native time or 1.3 times that of a FUSE
// filesystem that does nothing, whichever is longer.
var withinTimes = bar{terms: []term{{1.5, nativeName}, {1.3, nullName}}}

func (b bar) String() string {
	letters := map[string]string{nativeName: "N", nullName: "F", sealedName: "J", budgetName: "B"}
	if len(b.terms) == 0 {
		return ""
	}
	if b.terms[0].factor > 1 { // times
		var parts []string
		for _, t := range b.terms {
			parts = append(parts, fmt.Sprintf("%g %s", t.factor, letters[t.system]))
		}
		return "≤ " + strings.Join(parts, " or ")
	}
	var parts []string
	for _, t := range b.terms {
		parts = append(parts, letters[t.system])
	}
	of := strings.Join(parts, ", ")
	if len(parts) > 1 {
		of = "min(" + of + ")"
	}
	return fmt.Sprintf("≥ %g %s", b.terms[0].factor, of)
}

// row is one line of the table of a place.
type row struct {
	name, unit string
	bar        bar
	// gocryptfs is what gocryptfs 2.3 reached, relative to native ext4, on the
	// place: reference figures, see docs/performance.md. 0 = not measured.
	gocryptfs map[string]float64
	// least and most are absolute targets for DeFS. 0 = none.
	least, most float64
}

const (
	rowSeqWrite   = "sequential write, fsync"
	rowSeqCold    = "sequential read, cold, local"
	rowSeqWarm    = "sequential read, warm"
	rowSeqNodes   = "sequential read, cold, 6 nodes"
	rowRandRead   = "4 KiB random read, cold"
	rowRandWrite  = "4 KiB random write"
	rowRandSync   = "4 KiB random write, fsync at the end"
	rowCreate     = "create and write 4 KiB"
	rowCreateSync = "create, write 4 KiB, fsync; 1 thread"
	rowCreateMany = "create, write 4 KiB, fsync; 16 threads"
	rowStat       = "find and stat, cold"
	rowRead       = "read 4 KiB files, cold, local"
	rowReadNodes  = "read 4 KiB files, cold, 6 nodes"
	rowRename     = "rename"
	rowUnlink     = "unlink"
	rowDelete     = "rm -rf"
	rowReaddir    = "readdir of a large directory, cold"
	rowFind       = "find and stat of a large directory, cold"
	rowUntar      = "untar"
	rowClone      = "git clone"
	rowStatus     = "git status"
	rowBuild      = "go build, empty build cache"
	rowSQLite     = "SQLite, synchronous=FULL"
	rowCopy       = "copy of 1 GiB files"
	rowPeak       = "peak memory of the mount"

	// These need no other filesystem beside.
	rowNodesRead    = "sequential read, cold, 14 nodes 10+4"
	rowFirstByte    = "first byte of a file, nodes 50 ms away"
	rowFirstByteNew = "first byte after mounting, the same"
	rowDrain        = "write, and drain to 14 nodes 10+4"
	rowDrainMirror  = "write, and drain to 30 nodes, mirrored"
	rowDistantSmall = "read small files, cold, nodes 50 ms away"
	rowEdit         = "100 MiB document, 1 % changed: leaves"
	rowStored       = "stored for files of 1–16 KiB, 10+4"
	rowStart        = "start to mounted"
	rowIdleCPU      = "idle with 14 nodes: CPU, all together"
	rowIdleNet      = "idle with 14 nodes: bytes of each"
)

const secondsUnit = "s"

func reference(memory, disk float64) map[string]float64 {
	return map[string]float64{"memory": memory, "disk": disk}
}

var rows = []row{
	{name: rowSeqWrite, unit: "MB/s", bar: atLeast(0.9, nativeName, sealedName), gocryptfs: reference(0.317, 0.266)},
	{name: rowSeqCold, unit: "MB/s", bar: atLeast(0.7, nativeName, nullName), gocryptfs: reference(0.173, 0.695)},
	{name: rowSeqWarm, unit: "MB/s", bar: atLeast(0.9, nullName), gocryptfs: reference(0.061, 0.056)},
	{name: rowSeqNodes, unit: "MB/s", least: 300},
	{name: rowRandRead, unit: "1/s", bar: atLeast(0.8, nullName), gocryptfs: reference(0.370, 0.952)},
	{name: rowRandWrite, unit: "1/s", bar: atLeast(0.8, sealedName)},
	{name: rowRandSync, unit: "1/s", bar: atLeast(0.5, nativeName, sealedName), gocryptfs: reference(0.069, 0.088)},
	{name: rowCreate, unit: "files/s", bar: atLeast(0.5, nullName), gocryptfs: reference(0.183, 0.178)},
	{name: rowCreateSync, unit: "files/s", bar: atLeast(0.8, nativeName)},
	{name: rowCreateMany, unit: "files/s", bar: atLeast(1, nativeName)},
	{name: rowStat, unit: "entries/s", bar: atLeast(0.6, nullName), gocryptfs: reference(0.496, 0.637)},
	{name: rowRead, unit: "files/s", gocryptfs: reference(0.381, 0.400)},
	{name: rowReadNodes, unit: "files/s"},
	{name: rowRename, unit: "files/s", bar: atLeast(0.5, nullName)},
	{name: rowUnlink, unit: "files/s", bar: atLeast(0.5, nullName)},
	{name: rowDelete, unit: "files/s", bar: atLeast(0.5, nullName), gocryptfs: reference(0.232, 0.503)},
	{name: rowReaddir, unit: "entries/s", bar: atLeast(0.6, nullName)},
	{name: rowFind, unit: "entries/s", bar: atLeast(0.6, nullName)},
	{name: rowUntar, unit: secondsUnit, bar: withinTimes, gocryptfs: reference(0.077, 0.034)},
	{name: rowClone, unit: secondsUnit, bar: withinTimes, gocryptfs: reference(0.509, 0.421)},
	{name: rowStatus, unit: secondsUnit, bar: withinTimes, gocryptfs: reference(0.189, 0.192)},
	{name: rowBuild, unit: secondsUnit, bar: withinTimes},
	{name: rowSQLite, unit: "tx/s", bar: atLeast(0.8, nativeName, sealedName), gocryptfs: reference(0.165, 0.396)},
	{name: rowNodesRead, unit: "MB/s", bar: atLeast(0.7, budgetName), least: 500},
	{name: rowDrain, unit: "MB/s", bar: atLeast(0.7, budgetName)},
	{name: rowDrainMirror, unit: "MB/s", bar: atLeast(0.7, budgetName)},
	{name: rowDistantSmall, unit: "files/s", least: 500},
	{name: rowFirstByte, unit: "ms", most: 60},
	{name: rowFirstByteNew, unit: "ms"},
	{name: rowEdit, unit: "% of it", most: 3},
	{name: rowStored, unit: "× logical", most: 1.5},
	{name: rowStart, unit: secondsUnit, most: 2},
	{name: rowIdleCPU, unit: "% of a core", most: 0.5},
	{name: rowIdleNet, unit: "KiB/s", most: 1},
	{name: rowCopy, unit: "MB/s"},
	{name: rowPeak, unit: "MiB", most: 300},
}

// baseline is what a row is compared with where native cannot do the same.
var baseline = map[string]string{rowSeqNodes: rowSeqCold, rowReadNodes: rowRead}

// table holds what was measured on one place.
type table struct {
	place   string
	samples map[string]map[int]float64 // by row and system, then by round
	failed  map[string]bool            // by row and system
	remarks []string
}

func newTable(place string) *table {
	return &table{place: place, samples: map[string]map[int]float64{}, failed: map[string]bool{}}
}

func key(row, system string) string { return row + "\x00" + system }

func (t *table) add(row, system string, round int, value float64) {
	k := key(row, system)
	if t.samples[k] == nil {
		t.samples[k] = map[int]float64{}
	}
	t.samples[k][round] = value
}

func (t *table) fail(row, system string, err error) {
	t.failed[key(row, system)] = true
	t.remark("%s: %s failed: %v", row, system, err)
}

func (t *table) remark(format string, args ...any) {
	t.remarks = append(t.remarks, fmt.Sprintf(format, args...))
}

// toNative are the ratios to the native filesystem of each round, higher is
// better, in ascending order.
func (t *table) toNative(r row) []float64 {
	base := r.name
	if b, ok := baseline[r.name]; ok {
		base = b
	}
	return t.ratios(r, base, bar{terms: []term{{1, nativeName}}})
}

// ratios says for each round how far DeFS is at the bar, which is measured in
// the row base: 1 is there, higher is better. In ascending order.
func (t *table) ratios(r row, base string, b bar) []float64 {
	var out []float64
rounds:
	for round, ours := range t.samples[key(r.name, defsName)] {
		if ours <= 0 {
			continue
		}
		var wanted float64
		for i, term := range b.terms {
			theirs := t.samples[key(base, term.system)][round] * term.factor
			switch {
			case theirs <= 0:
				continue rounds
			case i == 0:
				wanted = theirs
			case r.unit == secondsUnit:
				wanted = max(wanted, theirs)
			default:
				wanted = min(wanted, theirs)
			}
		}
		switch {
		case wanted == 0:
		case r.unit == secondsUnit:
			out = append(out, wanted/ours)
		default:
			out = append(out, ours/wanted)
		}
	}
	slices.Sort(out)
	return out
}

func (t *table) values(row, system string) []float64 {
	var out []float64
	for _, v := range t.samples[key(row, system)] {
		out = append(out, v)
	}
	slices.Sort(out)
	return out
}

// print writes the table: medians, and the ratios with their spread.
func (t *table) print(out io.Writer) {
	fmt.Fprintf(out, "\n")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "mount, on %s\tunit\tnative N\tnullfs F\tsealed J\tbudget B\tDeFS\tDeFS/N\t\ttarget\tof it\t\t\tgocryptfs/N\t\n", t.place)
	for _, r := range rows {
		if len(t.samples[key(r.name, defsName)])+len(t.samples[key(r.name, nativeName)]) == 0 && !t.failed[key(r.name, defsName)] {
			continue
		}
		cells := []string{r.name, r.unit}
		for _, system := range []string{nativeName, nullName, sealedName, budgetName, defsName} {
			cell := figure(median(t.values(r.name, system)))
			if t.failed[key(r.name, system)] {
				cell = "failed"
			}
			cells = append(cells, cell)
		}
		native := t.toNative(r)
		cells = append(cells, ratio(native), spread(native))
		wanted := t.ratios(r, r.name, r.bar)
		cells = append(cells, r.target(), ratio(wanted), spread(wanted), t.verdict(r, wanted))
		cells = append(cells, t.reference(r), t.aheadOfReference(r, native))
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	_ = w.Flush() // an error of standard output shows in the print below
	for _, remark := range t.remarks {
		fmt.Fprintf(out, "# %s\n", remark)
	}
}

// target is the row's targets in words.
func (r row) target() string {
	var parts []string
	if len(r.bar.terms) > 0 {
		parts = append(parts, r.bar.String())
	}
	if r.least > 0 {
		parts = append(parts, fmt.Sprintf("≥ %g", r.least))
	}
	if r.most > 0 {
		parts = append(parts, fmt.Sprintf("≤ %g", r.most))
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.Join(parts, ", ")
}

func (t *table) reference(r row) string {
	if v := r.gocryptfs[t.place]; v > 0 {
		return fmt.Sprintf("%.3f", v)
	}
	return "-"
}

// verdict says whether all targets of a row are met.
func (t *table) verdict(r row, wanted []float64) string {
	ours := median(t.values(r.name, defsName))
	switch {
	case t.failed[key(r.name, defsName)]:
		return "failed"
	case ours == 0, r.target() == "-", len(r.bar.terms) > 0 && len(wanted) == 0:
		return ""
	case r.least > 0 && ours < r.least, r.most > 0 && ours > r.most, len(wanted) > 0 && median(wanted) < 1:
		return "missed"
	}
	return "met"
}

func (t *table) aheadOfReference(r row, native []float64) string {
	reference := r.gocryptfs[t.place]
	switch {
	case reference == 0 || len(native) == 0:
		return ""
	case median(native) > reference:
		return "ahead"
	}
	return "behind"
}

// median of values in ascending order; 0 without any.
func median(sorted []float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

func figure(v float64) string {
	switch {
	case v == 0:
		return "-"
	case v < 10:
		return fmt.Sprintf("%.3f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func ratio(sorted []float64) string {
	if len(sorted) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.3f", median(sorted))
}

func spread(sorted []float64) string {
	if len(sorted) < 2 {
		return ""
	}
	return fmt.Sprintf("%.3f–%.3f", sorted[0], sorted[len(sorted)-1])
}
