package control

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/volume"
)

// Mount is what a server needs of a mount.
type Mount interface {
	Mountpoint() string
	Unmount() error
}

// Server answers requests about one open volume or node.
type Server struct {
	dir    string
	client *defs.Client // of a volume
	mount  Mount
	node   *defs.Node
	http   *http.Server
	wg     sync.WaitGroup
}

// Serve begins to answer at the socket in dir, the directory of client. mount
// is nil where the volume is not mounted.
func Serve(dir string, client *defs.Client, mount Mount) (*Server, error) {
	s := &Server{dir: dir, client: client, mount: mount}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", reply(s.status))
	mux.HandleFunc("GET /v1/peers", reply(s.peers))
	mux.HandleFunc("GET /v1/inspect", reply(s.inspect))
	mux.HandleFunc("GET /v1/download/{id}", s.download)
	mux.HandleFunc("POST /v1/upload", reply(s.upload))
	mux.HandleFunc("POST /v1/cache/drop", reply(s.dropCache))
	mux.HandleFunc("POST /v1/unmount", reply(s.unmount))
	mux.HandleFunc("POST /v1/wait", s.wait)
	return s.serve(mux)
}

func (s *Server) serve(mux *http.ServeMux) (*Server, error) {
	l, err := listen(s.dir)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	// For `go tool pprof`, through this socket, which only the owner can open.
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.Handle("GET /debug/pprof/heap", pprof.Handler("heap"))
	mux.Handle("GET /debug/pprof/goroutine", pprof.Handler("goroutine"))
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10}
	s.wg.Go(func() { s.http.Serve(l) })
	return s, nil
}

// Close gives requests a moment to end, then ends them.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	s.wg.Wait()
	return errors.Join(err, os.Remove(filepath.Join(s.dir, socketFile)))
}

