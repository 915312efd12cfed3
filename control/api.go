// Package control lets programs on the same machine talk to an open volume:
// HTTP and JSON over a Unix socket in the volume's directory, which only its
// owner can enter.
//
//	server, err := control.Serve(dir, client, nil)       // in the process that has the volume open
//	c, err := control.Dial(dir)                          // in another one
//	status, err := c.Status(ctx)
//
// The process of a storage node answers in the same way in its directory: see
// ServeNode.
//
// Requests about a volume (all under /v1): GET status, peers, inspect, download/ID; POST wait,
// upload, cache/drop, unmount. A reply is one JSON object with "schema", but
// for wait, which sends one object per line, and download, which sends the
// file. An error is {"schema", "error", "code"}.
//
// Serve starts the goroutines that answer; Close waits for them. Nothing is
// kept on disk but the socket, which a crash leaves behind and the next Serve
// replaces.
package control

import (
	"errors"
	"time"
)

// Schema is the version of the JSON objects. New fields may come without a new
// version; fields never change their meaning.
const Schema = 1

// Status of a volume. Sizes are bytes.
type Status struct {
	Schema         int      `json:"schema"`
	Volume         string   `json:"volume"` // its name
	VolumeID       string   `json:"volume_id"`
	Mounted        bool     `json:"mounted"`
	Mountpoint     string   `json:"mountpoint,omitempty"`
	Bytes          Bytes    `json:"bytes"`
	Cache          Cache    `json:"cache"`
	Journal        Journal  `json:"journal"`
	Pool           Pool     `json:"pool"`
	Health         Health   `json:"health"`
	SurvivesLosses Losses   `json:"survives_losses"`
	Tasks          []Task   `json:"tasks"`
	NotDurable     []string `json:"not_durable"` // why not everything is durable, in words; none when it is
	// Head is the sequence number of the newest published head; 0 for none.
	Head      uint64     `json:"head"`
	Published *time.Time `json:"published,omitempty"`
	Problem   string     `json:"problem,omitempty"`   // why the last attempt to publish failed
	ReadOnly  string     `json:"read_only,omitempty"` // why the volume takes no changes
}

// Bytes counts each live byte once, in its lowest state.
type Bytes struct {
	Journaled   int64 `json:"journaled"`
	Queued      int64 `json:"queued"`
	Recoverable int64 `json:"recoverable"`
	Durable     int64 `json:"durable"`
}

// Cache is local bytes that the peers have too.
type Cache struct {
	CleanBytes int64 `json:"clean_bytes"`
	MaxBytes   int64 `json:"max_bytes"`
}

// Journal is what waits on this disk for the peers.
type Journal struct {
	Bytes            int64  `json:"bytes"`
	MaxBytes         int64  `json:"max_bytes"`
	UnflushedRecords uint64 `json:"unflushed_records"` // changes that a power cut now would take
}

// Pool counts what is alive.
type Pool struct {
	Nodes int `json:"nodes"`
	Hosts int `json:"hosts"`
}

// Health counts stripes: all, those with fewer shards or keepers than they should have,
// those that cannot be read until a silent node answers again, and those with
// fewer shards than are needed.
type Health struct {
	Stripes     int `json:"stripes"`
	Degraded    int `json:"degraded"`
	Unreachable int `json:"unreachable"`
	Lost        int `json:"lost"`
}

// Losses that the recoverable data survives, whichever they are.
type Losses struct {
	Nodes int `json:"nodes"`
	Hosts int `json:"hosts"`
}

// Task is background work in progress.
type Task struct {
	Kind       string `json:"kind"`
	DoneBytes  int64  `json:"done_bytes"`
	TotalBytes int64  `json:"total_bytes"`
}

// Peers is the pool as this device sees it.
type Peers struct {
	Schema int      `json:"schema"`
	Addrs  []string `json:"addrs"` // where this device itself can be reached
	Peers  []Peer   `json:"peers"`
}

