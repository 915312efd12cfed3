package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/chunker"
	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/stripe"
)

const (
	// fixedSliceBytes is the grid on which files that are rewritten in place
	// are cut.
	fixedSliceBytes = 256 << 10
	// stripesInFlight bounds the stripes being sealed and placed, and with
	// them the memory of a flush.
	stripesInFlight = 3
	// piecesPerCommit bounds the extents that one journal record re-points.
	piecesPerCommit = 256
	// openStripesMax bounds the stripes being filled: one for each policy.
	openStripesMax = 4
)

// chunk is one slice's worth of a file's unplaced bytes at the cut.
type chunk struct {
	ino    Ino
	off    uint64
	pieces []metastore.Extent // the cut's extents inside the chunk, trimmed to it
	hash   [32]byte
	remote metastore.Remote // set when sealed or found again; Off is that of off
	lost   bool             // the bytes cannot be read: the log says so, the tree stays as it is
}

// end is the offset in the file after the chunk's last byte.
func (c *chunk) end() uint64 { return c.pieces[len(c.pieces)-1].End() }

// flusher places the unplaced content of one cut. Its methods are called from
// one goroutine; stripes are sealed and placed by others, at most
// stripesInFlight.
type flusher struct {
	p      *publisher
	cut    *metastore.Snapshot
	cutSeq uint64
	log    *logWriter
	cutter *chunker.Cutter

	policies map[Ino]erasure.Policy // of directories
	open     []*openStripe          // the one that was used last at the end
	again    []*chunk               // found by hash in stripes already placed, or lost
	lost     int64                  // bytes that cannot be read

	group    *errgroup.Group
	groupCtx context.Context
	mu       sync.Mutex
	placed   []stripe.Placed // guarded by mu
}

// openStripe is a stripe being filled. It takes chunks of one policy only.
type openStripe struct {
	policy  erasure.Policy
	builder *stripe.Builder
	chunks  []*chunk // by slice number
}

func (p *publisher) newFlusher(ctx context.Context, cut *metastore.Snapshot, cutSeq uint64, log *logWriter) (*flusher, error) {
	bundle, err := p.keys.Bundle(p.keys.Epoch())
	if err != nil {
		return nil, err
	}
	cutter, err := chunker.New(bundle.Dedup, chunker.DefaultParams())
	if err != nil {
		return nil, err
	}
	f := &flusher{p: p, cut: cut, cutSeq: cutSeq, log: log, cutter: cutter, policies: make(map[Ino]erasure.Policy)}
	f.group, f.groupCtx = errgroup.WithContext(ctx)
	f.group.SetLimit(stripesInFlight)
	return f, nil
}

// run places everything that is unplaced at the cut and returns the stripes
// that hold it, for Publish.
func (f *flusher) run() ([]stripe.Placed, error) {
	err := f.files()
	for err == nil && len(f.open) > 0 {
		err = f.sealStripe(f.open[0])
	}
	if err == nil {
		err = f.commitAgain()
	}
	err = errors.Join(err, f.group.Wait())
	return f.placed, err
}

// files walks the inodes with unplaced extents, in order of inode: files made
// together share stripes.
func (f *flusher) files() error {
	seen := make(map[Ino]struct{})
	if err := f.cut.Unplaced(0, func(u metastore.Unplaced) bool {
		if u.Segment == 0 {
			f.lost += int64(u.Len)
		} else {
			seen[u.Ino] = struct{}{}
		}
		return true
	}); err != nil {
		return fmt.Errorf("list unplaced extents: %w", err)
	}
	orphans := make(map[Ino]struct{})
	if err := f.cut.Orphans(func(ino Ino) bool { orphans[ino] = struct{}{}; return true }); err != nil {
		return err
	}
	inos := make([]Ino, 0, len(seen))
	for ino := range seen {
		// What is unlinked will not be in the recovered volume.
		if _, orphan := orphans[ino]; !orphan {
			inos = append(inos, ino)
		}
	}
	sort.Slice(inos, func(i, j int) bool { return inos[i] < inos[j] })
	for _, ino := range inos {
		if err := f.file(ino); err != nil {
			return fmt.Errorf("flush inode %d: %w", ino, err)
		}
	}
	return nil
}

