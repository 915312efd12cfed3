package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/shardstore"
)

// What keepers do about shards that are lost with all their copies: they fetch
// any k others whole, rebuild the lost ones bit for bit, give them to new
// holders and tell each other. Nobody needs the volume's keys for that. A shard
// of which one copy is left is its holder's to copy (mirrorRound).

const (
	repairsMax     = 4096 // broken stripes remembered; more are found again by the next look
	rebuildBytes   = 256 << 20
	standInRounds  = 10 // rounds that each keeper of lower rank waits longer
	keeperNearness = 2  // as many times the keepers count as such where views of the pool may differ
	toldMax        = 8  // times that the last in rank tells of a repair before it gives way
)

// repairs is what a keeper knows of the stripes that it looks after. It belongs
// to the goroutine of Run that calls repairRound.
type repairs struct {
	gone    map[placement.NodeID]p2p.State // of the last look: who is silent or dead
	asked   time.Time                      // when holders were last asked for their shards
	missing map[shardstore.Key]map[placement.NodeID]bool
	broken  map[[32]byte]*repair
	more    bool // broken stripes that did not fit
}

// repair is one stripe that is broken or whose new holders are not known to
// enough keepers yet.
type repair struct {
	blind  [32]byte
	spare  int // healthy shards beyond k
	rounds int
	moves  []*wire.HolderMove // made, and not yet accepted by a majority
	told   int                // how often others were told of them
	commit *wire.Commit       // for the holders that the moves name
}

// health is how a stripe's shards are, as one keeper sees it.
type health struct {
	healthy int
	lost    []int // shards with a known holder of whom none is left
}

// repairRound looks for stripes that have lost shards when members have come or
// gone, asks all holders for their shards now and then, and repairs what is
// broken, the stripes with the fewest healthy shards first.
func (n *Node) repairRound(ctx context.Context) {
	r := &n.repairs
	gone := map[placement.NodeID]p2p.State{}
	for _, m := range n.transport.Members() {
		switch {
		case m.Role != p2p.RoleNode:
		case n.contained(m.ID):
			gone[m.ID] = p2p.Dead // what it says is worth nothing
		case n.lost(m):
			gone[m.ID] = m.State
		}
	}
	census := n.o.Now().Sub(r.asked) >= n.o.CensusInterval
	if census {
		r.asked = n.o.Now()
		r.missing = n.census(ctx)
	}
	if census || r.more || !maps.Equal(gone, r.gone) {
		r.gone = gone
		if err := n.findBroken(ctx); err != nil {
			n.log.Error("Index records cannot be read; stripes that have lost shards are not found.", "err", err)
			return
		}
		if census {
			n.giveRecords(ctx)
		}
		n.log.Info("Stripes whose index records are kept here were looked at.", "silent_nodes", len(gone), "with_lost_shards", len(r.broken))
	}
	n.did.broken.Store(int64(len(r.broken)))
	defer func() { n.did.broken.Store(int64(len(r.broken))) }()
	if len(r.broken) == 0 {
		return
	}
	queue := slices.SortedFunc(maps.Values(r.broken), func(a, b *repair) int { return cmp.Compare(a.spare, b.spare) })
	slots := make(chan struct{}, n.o.CopiesMax)
	done := make([]bool, len(queue))
	var wg sync.WaitGroup
	for i, job := range queue {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if ctx.Err() != nil {
				return
			}
			var err error
			if done[i], err = n.repair(ctx, job); err != nil && ctx.Err() == nil {
				n.log.Warn("A stripe that has lost shards is not whole yet; tried again.", "stripe", blindText(job.blind), "err", err)
			}
		})
	}
	wg.Wait()
	for i, job := range queue {
		if done[i] {
			delete(r.broken, job.blind)
		}
	}
	if len(r.broken) == 0 && !r.more {
		n.log.Info("All stripes whose index records are kept here are whole again.")
	}
}

