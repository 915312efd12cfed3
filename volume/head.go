package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/volume/headpb"
)

var be = binary.BigEndian

const (
	// headEverywhere: in pools up to this size every node keeps every head.
	headEverywhere = 32
	// headCopies is how many nodes keep a head in larger pools.
	headCopies = 16

	wrapBundle  = "defs bundle v1"
	wrapPoolKey = "defs pool key v1"
)

// headBody describes the published volume: the old log and what this cut adds,
// or a new checkpoint alone.
func (p *publisher) headBody(old *headpb.Body, cut, generationNext uint64, refs []*headpb.Stripe, checkpoint bool) (*headpb.Body, error) {
	newest := old.GetTime()
	var contains []*headpb.Contained
	for _, c := range p.dev.Contains {
		newest = max(newest, c.Time.UnixNano())
		contains = append(contains, &headpb.Contained{Slot: uint32(c.Device), Sequence: c.Sequence, Time: c.Time.UnixNano()})
	}
	body := &headpb.Body{
		Version: 1, Volume: p.dev.Volume, Name: p.dev.Name, Slot: uint32(p.dev.Slot), Cut: cut,
		Time: max(p.v.clock().UnixNano(), newest+1), Policy: p.dev.Policy, Chain: p.dev.Chain, Pool: p.dev.Pool,
		GenerationNext: generationNext, Contains: contains,
	}
	if checkpoint {
		body.Segments, body.CheckpointStripes = refs, uint32(len(refs))
	} else {
		body.Segments = append(append(body.Segments, old.Segments...), refs...)
		body.CheckpointStripes = old.CheckpointStripes
	}
	if old != nil {
		// Wrapping is randomised: what is wrapped stays as it is.
		body.Bundles, body.PoolKey = old.Bundles, old.PoolKey
	}
	for i := len(body.Bundles); i < len(p.dev.Bundles); i++ {
		wrapped, err := seal.WrapTo(p.dev.RecoveryKey, wrapBundle, p.dev.Bundles[i])
		if err != nil {
			return nil, fmt.Errorf("wrap key bundle: %w", err)
		}
		body.Bundles = append(body.Bundles, wrapped)
	}
	if len(body.PoolKey) == 0 && len(p.dev.PoolKey) > 0 {
		wrapped, err := seal.WrapTo(p.dev.RecoveryKey, wrapPoolKey, p.dev.PoolKey)
		if err != nil {
			return nil, fmt.Errorf("wrap pool key: %w", err)
		}
		body.PoolKey = wrapped
	}
	return body, nil
}

// metaSequence is the highest sequence that a head of this device was, or was
// about to be, sent with.
const metaSequence = "head-sequence"

// sequenceUsed reads metaSequence; least is what is known otherwise.
func sequenceUsed(r metastore.Reader, least uint64) (uint64, error) {
	b, err := r.Meta(metaSequence)
	if errors.Is(err, metastore.ErrNotFound) {
		return least, nil
	}
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("head sequence of %d bytes", len(b))
	}
	return max(least, be.Uint64(b)), nil
}

// reserve returns a sequence that no head was ever sent with: of two heads with
// the same one, some nodes would keep the first and some the second. It waits
// until that, and so all that the head covers, survives a power cut.
func (p *publisher) reserve(ctx context.Context) (uint64, error) {
	sequence := p.sequenceUsed + 1
	seq, err := p.commit(func(t *tx) error {
		t.PutMeta(metaSequence, be.AppendUint64(nil, sequence))
		return nil
	})
	if err != nil {
		return 0, err
	}
	p.sequenceUsed = sequence
	return sequence, p.v.syncThrough(ctx, seq)
}

// behindError says that nodes keep a head of this device that the device does
// not know: its local state is a restored, older one.
type behindError struct{ stored uint64 }

func (e *behindError) Error() string {
	return fmt.Sprintf("nodes keep head %d of this device, which is newer than its local state; a log of its own is started", e.stored)
}

