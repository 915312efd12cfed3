// Package memnet is a p2p.Transport in memory: many members in one process,
// and faults on demand.
//
//	net := memnet.New()
//	a := net.Add(p2p.Member{ID: "a", Role: p2p.RoleNode})
//	b := net.Add(p2p.Member{ID: "b", Role: p2p.RoleNode})
//	b.Handle(serve)
//	net.Kill("b") // calls to b are ErrUnreachable, a lists it as suspect
//
// Messages are encoded and decoded and bodies copied, so that members share no
// memory. Each Node has one goroutine for broadcasts and one for each call
// that it serves; Close waits for them.
package memnet

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/zeebo/blake3"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const gossipQueue = 512

// Network connects the nodes that were added to it.
type Network struct {
	mu     sync.Mutex
	nodes  map[placement.NodeID]*Node
	faults map[placement.NodeID]*fault
	starts uint64 // counts Add and Restart, for nonces
}

// fault is how a member misbehaves. Network.mu guards it.
type fault struct {
	killed  bool
	dead    bool // its silence has lasted long enough
	stalled chan struct{}
	delay   time.Duration
	corrupt func(op string, body []byte)
	start   uint64
}

// New makes a network without members.
func New() *Network {
	return &Network{nodes: make(map[placement.NodeID]*Node), faults: make(map[placement.NodeID]*fault)}
}

// Node is one member's Transport.
type Node struct {
	net    *Network
	member p2p.Member // Network.mu guards its usage
	ctx    context.Context
	cancel context.CancelFunc
	gossip chan func()
	wg     sync.WaitGroup

	mu       sync.Mutex // guards what follows
	closed   bool
	handler  p2p.Handler
	onLookup func(placement.NodeID, *wire.Lookup)
	onHead   func(placement.NodeID, *wire.HeadNotice)
}

