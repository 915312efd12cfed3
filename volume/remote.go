package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/chunker"
	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/stripe"
)

// blockBytesMax is the unit in which stripe data is fetched and cached:
// neighbours of a small file come with it, a random read moves little.
const blockBytesMax = 256 << 10

// readSwapBytes is how far reads of a sequential reader may be out of order.
const readSwapBytes = 2 << 20

const (
	// readaheadStripes bounds the whole stripes fetched ahead of readers.
	readaheadStripes = 4
	// readaheadStripeBytesMax is the largest stripe that is fetched whole.
	readaheadStripeBytesMax = 16 << 20
	// sliceReadMax bounds one read of a slice with all that it fetches.
	sliceReadMax = 27 * time.Second
)

// fetcher reads placed content: from the cached blocks of a stripe, else from
// the pool. It implements remoteReader.
type fetcher struct {
	store    *cache.Store
	db       *metastore.DB
	stripes  *stripe.Store
	keys     *keyring
	volume   [16]byte
	unpack   *chunker.Compressor
	learned  func(id [16]byte, info metastore.StripeInfo) // new holders
	salted   func(id [16]byte, salt [32]byte)
	ctx      context.Context // of read-ahead; ends at close
	stop     context.CancelFunc
	inflight sync.WaitGroup // read-ahead goroutines
	buffers  sync.Pool      // of *[]byte

	mu     sync.Mutex
	calls  map[blockKey]*fetchCall           // guarded by mu: fetches under way, shared by their readers
	ahead  int                               // guarded by mu: stripes being read ahead
	salts  map[[16]byte][32]byte             // guarded by mu; bounded by saltsMax
	unzips map[sliceKey][]byte               // guarded by mu: last decompressed slices, bounded by unzipsMax
	infos  map[[16]byte]metastore.StripeInfo // guarded by mu; bounded by infosMax
	ends   map[Ino]uint64                    // guarded by mu: where the last remote read of a file ended; bounded by endsMax
}

const (
	saltsMax  = 8192
	infosMax  = 512
	unzipsMax = 16
	endsMax   = 1024
)

type blockKey struct {
	stripe [16]byte
	first  uint32
	count  uint32
}

type sliceKey struct {
	stripe [16]byte
	slice  uint32
}

// fetchCall is one fetch that several readers may wait for.
type fetchCall struct {
	done   chan struct{}
	blocks [][]byte // of equal length
	err    error
}

func newFetcher(v *Volume, stripes *stripe.Store, keys *keyring, id [16]byte) (*fetcher, error) {
	unpack, err := chunker.NewCompressor(2)
	if err != nil {
		return nil, err
	}
	f := &fetcher{
		store: v.store, db: v.db, stripes: stripes, keys: keys, volume: id, unpack: unpack,
		calls: make(map[blockKey]*fetchCall), salts: make(map[[16]byte][32]byte),
		unzips: make(map[sliceKey][]byte), infos: make(map[[16]byte]metastore.StripeInfo),
		ends: make(map[Ino]uint64),
	}
	f.ctx, f.stop = context.WithCancel(context.Background())
	return f, nil
}

func (f *fetcher) close() {
	f.stop()
	f.inflight.Wait()
}

// ReadSlice fills dst with plaintext of the slice at, from off bytes past
// at.Off on.
func (f *fetcher) ReadSlice(ctx context.Context, at metastore.Remote, off int, dst []byte) error {
	// Salt and data may each take as long as a stripe's read may.
	bounded, cancel := context.WithTimeout(ctx, sliceReadMax)
	defer cancel()
	err := f.readSlice(bounded, at, off, dst)
	if err != nil && ctx.Err() == nil && bounded.Err() != nil {
		// Out of time is a failure to read, not an interruption by the caller.
		return fmt.Errorf("stripe %v slice %d: not read in %v: %v", erasure.StripeID(at.Stripe), at.Slice, sliceReadMax, err)
	}
	return err
}

func (f *fetcher) readSlice(ctx context.Context, at metastore.Remote, off int, dst []byte) error {
	info, err := f.info(at.Stripe)
	if err != nil {
		return fmt.Errorf("stripe %x: %w", at.Stripe, err)
	}
	start := int(at.Off) + off
	if start < 0 || start+len(dst) > int(at.SliceLen) {
		return fmt.Errorf("stripe %x slice %d: read %d+%d of %d bytes", at.Stripe, at.Slice, start, len(dst), at.SliceLen)
	}
	bundle, err := f.keys.Bundle(info.Epoch)
	if err != nil {
		return err
	}
	salt, err := f.salt(ctx, at.Stripe, info)
	if err != nil {
		return err
	}
	if at.Compressed {
		return f.readCompressed(ctx, at, &info, bundle.Content, salt, start, dst)
	}
	return f.openRange(ctx, at, &info, bundle.Content, salt, start, dst)
}

