package p2p

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/multiformats/go-multistream"
	"github.com/zeebo/blake3"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	sessionBytes = 16
	nonceDomain  = "defs nonce v1"
)

// greeting is the Hello of this host on one connection. done closes when it
// has been answered; member, nonce and err are set then.
type greeting struct {
	done   chan struct{}
	member *member
	nonce  []byte
	err    error
}

// greet makes sure that a Hello is sent on c, and returns it.
func (h *Host) greet(c network.Conn) *greeting {
	h.mu.Lock()
	defer h.mu.Unlock()
	if g := h.greetings[c]; g != nil {
		return g
	}
	g := &greeting{done: make(chan struct{})}
	h.greetings[c] = g
	if !h.spawnLocked(func() {
		g.member, g.nonce, g.err = h.exchangeHello(c)
		close(g.done)
		h.greeted(c, g)
	}) {
		g.err = ErrClosed
		close(g.done)
	}
	return g
}

// exchangeHello tells c's peer who this host is and learns the same from it.
func (h *Host) exchangeHello(c network.Conn) (*member, []byte, error) {
	fail := func(err error) (*member, []byte, error) {
		return nil, nil, fmt.Errorf("hello to %s: %w", c.RemotePeer(), err)
	}
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(h.ctx, allowLimitedReason), h.o.DialTimeout)
	defer cancel()
	s, err := c.NewStream(ctx)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = s.Reset() }()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	if err := s.SetProtocol(requestProtocol); err != nil {
		return fail(err)
	}
	if err := multistream.SelectProtoOrFail(requestProtocol, s); err != nil {
		return fail(err)
	}
	req := &wire.Request{Version: WireVersion, Op: &wire.Request_Hello{Hello: &wire.Hello{Self: h.self(), Session: h.session}}}
	if err := writeFrame(s, req, nil, func() {}); err != nil {
		return fail(err)
	}
	rep := new(wire.Reply)
	if err := readMessage(bufio.NewReader(s), rep, strangerMessageMax); err != nil {
		return fail(err)
	}
	if rep.Status != wire.Status_STATUS_OK {
		return fail(fmt.Errorf("%w: it answered %s: %s", ErrNotAdmitted, rep.Status, rep.Error))
	}
	reply := rep.GetHello()
	if len(reply.GetNonce()) != NonceBytes {
		return fail(fmt.Errorf("%w: its nonce has %d bytes", ErrNotAdmitted, len(reply.GetNonce())))
	}
	m, err := h.admit(c, reply.GetSelf())
	if err != nil {
		return fail(err)
	}
	return m, reply.GetNonce(), nil
}

// greeted follows up on an answered Hello: strangers are cut off, members are
// told apart from them everywhere and asked for the member list.
func (h *Host) greeted(c network.Conn, g *greeting) {
	switch {
	case errors.Is(g.err, ErrNotAdmitted):
		h.log.Warn("Closing the connection to a peer that is not of this pool.", "peer", c.RemotePeer().String(), "err", g.err)
		_ = c.Close()
	case g.err != nil:
		h.log.Debug("A new connection failed before it was of use.", "peer", c.RemotePeer().String(), "err", g.err)
		_ = c.Close()
	default:
		h.net.ConnManager().Protect(c.RemotePeer(), "member")
		h.discovery.add(c.RemotePeer())
		h.probe(g.member)
	}
}

// serveHello admits the peer of c if its certificate says so.
func (h *Host) serveHello(c network.Conn, hello *wire.Hello) (*wire.Reply, error) {
	if len(hello.GetSession()) != sessionBytes {
		return nil, Statusf(wire.Status_STATUS_INVALID, "session of %d bytes, want %d", len(hello.GetSession()), sessionBytes)
	}
	m, err := h.admit(c, hello.GetSelf())
	if err != nil {
		return nil, Statusf(wire.Status_STATUS_DENIED, "%v", err)
	}
	h.table.greeted(m, hello.Session, h.drawNonce(m.id, hello.Session))
	h.table.contact(m, time.Now())
	from, _ := h.table.sender(m, time.Now())
	h.greet(c) // the other way round, so that requests can go both ways
	return &wire.Reply{Result: &wire.Reply_Hello{Hello: &wire.HelloReply{Self: h.self(), Nonce: from.Nonce}}}, nil
}

// admit takes in what the peer at the other end of c says about itself.
func (h *Host) admit(c network.Conn, said *wire.Member) (*member, error) {
	if got, want := said.GetCertificate().GetPeer(), c.RemotePeer().String(); got != want {
		return nil, fmt.Errorf("%w: its certificate is for another peer", ErrNotAdmitted)
	}
	m, err := h.table.learn(said, time.Now())
	if err != nil {
		return nil, err
	}
	if m == nil {
		return nil, fmt.Errorf("%w: it has this host's key", ErrNotAdmitted)
	}
	h.table.contact(m, time.Now())
	return m, nil
}

// drawNonce derives the nonce of one session of a peer with this run of the
// host, so that all their connections have the same and none is stored.
func (h *Host) drawNonce(id placement.NodeID, session []byte) []byte {
	d := blake3.NewDeriveKey(nonceDomain)
	_, _ = d.Write(h.nonceSecret[:])
	_, _ = d.Write(session)
	_, _ = d.Write([]byte(id))
	return d.Sum(nil)[:NonceBytes]
}

func sizeOnWire(m proto.Message) int { return proto.Size(m) + 8 }
