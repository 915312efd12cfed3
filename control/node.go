package control

import (
	"net/http"
	"time"

	"github.com/defs-fs/defs"
)

// Node is what a storage node holds and what it has done of its own accord
// since it was started. Counts without another unit are shards.
type Node struct {
	Schema        int     `json:"schema"`
	ID            string  `json:"id"`
	CapacityBytes uint64  `json:"capacity_bytes"`
	UsedBytes     uint64  `json:"used_bytes"`
	Shards        uint64  `json:"shards"`
	Tombstones    uint64  `json:"tombstones"`
	UptimeSeconds float64 `json:"uptime_seconds"` // of the store, over all its runs

	BackgroundBytes          int64 `json:"background_bytes"`
	BackgroundBytesPerSecond int64 `json:"background_bytes_per_second"` // at most

	Scrub  Scrub  `json:"scrub"`
	Repair Repair `json:"repair"`
	Audit  Audit  `json:"audit"`
}

// Scrub is how far a node is with reading its shards again.
type Scrub struct {
	EverySeconds float64 `json:"every_seconds"`
	Shards       int64   `json:"shards"`
	Bytes        int64   `json:"bytes"`
	Damaged      int64   `json:"damaged"`
	Healed       int64   `json:"healed"` // from the partner's copy
}

// Repair counts what a node has made again.
type Repair struct {
	Copied  int64 `json:"copied"`  // to a mirror
	Rebuilt int64 `json:"rebuilt"` // from other shards
}

// Audit counts the challenges by which a node has others prove their shards.
type Audit struct {
	Proved int64 `json:"proved"`
	Failed int64 `json:"failed"`
}

// ServeNode begins to answer at the socket in dir, the directory of n: GET
// node, peers.
func ServeNode(dir string, n *defs.Node) (*Server, error) {
	s := &Server{dir: dir, node: n}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/node", reply(func(*http.Request) (Node, error) { return renderNode(n), nil }))
	mux.HandleFunc("GET /v1/peers", reply(func(*http.Request) (Peers, error) { return renderPeers(n.Addrs(), n.Members(), n.Reputation), nil }))
	return s.serve(mux)
}

func renderNode(n *defs.Node) Node {
	st := n.Status()
	return Node{
		Schema: Schema, ID: n.ID(), CapacityBytes: st.Usage.CapacityBytes, UsedBytes: st.Usage.UsedBytes,
		Shards: st.Usage.Shards, Tombstones: st.Usage.Tombstones, UptimeSeconds: st.Uptime.Round(time.Second).Seconds(),
		BackgroundBytes: st.BackgroundBytes, BackgroundBytesPerSecond: st.BackgroundRate,
		Scrub:  Scrub{st.ScrubInterval.Seconds(), st.Scrubbed, st.ScrubbedBytes, st.Damaged, st.Healed},
		Repair: Repair{st.Copied, st.Rebuilt},
		Audit:  Audit{st.Audited, st.AuditsFailed},
	}
}
