package volume

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/placement"
)

// States of live bytes, in the order in which they are reached. A byte counts
// once, in its lowest state.
const (
	StateJournaled   = "journaled"   // on this disk
	StateQueued      = "queued"      // in a cut that is on its way
	StateRecoverable = "recoverable" // the 24 words bring it back
	StateDurable     = "durable"     // the policy's full target
)

// Status is what `defs status` shows. Sizes are bytes.
type Status struct {
	Name   string
	Volume string // id, hexadecimal

	Journaled, Queued, Recoverable, Durable int64

	CleanBytes, CleanMaxBytes     int64
	JournalBytes, JournalMaxBytes int64
	UnflushedRecords              uint64 // changes that a power cut now would take

	Nodes, Hosts int // alive

	Stripes     int
	Degraded    int // with fewer shards alive than the policy wants
	Unreachable int // with fewer than k alive, and k or more not declared dead
	Lost        int // with fewer than k that are not declared dead

	// What can be lost without losing recoverable data: the least over data,
	// log, index and heads. -1 while nothing is published.
	SurvivesNodes, SurvivesHosts int

	Head      uint64 // sequence of the last published head
	Published time.Time
	Tasks     []Task
	Problem   string // why the last attempt to publish failed, or what is damaged on this disk; "" where neither
	ReadOnly  string // why the volume is read-only; "" when it is not
}

// Task is background work in progress.
type Task struct {
	Kind                  string
	DoneBytes, TotalBytes int64
}

// Status computes the figures from the metastore and what is known of the
// pool; it waits for no peer.
func (v *Volume) Status(ctx context.Context) (Status, error) {
	cs := v.store.Stats()
	s := Status{
		CleanBytes: cs.CleanBytes, CleanMaxBytes: cs.CleanMaxBytes,
		JournalBytes: cs.JournalBytes, JournalMaxBytes: cs.JournalMaxBytes, UnflushedRecords: cs.LastSeq - cs.DurableSeq,
		SurvivesNodes: -1, SurvivesHosts: -1,
	}
	if err := v.failure(); err != nil {
		s.ReadOnly = err.Error()
	}
	v.mu.Lock()
	total := int64(v.usage.bytes)
	v.mu.Unlock()
	if v.network == nil {
		s.Journaled = total
		return s, nil
	}
	p := v.network.publisher
	s.Name, s.Volume = p.dev.Name, hex.EncodeToString(p.dev.Volume)
	var unplaced int64
	if err := v.db.Unplaced(0, func(u metastore.Unplaced) bool { unplaced += int64(u.Len); return true }); err != nil {
		return s, err
	}
	unplaced = min(unplaced, total) // the tree may have changed between the two
	p.mu.Lock()
	head, cutTotal, cutPlaced, uncovered := p.head, p.cutTotal, p.cutPlaced, p.uncovered
	s.Head = p.sequence
	headWhole := p.headNodes > 0 && p.headAcks == p.headNodes
	headAcks := p.headAcks
	switch {
	case p.lastErr != nil:
		s.Problem = p.lastErr.Error()
	case p.lost > 0:
		s.Problem = (&lostError{p.lost}).Error()
	case cs.DamagedReads > 0:
		s.Problem = fmt.Sprintf("%d reads of this disk failed: unmount and run defs fsck --repair", cs.DamagedReads)
	case len(p.partial) > 0 && p.unmet != nil:
		s.Problem = p.unmet.Error()
	}
	p.mu.Unlock()
	if head != nil {
		s.Published = time.Unix(0, head.Time)
	}
	if cutTotal > 0 {
		s.Tasks = append(s.Tasks, Task{"write-back", cutPlaced, cutTotal})
	}
	toPlace := min(max(cutTotal-cutPlaced, 0), unplaced)
	s.Journaled = unplaced - toPlace
	s.Queued = min(toPlace+uncovered, total-s.Journaled)
	covered := total - s.Journaled - s.Queued
	if head == nil && !p.dev.recovered() {
		s.Queued, covered = s.Queued+covered, 0
	}
	incomplete, err := v.measureStripes(&s, head != nil, headAcks)
	if err != nil {
		return s, err
	}
	if headWhole {
		s.Recoverable = min(incomplete, covered)
	} else {
		s.Recoverable = covered
	}
	s.Durable = covered - s.Recoverable
	return s, nil
}

