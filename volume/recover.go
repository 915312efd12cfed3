package volume

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/chunker"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/stripe"
	"github.com/defs-fs/defs/volume/headpb"
)

const (
	headTimeout = 10 * time.Second
	// slotsProbed are asked for even when no list of devices is found.
	slotsProbed = 8
	// slotsMax bounds the slots that a list of devices may name.
	slotsMax = 1024
	// slotAttempts bounds how often a slot is taken by another machine first.
	slotAttempts = 5
	// entriesPerCommit bounds the log entries in one journal record.
	entriesPerCommit = 1000
	bytesPerCommit   = 512 << 10
)

// ErrNoHead: no node that could be asked holds a head for these words.
var ErrNoHead = errors.New("no head found for these words")

// HeadRef names a head: what one device had published at one time.
type HeadRef struct {
	Device   uint16    `json:"device"` // slot
	Sequence uint64    `json:"head"`
	Time     time.Time `json:"time"`
}

// LeftHead is a head that a recovery has not taken, and that the one it has
// taken does not contain: what its device changed after Since is not merged.
type LeftHead struct {
	HeadRef
	Since   *HeadRef `json:"since,omitempty"`   // the newest state that both go on from; nil if it is not known
	Problem string   `json:"problem,omitempty"` // why it could not be read, if it could not
}

// Recovered says what Recover brought back.
type Recovered struct {
	Device   *Device
	Head     HeadRef    // that was taken
	Left     []LeftHead // of other devices, newest first
	Warnings []string   // in sentences
	// Running are the pool's devices that run, or did until a moment ago. Each
	// may have this volume mounted, or another one of the same pool.
	Running  []placement.NodeID
	Entries  int // log entries applied
	Segments int // stripes of checkpoint and log read
}

// Recover brings a volume back from its root secret alone: it finds the heads
// among the pool's nodes, takes one, enrols this machine as a new device, and
// rebuilds the tree in an empty directory. from is the slot of the device whose
// head is taken; 0 takes the newest of those that no other one contains. Heads
// are not merged; those that are left stay with the nodes, with their content.
// Content stays with the peers and is fetched as it is read. transport must
// have joined as the recovery peer. The caller saves Recovered.Device.
func Recover(ctx context.Context, dir string, root seal.Root, transport p2p.Transport, from uint16, o Options) (*Recovered, error) {
	recovery, err := root.Recovery()
	if err != nil {
		return nil, err
	}
	o.EnsureDefaults()
	out := &Recovered{}
	slot, err := takeSlot(ctx, recovery, transport, from, o.Logger, out)
	if err != nil {
		return nil, err
	}
	// Only now: what the head names is not deleted by its device any more.
	f, err := findHeads(ctx, recovery, transport)
	if err != nil {
		return nil, err
	}
	taken, err := f.choose(from)
	if err != nil {
		return nil, err
	}
	if f.answered <= f.asked/2 {
		out.warn("only %d of the pool's %d nodes answered: others may keep a newer state of the volume", f.answered, f.asked)
	}
	body := taken.body
	dev, err := adoptBody(recovery, body, slot)
	if err != nil {
		return nil, err
	}
	dev.Contains = taken.contains()
	out.Device, out.Head, out.Left, out.Segments = dev, taken.ref(), f.left(taken), len(body.Segments)
	// The caller saves the device file last, so that a recovery that was cut
	// short is started again, not mounted.
	if _, err := LoadDevice(dir); err == nil {
		return nil, fmt.Errorf("recover into %s: %w", dir, ErrVolumeExists)
	}
	o.Dir, o.Key, o.Device = dir, [32]byte(dev.LocalKey), dev.Slot
	v, err := openEmpty(ctx, o)
	if err != nil {
		return nil, err
	}
	out.Entries, err = v.rebuild(ctx, dev, body, transport)
	for _, m := range transport.Members() {
		if m.Role == p2p.RoleDevice && m.State == p2p.Alive {
			out.Running = append(out.Running, m.ID)
		}
	}
	if err = errors.Join(err, v.Close(ctx)); err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	return out, nil
}

func (r *Recovered) warn(format string, args ...any) {
	r.Warnings = append(r.Warnings, fmt.Sprintf(format, args...))
}

