package p2p

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/defs-fs/defs/p2p/wire"
)

// fixed makes an Ed25519 key from one repeated byte.
func fixed(b byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, ed25519.SeedSize))
}

func fixedTicket(expiry time.Time, addrs ...string) Ticket {
	t := Ticket{Pool: PoolKey(fixed(1)).ID(), Invite: fixed(2), Expiry: expiry, Addrs: addrs}
	t.Signature = ed25519.Sign(fixed(1), inviteBytes(t.invitePublic(), unixOrZero(expiry)))
	return t
}

func fixedCertificate(t testing.TB, key ed25519.PrivateKey) *wire.Certificate {
	t.Helper()
	c, err := Join(fixedTicket(time.Time{}), key, RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTicketText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ticket := fixedTicket(time.Unix(rapid.Int64Range(1, 1<<40).Draw(t, "expiry"), 0))
		for range rapid.IntRange(0, ticketAddrsMax).Draw(t, "addrs") {
			ticket.Addrs = append(ticket.Addrs, "/ip4/10.0.0.1/tcp/4001")
		}
		text := ticket.Text()
		got, err := ParseTicket("  " + strings.ToUpper(text) + "\n")
		if err != nil {
			t.Fatal(err)
		}
		if got.Text() != text || !got.Expiry.Equal(ticket.Expiry) || len(got.Addrs) != len(ticket.Addrs) {
			t.Fatalf("got %+v, want %+v", got, ticket)
		}
		at := rapid.IntRange(len(ticketPrefix), len(text)-1).Draw(t, "at")
		changed := []byte(text)
		changed[at] = "abcdefghijklmnopqrstuvwxyz234567"[(strings.IndexByte("abcdefghijklmnopqrstuvwxyz234567", changed[at])+1)%32]
		if _, err := ParseTicket(string(changed)); !errors.Is(err, ErrTicket) {
			t.Fatalf("character %d changed: %v", at, err)
		}
		if _, err := ParseTicket(text[:at]); !errors.Is(err, ErrTicket) {
			t.Fatalf("cut at %d: %v", at, err)
		}
	})
}

// TestTicketGolden decodes the example of FORMAT.md.
func TestTicketGolden(t *testing.T) {
	const text = goldenTicket
	got, err := ParseTicket(text)
	if err != nil {
		t.Fatal(err)
	}
	want := fixedTicket(time.Unix(1900000000, 0), "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWPqT2nMDSiXUSx5D7fasaxhxKigVhcqfkKqrLghCq9jxz")
	if got.Text() != want.Text() || want.Text() != text {
		t.Fatalf("the ticket's text is now\n%s", want.Text())
	}
}

func TestTicketRefusals(t *testing.T) {
	stranger := fixedTicket(time.Time{})
	stranger.Signature = ed25519.Sign(fixed(9), inviteBytes(stranger.invitePublic(), 0))
	extended := fixedTicket(time.Unix(1000, 0))
	extended.Expiry = time.Unix(2000, 0)
	for name, ticket := range map[string]Ticket{
		"not signed by the pool": stranger,
		"expiry changed":         extended,
		"malformed address":      fixedTicket(time.Time{}, "nowhere"),
		"too many addresses":     fixedTicket(time.Time{}, make([]string, ticketAddrsMax+1)...),
		"long address":           fixedTicket(time.Time{}, strings.Repeat("/ip4/1.2.3.4", 30)),
		"expired":                fixedTicket(time.Unix(1000, 0)),
		"no invite key":          {},
	} {
		if _, err := Join(ticket, fixed(3), RoleNode); !errors.Is(err, ErrTicket) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyCertificate(t *testing.T) {
	pool := PoolKey(fixed(1)).ID()
	key := fixed(3)
	id, err := NodeIDOf(key)
	if err != nil {
		t.Fatal(err)
	}
	other, err := NodeIDOf(fixed(4))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := VerifyCertificate(fixedCertificate(t, key), pool, time.Now()); err != nil || got != id {
		t.Fatalf("got %s, %v", got, err)
	}
	for name, change := range map[string]func(*wire.Certificate){
		"pool":             func(c *wire.Certificate) { c.Pool[0] ^= 1 },
		"invite key":       func(c *wire.Certificate) { c.InviteKey[0] ^= 1 },
		"short invite key": func(c *wire.Certificate) { c.InviteKey = c.InviteKey[1:] },
		"invite signature": func(c *wire.Certificate) { c.InviteSignature[0] ^= 1 },
		"no signature":     func(c *wire.Certificate) { c.InviteSignature = nil },
		"expiry":           func(c *wire.Certificate) { c.Expiry = time.Now().Add(time.Hour).Unix() },
		"negative expiry":  func(c *wire.Certificate) { c.Expiry = -1 },
		"peer":             func(c *wire.Certificate) { c.Peer = string(other) },
		"peer not an id":   func(c *wire.Certificate) { c.Peer = "../../etc/passwd" },
		"long peer":        func(c *wire.Certificate) { c.Peer = strings.Repeat("1", 1000) },
		"role":             func(c *wire.Certificate) { c.Role = uint32(RoleDevice) },
		"unknown role":     func(c *wire.Certificate) { c.Role = 7 },
		"peer signature":   func(c *wire.Certificate) { c.PeerSignature[0] ^= 1 },
		"signed by the peer itself": func(c *wire.Certificate) {
			c.InviteKey = key.Public().(ed25519.PublicKey)
			c.PeerSignature = ed25519.Sign(key, certificateBytes(c))
		},
	} {
		c := proto.CloneOf(fixedCertificate(t, key))
		change(c)
		if _, err := VerifyCertificate(c, pool, time.Now()); !errors.Is(err, ErrNotAdmitted) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
	if _, err := VerifyCertificate(nil, pool, time.Now()); !errors.Is(err, ErrNotAdmitted) {
		t.Errorf("nil: %v", err)
	}
	soon := time.Now().Add(time.Hour)
	c, err := Join(fixedTicket(soon.Truncate(time.Second)), key, RoleDevice)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyCertificate(c, pool, soon); !errors.Is(err, ErrNotAdmitted) {
		t.Errorf("expired: %v", err)
	}
}

func TestLoadOrCreateKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "peer.key")
	first, err := LoadOrCreateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadOrCreateKey(path)
	if err != nil || !first.Equal(second) {
		t.Fatalf("another key came back: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	for _, text := range []string{"", "zz", hex.EncodeToString(make([]byte, 31))} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadOrCreateKey(path); err == nil {
			t.Errorf("%q was taken for a key", text)
		}
	}
}

func FuzzTicket(f *testing.F) {
	f.Add(goldenTicket)
	f.Add(fixedTicket(time.Time{}).Text())
	f.Add("defs1")
	f.Fuzz(func(t *testing.T, text string) {
		ticket, err := ParseTicket(text)
		if err != nil {
			if !errors.Is(err, ErrTicket) {
				t.Fatalf("error %v is no ErrTicket", err)
			}
			return
		}
		again, err := ParseTicket(ticket.Text())
		if err != nil || again.Text() != ticket.Text() {
			t.Fatalf("not the same again: %v", err)
		}
	})
}

func fixedAddrs(t testing.TB, texts ...string) (addrs []multiaddr.Multiaddr) {
	t.Helper()
	for _, text := range texts {
		a, err := multiaddr.NewMultiaddr(text)
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, a)
	}
	return addrs
}
