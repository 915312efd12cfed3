package fusefs

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// operation is the context of one request that may have to wait, for room in the journal or for peers. It ends
// when the program that made the request is being killed.
//
// The kernel interrupts a request at any signal that the program handles, a Go program's own preemption or a
// terminal's resize included, and a local disk would not fail a read for that. So an interrupt is only the sign to
// look whether a fatal signal is pending. The kernel says so once per request: later signals have to be polled for.
//
// Making an operation costs one small allocation. Only Done starts a goroutine; end stops it.
type operation struct {
	interrupted <-chan struct{} // closed at the kernel's first INTERRUPT
	pid         uint32          // thread that made the request; 0 for the kernel itself

	start   sync.Once
	killed  chan struct{} // closed when a fatal signal is pending; made by start
	ended   chan struct{} // closed by end
	watched chan struct{} // closed when the watcher has returned
}

const fatalSignalPoll = 50 * time.Millisecond

func newOperation(interrupted <-chan struct{}, pid uint32) *operation {
	return &operation{interrupted: interrupted, pid: pid}
}

// end must be called when the request has been served.
func (o *operation) end() {
	o.start.Do(func() {}) // from here on no watcher can start
	if o.ended != nil {
		close(o.ended)
		<-o.watched
	}
}

func (o *operation) Done() <-chan struct{} {
	o.start.Do(func() {
		o.killed, o.ended, o.watched = make(chan struct{}), make(chan struct{}), make(chan struct{})
		go o.watch()
	})
	return o.killed
}

func (o *operation) Err() error {
	select {
	case <-o.interrupted:
	default:
		return nil
	}
	select {
	case <-o.Done():
		return context.Canceled
	default:
		return nil
	}
}

func (o *operation) Deadline() (time.Time, bool) { return time.Time{}, false }

func (o *operation) Value(any) any { return nil }

func (o *operation) watch() {
	defer close(o.watched)
	select {
	case <-o.ended:
		return
	case <-o.interrupted:
	}
	poll := time.NewTicker(fatalSignalPoll)
	defer poll.Stop()
	for {
		if dying(o.pid) {
			close(o.killed)
			return
		}
		select {
		case <-o.ended:
			return
		case <-poll.C:
		}
	}
}

// dying reports whether the thread has exited or has a signal pending that will end it.
func dying(pid uint32) bool {
	if pid == 0 {
		return false
	}
	status, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(pid), 10) + "/status")
	if err != nil {
		return os.IsNotExist(err)
	}
	return fatalSignalPending(status)
}

// fatalSignalPending reads the signal masks of proc_pid_status(5). For a signal that ends the process without a
// core dump the kernel itself has made SIGKILL pending in every thread.
func fatalSignalPending(status []byte) bool {
	var pending, blocked, ignored, caught uint64
	lines := bufio.NewScanner(bytes.NewReader(status))
	for lines.Scan() {
		key, value, _ := bytes.Cut(lines.Bytes(), []byte(":"))
		mask, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
		if err != nil {
			continue
		}
		switch string(key) {
		case "SigPnd", "ShdPnd":
			pending |= mask
		case "SigBlk":
			blocked = mask
		case "SigIgn":
			ignored = mask
		case "SigCgt":
			caught = mask
		}
	}
	return pending&signalMask(syscall.SIGKILL) != 0 || pending&^(blocked|ignored|caught|harmlessSignals) != 0
}

func signalMask(s syscall.Signal) uint64 { return 1 << (s - 1) }

// harmlessSignals do not end a process that has no handler for them.
var harmlessSignals = signalMask(syscall.SIGCHLD) | signalMask(syscall.SIGCONT) | signalMask(syscall.SIGURG) |
	signalMask(syscall.SIGWINCH) | signalMask(syscall.SIGSTOP) | signalMask(syscall.SIGTSTP) |
	signalMask(syscall.SIGTTIN) | signalMask(syscall.SIGTTOU)