// eachIndex calls f with every index record kept here.
func (n *Node) eachIndex(ctx context.Context, f func(blind [32]byte, record *wire.IndexRecord)) error {
	var after [32]byte
	for ctx.Err() == nil {
		var blinds [][32]byte
		if err := n.store.Indexes(after, func(b [32]byte) bool {
			blinds = append(blinds, b)
			return len(blinds) < 1024
		}); err != nil {
			return err
		}
		if len(blinds) == 0 {
			return nil
		}
		after = blinds[len(blinds)-1]
		for _, blind := range blinds {
			if record, err := n.index(blind); err == nil { // else another keeper has it
				f(blind, record)
			}
		}
	}
	return ctx.Err()
}

// findBroken notes the stripes that have lost a shard.
func (n *Node) findBroken(ctx context.Context) error {
	r := &n.repairs
	r.more = false
	return n.eachIndex(ctx, func(blind [32]byte, record *wire.IndexRecord) {
		h := n.assess(record)
		if len(h.lost) == 0 || r.broken[blind] != nil {
			return
		}
		if len(r.broken) >= repairsMax {
			r.more = true
			return
		}
		r.broken[blind] = &repair{blind: blind, spare: h.healthy - int(record.Manifest.K)}
	})
}

// assess counts a stripe's healthy shards. Silence of CopyAfter is loss enough
// where a stripe has no more than one shard to spare, else only death is.
func (n *Node) assess(record *wire.IndexRecord) health {
	h := n.assessBy(record, func(s p2p.State) bool { return true })
	if h.healthy > int(record.Manifest.K)+1 {
		h = n.assessBy(record, func(s p2p.State) bool { return s == p2p.Dead })
	}
	return h
}

func (n *Node) assessBy(record *wire.IndexRecord, counts func(p2p.State) bool) (h health) {
	blind := [32]byte(record.Manifest.Blind)
	for _, holder := range record.CurrentHolders() {
		left := false
		for _, id := range []string{holder.Primary, holder.Mirror} {
			state, silent := n.repairs.gone[placement.NodeID(id)]
			left = left || id != "" && !(silent && counts(state)) &&
				!n.repairs.missing[shardstore.Key{Blind: blind, Index: uint8(holder.Index)}][placement.NodeID(id)]
		}
		if left {
			h.healthy++
		} else {
			h.lost = append(h.lost, int(holder.Index))
		}
	}
	return h
}

// census asks the holders of all records kept here whether they still have
// their shards, and returns who says no.
func (n *Node) census(ctx context.Context) map[shardstore.Key]map[placement.NodeID]bool {
	missing := map[shardstore.Key]map[placement.NodeID]bool{}
	dead := map[[32]byte]map[uint8]bool{} // shards that were deleted at a holder
	batches := map[placement.NodeID][]shardstore.Key{}
	ask := func(id placement.NodeID) {
		keys := batches[id]
		delete(batches, id)
		held, deleted, err := n.askHolder(ctx, id, keys)
		if err != nil {
			return // heartbeats tell whether it is gone
		}
		for i, key := range keys {
			if deleted[i] && (dead[key.Blind] != nil || len(dead) < repairsMax) {
				if dead[key.Blind] == nil {
					dead[key.Blind] = map[uint8]bool{}
				}
				dead[key.Blind][key.Index] = true
			}
			if !held[i] && len(missing) < repairsMax {
				if missing[key] == nil {
					missing[key] = map[placement.NodeID]bool{}
				}
				missing[key][id] = true
			}
		}
	}
	if err := n.eachIndex(ctx, func(blind [32]byte, record *wire.IndexRecord) {
		for _, holder := range record.CurrentHolders() {
			for _, id := range []string{holder.Primary, holder.Mirror} {
				if id == "" {
					continue
				}
				to := placement.NodeID(id)
				batches[to] = append(batches[to], shardstore.Key{Blind: blind, Index: uint8(holder.Index)})
				if len(batches[to]) == wire.BatchMax {
					ask(to)
				}
			}
		}
	}); err != nil && ctx.Err() == nil {
		n.log.Error("Index records cannot be read; holders are not asked for their shards.", "err", err)
	}
	for id := range batches {
		ask(id)
	}
	for blind, shards := range dead {
		n.forgetDeleted(ctx, blind, len(shards))
	}
	return missing
}

