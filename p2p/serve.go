package p2p

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

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
		// Its own share first: a member that claims bytes and does not send
		// them waits for itself.
		for _, room := range []*semaphore.Weighted{m.bodies, h.inboundBytes} {
			if err := room.Acquire(h.ctx, n); err != nil {
				return ErrClosed
			}
			defer room.Release(n)
		}
	}
	var buf []byte
	if req.BodyBytes > inlineBodyBytes && req.BodyBytes <= bodyTrustBytes {
		pooled := h.bodyBuffer(int(req.BodyBytes))
		defer h.bodies.Put(pooled) // the reply, which may be part of it, is out by then
		buf = *pooled
	}
	body, err := readBody(r, req.BodyBytes, buf, step)
	if err != nil {
		return err
	}
	rep, replyBody, sent := h.serveOp(from, req, body)
	defer sent()
	return writeFrame(s, rep, replyBody, step)
}

// bodyBuffer returns a buffer for a request body of n bytes. To clear and
// collect a new one for each shard is a large part of what storing it costs.
func (h *Host) bodyBuffer(n int) *[]byte {
	buf, _ := h.bodies.Get().(*[]byte)
	if buf == nil || cap(*buf) < n {
		b := make([]byte, n)
		buf = &b
	}
	return buf
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
// handler. The caller calls sent when the reply is out or lost.
func (h *Host) serveOp(from Peer, req *wire.Request, body []byte) (_ *wire.Reply, _ []byte, sent func()) {
	rep := &wire.Reply{Version: WireVersion}
	switch op := req.Op.(type) {
	case *wire.Request_Heartbeat:
		rep.Result = &wire.Reply_Heartbeat{Heartbeat: h.serveHeartbeat(from, op.Heartbeat)}
	case *wire.Request_Members:
		said, more := h.table.page(placement.NodeID(op.Members.GetAfter()))
		rep.Result = &wire.Reply_Members{Members: &wire.Members{Members: said, More: more}}
	default:
		return h.handle(h.ctx, from, req, body)
	}
	return rep, nil, func() {}
}

// handle runs the handler, and logs what its caller is not told.
func (h *Host) handle(ctx context.Context, from Peer, req *wire.Request, body []byte) (_ *wire.Reply, _ []byte, sent func()) {
	var handler Handler
	if f := h.handler.Load(); f != nil {
		handler = *f
	}
	rep, replyBody, sent, err := Answer(ctx, handler, from, req, body)
	if err != nil {
		h.log.Error("A request failed.", "op", OpOf(req), "peer", string(from.Member.ID), "err", err)
	}
	return rep, replyBody, sent
}

// Answer runs handler, which may be nil, and makes of its result a reply that
// can be sent. The error is for the log of this side: what STATUS_INTERNAL
// stands for. Handlers that panic have failed: one bad request must not end a
// node that holds the shards of others. The transport calls sent when it needs
// the reply body no more; what AfterReply was given runs then.
func Answer(ctx context.Context, handler Handler, from Peer, req *wire.Request, body []byte) (rep *wire.Reply, replyBody []byte, sent func(), err error) {
	after := &afterReply{}
	sent = after.run
	if handler == nil {
		return &wire.Reply{Version: WireVersion, Status: wire.Status_STATUS_BUSY, Error: "not ready yet"}, nil, sent, nil
	}
	defer func() {
		if p := recover(); p != nil {
			rep, replyBody = &wire.Reply{Version: WireVersion, Status: wire.Status_STATUS_INTERNAL, Error: internalText}, nil
			err = fmt.Errorf("handler panicked: %v\n%s", p, debug.Stack())
		}
	}()
	rep, replyBody, err = handler(context.WithValue(ctx, afterReplyKey{}, after), from, req, body)
	if err == nil && len(replyBody) > BodyBytesMax {
		err = fmt.Errorf("%w: reply body of %d bytes, at most %d", ErrTooLarge, len(replyBody), BodyBytesMax)
	}
	if err == nil && rep != nil && proto.Size(rep) > MessageBytesMax-16 {
		err = fmt.Errorf("%w: reply of %d bytes, at most %d", ErrTooLarge, proto.Size(rep), MessageBytesMax)
	}
	if err != nil {
		rep = &wire.Reply{Version: WireVersion, Status: StatusOf(err), Error: messageOf(err)}
		if rep.Status != wire.Status_STATUS_INTERNAL {
			err = nil
		}
		return rep, nil, sent, err
	}
	if rep == nil {
		rep = new(wire.Reply)
	}
	rep.Version, rep.BodyBytes = WireVersion, uint64(len(replyBody))
	return rep, replyBody, sent, nil
}

const internalText = "the request failed there; the log of that peer says why"

// messageOf is the text of err that a peer may see: errors of the handler's
// own making may name files.
func messageOf(err error) string {
	var se *StatusError
	if !errors.As(err, &se) {
		return internalText
	}
	return strings.ToValidUTF8(se.Message[:min(len(se.Message), errorTextMax)], "")
}

// OpOf names the operation of a request by its field name, such as
// "put_shard".
func OpOf(req *wire.Request) string {
	r := req.ProtoReflect()
	if f := r.WhichOneof(r.Descriptor().Oneofs().ByName("op")); f != nil {
		return string(f.Name())
	}
	return "empty request"
}
