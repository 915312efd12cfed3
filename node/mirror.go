package node

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/zeebo/blake3"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

const (
	roundShardsMax = 4096 // copied in one round
	triesMax       = 4    // nodes tried for one copy
	restRounds     = 8    // between two tries to settle the same difference
)

// inventory sums up the shards shared with one partner: how many, and the
// exclusive or of the hashes of their names.
type inventory struct {
	shards uint64
	sum    [32]byte
}

// mirrors is what the node remembers of its partners between rounds.
type mirrors struct {
	mu     sync.Mutex
	rng    *rand.Rand
	copied map[shardstore.Key]placement.NodeID // copied, but the keepers do not know yet
	moved  map[shardstore.Key]placement.NodeID // given away, but the move is not through
	differ map[placement.NodeID]difference     // from partners whose inventory is another
	cached map[placement.NodeID]cachedInventory
}

type difference struct {
	ours, theirs inventory
	rest         int // rounds to wait, because what could be sent has been sent
}

type cachedInventory struct {
	inventory
	until time.Time
}

func (m *mirrors) init() {
	var seed [32]byte
	_, _ = crand.Read(seed[:]) // never fails
	m.rng = rand.New(rand.NewChaCha8(seed))
	m.copied = map[shardstore.Key]placement.NodeID{}
	m.moved = map[shardstore.Key]placement.NodeID{}
	m.differ = map[placement.NodeID]difference{}
	m.cached = map[placement.NodeID]cachedInventory{}
}

// ping answers a partner with the inventory of what is shared with it.
func (n *Node) ping(from placement.NodeID) (*wire.PingReply, error) {
	n.mirrors.mu.Lock()
	c, ok := n.mirrors.cached[from]
	n.mirrors.mu.Unlock()
	if now := n.o.Now(); !ok || !now.Before(c.until) {
		inv, err := n.inventory(from)
		if err != nil {
			return nil, err
		}
		c = cachedInventory{inv, now.Add(n.o.MirrorInterval / 4)}
		n.mirrors.mu.Lock()
		if len(n.mirrors.cached) >= countersMax {
			clear(n.mirrors.cached)
		}
		n.mirrors.cached[from] = c
		n.mirrors.mu.Unlock()
	}
	return &wire.PingReply{Shards: c.shards, Inventory: c.sum[:]}, nil
}

func (n *Node) inventory(partner placement.NodeID) (inv inventory, err error) {
	err = n.store.PartnerShards(string(partner), func(k shardstore.Key) bool {
		sum := blake3.Sum256(append(k.Blind[:], k.Index))
		for i := range sum {
			inv.sum[i] ^= sum[i]
		}
		inv.shards++
		return true
	})
	return inv, err
}

// mirrorRound copies the shards of lost partners elsewhere and compares
// inventories with the others.
func (n *Node) mirrorRound(ctx context.Context) {
	for _, m := range n.transport.Members() {
		if m.Role != p2p.RoleNode || ctx.Err() != nil {
			continue
		}
		var err error
		switch {
		case n.givenUp(m):
			err = n.replaceMirror(ctx, m.ID)
		case m.State == p2p.Alive:
			err = n.compare(ctx, m.ID)
		}
		if err != nil && ctx.Err() == nil {
			n.log.Warn("Mirrors with a partner are not in order; tried again.", "peer", string(m.ID), "err", err)
		}
	}
}

// lost says whether a partner has been away long enough to copy its shards.
func (n *Node) lost(m p2p.Member) bool {
	return m.State == p2p.Dead || m.State == p2p.Suspect && !m.Seen.IsZero() && n.o.Now().Sub(m.Seen) >= n.o.CopyAfter
}

// givenUp says whether a node's shards are to be held by others: it has been
// silent for long, or is contained.
func (n *Node) givenUp(m p2p.Member) bool { return n.lost(m) || n.contained(m.ID) }

func (n *Node) stillGivenUp(id placement.NodeID) bool {
	for _, m := range n.transport.Members() {
		if m.ID == id {
			return n.givenUp(m)
		}
	}
	return false
}

