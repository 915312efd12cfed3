package stripe

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// Health counts the shards of a stripe that a live node is known to hold.
type Health struct {
	Shards  int // with a live primary or mirror
	Mirrors int // with both alive
}

// Health judges a stripe by its holders' states, without asking them.
func (s *Store) Health(info *metastore.StripeInfo) (h Health) {
	alive := make(map[string]bool)
	for _, m := range s.t.Members() {
		alive[string(m.ID)] = m.State != p2p.Dead
	}
	for _, holder := range info.Holders {
		p, m := alive[holder.Primary], alive[holder.Mirror]
		if p || m {
			h.Shards++
		}
		if p && m {
			h.Mirrors++
		}
	}
	return h
}

// Manifest signs the manifest of a stripe that was placed before.
func (s *Store) Manifest(id erasure.StripeID, info *metastore.StripeInfo) (*wire.Manifest, error) {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return nil, err
	}
	m := &wire.Manifest{K: uint32(info.K), M: uint32(info.M), ShardBytes: info.ShardBytes}
	for i := range info.Roots {
		m.Roots = append(m.Roots, info.Roots[i][:])
	}
	return m, m.Sign(keys.Index)
}

// Mend completes a stripe: it rebuilds the shards that have no live holder, or
// whose holder says that it has them no more, from any k, bit for bit, places
// them and what mirrors are missing on spare nodes, and publishes the index
// record again. The info that it returns holds what was reached, also with an
// error; Complete tells whether the policy is met now.
func (s *Store) Mend(ctx context.Context, id erasure.StripeID, old metastore.StripeInfo) (metastore.StripeInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.PlaceTimeout)
	defer cancel()
	info := old
	info.Holders = slices.Clone(old.Holders)
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return old, err
	}
	// Partners and keepers may have moved copies, or mended the stripe already.
	adopt(&info, &copies{}, s.askKeepers(ctx, keys.Blind, &info))
	state := make(map[string]bool) // of members: not dead
	for _, m := range s.t.Members() {
		state[string(m.ID)] = m.State != p2p.Dead
	}
	for node := range s.without(ctx, keys.Blind, &info) {
		state[node] = false
	}
	var used []placement.Pair
	broken := false
	for i := range info.Holders {
		h := &info.Holders[i]
		// Whoever has no shard of the stripe is not given another either, for now.
		used = append(used, placement.Pair{Primary: placement.NodeID(h.Primary), Mirror: placement.NodeID(h.Mirror)})
		if !state[h.Primary] {
			h.Primary, h.Mirror = h.Mirror, ""
		}
		if !state[h.Primary] {
			h.Primary = ""
		}
		if !state[h.Mirror] {
			h.Mirror = ""
		}
		broken = broken || h.Primary == "" || (info.Mirrored && h.Mirror == "")
	}
	manifest, err := s.Manifest(id, &info)
	if err != nil {
		return old, err
	}
	var failed error
	if broken {
		before := slices.Clone(info.Holders)
		if failed = s.mendShards(ctx, id, &info, manifest, newSpares(s.nodes(info.Purpose, int(info.ShardBytes)), used)); failed != nil && slices.Equal(before, info.Holders) {
			return old, failed
		}
	}
	if err := s.Publish(ctx, []Placed{{ID: id, Info: &info, Manifest: manifest}}); err != nil {
		info.Complete, info.IndexAcks, info.IndexKeepers = false, old.IndexAcks, old.IndexKeepers
		return info, errors.Join(failed, err)
	}
	return info, failed
}

// without returns the holders that answer that they have no such shard.
func (s *Store) without(ctx context.Context, blind erasure.BlindID, info *metastore.StripeInfo) map[string]bool {
	var mu sync.Mutex
	missing := make(map[string]bool) // guarded by mu
	var g errgroup.Group
	for i, h := range info.Holders {
		for _, node := range []string{h.Primary, h.Mirror} {
			if node == "" {
				continue
			}
			g.Go(func() error {
				rep, err := s.call(ctx, placement.NodeID(node), &wire.Request{Op: &wire.Request_HasShards{HasShards: &wire.HasShards{
					Shards: []*wire.ShardRef{{Blind: blind[:], Index: uint32(i)}},
				}}})
				if held := rep.GetHasShards().GetHeld(); err == nil && len(held) == 1 && !held[0] {
					mu.Lock()
					defer mu.Unlock()
					missing[node] = true
				}
				return nil
			})
		}
	}
	g.Wait()
	return missing
}

func (s *Store) mendShards(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, manifest *wire.Manifest, pool *spares) error {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return err
	}
	lock, err := wireLock(keys)
	if err != nil {
		return err
	}
	data, _, err := s.Read(ctx, id, info, 0, info.K*int(info.ShardBytes))
	if err != nil {
		return err
	}
	code, err := s.codes.Get(info.K, info.M)
	if err != nil {
		return err
	}
	columns, err := s.columns(ctx, id, info, &copies{})
	if err != nil {
		return err
	}
	if err := code.Reconstruct(columns, nil); err != nil {
		return fmt.Errorf("stripe %v: rebuild columns: %w", id, err)
	}
	bodies, err := code.Build(nil, columns, data)
	if err != nil {
		return fmt.Errorf("stripe %v: rebuild: %w", id, err)
	}
	var failed []error
	for i := range info.Holders {
		h := &info.Holders[i]
		if h.Primary != "" && (!info.Mirrored || h.Mirror != "") {
			continue
		}
		if err := erasure.VerifyBody(info.Roots[i], bodies[i]); err != nil {
			return fmt.Errorf("stripe %v: rebuilt shard %d is not the one that was placed: %w", id, i, err)
		}
		a := putArgs{manifest: manifest, lock: lock, index: i, body: bodies[i], mirrored: info.Mirrored}
		if h.Primary == "" {
			*h = s.putShard(ctx, a, placement.Pair{}, pool)
		} else {
			h.Mirror = string(s.putMirror(ctx, a, erasure.CRC(bodies[i]), placement.NodeID(h.Primary), pool))
		}
		if h.Primary == "" {
			failed = append(failed, fmt.Errorf("stripe %v: no node took shard %d", id, i))
		}
	}
	return errors.Join(failed...)
}
