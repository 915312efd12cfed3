package p2p

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	// strangerMessageMax bounds messages of peers that are not admitted yet.
	strangerMessageMax = 32 << 10
	errorTextMax       = 1 << 10
)

// serveStream answers the requests of one stream, one after the other. libp2p
// runs it on a goroutine for each stream.
func (h *Host) serveStream(s network.Stream) {
	if !h.enter() {
		_ = s.Reset()
		return
	}
	defer h.wg.Done()
	r := bufio.NewReaderSize(s, streamReadBytes)
	for {
		_ = s.SetDeadline(time.Now().Add(streamIdleServed))
		if _, err := r.Peek(1); err != nil {
			_ = s.Reset()
			return
		}
		err := h.serveRequest(s, r)
		if errors.Is(err, errRefused) { // a reset now could overtake the reply
			_, _ = io.CopyN(io.Discard, r, MessageBytesMax)
		}
		if err != nil {
			_ = s.Reset()
			h.log.Debug("A request was cut off.", "peer", s.Conn().RemotePeer().String(), "err", err)
			return
		}
	}
}

var errRefused = errors.New("peer refused")

// serveRequest reads one request and writes its reply. An error ends the
// stream.
func (h *Host) serveRequest(s network.Stream, r *bufio.Reader) error {
	step := func() { _ = s.SetDeadline(time.Now().Add(h.o.IdleTimeout)) }
	step()
	m := h.table.get(placement.NodeID(s.Conn().RemotePeer().String()))
	limit := MessageBytesMax
	if m == nil {
		limit = strangerMessageMax
	}
	req := new(wire.Request)
	if err := readMessage(r, req, limit); err != nil {
		return err
	}
	if hello := req.GetHello(); hello != nil && req.BodyBytes == 0 && req.Version == WireVersion {
		rep, err := h.serveHello(s.Conn(), hello)
		if err != nil {
			rep = &wire.Reply{Status: StatusOf(err), Error: messageOf(err)}
		}
		rep.Version = WireVersion
		if werr := writeFrame(s, rep, nil, step); werr != nil {
			return werr
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errRefused, err)
		}
		return nil
	}
	var from Peer
	admitted := false
	if m != nil {
		from, admitted = h.table.sender(m, time.Now())
	}
	switch {
	case req.Version != WireVersion:
		return h.refuse(s, step, wire.Status_STATUS_INVALID, "this program knows version 1 of requests only")
	case !admitted:
		return h.refuse(s, step, wire.Status_STATUS_DENIED, "say hello first")
	case req.BodyBytes > BodyBytesMax:
		return h.refuse(s, step, wire.Status_STATUS_INVALID, "the body is too large")
	}
	h.table.contact(m, time.Now())

	select {
	case m.handlers <- struct{}{}:
		defer func() { <-m.handlers }()
	case <-h.ctx.Done():
		return ErrClosed
	}
	if n := int64(req.BodyBytes); n > 0 {
		if err := h.inboundBytes.Acquire(h.ctx, n); err != nil {
			return ErrClosed
		}
		defer h.inboundBytes.Release(n)
	}
	body, err := readBody(r, req.BodyBytes, step)
	if err != nil {
		return err
	}
	rep, replyBody := h.serveOp(from, req, body)
	return writeFrame(s, rep, replyBody, step)
}

// refuse answers and ends the stream, because a body may follow that nobody
// wants to read.
func (h *Host) refuse(s network.Stream, step func(), status wire.Status, message string) error {
	rep := &wire.Reply{Version: WireVersion, Status: status, Error: message}
	if err := writeFrame(s, rep, nil, step); err != nil {
		return err
	}
	_ = s.CloseWrite()
	return fmt.Errorf("%w: %s", errRefused, message)
}

// serveOp answers what concerns the pool itself and leaves the rest to the
// handler.
func (h *Host) serveOp(from Peer, req *wire.Request, body []byte) (*wire.Reply, []byte) {
	rep := &wire.Reply{Version: WireVersion}
	switch op := req.Op.(type) {
	case *wire.Request_Heartbeat:
		rep.Result = &wire.Reply_Heartbeat{Heartbeat: h.serveHeartbeat(from, op.Heartbeat)}
	case *wire.Request_Members:
		said, more := h.table.page(placement.NodeID(op.Members.GetAfter()))
		rep.Result = &wire.Reply_Members{Members: &wire.Members{Members: said, More: more}}
	default:
		return h.handle(h.ctx, from, opOf(req), req, body)
	}
	return rep, nil
}

// handle runs the handler and turns what it returns into a reply that can be
// sent.
func (h *Host) handle(ctx context.Context, from Peer, op string, req *wire.Request, body []byte) (rep *wire.Reply, replyBody []byte) {
	handler := h.handler.Load()
	if handler == nil {
		return &wire.Reply{Version: WireVersion, Status: wire.Status_STATUS_BUSY, Error: "not ready yet"}, nil
	}
	defer func() {
		if p := recover(); p != nil { // one bad request must not end a node that holds others' shards
			h.log.Error("A handler panicked; the request failed.", "op", op, "peer", string(from.Member.ID), "panic", p, "stack", string(debug.Stack()))
			rep, replyBody = &wire.Reply{Version: WireVersion, Status: wire.Status_STATUS_INTERNAL, Error: internalText}, nil
		}
	}()
	rep, replyBody, err := (*handler)(ctx, from, req, body)
	if err == nil && len(replyBody) > BodyBytesMax {
		err = ErrTooLarge
	}
	if err != nil {
		if StatusOf(err) == wire.Status_STATUS_INTERNAL {
			h.log.Error("A request failed.", "op", op, "peer", string(from.Member.ID), "err", err)
		}
		return &wire.Reply{Version: WireVersion, Status: StatusOf(err), Error: messageOf(err)}, nil
	}
	if rep == nil {
		rep = new(wire.Reply)
	}
	rep.Version, rep.BodyBytes = WireVersion, uint64(len(replyBody))
	return rep, replyBody
}

const internalText = "the request failed there; the log of that peer says why"

// messageOf is the text of err that a peer may see: errors of the handler's
// own making may name files.
func messageOf(err error) string {
	var se *StatusError
	if !errors.As(err, &se) {
		return internalText
	}
	return se.Message[:min(len(se.Message), errorTextMax)]
}
