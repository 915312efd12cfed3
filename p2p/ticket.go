package p2p

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/multiformats/go-multiaddr"
	"github.com/zeebo/blake3"
)

// ErrTicket says that a text is no ticket.
var ErrTicket = errors.New("not a valid ticket")

const (
	ticketPrefix        = "defs1"
	ticketVersion       = 1
	ticketAddrsMax      = 16
	ticketAddrBytesMax  = 256
	ticketChecksumBytes = 5
	ticketTextMax       = 8 << 10
	ticketDomain        = "defs ticket v1"
)

var ticketBase32 = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// Ticket lets its bearer join a pool: treat its text as a secret.
type Ticket struct {
	Pool      PoolID
	Invite    ed25519.PrivateKey // signs the certificates of those who join
	Expiry    time.Time          // whole seconds; zero for none
	Signature []byte             // by the pool key over the invite's public key and expiry
	Addrs     []string           // multiaddrs with /p2p/ID
}

func (t Ticket) invitePublic() ed25519.PublicKey { return t.Invite.Public().(ed25519.PublicKey) }

// Verify checks the pool's signature, the bounds, and the expiry against now;
// the zero time skips the last.
func (t Ticket) Verify(now time.Time) error {
	if len(t.Invite) != ed25519.PrivateKeySize {
		return fmt.Errorf("%w: the invite key has %d bytes", ErrTicket, len(t.Invite))
	}
	if !ed25519.Verify(t.Pool[:], inviteBytes(t.invitePublic(), unixOrZero(t.Expiry)), t.Signature) {
		return fmt.Errorf("%w: the pool did not sign it", ErrTicket)
	}
	if !t.Expiry.IsZero() && !now.IsZero() && !now.Before(t.Expiry) {
		return fmt.Errorf("%w: it expired at %s; ask for a new one", ErrTicket, t.Expiry.UTC().Format(time.RFC3339))
	}
	if len(t.Addrs) > ticketAddrsMax {
		return fmt.Errorf("%w: %d addresses, at most %d", ErrTicket, len(t.Addrs), ticketAddrsMax)
	}
	for _, a := range t.Addrs {
		if len(a) > ticketAddrBytesMax {
			return fmt.Errorf("%w: an address of %d bytes, at most %d", ErrTicket, len(a), ticketAddrBytesMax)
		}
		if _, err := multiaddr.NewMultiaddr(a); err != nil {
			return fmt.Errorf("%w: address: %w", ErrTicket, err)
		}
	}
	return nil
}

// Text returns the ticket as one word of lower-case letters and digits that
// starts with "defs1". FORMAT.md, "Tickets and certificates".
func (t Ticket) Text() string {
	b := []byte{ticketVersion}
	b = append(b, t.Pool[:]...)
	b = append(b, t.Invite.Seed()...)
	b = binary.BigEndian.AppendUint64(b, uint64(unixOrZero(t.Expiry)))
	b = append(b, t.Signature...)
	b = append(b, byte(len(t.Addrs)))
	for _, a := range t.Addrs {
		b = binary.BigEndian.AppendUint16(b, uint16(len(a)))
		b = append(b, a...)
	}
	return ticketPrefix + ticketBase32.EncodeToString(append(b, ticketChecksum(b)...))
}

// ParseTicket reads what Text wrote; case and surrounding space do not
// matter. The pool's signature is checked, the expiry is not. Errors wrap
// ErrTicket.
func ParseTicket(text string) (Ticket, error) {
	bad := func(what string) (Ticket, error) { return Ticket{}, fmt.Errorf("%w: %s", ErrTicket, what) }
	text = strings.TrimSpace(text)
	if len(text) > ticketTextMax {
		return bad("it is too long")
	}
	text, ok := strings.CutPrefix(strings.ToLower(text), ticketPrefix)
	if !ok {
		return bad("it does not start with " + ticketPrefix)
	}
	b, err := ticketBase32.DecodeString(text)
	const fixedBytes = 1 + 32 + 32 + 8 + 64 + 1
	if err != nil || len(b) < fixedBytes+ticketChecksumBytes {
		return bad("it is incomplete or has characters that do not belong there")
	}
	b, sum := b[:len(b)-ticketChecksumBytes], b[len(b)-ticketChecksumBytes:]
	if !bytes.Equal(sum, ticketChecksum(b)) {
		return bad("its checksum is wrong: a character was lost or changed")
	}
	if b[0] != ticketVersion {
		return bad(fmt.Sprintf("its version is %d, this program knows %d", b[0], ticketVersion))
	}
	t := Ticket{Pool: PoolID(b[1:33]), Invite: ed25519.NewKeyFromSeed(b[33:65]), Signature: bytes.Clone(b[73:137])}
	if unix := binary.BigEndian.Uint64(b[65:73]); unix > 1<<40 {
		return bad("its expiry is out of range")
	} else if unix > 0 {
		t.Expiry = time.Unix(int64(unix), 0)
	}
	count, rest := int(b[137]), b[138:]
	for range count {
		if len(rest) < 2 || len(rest) < 2+int(binary.BigEndian.Uint16(rest)) {
			return bad("its addresses are cut short")
		}
		n := int(binary.BigEndian.Uint16(rest))
		t.Addrs = append(t.Addrs, string(rest[2:2+n]))
		rest = rest[2+n:]
	}
	if len(rest) != 0 {
		return bad("it has bytes behind its end")
	}
	if ticketPrefix+text != t.Text() { // non-zero padding bits
		return bad("its last character is wrong")
	}
	return t, t.Verify(time.Time{})
}

func ticketChecksum(payload []byte) []byte {
	h := blake3.New()
	_, _ = h.WriteString(ticketDomain)
	_, _ = h.Write(payload)
	return h.Sum(nil)[:ticketChecksumBytes]
}
