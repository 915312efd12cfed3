package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// lone is a measurement of DeFS for which there is nothing to compare with:
// each has a volume and a pool of its own.
type lone struct {
	name string
	row  string // its first
	disk bool   // done on the disk, not in memory
	run  func(*solo, context.Context) error
}

var lones = []lone{
	{name: "nodes", row: rowDrain, run: (*solo).fourteenNodes},
	{name: "mirrored", row: rowDrainMirror, run: (*solo).mirrored},
	{name: "distant", row: rowDistantSmall, run: (*solo).distant},
	{name: "edit", row: rowEdit, run: (*solo).edit},
	{name: "stored", row: rowStored, run: (*solo).stored},
	{name: "idle", row: rowIdleCPU, run: (*solo).idle},
	{name: "start", row: rowStart, disk: true, run: (*solo).start},
}

// solo is one such measurement.
type solo struct {
	plan
	scratch *scratch
	base    string // an empty directory
	in      *input
	t       *table
	budget  budget
}

const (
	distantOneWay = 25 * time.Millisecond
	distantFiles  = 2000
	distantTasks  = 16
	idleSettle    = 20 * time.Second // heartbeats and inventories after the start
	idleTime      = 30 * time.Second
	documentBytes = 100 << 20
	editRegions   = 10
)

func (s *solo) add(row string, value float64) { s.t.add(row, defsName, 0, value) }

// with runs work on a new volume and pool, and removes them.
func (s *solo) with(ctx context.Context, p pool, work func(*mounted) error) (err error) {
	m, err := startDefs(ctx, s.scratch, s.base, p)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close(), os.RemoveAll(m.base)) }()
	if err := m.awaitNodes(ctx); err != nil {
		return err
	}
	err = work(m)
	m.notePeak()
	s.t.add(rowPeak, defsName, 0, max(float64(m.peak>>20), median(s.t.values(rowPeak, defsName))))
	return err
}

// drained writes the sequential file and waits until the nodes have it, and
// records the speed of both together.
func (s *solo) drained(ctx context.Context, m *mounted, row string, expansion float64) (string, error) {
	path, data := filepath.Join(m.dir(), "sequential"), s.in.random[:s.seqMiB<<20]
	start := time.Now()
	if err := writeAll(path, data); err != nil {
		return "", err
	}
	if err := m.settle(ctx); err != nil {
		return "", err
	}
	s.add(row, float64(len(data))/1e6/time.Since(start).Seconds())
	if b, ok := s.budget.drain(expansion); ok {
		s.t.add(row, budgetName, 0, b)
	}
	return path, nil
}

func (s *solo) fourteenNodes(ctx context.Context) error {
	return s.with(ctx, pool{policy: "10+4,mirror=off", nodes: 14}, func(m *mounted) error {
		path, err := s.drained(ctx, m, rowDrain, 1.4)
		if err != nil {
			return err
		}
		data := s.in.random[:s.seqMiB<<20]
		for round := range s.rounds {
			if err := m.dropLocal(ctx, int64(len(data))); err != nil {
				return err
			}
			if err := errors.Join(m.remount(ctx), m.awaitNodes(ctx), dropKernelCaches()); err != nil {
				return err
			}
			start := time.Now()
			if err := readAll(path, nil); err != nil {
				return err
			}
			s.t.add(rowNodesRead, defsName, round, float64(len(data))/1e6/time.Since(start).Seconds())
			if b, ok := s.budget.read(); ok {
				s.t.add(rowNodesRead, budgetName, round, b)
			}
		}
		return readAll(path, data)
	})
}

func (s *solo) mirrored(ctx context.Context) error {
	return s.with(ctx, pool{policy: "10+4,mirror=on", nodes: 30}, func(m *mounted) error {
		_, err := s.drained(ctx, m, rowDrainMirror, 2*1.4)
		return err
	})
}