// file cuts the unplaced runs of one file. A run of very many extents is cut in
// parts, so that what is held of it is bounded.
func (f *flusher) file(ino Ino) error {
	policy, err := f.policy(ino)
	if err != nil {
		return err
	}
	fresh := true // nothing of the file is placed: it was written front to back
	if err := f.cut.Extents(ino, 0, 1<<63, func(e metastore.Extent) bool {
		fresh = !e.HasRemote
		return fresh
	}); err != nil {
		return err
	}
	for at := uint64(0); ; {
		var run []metastore.Extent
		if err := f.cut.Extents(ino, at, 1<<63, func(e metastore.Extent) bool {
			n, unplaced := len(run), !e.HasRemote && !e.Lost()
			if n > 0 && (!unplaced || run[n-1].End() != e.Off || n == runExtentsMax) {
				return false
			}
			if unplaced {
				run = append(run, e)
			}
			return true
		}); err != nil {
			return err
		}
		if len(run) == 0 {
			break
		}
		if err := f.cutRun(ino, policy, run, fresh); err != nil {
			return err
		}
		at = run[len(run)-1].End()
	}
	if i := f.opened(policy); i >= 0 && policy.Mode == erasure.ModeFile {
		return f.sealStripe(f.open[i]) // stripes of this file alone
	}
	return nil
}

// runExtentsMax bounds the extents of a run that are looked at together.
const runExtentsMax = 64 << 10

// cutRun cuts adjoining unplaced extents into chunks: by content where the file
// was written front to back, else on a fixed grid. Bytes that cannot be read
// any more are left out, and hold nothing else up.
func (f *flusher) cutRun(ino Ino, policy erasure.Policy, run []metastore.Extent, fresh bool) error {
	st, err := f.stripe(policy)
	if err != nil {
		return err
	}
	most := st.builder.SliceBytesMax()
	for len(run) > 0 {
		r := &runReader{store: f.p.v.store, extents: run}
		start, end := run[0].Off, run[len(run)-1].End()
		cut := func(data []byte) error {
			for part := range slices.Chunk(data, most) {
				c := &chunk{ino: ino, off: start, pieces: trim(run, start, start+uint64(len(part)))}
				start += uint64(len(part))
				if err := f.add(c, policy, part); err != nil {
					return err
				}
			}
			return nil
		}
		if fresh {
			err = f.cutter.Cut(r, cut)
		} else {
			err = cutFixed(r, start, end, cut)
		}
		if err != nil {
			return err
		}
		if r.lost.Len > 0 {
			f.lost += int64(r.lost.Len)
			f.again = append(f.again, &chunk{ino: ino, off: r.lost.Off, pieces: []metastore.Extent{r.lost}, lost: true})
		}
		run = trim(run, max(r.lost.End(), start), end)
	}
	if len(f.again) >= piecesPerCommit {
		return f.commitAgain()
	}
	return nil
}

func cutFixed(r io.Reader, start, end uint64, cut func([]byte) error) error {
	for part := range chunker.FixedCut(int64(start), int64(end-start), fixedSliceBytes) {
		buf := make([]byte, part.Len)
		n, err := io.ReadFull(r, buf)
		ended := err == io.EOF || err == io.ErrUnexpectedEOF
		if err != nil && !ended {
			return err
		}
		if n > 0 {
			if err := cut(buf[:n]); err != nil {
				return err
			}
		}
		if ended {
			return nil
		}
	}
	return nil
}

// trim returns the parts of sorted extents inside [from, to).
func trim(extents []metastore.Extent, from, to uint64) []metastore.Extent {
	i := sort.Search(len(extents), func(i int) bool { return extents[i].End() > from })
	var out []metastore.Extent
	for ; i < len(extents) && extents[i].Off < to; i++ {
		e := extents[i]
		out = append(out, slice(e, max(e.Off, from), min(e.End(), to)))
	}
	return out
}

