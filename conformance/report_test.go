package conformance

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

// figures are what one operation has to show in one mode.
type figures struct{ cases, checks, failed int }

// writeReport writes the outcomes as Markdown: no dates, no names of machines, so that the same outcomes make the
// same file.
func writeReport(path string, results []modeResult) error {
	var b strings.Builder
	b.WriteString(`# Conformance

Written by ` + "`make posix`" + `. Each cell: cases, and the single checks in them. The reference is a directory of the machine's own
filesystem: it shows that the cases are right. The other columns are mounts of a volume: for root alone, for root with other users
let in (allow_other, and the kernel checks permissions), and by an ordinary user through fusermount3.

| operation |`)
	table := make(map[string]map[string]figures) // operation, mode
	for _, r := range results {
		b.WriteString(" " + r.mode.Name + " |")
		for _, o := range r.outcomes {
			if table[o.Op] == nil {
				table[o.Op] = make(map[string]figures)
			}
			f := table[o.Op][r.mode.Name]
			f.cases++
			f.checks += o.Checks
			f.failed += min(len(o.Failures), 1)
			table[o.Op][r.mode.Name] = f
		}
	}
	b.WriteString("\n|" + strings.Repeat(" --- |", len(results)+1) + "\n")
	totals := make(map[string]figures)
	line := func(name string, cells map[string]figures) {
		b.WriteString("| " + name + " |")
		for _, r := range results {
			b.WriteString(" " + cells[r.mode.Name].String() + " |")
		}
		b.WriteString("\n")
	}
	for _, op := range slices.Sorted(maps.Keys(table)) {
		line(op, table[op])
		for mode, f := range table[op] {
			t := totals[mode]
			totals[mode] = figures{t.cases + f.cases, t.checks + f.checks, t.failed + f.failed}
		}
	}
	line("**all**", totals)

	b.WriteString("\n## Failed\n\n")
	failed := false
	for _, r := range results {
		for _, o := range r.outcomes {
			if len(o.Failures) > 0 {
				failed = true
				fmt.Fprintf(&b, "- %s: %s: %s: %s\n", r.mode.Name, o.Op, o.Name, o.Failures[0])
			}
		}
	}
	if !failed {
		b.WriteString("None.\n")
	}
	b.WriteString("\n## Not run\n\n")
	for _, r := range results {
		if r.mode.Native {
			continue
		}
		needs := make(map[string]int)
		for _, c := range cases() {
			if why := r.mode.excludes(c); why != "" && why != c.forced && !c.long {
				needs[why]++
			}
		}
		for _, why := range slices.Sorted(maps.Keys(needs)) {
			fmt.Fprintf(&b, "- %s: %d cases, because each %s\n", r.mode.Name, needs[why], why)
		}
	}
	b.WriteString("\n## Excluded from every mount\n\n")
	for _, c := range cases() {
		if c.forced != "" {
			fmt.Fprintf(&b, "- %s: %s: %s\n", c.op, c.name, c.forced)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(goFuseExcluded)) {
		fmt.Fprintf(&b, "- %s: %s: %s\n", goFuseOp, name, goFuseExcluded[name])
	}
	for _, name := range slices.Sorted(maps.Keys(goSuitesExcluded)) {
		fmt.Fprintf(&b, "- %s: %s: %s\n", goSuitesOp, name, goSuitesExcluded[name])
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

func (f figures) String() string {
	switch {
	case f.cases == 0:
		return "–"
	case f.failed > 0:
		return fmt.Sprintf("%d, %d; **%d failed**", f.cases, f.checks, f.failed)
	}
	return fmt.Sprintf("%d, %d", f.cases, f.checks)
}
