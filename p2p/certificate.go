package p2p

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// ErrNotAdmitted says that a certificate does not admit its bearer to the pool.
var ErrNotAdmitted = errors.New("not admitted to the pool")

const (
	inviteDomain      = "defs invite v1"
	certificateDomain = "defs certificate v1"
	peerIDBytesMax    = 128
)

// PoolID is the public key of a pool.
type PoolID [ed25519.PublicKeySize]byte

func (p PoolID) String() string { return hex.EncodeToString(p[:]) }

// PoolKey is a pool's Ed25519 key: whoever has it can invite. Its founder
// keeps it sealed.
type PoolKey ed25519.PrivateKey

// NewPool draws the key of a new pool.
func NewPool() (PoolKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("new pool: %w", err)
	}
	return PoolKey(key), nil
}

// PoolKeyFromSeed is the inverse of Seed; len(seed) == 32.
func PoolKeyFromSeed(seed []byte) (PoolKey, error) {
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("pool key: seed has %d bytes, want %d", len(seed), ed25519.SeedSize)
	}
	return PoolKey(ed25519.NewKeyFromSeed(seed)), nil
}

// Seed returns the 32 secret bytes that the key is made of.
func (k PoolKey) Seed() []byte { return ed25519.PrivateKey(k).Seed() }

// ID returns the pool's public key.
func (k PoolKey) ID() PoolID {
	return PoolID(ed25519.PrivateKey(k).Public().(ed25519.PublicKey))
}

// Ticket invites: its bearer can admit peers until expiry (zero: for ever),
// and their membership ends then too, because nothing in a certificate proves
// when it was signed. addrs are multiaddrs with /p2p/ID of members to ask
// first, at most 16.
func (k PoolKey) Ticket(expiry time.Time, addrs []string) (Ticket, error) {
	_, invite, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return Ticket{}, fmt.Errorf("new ticket: %w", err)
	}
	t := Ticket{Pool: k.ID(), Invite: invite, Expiry: expiry.Truncate(time.Second), Addrs: addrs}
	if expiry.IsZero() {
		t.Expiry = time.Time{}
	}
	t.Signature = ed25519.Sign(ed25519.PrivateKey(k), inviteBytes(t.invitePublic(), unixOrZero(t.Expiry)))
	return t, t.Verify(time.Time{})
}

// Join makes the certificate that admits the peer of key. It asks nobody.
// Tickets that have expired are refused.
func Join(t Ticket, key ed25519.PrivateKey, role Role) (*wire.Certificate, error) {
	if err := t.Verify(time.Now()); err != nil {
		return nil, fmt.Errorf("join pool: %w", err)
	}
	id, err := NodeIDOf(key)
	if err != nil {
		return nil, fmt.Errorf("join pool: %w", err)
	}
	c := &wire.Certificate{
		Pool:            bytes.Clone(t.Pool[:]),
		InviteKey:       t.invitePublic(),
		Expiry:          unixOrZero(t.Expiry),
		InviteSignature: bytes.Clone(t.Signature),
		Peer:            string(id),
		Role:            uint32(role),
	}
	c.PeerSignature = ed25519.Sign(t.Invite, certificateBytes(c))
	if _, err := VerifyCertificate(c, t.Pool, time.Now()); err != nil {
		return nil, fmt.Errorf("join pool: %w", err)
	}
	return c, nil
}

// VerifyCertificate checks that c admits a peer to pool at the time now and
// returns which. Errors wrap ErrNotAdmitted.
func VerifyCertificate(c *wire.Certificate, pool PoolID, now time.Time) (placement.NodeID, error) {
	deny := func(format string, args ...any) (placement.NodeID, error) {
		return "", fmt.Errorf("%w: certificate %s", ErrNotAdmitted, fmt.Sprintf(format, args...))
	}
	switch {
	case c == nil:
		return deny("is missing")
	case !bytes.Equal(c.Pool, pool[:]):
		return deny("is for another pool")
	case len(c.InviteKey) != ed25519.PublicKeySize:
		return deny("has an invite key of %d bytes", len(c.InviteKey))
	case c.Expiry < 0 || c.Expiry > 0 && now.Unix() >= c.Expiry:
		return deny("expired at %s; ask for a new ticket", time.Unix(c.Expiry, 0).UTC().Format(time.RFC3339))
	case Role(c.Role) != RoleNode && Role(c.Role) != RoleDevice && Role(c.Role) != RoleRecovery:
		return deny("has the unknown role %d", c.Role)
	case len(c.Peer) > peerIDBytesMax:
		return deny("has a peer id of %d bytes", len(c.Peer))
	}
	id, err := peer.Decode(c.Peer)
	if err != nil || id.String() != c.Peer {
		return deny("has a malformed peer id")
	}
	if !ed25519.Verify(pool[:], inviteBytes(c.InviteKey, c.Expiry), c.InviteSignature) {
		return deny("has an invitation that the pool did not sign")
	}
	if !ed25519.Verify(c.InviteKey, certificateBytes(c), c.PeerSignature) {
		return deny("was not signed by the invitation's key")
	}
	return placement.NodeID(c.Peer), nil
}

// inviteBytes is what the pool signs: domain ‖ invite key (32) ‖ expiry (8, BE).
func inviteBytes(inviteKey []byte, expiryUnix int64) []byte {
	b := append([]byte(inviteDomain), inviteKey...)
	return binary.BigEndian.AppendUint64(b, uint64(expiryUnix))
}

// certificateBytes is what the invite key signs: domain ‖ pool (32) ‖ role
// (4, BE) ‖ peer id text.
func certificateBytes(c *wire.Certificate) []byte {
	b := append([]byte(certificateDomain), c.Pool...)
	b = binary.BigEndian.AppendUint32(b, c.Role)
	return append(b, c.Peer...)
}

func unixOrZero(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// NodeIDOf returns the id of the peer whose key this is.
func NodeIDOf(key ed25519.PrivateKey) (placement.NodeID, error) {
	pub, err := crypto.UnmarshalEd25519PublicKey(key.Public().(ed25519.PublicKey))
	if err != nil {
		return "", fmt.Errorf("peer id: %w", err)
	}
	id, err := peer.IDFromPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("peer id: %w", err)
	}
	return placement.NodeID(id.String()), nil
}

// LoadOrCreateKey reads a peer's key from path, or draws one and writes it
// there with mode 0600: 64 hexadecimal digits, the Ed25519 seed, and a newline.
func LoadOrCreateKey(path string) (ed25519.PrivateKey, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("create peer key: %w", err)
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, fmt.Errorf("create peer key: %w", err)
		}
		if err := WriteFile(path, []byte(hex.EncodeToString(key.Seed())+"\n")); err != nil {
			return nil, fmt.Errorf("create peer key: %w", err)
		}
		return key, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load peer key: %w", err)
	}
	seed, err := hex.DecodeString(string(bytes.TrimSpace(text)))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("load peer key %s: want %d hexadecimal digits", path, 2*ed25519.SeedSize)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// WriteFile replaces path by data, whole or not at all, with mode 0600. Once it
// has returned, a power cut does not undo it.
func WriteFile(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