// forgetDeleted drops the index record of a stripe that its owner has deleted
// while this keeper was away: where so many holders have seen the owner's
// signature that fewer than k shards are left, the record is of no use.
func (n *Node) forgetDeleted(ctx context.Context, blind [32]byte, shards int) {
	record, err := n.index(blind)
	if err != nil || shards <= int(record.Manifest.M) {
		return
	}
	if err := n.store.ForgetIndex(ctx, blind); err != nil && ctx.Err() == nil {
		n.log.Error("The index record of a deleted stripe was not dropped.", "stripe", blindText(blind), "err", err)
	}
}

// giveRecords gives index records to keepers that should have them and say that
// they have not, because they have lost their disk or were away.
func (n *Node) giveRecords(ctx context.Context) {
	pool := n.poolNodes()
	batches := map[placement.NodeID][]*wire.IndexRecord{}
	give := func(id placement.NodeID) {
		records := batches[id]
		delete(batches, id)
		var keys []shardstore.Key
		for _, r := range records {
			keys = append(keys, shardstore.Key{Blind: [32]byte(r.Manifest.Blind), Index: wire.IndexNumber})
		}
		held, err := n.heldBy(ctx, id, keys)
		if err != nil {
			return // silent; handed over when it is dead
		}
		op := &wire.PutIndex{}
		for i, r := range records {
			if !held[i] {
				op.Records = append(op.Records, r)
			}
		}
		if len(op.Records) == 0 {
			return
		}
		if _, _, err := n.call(ctx, id, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: op}}, nil); err != nil {
			n.log.Warn("Index records were not given to a keeper that lacks them; tried again.", "peer", string(id), "records", len(op.Records), "err", err)
			return
		}
		n.log.Info("Index records were given to a keeper that lacked them.", "peer", string(id), "records", len(op.Records))
	}
	if err := n.eachIndex(ctx, func(blind [32]byte, record *wire.IndexRecord) {
		if n.assess(record).healthy < int(record.Manifest.K) {
			return // its owner may have deleted it while this node was away
		}
		for _, id := range keepers(blind, int(record.Manifest.M), record.Mirrored, pool) {
			if id == n.transport.Self() || !n.alive(id) {
				continue
			}
			if batches[id] = append(batches[id], record); len(batches[id]) == handoverBatch || len(batches[id])*proto.Size(record) > messageRoom/2 {
				give(id)
			}
		}
	}); err != nil && ctx.Err() == nil {
		n.log.Error("Index records cannot be read; keepers that lack them are not found.", "err", err)
	}
	for id := range batches {
		give(id)
	}
}

// heldBy asks a node which of the shards it has.
func (n *Node) heldBy(ctx context.Context, id placement.NodeID, keys []shardstore.Key) ([]bool, error) {
	held, _, err := n.askHolder(ctx, id, keys)
	return held, err
}

// askHolder asks a node which of the shards it has, and which it had until their
// owner deleted them.
func (n *Node) askHolder(ctx context.Context, id placement.NodeID, keys []shardstore.Key) (held, deleted []bool, err error) {
	held, deleted = make([]bool, len(keys)), make([]bool, len(keys))
	if id == n.transport.Self() {
		for i, key := range keys {
			held[i], deleted[i] = n.has(key), n.store.Deleted(key)
		}
		return held, deleted, nil
	}
	op := &wire.HasShards{}
	for _, key := range keys {
		op.Shards = append(op.Shards, &wire.ShardRef{Blind: key.Blind[:], Index: uint32(key.Index)})
	}
	rep, _, err := n.call(ctx, id, &wire.Request{Op: &wire.Request_HasShards{HasShards: op}}, nil)
	if err == nil && len(rep.GetHasShards().GetHeld()) != len(keys) {
		err = fmt.Errorf("node %s answered for another number of shards", id)
	}
	if err != nil {
		return nil, nil, err
	}
	copy(deleted, rep.GetHasShards().GetDeleted()) // which an older program does not send
	return rep.GetHasShards().Held, deleted, nil
}

