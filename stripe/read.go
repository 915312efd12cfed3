package stripe

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

// Read returns bytes [off, off+n) of a stripe's data, verified against its
// roots. When the remembered holders do not suffice, info.Holders is replaced
// by what keepers or the broadcast told and changed is true. The error wraps
// ErrUnavailable when fewer than k shards can be had within ReadTimeout, and
// names the peers that were asked.
func (s *Store) Read(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, off, n int) (data []byte, changed bool, err error) {
	parts, first, changed, err := s.ReadParts(ctx, id, info, off, n)
	if err != nil {
		return nil, changed, err
	}
	skip := off - first
	if len(parts) == 1 {
		return parts[0][skip : skip+n : skip+n], changed, nil
	}
	data = make([]byte, 0, n)
	for _, p := range parts {
		data = append(data, p[skip:min(len(p), skip+n-len(data))]...)
		skip = 0
	}
	return data, changed, nil
}

// ReadParts is Read without the copy: the adjoining parts of one shard each
// that hold [off, off+n), and perhaps bytes before and after. first is the
// offset of parts[0] in the stripe's data; a part that is not the last reaches
// to the end of its shard.
func (s *Store) ReadParts(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, off, n int) (parts [][]byte, first int, changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.ReadTimeout)
	defer cancel()
	for step := 0; ; step++ {
		parts, first, err = s.readRange(ctx, id, info, off, n)
		if err == nil || !errors.Is(err, ErrUnavailable) || step == 2 || ctx.Err() != nil {
			return parts, first, changed, err
		}
		if s.relocate(ctx, id, info, step) {
			changed = true
		} else if step == 1 {
			return nil, 0, changed, err
		}
	}
}

// readRange reads a range of the data area: of one shard the groups around it,
// of several all of each.
func (s *Store) readRange(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, off, n int) ([][]byte, int, error) {
	size := int(info.ShardBytes)
	if off < 0 || n <= 0 || off+n > info.K*size {
		return nil, 0, fmt.Errorf("stripe %v: range %d+%d outside %d bytes", id, off, n, info.K*size)
	}
	first, last := off/size, (off+n-1)/size
	lo, hi := 0, size
	if first == last {
		lo, hi = erasure.GroupRange(off%size, n)
	}
	want := make([]int, 0, last-first+1)
	for i := first; i <= last; i++ {
		want = append(want, i)
	}
	shards, err := s.readShards(ctx, id, info, want, lo, hi)
	if err != nil {
		return nil, 0, err
	}
	return shards[first : last+1], first*size + lo, nil
}

// shardResult is what one request for a shard's range brought.
type shardResult struct {
	index int
	node  placement.NodeID
	data  []byte
	err   error
}

