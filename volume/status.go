package volume

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/defs-fs/defs/metastore"
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
	Degraded    int // with fewer shards, mirrors or keepers than the policy wants, or with holders that do not answer
	Unreachable int // with fewer than k alive, and k or more not declared dead
	Lost        int // with fewer than k that are not declared dead

	// What can be lost without losing recoverable data: the least over data,
	// log, index and heads. -1 while nothing is published.
	SurvivesNodes, SurvivesHosts int

	// Unpublished says that the newest head does not cover every change.
	// Shortfalls are why what it covers is not durable, in words; none when it is.
	Unpublished bool
	Shortfalls  []string

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
	total, empty := int64(v.usage.bytes), v.usage.inodes <= 1
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
	headAcks, headNodes := p.headAcks, p.headNodes
	// A volume that is empty and was never published has nothing to lose.
	s.Unpublished = !p.covers(v.lastChange.Load()) && !(empty && p.head == nil)
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
	short := &shortfall{members: v.network.members(), silentNodes: make(map[placement.NodeID]bool)}
	incomplete, logWhole, err := v.measureStripes(&s, short, head != nil, headAcks)
	if err != nil {
		return s, err
	}
	s.Shortfalls = short.words(headAcks, headNodes, head != nil, v.clock())
	if headWhole && logWhole {
		s.Recoverable = min(incomplete, covered)
	} else {
		s.Recoverable = covered
	}
	s.Durable = covered - s.Recoverable
	return s, nil
}

// measureStripes fills in health and survivable losses, and returns the live
// bytes in stripes that are not whole, and whether the log's are.
func (v *Volume) measureStripes(s *Status, short *shortfall, published bool, headAcks int) (incomplete int64, logWhole bool, err error) {
	hosts := make(map[string]bool)
	for _, m := range short.members {
		if m.Answers() {
			s.Nodes++
			hosts[m.Host] = true
		}
	}
	s.Hosts = len(hosts)
	hostOf := func(id placement.NodeID) string { return short.members[id].Host }
	nodes, onHosts := 1<<30, 1<<30
	logWhole = true
	var partial [][16]byte
	if err := v.db.Stripes(func(id [16]byte, info metastore.StripeInfo) bool {
		if info.Condemned {
			return true
		}
		s.Stripes++
		now := short.members.stripe(&info)
		if !now.whole() {
			short.add(&info, now)
			if info.Purpose == metastore.PurposeLog {
				logWhole = false
			} else {
				partial = append(partial, id)
			}
		}
		switch {
		case now.health == HealthUnreachable:
			s.Unreachable++
		case now.health == HealthLost:
			s.Lost++
		case now.health == HealthDegraded && (len(now.away) > 0 || info.IndexAcks > 0): // else it is just being placed
			s.Degraded++
		}
		n, h := placement.SurvivesLosses(now.pairs, info.K, hostOf)
		// Of the keepers one must remain, as must one holder of the head.
		n = min(n, max(info.IndexAcks-1, 0))
		nodes, onHosts = min(nodes, n), min(onHosts, h)
		return true
	}); err != nil {
		return 0, false, err
	}
	if published && s.Stripes > 0 {
		s.SurvivesNodes, s.SurvivesHosts = max(min(nodes, headAcks-1), 0), max(min(onHosts, s.Hosts-1), 0)
	}
	for _, id := range partial {
		if err := v.db.References(id, func(r metastore.Reference) bool { incomplete += int64(r.Len); return true }); err != nil {
			return 0, false, err
		}
	}
	return incomplete, logWhole, nil
}

// lostError says that so many bytes are neither readable on this disk nor with
// the peers.
type lostError struct{ bytes int64 }

func (e *lostError) Error() string {
	return fmt.Sprintf("%d bytes cannot be read from this disk and are nowhere else; everything else is published. Unmount and run defs fsck, which lists the files", e.bytes)
}

