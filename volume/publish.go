package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/chunker"
	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/stripe"
	"github.com/defs-fs/defs/volume/headpb"
)

const (
	// cutAfter is how long the oldest unpublished change waits for company.
	cutAfter = 5 * time.Second
	// quietAfter starts a cut sooner when the application has paused.
	quietAfter = time.Second
	// tendEvery paces mending, collecting and re-announcing.
	tendEvery = 15 * time.Second
	// checkpointAfter bounds the log stripes between two checkpoints.
	checkpointAfter = 64
	// metaHead is where the last published head's body is kept.
	metaHead = "head"
	// metaHeadNodes tells how many nodes hold that head, and how many should.
	metaHeadNodes = "head-nodes"
	// stripesPerCommit bounds the stripe infos in one journal record.
	stripesPerCommit = 128
)

// publisher turns the journal into what the pool holds: it takes cuts, places
// their content and log, and publishes heads. One goroutine.
type publisher struct {
	v       *Volume
	dev     *Device
	keys    *keyring
	stripes *stripe.Store
	t       p2p.Transport
	policy  erasure.Policy
	pack    *chunker.Compressor
	log     *slog.Logger

	ctx     context.Context
	stop    context.CancelFunc
	done    chan struct{}
	kick    chan struct{}   // one slot: publish now
	waiters atomic.Int32    // callers of WaitDurable; while there are any, nothing yields
	looked  uint64          // operations begun at the last look of busy; of the flush goroutine
	yielded int             // bytes since the last yield; of the flush goroutine
	dead    map[string]bool // nodes whose death has been dealt with; of the publisher's goroutine

	// Of the publisher's goroutine, for noticeMoves:
	away      map[string]bool   // nodes that were silent or leaving at the last turn
	awaySince time.Time         // when all of them were last asked about
	awayNext  time.Time         // no asking before, unless another node has gone
	unasked   map[[16]byte]bool // stripes whose keepers are still to be asked

	// Of the publisher's goroutine:
	sequenceUsed uint64     // highest sequence that a head was or may have been sent with
	newLog       bool       // the next head starts a log of its own
	sifted       uint64     // the cut whose stripes have all been looked at for references
	tendNext     time.Time  // no tending before
	signed       *wire.Head // the last published head as it was sent; nil until it is fetched after a start

	mu        sync.Mutex
	head      *headpb.Body // guarded by mu: last published, nil before the first
	sequence  uint64       // guarded by mu: of that head
	headHash  []byte       // guarded by mu
	headAcks  int          // guarded by mu: nodes that hold it
	headNodes int          // guarded by mu: nodes that should
	cutTotal  int64        // guarded by mu: bytes the running cut has to place
	cutPlaced int64        // guarded by mu: bytes it has placed
	lost      int64        // guarded by mu: bytes that the last cut could not read and nobody has
	uncovered int64        // guarded by mu: bytes placed since the last head
	// unpublished are the content stripes that are placed and that no head has
	// made recoverable yet: of the running cut, and of cuts that failed.
	unpublished map[[16]byte]struct{} // guarded by mu
	lastErr     error                 // guarded by mu: why the last attempt failed
	unmet       error                 // guarded by mu: why partial was not emptied in the last turn of tending
	changedC    chan struct{}         // guarded by mu: closed and replaced at each progress
	partial     map[[16]byte]bool     // guarded by mu: stripes whose policy is not met yet
}

// headState is what metaHead holds: body and what the next head needs.
// FORMAT.md, "Metastore".
func encodeHeadState(sequence uint64, hash []byte, body *headpb.Body) ([]byte, error) {
	b, err := proto.Marshal(body)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, 41+len(b))
	out = append(out, 1)
	out = be.AppendUint64(out, sequence)
	out = append(out, hash...)
	return append(out, b...), nil
}

func decodeHeadState(b []byte) (sequence uint64, hash []byte, body *headpb.Body, err error) {
	if len(b) < 41 || b[0] != 1 {
		return 0, nil, nil, errors.New("head state: unknown version")
	}
	body = &headpb.Body{}
	if err := proto.Unmarshal(b[41:], body); err != nil {
		return 0, nil, nil, fmt.Errorf("head state: %w", err)
	}
	return be.Uint64(b[1:]), b[9:41], body, nil
}

// encodeHeadNodes is the value of metaHeadNodes.
func encodeHeadNodes(acks, nodes int) []byte {
	return be.AppendUint32(be.AppendUint32(nil, uint32(acks)), uint32(nodes))
}