// putHead signs, seals and stores a head; a majority of its nodes must
// acknowledge it.
func (p *publisher) putHead(ctx context.Context, sequence uint64, previous []byte, body *headpb.Body) (head *wire.Head, acks, nodes int, err error) {
	plain, err := proto.Marshal(body)
	if err != nil {
		return nil, 0, 0, err
	}
	if head, err = signHead(p.dev.HeadKey, sequence, previous, plain); err != nil {
		return nil, 0, 0, err
	}
	p.mu.Lock()
	first := p.head == nil
	p.mu.Unlock()
	if first {
		// Refused by nodes that have this list, or a longer one, already.
		if newer, err := putDevices(ctx, p.t, p.log, p.dev.DevicesKey, p.dev.Slot); err != nil && newer == 0 {
			return nil, 0, 0, fmt.Errorf("list of devices: %w", err)
		}
	}
	acks, nodes, newer, err := spread(ctx, p.t, p.log, head)
	if first && newer > 0 {
		// Where there is no head there is nothing of what the newer one covers.
		err := fmt.Errorf("nodes keep head %d of this device, whose local state knows of none: it has been lost. What is published is not replaced. Unmount and run defs fsck --repair", newer)
		p.v.fail(err)
		return nil, 0, 0, err
	}
	if newer > 0 {
		// A log that an older state goes on with may be gone by now.
		p.sequenceUsed, p.newLog = max(p.sequenceUsed, newer), true
		return nil, 0, 0, &behindError{newer}
	}
	if err != nil {
		return nil, 0, 0, err
	}
	if err := p.t.AnnounceHead(ctx, &wire.HeadNotice{Address: head.Address, Sequence: sequence}); err != nil {
		p.log.Debug("head not announced", "err", err)
	}
	return head, acks, nodes, nil
}

// openBody opens and decodes a head of the key's device slot.
func openBody(key seal.HeadKey, h *wire.Head) (*headpb.Body, error) {
	plain, err := key.OpenHead(h.Sequence, h.Sealed)
	body := &headpb.Body{}
	if err == nil {
		err = proto.Unmarshal(plain, body)
	}
	if err != nil || body.Version != 1 || len(body.Volume) != 16 {
		return nil, fmt.Errorf("it cannot be read: %w", errors.Join(err, ErrNoHead))
	}
	return body, nil
}

func signHead(key []byte, sequence uint64, previous, plain []byte) (*wire.Head, error) {
	k, err := seal.UnmarshalHeadKey(key)
	if err != nil {
		return nil, err
	}
	sealed, err := k.SealHead(sequence, plain)
	if err != nil {
		return nil, err
	}
	head := &wire.Head{Sequence: sequence, Previous: previous, Sealed: sealed}
	head.Sign(k.Sign)
	return head, head.Verify()
}

// putDevices publishes the list of slots, which only grows: its sequence is
// the highest slot, so that nodes which refuse it have this one or a longer one.
// newer is the highest slot, of this one or later ones, of the lists for which
// nodes refused it.
func putDevices(ctx context.Context, t p2p.Transport, log *slog.Logger, key []byte, slot uint16) (newer uint64, err error) {
	list := &headpb.Devices{Version: 1}
	for s := uint32(1); s <= uint32(slot); s++ {
		list.Slots = append(list.Slots, s)
	}
	plain, err := proto.Marshal(list)
	if err != nil {
		return 0, err
	}
	head, err := signHead(key, uint64(slot), nil, plain)
	if err != nil {
		return 0, err
	}
	_, _, newer, err = spread(ctx, t, log, head)
	return newer, err
}

// laterDevice reports whether a machine has been added to the volume after this
// device, by recovery: it refers to all stripes that this device's head named
// then. A majority of the nodes must answer.
func (p *publisher) laterDevice(ctx context.Context) (bool, error) {
	key, err := seal.UnmarshalHeadKey(p.dev.DevicesKey)
	if err != nil {
		return false, err
	}
	address := key.Address()
	nodes := headNodesOf(p.t, address)
	heads, answered := fetchHeads(ctx, p.t, nodes, [][32]byte{address})
	if answered <= len(nodes)/2 {
		return false, fmt.Errorf("the list of devices: %d of %d nodes answered, a majority is needed", answered, len(nodes))
	}
	// The list's sequence is its highest slot.
	return heads[address].GetSequence() > uint64(p.dev.Slot), nil
}

