package p2p

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	requestProtocol  = "/defs/request/1"
	streamReadBytes  = 4 << 10
	streamIdleMax    = time.Minute     // an unused stream is closed by the side that calls
	streamIdleServed = 5 * time.Minute // and, should that fail, by the side that serves
)

// dial is an attempt to connect that all callers share.
type dial struct {
	done chan struct{}
	err  error
}

// callStream is one stream on which requests go out, one at a time.
type callStream struct {
	s     network.Stream
	r     *bufio.Reader
	since time.Time // unused since
}

// streamPool keeps the unused streams to one member, the newest last.
type streamPool struct {
	mu   sync.Mutex
	free []*callStream
}

func (p *streamPool) take() *callStream {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free) == 0 {
		return nil
	}
	last := len(p.free) - 1
	cs := p.free[last]
	p.free = p.free[:last]
	return cs
}

func (p *streamPool) put(cs *callStream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	cs.since = time.Now()
	if !cs.s.Conn().IsClosed() {
		p.free = append(p.free, cs)
	}
}

// drop forgets the streams of a connection that has ended.
func (p *streamPool) drop(c network.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = slices.DeleteFunc(p.free, func(cs *callStream) bool { return cs.s.Conn() == c })
}

// trim closes streams unused since before.
func (p *streamPool) trim(before time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = slices.DeleteFunc(p.free, func(cs *callStream) bool {
		if cs.since.After(before) {
			return false
		}
		_ = cs.s.Reset()
		return true
	})
}

// Call sends one request to a member. See Transport.Call.
func (h *Host) Call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	op := OpOf(req)
	if len(body) > BodyBytesMax {
		return nil, nil, fmt.Errorf("%s to %s: %w: body of %d bytes, at most %d", op, to, ErrTooLarge, len(body), BodyBytesMax)
	}
	req = &wire.Request{Version: WireVersion, BodyBytes: uint64(len(body)), Op: req.Op}
	if to == h.id {
		return h.callSelf(ctx, op, req, body)
	}
	m := h.table.get(to)
	if m == nil {
		return nil, nil, fmt.Errorf("%s to %s: %w: no such member is known", op, to, ErrUnreachable)
	}
	rep, replyBody, err := h.request(ctx, m, req, body, false)
	if err != nil {
		return nil, nil, fmt.Errorf("%s to %s: %w", op, to, err)
	}
	if rep.Status != wire.Status_STATUS_OK {
		return rep, nil, &StatusError{Op: op, Peer: to, Status: rep.Status, Message: rep.Error}
	}
	return rep, replyBody, nil
}

// callSelf runs the handler here, so that callers need not tell themselves
// from others.
func (h *Host) callSelf(ctx context.Context, op string, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	if h.ctx.Err() != nil {
		return nil, nil, fmt.Errorf("%s to self: %w", op, ErrClosed)
	}
	from := Peer{
		Member: Member{ID: h.id, Role: Role(h.o.Certificate.Role), Host: h.o.Host, Zone: h.o.Zone, Certificate: h.o.Certificate},
		Nonce:  h.drawNonce(h.id, h.session),
	}
	rep, replyBody, sent := h.handle(ctx, from, req, body)
	defer sent()
	if rep.Status != wire.Status_STATUS_OK {
		return rep, nil, &StatusError{Op: op, Peer: h.id, Status: rep.Status, Message: rep.Error}
	}
	return rep, slices.Clone(replyBody), nil
}

// Nonce returns what `to` drew for this host. See Transport.Nonce.
func (h *Host) Nonce(ctx context.Context, to placement.NodeID) ([]byte, error) {
	if to == h.id {
		return h.drawNonce(h.id, h.session), nil
	}
	m := h.table.get(to)
	if m == nil {
		return nil, fmt.Errorf("nonce of %s: %w: no such member is known", to, ErrUnreachable)
	}
	if err := h.connect(ctx, m, false); err != nil {
		return nil, fmt.Errorf("nonce of %s: %w", to, err)
	}
	conns := slices.DeleteFunc(h.net.Network().ConnsToPeer(h.dialInfo(m).ID), h.redundant)
	if len(conns) == 0 {
		return nil, fmt.Errorf("nonce of %s: %w: the connection was lost", to, ErrUnreachable)
	}
	newest := slices.MaxFunc(conns, func(a, b network.Conn) int { return a.Stat().Opened.Compare(b.Stat().Opened) })
	g := h.greet(newest)
	if err := h.waitGreeting(ctx, g); err != nil {
		return nil, fmt.Errorf("nonce of %s: %w", to, err)
	}
	return slices.Clone(g.nonce), nil
}

// request carries one request out, on a kept stream where there is one. Its
// replies may have any status. urgent ignores the back-off after failed dials.
func (h *Host) request(ctx context.Context, m *member, req *wire.Request, body []byte, urgent bool) (*wire.Reply, []byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	if !urgent { // heartbeats do not wait behind a backlog of calls
		select {
		case m.calls <- struct{}{}:
			defer func() { <-m.calls }()
		case <-ctx.Done():
			return nil, nil, unanswered(ctx, ctx.Err())
		case <-h.ctx.Done():
			return nil, nil, ErrClosed
		}
	}
	for {
		cs := m.idle.take()
		kept := cs != nil
		if !kept {
			var err error
			if cs, err = h.openStream(ctx, m, urgent); err != nil {
				return nil, nil, err
			}
		}
		rep, replyBody, silent, err := h.exchange(ctx, cs, req, body)
		switch {
		case err == nil:
			h.table.contact(m, time.Now())
			return rep, replyBody, nil
		case errors.Is(err, ErrTooLarge):
			return nil, nil, err
		case kept && silent && ctx.Err() == nil && h.ctx.Err() == nil:
			continue // the kept stream had died unnoticed; each try uses one up
		}
		if !urgent && !errors.Is(ctx.Err(), context.Canceled) {
			h.probeSoon(m) // is it there at all?
		}
		return nil, nil, unanswered(ctx, err)
	}
}