func (v *Volume) newPublisher(dev *Device, keys *keyring, stripes *stripe.Store, t p2p.Transport) (*publisher, error) {
	policy, err := erasure.ParsePolicy(dev.Policy)
	if err != nil {
		return nil, err
	}
	pack, err := chunker.NewCompressor(2)
	if err != nil {
		return nil, err
	}
	p := &publisher{
		v: v, dev: dev, keys: keys, stripes: stripes, t: t, policy: policy, pack: pack, log: v.log,
		done: make(chan struct{}), kick: make(chan struct{}, 1), changedC: make(chan struct{}),
		partial: make(map[[16]byte]bool), unpublished: make(map[[16]byte]struct{}), unasked: make(map[[16]byte]bool),
	}
	p.ctx, p.stop = context.WithCancel(context.Background())
	state, err := v.db.Meta(metaHead)
	if err == nil {
		if p.sequence, p.headHash, p.head, err = decodeHeadState(state); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, metastore.ErrNotFound) {
		return nil, err
	}
	switch b, err := v.db.Meta(metaHeadNodes); {
	case err == nil && len(b) == 8:
		p.headAcks, p.headNodes = int(be.Uint32(b)), int(be.Uint32(b[4:]))
	case err == nil:
		return nil, fmt.Errorf("nodes of the head: %d bytes, not 8: %w", len(b), metastore.ErrCorrupt)
	case !errors.Is(err, metastore.ErrNotFound):
		return nil, err
	}
	if p.sequenceUsed, err = sequenceUsed(v.db, p.sequence); err != nil {
		return nil, err
	}
	if err := v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
		switch {
		case s.Condemned:
		case s.IndexAcks == 0 && s.Purpose == metastore.PurposeContent:
			p.unpublished[id] = struct{}{}
		case !s.Complete:
			p.partial[id] = true
		}
		return true
	}); err != nil {
		return nil, err
	}
	if err := p.reconcileLog(); err != nil {
		return nil, err
	}
	for id := range p.unpublished {
		if err := v.db.References(id, func(r metastore.Reference) bool { p.uncovered += int64(r.Len); return true }); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// reconcileLog brings the infos of log stripes up to the head, which a crash
// may have kept from being noted: those that it names are needed.
func (p *publisher) reconcileLog() error {
	named := make(map[string]bool)
	for _, s := range p.head.GetSegments() {
		named[string(s.Id)] = true
	}
	var wrong [][16]byte
	if err := p.v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
		if s.Purpose == metastore.PurposeLog && s.Condemned == named[string(id[:])] {
			wrong = append(wrong, id)
		}
		return true
	}); err != nil {
		return err
	}
	for _, id := range wrong {
		if _, err := p.commit(func(t *tx) error {
			s, err := t.v.db.Stripe(id)
			if err != nil {
				return err
			}
			s.Condemned = !s.Condemned
			t.PutStripe(id, s)
			return nil
		}); err != nil {
			return err
		}
		delete(p.partial, id)
		if named[string(id[:])] {
			p.partial[id] = true
		}
	}
	return nil
}

// commit is a bookkeeping change: it is journaled like any other, and asks for
// no cut of its own.
func (p *publisher) commit(build func(*tx) error) (uint64, error) {
	return p.v.commit(func(t *tx) error {
		t.background = true
		return build(t)
	})
}

// published returns the journal position that the last head covers.
func (p *publisher) published() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.head.GetCut()
}

// progress wakes those who wait for it. Called with mu held.
func (p *publisher) progress() {
	close(p.changedC)
	p.changedC = make(chan struct{})
}

// busy says that the application is at work: it reads or writes now, or has
// changed something since the last look. Only the flush goroutine looks.
func (p *publisher) busy() bool {
	begun := p.v.foreground.begun.Load()
	active := begun != p.looked
	p.looked = begun
	return active || p.v.foreground.running.Load() > 0
}

// urgent says that background work must not yield: somebody waits, or the
// journal is half full.
func (p *publisher) urgent() bool {
	st := p.v.store.Stats()
	return p.waiters.Load() > 0 || st.JournalBytes > st.JournalMaxBytes/2
}