// Add makes a member and starts it. A member of the same id that was there
// before is replaced: a process that starts again.
func (n *Network) Add(member p2p.Member) *Node {
	node := &Node{net: n, member: member, gossip: make(chan func(), gossipQueue)}
	node.ctx, node.cancel = context.WithCancel(context.Background())
	node.wg.Go(func() {
		for {
			select {
			case deliver := <-node.gossip:
				deliver()
			case <-node.ctx.Done():
				return
			}
		}
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.starts++
	n.nodes[member.ID] = node
	n.faults[member.ID] = &fault{start: n.starts}
	return node
}

// Kill makes a member unreachable, from it and to it, until Restart. Calls
// that it is serving end without an answer.
func (n *Network) Kill(id placement.NodeID) { n.set(id, func(f *fault) { f.killed = true }) }

// Restart brings a killed member back, with new nonces.
func (n *Network) Restart(id placement.NodeID) {
	n.set(id, func(f *fault) {
		n.starts++
		f.killed, f.dead, f.start = false, false, n.starts
	})
}

// Bury lets the others see a killed member as dead instead of suspect.
func (n *Network) Bury(id placement.NodeID) { n.set(id, func(f *fault) { f.dead = true }) }

// Stall lets calls to a member hang until their context ends or Resume, as
// with a process that has been stopped.
func (n *Network) Stall(id placement.NodeID) {
	n.set(id, func(f *fault) {
		if f.stalled == nil {
			f.stalled = make(chan struct{})
		}
	})
}

// Resume ends Stall.
func (n *Network) Resume(id placement.NodeID) {
	n.set(id, func(f *fault) {
		if f.stalled != nil {
			close(f.stalled)
			f.stalled = nil
		}
	})
}

// Delay lets each call to a member take longer by d.
func (n *Network) Delay(id placement.NodeID, d time.Duration) {
	n.set(id, func(f *fault) { f.delay = d })
}

// Corrupt lets change rewrite each reply body of a member in place; nil ends
// it. op names the request, such as "get_shard".
func (n *Network) Corrupt(id placement.NodeID, change func(op string, body []byte)) {
	n.set(id, func(f *fault) { f.corrupt = change })
}

func (n *Network) set(id placement.NodeID, change func(*fault)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if f := n.faults[id]; f != nil {
		change(f)
	}
}

// look returns a member and a copy of its faults.
func (n *Network) look(id placement.NodeID) (*Node, fault, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	node := n.nodes[id]
	if node == nil {
		return nil, fault{}, fmt.Errorf("%w: no such member is known", p2p.ErrUnreachable)
	}
	return node, *n.faults[id], nil
}

// reach returns `to` as `from` can reach it.
func (n *Network) reach(from, to *Node, f fault) error {
	_, mine, err := n.look(from.member.ID)
	if err != nil {
		return err
	}
	if f.killed || mine.killed || to.ctx.Err() != nil {
		return fmt.Errorf("%w: connection refused", p2p.ErrUnreachable)
	}
	return nil
}

// Self is the member's id.
func (a *Node) Self() placement.NodeID { return a.member.ID }

// Members lists the others, ordered by id.
func (a *Node) Members() []p2p.Member {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	var list []p2p.Member
	for id, node := range a.net.nodes {
		if id == a.member.ID {
			continue
		}
		m := node.member
		m.Heard = true
		f := a.net.faults[id]
		switch {
		case f.dead:
			m.State = p2p.Dead
		case f.killed || f.stalled != nil || node.ctx.Err() != nil:
			m.State = p2p.Suspect
		}
		list = append(list, m)
	}
	slices.SortFunc(list, func(x, y p2p.Member) int { return cmp.Compare(x.ID, y.ID) })
	return list
}

// Call sends one request. See p2p.Transport.
func (a *Node) Call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	op := p2p.OpOf(req)
	rep, replyBody, err := a.call(ctx, to, op, req, body)
	if err != nil {
		return nil, nil, fmt.Errorf("%s to %s: %w", op, to, err)
	}
	if rep.Status != wire.Status_STATUS_OK {
		return rep, nil, &p2p.StatusError{Op: op, Peer: to, Status: rep.Status, Message: rep.Error}
	}
	return rep, replyBody, nil
}

func (a *Node) call(ctx context.Context, to placement.NodeID, op string, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	if a.ctx.Err() != nil {
		return nil, nil, p2p.ErrClosed
	}
	if len(body) > p2p.BodyBytesMax {
		return nil, nil, fmt.Errorf("%w: body of %d bytes", p2p.ErrTooLarge, len(body))
	}
	req = &wire.Request{Version: p2p.WireVersion, BodyBytes: uint64(len(body)), Op: req.Op}
	received := new(wire.Request)
	if err := carry(req, received); err != nil {
		return nil, nil, err
	}
	b, f, err := a.net.look(to)
	if err != nil {
		return nil, nil, err
	}
	if err := a.net.reach(a, b, f); err != nil {
		return nil, nil, err
	}
	if err := hang(ctx, f); err != nil {
		return nil, nil, err
	}
	from := p2p.Peer{Member: a.view(), Nonce: a.net.nonce(a.member.ID, to)}
	type answer struct {
		rep  *wire.Reply
		body []byte
		err  error
	}
	done := make(chan answer, 1)
	carriedBody := bytes.Clone(body) // the caller may change its own once ctx has ended
	started := b.spawn(func(handler p2p.Handler) {
		rep, replyBody, sent, _ := p2p.Answer(b.ctx, handler, from, received, carriedBody)
		defer sent()
		carried := new(wire.Reply)
		err := carry(rep, carried)
		done <- answer{carried, bytes.Clone(replyBody), err}
	})
	if !started {
		return nil, nil, fmt.Errorf("%w: connection refused", p2p.ErrUnreachable)
	}
	select {
	case got := <-done:
		_, f, err := a.net.look(to) // it may have been killed meanwhile
		if err == nil {
			err = a.net.reach(a, b, f)
		}
		if err == nil {
			err = got.err
		}
		if err == nil && f.corrupt != nil {
			f.corrupt(op, got.body)
		}
		return got.rep, got.body, err
	case <-ctx.Done():
		return nil, nil, unanswered(ctx)
	}
}

// hang waits as long as the faults of a member want.
func hang(ctx context.Context, f fault) error {
	if err := ctx.Err(); err != nil {
		return unanswered(ctx)
	}
	if f.stalled != nil {
		select {
		case <-f.stalled:
		case <-ctx.Done():
			return unanswered(ctx)
		}
	}
	if f.delay > 0 {
		timer := time.NewTimer(f.delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return unanswered(ctx)
		}
	}
	return nil
}

func unanswered(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return fmt.Errorf("%w: no answer in time: %w", p2p.ErrUnreachable, ctx.Err())
}

// carry copies a message as the wire would.
func carry(from, to proto.Message) error {
	b, err := proto.Marshal(from)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(b) > p2p.MessageBytesMax {
		return fmt.Errorf("%w: message of %d bytes", p2p.ErrTooLarge, len(b))
	}
	return proto.Unmarshal(b, to)
}

func (a *Node) view() p2p.Member {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	return a.member
}

// spawn runs serve with the handler on a goroutine that Close waits for.
func (a *Node) spawn(serve func(p2p.Handler)) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	handler := a.handler
	a.wg.Go(func() { serve(handler) })
	return true
}

