package defs

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/defs-fs/defs/node"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

// Files of a storage node's directory, beside what package shardstore keeps in
// shards/ and the host in network/.
const (
	shardsDir = "shards"
	addrsFile = "addrs" // where the node can be reached, for others to read
)

// NodeOptions describe a storage node.
type NodeOptions struct {
	Dir           string   // for all its state; made if missing
	Ticket        string   // joins a pool; needed the first time only
	Listen        []string // multiaddrs; port 0, the default, is the one of last time or any that is free
	Peers         []string // multiaddrs, with /p2p/ID, of members to ask first
	CapacityBytes uint64   // 0 = what its disk has free, less a reserve
	DiskShare     int      // nodes that share the disk; default 1
	Host, Zone    string   // failure domains; default: this machine, none

	HeartbeatInterval, SuspectAfter, DeadAfter, DialTimeout time.Duration // 0 = default
	CopyAfter, MirrorInterval                               time.Duration // 0 = default

	BackgroundRate int64         // bytes per second moved for repair, mirrors, moves and scrubbing; 0 = default
	ScrubInterval  time.Duration // in which every shard is read again once; 0 = default

	Logger *slog.Logger
}

// Node is a storage node that serves its pool until Close.
type Node struct {
	store  *shardstore.Store
	host   *p2p.Host
	node   *node.Node
	cancel context.CancelFunc
	done   chan error

	drained atomic.Bool // for good: it takes no shards until it is opened again
}

// ErrNotJoined: the directory belongs to no pool yet and no ticket was given.
var ErrNotJoined = errors.New("this node is in no pool yet: give it a ticket")

// OpenNode starts a storage node. It returns when the node listens and answers;
// what it stored before is served again. ctx bounds the start alone.
func OpenNode(ctx context.Context, o NodeOptions) (_ *Node, err error) {
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
	n.store, err = shardstore.Open(shardstore.Options{Dir: filepath.Join(o.Dir, shardsDir), CapacityBytes: o.CapacityBytes, DiskShare: uint64(o.DiskShare), Logger: o.Logger})
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("another process runs the node in %s", o.Dir)
	}
	if err != nil {
		return nil, err
	}
	n.host, err = p2p.NewHost(ctx, p2p.HostOptions{
		Dir: filepath.Join(o.Dir, networkDir), Key: key, Certificate: certificate, Bootstrap: joinPeers(o.Peers, peers), Listen: o.Listen,
		Host: o.Host, Zone: o.Zone, CapacityBytes: n.store.Usage().CapacityBytes, UsedBytes: n.store.Usage().UsedBytes,
		HeartbeatInterval: o.HeartbeatInterval, SuspectAfter: o.SuspectAfter, DeadAfter: o.DeadAfter, DialTimeout: o.DialTimeout,
		Logger: o.Logger,
	})
	if err != nil {
		return nil, err
	}
	n.node, err = node.New(node.Options{
		Store: n.store, Transport: n.host, Logger: o.Logger,
		CopyAfter: o.CopyAfter, MirrorInterval: o.MirrorInterval, RepairInterval: o.MirrorInterval, CensusInterval: o.DeadAfter,
		AuditInterval: o.MirrorInterval, BalanceInterval: 20 * o.MirrorInterval,
		BackgroundRate: o.BackgroundRate, ScrubInterval: o.ScrubInterval, SurplusInterval: o.ScrubInterval / 7,
	})
	if err != nil {
		return nil, err
	}
	if err = n.tell(o.Dir); err != nil {
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
	joined := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if o.Ticket == "" {
		if joined {
			return key, certificate, nil
		}
		return nil, nil, ErrNotJoined
	}
	ticket, err := p2p.ParseTicket(o.Ticket)
	switch {
	case err != nil:
		return nil, nil, err
	case joined && !bytes.Equal(certificate.Pool, ticket.Pool[:]):
		return nil, nil, fmt.Errorf("%w: it is for another pool than the one whose shards this node stores: use another directory for that pool", p2p.ErrTicket)
	case joined:
		return key, certificate, nil
	}
	if certificate, err = p2p.Join(ticket, key, p2p.RoleNode); err != nil {
		return nil, nil, err
	}
	if err := addPeers(o.Dir, joinPeers(o.Peers, ticket.Addrs)); err != nil {
		return nil, nil, err
	}
	return key, certificate, writeMessage(path, certificate)
}

// tell writes where the node can be reached, for others to read: they see all
// of it or nothing.
func (n *Node) tell(dir string) error {
	text := strings.Join(n.host.Addrs(), "\n") + "\n"
	temporary := filepath.Join(dir, addrsFile+".new")
	if err := os.WriteFile(temporary, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, filepath.Join(dir, addrsFile))
}

// ID is the node's id in its pool.
func (n *Node) ID() string { return string(n.host.Self()) }

// Addrs are the multiaddrs, with /p2p/ID, at which the node can be reached.
func (n *Node) Addrs() []string { return n.host.Addrs() }

// Members lists the pool as this node sees it.
func (n *Node) Members() []p2p.Member { return n.host.Members() }

// Reputation is what this node has seen of another.
func (n *Node) Reputation(id placement.NodeID) placement.Reputation { return n.node.Reputation(id) }

// Status returns what the node holds and has done of its own accord.
func (n *Node) Status() node.Status { return n.node.Status() }

// Drain gives every shard to other nodes and takes no more. It returns nil when
// the pool needs nothing from this node any more; it serves until Close all the
// same. If it fails or ctx ends, the node goes on as before. Of a node that has
// been drained there is nothing left to move.
func (n *Node) Drain(ctx context.Context, progress func(node.Drained)) error {
	if n.drained.Load() {
		return nil
	}
	err := n.node.Drain(ctx, progress)
	if err == nil {
		n.drained.Store(true)
	}
	return err
}

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