// replaceMirror copies what is shared with a lost partner to other nodes. The
// partner's return ends it.
func (n *Node) replaceMirror(ctx context.Context, gone placement.NodeID) error {
	var keys []shardstore.Key
	if err := n.store.PartnerShards(string(gone), func(k shardstore.Key) bool {
		keys = append(keys, k)
		return len(keys) < roundShardsMax
	}); err != nil {
		return err
	}
	if len(keys) == 0 {
		return nil
	}
	errs := make([]error, len(keys))
	todo := make(chan int)
	var wg sync.WaitGroup
	for range n.o.CopiesMax {
		wg.Go(func() {
			for i := range todo {
				if ctx.Err() == nil && n.stillGivenUp(gone) {
					errs[i] = n.replaceCopy(ctx, keys[i], gone)
				}
			}
		})
	}
	for i := range keys {
		todo <- i
	}
	close(todo)
	wg.Wait()
	failed, first := 0, error(nil)
	for _, err := range errs {
		if err != nil {
			if failed++; first == nil {
				first = err
			}
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d shards not copied from a lost partner, the first: %w", failed, len(keys), first)
	}
	n.log.Info("The shards of a lost or contained partner have new mirrors.", "peer", string(gone), "shards", len(keys))
	return nil
}

// replaceCopy gives one shard a new partner: copy, tell the keepers, note it.
func (n *Node) replaceCopy(ctx context.Context, key shardstore.Key, gone placement.NodeID) error {
	info, err := n.store.Stat(key)
	if err != nil || info.Provisional || placement.NodeID(info.Partner) != gone {
		return err // an owner still at work puts it elsewhere, or it expires
	}
	_, b, err := n.store.Manifest(key)
	if err != nil {
		return n.readError(key, err)
	}
	m := new(wire.Manifest)
	if err := proto.Unmarshal(b, m); err != nil {
		return n.readError(key, errors.Join(shardstore.ErrCorrupt, err))
	}
	pool := n.poolNodes()
	keeperIDs := keepers(key.Blind, int(m.M), true, pool)
	record := n.findIndex(ctx, key.Blind, keeperIDs)

	n.mirrors.mu.Lock()
	to, done := n.mirrors.copied[key]
	n.mirrors.mu.Unlock()
	if !done {
		if to, err = n.copyToNew(ctx, key, record); err != nil {
			return err
		}
		n.mirrors.mu.Lock()
		if len(n.mirrors.copied) < roundShardsMax {
			n.mirrors.copied[key] = to
		}
		n.mirrors.mu.Unlock()
	}
	if record != nil {
		move := &wire.HolderMove{Index: uint32(key.Index), From: string(gone), To: string(to), Mirror: isMirror(record, key.Index, gone)}
		// One is enough for now: the others get the record from it when keepers
		// change, or see for themselves when they look after the stripe.
		if _, err := n.tellKeepers(ctx, key.Blind, keeperIDs, move); err != nil {
			return err
		}
	}
	if err := n.store.SetPartner(ctx, key, string(to)); err != nil {
		return err
	}
	n.mirrors.mu.Lock()
	delete(n.mirrors.copied, key)
	n.mirrors.mu.Unlock()
	return nil
}

func isMirror(r *wire.IndexRecord, index uint8, node placement.NodeID) bool {
	return slices.ContainsFunc(r.CurrentHolders(), func(h *wire.Holder) bool {
		return h.Index == uint32(index) && placement.NodeID(h.Mirror) == node
	})
}

// findIndex asks the stripe's keepers, this node first when it is one, for the
// newest index record; nil when none has it.
func (n *Node) findIndex(ctx context.Context, blind [32]byte, keeperIDs []placement.NodeID) (newest *wire.IndexRecord) {
	consider := func(r *wire.IndexRecord) {
		if r.GetManifest() == nil || r.Verify() != nil || [32]byte(r.Manifest.Blind) != blind {
			return
		}
		if newest == nil || r.Version > newest.Version || r.Version == newest.Version && len(r.Moves) > len(newest.Moves) {
			newest = r
		}
	}
	if r, err := n.index(blind); err == nil {
		consider(r)
	}
	for _, k := range keeperIDs {
		if newest != nil {
			break
		}
		if k == n.transport.Self() {
			continue
		}
		rep, _, err := n.call(ctx, k, &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{blind[:]}}}}, nil)
		if err == nil {
			for _, r := range rep.GetGetIndex().GetRecords() {
				consider(r)
			}
		}
	}
	return newest
}