// Nonce returns what `to` drew for this member. See p2p.Transport.
func (a *Node) Nonce(ctx context.Context, to placement.NodeID) ([]byte, error) {
	b, f, err := a.net.look(to)
	if err == nil {
		err = a.net.reach(a, b, f)
	}
	if err == nil {
		err = hang(ctx, f)
	}
	if err != nil {
		return nil, fmt.Errorf("nonce of %s: %w", to, err)
	}
	return a.net.nonce(a.member.ID, to), nil
}

func (n *Network) nonce(from, to placement.NodeID) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	sum := blake3.Sum256(fmt.Appendf(nil, "%q %d %q %d", from, n.faults[from].start, to, n.faults[to].start))
	return sum[:]
}

// Broadcast gives a lookup to all members that can be reached.
func (a *Node) Broadcast(_ context.Context, lookup *wire.Lookup) error {
	if err := p2p.PrepareLookup(lookup, a.member.ID); err != nil {
		return err
	}
	return a.spread(func(b *Node) {
		b.mu.Lock()
		f := b.onLookup
		b.mu.Unlock()
		if f != nil {
			f(a.member.ID, proto.CloneOf(lookup))
		}
	})
}

// AnnounceHead gives a notice to all members that can be reached.
func (a *Node) AnnounceHead(_ context.Context, notice *wire.HeadNotice) error {
	if err := p2p.CheckHeadNotice(notice); err != nil {
		return err
	}
	return a.spread(func(b *Node) {
		b.mu.Lock()
		f := b.onHead
		b.mu.Unlock()
		if f != nil {
			f(a.member.ID, proto.CloneOf(notice))
		}
	})
}

func (a *Node) spread(deliver func(*Node)) error {
	if a.ctx.Err() != nil {
		return p2p.ErrClosed
	}
	for _, m := range a.Members() {
		b, f, err := a.net.look(m.ID)
		if err != nil || f.stalled != nil || a.net.reach(a, b, f) != nil {
			continue
		}
		select {
		case b.gossip <- func() { deliver(b) }:
		default: // full: best effort
		}
	}
	return nil
}

// SetUsage changes what the others see in Members.
func (a *Node) SetUsage(capacityBytes, usedBytes uint64) {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	a.member.CapacityBytes, a.member.UsedBytes = capacityBytes, usedBytes
}

// Handle sets the handler of requests.
func (a *Node) Handle(h p2p.Handler) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.handler = h
}

// OnBroadcast sets what receives lookups.
func (a *Node) OnBroadcast(f func(from placement.NodeID, lookup *wire.Lookup)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.onLookup = f
}

// OnHead sets what receives head announcements.
func (a *Node) OnHead(f func(from placement.NodeID, notice *wire.HeadNotice)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.onHead = f
}

// Close makes the member unreachable and waits for its handlers.
func (a *Node) Close() error {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.cancel()
	a.wg.Wait()
	return nil
}

var _ p2p.Transport = (*Node)(nil)
