// Package defs is the Go interface of DeFS, a folder that lives on peers.
//
// A volume is made once and shows its 24 recovery words once:
//
//	words, err := defs.Init(defs.InitOptions{Dir: dir, Name: "home", Policy: "4+2"})
//	ticket, err := defs.Ticket(dir, nil)            // for storage nodes
//	c, err := defs.New(ctx, defs.Options{Dir: dir, Peers: addrs})
//	id, err := c.Upload(ctx, "report.pdf", file)
//	err = c.Download(ctx, id, w)
//	err = c.WaitDurable(ctx, nil)
//	err = c.Close(ctx)
//
// On a machine that has nothing but the words and the pool's addresses:
//
//	report, err := defs.Recover(ctx, defs.RecoverOptions{Dir: dir, Words: words, Peers: addrs})
//
// A Client owns its goroutines, its connections and its local directory until
// Close. What Upload acknowledged survives a crash of the process; what
// WaitDurable acknowledged survives the loss of the machine.
package defs

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/volume"
)

// Files of a volume's directory, beside what package volume keeps there.
const (
	peerKeyFile     = "peer.key"
	certificateFile = "certificate"
	recoveryFile    = "recovery-member"
	networkDir      = "network"
)

// Errors that a caller may want to tell apart.
var (
	ErrNoVolume     = volume.ErrNoVolume
	ErrVolumeExists = volume.ErrVolumeExists
	ErrWords        = seal.ErrWords
	ErrTicket       = p2p.ErrTicket
	ErrNoHead       = volume.ErrNoHead
	ErrNoFile       = errors.New("no file with this id")
)

// InitOptions describe a new volume.
type InitOptions struct {
	Dir    string // for the device's state; made if missing
	Name   string // for people; 1 to 64 bytes
	Policy string // such as "auto" or "4+2,mirror=auto"; "" is "auto"
	Ticket string // joins an existing pool; "" founds one
}

// Init makes a volume and returns its 24 words, which are kept nowhere.
func Init(o InitOptions) (words string, err error) {
	if o.Name == "" || len(o.Name) > 64 {
		return "", fmt.Errorf("init: a volume's name has 1 to 64 bytes, not %d", len(o.Name))
	}
	policy, err := erasure.ParsePolicy(orAuto(o.Policy))
	if err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	if _, err := volume.LoadDevice(o.Dir); err == nil {
		return "", fmt.Errorf("init in %s: %w", o.Dir, ErrVolumeExists)
	}
	var ticket p2p.Ticket
	var poolSeed []byte
	if o.Ticket != "" {
		if ticket, err = p2p.ParseTicket(o.Ticket); err != nil {
			return "", fmt.Errorf("init: %w", err)
		}
	} else {
		pool, err := p2p.NewPool()
		if err != nil {
			return "", fmt.Errorf("init: %w", err)
		}
		poolSeed = pool.Seed()
		if ticket, err = pool.Ticket(time.Time{}, nil); err != nil {
			return "", fmt.Errorf("init: %w", err)
		}
	}
	dev, words, err := volume.NewDevice(o.Name, policy, ticket.Pool[:], poolSeed)
	if err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	root, err := seal.RootFromWords(words)
	if err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	recovery, err := root.Recovery()
	if err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	undo, err := makeDir(o.Dir)
	if err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, undo())
		}
	}()
	if err := errors.Join(enter(o.Dir, ticket, recovery.Peer()), addPeers(o.Dir, ticket.Addrs)); err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	// The device file comes last: without it there is no volume.
	if err := dev.Save(o.Dir); err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	return words, nil
}

// makeDir makes a directory. What it returns removes it with all that is in it,
// or nothing where it was there before.
func makeDir(dir string) (undo func() error, err error) {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return func() error { return nil }, err
	}
	return func() error { return os.RemoveAll(dir) }, os.MkdirAll(dir, 0o700)
}

func orAuto(policy string) string {
	if policy == "" {
		return string(erasure.ModeAuto)
	}
	return policy
}

// enter writes this machine's identity in the pool, and that of the recovery
// member, which every node remembers for the machine that has only the words.
func enter(dir string, ticket p2p.Ticket, recoveryKey ed25519.PrivateKey) error {
	key, err := p2p.LoadOrCreateKey(filepath.Join(dir, peerKeyFile))
	if err != nil {
		return err
	}
	certificate, err := p2p.Join(ticket, key, p2p.RoleDevice)
	if err != nil {
		return err
	}
	if err := writeMessage(filepath.Join(dir, certificateFile), certificate); err != nil {
		return err
	}
	recovery, err := p2p.Join(ticket, recoveryKey, p2p.RoleRecovery)
	if err != nil {
		return err
	}
	member, err := p2p.Sponsor(recovery, recoveryKey)
	if err != nil {
		return err
	}
	return writeMessage(filepath.Join(dir, recoveryFile), member)
}