// run is the publisher's goroutine.
func (p *publisher) run() {
	defer close(p.done)
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = 500*time.Millisecond, 20*time.Second
	var oldest time.Time // when the oldest unpublished change was noticed
	var next time.Time   // no attempt before, after a failure
	tend := time.NewTicker(tendEvery)
	defer tend.Stop()
	tick := time.NewTicker(quietAfter / 2)
	defer tick.Stop()
	var last uint64 // newest change at the last tick
	for {
		kicked := false
		select {
		case <-p.ctx.Done():
			return
		case <-p.kick:
			kicked = true
		case <-tend.C:
			p.tend(p.ctx)
		case <-tick.C:
		}
		change := p.v.lastChange.Load()
		quiet := change == last
		last = change
		if change <= p.published() {
			oldest = time.Time{}
			if kicked {
				p.tend(p.ctx)
			}
			continue
		}
		now := time.Now()
		if oldest.IsZero() {
			oldest = now
		}
		due := kicked || p.urgent() || now.Sub(oldest) >= cutAfter || (quiet && now.Sub(oldest) >= quietAfter)
		if !due || now.Before(next) {
			continue
		}
		err := p.publish(p.ctx)
		if p.ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		p.lastErr = err
		p.progress()
		p.mu.Unlock()
		if err != nil {
			wait := retry.NextBackOff()
			next = time.Now().Add(wait)
			p.log.Warn("changes could not be published; they are safe in the journal and will be tried again", "err", err, "retry_in", wait)
			continue
		}
		retry.Reset()
		oldest, next = time.Time{}, time.Time{}
	}
}

// close ends the goroutine; what is unpublished stays in the journal.
func (p *publisher) close() {
	p.stop()
	<-p.done
}

// publish takes one cut and makes it recoverable.
func (p *publisher) publish(ctx context.Context) error {
	started := time.Now()
	if err := p.settle(ctx); err != nil {
		return err
	}
	cut, seq, generation, err := p.v.beginCut()
	if err != nil {
		return err
	}
	defer cut.Close()
	if err := p.measure(cut); err != nil {
		return err
	}
	defer func() {
		p.mu.Lock()
		p.cutTotal, p.cutPlaced = 0, 0
		p.mu.Unlock()
	}()
	p.mu.Lock()
	old, previous := p.head, p.headHash
	p.mu.Unlock()
	checkpoint := old == nil || p.newLog || proto.Size(old) > wire.HeadBytesMax/2 ||
		len(old.Segments)-int(old.CheckpointStripes) >= max(checkpointAfter, int(old.CheckpointStripes))

	log := p.newLogWriter(ctx)
	defer log.wait()
	flush, err := p.newFlusher(ctx, cut, seq, log)
	if err != nil {
		return err
	}
	// The tree goes first: an extent that the flusher splits may begin where
	// another one was deleted, and entries count in order.
	first := old.GetGenerationNext()
	if checkpoint {
		err = writeTree(cut, log)
	} else {
		err = writeChanges(cut, log, first, generation)
	}
	if err != nil {
		return fmt.Errorf("write the log: %w", err)
	}
	placed, err := flush.run()
	if err != nil {
		return err
	}
	refs, logPlaced, err := log.finish()
	if err != nil {
		return err
	}
	// Until its head is published the log is condemned: a crash leaves nothing
	// that no later head would have deleted.
	for _, s := range logPlaced {
		s.Info.CreatedSeq = seq
	}
	if err := p.putStripes(logPlaced, true); err != nil {
		return err
	}
	if err := p.stripes.Publish(ctx, append(placed, logPlaced...)); err != nil {
		return err
	}
	for i, ref := range refs {
		if ref.Info, err = logPlaced[i].Info.MarshalBinary(); err != nil {
			return err
		}
	}
	body, err := p.headBody(old, seq, generation+1, refs, checkpoint)
	if err != nil {
		return err
	}
	sequence, err := p.reserve(ctx)
	if err != nil {
		return err
	}
	head, acks, nodes, err := p.putHead(ctx, sequence, previous, body)
	if err != nil {
		return err
	}
	hash := head.Hash()
	state, err := encodeHeadState(sequence, hash[:], body)
	if err != nil {
		return err
	}
	if _, err := p.commit(func(t *tx) error {
		t.PutMeta(metaHead, state)
		t.PutMeta(metaHeadNodes, encodeHeadNodes(acks, nodes))
		for g := first; g <= generation; g++ {
			t.DropTouched(g)
		}
		return nil
	}); err != nil {
		return err
	}
	p.signed, p.newLog = head, false
	p.mu.Lock()
	p.head, p.sequence, p.headHash, p.headAcks, p.headNodes = body, sequence, hash[:], acks, nodes
	p.cutTotal, p.cutPlaced, p.uncovered = 0, 0, 0
	p.lost = flush.lost
	for _, s := range append(placed, logPlaced...) {
		delete(p.unpublished, s.ID)
		if !s.Info.Complete {
			p.partial[s.ID] = true
		}
	}
	p.progress()
	p.mu.Unlock()
	// What these say a crash may lose: the stripes are then published again,
	// and the old log stays where it is.
	if err := p.putStripes(append(placed, logPlaced...), false); err != nil {
		return err
	}
	if checkpoint {
		if err := p.condemnLog(old); err != nil {
			return err
		}
	}
	if flush.lost > 0 {
		p.log.Error("bytes cannot be read from this disk and are nowhere else; all other changes are published. Unmount and run defs fsck", "bytes", flush.lost)
	}
	p.log.Info("published", "head", sequence, "cut", seq, "stripes", len(placed), "log_stripes", len(refs), "entries", log.entries, "checkpoint", checkpoint, "took", time.Since(started))
	return p.release(ctx, seq)
}

