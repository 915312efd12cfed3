// Command durability compares simulated years of a pool with their Markov
// model, and writes docs/durability.md. It ends with an error where they do
// not agree.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/sim"
)

func main() {
	seed := flag.Uint64("seed", 1, "of the simulations")
	scale := flag.Float64("stripes", 1, "how many times the stripes")
	out := flag.String("out", "", "file to write; default only the screen")
	done := flag.String("rows", "", "file that keeps the rows of a run that is stopped, for the next one")
	flag.Parse()
	if err := run(*seed, *scale, *out, &rows{path: *done, known: map[string]string{}}); err != nil {
		fmt.Fprintln(os.Stderr, "durability:", err)
		os.Exit(1)
	}
}

// rows keeps the rows that are done.
type rows struct {
	path  string // empty: nowhere
	mu    sync.Mutex
	known map[string]string // guarded by mu
}

func (r *rows) load() error {
	if r.path == "" {
		return nil
	}
	b, err := os.ReadFile(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(b, &r.known)
}

// once returns the row of that name, made by compute if it is not known yet.
func (r *rows) once(name string, compute func() (string, error)) (string, error) {
	r.mu.Lock()
	row, ok := r.known[name]
	r.mu.Unlock()
	if ok {
		return row, nil
	}
	row, err := compute()
	if err != nil {
		return row, err
	}
	fmt.Fprint(os.Stderr, row)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known[name] = row
	if r.path == "" {
		return row, nil
	}
	b, err := json.Marshal(r.known)
	if err != nil {
		return row, err
	}
	return row, os.WriteFile(r.path, b, 0o644)
}

// scheme is a pool that loses enough to be compared.
type scheme struct {
	policy    string
	repair    time.Duration
	deadAfter time.Duration
	stripes   int
}

var schemes = []scheme{
	{"2+1,mirror=off", 1 * sim.Day, 2 * time.Hour, 600},
	{"4+2,mirror=off", 2 * sim.Day, 2 * time.Hour, 1000},
	{"10+4,mirror=off", 4 * sim.Day, 12 * time.Hour, 800},
	{"2+1,mirror=on", 7 * sim.Day, 2 * time.Hour, 2500},
	{"4+2,mirror=on", 14 * sim.Day, 2 * time.Hour, 2000},
	{"10+4,mirror=on", 20 * sim.Day, 2 * time.Hour, 1500},
}

func run(seed uint64, scale float64, out string, done *rows) error {
	if err := done.load(); err != nil {
		return err
	}
	var text bytes.Buffer
	w := io.MultiWriter(os.Stdout, &text)
	fmt.Fprint(w, intro)
	fmt.Fprintf(w, "Seed %d. Lifetime of a node 90 days, absent for 1 hour a day in the mean.\n\n", seed)
	fmt.Fprintln(w, "| scheme | mean repair | stripes | lost | model | its interval | shards moved per stripe | model |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
	lines := make([]string, len(schemes))
	errs := make([]error, len(schemes))
	slots := make(chan struct{}, 2)
	var wg sync.WaitGroup
	for i, s := range schemes {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			lines[i], errs[i] = done.once(fmt.Sprint(seed, scale, s), func() (string, error) { return compare(seed, scale, s) })
		})
	}
	wg.Wait()
	failed := 0
	for i := range lines {
		if errs[i] != nil {
			fmt.Fprintln(os.Stderr, errs[i])
			failed++
		}
		fmt.Fprint(w, lines[i])
	}
	if err := faults(w, seed, done); err != nil {
		return err
	}
	tables(w)
	if err := absences(w); err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d schemes do not agree with their model", failed, len(schemes))
	}
	if out == "" {
		return nil
	}
	return os.WriteFile(out, text.Bytes(), 0o644)
}

func name(text string) string {
	name, mirror, _ := strings.Cut(text, ",mirror=")
	if mirror == "on" {
		name += " mirrored"
	}
	return name
}