// reply turns a function into a handler that sends its result as JSON.
func reply[T any](f func(r *http.Request) (T, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		result, err := f(r)
		if err != nil {
			sendError(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(result)
	}
}

type errorReply struct {
	Schema int    `json:"schema"`
	Error  string `json:"error"`
	Code   Code   `json:"code"`
}

func sendError(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	code := codeOfCause(err)
	switch code {
	case CodeInvalid:
		status = http.StatusBadRequest
	case CodeNotFound:
		status = http.StatusNotFound
	case CodeNoSpace:
		status = http.StatusInsufficientStorage
	case CodeBusy:
		status = http.StatusConflict
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(errorReply{Schema, err.Error(), code})
}

func codeOfCause(err error) Code {
	switch {
	case errors.Is(err, defs.ErrNoFile), errors.Is(err, volume.NotExist), errors.Is(err, volume.Stale):
		return CodeNotFound
	case errors.Is(err, volume.NoSpace):
		return CodeNoSpace
	}
	return CodeOf(err)
}

func (s *Server) status(r *http.Request) (Status, error) {
	s.client.Settle(r.Context())
	st, err := s.client.Status(r.Context())
	return s.render(st), err
}

func (s *Server) render(st volume.Status) Status {
	out := Status{
		Schema: Schema, Volume: st.Name, VolumeID: st.Volume,
		Bytes:          Bytes{st.Journaled, st.Queued, st.Recoverable, st.Durable},
		Cache:          Cache{st.CleanBytes, st.CleanMaxBytes},
		Journal:        Journal{st.JournalBytes, st.JournalMaxBytes, st.UnflushedRecords},
		Pool:           Pool{st.Nodes, st.Hosts},
		Health:         Health{st.Stripes, st.Degraded, st.Unreachable, st.Lost},
		SurvivesLosses: Losses{max(st.SurvivesNodes, 0), max(st.SurvivesHosts, 0)},
		Tasks:          []Task{},
		NotDurable:     notDurable(st),
		Head:           st.Head, Problem: st.Problem, ReadOnly: st.ReadOnly,
	}
	if s.mount != nil {
		out.Mounted, out.Mountpoint = true, s.mount.Mountpoint()
	}
	if !st.Published.IsZero() {
		out.Published = &st.Published
	}
	for _, t := range st.Tasks {
		out.Tasks = append(out.Tasks, Task(t))
	}
	return out
}

// notDurable are the reasons for which something is not durable.
func notDurable(st volume.Status) []string {
	reasons := []string{}
	switch waiting := st.Journaled + st.Queued; {
	case waiting > 0:
		reasons = append(reasons, humanize.IBytes(uint64(waiting))+" are not published yet")
	case st.Unpublished:
		reasons = append(reasons, "changes of names or attributes are not published yet")
	}
	return append(reasons, st.Shortfalls...)
}

func (s *Server) peers(*http.Request) (Peers, error) {
	return renderPeers(s.client.Addrs(), s.client.Members(), s.client.Volume().Reputation), nil
}

func renderPeers(addrs []string, members []p2p.Member, reputation func(placement.NodeID) placement.Reputation) Peers {
	out := Peers{Schema: Schema, Addrs: addrs, Peers: []Peer{}}
	for _, m := range members {
		p := Peer{
			ID: string(m.ID), State: m.Standing(), Host: m.Host, Subnet: m.Subnet, Zone: m.Zone, Addrs: m.Addrs,
			Trust: 1, CapacityBytes: m.CapacityBytes, UsedBytes: m.UsedBytes, RTTMs: float64(m.RTT) / float64(time.Millisecond),
		}
		switch m.Role {
		case p2p.RoleNode:
			p.Role = "node"
			r := reputation(m.ID)
			p.Trust, p.Contained = r.Trust(), r.Contained()
			p.Proved, p.Lied, p.Lost, p.Stalled = r.Proved, r.Lied, r.Lost, r.Stalled
		case p2p.RoleDevice:
			p.Role = "device"
		case p2p.RoleRecovery:
			p.Role = "recovery"
		}
		if !m.Seen.IsZero() {
			p.Seen = &m.Seen
		}
		out.Peers = append(out.Peers, p)
	}
	return out
}

func (s *Server) upload(r *http.Request) (Uploaded, error) {
	name := r.URL.Query().Get("name")
	if name == "" {
		return Uploaded{}, &Error{CodeInvalid, "upload: the file has no name"}
	}
	id, err := s.client.Upload(r.Context(), name, r.Body)
	return Uploaded{Schema, id}, err
}

func (s *Server) download(w http.ResponseWriter, r *http.Request) {
	out := &firstWrite{ResponseWriter: w}
	err := s.client.Download(r.Context(), r.PathValue("id"), out)
	switch {
	case err == nil:
		out.begin()
	case !out.begun:
		sendError(w, err)
	default:
		panic(http.ErrAbortHandler) // the client sees that the file is cut off
	}
}

// firstWrite knows whether the reply has begun.
type firstWrite struct {
	http.ResponseWriter
	begun bool
}

func (w *firstWrite) begin() {
	if !w.begun {
		w.begun = true
		w.Header().Set("Content-Type", "application/octet-stream")
	}
}

func (w *firstWrite) Write(p []byte) (int, error) {
	w.begin()
	return w.ResponseWriter.Write(p)
}

func (s *Server) dropCache(r *http.Request) (Dropped, error) {
	s.client.Settle(r.Context())
	d, err := s.client.Volume().DropCache(r.Context(), r.URL.Query().Has("force"))
	return Dropped{Schema, d.Bytes, d.KeptBytes, d.Stripes, d.Answering, d.Nodes}, err
}

func (s *Server) unmount(*http.Request) (Status, error) {
	if s.mount == nil {
		return Status{}, &Error{CodeInvalid, "the volume is not mounted"}
	}
	if err := s.mount.Unmount(); err != nil {
		return Status{}, &Error{CodeBusy, err.Error()}
	}
	return Status{Schema: Schema, Tasks: []Task{}}, nil
}

func (s *Server) wait(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	line := func(p Progress) {
		p.Schema = Schema
		out.Encode(p)
		http.NewResponseController(w).Flush()
	}
	err := s.client.WaitDurable(r.Context(), func(st volume.Status) {
		status := s.render(st)
		line(Progress{Status: &status})
	})
	if err != nil {
		line(Progress{Error: err.Error(), Code: codeOfCause(err)})
		return
	}
	last := Progress{Done: true}
	if st, err := s.client.Status(r.Context()); err == nil {
		status := s.render(st)
		last.Status = &status
	}
	line(last)
}

// inspect takes ino, path (from the volume's root), or stripe and shard.
func (s *Server) inspect(r *http.Request) (Inspection, error) {
	ctx, q, v := r.Context(), r.URL.Query(), s.client.Volume()
	s.client.Settle(ctx)
	if text := q.Get("stripe"); text != "" {
		stripe, err := s.stripe(ctx, text)
		if err != nil {
			return Inspection{}, err
		}
		if text := q.Get("shard"); text != "" {
			i, err := strconv.Atoi(text)
			if err != nil || i < 0 || i >= len(stripe.Shards) {
				return Inspection{}, &Error{CodeInvalid, fmt.Sprintf("shard %q: the stripe has shards 0 to %d", text, len(stripe.Shards)-1)}
			}
			return Inspection{Schema: Schema, Shard: &stripe.Shards[i]}, nil
		}
		return Inspection{Schema: Schema, Stripe: &stripe}, nil
	}
	ino := volume.RootIno
	if text := q.Get("ino"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return Inspection{}, &Error{CodeInvalid, fmt.Sprintf("inode number %q: %v", text, err)}
		}
		ino = volume.Ino(n)
	} else {
		for name := range strings.SplitSeq(strings.Trim(q.Get("path"), "/"), "/") {
			if name == "" {
				continue
			}
			attr, err := v.Lookup(ctx, ino, name)
			if err != nil {
				return Inspection{}, err
			}
			ino = attr.Ino
		}
	}
	file, err := s.file(ctx, ino)
	return Inspection{Schema: Schema, File: &file}, err
}

func (s *Server) file(ctx context.Context, ino volume.Ino) (File, error) {
	v := s.client.Volume()
	attr, err := v.GetAttr(ctx, ino)
	if err != nil {
		return File{}, err
	}
	state, err := v.FileState(ctx, ino)
	if err != nil {
		return File{}, err
	}
	policy, err := v.Policy(ino)
	if err != nil {
		return File{}, err
	}
	extents, err := v.InspectFile(ctx, ino)
	if err != nil {
		return File{}, err
	}
	out := File{Ino: uint64(ino), Bytes: attr.Size, State: state, Policy: policy, Extents: []Extent{}, Stripes: []Stripe{}}
	seen := make(map[string]bool)
	for _, e := range extents {
		out.Extents = append(out.Extents, Extent(e))
		if e.Stripe == "" || seen[e.Stripe] {
			continue
		}
		seen[e.Stripe] = true
		stripe, err := s.stripe(ctx, e.Stripe)
		if err != nil {
			return File{}, err
		}
		out.Stripes = append(out.Stripes, stripe)
	}
	if state != volume.StateDurable {
		st, err := v.Status(ctx)
		if err != nil {
			return File{}, err
		}
		out.NotDurable = notDurable(st)
	}
	return out, nil
}

func (s *Server) stripe(ctx context.Context, text string) (Stripe, error) {
	id, err := hex.DecodeString(text)
	if err != nil || len(id) != 16 {
		return Stripe{}, &Error{CodeInvalid, fmt.Sprintf("stripe %q: an id is 32 hexadecimal digits", text)}
	}
	view, err := s.client.Volume().InspectStripe(ctx, [16]byte(id))
	if err != nil {
		return Stripe{}, err
	}
	out := Stripe{
		ID: view.ID, Purpose: view.Purpose, K: view.K, M: view.M, ShardBytes: view.ShardBytes, UsedBytes: view.UsedBytes,
		LiveBytes: view.LiveBytes, Mirrored: view.Mirrored, Complete: view.Complete, Epoch: view.Epoch, Keepers: view.Keepers,
		ShardsAlive: view.ShardsAlive, SurvivesLosses: view.SurvivesLoss, Health: view.Health, Reason: view.Reason, Shards: []Shard{},
	}
	for _, sh := range view.Shards {
		out.Shards = append(out.Shards, Shard{view.ID, sh.Index, sh.Primary, sh.PrimaryState, sh.Mirror, sh.MirrorState})
	}
	return out, nil
}
