package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/volume/headpb"
)

const (
	metaDir    = "meta"
	metaNewDir = "meta.new" // being built; of no meaning until it has been renamed
)

// errUnrepairable: what is left here and with the peers does not tell the state of the volume.
var errUnrepairable = errors.New("the local state cannot be repaired; recover the volume from its 24 words into another directory")

// Repair makes the closed volume in dir mountable again: it makes the journal's tail anew, and the metastore from the
// journal, or from the newest published head and the journal behind it. What is damaged is set aside, never deleted,
// and only replaced once the new is whole. transport must have joined the pool. Repair returns, in sentences, what it
// did. Content is left to RepairContent.
func Repair(ctx context.Context, dir string, dev *Device, transport p2p.Transport, o Options) (notes []string, err error) {
	o.EnsureDefaults()
	o.Dir, o.Key, o.Device = dir, [32]byte(dev.LocalKey), dev.Slot
	r := &repairer{o: o, dev: dev, transport: transport, metaKey: seal.LocalKey(o.Key).Derive("metastore", nil)}
	r.store, err = cache.Open(cache.Options{
		Dir: filepath.Join(dir, "journal"), Key: o.Key, Logger: o.Logger, SegmentBytes: o.SegmentBytes,
		MaxJournalBytes: o.JournalMaxBytes, MaxCleanBytes: o.CleanMaxBytes, Repair: true,
	})
	if err != nil {
		return nil, fmt.Errorf("repair: local segment store: %w", err)
	}
	err = r.run(ctx)
	if err = errors.Join(err, r.store.Close()); err != nil {
		err = fmt.Errorf("repair: %w", err)
	}
	return r.notes, err
}

type repairer struct {
	o         Options
	dev       *Device
	transport p2p.Transport
	metaKey   [32]byte
	store     *cache.Store
	notes     []string
}

func (r *repairer) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

func (r *repairer) run(ctx context.Context) error {
	r.notes = append(r.notes, r.store.Notes()...)
	for _, s := range r.store.Lost() {
		r.note("segment %d of the journal is lost: %s", s.ID, s.Reason)
	}
	found := r.checkMeta(ctx)
	if found == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	r.note("the metastore cannot be used: %v", found)
	if err := r.build(ctx); err != nil {
		return err
	}
	return r.replaceMeta()
}

// checkMeta says why the metastore, with the journal, does not give the state of the volume.
func (r *repairer) checkMeta(ctx context.Context) error {
	db, err := r.open(metaDir)
	if err != nil {
		return err
	}
	applied := db.Applied()
	if err := errors.Join(db.Verify(ctx), db.Close()); err != nil {
		return err
	}
	if last := r.store.LastSeq(); applied > last {
		if err := r.store.SkipTo(applied); err != nil {
			return err
		}
		r.note("the journal ends with record %d, the metastore has those up to %d: the journal goes on from there. What may have followed is lost", last, applied)
	}
	if err := r.store.Replay(applied, func(uint64, []byte) error { return nil }); err != nil {
		return err
	}
	if r.store.LastSeq() == 0 {
		// Where a head was published, this was not always so.
		if _, head, err := r.newestHead(ctx); err == nil && head != nil {
			return fmt.Errorf("it is empty, as is the journal, and nodes keep head %d of this device", head.Sequence)
		}
	}
	return nil
}

// newestHead fetches the newest head of this device; nil where there is none.
func (r *repairer) newestHead(ctx context.Context) (seal.HeadKey, *wire.Head, error) {
	key, err := seal.UnmarshalHeadKey(r.dev.HeadKey)
	if err != nil {
		return key, nil, err
	}
	address := key.Address()
	nodes := headNodesOf(r.transport, address)
	heads, answered := fetchHeads(ctx, r.transport, nodes, [][32]byte{address})
	// A majority has each head that was published: among so many is the newest.
	if answered <= len(nodes)/2 {
		return key, nil, fmt.Errorf("%d of %d nodes answered; a majority is needed to know the newest head. Bring nodes back and try again", answered, len(nodes))
	}
	return key, heads[address], nil
}

func (r *repairer) open(name string) (*metastore.DB, error) {
	return metastore.Open(metastore.Options{Dir: filepath.Join(r.o.Dir, name), Key: r.metaKey, Journal: r.store, Logger: r.o.Logger})
}

// build makes a whole metastore under metaNewDir.
func (r *repairer) build(ctx context.Context) error {
	if err := os.RemoveAll(filepath.Join(r.o.Dir, metaNewDir)); err != nil {
		return err
	}
	// With all its records the journal needs nothing else.
	whole := r.store.LastSeq() > 0 && r.store.Replay(0, func(uint64, []byte) error { return nil }) == nil
	var base *base
	if !whole {
		var err error
		if base, err = r.findBase(ctx); err != nil {
			return err
		}
	}
	db, err := r.open(metaNewDir)
	if err != nil {
		return err
	}
	if whole {
		err = r.store.Replay(0, db.Apply)
		r.note("it is made anew from the journal, which has all records from 1 to %d", r.store.LastSeq())
	} else {
		err = r.fill(ctx, db, base)
	}
	if err == nil {
		err = db.Flush(ctx)
	}
	if err == nil && db.Flushed() < r.store.LastSeq() {
		err = fmt.Errorf("the new metastore is flushed to record %d of %d only", db.Flushed(), r.store.LastSeq())
	}
	return errors.Join(err, db.Close())
}

