package integration

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// mountAddress is the number of the mount's address, behind those of the nodes.
const mountAddress = 99

// network is a network namespace of its own, in which each process has a
// loopback address and partitions can be made. nil is the machine's network:
// all at 127.0.0.1, no partitions.
type network struct {
	t      *testing.T
	holder *exec.Cmd // keeps the namespace
	cuts   [][2]int
}

// newNetwork makes a namespace, which ends with the test. Only root can.
func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{t: t, holder: exec.Command("sleep", "infinity")}
	n.holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	check(t, n.holder.Start())
	t.Cleanup(func() {
		n.holder.Process.Kill()
		n.holder.Wait()
	})
	n.ip("link", "set", "lo", "up")
	// The table of local addresses comes first; partitions are to come before it.
	n.ip("rule", "add", "pref", "100", "lookup", "local")
	n.ip("rule", "del", "pref", "0")
	return n
}

// enter is what a command line begins with to run in the network.
func (n *network) enter() []string {
	if n == nil {
		return nil
	}
	return []string{"nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", n.holder.Process.Pid)}
}

// ip runs ip(8) in the network.
func (n *network) ip(args ...string) {
	n.t.Helper()
	if _, err := try(10*time.Second, append(append(n.enter(), "ip"), args...)...); err != nil {
		n.t.Error(err) // from any goroutine
	}
}

// address of node i.
func (n *network) address(i int) string {
	if n == nil {
		return "127.0.0.1"
	}
	return fmt.Sprintf("127.0.1.%d", i+1)
}

func (n *network) listen(i int) string { return "/ip4/" + n.address(i) + "/tcp/0" }

// cut keeps these nodes from all others, the mount among them. heal ends it.
func (n *network) cut(inside []int, all []int) {
	n.t.Helper()
	for _, a := range inside {
		for _, b := range all {
			n.cuts = append(n.cuts, [2]int{a, b}, [2]int{b, a})
		}
	}
	n.each("add")
}

func (n *network) heal() {
	n.t.Helper()
	n.each("del")
	n.cuts = nil
}

func (n *network) each(what string) {
	n.t.Helper()
	batch := ""
	for _, c := range n.cuts {
		batch += fmt.Sprintf("rule %s pref 10 from %s to %s blackhole\n", what, n.address(c[0]), n.address(c[1]))
	}
	f, err := os.CreateTemp(os.Getenv(directoryVariable), "rules")
	if err != nil {
		n.t.Error(err)
		return
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.WriteString(batch); err != nil {
		n.t.Error(err)
	}
	n.ip("-batch", f.Name())
}