// openRange opens the 64 KiB segments around the range into dst: those that it
// wants whole, and whose block is in memory, without any copy.
func (f *fetcher) openRange(ctx context.Context, at metastore.Remote, info *metastore.StripeInfo, key, salt [32]byte, start int, dst []byte) error {
	if len(dst) == 0 {
		return nil
	}
	if start+len(dst) > int(at.StoredLen) {
		return fmt.Errorf("stripe %x slice %d: read %d+%d of %d stored bytes", at.Stripe, at.Slice, start, len(dst), at.StoredLen)
	}
	var commitment [seal.CommitmentBytes]byte
	if err := f.readBlocks(ctx, at.Stripe, info, int(at.StripeOff), commitment[:]); err != nil {
		return err
	}
	c := seal.SliceContext{Volume: f.volume, Stripe: at.Stripe, Slice: at.Slice, Epoch: info.Epoch, Length: at.StoredLen, Purpose: seal.PurposeContent}
	opener, err := seal.NewSliceOpener(key, salt, c, commitment[:])
	if err != nil {
		return fmt.Errorf("stripe %x slice %d: %w", at.Stripe, at.Slice, err)
	}
	first, sealedOff, sealedLen := seal.SegmentRange(int(at.StoredLen), start, len(dst))
	blocks, err := f.blocks(ctx, at.Stripe, info, int(at.StripeOff)+sealedOff, sealedLen)
	if err != nil {
		return err
	}
	buf := f.buffer(seal.SealedBytes(seal.SegmentBytes) + seal.SegmentBytes)
	defer f.buffers.Put(buf)
	for i := first; len(dst) > 0; i++ {
		_, off, n := seal.SegmentRange(int(at.StoredLen), i*seal.SegmentBytes, 1)
		sealed := blocks.view(int(at.StripeOff)+off, n)
		if sealed == nil {
			sealed = (*buf)[:n]
			if err := f.readBlocks(ctx, at.Stripe, info, int(at.StripeOff)+off, sealed); err != nil {
				return err
			}
		}
		skip := start - i*seal.SegmentBytes
		length := min(seal.SegmentBytes, int(at.StoredLen)-i*seal.SegmentBytes)
		want := min(length-skip, len(dst))
		out := dst[:0:want]
		if want < length {
			out = (*buf)[len(*buf)-seal.SegmentBytes:][:0]
		}
		plain, err := opener.Open(out, i, sealed)
		if err != nil {
			return fmt.Errorf("stripe %x slice %d: %w", at.Stripe, at.Slice, err)
		}
		if want < length {
			copy(dst, plain[skip:skip+want])
		}
		dst, start = dst[want:], start+want
	}
	return nil
}

// buffer returns a pooled buffer of n bytes.
func (f *fetcher) buffer(n int) *[]byte {
	buf, _ := f.buffers.Get().(*[]byte)
	if buf == nil || cap(*buf) < n {
		b := make([]byte, n)
		return &b
	}
	*buf = (*buf)[:n]
	return buf
}

// readCompressed unpacks the whole slice, and keeps the last few for the reads
// that follow.
func (f *fetcher) readCompressed(ctx context.Context, at metastore.Remote, info *metastore.StripeInfo, key, salt [32]byte, start int, dst []byte) error {
	k := sliceKey{at.Stripe, at.Slice}
	f.mu.Lock()
	plain := f.unzips[k]
	f.mu.Unlock()
	if plain == nil {
		stored := make([]byte, at.StoredLen)
		whole := at
		whole.Off, whole.SliceLen = 0, at.StoredLen
		if err := f.openRange(ctx, whole, info, key, salt, 0, stored); err != nil {
			return err
		}
		var err error
		if plain, err = f.unpack.Decompress(nil, stored, int(at.SliceLen)); err != nil {
			return fmt.Errorf("stripe %x slice %d: %w", at.Stripe, at.Slice, err)
		}
		f.mu.Lock()
		if len(f.unzips) >= unzipsMax {
			clear(f.unzips)
		}
		f.unzips[k] = plain
		f.mu.Unlock()
	}
	copy(dst, plain[start:])
	return nil
}

func blockBytes(info *metastore.StripeInfo) int { return min(int(info.ShardBytes), blockBytesMax) }

