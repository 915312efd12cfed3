package placement

import "errors"

// NodeID is a node's peer id in its text form.
type NodeID string

// Node is what is known of one node of the pool.
type Node struct {
	ID NodeID
	// Failure domains. Nodes with equal text share one. An empty Host means a
	// host of its own; empty Subnet and Zone mean one shared unknown domain.
	Host, Subnet, Zone string

	CapacityBytes uint64 // offered; 0 = not known yet
	UsedBytes     uint64

	LatencyMs    float64 // round trip; 0 = not known
	BandwidthBps float64 // bytes per second; 0 = not known
	Uptime       float64 // share of the observed time that it answered, 0 to 1

	Alive      bool       // neither suspect nor dead
	Reputation Reputation // as whoever chooses has seen it
	Partners   []NodeID   // nodes with which it mirrors shards
}

// Pair is where one shard lies. Mirror is empty where the shard is not
// mirrored; Primary is empty where it is lost.
type Pair struct{ Primary, Mirror NodeID }

// ErrTooFewNodes means that the pool has fewer usable nodes than a stripe needs.
var ErrTooFewNodes = errors.New("too few usable nodes")