// WaitDurable publishes what is there and returns when everything that was
// acknowledged before the call is durable, as Status counts it. progress, if not nil, is called with
// fresh figures now and then. The error is ctx's when that ends first, and
// tells of bytes that nobody can read any more.
func (v *Volume) WaitDurable(ctx context.Context, progress func(Status)) error {
	if v.network == nil {
		return wrap("wait", 0, NotSupported)
	}
	want := v.lastChange.Load()
	return v.network.publisher.await(ctx, progress, func(p *publisher) bool {
		return p.covers(want) && len(p.partial) == 0 && p.headNodes > 0 && p.headAcks == p.headNodes
	}, func() (bool, error) {
		s, err := v.Status(ctx)
		return len(s.Shortfalls) == 0, err
	})
}

// covers says whether the last head covers a change. Called with mu held.
func (p *publisher) covers(change uint64) bool { return p.head != nil && p.head.GetCut() >= change }

// await publishes until done, which is called with mu held, and then, without mu, also,
// if not nil. See WaitDurable for progress and errors.
func (p *publisher) await(ctx context.Context, progress func(Status), done func(*publisher) bool, also func() (bool, error)) error {
	p.waiters.Add(1)
	defer p.waiters.Add(-1)
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		p.mu.Lock()
		ended := done(p)
		changed, lastErr, lost := p.changedC, p.lastErr, p.lost
		p.mu.Unlock()
		if ended && also != nil {
			var err error
			if ended, err = also(); err != nil {
				return err
			}
		}
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
	head := p.head
	running := p.cutTotal > 0
	base := StateDurable
	if p.headNodes == 0 || p.headAcks < p.headNodes {
		base = StateRecoverable
	}
	p.mu.Unlock()
	members := v.network.members()
	whole := func(id [16]byte) bool {
		info, err := v.db.Stripe(id)
		return err == nil && members.stripe(&info).whole()
	}
	for _, s := range head.GetSegments() {
		if base == StateDurable && !whole([16]byte(s.Id)) {
			base = StateRecoverable
		}
	}
	// Of a recovered volume another device's head covers what it has placed.
	covered := func(e metastore.Extent) bool {
		if e.Seq <= head.GetCut() {
			return true
		}
		info, err := v.db.Stripe(e.Remote.Stripe)
		return err == nil && p.dev.recovered() && info.CreatedSeq == metastore.CreatedElsewhere
	}
	state := base
	if head == nil && !p.dev.recovered() {
		state = StateJournaled
	}
	err := v.db.Extents(ino, 0, 1<<63, func(e metastore.Extent) bool {
		switch {
		case !e.HasRemote:
			if state = StateJournaled; running {
				state = StateQueued
			}
			return false
		case !covered(e):
			state = StateQueued // at the nodes already, for the next head
		case state == StateDurable && !whole(e.Remote.Stripe):
			state = StateRecoverable
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
	Health       string // HealthWhole and so on
	Reason       string // why it is not whole; "" when it is
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
	state := make(members)
	if v.network != nil {
		state = v.network.members()
	}
	name := func(id string) string {
		if id == "" {
			return ""
		}
		m, ok := state[placement.NodeID(id)]
		if !ok {
			return "unknown"
		}
		return m.Standing()
	}
	now := state.stripe(&info)
	for i, h := range info.Holders {
		view.Shards = append(view.Shards, ShardPlace{i, h.Primary, h.Mirror, name(h.Primary), name(h.Mirror)})
	}
	view.Health, view.Reason, view.ShardsAlive = now.health, state.reason(&info, now, v.clock()), len(now.pairs)
	view.SurvivesLoss, _ = placement.SurvivesLosses(now.pairs, info.K, func(placement.NodeID) string { return "" })
	err = v.db.References(id, func(r metastore.Reference) bool { view.LiveBytes += int64(r.Len); return true })
	return view, err
}

// Stripes calls fn with the id of each stripe in use.
func (v *Volume) Stripes(fn func(id [16]byte) bool) error {
	return v.db.Stripes(func(id [16]byte, _ metastore.StripeInfo) bool { return fn(id) })
}