// measureStripes fills in health and survivable losses, and returns the live
// bytes in stripes that do not meet their policy.
func (v *Volume) measureStripes(s *Status, published bool, headAcks int) (incomplete int64, err error) {
	state := make(map[placement.NodeID]p2p.Member)
	hosts := make(map[string]bool)
	for _, m := range v.network.transport.Members() {
		if m.Role != p2p.RoleNode {
			continue
		}
		state[m.ID] = m
		if m.Answers() {
			s.Nodes++
			hosts[m.Host] = true
		}
	}
	s.Hosts = len(hosts)
	hostOf := func(id placement.NodeID) string { return state[id].Host }
	nodes, onHosts := 1<<30, 1<<30
	var partial [][16]byte
	if err := v.db.Stripes(func(id [16]byte, info metastore.StripeInfo) bool {
		if info.Condemned {
			return true
		}
		s.Stripes++
		if !info.Complete {
			partial = append(partial, id)
		}
		var pairs []placement.Pair // of live holders
		missing, silent := false, 0
		for _, h := range info.Holders {
			a, b := placement.NodeID(h.Primary), placement.NodeID(h.Mirror)
			aliveA, aliveB := isAlive(state, a), isAlive(state, b)
			missing = missing || !aliveA || (info.Mirrored && !aliveB)
			switch {
			case aliveA && aliveB:
				pairs = append(pairs, placement.Pair{Primary: a, Mirror: b})
			case aliveA:
				pairs = append(pairs, placement.Pair{Primary: a})
			case aliveB:
				pairs = append(pairs, placement.Pair{Primary: b})
			case mayReturn(state, a) || mayReturn(state, b):
				silent++
			}
		}
		switch {
		case len(pairs) < info.K && len(pairs)+silent >= info.K:
			s.Unreachable++
		case len(pairs) < info.K:
			s.Lost++
		case missing:
			s.Degraded++
		}
		n, h := placement.SurvivesLosses(pairs, info.K, hostOf)
		// Of the keepers one must remain, as must one holder of the head.
		n = min(n, max(info.IndexAcks-1, 0))
		nodes, onHosts = min(nodes, n), min(onHosts, h)
		return true
	}); err != nil {
		return 0, err
	}
	if published && s.Stripes > 0 {
		s.SurvivesNodes, s.SurvivesHosts = max(min(nodes, headAcks-1), 0), max(min(onHosts, s.Hosts-1), 0)
	}
	for _, id := range partial {
		if err := v.db.References(id, func(r metastore.Reference) bool { incomplete += int64(r.Len); return true }); err != nil {
			return 0, err
		}
	}
	return incomplete, nil
}

// mayReturn says that a node is silent and not declared dead.
func mayReturn(members map[placement.NodeID]p2p.Member, id placement.NodeID) bool {
	return id != "" && members[id].State != p2p.Dead
}

func isAlive(members map[placement.NodeID]p2p.Member, id placement.NodeID) bool {
	m, ok := members[id]
	return ok && m.Answers()
}

// lostError says that so many bytes are neither readable on this disk nor with
// the peers.
type lostError struct{ bytes int64 }

func (e *lostError) Error() string {
	return fmt.Sprintf("%d bytes cannot be read from this disk and are nowhere else; everything else is published. Unmount and run defs fsck, which lists the files", e.bytes)
}

// WaitDurable publishes what is there and returns when everything that was
// acknowledged before the call is durable: in a head that all its nodes hold,
// on stripes that meet their policy. progress, if not nil, is called with
// fresh figures now and then. The error is ctx's when that ends first, and
// tells of bytes that nobody can read any more.
func (v *Volume) WaitDurable(ctx context.Context, progress func(Status)) error {
	if v.network == nil {
		return wrap("wait", 0, NotSupported)
	}
	want := v.lastChange.Load()
	return v.network.publisher.await(ctx, progress, func(p *publisher) bool {
		return p.covers(want) && len(p.partial) == 0 && p.headNodes > 0 && p.headAcks == p.headNodes
	})
}

// covers says whether the last head covers a change. Called with mu held.
func (p *publisher) covers(change uint64) bool { return p.head != nil && p.head.GetCut() >= change }

// await publishes until done, which is called with mu held. See WaitDurable for progress and errors.
func (p *publisher) await(ctx context.Context, progress func(Status), done func(*publisher) bool) error {
	p.waiters.Add(1)
	defer p.waiters.Add(-1)
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		p.mu.Lock()
		ended := done(p)
		changed, lastErr, lost := p.changedC, p.lastErr, p.lost
		p.mu.Unlock()
		if ended && lost > 0 {
			return wrap("wait", 0, &lostError{lost})
		}
		if ended {
			return nil
		}
		select {
		case p.kick <- struct{}{}:
		default:
		}
		select {
		case <-changed:
		case <-tick.C:
			if progress != nil {
				s, err := p.v.Status(ctx)
				if err != nil {
					return err
				}
				progress(s)
			}
		case <-ctx.Done():
			if lastErr != nil {
				return fmt.Errorf("%w; the last attempt failed: %w", ctx.Err(), lastErr)
			}
			return ctx.Err()
		case <-p.done:
			return errors.New("the volume is closing")
		}
	}
}

