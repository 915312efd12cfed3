package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/defs-fs/defs/chunker"
	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
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
	p   *publisher
	ctx context.Context

	mu      sync.Mutex
	buf     []byte          // guarded by mu: the open slice
	builder *stripe.Builder // guarded by mu
	out     []*headpb.Stripe
	placed  []stripe.Placed // guarded by mu
	entries int
}

func (p *publisher) newLogWriter(ctx context.Context) *logWriter { return &logWriter{p: p, ctx: ctx} }

// put appends "key has value at the cut".
func (w *logWriter) put(key, value []byte) error { return w.add(logPut, key, value) }

// delete appends "key is gone at the cut".
func (w *logWriter) delete(key []byte) error { return w.add(logDelete, key, nil) }

func (w *logWriter) extent(ino Ino, e metastore.Extent) error {
	return w.put(metastore.PublicExtent(ino, e))
}

func (w *logWriter) stripe(id erasure.StripeID, info metastore.StripeInfo) error {
	value, err := info.MarshalBinary()
	if err != nil {
		return err
	}
	return w.put(append([]byte{'s'}, id[:]...), value)
}

func (w *logWriter) add(kind byte, key, value []byte) error {
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
	return nil
}

// endSlice packs the open slice into the open stripe. Called with mu held.
func (w *logWriter) endSlice() error {
	if len(w.buf) == 0 {
		return nil
	}
	plain := w.buf
	w.buf = nil
	stored, compressed := plain, false
	if packed, ok := w.p.pack.Compress(nil, plain); ok {
		stored, compressed = packed, true
	}
	for {
		if w.builder == nil {
			b, err := w.p.stripes.NewBuilder(w.p.policy, metastore.PurposeLog)
			if err != nil {
				return err
			}
			w.builder = b
		}
		if _, ok := w.builder.Add(stored, len(plain), compressed); ok {
			return nil
		}
		if w.builder.Len() == 0 {
			return fmt.Errorf("a log slice of %d bytes does not fit a stripe of %d", len(stored), w.builder.SliceBytesMax())
		}
		if err := w.endStripe(); err != nil {
			return err
		}
	}
}

// endStripe seals and places the open stripe. Called with mu held: whoever
// adds to the log waits until its stripe is out, which bounds its memory.
func (w *logWriter) endStripe() error {
	b := w.builder
	w.builder = nil
	if b == nil || b.Len() == 0 {
		return nil
	}
	sealed, err := w.p.stripes.Seal(b)
	if err != nil {
		return err
	}
	info, err := w.p.stripes.Place(w.ctx, sealed)
	if err != nil {
		return err
	}
	ref := &headpb.Stripe{Id: sealed.ID[:]}
	for _, r := range sealed.Slices {
		ref.Slices = append(ref.Slices, &headpb.Slice{Offset: r.StripeOff, StoredBytes: r.StoredLen, PlainBytes: r.SliceLen, Compressed: r.Compressed})
	}
	w.out = append(w.out, ref)
	w.placed = append(w.placed, stripe.Placed{ID: sealed.ID, Info: &info, Manifest: sealed.Manifest})
	return nil
}

// finish places what is left and returns the log's stripes, without infos:
// those are final once the stripes are published.
func (w *logWriter) finish() (refs []*headpb.Stripe, placed []stripe.Placed, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.endSlice(); err != nil {
		return nil, nil, err
	}
	if err := w.endStripe(); err != nil {
		return nil, nil, err
	}
	return w.out, w.placed, nil
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