// readShards returns bytes [lo, hi) of the wanted data shards, indexed by
// shard. It asks for those first; a request that fails or is late is joined by
// one to the mirror or to another shard, and any k shards rebuild the rest.
func (s *Store) readShards(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, want []int, lo, hi int) ([][]byte, error) {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	n := info.K + info.M
	sources := s.sources(info, want)
	got := make([][]byte, n)
	have, running := 0, 0
	results := make(chan shardResult, len(sources)) // never blocks a sender
	var tried []placement.NodeID
	var lastErr error
	start := func() bool {
		for len(sources) > 0 {
			src := sources[0]
			sources = sources[1:]
			if got[src.index] != nil {
				continue
			}
			running++
			tried = append(tried, src.node)
			go func() {
				data, err := s.readShard(ctx, keys.Blind, src.index, src.node, int(info.ShardBytes), info.Roots[src.index], lo, hi)
				results <- shardResult{src.index, src.node, data, err}
			}()
			return true
		}
		return false
	}
	wanted := func() bool {
		for _, i := range want {
			if got[i] == nil {
				return false
			}
		}
		return true
	}
	for range want {
		start()
	}
	// Goroutines end at ctx's cancellation; wait for them so that none
	// outlives the read.
	defer func() {
		cancel()
		for ; running > 0; running-- {
			<-results
		}
	}()
	late := time.NewTimer(s.o.HedgeAfter)
	defer late.Stop()
	for !wanted() && have < info.K {
		if running == 0 && !start() {
			return nil, fmt.Errorf("stripe %v: %d of %d shards read, asked %v: %w (last: %w)", id, have, info.K, tried, ErrUnavailable, orNone(lastErr))
		}
		select {
		case r := <-results:
			running--
			if r.err != nil {
				lastErr = r.err
				s.log.Warn("a shard could not be read from a peer; using others", "stripe", id.String(), "shard", r.index, "peer", r.node, "err", r.err)
				start()
				continue
			}
			if got[r.index] == nil {
				got[r.index] = r.data
				have++
			}
		case <-late.C:
			// One more is asked for each hedge interval: the late one may
			// still win.
			start()
			late.Reset(s.o.HedgeAfter)
			// Rebuilding needs k in all: without as many under way, ask on.
			for have+running < info.K && start() {
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("stripe %v: %d of %d shards read in time, asked %v: %w", id, have, info.K, tried, ErrUnavailable)
		}
		for !wanted() && len(sources) > 0 && have+running < s.needed(info, got, want) {
			start()
		}
	}
	if !wanted() {
		if err := s.rebuild(info, got, want); err != nil {
			return nil, fmt.Errorf("stripe %v: rebuild: %w", id, err)
		}
	}
	return got, nil
}

// needed is how many shards are to be had or under way: as many as wanted
// while those go well, else k.
func (s *Store) needed(info *metastore.StripeInfo, got [][]byte, want []int) int {
	have := 0
	for _, d := range got {
		if d != nil {
			have++
		}
	}
	return min(info.K, max(len(want), have))
}

func orNone(err error) error {
	if err == nil {
		return errors.New("no holder is known")
	}
	return err
}

// rebuild fills the wanted shards from any k.
func (s *Store) rebuild(info *metastore.StripeInfo, got [][]byte, want []int) error {
	code, err := s.codes.Get(info.K, info.M)
	if err != nil {
		return err
	}
	need := make([]bool, len(got))
	for _, i := range want {
		need[i] = got[i] == nil
	}
	return code.Reconstruct(got, need)
}

type source struct {
	index int
	node  placement.NodeID
	rank  float64
}

// sources orders the copies of a stripe's shards: the wanted shards' best
// copies first, then their other copies and the other shards, dead peers last.
func (s *Store) sources(info *metastore.StripeInfo, want []int) []source {
	members := make(map[placement.NodeID]p2p.Member)
	for _, m := range s.t.Members() {
		members[m.ID] = m
	}
	isWanted := make(map[int]bool, len(want))
	for _, i := range want {
		isWanted[i] = true
	}
	rank := func(node string) float64 {
		m, ok := members[placement.NodeID(node)]
		switch {
		case !ok, m.State == p2p.Dead:
			return 1e9
		case m.State == p2p.Suspect:
			return 1e6
		}
		return float64(m.RTT) / float64(time.Millisecond)
	}
	var best, rest []source
	for i, h := range info.Holders {
		a, b := source{i, placement.NodeID(h.Primary), rank(h.Primary)}, source{i, placement.NodeID(h.Mirror), rank(h.Mirror)}
		if h.Primary == "" || (h.Mirror != "" && b.rank >= 1e6 && b.rank < a.rank) || (h.Mirror != "" && a.rank >= 1e6 && b.rank < a.rank) {
			a, b = b, a
		}
		if a.node != "" {
			if isWanted[i] && a.rank < 1e6 {
				best = append(best, a)
			} else {
				rest = append(rest, a)
			}
		}
		if b.node != "" {
			b.rank += 1e4 // other shards before second copies, unless dead
			rest = append(rest, b)
		}
	}
	sort.SliceStable(rest, func(i, j int) bool { return rest[i].rank < rest[j].rank })
	return append(best, rest...)
}

// readShard reads and verifies bytes [lo, hi) of one shard at one node.
func (s *Store) readShard(ctx context.Context, blind erasure.BlindID, index int, node placement.NodeID, shardBytes int, root [32]byte, lo, hi int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.RequestTimeout)
	defer cancel()
	rep, body, err := s.t.Call(ctx, node, &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{
		Blind: blind[:], Index: uint32(index), Offset: uint32(lo), Length: uint32(hi - lo),
	}}}, nil)
	if err != nil {
		return nil, err
	}
	columnHash := rep.GetGetShard().GetColumnHash()
	if len(columnHash) != 32 {
		return nil, errors.New("reply without a column hash")
	}
	if lo == 0 && hi == shardBytes && len(body) == shardBytes {
		// The whole shard: no proof is needed, and none was sent.
		if err := erasure.VerifyCoded(root, [32]byte(columnHash), body); err != nil {
			return nil, fmt.Errorf("the peer's bytes are not the shard's: %w", err)
		}
		return body, nil
	}
	data := make([]byte, hi-lo)
	if err := erasure.VerifyRange(root, [32]byte(columnHash), shardBytes, lo, hi-lo, body, data); err != nil {
		return nil, fmt.Errorf("the peer's bytes are not the shard's: %w", err)
	}
	return data, nil
}