// copyToNew copies a shard to a node that holds none of the stripe, on a host
// that holds none if there is one.
func (n *Node) copyToNew(ctx context.Context, key shardstore.Key, record *wire.IndexRecord) (placement.NodeID, error) {
	takers := n.takers(record)
	var last error
	for range triesMax {
		to, err := takers.next()
		if err != nil {
			return "", errors.Join(last, err)
		}
		if last = n.pushCopy(ctx, key, to); last == nil {
			return to, nil
		}
		if errors.Is(last, shardstore.ErrCorrupt) || errors.Is(last, shardstore.ErrNotFound) {
			return "", last
		}
	}
	return "", last
}

// takers are the live nodes that may be given a shard of a stripe: they hold
// none of it. Those apart from all live holders, by host, come first.
type takers struct {
	n          *Node
	apart, any []placement.Node
}

func (n *Node) takers(record *wire.IndexRecord) *takers {
	members := n.transport.Members()
	holds := map[placement.NodeID]bool{n.transport.Self(): true}
	for _, h := range record.CurrentHolders() {
		holds[placement.NodeID(h.Primary)], holds[placement.NodeID(h.Mirror)] = true, true
	}
	hosts := map[string]bool{}
	for _, m := range members {
		if holds[m.ID] && m.State != p2p.Dead {
			hosts[m.Host] = true
		}
	}
	t := &takers{n: n}
	for _, m := range members {
		if m.Role != p2p.RoleNode || m.State != p2p.Alive || holds[m.ID] {
			continue
		}
		node := placement.Node{
			ID: m.ID, Host: m.Host, Subnet: m.Subnet, Zone: m.Zone, CapacityBytes: m.CapacityBytes, UsedBytes: m.UsedBytes,
			LatencyMs: float64(m.RTT) / float64(time.Millisecond), Uptime: 1, Alive: true, Reputation: n.Reputation(m.ID),
		}
		t.any = append(t.any, node)
		if !hosts[m.Host] {
			t.apart = append(t.apart, node)
		}
	}
	return t
}

// keep leaves only those that eligible accepts; nil accepts all.
func (t *takers) keep(eligible func(placement.Node) bool) {
	if eligible == nil {
		return
	}
	not := func(x placement.Node) bool { return !eligible(x) }
	t.apart, t.any = slices.DeleteFunc(t.apart, not), slices.DeleteFunc(t.any, not)
}

// next draws one by score; none is drawn twice.
func (t *takers) next() (placement.NodeID, error) {
	from := t.apart
	if len(from) == 0 {
		from = t.any
	}
	t.n.mirrors.mu.Lock()
	pairs, err := placement.Choose(t.n.mirrors.rng, from, 1, false)
	t.n.mirrors.mu.Unlock()
	if err != nil {
		return "", errNoTaker
	}
	to := pairs[0].Primary
	drawn := func(x placement.Node) bool { return x.ID == to }
	t.apart, t.any = slices.DeleteFunc(t.apart, drawn), slices.DeleteFunc(t.any, drawn)
	return to, nil
}

var errNoTaker = errors.New("no node is eligible")

// pushCopy sends a shard with its lock, and its commit if it has one.
func (n *Node) pushCopy(ctx context.Context, key shardstore.Key, to placement.NodeID) error {
	info, err := n.store.Stat(key)
	if err != nil {
		return err
	}
	if err := n.budget.spend(ctx, info.Bytes); err != nil {
		return err
	}
	r, err := n.store.ReadShard(key, 0, 0, nil)
	if err != nil {
		return n.readError(key, err)
	}
	m := new(wire.Manifest)
	if err := proto.Unmarshal(r.Manifest, m); err != nil {
		return n.readError(key, errors.Join(shardstore.ErrCorrupt, err))
	}
	lock, err := n.wireLock(key.Blind)
	if err != nil {
		return err
	}
	body := append(append(make([]byte, 0, len(r.Column)+len(r.Coded)), r.Column[:]...), r.Coded...)
	_, _, err = n.call(ctx, to, &wire.Request{Op: &wire.Request_PutShard{PutShard: &wire.PutShard{
		Manifest: m, Index: uint32(key.Index), Lock: lock, Crc32C: erasure.CRC(body), MirrorCopy: true, Partner: string(n.transport.Self()),
	}}}, body)
	if err == nil {
		n.did.copied.Add(1)
	}
	if err != nil || len(r.Proof) == 0 {
		return err
	}
	_, _, err = n.call(ctx, to, &wire.Request{Op: &wire.Request_CommitShards{CommitShards: &wire.CommitShards{
		Commits: []*wire.Commit{{Blind: key.Blind[:], Signature: r.Proof}},
	}}}, nil)
	return err
}

