package p2p

import (
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/multiformats/go-multiaddr"
	"github.com/zeebo/blake3"

	"github.com/defs-fs/defs/p2p/wire"
)

// HostOptions configures a Host. Only Dir, Key and Certificate are needed.
type HostOptions struct {
	Dir         string             // keeps the member file
	Key         ed25519.PrivateKey // of this peer; see LoadOrCreateKey
	Certificate *wire.Certificate  // admits this peer; see Join
	Listen      []string           // multiaddrs; default: a free TCP and UDP port on all interfaces
	Bootstrap   []string           // multiaddrs with /p2p/ID to ask for members; a ticket has them

	Sponsored []*wire.Member // announcements of members that are not there themselves; see Sponsor

	Host string // failure domain; default: a hash of this machine's id
	Zone string // failure domain as the owner names it

	CapacityBytes, UsedBytes uint64 // announced; see SetUsage

	HeartbeatInterval time.Duration // default 10 s
	SuspectAfter      time.Duration // default 30 s
	DeadAfter         time.Duration // default 1 h
	DialTimeout       time.Duration // default 5 s
	IdleTimeout       time.Duration // how long a request may stand still; default 20 s

	HandlersPerPeerMax int   // handlers that run at once for one peer; default 64
	CallsPerPeerMax    int   // calls that run at once to one peer; default 64
	InboundBytesMax    int64 // request bodies held at once; default 256 MiB, at least twice BodyBytesMax

	Logger *slog.Logger // default: slog.Default()

	network []libp2p.Option // of tests: a simulated network in place of sockets
}

// EnsureDefaults fills in what is zero.
func (o *HostOptions) EnsureDefaults() {
	if len(o.Listen) == 0 {
		o.Listen = []string{
			"/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1",
			"/ip6/::/tcp/0", "/ip6/::/udp/0/quic-v1",
		}
	}
	if o.Host == "" {
		o.Host = machineID()
	}
	setDefault(&o.HeartbeatInterval, 10*time.Second)
	setDefault(&o.SuspectAfter, 30*time.Second)
	setDefault(&o.DeadAfter, time.Hour)
	setDefault(&o.DialTimeout, 5*time.Second)
	setDefault(&o.IdleTimeout, 20*time.Second)
	setDefault(&o.HandlersPerPeerMax, 64)
	setDefault(&o.CallsPerPeerMax, 64)
	setDefault(&o.InboundBytesMax, 256<<20)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate returns all violations, joined.
func (o *HostOptions) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.Dir == "" {
		wrong("Dir is empty: name a directory for the member file")
	}
	if len(o.Key) != ed25519.PrivateKeySize {
		wrong("Key has %d bytes, want %d", len(o.Key), ed25519.PrivateKeySize)
	}
	if o.Certificate == nil {
		wrong("Certificate is missing: join a pool first")
	} else if len(o.Certificate.Pool) != ed25519.PublicKeySize {
		wrong("Certificate names no pool: its file is damaged")
	}
	for _, a := range o.Listen {
		if _, err := multiaddr.NewMultiaddr(a); err != nil {
			wrong("Listen: %w", err)
		}
	}
	for _, a := range o.Bootstrap {
		if _, err := parsePeerAddr(a); err != nil {
			wrong("Bootstrap: %w", err)
		}
	}
	if len(o.Host) > nameBytesMax || len(o.Zone) > nameBytesMax {
		wrong("Host and Zone are at most %d bytes", nameBytesMax)
	}
	if o.HeartbeatInterval < 0 || o.SuspectAfter <= o.HeartbeatInterval || o.DeadAfter < o.SuspectAfter {
		wrong("HeartbeatInterval %s < SuspectAfter %s <= DeadAfter %s does not hold", o.HeartbeatInterval, o.SuspectAfter, o.DeadAfter)
	}
	if o.DialTimeout < 0 || o.IdleTimeout < 0 {
		wrong("DialTimeout and IdleTimeout must be positive")
	}
	if o.HandlersPerPeerMax < 1 || o.CallsPerPeerMax < 1 {
		wrong("HandlersPerPeerMax and CallsPerPeerMax must be positive")
	}
	if o.InboundBytesMax < 2*BodyBytesMax {
		wrong("InboundBytesMax is %d, at least %d", o.InboundBytesMax, 2*BodyBytesMax)
	}
	return errors.Join(errs...)
}

func (o *HostOptions) memberPath() string { return filepath.Join(o.Dir, "members") }

// machineID names this machine without telling its name.
func machineID() string {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || strings.TrimSpace(string(id)) == "" {
		name, _ := os.Hostname()
		id = []byte(name)
	}
	sum := blake3.Sum256(append([]byte("defs host v1"), id...))
	return hex.EncodeToString(sum[:8])
}