// takeSlot publishes a list of devices with one slot more and returns that
// slot. No device takes one that another has taken, whether or not that one
// has published anything yet. Without the head that is wanted it takes none.
func takeSlot(ctx context.Context, r *seal.Recovery, t p2p.Transport, from uint16, log *slog.Logger, out *Recovered) (uint16, error) {
	for range slotAttempts {
		f, err := findHeads(ctx, r, t)
		if err != nil {
			return 0, err
		}
		if _, err := f.choose(from); err != nil {
			return 0, err
		}
		newer, err := putDevices(ctx, t, log, r.HeadKey(0).Marshal(), f.highest+1)
		if newer > 0 && ctx.Err() == nil {
			continue // another machine was quicker
		}
		if err != nil {
			out.warn("this machine could not be put on the list of the volume's devices (%v): if another one still writes to the volume, it may delete what this one needs", err)
		}
		return f.highest + 1, ctx.Err()
	}
	return 0, errors.New("other machines keep taking slots of this volume; try again when they are done")
}

// foundHead is the newest head of one device.
type foundHead struct {
	slot uint16
	head *wire.Head
	body *headpb.Body // nil if it cannot be read
	err  error        // why
}

func (h *foundHead) ref() HeadRef {
	ref := HeadRef{Device: h.slot, Sequence: h.head.Sequence}
	if h.body != nil {
		ref.Time = time.Unix(0, h.body.Time).UTC()
	}
	return ref
}

// contains lists, by ascending slot, the newest head of each device that this
// one contains; the last is itself.
func (h *foundHead) contains() (list []HeadRef) {
	for _, c := range h.body.GetContains() {
		list = append(list, HeadRef{Device: uint16(c.Slot), Sequence: c.Sequence, Time: time.Unix(0, c.Time).UTC()})
	}
	return append(list, h.ref())
}

// covers says that the state of other is an earlier one of the state of h.
func (h *foundHead) covers(other *foundHead) bool {
	return h.body != nil && slices.ContainsFunc(h.contains(), func(c HeadRef) bool {
		return c.Device == other.slot && c.Sequence >= other.head.Sequence
	})
}

// foundHeads is what a search for heads found.
type foundHeads struct {
	heads           []*foundHead // newest first; those that cannot be read last
	highest         uint16       // slot that a device has taken
	asked, answered int          // nodes
}

// outermost returns the heads that no other one of them covers.
func outermost(heads []*foundHead) []*foundHead {
	return slices.DeleteFunc(slices.Clone(heads), func(h *foundHead) bool {
		return slices.ContainsFunc(heads, func(o *foundHead) bool { return o != h && o.covers(h) })
	})
}

// choose returns the head of the device in slot from; where that is 0, the
// newest of those that no other one contains.
func (f *foundHeads) choose(from uint16) (*foundHead, error) {
	candidates := outermost(f.heads)
	if from != 0 {
		candidates = slices.DeleteFunc(slices.Clone(f.heads), func(h *foundHead) bool { return h.slot != from })
	}
	if len(candidates) == 0 && len(f.heads) > 0 {
		var slots []string
		for _, h := range f.heads {
			slots = append(slots, fmt.Sprint(h.slot))
		}
		return nil, fmt.Errorf("no node that answers keeps a head of device %d; there are heads of these devices: %s", from, strings.Join(slots, ", "))
	}
	for _, h := range candidates {
		if h.err != nil {
			return nil, fmt.Errorf("the head of device %d: %w", h.slot, h.err)
		}
	}
	if len(candidates) == 0 {
		return nil, fmt.Errorf("asked %d nodes: %w", f.asked, ErrNoHead)
	}
	return candidates[0], nil
}

// left returns what taking a head leaves: of the heads that it does not contain
// those that no other one of them contains.
func (f *foundHeads) left(taken *foundHead) (left []LeftHead) {
	rest := slices.DeleteFunc(slices.Clone(f.heads), func(h *foundHead) bool { return h == taken || taken.covers(h) })
	for _, h := range outermost(rest) {
		l := LeftHead{HeadRef: h.ref()}
		if h.err != nil {
			l.Problem = h.err.Error()
		} else {
			l.Since = shared(h.contains(), taken.contains())
		}
		left = append(left, l)
	}
	return left
}

// shared returns the newest head that both lists contain. A device takes a
// higher slot than all that its tree comes from: it is that of the highest one.
func shared(a, b []HeadRef) *HeadRef {
	for _, x := range slices.Backward(a) {
		for _, y := range b {
			if x.Device != y.Device {
				continue
			}
			if x.Sequence < y.Sequence {
				return &x
			}
			return &y
		}
	}
	return nil
}

