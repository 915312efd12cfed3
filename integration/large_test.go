package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	// largeBytes is more than a GiB, and no multiple of anything.
	largeBytes = 1<<30 + 100<<20 + 4097
	// memoryMax bounds the resident memory of the process that uploads or downloads.
	memoryMax = 300 << 20
)

// largeContent is the same every time: every eighth MiB is random, or all of it
// in the long form; the rest is zeros.
func largeContent() io.Reader {
	return io.LimitReader(&sparse{random: rand.NewChaCha8([32]byte{9}), dense: os.Getenv("DEFS_LARGE") != ""}, largeBytes)
}

type sparse struct {
	random *rand.ChaCha8
	dense  bool
	off    int64
}

func (s *sparse) Read(b []byte) (int, error) {
	b = b[:min(int64(len(b)), 1<<20-s.off%(1<<20))]
	if s.dense || s.off>>20%8 == 0 {
		s.random.Read(b)
	} else {
		clear(b)
	}
	s.off += int64(len(b))
	return len(b), nil
}

// same is a writer that fails at the first byte which is not the next one of want.
type same struct {
	want io.Reader
	buf  []byte
	n    int64
}

func (s *same) Write(b []byte) (int, error) {
	s.buf = append(s.buf[:0], make([]byte, len(b))...)
	if _, err := io.ReadFull(s.want, s.buf); err != nil {
		return 0, fmt.Errorf("more than %d bytes: %w", s.n, err)
	}
	if !bytes.Equal(b, s.buf) {
		return 0, fmt.Errorf("other bytes at %d", s.n)
	}
	s.n += int64(len(b))
	return len(b), nil
}

// peakMemory runs a program to its end and returns the most resident memory it
// ever had.
func peakMemory(t *testing.T, cmd *exec.Cmd) (peakBytes int64) {
	t.Helper()
	var problems bytes.Buffer
	cmd.Env, cmd.Stderr, cmd.WaitDelay = environment(), &problems, time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("%v: %v: %s", cmd.Args, err, problems.String())
			}
			return peakBytes
		case <-time.After(10 * time.Millisecond):
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid)) // proc_pid_status(5)
			_, after, found := strings.Cut(string(b), "VmHWM:")
			var kib int64
			if _, scan := fmt.Sscan(after, &kib); err == nil && found && scan == nil {
				peakBytes = max(peakBytes, kib<<10)
			}
		}
	}
}

// More than a GiB goes in as one file and comes out again, from the peers that
// are left, and neither way takes more memory than a few stripes.
func TestLargeFile(t *testing.T) {
	c := newCluster(t, "4+2", 6)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	_, addrs := c.addrs()
	defs := func(args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, program("defs"), append(args, "--data", c.device, "--peers", "@"+addrs)...)
	}
	began := time.Now()
	var id strings.Builder
	put := defs("put", "/dev/stdin")
	put.Stdin, put.Stdout = largeContent(), &id
	putPeak := peakMemory(t, put)
	t.Logf("put %d MiB, durable after %v, %d MiB of memory", largeBytes>>20, time.Since(began).Round(time.Millisecond), putPeak>>20)

	run(t, 60*time.Second, program("defs"), "cache", "drop", "--data", c.device)
	if left := sizeBelow(t, filepath.Join(c.device, "journal")); left > largeBytes/8 {
		t.Fatalf("%d bytes are left on this disk: the peers would not be asked", left)
	}
	for _, i := range rand.Perm(len(c.nodes))[:2] {
		c.nodes[i].kill()
	}
	began = time.Now()
	content := &same{want: largeContent()}
	get := defs("get", strings.TrimSpace(id.String()), "-")
	get.Stdout = content
	getPeak := peakMemory(t, get)
	if content.n != largeBytes {
		t.Fatalf("%d of %d bytes came back", content.n, int64(largeBytes))
	}
	t.Logf("got it from 4 of 6 nodes in %v, %d MiB of memory", time.Since(began).Round(time.Millisecond), getPeak>>20)
	for what, peak := range map[string]int64{"put": putPeak, "get": getPeak} {
		if peak == 0 || peak > memoryMax {
			t.Errorf("%s took %d MiB of memory, at most %d are allowed", what, peak>>20, memoryMax>>20)
		}
	}
}

// sizeBelow returns the bytes that the files below dir take on the disk.
func sizeBelow(t *testing.T, dir string) (n int64) {
	t.Helper()
	out := run(t, 30*time.Second, "du", "-sB1", dir)
	if _, err := fmt.Sscan(out, &n); err != nil {
		t.Fatal(errors.Join(err, errors.New(out)))
	}
	return n
}
