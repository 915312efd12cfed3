package stripe

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

// Enough is how many shards must be placed before a stripe counts as
// recoverable: min(n, k+2).
func Enough(k, m int) int { return min(k+m, k+2) }

// attemptsMax bounds the holders tried for one shard.
const attemptsMax = 4

// Place puts the shards of st on random nodes, no node holding two of them,
// and returns the stripe's info with its holders. It succeeds when at least
// Enough shards are on disk at their primaries; what is missing then is in the
// info (an empty Primary, or an empty Mirror where the policy wants one) for
// Mend. Buffers stay the caller's and are not kept.
func (s *Store) Place(ctx context.Context, st *Sealed) (metastore.StripeInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.PlaceTimeout)
	defer cancel()
	info := st.Info
	n := info.K + info.M
	nodes := s.nodes(info.Purpose, int(info.ShardBytes))
	pairs, err := placement.Choose(newRand(), nodes, n, info.Mirrored)
	if err != nil {
		return info, fmt.Errorf("place stripe %v: %w: %w", st.ID, ErrTooFewNodes, err)
	}
	info.Holders = make([]metastore.Holder, n)
	pool := newSpares(nodes, pairs)
	keys, err := s.Keys(st.ID, info.Epoch, info.LockVersion)
	if err != nil {
		return info, err
	}
	lock, err := wireLock(keys)
	if err != nil {
		return info, err
	}

	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			info.Holders[i] = s.putShard(ctx, putArgs{
				manifest: st.Manifest, lock: lock, index: i, body: st.Bodies[i], mirrored: info.Mirrored,
			}, pairs[i], pool)
			return nil
		})
	}
	g.Wait()
	if err := ctx.Err(); err != nil && info.Placed() < Enough(info.K, info.M) {
		return info, fmt.Errorf("place stripe %v: %w", st.ID, err)
	}
	if got, want := info.Placed(), Enough(info.K, info.M); got < want {
		return info, fmt.Errorf("place stripe %v: %d shards placed, %d needed: %w", st.ID, got, want, ErrTooFewNodes)
	}
	return info, nil
}

// spares hands out the nodes that hold no shard of a stripe yet.
type spares struct {
	mu   sync.Mutex
	free []placement.Node // guarded by mu
}

func newSpares(nodes []placement.Node, used []placement.Pair) *spares {
	taken := make(map[placement.NodeID]bool)
	for _, p := range used {
		taken[p.Primary], taken[p.Mirror] = true, true
	}
	sp := &spares{}
	for _, n := range nodes {
		if n.Alive && !taken[n.ID] {
			sp.free = append(sp.free, n)
		}
	}
	return sp
}

// take returns a random spare, weighted by score, or "" when there is none.
func (sp *spares) take() placement.NodeID {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	picked, err := placement.Choose(newRand(), sp.free, 1, false)
	if err != nil {
		return ""
	}
	for i, n := range sp.free {
		if n.ID == picked[0].Primary {
			sp.free = append(sp.free[:i], sp.free[i+1:]...)
			break
		}
	}
	return picked[0].Primary
}

type putArgs struct {
	manifest *wire.Manifest
	lock     *wire.Lock
	index    int
	body     []byte
	mirrored bool
}

// putShard stores one shard with its mirror, trying spare nodes where one does
// not take it. The holder it returns says what is missing.
func (s *Store) putShard(ctx context.Context, a putArgs, pair placement.Pair, pool *spares) metastore.Holder {
	crc := erasure.CRC(a.body)
	primary, mirror := pair.Primary, pair.Mirror
	for range attemptsMax {
		if primary == "" {
			if primary = pool.take(); primary == "" {
				// Where none is left, one copy is better than none.
				if primary, mirror = mirror, ""; primary == "" {
					return metastore.Holder{}
				}
			}
		}
		if a.mirrored && mirror == "" {
			mirror = pool.take()
		}
		mirrored, err := s.put(ctx, a, crc, primary, mirror)
		switch {
		case err == nil && (mirror == "" || mirrored):
			return metastore.Holder{Primary: string(primary), Mirror: string(mirror)}
		case err == nil:
			// The primary has it and its mirror does not.
			if m := s.putMirror(ctx, a, crc, primary, pool); m != "" {
				return metastore.Holder{Primary: string(primary), Mirror: string(m)}
			}
			return metastore.Holder{Primary: string(primary)}
		}
		s.log.Debug("a node did not take a shard", "peer", primary, "shard", a.index, "err", err)
		if ctx.Err() != nil {
			return metastore.Holder{}
		}
		primary = ""
	}
	return metastore.Holder{}
}