func writeMessage(path string, m proto.Message) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	return p2p.WriteFile(path, b)
}

// messageBytesMax bounds the identity files.
const messageBytesMax = 64 << 10

func readMessage(path string, m proto.Message) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, messageBytesMax+1))
	if err != nil {
		return err
	}
	if len(b) > messageBytesMax {
		return fmt.Errorf("%s is larger than %d bytes", path, messageBytesMax)
	}
	if err := proto.Unmarshal(b, m); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// Ticket invites storage nodes and devices to the pool that the volume in dir
// has founded. addrs are multiaddrs of members to ask first.
func Ticket(dir string, addrs []string) (string, error) {
	dev, err := volume.LoadDevice(dir)
	if err != nil {
		return "", fmt.Errorf("ticket: %w", err)
	}
	if len(dev.PoolKey) == 0 {
		return "", errors.New("ticket: this device did not found the pool; ask its founder for a ticket")
	}
	pool, err := p2p.PoolKeyFromSeed(dev.PoolKey)
	if err != nil {
		return "", fmt.Errorf("ticket: %w", err)
	}
	t, err := pool.Ticket(time.Time{}, addrs)
	if err != nil {
		return "", fmt.Errorf("ticket: %w", err)
	}
	return t.Text(), nil
}

// Options of a Client.
type Options struct {
	Dir    string   // of the volume
	Listen []string // multiaddrs; default: any free port
	Peers  []string // multiaddrs, with /p2p/ID, of members to ask first

	JournalMaxBytes int64 // hard cap of bytes that only this machine has; 0 = default
	CacheMaxBytes   int64 // bound of the clean cache; 0 = default
	NoAtime         bool
	Fsync           string // what fsync waits for: volume.FsyncJournal (default) or volume.FsyncRecoverable

	HeartbeatInterval, SuspectAfter, DeadAfter, DialTimeout time.Duration // 0 = default

	Logger *slog.Logger
}

// Client is an open volume.
type Client struct {
	host   *p2p.Host
	volume *volume.Volume
	device *volume.Device
	lock   *os.File

	hasPeers bool // there are addresses to ask for members
	opened   time.Time
}

// New opens the volume in o.Dir. It waits for no peer. One Client at a time
// can have a directory open.
func New(ctx context.Context, o Options) (_ *Client, err error) {
	dev, err := volume.LoadDevice(o.Dir)
	if err != nil {
		return nil, err
	}
	c := &Client{device: dev, opened: time.Now()}
	if c.lock, err = lockDir(o.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close(ctx))
		}
	}()
	known, err := knownPeers(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	o.Peers = joinPeers(o.Peers, known)
	c.hasPeers = len(o.Peers) > 0
	if c.host, err = openHost(ctx, o, dev); err != nil {
		return nil, err
	}
	c.volume, err = volume.OpenDevice(ctx, o.Dir, dev, c.host, volume.Options{
		JournalMaxBytes: o.JournalMaxBytes, CleanMaxBytes: o.CacheMaxBytes, NoAtime: o.NoAtime, Fsync: o.Fsync, Logger: o.Logger,
		RootUID: uint32(os.Getuid()), RootGID: uint32(os.Getgid()),
	})
	return c, err
}

// repairWait bounds how long Repair waits for nodes to be heard.
const repairWait = 10 * time.Second

// Repair makes a volume mountable again whose local state is damaged, with the
// peers' help where that is needed. It returns, in sentences, what it did.
// No Client may have the directory open. Content is repaired by
// Client.Volume().RepairContent afterwards.
func Repair(ctx context.Context, o Options) (notes []string, err error) {
	dev, err := volume.LoadDevice(o.Dir)
	if err != nil {
		return nil, err
	}
	c := &Client{device: dev}
	if c.lock, err = lockDir(o.Dir); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Close(ctx)) }()
	known, err := knownPeers(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	o.Peers = joinPeers(o.Peers, known)
	c.hasPeers = len(o.Peers) > 0
	if c.host, err = openHost(ctx, o, dev); err != nil {
		return nil, err
	}
	heard, cancel := context.WithTimeout(ctx, repairWait)
	defer cancel()
	c.WaitNodes(heard)
	return volume.Repair(ctx, o.Dir, dev, c.host, volume.Options{
		JournalMaxBytes: o.JournalMaxBytes, CleanMaxBytes: o.CacheMaxBytes, Logger: o.Logger,
	})
}