// blockRun is adjoining blocks of a stripe; those that are not in memory are
// nil.
type blockRun struct {
	size   int // of each
	first  int
	blocks [][]byte
}

// view returns stripe data [off, off+n) where one block in memory holds it,
// else nil.
func (r *blockRun) view(off, n int) []byte {
	i, in := off/r.size-r.first, off%r.size
	if i < 0 || i >= len(r.blocks) || in+n > len(r.blocks[i]) {
		return nil
	}
	return r.blocks[i][in : in+n]
}

// blocks returns the blocks around stripe data [off, off+n), fetching those
// that are not cached.
func (f *fetcher) blocks(ctx context.Context, id [16]byte, info *metastore.StripeInfo, off, n int) (*blockRun, error) {
	size := blockBytes(info)
	run := &blockRun{size: size, first: off / size}
	run.blocks = make([][]byte, (off+n-1)/size-run.first+1)
	for i := range run.blocks {
		block := run.first + i
		if run.blocks[i] = f.store.SliceInMemory(id, uint32(block)); run.blocks[i] != nil || f.store.GetSlice(id, uint32(block), 0, nil) {
			continue
		}
		// All blocks that follow are fetched in one go.
		fetched, err := f.fetch(ctx, id, info, block, len(run.blocks)-i)
		if err != nil {
			return nil, err
		}
		copy(run.blocks[i:], fetched)
		break
	}
	return run, nil
}

// readBlocks copies stripe data [off, off+len(dst)) out of blocks, fetching
// those that are not cached.
func (f *fetcher) readBlocks(ctx context.Context, id [16]byte, info *metastore.StripeInfo, off int, dst []byte) error {
	size := blockBytes(info)
	for len(dst) > 0 {
		block, in := off/size, off%size
		n := min(len(dst), size-in)
		if f.store.GetSlice(id, uint32(block), in, dst[:n]) {
			dst, off = dst[n:], off+n
			continue
		}
		// All blocks of this read that follow are fetched in one go.
		last := (off + len(dst) - 1) / size
		blocks, err := f.fetch(ctx, id, info, block, last-block+1)
		if err != nil {
			return err
		}
		for _, b := range blocks {
			n := copy(dst, b[in:])
			dst, in = dst[n:], 0
		}
		return nil
	}
	return nil
}

// fetch brings count blocks from the pool and caches them. Concurrent fetches
// of the same blocks share one, and a fetch of a whole stripe serves all that
// want a part of it.
func (f *fetcher) fetch(ctx context.Context, id [16]byte, info *metastore.StripeInfo, first, count int) ([][]byte, error) {
	key := blockKey{id, uint32(first), uint32(count)}
	whole := blockKey{id, 0, uint32(stripeBlocks(info))}
	f.mu.Lock()
	call, skip := f.calls[key], 0
	if ahead := f.calls[whole]; call == nil && ahead != nil {
		call, skip = ahead, first
	}
	if call != nil {
		f.mu.Unlock()
		select {
		case <-call.done:
			if call.err == nil {
				return call.blocks[skip : skip+count], nil
			}
			if ctx.Err() != nil || !errors.Is(call.err, context.Canceled) {
				return nil, call.err
			}
			return f.fetch(ctx, id, info, first, count) // the one who fetched was interrupted
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	call = &fetchCall{done: make(chan struct{})}
	f.calls[key] = call
	f.mu.Unlock()

	call.blocks, call.err = f.fetchNow(ctx, id, info, first, count)
	f.mu.Lock()
	delete(f.calls, key)
	f.mu.Unlock()
	close(call.done)
	return call.blocks, call.err
}

// stripeBlocks counts the blocks of a stripe's data.
func stripeBlocks(info *metastore.StripeInfo) int {
	return info.K * int(info.ShardBytes) / blockBytes(info)
}

func (f *fetcher) fetchNow(ctx context.Context, id [16]byte, info *metastore.StripeInfo, first, count int) ([][]byte, error) {
	size := blockBytes(info)
	mine := *info
	parts, off, changed, err := f.stripes.ReadParts(ctx, id, &mine, first*size, count*size)
	if changed && f.learned != nil {
		f.learned(id, mine)
		f.forget(id)
	}
	if err != nil {
		return nil, err
	}
	// Blocks divide shards, and parts begin and end with blocks: what came
	// beside the wanted blocks is cached too.
	blocks := make([][]byte, 0, count)
	for _, part := range parts {
		for ; len(part) > 0; part, off = part[size:], off+size {
			block := off / size
			f.store.PutSlice(id, uint32(block), part[:size:size])
			if block >= first && block < first+count {
				blocks = append(blocks, part[:size:size])
			}
		}
	}
	return blocks, nil
}

func (f *fetcher) forget(id [16]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.infos, id)
}

func (f *fetcher) info(id [16]byte) (metastore.StripeInfo, error) {
	f.mu.Lock()
	info, ok := f.infos[id]
	f.mu.Unlock()
	if ok {
		return info, nil
	}
	info, err := f.db.Stripe(id)
	if err != nil {
		return info, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.infos) >= infosMax {
		clear(f.infos)
	}
	f.infos[id] = info
	return info, nil
}

// salt returns the stripe's salt from memory, the metastore, or any k holders.
func (f *fetcher) salt(ctx context.Context, id [16]byte, info metastore.StripeInfo) ([32]byte, error) {
	f.mu.Lock()
	salt, ok := f.salts[id]
	f.mu.Unlock()
	if ok {
		return salt, nil
	}
	salt, err := f.db.Salt(id)
	if errors.Is(err, metastore.ErrNotFound) {
		var changed bool
		salt, changed, err = f.stripes.Salt(ctx, id, &info)
		if changed && f.learned != nil {
			f.learned(id, info)
			f.forget(id)
		}
		if err == nil && f.salted != nil {
			f.salted(id, salt)
		}
	}
	if err != nil {
		return salt, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.salts) >= saltsMax {
		clear(f.salts)
	}
	f.salts[id] = salt
	return salt, nil
}

// sequential notes a read of [off, end) and reports whether it follows the one
// before, or starts the file. The kernel's own readahead may swap neighbours.
func (f *fetcher) sequential(ino Ino, off, end uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	last := f.ends[ino]
	if len(f.ends) >= endsMax {
		clear(f.ends)
	}
	f.ends[ino] = end
	return off <= last+readSwapBytes && last <= off+readSwapBytes
}

// busyAhead says that as many stripes are being read ahead as may be.
func (f *fetcher) busyAhead() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ahead >= readaheadStripes
}

