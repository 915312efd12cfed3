package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// abortTimeout is how long a turn may take to return after its filesystem was killed.
const abortTimeout = 20 * time.Second

// measure runs every step on one place and prints the table.
func measure(ctx context.Context, s *scratch, p plan, at *place, in *input, speeds map[string]float64) (err error) {
	var systems []system
	defer func() {
		for _, sys := range slices.Backward(systems) {
			err = errors.Join(err, sys.close())
		}
	}()
	directory := filepath.Join(at.dir, nativeName)
	if err := os.Mkdir(directory, 0o700); err != nil {
		return err
	}
	systems = append(systems, native{directory})
	for _, sealed := range []bool{false, true} {
		n, err := startNull(ctx, s, at.dir, sealed)
		if err != nil {
			return err
		}
		systems = append(systems, n)
	}
	m, err := startDefs(ctx, s, at.dir, pool{policy: p.policy, nodes: 6})
	if err != nil {
		return err
	}
	systems = append(systems, m)

	t := newTable(at.name)
	before := load()
	steps := p.steps(at.name)
	for i, step := range steps {
		fmt.Fprintf(os.Stderr, "%s: %s (%d of %d)\n", at.name, step.name, i+1, len(steps))
		if ctx.Err() != nil {
			t.remark("%s: not begun, the time is over", step.name)
			continue
		}
		deadline, _ := ctx.Deadline()
		share, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(len(steps)-i))
		if step.group != nil {
			err = takeRounds(share, p, in, systems, *step.group, t)
		} else if step.lone != nil {
			err = measureAlone(share, s, p, at, in, speeds, *step.lone, t)
		} else if err := copyMuch(share, p, m, t); err != nil {
			t.fail(rowPeak, defsName, err)
		}
		cancel()
		if err != nil {
			return err
		}
	}
	m.notePeak()
	t.add(rowPeak, defsName, 0, max(float64(m.peak>>20), median(t.values(rowPeak, defsName))))
	t.remark("load %s before, %s after", before, load())
	t.print(os.Stdout)
	return nil
}

// step is a group for all filesystems, a measurement of DeFS alone, or, with
// neither, the copy of many bytes.
type step struct {
	name  string
	group *group
	lone  *lone
}

const copyStep = "copy"

// steps are those of a place, in order: what the small one in memory has no
// room for is done on the disk, and what a disk would only disturb in memory.
func (p plan) steps(place string) []step {
	var all []step
	for _, g := range groups {
		all = append(all, step{name: g.name, group: &g})
	}
	for _, l := range lones {
		if l.disk == (place == "disk") {
			all = append(all, step{name: l.name, lone: &l})
		}
	}
	if p.copyGiB > 0 && place == "disk" {
		all = append(all, step{name: copyStep})
	}
	if p.groups == "" {
		return all
	}
	chosen := strings.Split(p.groups, ",")
	return slices.DeleteFunc(all, func(s step) bool { return !slices.Contains(chosen, s.name) })
}

// groupNames are the names of all steps.
func groupNames() string {
	var names []string
	for _, place := range []string{"memory", "disk"} {
		for _, s := range (plan{copyGiB: 1}).steps(place) {
			if !slices.Contains(names, s.name) {
				names = append(names, s.name)
			}
		}
	}
	return strings.Join(names, ",")
}

// measureAlone runs one measurement of DeFS alone. What goes wrong is told in
// the table.
func measureAlone(ctx context.Context, s *scratch, p plan, at *place, in *input, speeds map[string]float64, l lone, t *table) error {
	base := filepath.Join(at.dir, "alone")
	if err := os.Mkdir(base, 0o700); err != nil {
		return err
	}
	in.renew()
	alone := &solo{plan: p, scratch: s, base: base, in: in, t: t, budget: budget{
		cores: float64(runtime.NumCPU()), stages: speeds,
		fuseRead: median(t.values(rowSeqCold, nullName)), fuseWrite: median(t.values(rowSeqWrite, nullName)),
	}}
	switch err := l.run(alone, ctx); {
	case err == nil:
	case errors.Is(err, context.DeadlineExceeded):
		t.remark("%s: the time is over", l.name)
	case errors.Is(err, context.Canceled):
		return err // the person has had enough
	default:
		t.fail(l.row, defsName, err)
	}
	return os.RemoveAll(base)
}

