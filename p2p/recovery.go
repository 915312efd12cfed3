package p2p

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// A machine that has only a volume's recovery words can derive the key of the
// volume's recovery member, but not its certificate. The volume's device
// sponsors that member: every host of the pool learns and keeps its
// announcement. certificateProtocol gives a stranger the certificate that is
// for its own key, which it has proved in the handshake, and nothing else.
const certificateProtocol = "/defs/certificate/1"

// fetchTimeout bounds one attempt to fetch a certificate from one address.
const fetchTimeout = 10 * time.Second

// Sponsor makes the announcement of a member that is not there itself, signed
// with its key, for HostOptions.Sponsored.
func Sponsor(c *wire.Certificate, key ed25519.PrivateKey) (*wire.Member, error) {
	m := &wire.Member{Certificate: c, Sequence: 1}
	if err := signAnnouncement(m, key); err != nil {
		return nil, fmt.Errorf("sponsor member: %w", err)
	}
	return m, nil
}

// learnSponsored takes in the members of HostOptions.Sponsored.
func (h *Host) learnSponsored() error {
	for _, m := range h.o.Sponsored {
		if _, err := h.table.learn(proto.CloneOf(m), time.Now()); err != nil {
			return fmt.Errorf("sponsored member: %w", err)
		}
	}
	return nil
}

// serveCertificate writes the certificate of the peer at the other end, if it
// is a known recovery member.
func (h *Host) serveCertificate(s network.Stream) {
	m := h.table.get(placement.NodeID(s.Conn().RemotePeer().String()))
	if m == nil {
		_ = s.Reset()
		return
	}
	h.table.mu.Lock()
	c := m.said.wire.Certificate
	h.table.mu.Unlock()
	b, err := proto.Marshal(c)
	if err != nil || Role(c.Role) != RoleRecovery {
		_ = s.Reset()
		return
	}
	_ = s.SetWriteDeadline(time.Now().Add(fetchTimeout))
	if _, err := s.Write(b); err != nil {
		_ = s.Reset()
		return
	}
	_ = s.Close()
}

// FetchCertificate asks the peers at addrs, multiaddrs with /p2p/ID, for the
// certificate of the recovery member whose key this is. It listens on nothing
// and leaves no connection open. The caller owns the result, whose signatures
// are the pool's to check: the words do not tell which pool it is.
// errors.Is(err, ErrNotAdmitted) when a peer answered and knows no such member.
func FetchCertificate(ctx context.Context, key ed25519.PrivateKey, addrs []string) (*wire.Certificate, error) {
	id, err := NodeIDOf(key)
	if err != nil {
		return nil, err
	}
	identity, err := crypto.UnmarshalEd25519PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("fetch certificate: %w", err)
	}
	host, err := libp2p.New(libp2p.Identity(identity), libp2p.NoListenAddrs, libp2p.DisableRelay(), libp2p.DisableMetrics(),
		libp2p.Transport(tcp.NewTCPTransport), libp2p.Transport(libp2pquic.NewTransport), libp2p.Security(libp2ptls.ID, libp2ptls.New))
	if err != nil {
		return nil, fmt.Errorf("fetch certificate: %w", err)
	}
	defer host.Close()
	failed := []error{errors.New("no peer gave a certificate")}
	for _, addr := range addrs {
		info, err := peer.AddrInfoFromString(addr)
		if err != nil {
			failed = append(failed, fmt.Errorf("address %q: %w", addr, err))
			continue
		}
		c, err := func() (*wire.Certificate, error) {
			ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
			defer cancel()
			if err := host.Connect(ctx, *info); err != nil {
				return nil, err
			}
			s, err := host.NewStream(ctx, info.ID, certificateProtocol)
			if err != nil {
				return nil, err
			}
			defer func() { _ = s.Reset() }()
			_ = s.SetReadDeadline(time.Now().Add(fetchTimeout))
			b, err := io.ReadAll(io.LimitReader(s, strangerMessageMax))
			if errors.Is(err, network.ErrReset) {
				return nil, fmt.Errorf("%w: the peer knows no such recovery member", ErrNotAdmitted)
			}
			if err != nil {
				return nil, err
			}
			return parseRecoveryCertificate(b, id)
		}()
		if err == nil {
			return c, nil
		}
		failed = append(failed, fmt.Errorf("%s: %w", info.ID, err))
	}
	return nil, fmt.Errorf("fetch certificate: %w", errors.Join(failed...))
}

// parseRecoveryCertificate checks that b is a certificate of the recovery
// member id, by the pool that it names itself.
func parseRecoveryCertificate(b []byte, id placement.NodeID) (*wire.Certificate, error) {
	c := &wire.Certificate{}
	if err := proto.Unmarshal(b, c); err != nil {
		return nil, err
	}
	if len(c.Pool) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%w: certificate names no pool", ErrNotAdmitted)
	}
	got, err := VerifyCertificate(c, PoolID(c.Pool), time.Now())
	if err != nil {
		return nil, err
	}
	if got != id || Role(c.Role) != RoleRecovery {
		return nil, fmt.Errorf("%w: certificate is for another peer", ErrNotAdmitted)
	}
	return c, nil
}