// putMirror gives a shard that its primary has a mirror. The primary copies it:
// nodes take a mirror's copy from its partner alone.
func (s *Store) putMirror(ctx context.Context, a putArgs, crc uint32, primary placement.NodeID, pool *spares) placement.NodeID {
	for range attemptsMax {
		mirror := pool.take()
		if mirror == "" || ctx.Err() != nil {
			return ""
		}
		if mirrored, err := s.put(ctx, a, crc, primary, mirror); err == nil && mirrored {
			return mirror
		}
	}
	return ""
}

// put stores one shard at its primary, which copies it to its mirror, if any.
func (s *Store) put(ctx context.Context, a putArgs, crc uint32, primary, mirror placement.NodeID) (mirrored bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*s.o.RequestTimeout)
	defer cancel()
	s.count(primary, len(a.body))
	s.count(mirror, len(a.body))
	rep, _, err := s.t.Call(ctx, primary, &wire.Request{Op: &wire.Request_PutShard{PutShard: &wire.PutShard{
		Manifest: a.manifest, Index: uint32(a.index), Lock: a.lock, Crc32C: crc, Mirror: string(mirror), Partner: string(mirror),
	}}}, a.body)
	mirrored = rep.GetPutShard().GetMirrored()
	if err != nil {
		s.count(primary, -len(a.body))
	}
	if !mirrored {
		s.count(mirror, -len(a.body))
	}
	return mirrored, err
}

// Publish hands the index records of stripes to their keepers and commits
// their shards, one batched request per node and step. The nodes next in rank
// stand in for keepers that are silent or do not take the record. It sets IndexAcks, IndexKeepers and
// Complete in each Info, and fails if a stripe's record was not acknowledged by
// as many as a majority of its keepers or too few shards were committed.
func (s *Store) Publish(ctx context.Context, stripes []Placed) error {
	for len(stripes) > 0 {
		n := min(len(stripes), wire.BatchMax/4)
		if err := s.publish(ctx, stripes[:n]); err != nil {
			return err
		}
		stripes = stripes[n:]
	}
	return nil
}