// FileState returns the lowest state of a file's live bytes: the value of
// user.defs.state.
func (v *Volume) FileState(ctx context.Context, ino Ino) (string, error) {
	if _, err := v.existing(ino); err != nil {
		return "", err
	}
	if v.network == nil {
		return StateJournaled, nil
	}
	p := v.network.publisher
	p.mu.Lock()
	cut, none := p.head.GetCut(), p.head == nil
	running := p.cutTotal > 0
	whole := p.headNodes > 0 && p.headAcks == p.headNodes
	p.mu.Unlock()
	state := StateDurable
	switch {
	case none:
		state = StateJournaled
	case !whole:
		state = StateRecoverable
	}
	err := v.db.Extents(ino, 0, 1<<63, func(e metastore.Extent) bool {
		switch {
		case !e.HasRemote || e.Seq > cut:
			if state = StateJournaled; running {
				state = StateQueued
			}
			return false
		case state == StateDurable:
			if info, err := v.db.Stripe(e.Remote.Stripe); err != nil || !info.Complete {
				state = StateRecoverable
			}
		}
		return true
	})
	return state, err
}

// ShardPlace is one shard of an inspected stripe.
type ShardPlace struct {
	Index           int
	Primary, Mirror string
	PrimaryState    string // alive, suspect, dead, unknown
	MirrorState     string
}

// StripeView is what `defs inspect` shows of a stripe.
type StripeView struct {
	ID           string
	Purpose      string
	K, M         int
	ShardBytes   uint32
	UsedBytes    uint64
	LiveBytes    int64
	Mirrored     bool
	Complete     bool
	Epoch        uint32
	Keepers      string // acknowledged/asked
	ShardsAlive  int
	Shards       []ShardPlace
	SurvivesLoss int // nodes
}

// ExtentView is one run of an inspected file.
type ExtentView struct {
	Offset uint64
	Bytes  uint32
	State  string
	Local  bool // the bytes are in the local segment store's journal
	Stripe string
	Slice  uint32
}

// InspectFile lists where a file's bytes are.
func (v *Volume) InspectFile(ctx context.Context, ino Ino) ([]ExtentView, error) {
	if _, err := v.existing(ino); err != nil {
		return nil, err
	}
	local := make(map[uint64]bool)
	for _, s := range v.store.Segments() {
		local[s.ID] = true
	}
	var out []ExtentView
	err := v.db.Extents(ino, 0, 1<<63, func(e metastore.Extent) bool {
		view := ExtentView{Offset: e.Off, Bytes: e.Len, Local: e.HasLocal() && local[e.Local.Segment], State: StateJournaled}
		if e.HasRemote {
			view.State, view.Stripe, view.Slice = "placed", hex.EncodeToString(e.Remote.Stripe[:]), e.Remote.Slice
		}
		out = append(out, view)
		return true
	})
	return out, err
}

// InspectStripe shows a stripe's geometry, holders and health.
func (v *Volume) InspectStripe(ctx context.Context, id [16]byte) (StripeView, error) {
	info, err := v.db.Stripe(id)
	if errors.Is(err, metastore.ErrNotFound) {
		return StripeView{}, wrap("inspect", 0, NotExist)
	}
	if err != nil {
		return StripeView{}, err
	}
	view := StripeView{
		ID: hex.EncodeToString(id[:]), Purpose: "content", K: info.K, M: info.M, ShardBytes: info.ShardBytes,
		UsedBytes: info.UsedBytes, Mirrored: info.Mirrored, Complete: info.Complete, Epoch: info.Epoch,
		Keepers: fmt.Sprintf("%d/%d", info.IndexAcks, info.IndexKeepers),
	}
	if info.Purpose == metastore.PurposeLog {
		view.Purpose = "log"
	}
	state := make(map[string]p2p.Member)
	if v.network != nil {
		for _, m := range v.network.transport.Members() {
			state[string(m.ID)] = m
		}
	}
	name := func(id string) string {
		if id == "" {
			return ""
		}
		m, ok := state[id]
		if !ok {
			return "unknown"
		}
		return m.Standing()
	}
	var pairs []placement.Pair
	for i, h := range info.Holders {
		view.Shards = append(view.Shards, ShardPlace{i, h.Primary, h.Mirror, name(h.Primary), name(h.Mirror)})
		if name(h.Primary) == "alive" || name(h.Mirror) == "alive" {
			view.ShardsAlive++
			pairs = append(pairs, placement.Pair{Primary: placement.NodeID(h.Primary), Mirror: placement.NodeID(h.Mirror)})
		}
	}
	view.SurvivesLoss, _ = placement.SurvivesLosses(pairs, info.K, func(placement.NodeID) string { return "" })
	err = v.db.References(id, func(r metastore.Reference) bool { view.LiveBytes += int64(r.Len); return true })
	return view, err
}

// Stripes calls fn with the id of each stripe in use.
func (v *Volume) Stripes(fn func(id [16]byte) bool) error {
	return v.db.Stripes(func(id [16]byte, _ metastore.StripeInfo) bool { return fn(id) })
}