// runReader reads the plaintext of adjoining extents from the local store, up
// to the first bytes that cannot be read.
type runReader struct {
	store   *cache.Store
	extents []metastore.Extent
	at      uint32           // in extents[0]
	lost    metastore.Extent // what cannot be read; Len is 0 where there is nothing
}

func (r *runReader) Read(p []byte) (int, error) {
	if len(r.extents) == 0 || r.lost.Len > 0 {
		return 0, io.EOF
	}
	e := r.extents[0]
	off := int(e.LocalOff + r.at)
	n := min(len(p), int(e.Len-r.at))
	block := min(cache.BlockBytes-off%cache.BlockBytes, int(e.Len-r.at)) // to the end of off's
	err := r.store.ReadAt(e.Local, off, p[:n])
	if unreadable(err) && n > block {
		n = block
		err = r.store.ReadAt(e.Local, off, p[:n])
	}
	if unreadable(err) {
		if errors.Is(err, cache.ErrEvicted) {
			block = int(e.Len - r.at)
		}
		r.lost = slice(e, e.Off+uint64(r.at), e.Off+uint64(r.at)+uint64(block))
		return 0, io.EOF
	}
	if err != nil {
		return 0, fmt.Errorf("read unplaced bytes from segment %d: %w", e.Local.Segment, err)
	}
	if r.at += uint32(n); r.at == e.Len {
		r.extents, r.at = r.extents[1:], 0
	}
	return n, nil
}

// unreadable tells damage from a store that is closed or a caller that gave up.
func unreadable(err error) bool {
	return errors.Is(err, cache.ErrCorrupt) || errors.Is(err, cache.ErrEvicted) || errors.Is(err, syscall.EIO)
}

// add gives a chunk to the policy's open stripe, or finds it among those
// already placed. data is valid during the call only.
func (f *flusher) add(c *chunk, policy erasure.Policy, data []byte) error {
	if err := f.p.yield(f.groupCtx, max(len(data), smallFileWork)); err != nil {
		return err
	}
	bundle, err := f.p.keys.Bundle(f.p.keys.Epoch())
	if err != nil {
		return err
	}
	key := bundle.Dedup
	if policy != f.p.policy {
		key = chunker.Hash(key, []byte(policy.String())) // found again under this policy only
	}
	c.hash = chunker.Hash(key, data)
	if remote, ok := f.find(c.hash, len(data)); ok {
		c.remote = remote
		f.again = append(f.again, c)
		if len(f.again) >= piecesPerCommit {
			return f.commitAgain()
		}
		return nil
	}
	stored, compressed := f.p.pack.Compress(nil, data)
	if !compressed {
		stored = append([]byte(nil), data...)
	}
	for {
		st, err := f.stripe(policy)
		if err != nil {
			return err
		}
		if _, ok := st.builder.Add(stored, len(data), compressed); ok {
			st.chunks = append(st.chunks, c)
			return nil
		}
		if st.builder.Len() == 0 { // the pool has just shrunk: the next attempt cuts smaller
			return fmt.Errorf("a slice of %d bytes does not fit a stripe of %d", len(stored), st.builder.SliceBytesMax())
		}
		if err := f.sealStripe(st); err != nil {
			return err
		}
	}
}

// opened finds the policy's open stripe; -1 where there is none.
func (f *flusher) opened(policy erasure.Policy) int {
	return slices.IndexFunc(f.open, func(st *openStripe) bool { return st.policy == policy })
}

// stripe returns the policy's open stripe, and opens one where there is none.
func (f *flusher) stripe(policy erasure.Policy) (*openStripe, error) {
	if i := f.opened(policy); i >= 0 {
		st := f.open[i]
		f.open = append(slices.Delete(f.open, i, i+1), st)
		return st, nil
	}
	if len(f.open) == openStripesMax {
		if err := f.sealStripe(f.open[0]); err != nil {
			return nil, err
		}
	}
	b, err := f.p.stripes.NewBuilder(policy, metastore.PurposeContent)
	if err != nil {
		return nil, fmt.Errorf("policy %s: %w", policy, err)
	}
	st := &openStripe{policy: policy, builder: b}
	f.open = append(f.open, st)
	return st, nil
}