// repair makes one stripe whole and reports whether nothing is left to do.
func (n *Node) repair(ctx context.Context, job *repair) (done bool, err error) {
	record, err := n.index(job.blind)
	if errors.Is(err, shardstore.ErrNotFound) {
		return true, nil // no keeper any more, or deleted by the owner
	}
	if err != nil {
		return false, err
	}
	keeperIDs := keepers(job.blind, int(record.Manifest.M), record.Mirrored, n.poolNodes())
	if err := n.settle(ctx, job, keeperIDs); err != nil {
		return false, err
	}
	h := n.assess(record)
	job.spare = h.healthy - int(record.Manifest.K)
	if len(h.lost) == 0 {
		return true, nil
	}
	// The first in rank repairs; the others stand in when it does not.
	rank := slices.Index(keeperIDs, n.transport.Self())
	if job.rounds++; rank < 0 || job.rounds <= rank*standInRounds {
		return false, nil
	}
	if record = n.catchUp(ctx, record, keeperIDs); len(n.assess(record).lost) < len(h.lost) {
		return n.repair(ctx, job)
	}
	if job.spare < 0 {
		return false, fmt.Errorf("%d shards are left, %d are needed: the nodes that hold the others must come back", h.healthy, record.Manifest.K)
	}
	bodies, commit, err := n.rebuild(ctx, record, h.lost, job.spare)
	if err != nil {
		return false, err
	}
	job.commit = commit
	takers := n.takers(record)
	for _, i := range h.lost {
		moves, placeErr := n.replaceHolder(ctx, record, i, bodies[i], takers)
		if placeErr != nil {
			err = fmt.Errorf("place shard %d: %w", i, placeErr)
			break
		}
		n.did.rebuilt.Add(1)
		job.moves = append(job.moves, moves...)
	}
	n.log.Info("Lost shards of a stripe were rebuilt.", "stripe", blindText(job.blind), "shards", len(h.lost), "healthy_before", h.healthy)
	err = errors.Join(err, n.settle(ctx, job, keeperIDs))
	return err == nil, err
}

// catchUp asks the other keepers for their records of a stripe and takes over
// what they have repaired already.
func (n *Node) catchUp(ctx context.Context, record *wire.IndexRecord, keeperIDs []placement.NodeID) *wire.IndexRecord {
	blind := [32]byte(record.Manifest.Blind)
	for _, id := range keeperIDs {
		if id == n.transport.Self() {
			continue
		}
		rep, _, err := n.call(ctx, id, &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{blind[:]}}}}, nil)
		if err != nil {
			continue
		}
		for _, theirs := range rep.GetGetIndex().GetRecords() {
			if theirs.GetManifest() == nil || theirs.Verify() != nil || [32]byte(theirs.Manifest.Blind) != blind {
				continue
			}
			if theirs.Version > record.Version {
				theirs.Moves = nil // one keeper's word
				if b, err := marshal(theirs); err == nil {
					_ = n.store.PutIndex(ctx, blind, theirs.Version, b) // a newer one is there: as well
				}
			}
			for _, move := range theirs.Moves {
				if theirs.Version == record.Version {
					_ = n.moveHolder(ctx, id, &wire.MoveHolder{Blind: blind[:], Move: move}) // where it does not hold, nothing is moved
				}
			}
		}
	}
	if newest, err := n.index(blind); err == nil {
		return newest
	}
	return record
}

