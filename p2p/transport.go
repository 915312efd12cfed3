package p2p

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	// WireVersion is the version of Request and Reply.
	WireVersion = 1
	// MessageBytesMax bounds an encoded Request or Reply.
	MessageBytesMax = 1 << 20
	// BodyBytesMax bounds the raw body that follows a message.
	BodyBytesMax = 64 << 20
	// NonceBytes is the length of a nonce.
	NonceBytes = 32
)

// Role says what a member does for the pool.
type Role uint32

const (
	// RoleNode stores shards for others.
	RoleNode Role = 1
	// RoleDevice mounts volumes.
	RoleDevice Role = 2
	// RoleRecovery is the identity that a volume's recovery words give. It is
	// known to the pool and not there, until a machine recovers the volume.
	RoleRecovery Role = 3
)

func (r Role) String() string {
	switch r {
	case RoleNode:
		return "node"
	case RoleRecovery:
		return "recovery"
	case RoleDevice:
		return "device"
	}
	return fmt.Sprintf("role(%d)", uint32(r))
}

// State says how a member is, by the heartbeats that this host sees.
type State int

const (
	// Alive members answered within SuspectAfter.
	Alive State = iota
	// Suspect members have been silent for SuspectAfter: reads hedge.
	Suspect
	// Dead members have been silent for DeadAfter: their shards are rebuilt.
	Dead
)

func (s State) String() string {
	switch s {
	case Alive:
		return "alive"
	case Suspect:
		return "suspect"
	case Dead:
		return "dead"
	}
	return fmt.Sprintf("state(%d)", int(s))
}

// Member is an admitted peer as this host sees it.
type Member struct {
	ID            placement.NodeID
	Role          Role
	Host          string   // the machine it runs on; a failure domain
	Subnet        string   // from its addresses; a failure domain
	Zone          string   // as configured by its owner; a failure domain
	Addrs         []string // multiaddrs without /p2p/ID
	CapacityBytes uint64
	UsedBytes     uint64
	State         State
	Seen          time.Time     // when it last answered or asked, in an earlier run too; zero for never
	Heard         bool          // in this run: without it State Alive says only that it has not been silent for long
	RTT           time.Duration // smoothed, RFC 6298; 0 for not yet measured
	Certificate   *wire.Certificate
}

// Standing is State in words, and "unknown" while nothing is known of the member but
// what an earlier run has seen.
func (m Member) Standing() string {
	if !m.Heard && (m.State == Alive || m.Seen.IsZero()) {
		return "unknown"
	}
	return m.State.String()
}

// Answers says that the member has been heard in this run and is not silent.
func (m Member) Answers() bool { return m.Heard && m.State == Alive }

// LeavingCapacityBytes is the capacity that a node announces while it is being
// drained and when it is empty after that, until it is started again.
const LeavingCapacityBytes = 1

// Leaving says that a node is drained: it takes no shards, and nothing new is
// to rely on it, neither as a keeper nor as a holder of heads.
func (m Member) Leaving() bool { return m.Role == RoleNode && m.CapacityBytes == LeavingCapacityBytes }

// Peer is the sender of a request.
type Peer struct {
	Member Member
	// Nonce is what this host drew for the sender: see Transport.Nonce.
	Nonce []byte
}

// Handler answers one request. body is valid until the handler returns. An
// error that is or wraps a *StatusError goes to the caller with its status and
// message, any other as STATUS_INTERNAL with its text kept back. The reply
// body must not change after the return until AfterReply tells; it is at most BodyBytesMax.
type Handler func(ctx context.Context, from Peer, req *wire.Request, body []byte) (rep *wire.Reply, replyBody []byte, err error)

// Transport moves requests between members. *Host is the real one; package
// memnet has one in memory; package transporttest holds what both must do.
type Transport interface {
	// Self is this member's id.
	Self() placement.NodeID

	// Members lists the admitted members known here, without this one,
	// ordered by id.
	Members() []Member

	// Call sends one request with its body to a member and returns its reply.
	// Of req only Op is read: one request may go to many members at once. The
	// caller keeps body, and owns the reply body. A reply that is not
	// STATUS_OK comes back as rep together with a *StatusError.
	// errors.Is(err, ErrUnreachable) when the peer could not be asked or did
	// not answer; whether it acted is then unknown.
	Call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (rep *wire.Reply, replyBody []byte, err error)

	// Nonce returns what `to` drew for this member: NonceBytes bytes, equal
	// to Peer.Nonce in the handlers of `to`, the same on all connections
	// between the two, and new whenever either of the two is started again.
	// A signature over (nonce, counter) is therefore single use if the
	// signer's counter only grows and the verifier remembers, per nonce,
	// which counters it has seen.
	Nonce(ctx context.Context, to placement.NodeID) ([]byte, error)

	// Broadcast gossips a lookup to all members. The sender and, when empty,
	// the nonce are filled in. Delivery is best effort.
	Broadcast(ctx context.Context, lookup *wire.Lookup) error

	// AnnounceHead gossips that a volume's head has moved on.
	AnnounceHead(ctx context.Context, notice *wire.HeadNotice) error

	// SetUsage changes what this member announces about its store.
	SetUsage(capacityBytes, usedBytes uint64)

	// Handle sets the handler; requests before it get STATUS_BUSY.
	Handle(h Handler)

	// OnBroadcast sets what receives the lookups of others. Calls come one at
	// a time from the transport's goroutine and must return soon.
	OnBroadcast(func(from placement.NodeID, lookup *wire.Lookup))

	// OnHead does the same for head announcements.
	OnHead(func(from placement.NodeID, notice *wire.HeadNotice))

	// Close ends all connections and waits for handlers and goroutines.
	Close() error
}

var (
	// ErrUnreachable says that a member could not be asked, or went away
	// before it answered.
	ErrUnreachable = errors.New("peer unreachable")
	// ErrClosed says that the transport has been closed.
	ErrClosed = errors.New("transport closed")
	// ErrTooLarge says that a message or body exceeds its bound.
	ErrTooLarge = errors.New("message too large")
)

// StatusError is a reply other than STATUS_OK.
type StatusError struct {
	Op      string           // field name of the request, such as "put_shard"
	Peer    placement.NodeID // who answered; empty when made by a handler
	Status  wire.Status
	Message string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: peer %s answered %s: %s", e.Op, e.Peer, e.Status, e.Message)
}

// Is makes errors.Is(err, &StatusError{Status: s}) match by status.
func (e *StatusError) Is(target error) bool {
	t, ok := target.(*StatusError)
	return ok && t.Status == e.Status && t.Op == "" && t.Peer == "" && t.Message == ""
}

// Statusf makes the error by which a handler answers with a status.
func Statusf(status wire.Status, format string, args ...any) error {
	return &StatusError{Status: status, Message: fmt.Sprintf(format, args...)}
}

// StatusOf returns the status that err carries: STATUS_OK for nil,
// STATUS_INTERNAL for errors that are no *StatusError.
func StatusOf(err error) wire.Status {
	if err == nil {
		return wire.Status_STATUS_OK
	}
	var se *StatusError
	if errors.As(err, &se) {
		return se.Status
	}
	return wire.Status_STATUS_INTERNAL
}
