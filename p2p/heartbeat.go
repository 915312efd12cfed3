package p2p

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	probesMax        = 32 // that run at once
	probeBackoffMax  = 6  // heartbeat intervals between probes of a silent member
	deafIntervals    = 5  // a loop this late was not running itself
	cutAfterMisses   = 2
	saveMembersEvery = 5 * time.Second
)

// runHeartbeats probes members that are due, tries the bootstrap addresses
// while nobody is known to be there, and does what else must be done now and
// then. It ends with h.ctx.
func (h *Host) runHeartbeats(moved event.Subscription) {
	defer moved.Close()
	tick := time.NewTicker(max(h.o.HeartbeatInterval/4, time.Millisecond))
	defer tick.Stop()
	slots := make(chan struct{}, probesMax)
	last, saved, bootstrapAt := time.Now(), time.Now(), time.Time{}
	for {
		now := time.Now()
		if now.Sub(last) > deafIntervals*h.o.HeartbeatInterval {
			h.log.Warn("This process did not run for a while; members get new time to be heard.", "gap", now.Sub(last))
			h.table.listenAnew(now)
		}
		last = now
		for _, m := range h.table.expire(now) {
			h.log.Warn("A member's certificate has run out.", "peer", string(m.id))
			_ = h.net.Network().ClosePeer(m.said.peerID)
		}
		h.gate.closeStrangers(now)
		alive := h.probeDue(now, slots)
		if alive == 0 && now.After(bootstrapAt) {
			bootstrapAt = now.Add(jitter(h.o.HeartbeatInterval))
			h.bootstrap()
		}
		if err := h.announce(); err != nil {
			h.log.Debug("An announcement was not gossiped.", "err", err)
		}
		if now.Sub(saved) >= saveMembersEvery {
			saved = now
			if err := h.saveMembers(); err != nil {
				h.log.Error("The member file could not be written; a restart will know fewer addresses.", "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-h.wake:
		case <-moved.Out():
		case <-h.ctx.Done():
			return
		}
	}
}

// probeDue starts the probes that are due and counts the members alive.
func (h *Host) probeDue(now time.Time, slots chan struct{}) (alive int) {
	for _, m := range h.table.all() {
		m.idle.trim(now.Add(-streamIdleMax))
		h.table.mu.Lock()
		state := h.table.state(m, now)
		// A recovery member is nowhere: nothing is expected of it.
		expected := Role(m.said.wire.Certificate.Role) != RoleRecovery
		due := expected && !m.probing && !now.Before(m.nextProbe)
		report := expected && state == Dead && !m.reportedOn
		if report {
			m.reportedOn = true
			h.table.notify()
		}
		if state == Alive && m.heard {
			alive++
		}
		seen := m.seen
		h.table.mu.Unlock()
		if report {
			h.log.Warn("A member is dead.", "peer", string(m.id), "seen", seen)
			h.spawn(func() {
				_ = h.gossip.publish(h.ctx, topicDeaths, &wire.Death{Peer: string(m.id), Seen: unixOrZero(seen)})
			})
		}
		if !due {
			continue
		}
		select {
		case slots <- struct{}{}:
			if !h.spawn(func() { defer func() { <-slots }(); h.probe(m) }) {
				<-slots
			}
		default: // enough for now: the next tick goes on
		}
	}
	return alive
}

// probe exchanges a heartbeat with m, connecting first if need be.
func (h *Host) probe(m *member) {
	h.table.mu.Lock()
	if m.probing {
		h.table.mu.Unlock()
		return
	}
	m.probing = true
	h.table.mu.Unlock()

	start := time.Now()
	err := h.heartbeat(m)
	now := time.Now()

	h.table.mu.Lock()
	m.probing = false
	m.nextProbe = now.Add(jitter(h.o.HeartbeatInterval))
	cut := false
	if err != nil && !m.seen.After(start) {
		m.probeFails++
		cut = m.probeFails >= cutAfterMisses
		if cut { // else at once: one lost heartbeat says little
			m.nextProbe = now.Add(jitter(h.o.HeartbeatInterval * time.Duration(min(m.probeFails, probeBackoffMax))))
		} else {
			m.nextProbe = now
		}
	}
	h.table.mu.Unlock()
	if err == nil || h.ctx.Err() != nil {
		return
	}
	h.log.Debug("A heartbeat was not answered.", "peer", string(m.id), "err", err)
	h.lookAgain()
	if cut { // a connection over which nothing comes would cost each call its full timeout
		h.failed(m, now)
		_ = h.net.Network().ClosePeer(h.dialInfo(m).ID)
	}
}

// heartbeat does one round trip with m and takes in what it says.
func (h *Host) heartbeat(m *member) error {
	ctx, cancel := context.WithTimeout(h.ctx, h.o.DialTimeout)
	defer cancel()
	if err := h.connect(ctx, m, true); err != nil {
		if err := h.findAgain(m); err != nil {
			return err
		}
		ctx, cancel = context.WithTimeout(h.ctx, h.o.DialTimeout)
		defer cancel()
	}
	cs := m.idle.take() // opened before the clock starts
	if cs == nil {
		var err error
		if cs, err = h.openStream(ctx, m, true); err != nil {
			return err
		}
	}
	m.idle.put(cs)
	mine := h.table.digest()
	start := time.Now()
	rep, _, err := h.request(ctx, m, &wire.Request{
		Version: WireVersion,
		Op:      &wire.Request_Heartbeat{Heartbeat: &wire.Heartbeat{Self: h.self(), MembersDigest: mine}},
	}, nil, true)
	if err != nil {
		return err
	}
	h.table.measured(m, time.Since(start))
	h.heardFrom(m, rep.GetHeartbeat(), mine)
	return nil
}

// serveHeartbeat answers another's heartbeat.
func (h *Host) serveHeartbeat(from Peer, beat *wire.Heartbeat) *wire.Heartbeat {
	mine := h.table.digest()
	if m := h.table.get(from.Member.ID); m != nil {
		h.heardFrom(m, beat, mine)
	}
	return &wire.Heartbeat{Self: h.self(), MembersDigest: mine}
}

// heardFrom takes in a heartbeat; where the other knows other members, its
// list is asked for, once per heartbeat interval.
func (h *Host) heardFrom(m *member, beat *wire.Heartbeat, mine []byte) {
	if beat.GetSelf().GetCertificate().GetPeer() == string(m.id) {
		if _, err := h.table.learn(beat.Self, time.Now()); err != nil {
			h.log.Debug("A heartbeat held a wrong announcement.", "peer", string(m.id), "err", err)
		}
	}
	if bytes.Equal(beat.GetMembersDigest(), mine) {
		return
	}
	now := time.Now()
	h.table.mu.Lock()
	pull := now.Sub(m.pulledAt) >= h.o.HeartbeatInterval
	if pull {
		m.pulledAt = now
	}
	h.table.mu.Unlock()
	if pull {
		h.spawn(func() { h.pullMembers(m) })
	}
}

// pullMembers asks m for its member list, page by page.
func (h *Host) pullMembers(m *member) {
	after := ""
	for range membersMax/memberPageMax + 1 {
		ctx, cancel := context.WithTimeout(h.ctx, h.o.IdleTimeout)
		rep, _, err := h.request(ctx, m, &wire.Request{
			Version: WireVersion,
			Op:      &wire.Request_Members{Members: &wire.Members{After: after}},
		}, nil, true)
		cancel()
		if err != nil {
			return
		}
		page := rep.GetMembers().GetMembers()
		if len(page) > memberPageMax {
			return
		}
		recovery := false
		for _, said := range page {
			id := placement.NodeID(said.GetCertificate().GetPeer())
			recovery = recovery || Role(said.GetCertificate().GetRole()) == RoleRecovery && h.table.get(id) == nil
			if _, err := h.table.learn(said, time.Now()); err != nil {
				h.log.Debug("A member list held a wrong entry.", "peer", string(m.id), "err", err)
			}
			after = max(after, string(id))
		}
		if recovery {
			// A volume's words are of use only where somebody remembers its recovery
			// member, also when all stop now.
			if err := h.saveMembers(); err != nil {
				h.log.Error("The member file could not be written; a restart will not know a volume's recovery member.", "err", err)
			}
		}
		h.lookAgain()
		if !rep.GetMembers().GetMore() || len(page) == 0 {
			return
		}
	}
}

// findAgain asks the DHT where m is now, and connects if it knows.
func (h *Host) findAgain(m *member) error {
	ctx, cancel := context.WithTimeout(h.ctx, 2*h.o.DialTimeout)
	defer cancel()
	info, err := h.discovery.find(ctx, h.dialInfo(m).ID)
	if err != nil {
		return err
	}
	return h.net.Connect(ctx, info)
}

// bootstrap dials the peers of the configured addresses, each at all of its
// own, so that TCP comes first; greet does the rest.
func (h *Host) bootstrap() {
	peers := make(map[peer.ID]*peer.AddrInfo)
	for _, text := range h.o.Bootstrap {
		info, err := parsePeerAddr(text)
		if err != nil || placement.NodeID(info.ID.String()) == h.id {
			continue
		}
		if known := peers[info.ID]; known != nil {
			known.Addrs = append(known.Addrs, info.Addrs...)
		} else {
			peers[info.ID] = &info
		}
	}
	for id, info := range peers {
		if h.net.Network().Connectedness(id) == network.Connected {
			continue
		}
		h.spawn(func() {
			ctx, cancel := context.WithTimeout(h.ctx, h.o.DialTimeout)
			defer cancel()
			if err := h.net.Connect(ctx, *info); err != nil && !errors.Is(err, context.Canceled) {
				h.log.Debug("A bootstrap peer does not answer; it will be tried again.", "peer", id.String(), "err", err)
			}
		})
	}
}

// probeSoon makes m due at once.
func (h *Host) probeSoon(m *member) {
	h.table.mu.Lock()
	m.nextProbe = time.Time{}
	h.table.mu.Unlock()
	h.lookAgain()
}

// lookAgain wakes the heartbeat loop.
func (h *Host) lookAgain() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// jitter spreads d over [0.75 d, 1.25 d).
func jitter(d time.Duration) time.Duration {
	return d*3/4 + time.Duration(rand.Int64N(int64(d/2)+1))
}

// sameSaid compares two announcements but for sequence and signature.
func sameSaid(a, b *wire.Member) bool {
	a, b = proto.CloneOf(a), proto.CloneOf(b)
	a.Sequence, b.Sequence, a.Signature, b.Signature, a.Seen, b.Seen = 0, 0, nil, nil, 0, 0
	return proto.Equal(a, b)
}