// findHeads asks all nodes for the heads of all device slots.
func findHeads(ctx context.Context, r *seal.Recovery, t p2p.Transport) (*foundHeads, error) {
	f := &foundHeads{}
	devicesKey := r.HeadKey(0)
	slots := make([]uint16, 0, slotsProbed)
	for s := uint16(1); s <= slotsProbed; s++ {
		slots = append(slots, s)
	}
	nodes := storageNodes(t)
	heads, _ := fetchHeads(ctx, t, nodes, [][32]byte{devicesKey.Address()})
	if h := heads[devicesKey.Address()]; h != nil {
		plain, err := devicesKey.OpenHead(h.Sequence, h.Sealed)
		list := &headpb.Devices{}
		if err == nil {
			err = proto.Unmarshal(plain, list)
		}
		if err != nil || len(list.Slots) > slotsMax {
			return nil, fmt.Errorf("the list of devices cannot be read: %w", errors.Join(err, ErrNoHead))
		}
		for _, s := range list.Slots {
			f.highest = max(f.highest, uint16(min(s, slotsMax)))
			if s > slotsProbed && s < 1<<15 {
				slots = append(slots, uint16(s))
			}
		}
	}
	addresses := make([][32]byte, len(slots))
	for i, s := range slots {
		addresses[i] = r.HeadKey(s).Address()
	}
	f.asked = len(nodes)
	heads, f.answered = fetchHeads(ctx, t, nodes, addresses)
	for i, s := range slots {
		h := heads[addresses[i]]
		if h == nil {
			continue
		}
		f.highest = max(f.highest, s)
		found := &foundHead{slot: s, head: h}
		found.body, found.err = openBody(r.HeadKey(s), h)
		f.heads = append(f.heads, found)
	}
	slices.SortStableFunc(f.heads, func(a, b *foundHead) int { return cmp.Compare(b.body.GetTime(), a.body.GetTime()) })
	return f, nil
}

// storageNodes lists the pool's nodes, in whatever state.
func storageNodes(t p2p.Transport) (nodes []placement.NodeID) {
	for _, m := range t.Members() {
		if m.Role == p2p.RoleNode {
			nodes = append(nodes, m.ID)
		}
	}
	return nodes
}

// fetchHeads asks nodes and keeps the highest verified sequence for each
// address. answered is how many nodes did.
func fetchHeads(ctx context.Context, t p2p.Transport, nodes []placement.NodeID, addresses [][32]byte) (newest map[[32]byte]*wire.Head, answered int) {
	asked := make(map[[32]byte]bool, len(addresses))
	req := &wire.GetHead{}
	for i := range addresses {
		asked[addresses[i]] = true
		req.Addresses = append(req.Addresses, addresses[i][:])
	}
	replies := make(chan *wire.GetHeadReply, len(nodes)) // nil without an answer
	for _, id := range nodes {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, headTimeout)
			defer cancel()
			rep, _, err := t.Call(ctx, id, &wire.Request{Op: &wire.Request_GetHead{GetHead: req}}, nil)
			if err != nil {
				replies <- nil
				return
			}
			replies <- rep.GetGetHead()
		}()
	}
	newest = make(map[[32]byte]*wire.Head)
	for range nodes {
		reply := <-replies
		if reply != nil {
			answered++
		}
		for _, h := range reply.GetHeads() {
			if h.Verify() != nil || !asked[[32]byte(h.Address)] {
				continue
			}
			if old := newest[[32]byte(h.Address)]; old == nil || h.Sequence > old.Sequence {
				newest[[32]byte(h.Address)] = h
			}
		}
	}
	return newest, answered
}

// adoptBody makes this machine a device of the volume that body describes.
func adoptBody(r *seal.Recovery, body *headpb.Body, slot uint16) (*Device, error) {
	authority := r.Authority().Public().(ed25519.PublicKey)
	chain, err := seal.UnmarshalChain(body.Chain)
	if err == nil {
		_, err = chain.Verify(authority)
	}
	if err != nil {
		return nil, fmt.Errorf("device chain of the head: %w", err)
	}
	d := &Device{Version: 1, Volume: body.Volume, Name: body.Name, Policy: body.Policy, Chain: body.Chain, Pool: body.Pool}
	for _, wrapped := range body.Bundles {
		bundle, err := r.Unwrap(wrapBundle, wrapped)
		if err != nil {
			return nil, fmt.Errorf("key bundle of the head: %w", err)
		}
		d.Bundles = append(d.Bundles, bundle)
	}
	if len(body.PoolKey) > 0 {
		if d.PoolKey, err = r.Unwrap(wrapPoolKey, body.PoolKey); err != nil {
			return nil, fmt.Errorf("pool key of the head: %w", err)
		}
	}
	return d, d.enroll(r, slot)
}