// rebuild fetches k shards whole and computes those in lost, and returns them by
// number with the commit of the stripe. Memory is bounded over all stripes that
// are rebuilt at once.
func (n *Node) rebuild(ctx context.Context, record *wire.IndexRecord, lost []int, spare int) (bodies [][]byte, commit *wire.Commit, err error) {
	g := erasure.Geometry{K: int(record.Manifest.K), M: int(record.Manifest.M), ShardBytes: int(record.Manifest.ShardBytes)}
	if err := g.Validate(); err != nil {
		return nil, nil, err
	}
	weight := min(int64(g.K+len(lost))*int64(g.BodyBytes()), rebuildBytes)
	if err := n.rebuilds.Acquire(ctx, weight); err != nil {
		return nil, nil, err
	}
	defer n.rebuilds.Release(weight)
	spend := n.budget.spend
	if spare <= 0 {
		spend = n.budget.charge // one more loss, and the stripe is gone
	}
	if err := spend(ctx, (g.K+len(lost))*g.BodyBytes()); err != nil {
		return nil, nil, err
	}
	code, err := n.codes.Get(g.K, g.M)
	if err != nil {
		return nil, nil, err
	}
	bodies = make([][]byte, g.N())
	var mu sync.Mutex // guards bodies, commit, have and failed
	have, failed := 0, error(nil)
	holders := record.CurrentHolders()
	rand.Shuffle(len(holders), func(i, j int) { holders[i], holders[j] = holders[j], holders[i] })
	for len(holders) > 0 && have < g.K {
		next := holders[:min(g.K-have, len(holders))]
		holders = holders[len(next):]
		each(len(next), func(i int) {
			body, proof, err := n.fetchWhole(ctx, record, next[i])
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			bodies[next[i].Index], have = body, have+1
			if commit == nil && len(proof) > 0 {
				commit = &wire.Commit{Blind: record.Manifest.Blind, Signature: proof}
			}
		})
	}
	if have < g.K {
		return nil, nil, fmt.Errorf("%d of %d shards could be fetched: %w", have, g.K, failed)
	}
	want := make([]bool, g.N())
	for _, i := range lost {
		want[i] = true
	}
	if err := code.Reconstruct(bodies, want); err != nil {
		return nil, nil, err
	}
	for _, i := range lost {
		if err := erasure.VerifyBody([32]byte(record.Manifest.Roots[i]), bodies[i]); err != nil {
			return nil, nil, fmt.Errorf("rebuilt shard %d is not the one that was lost: %w", i, err)
		}
	}
	return bodies, commit, nil
}

// fetchWhole gets one shard with its column from one of its holders, verified.
func (n *Node) fetchWhole(ctx context.Context, record *wire.IndexRecord, holder *wire.Holder) (body, proof []byte, err error) {
	err = errors.New("it has no holder")
	for _, id := range []string{holder.Primary, holder.Mirror} {
		if _, silent := n.repairs.gone[placement.NodeID(id)]; id == "" || silent {
			continue
		}
		if body, proof, err = n.wholeFrom(ctx, record, holder.Index, placement.NodeID(id)); err == nil {
			return body, proof, nil
		}
	}
	return nil, nil, fmt.Errorf("shard %d: %w", holder.Index, err)
}

func (n *Node) wholeFrom(ctx context.Context, record *wire.IndexRecord, index uint32, id placement.NodeID) (body, proof []byte, err error) {
	if id == n.transport.Self() {
		r, err := n.store.ReadShard(shardstore.Key{Blind: [32]byte(record.Manifest.Blind), Index: uint8(index)}, 0, 0, nil)
		if err != nil {
			return nil, nil, err
		}
		body, proof = slices.Concat(r.Column[:], r.Coded), r.Proof
	} else {
		rep, b, err := n.call(ctx, id, &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{
			Blind: record.Manifest.Blind, Index: index, Whole: true,
		}}}, nil)
		if err != nil {
			return nil, nil, err
		}
		body, proof = b, rep.GetGetShard().GetCommit()
	}
	if err := erasure.VerifyBody([32]byte(record.Manifest.Roots[index]), body); err != nil {
		return nil, nil, fmt.Errorf("from node %s: %w", id, err)
	}
	if (&wire.Commit{Blind: record.Manifest.Blind, Signature: proof}).Verify(record.Manifest.IndexKey) != nil {
		proof = nil
	}
	return body, proof, nil
}