// distant reads small files from nodes that are 50 ms away.
func (s *solo) distant(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("only root can make network namespaces")
	}
	d, err := s.scratch.newDistance(ctx, distantOneWay)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	where := pool{policy: s.policy + ",mirror=off", nodes: 6, mountSpace: d.near, poolSpace: d.far, listen: "/ip4/" + d.farAddress + "/tcp/0"}
	return s.with(ctx, where, func(m *mounted) error {
		// Each alone in a stripe: reading one brings nothing of the other.
		lone := []string{filepath.Join(m.dir(), "lone-0"), filepath.Join(m.dir(), "lone-1")}
		for i, path := range lone {
			content := s.in.random[(distantFiles+i)*smallBytes:][:smallBytes]
			if err := errors.Join(os.WriteFile(path, content, 0o644), m.settle(ctx)); err != nil {
				return err
			}
		}
		var paths []string
		for i := range distantFiles {
			dir := filepath.Join(m.dir(), fmt.Sprintf("d%02d", i/100))
			if i%100 == 0 {
				if err := os.Mkdir(dir, 0o755); err != nil {
					return err
				}
			}
			path := filepath.Join(dir, fmt.Sprintf("f%02d", i%100))
			if err := os.WriteFile(path, s.in.random[i*smallBytes:(i+1)*smallBytes], 0o644); err != nil {
				return err
			}
			paths = append(paths, path)
		}
		if err := m.dropLocal(ctx, distantFiles*smallBytes*4); err != nil { // the metadata stays here
			return err
		}
		if err := errors.Join(m.remount(ctx), m.awaitNodes(ctx), dropKernelCaches()); err != nil {
			return err
		}
		for i, row := range []string{rowFirstByteNew, rowFirstByte} {
			start := time.Now()
			if _, err := os.ReadFile(lone[i]); err != nil {
				return err
			}
			s.add(row, float64(time.Since(start).Microseconds())/1e3)
		}
		var next atomic.Int64
		var readers errgroup.Group
		start := time.Now()
		for range distantTasks {
			readers.Go(func() error {
				for i := next.Add(1) - 1; i < distantFiles && ctx.Err() == nil; i = next.Add(1) - 1 {
					if err := readAll(paths[i], s.in.random[i*smallBytes:(i+1)*smallBytes]); err != nil {
						return err
					}
				}
				return ctx.Err()
			})
		}
		if err := readers.Wait(); err != nil {
			return err
		}
		s.add(rowDistantSmall, distantFiles/time.Since(start).Seconds())
		return nil
	})
}

// edit saves a document of which one percent is new, as an editor does: whole,
// beside the old one, and renamed over it.
func (s *solo) edit(ctx context.Context) error {
	return s.with(ctx, pool{policy: s.policy + ",mirror=off", nodes: 6}, func(m *mounted) error {
		rng := rand.NewChaCha8([32]byte{3})
		document := make([]byte, documentBytes)
		_, _ = rng.Read(document) // never fails
		path := filepath.Join(m.dir(), "document")
		if err := errors.Join(writeAll(path, document), m.settle(ctx)); err != nil {
			return err
		}
		before, err := allocatedBytes(m.nodesDir())
		if err != nil {
			return err
		}
		const regionBytes = documentBytes / 100 / editRegions
		for i := range editRegions {
			off := i*(documentBytes/editRegions) + regionBytes
			_, _ = rng.Read(document[off : off+regionBytes]) // never fails
		}
		next := path + ".new"
		if err := errors.Join(writeAll(next, document), os.Rename(next, path), m.settle(ctx)); err != nil {
			return err
		}
		after, err := allocatedBytes(m.nodesDir())
		if err != nil {
			return err
		}
		// 4+2: what leaves is two thirds of what the nodes store of it.
		s.add(rowEdit, float64(after-before)*4/6/documentBytes*100)
		return nil
	})
}