// Salt asks k holders for their columns and computes the stripe's salt, the
// share that with the epoch's key opens its slices.
func (s *Store) Salt(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo) (salt [32]byte, changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.ReadTimeout)
	defer cancel()
	for step := 0; ; step++ {
		salt, err = s.salt(ctx, id, info)
		if err == nil || !errors.Is(err, ErrUnavailable) || step == 2 || ctx.Err() != nil {
			return salt, changed, err
		}
		if s.relocate(ctx, id, info, step) {
			changed = true
		} else if step == 1 {
			return salt, changed, err
		}
	}
}

func (s *Store) salt(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo) (salt [32]byte, err error) {
	columns, err := s.columns(ctx, id, info)
	if err != nil {
		return salt, err
	}
	code, err := s.codes.Get(info.K, info.M)
	if err != nil {
		return salt, err
	}
	return code.Salt(columns)
}

// columns reads the columns of any k shards; the others stay nil.
func (s *Store) columns(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo) ([][]byte, error) {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sources := s.sources(info, nil)
	results := make(chan shardResult, len(sources))
	columns := make([][]byte, info.K+info.M)
	have, running := 0, 0
	var lastErr error
	var tried []placement.NodeID
	start := func() bool {
		for len(sources) > 0 {
			src := sources[0]
			sources = sources[1:]
			if columns[src.index] != nil {
				continue
			}
			running++
			tried = append(tried, src.node)
			go func() {
				column, err := s.column(ctx, keys, src.index, src.node, info.Roots[src.index])
				results <- shardResult{src.index, src.node, column, err}
			}()
			return true
		}
		return false
	}
	defer func() {
		cancel()
		for ; running > 0; running-- {
			<-results
		}
	}()
	for range info.K {
		start()
	}
	late := time.NewTimer(s.o.HedgeAfter)
	defer late.Stop()
	for have < info.K {
		if running == 0 && !start() {
			return nil, fmt.Errorf("stripe %v: %d of %d columns read, asked %v: %w (last: %w)", id, have, info.K, tried, ErrUnavailable, orNone(lastErr))
		}
		select {
		case r := <-results:
			running--
			if r.err != nil {
				lastErr = r.err
				s.log.Warn("a column could not be read from a peer; using others", "stripe", id.String(), "shard", r.index, "peer", r.node, "err", r.err)
				start()
			} else if columns[r.index] == nil {
				columns[r.index] = r.data
				have++
			}
		case <-late.C:
			start()
			late.Reset(s.o.HedgeAfter)
		case <-ctx.Done():
			return nil, fmt.Errorf("stripe %v: %d of %d columns read in time, asked %v: %w", id, have, info.K, tried, ErrUnavailable)
		}
	}
	return columns, nil
}

func (s *Store) column(ctx context.Context, keys *seal.StripeKeys, index int, node placement.NodeID, root [32]byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.RequestTimeout)
	defer cancel()
	auth, err := s.authorize(ctx, keys, seal.OpColumns, index, node)
	if err != nil {
		return nil, err
	}
	rep, err := s.call(ctx, node, &wire.Request{Op: &wire.Request_GetColumns{GetColumns: &wire.GetColumns{
		Requests: []*wire.ColumnRequest{{Blind: keys.Blind[:], Index: uint32(index), Authorization: auth}},
	}}})
	if err != nil {
		return nil, err
	}
	columns := rep.GetGetColumns().GetColumns()
	if len(columns) != 1 {
		return nil, errors.New("reply without a column")
	}
	c := columns[0]
	if c.GetStatus() != wire.Status_STATUS_OK {
		return nil, fmt.Errorf("refused: %v", c.GetStatus())
	}
	if len(c.GetColumn()) != erasure.ColumnBytes || len(c.GetCodedRoot()) != 32 {
		return nil, errors.New("column of the wrong length")
	}
	if err := erasure.VerifyColumn(root, c.Column, [32]byte(c.CodedRoot)); err != nil {
		return nil, fmt.Errorf("the peer's column is not the shard's: %w", err)
	}
	return c.Column, nil
}