// headNodesOf returns the nodes that keep a head: not those that are leaving.
func headNodesOf(t p2p.Transport, address [32]byte) []placement.NodeID {
	var ids []placement.NodeID
	for _, m := range t.Members() {
		if m.Role == p2p.RoleNode && m.State != p2p.Dead && !m.Leaving() {
			ids = append(ids, m.ID)
		}
	}
	if len(ids) <= headEverywhere {
		return ids
	}
	return placement.Keepers(address, ids, headCopies)
}

// spread stores a head at its nodes and fails without a majority. newer is the
// highest sequence of the heads, of this sequence or a higher one, for which
// nodes refused it; 0 without such.
func spread(ctx context.Context, t p2p.Transport, log *slog.Logger, head *wire.Head) (acks, nodes int, newer uint64, err error) {
	ids := headNodesOf(t, [32]byte(head.Address))
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(16)
	for _, id := range ids {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, headTimeout)
			defer cancel()
			_, _, err := t.Call(ctx, id, &wire.Request{Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: head}}}, nil)
			var stored uint64
			if err != nil {
				log.Debug("a node did not take the head", "peer", id, "err", err)
				if p2p.StatusOf(err) != wire.Status_STATUS_DENIED {
					return nil
				}
				// The node's word does not count, the head that it keeps does.
				heads, _ := fetchHeads(ctx, t, []placement.NodeID{id}, [][32]byte{[32]byte(head.Address)})
				if stored = heads[[32]byte(head.Address)].GetSequence(); stored < head.Sequence {
					return nil
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				acks++
			}
			newer = max(newer, stored)
			return nil
		})
	}
	g.Wait()
	if len(ids) == 0 || acks < len(ids)/2+1 {
		return acks, len(ids), newer, fmt.Errorf("%d of %d nodes acknowledged the head, a majority is needed", acks, len(ids))
	}
	return acks, len(ids), newer, nil
}

// repeatHead stores the last head again, for nodes that missed it. After a
// start it is fetched first, since sealing it anew would make another head.
func (p *publisher) repeatHead(ctx context.Context) error {
	p.mu.Lock()
	sequence, hash := p.sequence, [32]byte(p.headHash)
	p.mu.Unlock()
	if p.signed == nil {
		key, err := seal.UnmarshalHeadKey(p.dev.HeadKey)
		if err != nil {
			return err
		}
		address := key.Address()
		heads, _ := fetchHeads(ctx, p.t, headNodesOf(p.t, address), [][32]byte{address})
		head := heads[address]
		switch {
		case head == nil:
			return errors.New("no node that answers keeps the head")
		case head.Sequence > sequence:
			// Either this device was stopped before it could note that head,
			// or its local state is an older one.
			p.sequenceUsed, p.newLog = max(p.sequenceUsed, head.Sequence), true
			p.v.lastChange.Store(p.v.lastSeq.Load())
			return &behindError{head.Sequence}
		case head.Sequence < sequence || head.Hash() != hash:
			// Nobody has it any more: a new one is published.
			p.v.lastChange.Store(p.v.lastSeq.Load())
			return errors.New("no node that answers keeps the head; another one is published")
		}
		p.signed = head
	}
	acks, nodes, newer, err := spread(ctx, p.t, p.log, p.signed)
	if newer > sequence {
		p.sequenceUsed, p.newLog = max(p.sequenceUsed, newer), true
		p.v.lastChange.Store(p.v.lastSeq.Load())
		return &behindError{newer}
	}
	p.mu.Lock()
	changed := p.headAcks != acks || p.headNodes != nodes
	p.headAcks, p.headNodes = acks, nodes
	p.progress()
	p.mu.Unlock()
	if changed {
		_, noted := p.commit(func(t *tx) error { t.PutMeta(metaHeadNodes, encodeHeadNodes(acks, nodes)); return nil })
		err = errors.Join(err, noted)
	}
	return err
}
