package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// abortTimeout is how long a turn may take to return after its filesystem was killed.
const abortTimeout = 20 * time.Second

// measure runs every group on one place and prints the table.
func measure(ctx context.Context, s *scratch, p plan, at *place, in *input) (err error) {
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
	n, err := startNull(ctx, s, at.dir)
	if err != nil {
		return err
	}
	systems = append(systems, n)
	m, err := startDefs(ctx, s, at.dir, p.policy)
	if err != nil {
		return err
	}
	systems = append(systems, m)

	t := newTable(at.name)
	before := load()
	var chosen []group
	for _, g := range groups {
		if p.groups == "" || slices.Contains(strings.Split(p.groups, ","), g.name) {
			chosen = append(chosen, g)
		}
	}
	copies := p.copyGiB > 0 && at.name != "memory"
	for i, g := range chosen {
		shares := len(chosen) - i
		if copies {
			shares += 2
		}
		deadline, _ := ctx.Deadline()
		share, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(shares))
		err := takeRounds(share, p, in, systems, g, t)
		cancel()
		if err != nil {
			return err
		}
	}
	if copies && ctx.Err() == nil {
		if err := copyMuch(ctx, p, m, t); err != nil {
			t.fail(rowPeak, defsName, err)
		}
	}
	m.notePeak()
	t.add(rowPeak, defsName, 0, float64(m.peak>>20))
	t.remark("load %s before, %s after", before, load())
	t.print(os.Stdout)
	return nil
}

// takeRounds runs a group on the systems in turns, as often as is wanted and
// the time allows.
func takeRounds(ctx context.Context, p plan, in *input, systems []system, g group, t *table) error {
	for round := range p.rounds {
		if ctx.Err() != nil {
			t.remark("%s: %d of %d rounds, the time is over", g.name, round, p.rounds)
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