// takeRounds runs a group on the systems in turns, as often as is wanted and
// the time allows.
func takeRounds(ctx context.Context, p plan, in *input, systems []system, g group, t *table) error {
	rounds := p.rounds
	if g.once {
		rounds = 1
	}
	for round := range rounds {
		if ctx.Err() != nil {
			t.remark("%s: %d of %d rounds, the time is over", g.name, round, rounds)
			return nil
		}
		in.renew()
		for i := range systems {
			if err := takeTurn(ctx, p, in, systems[(i+round)%len(systems)], g, round, t); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeTurn runs a group on a system. What goes wrong with the filesystem is
// told in the table; an error means that the benchmark cannot go on.
func takeTurn(all context.Context, p plan, in *input, sys system, g group, round int, table *table) error {
	ctx, cancel := context.WithTimeout(all, p.turn)
	defer cancel()
	t := &turn{plan: p, in: in, sys: sys, dir: filepath.Join(sys.dir(), fmt.Sprintf("%s-%d", g.name, round))}
	if m, ok := sys.(*mounted); ok && p.profiles != "" {
		profiled, stop := context.WithCancel(ctx)
		var profiling sync.WaitGroup
		profiling.Go(func() { m.profile(profiled, p.profiles, fmt.Sprintf("%s-%d", g.name, round)) })
		defer profiling.Wait()
		defer stop()
	}
	t.record = func(row string, value float64) { table.add(row, sys.name(), round, value) }
	ended := make(chan error, 1)
	go func() {
		err := os.Mkdir(t.dir, 0o755)
		if err == nil {
			err = g.run(t, ctx)
		}
		if err == nil {
			// What the turn leaves to do in the background is not the next one's burden.
			err = errors.Join(os.RemoveAll(t.dir), sys.settle(ctx))
		}
		ended <- err
	}()
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		err = errors.Join(ctx.Err(), waitAborted(ended))
		if err != nil && isHung(err) {
			sys.abort()
			if waitAborted(ended) == errHung {
				return fmt.Errorf("%s: %s: %s does not return", g.name, sys.name(), t.step)
			}
		}
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) {
		return err // the person has had enough
	}
	if all.Err() != nil {
		table.remark("%s: %s: the time is over", t.step, sys.name())
	} else {
		table.fail(t.step, sys.name(), err)
	}
	if m, ok := sys.(*mounted); ok {
		again, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
		defer cancel()
		if err := m.remount(again); err != nil {
			return fmt.Errorf("mount again after a failure: %w", err)
		}
	}
	return os.RemoveAll(t.dir)
}

var errHung = errors.New("it hangs")

func isHung(err error) bool { return errors.Is(err, errHung) }

// waitAborted gives a turn that is over a moment to notice.
func waitAborted(ended <-chan error) error {
	select {
	case <-ended: // whatever it says, it has ended
		return nil
	case <-time.After(abortTimeout):
		return errHung
	}
}

// copyMuch writes many bytes, which are published while they come, for the peak memory.
func copyMuch(ctx context.Context, p plan, m *mounted, t *table) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(m.base, &fs); err != nil {
		return err
	}
	if free := int64(fs.Bavail) * fs.Bsize >> 30; free < int64(3*p.copyGiB) {
		return fmt.Errorf("%d GiB are free, copying %d GiB needs three times as much", free, p.copyGiB)
	}
	rng, block := rand.NewChaCha8([32]byte{2}), make([]byte, chunkBytes)
	start := time.Now()
	for i := range p.copyGiB {
		f, err := os.Create(filepath.Join(m.dir(), fmt.Sprintf("copy-%d", i)))
		if err != nil {
			return err
		}
		for range 1 << 30 / chunkBytes {
			if ctx.Err() != nil {
				return errors.Join(ctx.Err(), f.Close())
			}
			_, _ = rng.Read(block) // never fails
			if _, err := f.Write(block); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	t.add(rowCopy, defsName, 0, float64(p.copyGiB<<30)/1e6/time.Since(start).Seconds())
	return nil
}