// settle deals with the stripes that a failed publish has placed: their index
// records are published now, or, where the pool has changed too much for that,
// their bytes count as unplaced again and go into new stripes.
func (p *publisher) settle(ctx context.Context) error {
	p.mu.Lock()
	ids := slices.Collect(maps.Keys(p.unpublished))
	p.mu.Unlock()
	if len(ids) == 0 {
		return nil
	}
	// Without a pool nothing is known to have changed.
	if _, err := p.stripes.NewBuilder(p.policy, metastore.PurposeContent); err != nil {
		return err
	}
	for _, id := range ids {
		info, err := p.v.db.Stripe(id)
		if err != nil && !errors.Is(err, metastore.ErrNotFound) {
			return err
		}
		if err == nil && !info.Condemned && info.IndexAcks == 0 {
			manifest, err := p.stripes.Manifest(id, &info)
			if err != nil {
				return err
			}
			st := []stripe.Placed{{ID: id, Info: &info, Manifest: manifest}}
			if err := p.stripes.Publish(ctx, st); ctx.Err() != nil {
				return ctx.Err()
			} else if err != nil {
				p.log.Info("a stripe of an earlier attempt cannot be published any more; its content is placed again", "stripe", fmt.Sprintf("%x", id), "err", err)
				if err := p.unplace(id); err != nil {
					return err
				}
			} else if err := p.putStripes(st, false); err != nil {
				return err
			}
		}
		p.mu.Lock()
		delete(p.unpublished, id)
		if err == nil && !info.Condemned && !info.Complete && info.IndexAcks > 0 {
			p.partial[id] = true
		}
		p.mu.Unlock()
	}
	return nil
}