// Peer is one member of the pool.
type Peer struct {
	ID            string     `json:"id"`
	Role          string     `json:"role"`  // node, device or recovery
	State         string     `json:"state"` // alive, suspect, dead, or unknown before it was heard in this run
	Host          string     `json:"host,omitempty"`
	Subnet        string     `json:"subnet,omitempty"`
	Zone          string     `json:"zone,omitempty"`
	Addrs         []string   `json:"addrs,omitempty"`
	CapacityBytes uint64     `json:"capacity_bytes"`
	UsedBytes     uint64     `json:"used_bytes"`
	RTTMs         float64    `json:"rtt_ms"`
	Seen          *time.Time `json:"seen,omitempty"`

	// Of nodes: what this process itself has seen of it. Counts fade, half of
	// each in a week.
	Trust     float64 `json:"trust"`     // 1: nothing is known against it
	Contained bool    `json:"contained"` // it is given nothing, and what it holds is put elsewhere
	Proved    float64 `json:"proved"`
	Lied      float64 `json:"lied"`    // sent bytes that are not its shard's
	Lost      float64 `json:"lost"`    // had not, or could not read, what it is to hold
	Stalled   float64 `json:"stalled"` // did not answer in time
}

// Inspection is what is known of a file, a stripe or a shard; one is set.
type Inspection struct {
	Schema int     `json:"schema"`
	File   *File   `json:"file,omitempty"`
	Stripe *Stripe `json:"stripe,omitempty"`
	Shard  *Shard  `json:"shard,omitempty"`
}

// File is where the bytes of a file are.
type File struct {
	Ino        uint64   `json:"ino"`
	Bytes      uint64   `json:"bytes"`
	State      string   `json:"state"`
	Policy     string   `json:"policy"`                // by which new content is placed: its directory's, or the volume's
	NotDurable []string `json:"not_durable,omitempty"` // where State is not durable: why the volume is not
	Extents    []Extent `json:"extents"`
	Stripes    []Stripe `json:"stripes"`
}

// Extent is a run of a file.
type Extent struct {
	Offset uint64 `json:"offset"`
	Bytes  uint32 `json:"bytes"`
	State  string `json:"state"`
	Local  bool   `json:"local"` // also on this disk
	Stripe string `json:"stripe,omitempty"`
	Slice  uint32 `json:"slice"`
}

// Stripe is a stripe's geometry, holders and health.
type Stripe struct {
	ID             string  `json:"id"`
	Purpose        string  `json:"purpose"`
	K              int     `json:"k"`
	M              int     `json:"m"`
	ShardBytes     uint32  `json:"shard_bytes"`
	UsedBytes      uint64  `json:"used_bytes"`
	LiveBytes      int64   `json:"live_bytes"`
	Mirrored       bool    `json:"mirrored"`
	Complete       bool    `json:"complete"`
	Epoch          uint32  `json:"epoch"`
	Keepers        string  `json:"keepers"` // acknowledged/asked
	ShardsAlive    int     `json:"shards_alive"`
	SurvivesLosses int     `json:"survives_losses"`  // of nodes; -1 when lost already
	Health         string  `json:"health"`           // whole, degraded, out of reach or lost
	Reason         string  `json:"reason,omitempty"` // why it is not whole
	Shards         []Shard `json:"shards"`
}

// Shard is one shard and its holders.
type Shard struct {
	Stripe       string `json:"stripe"`
	Index        int    `json:"index"`
	Primary      string `json:"primary"`
	PrimaryState string `json:"primary_state"`
	Mirror       string `json:"mirror,omitempty"`
	MirrorState  string `json:"mirror_state,omitempty"`
}

// Progress is one line of the reply to wait. The last has Done, or Error.
type Progress struct {
	Schema int     `json:"schema"`
	Status *Status `json:"status,omitempty"`
	Done   bool    `json:"done"`
	Error  string  `json:"error,omitempty"`
	Code   Code    `json:"code,omitempty"`
}

// Uploaded names a file that was put.
type Uploaded struct {
	Schema int    `json:"schema"`
	ID     string `json:"id"`
}

// Dropped says how much was removed from the cache, and what the pool could not
// give back now and so was kept.
type Dropped struct {
	Schema      int   `json:"schema"`
	Bytes       int64 `json:"bytes"`
	KeptBytes   int64 `json:"kept_bytes"`
	KeptStripes int   `json:"kept_stripes"` // with fewer shards at nodes that answer than are needed
	Answering   int   `json:"answering"`    // of the nodes that were asked
	Nodes       int   `json:"nodes"`
}

// Code says what kind of error a reply is.
type Code string

// Kinds of errors.
const (
	CodeFailed   Code = "failed"
	CodeInvalid  Code = "invalid"
	CodeNotFound Code = "not-found"
	CodeNoSpace  Code = "no-space"
	CodeBusy     Code = "busy"
)

// Error is an error that a server replied.
type Error struct {
	Code    Code
	Message string
}

func (e *Error) Error() string { return e.Message }

// CodeOf returns the code that err carries, CodeFailed when it has none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeFailed
}