// replaceMeta puts the new metastore into the place of the old one.
func (r *repairer) replaceMeta() error {
	meta := filepath.Join(r.o.Dir, metaDir)
	aside := fmt.Sprintf("%s.damaged-%d", metaDir, time.Now().UnixNano())
	err := os.Rename(meta, filepath.Join(r.o.Dir, aside))
	switch {
	case err == nil:
		r.note("the damaged one is kept as %s; delete it when all is well", aside)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	if err := os.Rename(filepath.Join(r.o.Dir, metaNewDir), meta); err != nil {
		return err
	}
	return syncDir(r.o.Dir)
}

// base is what the metastore is built on: a published head, and the record of the journal after which the rest follows.
type base struct {
	body     *headpb.Body
	sequence uint64
	after    uint64
	bare     bool // there is no journal
}

// findBase fetches the newest head of this device and checks that the journal goes on from it.
func (r *repairer) findBase(ctx context.Context) (*base, error) {
	key, head, err := r.newestHead(ctx)
	if err != nil {
		return nil, err
	}
	if head == nil {
		return nil, fmt.Errorf("the journal no longer has its first records, and no node keeps a head of this device: %w", errUnrepairable)
	}
	body, err := openBody(key, head)
	if err != nil {
		return nil, fmt.Errorf("the head of this device: %w", err)
	}
	if r.store.LastSeq() == 0 && len(r.store.Lost()) == 0 {
		r.note("the journal is empty: what was changed after %s is lost", time.Unix(0, body.Time).Format(time.DateTime))
		if err := r.store.SkipTo(body.Cut); err != nil {
			return nil, err
		}
		return &base{body: body, sequence: head.Sequence, after: body.Cut, bare: true}, nil
	}
	if body.Cut > r.store.LastSeq() {
		return nil, fmt.Errorf("the journal ends with record %d, the published head covers record %d: %w", r.store.LastSeq(), body.Cut, errUnrepairable)
	}
	b := &base{body: body, sequence: head.Sequence, after: body.Cut}
	check := func(uint64, []byte) error { return nil }
	if err = r.store.Replay(b.after, check); err == nil {
		return b, nil
	}
	// Segments whose records all come after the head are only let go while nothing but bookkeeping had followed it.
	// That they were let go, and not lost, needs a list of segments that is whole.
	if len(r.store.Lost()) > 0 || len(r.store.Notes()) > 0 {
		return nil, fmt.Errorf("records after the published head are needed: %w: %w", err, errUnrepairable)
	}
	b.after = r.store.LastSeq()
	for _, s := range r.store.Segments() {
		if s.State == cache.Dirty && s.LastSeq > body.Cut {
			b.after = max(body.Cut, s.FirstSeq-1)
			break
		}
	}
	if err := r.store.Replay(b.after, check); err != nil {
		return nil, fmt.Errorf("records after the published head are needed: %w: %w", err, errUnrepairable)
	}
	return b, nil
}

// fill builds the tree of a head and applies the journal's records that follow it.
func (r *repairer) fill(ctx context.Context, db *metastore.DB, b *base) error {
	batch := &logBatch{apply: func(entries []logEntry) error {
		t := db.NewTxn()
		for _, e := range entries {
			if err := e.applyTo(t); err != nil {
				return err
			}
		}
		return db.Fill(t.Record())
	}}
	if err := readLog(ctx, r.dev, b.body, r.transport, r.o.Logger, batch); err != nil {
		return err
	}
	if err := r.store.Replay(b.after, func(seq uint64, record []byte) error {
		t := db.NewTxn()
		if err := t.Merge(record); err != nil {
			return err
		}
		return db.Apply(seq, t.Record())
	}); err != nil {
		return err
	}
	if last := r.store.LastSeq(); db.Applied() < last {
		if err := db.Apply(last, db.NewTxn().Record()); err != nil {
			return err
		}
	}
	used, err := sequenceUsed(db, 0)
	if err != nil {
		return err
	}
	// A head is sent after its sequence was journaled.
	if b.after == b.body.Cut && used < b.sequence && !b.bare {
		return fmt.Errorf("nodes keep head %d of this device, of which its journal knows nothing: it is of an older time: %w", b.sequence, errUnrepairable)
	}
	if err := r.finish(db, b, max(used, b.sequence)); err != nil {
		return err
	}
	r.note("it is made anew from head %d of %s and the journal's records %d to %d; content that the peers have is fetched from them", b.sequence,
		time.Unix(0, b.body.Time).Format(time.DateTime), b.after+1, r.store.LastSeq())
	return nil
}

// finish sets what neither log nor records tell. The next head starts a log of its own: the keys that have changed since
// the last one are not known exactly. The old log's stripes are noted, so that they are deleted then.
func (r *repairer) finish(db *metastore.DB, b *base, sequence uint64) error {
	t := db.NewTxn()
	t.DeleteMeta(usageName)
	t.DeleteMeta(metaHead)
	t.DeleteMeta(metaHeadNodes)
	t.PutMeta(metaSequence, be.AppendUint64(nil, sequence))
	for _, s := range b.body.Segments {
		var info metastore.StripeInfo
		if err := info.UnmarshalBinary(s.Info); err != nil {
			return err
		}
		info.CreatedSeq = b.body.Cut
		t.PutStripe([16]byte(s.Id), info)
	}
	// The log has no content of inodes without a name.
	var orphans []Ino
	if err := db.Orphans(func(ino Ino) bool { orphans = append(orphans, ino); return true }); err != nil {
		return err
	}
	for _, ino := range orphans {
		n, err := db.Inode(ino)
		if errors.Is(err, metastore.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		n.Allocated = 0
		if err := db.Extents(ino, 0, fileMaxBytes, func(e metastore.Extent) bool { n.Allocated += uint64(e.Len); return true }); err != nil {
			return err
		}
		t.PutInode(ino, n)
		if t.Bytes() > recordMaxBytes {
			if err := db.Fill(t.Record()); err != nil {
				return err
			}
			t = db.NewTxn()
		}
	}
	return db.Fill(t.Record())
}

// RepairContent takes the local place from extents whose local bytes cannot be read, so that they are read from the
// peers. Of what nobody else has the blocks that cannot be read are marked as lost: reads there fail. Then it lets go
// of lost segments. It returns how many bytes the peers have to provide from now on, and how many are lost.
func (v *Volume) RepairContent(ctx context.Context) (fetched, lost int64, err error) {
	fetched, lost, err = v.repairContent(ctx)
	if err == nil && len(v.store.Lost()) > 0 {
		err = errors.Join(v.db.Flush(ctx), v.store.ForgetLost())
	}
	return fetched, lost, wrap("repair content", 0, err)
}

func (v *Volume) repairContent(ctx context.Context) (fetched, lost int64, err error) {
	snapshot, err := v.db.Snapshot()
	if err != nil {
		return 0, 0, err
	}
	defer snapshot.Close()
	buf := make([]byte, cache.BlockBytes)
	var failed error
	err = snapshot.Inodes(func(ino Ino, n metastore.Inode) bool {
		if n.Allocated == 0 {
			return true
		}
		if failed = ctx.Err(); failed != nil {
			return false
		}
		var extents []metastore.Extent // with damage; few
		pieces := make(map[uint64][]metastore.Extent)
		if failed = snapshot.Extents(ino, 0, fileMaxBytes, func(e metastore.Extent) bool {
			if parts := v.examine(e, buf); parts != nil {
				extents, pieces[e.Off] = append(extents, e), parts
			}
			return true
		}); failed != nil {
			return false
		}
		for _, e := range extents {
			if _, failed = v.commit(func(t *tx) error {
				same := false
				if err := t.v.db.Extents(ino, e.Off, e.End(), func(now metastore.Extent) bool { same = now == e; return false }); err != nil {
					return err
				}
				if !same {
					return errUnchanged // it was placed or written meanwhile
				}
				t.DeleteExtent(ino, e)
				for _, p := range pieces[e.Off] {
					t.AddExtent(ino, p)
				}
				return nil
			}); failed != nil {
				return false
			}
			for _, p := range pieces[e.Off] {
				if p.Lost() {
					lost += int64(p.Len)
				} else if p.HasRemote {
					fetched += int64(p.Len)
				}
			}
		}
		return true
	})
	return fetched, lost, errors.Join(err, failed)
}

// examine reads an extent's local bytes and returns what should be in its place; nil where it is right as it is.
func (v *Volume) examine(e metastore.Extent, buf []byte) (parts []metastore.Extent) {
	if !e.HasLocal() || e.HasRemote && !v.store.Holds(e.Local.Segment) {
		return nil
	}
	damaged := false
	for at := uint32(0); at < e.Len; {
		n := min(e.Len-at, cache.BlockBytes-(e.LocalOff+at)%cache.BlockBytes)
		part := slice(e, e.Off+uint64(at), e.Off+uint64(at+n))
		if unreadable(v.store.ReadAt(e.Local, int(e.LocalOff+at), buf[:n])) {
			damaged = true
			part.Local, part.LocalOff = cache.Ref{}, 0
		}
		at += n
		// Adjoining parts of a kind are one.
		if last := len(parts) - 1; last >= 0 && parts[last].HasLocal() == part.HasLocal() {
			parts[last].Len += part.Len
			continue
		}
		parts = append(parts, part)
	}
	switch {
	case !damaged:
		return nil
	case e.HasRemote:
		e.Local, e.LocalOff = cache.Ref{}, 0
		return []metastore.Extent{e}
	}
	return parts
}
