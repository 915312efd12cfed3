package fusefs

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

func TestFatalSignalPending(t *testing.T) {
	mask := func(signals ...syscall.Signal) (m uint64) {
		for _, s := range signals {
			m |= signalMask(s)
		}
		return m
	}
	for _, c := range []struct {
		name                                      string
		thread, process, blocked, ignored, caught uint64
		want                                      bool
	}{
		{name: "nothing"},
		{name: "kill", thread: mask(syscall.SIGKILL), want: true},
		{name: "quit", process: mask(syscall.SIGQUIT), want: true},
		{name: "caught", thread: mask(syscall.SIGURG, syscall.SIGALRM), caught: mask(syscall.SIGALRM)},
		{name: "ignored", process: mask(syscall.SIGHUP), ignored: mask(syscall.SIGHUP)},
		{name: "blocked", thread: mask(syscall.SIGTERM), blocked: mask(syscall.SIGTERM)},
		{name: "harmless", process: mask(syscall.SIGCHLD, syscall.SIGWINCH)},
	} {
		status := fmt.Sprintf("Name:\tx: y\nSigQ:\t0/1\nSigPnd:\t%016x\nShdPnd:\t%016x\nSigBlk:\t%016x\nSigIgn:\t%016x\nSigCgt:\t%016x\n",
			c.thread, c.process, c.blocked, c.ignored, c.caught)
		if got := fatalSignalPending([]byte(status)); got != c.want {
			t.Errorf("%s: got %v", c.name, got)
		}
	}
}

func FuzzFatalSignalPending(f *testing.F) {
	f.Add([]byte("SigPnd:\t0000000000000100\nSigBlk"))
	f.Fuzz(func(t *testing.T, status []byte) { fatalSignalPending(status) })
}

func TestOperation(t *testing.T) {
	t.Run("never waited for", func(t *testing.T) {
		op := newOperation(make(chan struct{}), 1)
		op.end()
		if op.watched != nil {
			t.Fatal("a goroutine was started")
		}
	})
	t.Run("ends while watched", func(t *testing.T) {
		op := newOperation(make(chan struct{}), 1)
		done := op.Done()
		op.end()
		select {
		case <-done:
			t.Fatal("ended as if killed")
		default:
		}
	})
	t.Run("interrupt without a fatal signal", func(t *testing.T) {
		cmd := exec.Command("sleep", "100")
		must(t, cmd.Start())
		defer func() { cmd.Process.Kill(); cmd.Wait() }()
		interrupted := make(chan struct{})
		close(interrupted)
		op := newOperation(interrupted, uint32(cmd.Process.Pid))
		defer op.end()
		if err := op.Err(); err != nil {
			t.Fatalf("ended: %v", err)
		}
	})
	t.Run("caller is gone", func(t *testing.T) {
		cmd := exec.Command("true")
		must(t, cmd.Run())
		interrupted := make(chan struct{})
		op := newOperation(interrupted, uint32(cmd.Process.Pid))
		defer op.end()
		if err := op.Err(); err != nil {
			t.Fatalf("ended before the interrupt: %v", err)
		}
		ctx, cancel := context.WithCancel(op)
		defer cancel()
		close(interrupted)
		<-ctx.Done()
		if !errors.Is(op.Err(), context.Canceled) || !strings.Contains(ctx.Err().Error(), "canceled") {
			t.Fatalf("ended with %v, %v", op.Err(), ctx.Err())
		}
	})
}