// replaceHolder gives a rebuilt shard to new holders, mirrored where the stripe
// is, and returns the moves to tell.
func (n *Node) replaceHolder(ctx context.Context, record *wire.IndexRecord, index int, body []byte, takers *takers) ([]*wire.HolderMove, error) {
	holders := record.CurrentHolders()
	old := holders[slices.IndexFunc(holders, func(h *wire.Holder) bool { return h.Index == uint32(index) })]
	lock, err := n.wireLock([32]byte(record.Manifest.Blind))
	if err != nil {
		return nil, err
	}
	var last error
	for range triesMax {
		to, err := takers.next()
		if err != nil {
			return nil, errors.Join(last, err)
		}
		op := &wire.PutShard{Manifest: record.Manifest, Index: uint32(index), Lock: lock, Crc32C: erasure.CRC(body)}
		if record.Mirrored {
			if mirror, err := takers.next(); err == nil {
				op.Mirror, op.Partner = string(mirror), string(mirror)
			}
		}
		rep, _, err := n.call(ctx, to, &wire.Request{Op: &wire.Request_PutShard{PutShard: op}}, body)
		if err != nil {
			last = err
			continue
		}
		moves := []*wire.HolderMove{{Index: uint32(index), From: old.Primary, To: string(to)}}
		if !rep.GetPutShard().GetMirrored() {
			op.Mirror = ""
		}
		if old.Mirror != op.Mirror {
			moves = append(moves, &wire.HolderMove{Index: uint32(index), From: old.Mirror, To: op.Mirror, Mirror: true})
		}
		return moves, nil
	}
	return nil, last
}

// settle tells the keepers where the rebuilt shards are. When a majority knows,
// the shards are made permanent; until then they are provisional, so that what
// two keepers have rebuilt at once does not stay for good.
func (n *Node) settle(ctx context.Context, job *repair, keeperIDs []placement.NodeID) error {
	rank := slices.Index(keeperIDs, n.transport.Self())
	for _, move := range job.moves {
		took, err := n.tellKeepers(ctx, job.blind, keeperIDs, move)
		if err == nil && took <= len(keeperIDs)/2 {
			err = fmt.Errorf("%d of %d keepers accept a new holder of shard %d", took, len(keeperIDs), move.Index)
		}
		// New keepers may lack the record for a while. But where nobody agrees,
		// or not for long, another keeper was as quick or the holder is back:
		// begin anew, in the order of rank, with what the others say.
		if job.told++; err != nil && (took <= 1 && len(keeperIDs) > 1 || job.told > toldMax*(len(keeperIDs)-rank)) {
			err = errors.Join(err, n.undo(ctx, job))
		}
		if err != nil {
			return err
		}
	}
	for _, move := range job.moves {
		if move.To == "" || job.commit == nil {
			continue
		}
		if _, _, err := n.call(ctx, placement.NodeID(move.To), &wire.Request{Op: &wire.Request_CommitShards{
			CommitShards: &wire.CommitShards{Commits: []*wire.Commit{job.commit}},
		}}, nil); err != nil {
			return fmt.Errorf("make shard %d permanent at its new holder: %w", move.Index, err)
		}
	}
	job.moves, job.told = nil, 0
	return nil
}

// undo takes the moves of a repair back here.
func (n *Node) undo(ctx context.Context, job *repair) error {
	moves := job.moves
	job.moves, job.rounds, job.told = nil, 0, 0
	return n.store.UpdateIndex(ctx, job.blind, func(b []byte) ([]byte, error) {
		r := new(wire.IndexRecord)
		if err := proto.Unmarshal(b, r); err != nil {
			return nil, errors.Join(shardstore.ErrCorrupt, err)
		}
		r.Moves = slices.DeleteFunc(r.Moves, func(m *wire.HolderMove) bool {
			return slices.ContainsFunc(moves, func(mine *wire.HolderMove) bool {
				return m.Index == mine.Index && m.Mirror == mine.Mirror && m.To == mine.To
			})
		})
		return marshal(r)
	})
}
