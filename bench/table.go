package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// row is one line of the table of a place.
type row struct {
	name, unit string
	// gocryptfs is what gocryptfs 2.3 reached, relative to native ext4, on the
	// place: reference figures, see docs/performance.md. 0 = not measured.
	gocryptfs map[string]float64
	// least and most are absolute targets for DeFS. 0 = none.
	least, most float64
}

const (
	rowSeqWrite  = "sequential write, fsync"
	rowSeqCold   = "sequential read, cold, local"
	rowSeqWarm   = "sequential read, warm"
	rowSeqNodes  = "sequential read, cold, 6 nodes"
	rowRandRead  = "4 KiB random read, cold"
	rowRandWrite = "4 KiB random write, fsync"
	rowCreate    = "create and write 4 KiB"
	rowStat      = "stat, cold"
	rowRead      = "read 4 KiB files, cold, local"
	rowReadNodes = "read 4 KiB files, cold, 6 nodes"
	rowDelete    = "delete"
	rowUntar     = "untar"
	rowClone     = "git clone"
	rowStatus    = "git status"
	rowSQLite    = "SQLite, synchronous=FULL"
	rowCopy      = "copy of 1 GiB files"
	rowPeak      = "peak memory of the mount"
)

const secondsUnit = "s"

func reference(memory, disk float64) map[string]float64 {
	return map[string]float64{"memory": memory, "disk": disk}
}

var rows = []row{
	{name: rowSeqWrite, unit: "MB/s", gocryptfs: reference(0.317, 0.266)},
	{name: rowSeqCold, unit: "MB/s", gocryptfs: reference(0.173, 0.695)},
	{name: rowSeqWarm, unit: "MB/s", gocryptfs: reference(0.061, 0.056)},
	{name: rowSeqNodes, unit: "MB/s", least: 300},
	{name: rowRandRead, unit: "1/s", gocryptfs: reference(0.370, 0.952)},
	{name: rowRandWrite, unit: "1/s", gocryptfs: reference(0.069, 0.088)},
	{name: rowCreate, unit: "files/s", gocryptfs: reference(0.183, 0.178)},
	{name: rowStat, unit: "entries/s", gocryptfs: reference(0.496, 0.637)},
	{name: rowRead, unit: "files/s", gocryptfs: reference(0.381, 0.400)},
	{name: rowReadNodes, unit: "files/s"},
	{name: rowDelete, unit: "files/s", gocryptfs: reference(0.232, 0.503)},
	{name: rowUntar, unit: secondsUnit, gocryptfs: reference(0.077, 0.034)},
	{name: rowClone, unit: secondsUnit, gocryptfs: reference(0.509, 0.421)},
	{name: rowStatus, unit: secondsUnit, gocryptfs: reference(0.189, 0.192)},
	{name: rowSQLite, unit: "tx/s", gocryptfs: reference(0.165, 0.396)},
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

// ratios are those of each round, higher is better, in ascending order.
func (t *table) ratios(r row, to string) []float64 {
	base := r.name
	if b, ok := baseline[r.name]; ok {
		base = b
	}
	var out []float64
	for round, ours := range t.samples[key(r.name, defsName)] {
		theirs, ok := t.samples[key(base, to)][round]
		switch {
		case !ok || ours <= 0 || theirs <= 0:
		case r.unit == secondsUnit:
			out = append(out, theirs/ours)
		default:
			out = append(out, ours/theirs)
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
	fmt.Fprintf(w, "mount, on %s\tunit\tnative\tnullfs\tDeFS\tDeFS/native\t\tDeFS/nullfs\t\tgocryptfs/native\t\n", t.place)
	for _, r := range rows {
		if len(t.samples[key(r.name, defsName)])+len(t.samples[key(r.name, nativeName)]) == 0 && !t.failed[key(r.name, defsName)] {
			continue
		}
		cells := []string{r.name, r.unit}
		for _, system := range []string{nativeName, nullName, defsName} {
			cell := figure(median(t.values(r.name, system)))
			if t.failed[key(r.name, system)] {
				cell = "failed"
			}
			cells = append(cells, cell)
		}
		native := t.ratios(r, nativeName)
		cells = append(cells, ratio(native), spread(native))
		null := t.ratios(r, nullName)
		cells = append(cells, ratio(null), spread(null), t.reference(r), t.verdict(r, native))
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	_ = w.Flush() // an error of standard output shows in the print below
	for _, remark := range t.remarks {
		fmt.Fprintf(out, "# %s\n", remark)
	}
}

func (t *table) reference(r row) string {
	switch v := r.gocryptfs[t.place]; {
	case v > 0:
		return fmt.Sprintf("%.3f", v)
	case r.least > 0:
		return fmt.Sprintf("(≥ %.0f)", r.least)
	case r.most > 0:
		return fmt.Sprintf("(≤ %.0f)", r.most)
	}
	return "-"
}

func (t *table) verdict(r row, native []float64) string {
	ours := median(t.values(r.name, defsName))
	reference := r.gocryptfs[t.place]
	switch {
	case t.failed[key(r.name, defsName)]:
		return "failed"
	case ours == 0:
		return ""
	case r.least > 0 && ours >= r.least, r.most > 0 && ours <= r.most:
		return "met"
	case r.least > 0, r.most > 0:
		return "missed"
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