// tellKeepers tells all keepers of a move and returns how many took it, with an
// error where none did.
func (n *Node) tellKeepers(ctx context.Context, blind [32]byte, keeperIDs []placement.NodeID, move *wire.HolderMove) (took int, err error) {
	var mu sync.Mutex
	last := errors.New("no keepers")
	each(len(keeperIDs), func(i int) {
		err := n.tellKeeper(ctx, blind, keeperIDs[i], move)
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			took++
		} else {
			last = err
		}
	})
	if took == 0 {
		return 0, fmt.Errorf("tell keepers of a move: %w", last)
	}
	return took, nil
}

// tellKeeper tells one keeper of a move; one that is new gets the index record
// first, where it is kept here.
func (n *Node) tellKeeper(ctx context.Context, blind [32]byte, id placement.NodeID, move *wire.HolderMove) error {
	op := &wire.MoveHolder{Blind: blind[:], Move: move}
	if id == n.transport.Self() {
		return n.moveHolder(ctx, id, op)
	}
	tell := func() error {
		_, _, err := n.call(ctx, id, &wire.Request{Op: &wire.Request_MoveHolder{MoveHolder: op}}, nil)
		return err
	}
	err := tell()
	if p2p.StatusOf(err) != wire.Status_STATUS_NOT_FOUND {
		return err
	}
	record, indexErr := n.index(blind)
	if indexErr != nil {
		return err
	}
	if _, _, err := n.call(ctx, id, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{record}}}}, nil); err != nil {
		return err
	}
	return tell()
}

// compare exchanges inventories with a partner. A difference that lasts for
// two rounds is settled by sending what the partner lacks; what we lack, it
// sends us.
func (n *Node) compare(ctx context.Context, partner placement.NodeID) error {
	ours, err := n.inventory(partner)
	if err != nil || ours.shards == 0 {
		return err
	}
	rep, _, err := n.call(ctx, partner, &wire.Request{Op: &wire.Request_Ping{Ping: &wire.Ping{Shards: ours.shards, Inventory: ours.sum[:]}}}, nil)
	if err != nil {
		return err
	}
	theirs := inventory{shards: rep.GetPing().GetShards()}
	copy(theirs.sum[:], rep.GetPing().GetInventory())
	n.mirrors.mu.Lock()
	before := n.mirrors.differ[partner]
	lasts := before.ours == ours && before.theirs == theirs
	switch {
	case ours == theirs:
		delete(n.mirrors.differ, partner)
	case !lasts:
		n.mirrors.differ[partner] = difference{ours: ours, theirs: theirs}
	case before.rest > 0:
		// The partner may lose again just what it had been sent.
		n.mirrors.differ[partner] = difference{ours: ours, theirs: theirs, rest: before.rest - 1}
	}
	n.mirrors.mu.Unlock()
	if ours == theirs || !lasts || before.rest > 0 {
		return nil
	}
	if err := n.sendMissing(ctx, partner); err != nil {
		return err
	}
	n.mirrors.mu.Lock()
	n.mirrors.differ[partner] = difference{ours: ours, theirs: theirs, rest: restRounds}
	n.mirrors.mu.Unlock()
	return nil
}

func (n *Node) sendMissing(ctx context.Context, partner placement.NodeID) error {
	var keys []shardstore.Key
	if err := n.store.PartnerShards(string(partner), func(k shardstore.Key) bool {
		keys = append(keys, k)
		return true
	}); err != nil {
		return err
	}
	for batch := range slices.Chunk(keys, wire.BatchMax) {
		ask := &wire.HasShards{}
		for _, k := range batch {
			ask.Shards = append(ask.Shards, &wire.ShardRef{Blind: k.Blind[:], Index: uint32(k.Index)})
		}
		rep, _, err := n.call(ctx, partner, &wire.Request{Op: &wire.Request_HasShards{HasShards: ask}}, nil)
		if err != nil {
			return err
		}
		held := rep.GetHasShards().GetHeld()
		if len(held) != len(batch) {
			return errors.New("the partner answered for another number of shards")
		}
		for i, k := range batch {
			info, err := n.store.Stat(k)
			if held[i] || err != nil || info.Provisional {
				continue
			}
			if err := n.pushCopy(ctx, k, partner); err != nil {
				return fmt.Errorf("send %v to its mirror: %w", k, err)
			}
			n.log.Info("A shard was copied to its mirror again.", "shard", k.String(), "peer", string(partner))
		}
	}
	return nil
}