func (s *Store) publish(ctx context.Context, stripes []Placed) error {
	var failed error
	fail := func(err error) {
		if failed == nil {
			failed = err
		}
	}
	records := make([]*wire.IndexRecord, len(stripes))
	ranked := make([][]placement.NodeID, len(stripes)) // keepers, then those that stand in for silent ones
	silent := make(map[placement.NodeID]int)
	for _, m := range s.t.Members() {
		if m.State != p2p.Alive {
			silent[m.ID] = 1
		}
	}
	first, second := make(map[placement.NodeID][]int), make(map[placement.NodeID][]int)
	for i, p := range stripes {
		keys, err := s.Keys(p.ID, p.Info.Epoch, p.Info.LockVersion)
		if err != nil {
			return err
		}
		if records[i], err = indexRecord(p, keys); err != nil {
			return err
		}
		p.Info.IndexKeepers = len(s.keepers(keys.Blind, p.Info.M, p.Info.Mirrored, 1))
		ranked[i] = s.keepers(keys.Blind, p.Info.M, p.Info.Mirrored, 2)
		slices.SortStableFunc(ranked[i], func(a, b placement.NodeID) int { return cmp.Compare(silent[a], silent[b]) })
		for _, id := range ranked[i][:p.Info.IndexKeepers] {
			first[id] = append(first[id], i)
		}
	}
	acks := s.putIndex(ctx, records, first)
	for i, p := range stripes {
		p.Info.IndexAcks = acks[i]
		if acks[i] < p.Info.IndexKeepers {
			for _, id := range ranked[i][p.Info.IndexKeepers:] {
				second[id] = append(second[id], i)
			}
		}
	}
	for i, n := range s.putIndex(ctx, records, second) {
		info := stripes[i].Info
		info.IndexAcks = min(info.IndexAcks+n, info.IndexKeepers)
		info.Complete = info.IndexAcks == info.IndexKeepers
	}
	for _, p := range stripes {
		if p.Info.IndexAcks < p.Info.IndexKeepers/2+1 {
			fail(fmt.Errorf("stripe %v: %d of %d keepers acknowledged the index record: %w", p.ID, p.Info.IndexAcks, p.Info.IndexKeepers, ErrTooFewNodes))
		}
	}

	// Commit at every holder.
	type shard struct {
		commit *wire.Commit
		of     int
		mirror bool
	}
	holders := make(map[placement.NodeID][]shard)
	for i, p := range stripes {
		keys, err := s.Keys(p.ID, p.Info.Epoch, p.Info.LockVersion)
		if err != nil {
			return err
		}
		commit := wire.NewCommit(keys.Index)
		for _, h := range p.Info.Holders {
			if h.Primary != "" {
				holders[placement.NodeID(h.Primary)] = append(holders[placement.NodeID(h.Primary)], shard{commit, i, false})
			}
			if h.Mirror != "" {
				holders[placement.NodeID(h.Mirror)] = append(holders[placement.NodeID(h.Mirror)], shard{commit, i, true})
			}
		}
	}
	committed := make([]int, len(stripes)) // primaries
	mirrors := make([]int, len(stripes))
	var mu sync.Mutex // guards both
	var g errgroup.Group
	for id, list := range holders {
		g.Go(func() error {
			req := &wire.CommitShards{}
			for _, sh := range list {
				req.Commits = append(req.Commits, sh.commit)
			}
			rep, err := s.call(ctx, id, &wire.Request{Op: &wire.Request_CommitShards{CommitShards: req}})
			if err != nil {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			for j, held := range rep.GetCommitShards().GetHeld() {
				switch {
				case j >= len(list) || !held:
				case list[j].mirror:
					mirrors[list[j].of]++
				default:
					committed[list[j].of]++
				}
			}
			return nil
		})
	}
	g.Wait()
	for i, p := range stripes {
		n := p.Info.K + p.Info.M
		if committed[i] < Enough(p.Info.K, p.Info.M) {
			fail(fmt.Errorf("stripe %v: %d of %d shards committed: %w", p.ID, committed[i], n, ErrTooFewNodes))
		}
		p.Info.Complete = p.Info.Complete && committed[i] == n && (!p.Info.Mirrored || mirrors[i] == n)
	}
	return failed
}

// putIndex sends records, given by position, to nodes, one request each, and
// counts who took each record.
func (s *Store) putIndex(ctx context.Context, records []*wire.IndexRecord, to map[placement.NodeID][]int) []int {
	acks := make([]int, len(records))
	var mu sync.Mutex // guards acks
	var g errgroup.Group
	for id, list := range to {
		g.Go(func() error {
			req := &wire.PutIndex{}
			for _, i := range list {
				req.Records = append(req.Records, records[i])
			}
			rep, err := s.call(ctx, id, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: req}})
			if err != nil {
				s.log.Debug("a keeper did not take index records", "peer", id, "records", len(list), "err", err)
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			for j, status := range rep.GetPutIndex().GetStatus() {
				if j < len(list) && status == wire.Status_STATUS_OK {
					acks[list[j]]++
				}
			}
			return nil
		})
	}
	g.Wait()
	return acks
}

// wireLock is the first lock of a stripe.
func wireLock(keys *seal.StripeKeys) (*wire.Lock, error) {
	l, err := keys.NewLock(seal.P2PKH)
	if err != nil {
		return nil, err
	}
	return &wire.Lock{Version: l.Version, Script: l.Script, PreviousSignature: l.PrevSig}, nil
}