// find looks a chunk up among the slices already placed. A stripe that is
// condemned or below k+2 shards takes no new references.
func (f *flusher) find(hash [32]byte, n int) (metastore.Remote, bool) {
	remote, err := f.p.v.db.Dedup(hash)
	if err != nil || int(remote.SliceLen) != n {
		return remote, false
	}
	info, err := f.p.v.db.Stripe(remote.Stripe)
	if err != nil || info.Condemned || f.p.stripes.Health(&info).Shards < stripe.Enough(info.K, info.M) {
		return remote, false
	}
	return remote, true
}

// sealStripe hands an open stripe to the workers, in parts where much of it is
// empty.
func (f *flusher) sealStripe(st *openStripe) error {
	f.open = slices.DeleteFunc(f.open, func(other *openStripe) bool { return other == st })
	if st.builder.Len() == 0 {
		return nil
	}
	chunks := st.chunks
	for _, part := range st.builder.Split() {
		own := chunks[:part.Len()]
		chunks = chunks[part.Len():]
		f.group.Go(func() error { return f.place(part, own) })
	}
	return f.groupCtx.Err()
}

// place seals a stripe, puts it on the nodes, and points its chunks to it.
func (f *flusher) place(builder *stripe.Builder, chunks []*chunk) error {
	sealed, err := f.p.stripes.Seal(builder)
	if err != nil {
		return err
	}
	for i, c := range chunks {
		c.remote = sealed.Slices[i]
	}
	info, err := f.p.stripes.Place(f.groupCtx, sealed)
	f.p.stripes.Release(sealed)
	if err != nil {
		return err
	}
	info.CreatedSeq = f.cutSeq
	f.p.mu.Lock()
	f.p.unpublished[sealed.ID] = struct{}{}
	f.p.mu.Unlock()
	if err := f.commit(&placedStripe{sealed.ID, info, sealed.Salt}, chunks); err != nil {
		return err
	}
	f.mu.Lock()
	f.placed = append(f.placed, stripe.Placed{ID: sealed.ID, Info: &info, Manifest: sealed.Manifest})
	f.mu.Unlock()
	return nil
}

type placedStripe struct {
	id   erasure.StripeID
	info metastore.StripeInfo
	salt [32]byte
}

func (f *flusher) commitAgain() error {
	chunks := f.again
	f.again = nil
	if len(chunks) == 0 {
		return nil
	}
	return f.commit(nil, chunks)
}

// commit re-points the live extents that still hold the chunks' bytes, and
// writes the cut's extents into the log.
func (f *flusher) commit(st *placedStripe, chunks []*chunk) error {
	if st != nil {
		if err := f.log.stripe(st.id, st.info); err != nil {
			return err
		}
	}
	for _, c := range chunks {
		for _, e := range c.pieces {
			if err := f.log.extent(c.ino, point(e, c)); err != nil {
				return err
			}
		}
	}
	chunks = splitChunks(chunks)
	sort.SliceStable(chunks, func(i, j int) bool {
		a, b := chunks[i], chunks[j]
		return a.ino < b.ino || (a.ino == b.ino && a.off < b.off)
	})
	for first := true; first || len(chunks) > 0; first = false {
		n, pieces := 0, 0
		for n < len(chunks) && (n == 0 || pieces+len(chunks[n].pieces) <= piecesPerCommit) {
			pieces += len(chunks[n].pieces)
			n++
		}
		batch := chunks[:n]
		chunks = chunks[n:]
		if _, err := f.p.commit(func(t *tx) error {
			if first && st != nil {
				t.PutStripe(st.id, st.info)
				t.PutSalt(st.id, st.salt)
			}
			return f.repoint(t, batch, st != nil)
		}); err != nil {
			return err
		}
		f.p.countPlaced(batch)
	}
	return nil
}

