package stripe

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
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
	changed, err = s.searching(ctx, id, info, func(ctx context.Context, more *copies) (err error) {
		parts, first, err = s.readRange(ctx, id, info, more, off, n)
		return err
	})
	return parts, first, changed, err
}

// searching calls read with what the caller remembers of a stripe's holders,
// then with what its keepers tell, then with what the pool does, until it does
// not fail for want of shards.
func (s *Store) searching(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, read func(context.Context, *copies) error) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.ReadTimeout)
	defer cancel()
	remembered := slices.Clone(info.Holders)
	more := &copies{}
	for step := 0; ; step++ {
		err = read(ctx, more)
		if err == nil || !errors.Is(err, ErrUnavailable) || step == 2 || ctx.Err() != nil {
			break
		}
		if !s.relocate(ctx, id, info, more, step) {
			if step == 1 {
				break
			}
			if step++; !s.relocate(ctx, id, info, more, step) {
				break
			}
		}
	}
	return !slices.Equal(remembered, info.Holders), err
}

// readRange reads a range of the data area: of one shard the groups around it,
// of several all of each.
func (s *Store) readRange(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, more *copies, off, n int) ([][]byte, int, error) {
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
	shards, err := s.readShards(ctx, id, info, more, want, lo, hi)
	if err != nil {
		return nil, 0, err
	}
	return shards[first : last+1], first*size + lo, nil
}

// readShards returns bytes [lo, hi) of the wanted data shards, indexed by
// shard, rebuilt where they could not be had.
func (s *Store) readShards(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, more *copies, want []int, lo, hi int) ([][]byte, error) {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return nil, err
	}
	got, err := s.gather(ctx, id, info, more, want, func(ctx context.Context, src source) ([]byte, error) {
		return s.readShard(ctx, keys.Blind, src.index, src.node, int(info.ShardBytes), info.Roots[src.index], lo, hi)
	})
	if err != nil {
		return nil, err
	}
	for _, i := range want {
		if got[i] == nil {
			if err := s.rebuild(info, got, want); err != nil {
				return nil, fmt.Errorf("stripe %v: rebuild: %w", id, err)
			}
			break
		}
	}
	return got, nil
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

// errLied says that a peer's bytes are not those of the shard.
var errLied = errors.New("the peer's bytes are not the shard's")

// readShard reads and verifies bytes [lo, hi) of one shard at one node, and
// notes how the node came out of that.
func (s *Store) readShard(ctx context.Context, blind erasure.BlindID, index int, node placement.NodeID, shardBytes int, root [32]byte, lo, hi int) ([]byte, error) {
	data, err := s.requestShard(ctx, blind, index, node, shardBytes, root, lo, hi)
	switch {
	case err == nil:
		s.reputations.Note(node, placement.Proved, seconds())
	case errors.Is(err, errLied):
		s.reputations.Note(node, placement.Lied, seconds())
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		s.reputations.Note(node, placement.Stalled, seconds())
	}
	return data, err
}

func (s *Store) requestShard(ctx context.Context, blind erasure.BlindID, index int, node placement.NodeID, shardBytes int, root [32]byte, lo, hi int) ([]byte, error) {
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
			return nil, fmt.Errorf("%w: %w", errLied, err)
		}
		return body, nil
	}
	data := make([]byte, hi-lo)
	if err := erasure.VerifyRange(root, [32]byte(columnHash), shardBytes, lo, hi-lo, body, data); err != nil {
		return nil, fmt.Errorf("%w: %w", errLied, err)
	}
	return data, nil
}

// Salt asks k holders for their columns and computes the stripe's salt, the
// share that with the epoch's key opens its slices.
func (s *Store) Salt(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo) (salt [32]byte, changed bool, err error) {
	changed, err = s.searching(ctx, id, info, func(ctx context.Context, more *copies) error {
		columns, err := s.columns(ctx, id, info, more)
		if err != nil {
			return err
		}
		code, err := s.codes.Get(info.K, info.M)
		if err != nil {
			return err
		}
		salt, err = code.Salt(columns)
		return err
	})
	return salt, changed, err
}

// columns reads the columns of any k shards; the others stay nil.
func (s *Store) columns(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, more *copies) ([][]byte, error) {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return nil, err
	}
	return s.gather(ctx, id, info, more, nil, func(ctx context.Context, src source) ([]byte, error) {
		return s.column(ctx, keys, src.index, src.node, info.Roots[src.index])
	})
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