func openHost(ctx context.Context, o Options, dev *volume.Device) (*p2p.Host, error) {
	key, err := p2p.LoadOrCreateKey(filepath.Join(o.Dir, peerKeyFile))
	if err != nil {
		return nil, err
	}
	certificate := &wire.Certificate{}
	if err := readMessage(filepath.Join(o.Dir, certificateFile), certificate); err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	sponsored := &wire.Member{}
	if err := readMessage(filepath.Join(o.Dir, recoveryFile), sponsored); err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	return p2p.NewHost(ctx, p2p.HostOptions{
		Dir: filepath.Join(o.Dir, networkDir), Key: key, Certificate: certificate, Listen: o.Listen, Bootstrap: o.Peers,
		Sponsored:         []*wire.Member{sponsored},
		HeartbeatInterval: o.HeartbeatInterval, SuspectAfter: o.SuspectAfter, DeadAfter: o.DeadAfter, DialTimeout: o.DialTimeout,
		Logger: o.Logger,
	})
}

// ErrBusy: another process has the volume open.
var ErrBusy = errors.New("the volume is in use by another process")

func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", dir, ErrBusy), f.Close())
	}
	return f, nil
}

// Close flushes and closes the volume, without waiting for the peers.
func (c *Client) Close(ctx context.Context) error {
	var errs []error
	if c.volume != nil {
		errs = append(errs, c.volume.Close(ctx))
	}
	if c.host != nil {
		errs = append(errs, c.host.Close())
	}
	if c.lock != nil {
		errs = append(errs, c.lock.Close())
	}
	return errors.Join(errs...)
}

// Volume is the open volume, for a mount.
func (c *Client) Volume() *volume.Volume { return c.volume }

// Members lists the pool as this device sees it.
func (c *Client) Members() []p2p.Member { return c.host.Members() }

// settleMax bounds how long after New what is known of the nodes is of an earlier run.
const settleMax = 2 * time.Second