func compare(seed uint64, scale float64, s scheme) (row string, err error) {
	policy, err := erasure.ParsePolicy(s.policy)
	if err != nil {
		return "", err
	}
	c, err := sim.Compare(sim.Options{
		Seed: seed, Nodes: 1000, Stripes: int(float64(s.stripes) * scale), Policy: policy,
		Life: 90 * sim.Day, Absent: time.Hour, CopyAfter: 2 * time.Hour, DeadAfter: s.deadAfter,
		CopyTime: s.repair, RebuildTime: s.repair,
	})
	if err != nil {
		return "", err
	}
	row = fmt.Sprintf("| %s | %d d | %d | %d | %.0f | %.0f–%.0f | %.0f | %.0f (%+.0f %%) |\n", name(s.policy), s.repair/sim.Day, c.Stripes,
		c.Lost, c.Expected, c.Low, c.High, c.Traffic, c.Predicted, 100*(c.Traffic/c.Predicted-1))
	if losses, traffic := c.Agrees(); !losses || !traffic {
		return row, fmt.Errorf("%s does not agree with its model: %+v", s.policy, c)
	}
	return row, nil
}

func faults(w io.Writer, seed uint64, done *rows) error {
	fmt.Fprint(w, faultsIntro)
	for _, text := range []string{"2+1,mirror=off", "4+2,mirror=off", "10+4,mirror=off", "4+2,mirror=on"} {
		row, err := done.once(fmt.Sprint("faults ", seed, text), func() (string, error) { return suffer(seed, text) })
		if err != nil {
			return err
		}
		fmt.Fprint(w, row)
	}
	return nil
}

// suffer lets everything happen to the stripes of one scheme.
func suffer(seed uint64, text string) (string, error) {
	policy, err := erasure.ParsePolicy(text)
	if err != nil {
		return "", err
	}
	r, err := sim.Run(sim.Options{
		Seed: seed, Nodes: 1000, Hosts: 500, Subnets: 100, Zones: 10, Stripes: 300, Policy: policy, Life: 90 * sim.Day,
		Faults: []sim.Fault{
			{Kind: sim.Slow, At: 10 * sim.Day, Nodes: 100},
			{Kind: sim.Lying, At: 20 * sim.Day, Nodes: 30},
			{Kind: sim.Crash, At: 60 * sim.Day, Nodes: 20},
			{Kind: sim.Partition, At: 90 * sim.Day, Nodes: 200, For: 12 * time.Hour},
			{Kind: sim.SubnetCut, At: 120 * sim.Day, For: 12 * time.Hour},
			{Kind: sim.HostLoss, At: 150 * sim.Day},
			{Kind: sim.ZoneLoss, At: 180 * sim.Day},
		},
	})
	if err != nil {
		return "", err
	}
	f := r.Fired
	return fmt.Sprintf("| %s | %d, %d, %d | %d | %d, %d | %d, %d | %d | %.1f | %d |\n", name(text), f[sim.Slow], f[sim.Lying], f[sim.Crash],
		f[sim.Partition], f[sim.SubnetCut], f[sim.HostLoss], f[sim.ZoneLoss], r.Deaths, r.Lost, r.Unavailable.Hours(), r.Unhealthy), nil
}

func tables(w io.Writer) {
	for _, repair := range []time.Duration{time.Hour, 6 * time.Hour, sim.Day} {
		fmt.Fprintf(w, tableIntro, repair.Hours())
		for _, km := range [][2]int{{2, 1}, {3, 2}, {4, 2}, {6, 3}, {8, 3}, {10, 4}} {
			for _, mirrored := range []bool{false, true} {
				fmt.Fprintf(w, "| %d+%d", km[0], km[1])
				if mirrored {
					fmt.Fprint(w, " mirrored")
				}
				copies := 1.0
				if mirrored {
					copies = 2
				}
				fmt.Fprintf(w, " | %.2f", copies*float64(km[0]+km[1])/float64(km[0]))
				for _, days := range []int{7, 30, 90, 365} {
					c := sim.Chain{
						K: km[0], M: km[1], Mirrored: mirrored, Life: time.Duration(days) * sim.Day,
						Copy: repair, Rebuild: repair, Urgent: repair,
					}
					fmt.Fprintf(w, " | %.1e", c.Loss(sim.Year))
				}
				fmt.Fprintln(w, " |")
			}
		}
	}
}

