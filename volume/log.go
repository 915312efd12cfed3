package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/chunker"
	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/stripe"
	"github.com/defs-fs/defs/volume/headpb"
)

// The log is a sequence of entries, each a tree key with its value, or without
// when the key is gone. Entries fill slices, which are compressed and packed
// into stripes. Applying the slices in order to the state of the cut before
// gives the state of this cut. FORMAT.md, "Log".

const (
	logVersion    = 1
	logPut        = 1
	logDelete     = 2
	logSliceBytes = 256 << 10
	// logSliceBytesMax bounds a slice when reading: one entry may exceed
	// logSliceBytes.
	logSliceBytesMax = logSliceBytes + metastore.KeyBytesMax + metastore.ValueBytesMax + 64
)

// logWriter collects a cut's entries and places them as they fill stripes.
type logWriter struct {
	p      *publisher
	ctx    context.Context
	policy erasure.Policy
	group  errgroup.Group // places stripes; its limit bounds the memory of a log

	mu      sync.Mutex
	buf     []byte          // guarded by mu: the open slice
	builder *stripe.Builder // guarded by mu
	out     []*logStripe    // guarded by mu: in order
	entries int             // guarded by mu
}

// logStripe is one stripe of the log. Its fields are set when it is placed.
type logStripe struct {
	builder *stripe.Builder
	ref     *headpb.Stripe
	placed  stripe.Placed
}

// logStripesInFlight bounds the log stripes being placed.
const logStripesInFlight = 2

func (p *publisher) newLogWriter(ctx context.Context) *logWriter {
	w := &logWriter{p: p, ctx: ctx, policy: p.policy}
	w.policy.ShardBytes = max(w.policy.ShardBytes, erasure.DefaultShardBytes) // any log slice fits one shard
	w.group.SetLimit(logStripesInFlight)
	return w
}

// wait returns when nothing is being placed any more.
func (w *logWriter) wait() { w.group.Wait() }

// yield lets the application go first before an entry is written.
func (w *logWriter) yield() error { return w.p.yield(w.ctx, entryWork) }

// put appends "key has value at the cut".
func (w *logWriter) put(key, value []byte) error { return w.add(logPut, key, value) }

// delete appends "key is gone at the cut".
func (w *logWriter) delete(key []byte) error { return w.add(logDelete, key, nil) }

func (w *logWriter) extent(ino Ino, e metastore.Extent) error {
	return w.put(metastore.PublicExtent(ino, e))
}

// stripe appends what is known of a stripe. No head names one before a majority
// of its keepers has the index record, and the log says so.
func (w *logWriter) stripe(id erasure.StripeID, info metastore.StripeInfo) error {
	if info.IndexAcks == 0 {
		info.IndexKeepers = placement.KeeperCount(info.M, info.Mirrored, math.MaxInt)
		info.IndexAcks = info.IndexKeepers/2 + 1
	}
	value, err := info.MarshalBinary()
	if err != nil {
		return err
	}
	return w.put(append([]byte{'s'}, id[:]...), value)
}

// add appends an entry. It waits for the network, holding no lock, when as many
// stripes are full as may be placed at a time.
func (w *logWriter) add(kind byte, key, value []byte) error {
	full, err := w.append(kind, key, value)
	w.place(full)
	return err
}

func (w *logWriter) append(kind byte, key, value []byte) (full []*logStripe, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.buf) == 0 {
		w.buf = append(w.buf, logVersion)
	}
	w.buf = append(w.buf, kind)
	w.buf = binary.AppendUvarint(w.buf, uint64(len(key)))
	w.buf = append(w.buf, key...)
	if kind == logPut {
		w.buf = binary.AppendUvarint(w.buf, uint64(len(value)))
		w.buf = append(w.buf, value...)
	}
	w.entries++
	if len(w.buf) >= logSliceBytes {
		return w.endSlice()
	}
	return nil, nil
}

// endSlice packs the open slice into the open stripe and returns the stripe
// that it has filled, if any. Called with mu held.
func (w *logWriter) endSlice() (full []*logStripe, err error) {
	if len(w.buf) == 0 {
		return nil, nil
	}
	plain := w.buf
	w.buf = nil
	stored, compressed := plain, false
	if packed, ok := w.p.pack.Compress(nil, plain); ok {
		stored, compressed = packed, true
	}
	for {
		if w.builder == nil {
			b, err := w.p.stripes.NewBuilder(w.policy, metastore.PurposeLog)
			if err != nil {
				return full, err
			}
			w.builder = b
		}
		if _, ok := w.builder.Add(stored, len(plain), compressed); ok {
			return full, nil
		}
		if w.builder.Len() == 0 {
			return full, fmt.Errorf("a log slice of %d bytes does not fit a stripe of %d", len(stored), w.builder.SliceBytesMax())
		}
		full = append(full, w.endStripe()...)
	}
}