// rebuild applies the checkpoint and the log to the empty tree of v.
func (v *Volume) rebuild(ctx context.Context, dev *Device, body *headpb.Body, t p2p.Transport) (entries int, err error) {
	b := &logBatch{apply: func(entries []logEntry) error {
		_, err := v.commit(func(t *tx) error {
			for _, e := range entries {
				var err error
				if e.value, err = adoptValue(e.key, e.value); err != nil {
					return err
				}
				if err := e.applyTo(t.Txn); err != nil {
					return err
				}
			}
			return nil
		})
		return err
	}}
	if err := readLog(ctx, dev, body, t, v.log, b); err != nil {
		return b.entries, err
	}
	return b.entries, v.recount()
}

// readLog reads checkpoint and log of a head from the pool, in order.
func readLog(ctx context.Context, dev *Device, body *headpb.Body, t p2p.Transport, log *slog.Logger, b *logBatch) error {
	keys, err := newKeyring(dev)
	if err != nil {
		return err
	}
	unpack, err := chunker.NewCompressor(1)
	if err != nil {
		return err
	}
	stripes := stripe.NewStore(stripe.Options{Transport: t, Volume: [16]byte(dev.Volume), Bundle: keys.Bundle, Epoch: keys.Epoch, Logger: log})
	for i, seg := range body.Segments {
		if err := readLogStripe(ctx, dev, keys, stripes, unpack, seg, b); err != nil {
			return fmt.Errorf("log stripe %d of %d: %w", i+1, len(body.Segments), err)
		}
	}
	return b.flush()
}

func readLogStripe(ctx context.Context, dev *Device, keys *keyring, stripes *stripe.Store, unpack *chunker.Compressor, seg *headpb.Stripe, b *logBatch) error {
	if len(seg.Id) != 16 {
		return fmt.Errorf("%w: stripe id of %d bytes", errLog, len(seg.Id))
	}
	id := [16]byte(seg.Id)
	var info metastore.StripeInfo
	if err := info.UnmarshalBinary(seg.Info); err != nil {
		return err
	}
	bundle, err := keys.Bundle(info.Epoch)
	if err != nil {
		return err
	}
	salt, _, err := stripes.Salt(ctx, id, &info)
	if err != nil {
		return err
	}
	data, _, err := stripes.Read(ctx, id, &info, 0, info.K*int(info.ShardBytes))
	if err != nil {
		return err
	}
	for i, s := range seg.Slices {
		c := seal.SliceContext{Volume: [16]byte(dev.Volume), Stripe: id, Slice: uint32(i), Epoch: info.Epoch, Length: s.StoredBytes, Purpose: seal.PurposeLog}
		plain, err := readLogSlice(data, s, func(data []byte, n int) ([]byte, error) {
			end := int(s.Offset) + seal.SealedBytes(n)
			if end > len(data) {
				return nil, fmt.Errorf("%w: slice outside its stripe", errLog)
			}
			return seal.OpenSlice(nil, bundle.Metadata, salt, c, data[s.Offset:end])
		}, unpack)
		if err != nil {
			return fmt.Errorf("slice %d: %w", i, err)
		}
		if err := decodeLog(plain, b.add); err != nil {
			return fmt.Errorf("slice %d: %w", i, err)
		}
	}
	return nil
}

// logBatch gathers log entries and applies them in batches.
type logBatch struct {
	apply   func([]logEntry) error
	batch   []logEntry
	bytes   int
	entries int
}

func (b *logBatch) add(e logEntry) error {
	b.batch = append(b.batch, e)
	b.bytes += len(e.key) + len(e.value)
	b.entries++
	if len(b.batch) < entriesPerCommit && b.bytes < bytesPerCommit {
		return nil
	}
	return b.flush()
}

func (b *logBatch) flush() error {
	batch := b.batch
	b.batch, b.bytes = nil, 0
	if len(batch) == 0 {
		return nil
	}
	return b.apply(batch)
}

// applyTo makes the entry's change.
func (e logEntry) applyTo(t *metastore.Txn) error {
	if e.value == nil {
		return t.DeleteTree(e.key)
	}
	return t.PutTree(e.key, e.value)
}

// adoptValue returns the value that a log entry has in the tree of the device
// that recovers: of a stripe it is noted that another device has made it.
func adoptValue(key, value []byte) ([]byte, error) {
	k, err := metastore.ParseTreeKey(key)
	if err != nil || k.Kind != 's' || value == nil {
		return value, err
	}
	var info metastore.StripeInfo
	if err := info.UnmarshalBinary(value); err != nil {
		return nil, err
	}
	info.CreatedSeq = metastore.CreatedElsewhere
	return info.MarshalBinary()
}
