package defs

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/defs-fs/defs/node"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/shardstore"
)

// Files of a storage node's directory, beside what package shardstore keeps in
// shards/ and the host in network/.
const (
	shardsDir  = "shards"
	addrsFile  = "addrs"  // where the node can be reached, for others to read
	listenFile = "listen" // where it listened last, so that its addresses stay
)

// NodeOptions describe a storage node.
type NodeOptions struct {
	Dir           string   // for all its state; made if missing
	Ticket        string   // joins a pool; needed the first time only
	Listen        []string // multiaddrs; default: where it listened last, else any free port
	Peers         []string // multiaddrs, with /p2p/ID, of members to ask first
	CapacityBytes uint64   // 0 = the store's default
	Host, Zone    string   // failure domains; default: this machine, none

	HeartbeatInterval, SuspectAfter, DeadAfter, DialTimeout time.Duration // 0 = default
	CopyAfter, MirrorInterval                               time.Duration // 0 = default

	Logger *slog.Logger
}

// Node is a storage node that serves its pool until Close.
type Node struct {
	store  *shardstore.Store
	host   *p2p.Host
	node   *node.Node
	cancel context.CancelFunc
	done   chan error
}

// ErrNotJoined: the directory belongs to no pool yet and no ticket was given.
var ErrNotJoined = errors.New("this node is in no pool yet: give it a ticket")

// OpenNode starts a storage node. It returns when the node listens and answers;
// what it stored before is served again. ctx bounds the start alone.
func OpenNode(ctx context.Context, o NodeOptions) (_ *Node, err error) {
	if len(o.Listen) == 0 {
		o.Listen = everywhere
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open node: %w", err)
	}
	key, certificate, err := joinPool(&o)
	if err != nil {
		return nil, fmt.Errorf("open node in %s: %w", o.Dir, err)
	}
	peers, err := knownPeers(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open node: %w", err)
	}
	n := &Node{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open node: %w", err), n.Close())
		}
	}()
	n.store, err = shardstore.Open(shardstore.Options{Dir: filepath.Join(o.Dir, shardsDir), CapacityBytes: o.CapacityBytes, Logger: o.Logger})
	if err != nil {
		return nil, err
	}
	host := p2p.HostOptions{
		Dir: filepath.Join(o.Dir, networkDir), Key: key, Certificate: certificate, Bootstrap: joinPeers(o.Peers, peers),
		Host: o.Host, Zone: o.Zone, CapacityBytes: n.store.Usage().CapacityBytes, UsedBytes: n.store.Usage().UsedBytes,
		HeartbeatInterval: o.HeartbeatInterval, SuspectAfter: o.SuspectAfter, DeadAfter: o.DeadAfter, DialTimeout: o.DialTimeout,
		Logger: o.Logger,
	}
	if n.host, err = listen(ctx, o, host); err != nil {
		return nil, err
	}
	n.node, err = node.New(node.Options{
		Store: n.store, Transport: n.host, CopyAfter: o.CopyAfter, MirrorInterval: o.MirrorInterval, Logger: o.Logger,
	})
	if err != nil {
		return nil, err
	}
	if err = n.remember(o); err != nil {
		return nil, err
	}
	run, cancel := context.WithCancel(context.Background())
	n.cancel, n.done = cancel, make(chan error, 1)
	go func() { n.done <- n.node.Run(run) }()
	return n, nil
}

// joinPool loads the node's identity, or makes it from the ticket.
func joinPool(o *NodeOptions) (ed25519.PrivateKey, *wire.Certificate, error) {
	key, err := p2p.LoadOrCreateKey(filepath.Join(o.Dir, peerKeyFile))
	if err != nil {
		return nil, nil, err
	}
	path := filepath.Join(o.Dir, certificateFile)
	certificate := &wire.Certificate{}
	err = readMessage(path, certificate)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return key, certificate, err
	}
	if o.Ticket == "" {
		return nil, nil, ErrNotJoined
	}
	ticket, err := p2p.ParseTicket(o.Ticket)
	if err != nil {
		return nil, nil, err
	}
	if certificate, err = p2p.Join(ticket, key, p2p.RoleNode); err != nil {
		return nil, nil, err
	}
	if err := addPeers(o.Dir, joinPeers(o.Peers, ticket.Addrs)); err != nil {
		return nil, nil, err
	}
	return key, certificate, writeMessage(path, certificate)
}

// everywhere is where a node listens by default.
var everywhere = []string{
	"/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1",
	"/ip6/::/tcp/0", "/ip6/::/udp/0/quic-v1",
}

// listen starts the host. A port left open is the one it had last, or any when
// that is taken by now.
func listen(ctx context.Context, o NodeOptions, host p2p.HostOptions) (*p2p.Host, error) {
	last, err := ReadPeers(filepath.Join(o.Dir, listenFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if host.Listen = fillPorts(o.Listen, last); !slices.Equal(host.Listen, o.Listen) {
		h, err := p2p.NewHost(ctx, host)
		if err == nil {
			return h, nil
		}
		o.Logger.Warn("cannot listen where this node did last; it will have other addresses", "error", err)
	}
	host.Listen = o.Listen
	return p2p.NewHost(ctx, host)
}

// fillPorts gives each multiaddr of port 0 the port of the first of addrs that
// is like it. The address of all interfaces is like each of one interface.
func fillPorts(listen, addrs []string) []string {
	out := slices.Clone(listen)
	for i := range out {
		want := strings.Split(out[i], "/") // "", ip4, ADDRESS, tcp, PORT, ...
		if len(want) < 5 || want[4] != "0" {
			continue
		}
		unspecified := want[2] == "0.0.0.0" || want[2] == "::"
		for _, a := range addrs {
			a, _, _ = strings.Cut(a, "/p2p/")
			have := strings.Split(a, "/")
			if len(have) == len(want) && have[1] == want[1] && have[3] == want[3] && (unspecified || have[2] == want[2]) && slices.Equal(have[5:], want[5:]) {
				want[4] = have[4]
				out[i] = strings.Join(want, "/")
				break
			}
		}
	}
	return out
}

// remember writes where the node can be reached, and where to listen next time.
func (n *Node) remember(o NodeOptions) error {
	addrs := n.host.Addrs()
	next := strings.Join(fillPorts(o.Listen, addrs), "\n") + "\n"
	if err := os.WriteFile(filepath.Join(o.Dir, listenFile), []byte(next), 0o600); err != nil {
		return err
	}
	// This file is for others to read: they see all of it or nothing.
	temporary := filepath.Join(o.Dir, addrsFile+".new")
	if err := os.WriteFile(temporary, []byte(strings.Join(addrs, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, filepath.Join(o.Dir, addrsFile))
}

// ID is the node's id in its pool.
func (n *Node) ID() string { return string(n.host.Self()) }

// Addrs are the multiaddrs, with /p2p/ID, at which the node can be reached.
func (n *Node) Addrs() []string { return n.host.Addrs() }

// Members lists the pool as this node sees it.
func (n *Node) Members() []p2p.Member { return n.host.Members() }

// Close stops serving and closes the store. What was answered is on disk.
func (n *Node) Close() error {
	var errs []error
	if n.host != nil {
		errs = append(errs, n.host.Close())
	}
	if n.node != nil {
		errs = append(errs, n.node.Close())
	}
	if n.done != nil {
		n.cancel()
		errs = append(errs, <-n.done)
	}
	if n.store != nil {
		errs = append(errs, n.store.Close())
	}
	return errors.Join(errs...)
}