// stored is how many bytes the nodes hold for each byte of small files.
func (s *solo) stored(ctx context.Context) error {
	return s.with(ctx, pool{policy: "10+4,mirror=off", nodes: 14}, func(m *mounted) error {
		before, err := allocatedBytes(m.nodesDir())
		if err != nil {
			return err
		}
		rng := rand.New(rand.NewPCG(4, 1))
		content := rand.NewChaCha8([32]byte{4})
		buf := make([]byte, 16<<10)
		var logicalBytes int64
		for i := range s.entries {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			dir := filepath.Join(m.dir(), fmt.Sprintf("d%04d", i/100))
			if i%100 == 0 {
				if err := os.Mkdir(dir, 0o755); err != nil {
					return err
				}
			}
			size := 1<<10 + rng.IntN(15<<10+1)
			_, _ = content.Read(buf[:size]) // never fails
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%02d", i%100)), buf[:size], 0o644); err != nil {
				return err
			}
			logicalBytes += int64(size)
		}
		if err := m.settle(ctx); err != nil {
			return err
		}
		after, err := allocatedBytes(m.nodesDir())
		if err != nil {
			return err
		}
		s.add(rowStored, float64(after-before)/float64(logicalBytes))
		return nil
	})
}

// idle is what a pool and a mount cost that nobody uses.
func (s *solo) idle(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("only root can make network namespaces")
	}
	space, err := s.scratch.newNamespace(ctx, "idle")
	if err != nil {
		return err
	}
	return s.with(ctx, pool{policy: "10+4,mirror=off", nodes: 14, mountSpace: space, poolSpace: space}, func(m *mounted) error {
		if err := errors.Join(writeAll(filepath.Join(m.dir(), "file"), s.in.random[:1<<20]), m.settle(ctx)); err != nil {
			return err
		}
		wait := func(d time.Duration) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(d):
				return nil
			}
		}
		if err := wait(idleSettle); err != nil {
			return err
		}
		bytesBefore, err := loopbackBytes(ctx, space)
		if err != nil {
			return err
		}
		cpuBefore, start := m.nodes.cpu()+m.mount.cpu(), time.Now()
		if err := wait(idleTime); err != nil {
			return err
		}
		bytesAfter, err := loopbackBytes(ctx, space)
		if err != nil {
			return err
		}
		seconds := time.Since(start).Seconds()
		s.add(rowIdleCPU, (m.nodes.cpu()+m.mount.cpu()-cpuBefore).Seconds()/seconds*100)
		s.add(rowIdleNet, float64(bytesAfter-bytesBefore)/1024/seconds/float64(m.pool.nodes+1))
		return nil
	})
}

// start mounts a volume with many files, of which much has not left yet.
func (s *solo) start(ctx context.Context) error {
	room := fmt.Sprintf(",journal-max=%dMiB", 2*s.startMiB+4<<10)
	return s.with(ctx, pool{policy: s.policy + ",mirror=off", nodes: 6, options: room}, func(m *mounted) error {
		// Without nodes nothing leaves.
		if err := m.nodes.stop(); err != nil {
			return err
		}
		for i := 0; i < s.startFiles; i += 10_000 {
			if err := makeFiles(ctx, filepath.Join(m.dir(), fmt.Sprintf("files-%d", i)), min(10_000, s.startFiles-i)); err != nil {
				return err
			}
		}
		for i := range s.startMiB / 512 {
			s.in.renew()
			if err := writeAll(filepath.Join(m.dir(), fmt.Sprintf("backlog-%d", i)), s.in.random[:min(512<<20, len(s.in.random))]); err != nil {
				return err
			}
		}
		m.notePeak()
		if err := m.mount.stop(); err != nil {
			return err
		}
		if err := dropKernelCaches(); err != nil {
			return err
		}
		start := time.Now()
		if err := m.start(ctx); err != nil {
			return err
		}
		if _, err := os.ReadDir(filepath.Join(m.dir(), "files-0")); err != nil {
			return err
		}
		s.add(rowStart, time.Since(start).Seconds())
		s.t.remark("%s: with %d files and a backlog of %d MiB", rowStart, s.startFiles, s.startMiB)
		return nil
	})
}

// allocatedBytes is what the files below dir take on their disk.
func allocatedBytes(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && d.Type().IsRegular() {
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum, err
}