// Ahead fetches the stripes behind upcoming extents whose bytes are not on
// this machine, whole and in the background. It never waits.
func (f *fetcher) Ahead(extents []metastore.Extent) {
	var last [16]byte
	for _, e := range extents {
		if !e.HasRemote || e.Remote.Stripe == last {
			continue
		}
		last = e.Remote.Stripe
		info, err := f.info(last)
		if err != nil {
			return
		}
		if info.K*int(info.ShardBytes) > readaheadStripeBytesMax {
			return
		}
		blocks := stripeBlocks(&info)
		var probe [1]byte
		if f.store.GetSlice(last, uint32(int(e.Remote.StripeOff)/blockBytes(&info)), 0, probe[:]) {
			continue
		}
		f.mu.Lock()
		_, busy := f.calls[blockKey{last, 0, uint32(blocks)}]
		if busy || f.ahead >= readaheadStripes || f.ctx.Err() != nil {
			f.mu.Unlock()
			if busy {
				continue
			}
			return
		}
		f.ahead++
		f.inflight.Add(1)
		f.mu.Unlock()
		id := last
		go func() {
			defer f.inflight.Done()
			defer func() {
				f.mu.Lock()
				f.ahead--
				f.mu.Unlock()
			}()
			if _, err := f.salt(f.ctx, id, info); err != nil {
				return
			}
			_, _ = f.fetch(f.ctx, id, &info, 0, blocks) // a read that needs it asks again, and tells
		}()
	}
}

// readAhead has the stripes fetched that a sequential reader of remote content
// will want next.
func (v *Volume) readAhead(ino Ino, extents []metastore.Extent, off, end uint64) {
	if v.network == nil || len(extents) == 0 {
		return
	}
	last := extents[len(extents)-1]
	if !last.HasRemote || (last.HasLocal() && v.store.Holds(last.Local.Segment)) {
		return
	}
	f := v.network.fetcher
	if !f.sequential(ino, off, end) || f.busyAhead() {
		return
	}
	info, err := f.info(last.Remote.Stripe)
	if err != nil {
		return
	}
	var next []metastore.Extent
	to := end + uint64(readaheadStripes*info.K)*uint64(info.ShardBytes)
	if err := v.db.Extents(ino, off, to, func(e metastore.Extent) bool {
		next = append(next, e)
		return len(next) < 4096
	}); err != nil {
		return
	}
	f.Ahead(next)
}