// unplace takes a stripe that no head names back: its extents, whose bytes are
// still in the journal, count as unplaced again, and the stripe is condemned.
func (p *publisher) unplace(id [16]byte) error {
	var refs []metastore.Reference
	if err := p.v.db.References(id, func(r metastore.Reference) bool { refs = append(refs, r); return true }); err != nil {
		return err
	}
	for first := true; first || len(refs) > 0; first = false {
		batch := refs[:min(len(refs), piecesPerCommit)]
		refs = refs[len(batch):]
		if _, err := p.commit(func(t *tx) error {
			for _, r := range batch {
				if err := t.v.db.Extents(r.Ino, r.Off, r.Off+1, func(e metastore.Extent) bool {
					if e.HasRemote && e.Remote.Stripe == id && e.HasLocal() && t.v.store.Holds(e.Local.Segment) {
						t.DeleteExtent(r.Ino, e)
						e.HasRemote, e.Remote = false, metastore.Remote{}
						t.PutExtent(r.Ino, e)
					}
					return true
				}); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	used := false
	if err := p.v.db.References(id, func(metastore.Reference) bool { used = true; return false }); err != nil || used {
		return err // a part is only there: mending goes on
	}
	_, err := p.commit(func(t *tx) error { return condemn(t, id) })
	return err
}

// putStripes keeps what is known of stripes, in records of bounded size.
func (p *publisher) putStripes(list []stripe.Placed, condemned bool) error {
	for len(list) > 0 {
		batch := list[:min(len(list), stripesPerCommit)]
		list = list[len(batch):]
		if _, err := p.commit(func(t *tx) error {
			for _, s := range batch {
				info := *s.Info
				info.Condemned = condemned
				t.PutStripe(s.ID, info)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// condemnLog condemns the stripes of the log that a checkpoint has replaced.
func (p *publisher) condemnLog(old *headpb.Body) error {
	segments := old.GetSegments()
	for len(segments) > 0 {
		batch := segments[:min(len(segments), stripesPerCommit)]
		segments = segments[len(batch):]
		if _, err := p.commit(func(t *tx) error {
			for _, s := range batch {
				if err := condemn(t, [16]byte(s.Id)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// condemn marks a stripe that the newest head no longer needs.
func condemn(t *tx, id [16]byte) error {
	info, err := t.v.db.Stripe(id)
	if errors.Is(err, metastore.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	info.Condemned = true
	t.PutStripe(id, info)
	return nil
}

// measure counts what the cut has to place.
func (p *publisher) measure(cut *metastore.Snapshot) error {
	var total int64
	if err := cut.Unplaced(1, func(u metastore.Unplaced) bool { total += int64(u.Len); return true }); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cutTotal, p.cutPlaced = total, 0
	return nil
}

func (p *publisher) countPlaced(chunks []*chunk) {
	var n int64
	for _, c := range chunks {
		for _, e := range c.pieces {
			if !c.lost {
				n += int64(e.Len)
			}
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cutPlaced += n
	p.uncovered += n
	p.progress()
}

// writeTree writes every tree key of the cut: a checkpoint. Extents that were
// unplaced at the cut are written by the flusher as they are placed.
func writeTree(cut *metastore.Snapshot, log *logWriter) error {
	var failed error
	for _, kind := range []byte("gidxeos") {
		if err := cut.Scan([]byte{kind}, []byte{kind + 1}, func(key, value []byte) bool {
			if failed = log.yield(); failed == nil {
				failed = writeKey(log, key, value)
			}
			return failed == nil
		}); err != nil {
			return err
		}
		if failed != nil {
			return failed
		}
	}
	return nil
}

// writeChanges writes the tree keys that changed in the generations [first,
// last], each as it is at the cut.
func writeChanges(cut *metastore.Snapshot, log *logWriter, first, last uint64) error {
	for g := first; g <= last; g++ {
		var failed error
		if err := cut.Changes(g, func(key, value []byte) bool {
			if failed = log.yield(); failed != nil {
				return false
			}
			if value == nil {
				failed = log.delete(key)
			} else {
				failed = writeKey(log, key, value)
			}
			return failed == nil
		}); err != nil {
			return err
		}
		if failed != nil {
			return failed
		}
	}
	return nil
}

func writeKey(log *logWriter, key, value []byte) error {
	p, err := metastore.ParseTreeKey(key)
	if err != nil {
		return err
	}
	switch p.Kind {
	case 'e':
		e, err := metastore.DecodeExtent(p.Off, value)
		if err != nil {
			return err
		}
		if !e.HasRemote && !e.Lost() {
			return nil // the flusher writes it
		}
		return log.extent(p.Ino, e)
	case 's':
		var info metastore.StripeInfo
		if err := info.UnmarshalBinary(value); err != nil {
			return err
		}
		if info.Condemned || info.Purpose == metastore.PurposeLog {
			// Heads name the log's own stripes.
			return log.delete(key)
		}
		return log.stripe(p.Stripe, info)
	}
	return log.put(key, value)
}

// release lets go of segments whose every record is published and flushed, and
// that no unplaced extent needs.
func (p *publisher) release(ctx context.Context, cut uint64) error {
	// Segments and newest change are of one moment: what is written from here
	// on lies in none of the segments that have been completed.
	p.v.mu.Lock()
	segments, change := p.v.store.Segments(), p.v.lastChange.Load()
	p.v.mu.Unlock()
	pinned := make(map[uint64]bool)
	for from := uint64(0); ; {
		found := false
		if err := p.v.db.Unplaced(from, func(u metastore.Unplaced) bool {
			pinned[u.Segment], from, found = true, u.Segment+1, true
			return false
		}); err != nil {
			return err
		}
		if !found {
			break
		}
	}
	if change <= cut {
		cut = math.MaxUint64 // what came later is bookkeeping, which no log needs
	}
	done := slices.DeleteFunc(segments, func(s cache.SegmentInfo) bool {
		return s.State != cache.Dirty || s.Active || s.LastSeq > cut || pinned[s.ID]
	})
	waiting, err := p.markClean(done)
	if err != nil || waiting == 0 || waiting < 4*segmentBytesTypical && !p.v.store.Stats().NoSpace {
		return err
	}
	if err := p.v.db.Flush(ctx); err != nil {
		return err
	}
	_, err = p.markClean(done)
	return err
}

// markClean marks the segments that a flushed metastore does not need, and
// returns the bytes of the others.
func (p *publisher) markClean(segments []cache.SegmentInfo) (waiting int64, err error) {
	flushed := p.v.db.Flushed()
	for _, s := range segments {
		if s.LastSeq > flushed {
			waiting += s.Bytes
			continue
		}
		if err := p.v.store.MarkClean(s.ID); err != nil {
			return 0, err
		}
	}
	return waiting, nil
}

// segmentBytesTypical is the store's usual segment: a quarter GiB of waiting
// segments is worth a flush of the metastore.
const segmentBytesTypical = 64 << 20
