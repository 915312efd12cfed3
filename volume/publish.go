package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
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
	yielded int             // bytes since the last yield; of the flush goroutine
	dead    map[string]bool // nodes whose death has been dealt with; of the publisher's goroutine

	mu        sync.Mutex
	head      *headpb.Body      // guarded by mu: last published, nil before the first
	sequence  uint64            // guarded by mu: of that head
	headHash  []byte            // guarded by mu
	headAcks  int               // guarded by mu: nodes that hold it
	headNodes int               // guarded by mu: nodes that should
	cutTotal  int64             // guarded by mu: bytes the running cut has to place
	cutPlaced int64             // guarded by mu: bytes it has placed
	lastErr   error             // guarded by mu: why the last attempt failed
	changedC  chan struct{}     // guarded by mu: closed and replaced at each progress
	partial   map[[16]byte]bool // guarded by mu: stripes whose policy is not met yet
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
		partial: make(map[[16]byte]bool),
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
	if err := v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
		if !s.Complete && !s.Condemned {
			p.partial[id] = true
		}
		return true
	}); err != nil {
		return nil, err
	}
	return p, nil
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

func (p *publisher) busy() bool { return p.v.foreground.Load() > 0 }

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
	old, sequence, previous := p.head, p.sequence, p.headHash
	p.mu.Unlock()
	checkpoint := old == nil || len(old.Segments)-int(old.CheckpointStripes) >= max(checkpointAfter, int(old.CheckpointStripes))

	log := p.newLogWriter(ctx)
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
		return errors.Join(fmt.Errorf("write the log: %w", err), flush.group.Wait())
	}
	placed, err := flush.run()
	if err != nil {
		return err
	}
	refs, logPlaced, err := log.finish()
	if err != nil {
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
	hash, acks, nodes, err := p.putHead(ctx, sequence+1, previous, body)
	if err != nil {
		return err
	}
	state, err := encodeHeadState(sequence+1, hash, body)
	if err != nil {
		return err
	}
	if _, err := p.commit(func(t *tx) error {
		t.PutMeta(metaHead, state)
		for g := first; g <= generation; g++ {
			t.DropTouched(g)
		}
		for _, s := range append(placed, logPlaced...) {
			t.PutStripe(s.ID, *s.Info)
		}
		if checkpoint {
			for _, s := range old.GetSegments() {
				if err := condemn(t, [16]byte(s.Id)); err != nil {
					return err
				}
			}
		}
		return nil
	}); err != nil {
		return err
	}
	p.mu.Lock()
	p.head, p.sequence, p.headHash, p.headAcks, p.headNodes = body, sequence+1, hash, acks, nodes
	p.cutTotal, p.cutPlaced = 0, 0
	for _, s := range append(placed, logPlaced...) {
		if !s.Info.Complete {
			p.partial[s.ID] = true
		}
	}
	p.progress()
	p.mu.Unlock()
	p.log.Info("published", "head", sequence+1, "cut", seq, "stripes", len(placed), "log_stripes", len(refs), "entries", log.entries, "checkpoint", checkpoint, "took", time.Since(started))
	return p.release(ctx, seq)
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
	if err := cut.Unplaced(0, func(u metastore.Unplaced) bool { total += int64(u.Len); return true }); err != nil {
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
			n += int64(e.Len)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cutPlaced += n
	p.progress()
}

// writeTree writes every tree key of the cut: a checkpoint. Extents that were
// unplaced at the cut are written by the flusher as they are placed.
func writeTree(cut *metastore.Snapshot, log *logWriter) error {
	var failed error
	for _, kind := range []byte("gidxeos") {
		if err := cut.Scan([]byte{kind}, []byte{kind + 1}, func(key, value []byte) bool {
			failed = writeKey(log, key, value)
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
		if err := cut.Touched(g, func(key []byte, _ uint64) bool {
			value, err := cut.Get(key)
			switch {
			case errors.Is(err, metastore.ErrNotFound):
				failed = log.delete(key)
			case err != nil:
				failed = err
			default:
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
		if !e.HasRemote {
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
	}
	return log.put(key, value)
}

// release lets go of segments whose every record is published and flushed, and
// that no unplaced extent needs.
func (p *publisher) release(ctx context.Context, cut uint64) error {
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
	if p.v.lastChange.Load() <= cut {
		cut = math.MaxUint64 // what came later is bookkeeping, which no log needs
	}
	waiting, err := p.markClean(cut, pinned)
	if err != nil || waiting < 4*segmentBytesTypical {
		return err
	}
	if err := p.v.db.Flush(ctx); err != nil {
		return err
	}
	_, err = p.markClean(cut, pinned)
	return err
}

// markClean marks the segments up to cut that are not pinned, and returns the
// bytes of those that only an unflushed metastore holds back.
func (p *publisher) markClean(cut uint64, pinned map[uint64]bool) (waiting int64, err error) {
	flushed := p.v.db.Flushed()
	for _, s := range p.v.store.Segments() {
		if s.State != cache.Dirty || s.Active || s.LastSeq > cut || pinned[s.ID] {
			continue
		}
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