// splitChunks cuts chunks of many small pieces, so that each part fits a commit.
func splitChunks(chunks []*chunk) []*chunk {
	out := make([]*chunk, 0, len(chunks))
	for _, c := range chunks {
		for pieces := c.pieces; len(pieces) > 0; {
			n := min(len(pieces), piecesPerCommit)
			part := *c
			part.off, part.pieces = pieces[0].Off, pieces[:n]
			part.remote.Off += uint32(part.off - c.off)
			pieces = pieces[n:]
			out = append(out, &part)
		}
	}
	return out
}

// point gives a piece of a chunk its remote place, if it has one.
func point(e metastore.Extent, c *chunk) metastore.Extent {
	if c.lost {
		return e
	}
	e.HasRemote, e.Remote = true, c.remote
	e.Remote.Off += uint32(e.Off - c.off)
	return e
}

// repoint gives the live extents inside the chunks their remote place, where
// they still hold what the cut saw: an extent written at or before the cut,
// and not placed, is the cut's. chunks are sorted by inode and offset.
func (f *flusher) repoint(t *tx, chunks []*chunk, fresh bool) error {
	for len(chunks) > 0 {
		n := 1
		// Chunks so far apart that no extent reaches both are looked up apart.
		for n < len(chunks) && chunks[n].ino == chunks[0].ino && chunks[n].off < chunks[n-1].end()+writeMaxBytes {
			n++
		}
		if err := f.repointFile(t, chunks[:n]); err != nil {
			return err
		}
		if fresh {
			for _, c := range chunks[:n] {
				if c.remote.Off == 0 {
					t.PutDedup(c.hash, c.remote)
				}
			}
		}
		chunks = chunks[n:]
	}
	return nil
}

func (f *flusher) repointFile(t *tx, chunks []*chunk) error {
	ino := chunks[0].ino
	from, to := chunks[0].off, chunks[len(chunks)-1].end()
	starts := make(map[uint64]bool) // live extents of the cut, by where they or their parts start
	var live []metastore.Extent
	if err := t.v.db.Extents(ino, from, to, func(e metastore.Extent) bool {
		starts[e.Off] = true
		if !e.HasRemote && e.Seq <= f.cutSeq {
			live = append(live, e)
		}
		return true
	}); err != nil {
		return err
	}
	for _, e := range live {
		t.DeleteExtent(ino, e)
		for at := e.Off; at < e.End(); {
			// The chunk that covers at, else the next one after it.
			i := sort.Search(len(chunks), func(i int) bool { return chunks[i].end() > at })
			to := e.End()
			var piece metastore.Extent
			if i < len(chunks) && chunks[i].off <= at {
				to = min(to, chunks[i].end())
				piece = point(slice(e, at, to), chunks[i])
			} else {
				if i < len(chunks) {
					to = min(to, chunks[i].off)
				}
				piece = slice(e, at, to)
			}
			t.PutExtent(ino, piece)
			starts[piece.Off] = true
			at = to
		}
	}
	// The log has an extent at each of these offsets. Where the tree has none,
	// because it has changed since the cut, the next log must say so.
	for _, c := range chunks {
		for _, e := range c.pieces {
			if !starts[e.Off] {
				if err := t.DeleteExtentAt(ino, e.Off); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// What takes as long as cutting so many bytes.
const (
	smallFileWork = 16 << 10 // a chunk, however short
	entryWork     = 256      // finding and writing an entry of the log
)

// yield lets the application go first: while it works, background work takes
// small turns, unless somebody waits for it or the journal fills.
func (p *publisher) yield(ctx context.Context, work int) error {
	// At most 50 ms for each 256 KiB, or what takes as long: background work
	// always gets on.
	if p.yielded += work; p.yielded < 256<<10 {
		return ctx.Err()
	}
	p.yielded = 0
	if p.urgent() {
		return ctx.Err()
	}
	for range 10 {
		if !p.busy() {
			break
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}
