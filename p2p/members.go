package p2p

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	membersMax     = 4096
	memberPageMax  = 512
	membersDomain  = "defs members v1"
	topicCount     = 4
	dialBackoffMin = 500 * time.Millisecond
	dialBackoffMax = 30 * time.Second
)

// member is one entry of the table. The table's mu guards all fields but id,
// calls and handlers.
type member struct {
	id       placement.NodeID
	calls    chan struct{}       // slots of calls to it
	handlers chan struct{}       // slots of handlers for it
	bodies   *semaphore.Weighted // its share of Host.inboundBytes
	idle     streamPool

	said    *announcement
	session []byte // from its Hello in this run; nil before
	nonce   []byte // drawn for that session

	since       time.Time // when this host began to listen for it
	seen        time.Time // last contact in this or an earlier run; zero for never
	heard       bool      // in this run
	unreachable bool      // the last dial failed
	reportedOn  bool      // its death has been gossiped

	rtt, rttVar time.Duration

	nextProbe  time.Time
	probing    bool
	probeFails int
	pulledAt   time.Time // when the member list was last asked of it

	dialing    *dial
	dialFails  int
	retryAfter time.Time

	rates [topicCount]*rate.Limiter
}

// memberTable holds the admitted members, without this host.
type memberTable struct {
	self         placement.NodeID
	pool         PoolID
	suspectAfter time.Duration
	deadAfter    time.Duration
	newMember    func(id placement.NodeID) *member

	mu      sync.Mutex
	byID    map[placement.NodeID]*member
	changed chan struct{} // closed and replaced when a member comes or says something new
	dirty   bool          // the member file is behind
}

// get returns a member that is admitted, or nil.
func (t *memberTable) get(id placement.NodeID) *member {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[id]
}

// learn verifies what a member says about itself and takes it in if it is
// newer. It returns the member, or nil with no error for this host itself.
func (t *memberTable) learn(said *wire.Member, now time.Time) (*member, error) {
	id := placement.NodeID(said.GetCertificate().GetPeer())
	if id == t.self {
		return nil, nil
	}
	t.mu.Lock()
	m := t.byID[id]
	stale := m != nil && m.said.wire.Sequence >= said.Sequence
	t.mu.Unlock()
	if stale {
		return m, nil
	}
	a, err := verifyAnnouncement(said, t.pool, now) // slow: outside the lock
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	m = t.byID[id]
	if m == nil {
		if len(t.byID) >= membersMax {
			return nil, fmt.Errorf("%w: the member list is full (%d)", ErrNotAdmitted, membersMax)
		}
		m = t.newMember(id)
		m.since = now
		t.byID[id] = m
	} else if m.said.wire.Sequence >= said.Sequence {
		return m, nil
	}
	m.said = a
	t.notify()
	return m, nil
}

// contact notes that a member has been heard.
func (t *memberTable) contact(m *member, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	back := !m.heard || m.unreachable || t.state(m, now) != Alive
	m.seen, m.heard, m.unreachable, m.reportedOn = now, true, false, false
	m.dialFails, m.retryAfter, m.probeFails = 0, time.Time{}, 0
	if back {
		t.notify()
	}
}

// notify wakes all that wait for a change. mu is held.
func (t *memberTable) notify() {
	t.dirty = true
	close(t.changed)
	t.changed = make(chan struct{})
}

// state is how m is at now. mu is held.
func (t *memberTable) state(m *member, now time.Time) State {
	last := m.since
	if m.heard && m.seen.After(last) {
		last = m.seen
	}
	switch silent := now.Sub(last); {
	case silent >= t.deadAfter:
		return Dead
	case silent >= t.suspectAfter, m.unreachable:
		return Suspect
	}
	return Alive
}

// view is m for callers. mu is held.
func (t *memberTable) view(m *member, now time.Time) Member {
	w := m.said.wire
	return Member{
		ID: m.id, Role: Role(w.Certificate.Role),
		Host: w.Host, Subnet: subnetOf(m.said.addrs), Zone: w.Zone, Addrs: w.Addrs,
		CapacityBytes: w.CapacityBytes, UsedBytes: w.UsedBytes,
		State: t.state(m, now), Seen: m.seen, Heard: m.heard, RTT: m.rtt, Certificate: w.Certificate,
	}
}

// list returns all members ordered by id.
func (t *memberTable) list(now time.Time) []Member {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]Member, 0, len(t.byID))
	for _, m := range t.byID {
		list = append(list, t.view(m, now))
	}
	slices.SortFunc(list, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// all returns the entries in no order.
func (t *memberTable) all() []*member {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*member, 0, len(t.byID))
	for _, m := range t.byID {
		all = append(all, m)
	}
	return all
}

// page returns up to memberPageMax announcements with ids behind after.
func (t *memberTable) page(after placement.NodeID) (said []*wire.Member, more bool) {
	t.mu.Lock()
	for id, m := range t.byID {
		if id > after {
			said = append(said, m.said.wire)
		}
	}
	t.mu.Unlock()
	slices.SortFunc(said, func(a, b *wire.Member) int { return cmp.Compare(a.Certificate.Peer, b.Certificate.Peer) })
	bytesTotal := 0
	for i, s := range said {
		bytesTotal += sizeOnWire(s)
		if i == memberPageMax || bytesTotal > MessageBytesMax-1024 {
			return said[:i], true
		}
	}
	return said, false
}

// digest is BLAKE3 over the sorted ids of all members, this host's included.
func (t *memberTable) digest() []byte {
	t.mu.Lock()
	ids := make([]placement.NodeID, 0, len(t.byID)+1)
	for id := range t.byID {
		ids = append(ids, id)
	}
	t.mu.Unlock()
	ids = append(ids, t.self)
	slices.Sort(ids)
	h := blake3.New()
	_, _ = h.WriteString(membersDomain)
	for _, id := range ids {
		_, _ = h.WriteString(string(id))
		_, _ = h.Write([]byte{0})
	}
	return h.Sum(nil)
}

// expire drops members whose certificate has run out.
func (t *memberTable) expire(now time.Time) (gone []*member) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, m := range t.byID {
		if e := m.said.wire.Certificate.Expiry; e > 0 && now.Unix() >= e {
			delete(t.byID, id)
			gone = append(gone, m)
			t.notify()
		}
	}
	return gone
}

// listenAnew starts all silences at now, because this host itself was not
// running for a while (stopped, suspended).
func (t *memberTable) listenAnew(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range t.byID {
		m.since = now
	}
}

// measured takes a round trip into the smoothed one (RFC 6298).
func (t *memberTable) measured(m *member, rtt time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.rtt == 0 {
		m.rtt, m.rttVar = rtt, rtt/2
		return
	}
	m.rttVar += ((m.rtt - rtt).Abs() - m.rttVar) / 4
	m.rtt += (rtt - m.rtt) / 8
}

// greeted keeps the session of a member's Hello and the nonce drawn for it.
func (t *memberTable) greeted(m *member, session, nonce []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !bytes.Equal(m.session, session) {
		m.session, m.nonce = bytes.Clone(session), nonce
	}
}

// sender returns what a handler is told about m; ok is false before its Hello.
func (t *memberTable) sender(m *member, now time.Time) (from Peer, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.nonce == nil || t.byID[m.id] != m {
		return Peer{}, false
	}
	return Peer{Member: t.view(m, now), Nonce: m.nonce}, true
}

// unread returns a channel that closes at the next change.
func (t *memberTable) unread() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changed
}
