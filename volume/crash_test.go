package volume

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
)

// crashDirEnv makes this test binary a process that works on a volume until it is killed.
const crashDirEnv = "DEFS_TEST_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDirEnv); dir != "" {
		if err := workUntilKilled(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func crashName(i int) string { return "file" + strconv.Itoa(i) }

func crashContent(i int) []byte {
	return bytes.Repeat([]byte{byte(i), byte(i >> 8), 0xd5}, 1+i%20_000)
}

// workUntilKilled saves one file after the other as editors do (write another, rename over the old) and prints a
// line for each that was acknowledged. Nothing is flushed.
func workUntilKilled(dir string) error {
	v, err := Open(context.Background(), Options{Dir: dir, Key: testKey, SegmentBytes: 4 << 20})
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		a, err := v.Create(ctx, RootIno, "new", Create{Mode: syscall.S_IFREG | 0o600, Excl: true})
		if err != nil {
			return err
		}
		if _, err := v.Write(ctx, a.Ino, 0, crashContent(i), WriteFlags{}); err != nil {
			return err
		}
		if err := v.Rename(ctx, RootIno, "new", RootIno, "current", 0); err != nil {
			return err
		}
		if _, err := v.Link(ctx, a.Ino, RootIno, crashName(i)); err != nil {
			return err
		}
		if i%3 == 2 {
			if err := v.Unlink(ctx, RootIno, crashName(i-1)); err != nil {
				return err
			}
		}
		fmt.Println(i)
	}
}

// TestKilledProcessLosesNothing kills a process at work and looks for everything it acknowledged.
func TestKilledProcessLosesNothing(t *testing.T) {
	dir := t.TempDir()
	for _, lines := range []int{1, 40, 200} {
		dir := fmt.Sprint(dir, "/", lines)
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashDirEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		acked := -1
		for s := bufio.NewScanner(out); s.Scan(); {
			if acked, err = strconv.Atoi(s.Text()); err != nil {
				t.Fatal(err)
			}
			if acked == lines {
				cmd.Process.Kill() // the loop reads on: what was printed until then is acknowledged too
			}
		}
		cmd.Wait()
		if acked < lines {
			t.Fatalf("the process ended after %d of %d", acked, lines)
		}
		f := fs{t, openAt(t, dir, newTestClock()), ctx}
		f.reaper.wait()
		for i := range acked + 1 {
			if i%3 == 1 {
				_, err := f.Lookup(ctx, RootIno, crashName(i))
				if i < acked {
					f.want(err, NotExist)
				}
				if KindOf(err) == NotExist {
					continue // the last one may have been removed before its removal was acknowledged
				}
			}
			if got := f.read(f.lookup(RootIno, crashName(i)), 0, 1<<16); got != string(crashContent(i)) {
				t.Errorf("file %d: %d bytes", i, len(got))
			}
		}
		current := f.read(f.lookup(RootIno, "current"), 0, 1<<16)
		if current != string(crashContent(acked)) && current != string(crashContent(acked+1)) {
			t.Error("the renamed file is neither the last acknowledged one nor the next")
		}
		checkInvariants(t, f.Volume)
		f.ok(f.Close(ctx))
	}
}

// TestConcurrentReadersSeeWholeWrites: a write is seen wholly or not at all, and a file never shows bytes past a cut.
func TestConcurrentReadersSeeWholeWrites(t *testing.T) {
	f := newFS(t)
	ino := f.file(RootIno, "a")
	const size = 20_000
	f.write(ino, 0, string(bytes.Repeat([]byte{'a'}, size)))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			buf := make([]byte, size+10)
			for {
				select {
				case <-stop:
					return
				default:
				}
				n, err := f.Read(ctx, ino, 0, buf)
				if err != nil {
					t.Error(err)
					return
				}
				if n != size && n != size/2 {
					t.Errorf("a file of %d bytes", n)
					return
				}
				for _, c := range buf[:n] {
					if c != buf[0] || c == 0 {
						t.Errorf("mixed content %q and %q", buf[0], c)
						return
					}
				}
			}
		})
	}
	for i := range 300 {
		f.write(ino, 0, string(bytes.Repeat([]byte{byte('a' + i%26)}, size)))
		if i%3 == 0 {
			f.truncate(ino, size/2)
		}
	}
	close(stop)
	wg.Wait()
	checkInvariants(t, f.Volume)
}

// TestConcurrentNames works in two shared directories from several goroutines and checks the result.
func TestConcurrentNames(t *testing.T) {
	f := newFS(t)
	dirs := []Ino{f.mkdir(RootIno, "a"), f.mkdir(RootIno, "b")}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 200 {
				from, to := dirs[(g+i)%2], dirs[(g+i/2)%2]
				name := strconv.Itoa((g*7 + i) % 11)
				a, err := f.Create(ctx, from, name, Create{Mode: syscall.S_IFREG | 0o600})
				if err == nil {
					f.Acquire(a.Ino, 1)
					f.Write(ctx, a.Ino, 0, []byte(name), WriteFlags{Append: true})
				}
				f.Rename(ctx, from, name, to, strconv.Itoa(i%11), RenameFlags(i%3))
				f.Lookup(ctx, to, name)
				f.Link(ctx, a.Ino, to, strconv.Itoa(i%13))
				f.Unlink(ctx, to, name)
				if err == nil {
					f.Release(a.Ino, 1)
				}
			}
		})
	}
	wg.Wait()
	f.reaper.wait()
	checkInvariants(t, f.Volume)
}
