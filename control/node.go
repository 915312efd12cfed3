package control

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/node"
)

// drainLineEvery bounds how often the progress of a drain is sent.
const drainLineEvery = 200 * time.Millisecond

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
	Moves  Moves  `json:"moves"`
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
	Broken  int64 `json:"broken"`  // stripes that have lost shards and are not whole again, of those that it keeps the records of
}

// Moves counts what a node has given to others, and what it need not hold.
type Moves struct {
	Moved          int64 `json:"moved"`
	Draining       bool  `json:"draining"`        // it takes no shards
	Surplus        int64 `json:"surplus"`         // held elsewhere now, by what keepers say; no signature lets it go yet
	SurplusBytes   int64 `json:"surplus_bytes"`   //
	SurplusDropped int64 `json:"surplus_dropped"` // let go of by the owner's signature
}

// Drain is one line of the reply to drain. The last has Done, or Error.
type Drain struct {
	Schema     int    `json:"schema"`
	Moved      int64  `json:"moved"` // shards
	MovedBytes int64  `json:"moved_bytes"`
	Left       int64  `json:"left"`
	LeftBytes  int64  `json:"left_bytes"`
	Done       bool   `json:"done"` // the node is empty
	Error      string `json:"error,omitempty"`
}

// Audit counts the challenges by which a node has others prove their shards.
type Audit struct {
	Proved int64 `json:"proved"`
	Failed int64 `json:"failed"`
}

// ServeNode begins to answer at the socket in dir, the directory of n: GET
// node, peers; POST drain, which sends one object per line.
func ServeNode(dir string, n *defs.Node) (*Server, error) {
	s := &Server{dir: dir, node: n}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/node", reply(func(*http.Request) (Node, error) { return renderNode(n), nil }))
	mux.HandleFunc("GET /v1/peers", reply(func(*http.Request) (Peers, error) { return renderPeers(n.Addrs(), n.Members(), n.Reputation), nil }))
	mux.HandleFunc("POST /v1/drain", s.drain)
	return s.serve(mux)
}

// drain ends with the request.
func (s *Server) drain(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	var last Drain
	var told time.Time
	line := func() {
		out.Encode(last)
		http.NewResponseController(w).Flush()
	}
	err := s.node.Drain(r.Context(), func(d node.Drained) {
		last = Drain{Schema: Schema, Moved: d.Moved, MovedBytes: d.MovedBytes, Left: d.Left, LeftBytes: d.LeftBytes}
		if now := time.Now(); now.Sub(told) >= drainLineEvery {
			told = now
			line()
		}
	})
	last.Schema, last.Done = Schema, err == nil
	if err != nil {
		last.Error = err.Error()
	}
	line()
}

func renderNode(n *defs.Node) Node {
	st := n.Status()
	return Node{
		Schema: Schema, ID: n.ID(), CapacityBytes: st.Usage.CapacityBytes, UsedBytes: st.Usage.UsedBytes,
		Shards: st.Usage.Shards, Tombstones: st.Usage.Tombstones, UptimeSeconds: st.Uptime.Round(time.Second).Seconds(),
		BackgroundBytes: st.BackgroundBytes, BackgroundBytesPerSecond: st.BackgroundRate,
		Scrub:  Scrub{st.ScrubInterval.Seconds(), st.Scrubbed, st.ScrubbedBytes, st.Damaged, st.Healed},
		Repair: Repair{st.Copied, st.Rebuilt, st.Broken},
		Moves:  Moves{st.Moved, st.Draining, st.Surplus, st.SurplusBytes, st.SurplusDropped},
		Audit:  Audit{st.Audited, st.AuditsFailed},
	}
}