// WaitNodes returns when every storage node known has been heard in this run or could not be
// reached, when there is nobody to hear, or when ctx ends; with none heard, only then.
// Without it the first figures of Status count the pool too low.
func (c *Client) WaitNodes(ctx context.Context) {
	for {
		nodes, heard, tried := 0, 0, 0
		for _, m := range c.host.Members() {
			if m.Role != p2p.RoleNode {
				continue
			}
			nodes++
			if m.Heard {
				heard++
			} else if m.State != p2p.Alive {
				tried++
			}
		}
		if heard+tried == nodes && (heard > 0 || nodes == 0 && !c.hasPeers) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Settle is WaitNodes until some seconds after New; later it returns at once.
func (c *Client) Settle(ctx context.Context) {
	ctx, cancel := context.WithDeadline(ctx, c.opened.Add(settleMax))
	defer cancel()
	if ctx.Err() == nil {
		c.WaitNodes(ctx)
	}
}

// Addrs are the multiaddrs at which this device can be reached.
func (c *Client) Addrs() []string { return c.host.Addrs() }

// Status returns the volume's figures.
func (c *Client) Status(ctx context.Context) (volume.Status, error) { return c.volume.Status(ctx) }

// WaitDurable returns when everything acknowledged before the call is durable.
func (c *Client) WaitDurable(ctx context.Context, progress func(volume.Status)) error {
	return c.volume.WaitDurable(ctx, progress)
}

// uploadsDir is the directory, in the volume's root, of uploaded files.
const uploadsDir = "uploads"

// Upload stores r as a file of its own in the folder "uploads" and returns its
// id, which stays the same whatever the file is renamed to. It is on disk when
// Upload returns.
func (c *Client) Upload(ctx context.Context, name string, r io.Reader) (id string, err error) {
	v := c.volume
	dir, err := v.Lookup(ctx, volume.RootIno, uploadsDir)
	if errors.Is(err, volume.NotExist) {
		dir, err = v.Create(ctx, volume.RootIno, uploadsDir, volume.Create{Mode: syscall.S_IFDIR | 0o755, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
	}
	if err != nil {
		return "", fmt.Errorf("upload: %w", err)
	}
	name = filepath.Base(name)
	attr, err := v.Create(ctx, dir.Ino, name, volume.Create{Mode: syscall.S_IFREG | 0o644, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Excl: true})
	for n := 1; errors.Is(err, volume.Exist) && n < 10000; n++ {
		attr, err = v.Create(ctx, dir.Ino, fmt.Sprintf("%s.%d", name, n), volume.Create{Mode: syscall.S_IFREG | 0o644, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Excl: true})
	}
	if err != nil {
		return "", fmt.Errorf("upload: %w", err)
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if _, err := v.Write(ctx, attr.Ino, off, buf[:n], volume.WriteFlags{}); err != nil {
				return "", fmt.Errorf("upload: %w", err)
			}
			off += int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return "", fmt.Errorf("upload: read: %w", err)
		}
	}
	if err := v.Fsync(ctx, attr.Ino); err != nil {
		return "", fmt.Errorf("upload: %w", err)
	}
	return strconv.FormatUint(uint64(attr.Ino), 36), nil
}

// Download writes the file with an id to w.
func (c *Client) Download(ctx context.Context, id string, w io.Writer) error {
	n, err := strconv.ParseUint(id, 36, 64)
	if err != nil {
		return fmt.Errorf("download %q: %w", id, ErrNoFile)
	}
	attr, err := c.volume.GetAttr(ctx, volume.Ino(n))
	if errors.Is(err, volume.NotExist) || errors.Is(err, volume.Stale) || (err == nil && attr.Mode&syscall.S_IFMT != syscall.S_IFREG) {
		return fmt.Errorf("download %s: %w", id, ErrNoFile)
	}
	if err != nil {
		return fmt.Errorf("download %s: %w", id, err)
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < int64(attr.Size); {
		n, err := c.volume.Read(ctx, attr.Ino, off, buf)
		if err != nil {
			return fmt.Errorf("download %s: %w", id, err)
		}
		if n == 0 {
			break
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return fmt.Errorf("download %s: write: %w", id, err)
		}
		off += int64(n)
	}
	return nil
}

// RecoverOptions describe a recovery.
type RecoverOptions struct {
	Dir    string   // empty or missing
	Words  string   // the 24 words
	Peers  []string // multiaddrs, with /p2p/ID, of some of the pool's nodes
	Ticket string   // of the pool; only needed where the pool was founded by somebody else
	Head   uint16   // device whose state is taken; 0: the newest
	Logger *slog.Logger
}

// Recover brings a volume back on a machine that has only the words and the
// addresses of some nodes. The tree is there when it returns; content is
// fetched as it is read. A directory that Recover has made is gone again when it
// fails.
func Recover(ctx context.Context, o RecoverOptions) (_ *volume.Recovered, err error) {
	root, err := seal.RootFromWords(o.Words)
	if err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	recovery, err := root.Recovery()
	if err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	if _, err := volume.LoadDevice(o.Dir); err == nil {
		return nil, fmt.Errorf("recover into %s: %w", o.Dir, ErrVolumeExists)
	}
	undo, err := makeDir(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, undo())
		}
	}()
	certificate, err := p2p.FetchCertificate(ctx, recovery.Peer(), o.Peers)
	if err != nil {
		if errors.Is(err, p2p.ErrNotAdmitted) {
			return nil, fmt.Errorf("recover: no peer that answered knows a volume of these words: %w: %w", ErrNoHead, err)
		}
		return nil, fmt.Errorf("recover: no peer could be asked: %w", err)
	}
	// The new device knows the members that the recovery has met.
	host, err := p2p.NewHost(ctx, p2p.HostOptions{
		Dir: filepath.Join(o.Dir, networkDir), Key: recovery.Peer(), Certificate: certificate, Bootstrap: o.Peers, Logger: o.Logger,
		Listen: []string{"/ip4/0.0.0.0/tcp/0"},
	})
	if err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	defer host.Close()
	// Heads lie on a majority of the nodes: so many have to be found first. Who
	// answers tells of the others, a moment later.
	settle, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := host.WaitMembers(settle, 1); err != nil {
		return nil, fmt.Errorf("recover: no peer answers: %w", err)
	}
	if err := host.WaitMembers(settle, knownNodes(settle, host)); err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	report, err := volume.Recover(ctx, o.Dir, root, host, o.Head, volume.Options{
		Logger: o.Logger, RootUID: uint32(os.Getuid()), RootGID: uint32(os.Getgid()),
	})
	if err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	ticket, err := rejoin(report.Device, o.Ticket)
	if err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	if err := errors.Join(enter(o.Dir, ticket, recovery.Peer()), addPeers(o.Dir, o.Peers)); err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	if err := report.Device.Save(o.Dir); err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	return report, nil
}

// knownNodes counts the pool's nodes, answering or not, once no more of them
// have been heard of for a while, or ctx ends.
func knownNodes(ctx context.Context, host *p2p.Host) int {
	const quiet = 1500 * time.Millisecond
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for known, since := -1, time.Now(); ; {
		nodes := 0
		for _, m := range host.Members() {
			if m.Role == p2p.RoleNode {
				nodes++
			}
		}
		if nodes != known {
			known, since = nodes, time.Now()
		} else if time.Since(since) >= quiet {
			return nodes
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return nodes
		}
	}
}

// rejoin finds the ticket with which the recovered device joins the pool: its
// own where the volume founded the pool, else the one given.
func rejoin(dev *volume.Device, text string) (p2p.Ticket, error) {
	if text != "" {
		return p2p.ParseTicket(text)
	}
	if len(dev.PoolKey) == 0 {
		return p2p.Ticket{}, errors.New("the pool was founded by another volume; give a ticket of it")
	}
	pool, err := p2p.PoolKeyFromSeed(dev.PoolKey)
	if err != nil {
		return p2p.Ticket{}, err
	}
	return pool.Ticket(time.Time{}, nil)
}