// unanswered makes err an ErrUnreachable, except where the caller gave up.
func unanswered(ctx context.Context, err error) error {
	switch cause := ctx.Err(); {
	case errors.Is(cause, context.Canceled):
		return cause
	case cause != nil:
		return fmt.Errorf("%w: no answer in time: %w", ErrUnreachable, cause)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// exchange writes one request and reads its reply. silent says that not one
// byte of a reply came. The stream is kept if all went well, else reset.
func (h *Host) exchange(ctx context.Context, cs *callStream, req *wire.Request, body []byte) (rep *wire.Reply, replyBody []byte, silent bool, err error) {
	stop := context.AfterFunc(ctx, func() { _ = cs.s.Reset() })
	step := func() { _ = cs.s.SetDeadline(time.Now().Add(h.o.IdleTimeout)) }
	silent = true
	defer func() {
		switch undisturbed := stop(); {
		case err != nil:
			_ = cs.s.Reset()
		case undisturbed:
			h.keep(cs)
		}
	}()
	if err := writeFrame(cs.s, req, body, step); err != nil {
		return nil, nil, silent, err
	}
	step()
	if _, err := cs.r.Peek(1); err != nil {
		return nil, nil, silent, err
	}
	silent = false
	rep = new(wire.Reply)
	if err := readMessage(cs.r, rep, MessageBytesMax); err != nil {
		return nil, nil, silent, err
	}
	if rep.Version != WireVersion {
		return nil, nil, silent, fmt.Errorf("reply of version %d, this program knows %d", rep.Version, WireVersion)
	}
	if replyBody, err = readBody(cs.r, rep.BodyBytes, nil, step); err != nil {
		return nil, nil, silent, err
	}
	return rep, replyBody, silent, nil
}

// keep returns a stream to the pool of its member.
func (h *Host) keep(cs *callStream) {
	if m := h.table.get(placement.NodeID(cs.s.Conn().RemotePeer().String())); m != nil {
		m.idle.put(cs)
		return
	}
	_ = cs.s.Reset()
}

// openStream opens a stream to m on a connection that has been greeted.
func (h *Host) openStream(ctx context.Context, m *member, urgent bool) (*callStream, error) {
	if err := h.connect(ctx, m, urgent); err != nil {
		return nil, err
	}
	sctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(ctx, allowLimitedReason), h.o.DialTimeout)
	defer cancel()
	s, err := h.net.NewStream(network.WithNoDial(sctx, "connected above"), h.dialInfo(m).ID, requestProtocol)
	if err != nil {
		return nil, unanswered(ctx, err)
	}
	if err := h.waitGreeting(ctx, h.greet(s.Conn())); err != nil {
		_ = s.Reset()
		return nil, err
	}
	return &callStream{s: s, r: bufio.NewReaderSize(s, streamReadBytes)}, nil
}

func (h *Host) waitGreeting(ctx context.Context, g *greeting) error {
	select {
	case <-g.done:
		if g.err != nil {
			return fmt.Errorf("%w: %w", ErrUnreachable, g.err)
		}
		return nil
	case <-ctx.Done():
		return unanswered(ctx, ctx.Err())
	}
}

// connect returns once there is a connection to m. A failure is remembered
// for a while that doubles from dialBackoffMin to dialBackoffMax, so that a
// dead peer costs nothing; urgent tries all the same.
func (h *Host) connect(ctx context.Context, m *member, urgent bool) error {
	id := h.dialInfo(m).ID
	if c := h.net.Network().Connectedness(id); c == network.Connected || c == network.Limited {
		return nil
	}
	h.table.mu.Lock()
	d := m.dialing
	if d == nil {
		if wait := time.Until(m.retryAfter); wait > 0 && !urgent {
			h.table.mu.Unlock()
			return fmt.Errorf("%w: the last dial failed, next try in %s", ErrUnreachable, wait.Round(time.Millisecond))
		}
		d = &dial{done: make(chan struct{})}
		m.dialing = d
		if !h.spawn(func() { h.dial(m, d) }) {
			m.dialing = nil
			h.table.mu.Unlock()
			return ErrClosed
		}
	}
	h.table.mu.Unlock()
	select {
	case <-d.done:
		return d.err
	case <-ctx.Done():
		return unanswered(ctx, ctx.Err())
	}
}

// dial makes one attempt to connect to m.
func (h *Host) dial(m *member, d *dial) {
	ctx, cancel := context.WithTimeout(h.ctx, h.o.DialTimeout)
	defer cancel()
	info := h.dialInfo(m)
	if s, ok := h.net.Network().(*swarm.Swarm); ok {
		s.Backoff().Clear(info.ID) // the back-off kept here decides
	}
	if err := h.net.Connect(ctx, info); err != nil {
		d.err = fmt.Errorf("%w: %w", ErrUnreachable, err)
		h.failed(m, time.Now())
	}
	h.table.mu.Lock()
	m.dialing = nil
	h.table.mu.Unlock()
	close(d.done)
}

// failed notes that m could not be reached.
func (h *Host) failed(m *member, now time.Time) {
	h.table.mu.Lock()
	defer h.table.mu.Unlock()
	m.retryAfter = now.Add(min(dialBackoffMin<<min(m.dialFails, 16), dialBackoffMax))
	m.dialFails++
	if !m.unreachable {
		m.unreachable = true
		h.table.notify()
	}
}
