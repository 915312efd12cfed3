package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// distance is two network namespaces, joined by a link on which every packet
// takes a time. The kernel's own TCP runs at both ends.
type distance struct {
	near, far   string // names of the namespaces
	nearAddress string
	farAddress  string
	devices     []*os.File
	forwarding  sync.WaitGroup
}

const (
	// packetBytesMax is the link's MTU, and a little for safety.
	packetBytesMax = 2 << 10
	// linkPackets is the longest queue of a direction; beyond it packets are
	// dropped, as a router would.
	linkPackets = 16 << 10
)

func namespacePath(name string) string { return "/run/netns/" + name }

// newNamespace makes a network namespace with a loopback device, which the
// scratch removes.
func (s *scratch) newNamespace(ctx context.Context, name string) (string, error) {
	name = fmt.Sprintf("%s%d-%s", scratchPrefix, os.Getpid(), name)
	if out, err := exec.CommandContext(ctx, "ip", "netns", "add", name).CombinedOutput(); err != nil {
		return "", fmt.Errorf("ip netns add: %w: %s", err, out)
	}
	s.undo = append(s.undo, func() error { return exec.Command("ip", "netns", "del", name).Run() })
	return name, ip(ctx, name, "link", "set", "lo", "up")
}

func ip(ctx context.Context, space string, args ...string) error {
	if out, err := exec.CommandContext(ctx, "ip", append([]string{"-n", space}, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// newDistance makes both namespaces. A packet arrives after oneWay.
func (s *scratch) newDistance(ctx context.Context, oneWay time.Duration) (*distance, error) {
	d := &distance{nearAddress: "10.77.0.1", farAddress: "10.77.0.2"}
	var err error
	if d.near, err = s.newNamespace(ctx, "near"); err != nil {
		return nil, err
	}
	if d.far, err = s.newNamespace(ctx, "far"); err != nil {
		return nil, err
	}
	for _, end := range [][3]string{{d.near, d.nearAddress, d.farAddress}, {d.far, d.farAddress, d.nearAddress}} {
		device, err := openTUN(end[0], "link0")
		if err != nil {
			return nil, errors.Join(err, d.close())
		}
		d.devices = append(d.devices, device)
		if err := errors.Join(
			ip(ctx, end[0], "addr", "add", end[1], "peer", end[2], "dev", "link0"),
			ip(ctx, end[0], "link", "set", "link0", "up", "mtu", "1500"),
		); err != nil {
			return nil, errors.Join(err, d.close())
		}
	}
	d.forward(d.devices[0], d.devices[1], oneWay)
	d.forward(d.devices[1], d.devices[0], oneWay)
	return d, nil
}

// openTUN makes a TUN device in a network namespace. Packets are read from and
// written to the file.
func openTUN(space, name string) (*os.File, error) {
	// The namespace is that of the thread; a goroutine that ends without
	// unlocking takes the thread with it.
	type result struct {
		file *os.File
		err  error
	}
	opened := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		file, err := func() (*os.File, error) {
			ns, err := os.Open(namespacePath(space))
			if err != nil {
				return nil, err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return nil, fmt.Errorf("setns: %w", err)
			}
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("open /dev/net/tun: %w", err)
			}
			request, err := unix.NewIfreq(name)
			if err != nil {
				return nil, errors.Join(err, unix.Close(fd))
			}
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
				return nil, errors.Join(fmt.Errorf("TUNSETIFF: %w", err), unix.Close(fd))
			}
			return os.NewFile(uintptr(fd), name), nil
		}()
		opened <- result{file, err}
	}()
	r := <-opened
	return r.file, r.err
}

// forward carries packets one way until the devices are closed.
func (d *distance) forward(from, to *os.File, oneWay time.Duration) {
	type packet struct {
		due   time.Time
		bytes []byte
	}
	queue := make(chan packet, linkPackets)
	d.forwarding.Go(func() {
		defer close(queue)
		for {
			buf := make([]byte, packetBytesMax)
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			select {
			case queue <- packet{time.Now().Add(oneWay), buf[:n]}:
			default:
			}
		}
	})
	d.forwarding.Go(func() {
		for p := range queue {
			time.Sleep(time.Until(p.due))
			if _, err := to.Write(p.bytes); err != nil && errors.Is(err, os.ErrClosed) {
				return
			}
		}
	})
}

// close ends the forwarding; the scratch removes the namespaces.
func (d *distance) close() error {
	var errs []error
	for _, device := range d.devices {
		errs = append(errs, device.Close())
	}
	d.forwarding.Wait()
	return errors.Join(errs...)
}

// loopbackBytes is how many bytes the loopback device of a namespace has carried.
func loopbackBytes(ctx context.Context, space string) (int64, error) {
	out, err := exec.CommandContext(ctx, "nsenter", "--net="+namespacePath(space), "cat", "/proc/thread-self/net/dev").Output()
	if err != nil {
		return 0, fmt.Errorf("nsenter: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "lo:"); ok {
			return strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		}
	}
	return 0, errors.New("no loopback device")
}