// absences tells what going away each day costs.
func absences(w io.Writer) error {
	fmt.Fprint(w, absencesIntro)
	for _, text := range []string{"4+2,mirror=off", "4+2,mirror=on", "10+4,mirror=off", "10+4,mirror=on"} {
		policy, err := erasure.ParsePolicy(text)
		if err != nil {
			return err
		}
		for _, after := range []time.Duration{0, 12 * time.Hour} {
			o := sim.Options{Nodes: 1000, Stripes: 1, Policy: policy, Life: 90 * sim.Day, CopyAfter: after, DeadAfter: after}
			o.EnsureDefaults()
			fmt.Fprintf(w, "| %s | %v, %v", name(text), short(o.CopyAfter), short(o.DeadAfter))
			for _, absent := range []time.Duration{0, 15 * time.Minute, time.Hour, 8 * time.Hour} {
				o.Absent = absent
				moved, err := o.Traffic()
				if err != nil {
					return err
				}
				fmt.Fprintf(w, " | %.0f", moved)
			}
			fmt.Fprintln(w, " |")
		}
	}
	return nil
}

func short(d time.Duration) string {
	if d < time.Hour {
		return fmt.Sprintf("%.0f min", d.Minutes())
	}
	return fmt.Sprintf("%.0f h", d.Hours())
}

const absencesIntro = `
## What daily absences cost

Shards moved per stripe and year by the model, for nodes that live 90 days and go away once a day for a time of this mean; a transfer takes 1 h.
A pool of machines that are switched off at night moves everything once a day with the default copy-after of 5 min: nodes of such a pool need a longer one.

| scheme | copy-after, dead-after | never away | 15 min | 1 h | 8 h |
| --- | --- | --- | --- | --- | --- |
`

const intro = `# Durability

` + "`make durability`" + ` writes this file: it simulates a year of 1,000 nodes (package ` + "`sim`" + `, where it says what is real in it and what is a model)
and compares it with a Markov model of one stripe. It fails where losses lie outside the interval or repair traffic is off by more than 15 %.

## The formula

n = k + m shards; a node dies at rate λ = 1/lifetime, T is a year, τ the mean time from a loss to the new copy, detection included.

- Without mirrors the state is the number i of lost shards: i → i+1 at (n−i)λ, i → i−1 at i/τ, lost at i = m+1.
  For λτ ≪ 1: P ≈ C(n, m+1) (m+1) (λτ)^m λT.
- With mirrors the state is (a, b), a shards with one copy, b with none: a grows at 2λ(n−a−b), a copy is made at a/τ_copy, the last copy goes at λa,
  and b shards are rebuilt at b/τ, mirrors included; lost at b = m+1. For λτ ≪ 1: P ≈ C(n, m+1) (m+1) (2λ²τ_copy)^(m+1) τ^m T.
- Where at most k+1 shards are healthy, keepers begin after copy-after of silence (5 min) instead of dead-after (1 h); τ follows the state.

The tables are the exact solution exp(QT) of these chains; the closed forms are too high where repairs are slow. A volume of S stripes loses about S · P of them.

## Simulated and modelled

Repairs are slowed down here until so much is lost that the comparison can fail. The interval holds the mean of the losses with 99 % confidence, given the stripes lost and
the deaths, which all stripes share. An absence longer than the threshold and a transfer makes a repair for nothing; the model counts these too.

`

const faultsIntro = `
Other faults, one after the other in the same year, with the defaults for detection (5 min, 1 h) and repairs of 1 h: 500 hosts, 100 subnets, 10 zones, 300 stripes.
A fault that hits no node fails the run. Deaths at once are not in the formula. Repairs keep the shards of a stripe apart by host only, as the nodes do it, so that after half a year
a zone may hold more than m of them, and its loss then costs stripes. Stripes that lack a copy at the end are those that the last hours' deaths have hit.

| scheme | slow, lying, crashed | partition | subnet cut, host lost | zone lost, deaths in all | stripes lost | stripe-hours unreadable | not whole at the end |
| --- | --- | --- | --- | --- | --- | --- | --- |
`

const tableIntro = `
## Loss of a stripe in a year, repairs of %.0f h

Storage is bytes stored per byte of data. Independent deaths only.

| scheme | storage | lifetime 7 d | 30 d | 90 d | 365 d |
| --- | --- | --- | --- | --- | --- |
`