// endStripe closes the open stripe: it takes its place in the log's order.
// Called with mu held.
func (w *logWriter) endStripe() []*logStripe {
	b := w.builder
	w.builder = nil
	if b == nil || b.Len() == 0 {
		return nil
	}
	s := &logStripe{builder: b}
	w.out = append(w.out, s)
	return []*logStripe{s}
}

// place seals and places stripes in the background.
func (w *logWriter) place(full []*logStripe) {
	for _, s := range full {
		w.group.Go(func() error { return w.placeNow(s) })
	}
}

func (w *logWriter) placeNow(s *logStripe) error {
	sealed, err := w.p.stripes.Seal(s.builder)
	if err != nil {
		return err
	}
	s.builder = nil
	info, err := w.p.stripes.Place(w.ctx, sealed)
	w.p.stripes.Release(sealed)
	if err != nil {
		return err
	}
	s.ref = &headpb.Stripe{Id: sealed.ID[:]}
	for _, r := range sealed.Slices {
		s.ref.Slices = append(s.ref.Slices, &headpb.Slice{Offset: r.StripeOff, StoredBytes: r.StoredLen, PlainBytes: r.SliceLen, Compressed: r.Compressed})
	}
	s.placed = stripe.Placed{ID: sealed.ID, Info: &info, Manifest: sealed.Manifest}
	return nil
}

// finish places what is left and returns the log's stripes in order, without
// infos: those are final once the stripes are published.
func (w *logWriter) finish() (refs []*headpb.Stripe, placed []stripe.Placed, err error) {
	w.mu.Lock()
	full, err := w.endSlice()
	full = append(full, w.endStripe()...)
	w.mu.Unlock()
	w.place(full)
	if err = errors.Join(err, w.group.Wait()); err != nil {
		return nil, nil, err
	}
	for _, s := range w.out {
		refs, placed = append(refs, s.ref), append(placed, s.placed)
	}
	return refs, placed, nil
}

// logEntry is one decoded entry; value is nil when the key is gone.
type logEntry struct{ key, value []byte }

var errLog = errors.New("damaged log")

// decodeLog calls fn with each entry of one slice's plaintext.
func decodeLog(b []byte, fn func(logEntry) error) error {
	if len(b) == 0 || b[0] != logVersion {
		return fmt.Errorf("%w: unknown version", errLog)
	}
	b = b[1:]
	take := func(max int) ([]byte, error) {
		n, used := binary.Uvarint(b)
		if used <= 0 || n > uint64(max) || n > uint64(len(b)-used) {
			return nil, fmt.Errorf("%w: length out of range", errLog)
		}
		out := b[used : used+int(n) : used+int(n)]
		b = b[used+int(n):]
		return out, nil
	}
	for len(b) > 0 {
		kind := b[0]
		b = b[1:]
		if kind != logPut && kind != logDelete {
			return fmt.Errorf("%w: unknown entry %d", errLog, kind)
		}
		key, err := take(metastore.KeyBytesMax)
		if err != nil {
			return err
		}
		e := logEntry{key: key}
		if kind == logPut {
			if e.value, err = take(metastore.ValueBytesMax); err != nil {
				return err
			}
		}
		if err := fn(e); err != nil {
			return err
		}
	}
	return nil
}

// readLogSlice returns the plaintext of one slice of a log stripe.
func readLogSlice(data []byte, s *headpb.Slice, open func(stored []byte, storedBytes int) ([]byte, error), unpack *chunker.Compressor) ([]byte, error) {
	if s.PlainBytes > logSliceBytesMax || s.StoredBytes > logSliceBytesMax {
		return nil, fmt.Errorf("%w: slice of %d bytes", errLog, s.PlainBytes)
	}
	stored, err := open(data, int(s.StoredBytes))
	if err != nil || !s.Compressed {
		return stored, err
	}
	return unpack.Decompress(nil, stored, int(s.PlainBytes))
}