// indexRecord is what keepers hold of a stripe. The holder list's version is
// the time of signing, so that it grows without being stored.
func indexRecord(p Placed, keys *seal.StripeKeys) (*wire.IndexRecord, error) {
	lock, err := wireLock(keys)
	if err != nil {
		return nil, err
	}
	r := &wire.IndexRecord{Manifest: p.Manifest, Version: uint64(time.Now().UnixNano()), Lock: lock, Mirrored: p.Info.Mirrored}
	for i, h := range p.Info.Holders {
		if h.Primary != "" {
			r.Holders = append(r.Holders, &wire.Holder{Index: uint32(i), Primary: h.Primary, Mirror: h.Mirror})
		}
	}
	r.SignHolders(keys.Index)
	return r, nil
}

// call is Transport.Call bounded by RequestTimeout, for requests without body.
func (s *Store) call(ctx context.Context, to placement.NodeID, req *wire.Request) (*wire.Reply, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.RequestTimeout)
	defer cancel()
	rep, _, err := s.t.Call(ctx, to, req, nil)
	return rep, err
}

// Delete asks every holder of a stripe, those that the keepers name among them,
// to drop its shards, and its keepers to drop the index record. It reports the nodes that did not answer as an error;
// asking again is harmless. Nodes declared dead are not waited for.
func (s *Store) Delete(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo) error {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return err
	}
	dead := make(map[string]bool)
	for _, m := range s.t.Members() {
		dead[string(m.ID)] = m.State == p2p.Dead
	}
	// Shards may have moved since; whoever is named by anyone is asked.
	type copyAt struct {
		index int
		node  string
	}
	places := make(map[copyAt]bool)
	for i, h := range info.Holders {
		places[copyAt{i, h.Primary}], places[copyAt{i, h.Mirror}] = true, true
	}
	for _, r := range s.askKeepers(ctx, keys.Blind, info) {
		for _, h := range append(r.CurrentHolders(), r.Holders...) {
			places[copyAt{int(h.Index), h.Primary}], places[copyAt{int(h.Index), h.Mirror}] = true, true
		}
	}
	var mu sync.Mutex
	var failed []error
	var g errgroup.Group
	for at := range places {
		if at.node == "" || dead[at.node] {
			continue
		}
		g.Go(func() error {
			if err := s.deleteShard(ctx, keys, at.index, placement.NodeID(at.node)); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, fmt.Errorf("stripe %v shard %d at %s: %w", id, at.index, at.node, err))
			}
			return nil
		})
	}
	g.Wait()
	if len(failed) > 0 {
		return errors.Join(failed...) // the keepers must be able to tell where the rest is
	}
	for _, node := range s.keepers(keys.Blind, info.M, info.Mirrored, 2) {
		g.Go(func() error {
			if err := s.deleteShard(ctx, keys, wire.IndexNumber, node); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, fmt.Errorf("stripe %v index record at %s: %w", id, node, err))
			}
			return nil
		})
	}
	g.Wait()
	return errors.Join(failed...)
}

func (s *Store) deleteShard(ctx context.Context, keys *seal.StripeKeys, index int, node placement.NodeID) error {
	ctx, cancel := context.WithTimeout(ctx, s.o.RequestTimeout)
	defer cancel()
	auth, err := s.authorize(ctx, keys, seal.OpDelete, index, node)
	if err != nil {
		return err
	}
	rep, _, err := s.t.Call(ctx, node, &wire.Request{Op: &wire.Request_DeleteShards{DeleteShards: &wire.DeleteShards{
		Requests: []*wire.ColumnRequest{{Blind: keys.Blind[:], Index: uint32(index), Authorization: auth}},
	}}}, nil)
	if err != nil {
		return err
	}
	switch status := rep.GetDeleteShards().GetStatus(); {
	case len(status) != 1:
		return errors.New("reply without a status")
	case status[0] != wire.Status_STATUS_OK && status[0] != wire.Status_STATUS_NOT_FOUND:
		return fmt.Errorf("refused: %v", status[0])
	}
	return nil
}
