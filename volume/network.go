package volume

import (
	"context"
	"errors"
	"fmt"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/stripe"
)

// network is the part of an open volume that talks to the pool: the write
// side (publisher) and the read side (fetcher).
type network struct {
	publisher *publisher
	fetcher   *fetcher
	stripes   *stripe.Store
	transport p2p.Transport
}

// OpenDevice opens the volume of dev in dir and connects it to the pool that
// transport has joined. Opening waits neither for the pool nor for a backlog.
// Close ends both; the transport stays the caller's.
func OpenDevice(ctx context.Context, dir string, dev *Device, transport p2p.Transport, o Options) (*Volume, error) {
	o.Dir, o.Key, o.Device = dir, [32]byte(dev.LocalKey), dev.Slot
	v, err := Open(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := v.connect(dev, transport); err != nil {
		return nil, errors.Join(fmt.Errorf("open volume: %w", err), v.Close(ctx))
	}
	return v, nil
}

func (v *Volume) connect(dev *Device, transport p2p.Transport) error {
	keys, err := newKeyring(dev)
	if err != nil {
		return err
	}
	stripes := stripe.NewStore(stripe.Options{
		Transport: transport, Volume: [16]byte(dev.Volume), Bundle: keys.Bundle, Epoch: keys.Epoch, Logger: v.log,
	})
	n := &network{stripes: stripes, transport: transport}
	if n.publisher, err = v.newPublisher(dev, keys, stripes, transport); err != nil {
		return err
	}
	if n.fetcher, err = newFetcher(v, stripes, keys, [16]byte(dev.Volume)); err != nil {
		return err
	}
	n.fetcher.learned = n.publisher.learned
	n.fetcher.salted = func(id [16]byte, salt [32]byte) {
		if _, err := n.publisher.commit(func(t *tx) error { t.PutSalt(id, salt); return nil }); err != nil {
			n.publisher.log.Debug("a salt is not kept; it is asked for again", "stripe", erasure.StripeID(id), "err", err)
		}
	}
	if err := n.publisher.findUnpublished(); err != nil {
		return err
	}
	v.network, v.remote = n, n.fetcher
	v.virtual = map[string]virtualAttribute{
		"user.defs.state": {get: func(ctx context.Context, ino Ino) ([]byte, error) {
			state, err := v.FileState(ctx, ino)
			return []byte(state), err
		}},
		xattrPolicy: {get: v.ownPolicy, set: v.setPolicy},
		xattrFsync:  {get: v.ownFsyncMode, set: v.setFsyncMode},
	}
	go n.publisher.run()
	return nil
}

// Reputation is what this device's reads have shown of a node.
func (v *Volume) Reputation(node placement.NodeID) placement.Reputation {
	if v.network == nil {
		return placement.Reputation{}
	}
	return v.network.stripes.Reputation(node)
}

// close ends the network's goroutines.
func (n *network) close() {
	n.publisher.close()
	n.fetcher.close()
}

// learned keeps holders that keepers or the pool have told.
func (p *publisher) learned(id [16]byte, info metastore.StripeInfo) {
	if _, err := p.commit(func(t *tx) error {
		now, err := t.v.db.Stripe(id)
		if err != nil {
			return err
		}
		now.Holders, now.Complete = info.Holders, false
		t.PutStripe(id, now)
		return nil
	}); err != nil {
		p.log.Debug("new holders are not kept; they are looked up again", "stripe", erasure.StripeID(id), "err", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.partial[id] = true
}

// findUnpublished sets the newest change of an earlier run, if it is not
// published yet.
func (p *publisher) findUnpublished() error {
	generation, err := p.v.db.Generation()
	if err != nil {
		return err
	}
	found := p.head == nil
	for g := p.head.GetGenerationNext(); g <= generation && !found; g++ {
		if err := p.v.db.Touched(g, func(key []byte, _ uint64) bool {
			// Stripe infos, and where extents were placed, are bookkeeping and
			// wait for the next real change; one of content touches its inode.
			found = len(key) > 0 && key[0] != 's' && key[0] != 'e'
			return !found
		}); err != nil {
			return err
		}
	}
	// What cannot be read any more is found out by a cut.
	if err := p.v.db.Unplaced(0, func(metastore.Unplaced) bool { found = true; return false }); err != nil {
		return err
	}
	if found {
		p.v.lastChange.Store(p.v.lastSeq.Load())
	}
	return nil
}

// openEmpty opens a volume in a directory that holds none yet.
func openEmpty(ctx context.Context, o Options) (*Volume, error) {
	v, err := Open(ctx, o)
	if err != nil {
		return nil, err
	}
	if v.usage.inodes > 1 {
		return nil, errors.Join(fmt.Errorf("recover into %s: %w", o.Dir, ErrVolumeExists), v.Close(ctx))
	}
	return v, nil
}

// recount brings the usage up after the tree was changed underneath.
func (v *Volume) recount() error {
	if _, err := v.commit(func(t *tx) error { t.DeleteMeta(usageName); return nil }); err != nil {
		return err
	}
	u, err := readUsage(v.db)
	if err != nil {
		return err
	}
	_, err = v.commit(func(t *tx) error { t.PutMeta(usageName, u.marshal()); return nil })
	return err
}
