package volume

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	// probeTimeout is how long a node may take to answer before what it holds
	// counts as out of reach.
	probeTimeout = 3 * time.Second
	probesAtOnce = 64
)

// Dropped is what DropCache has done.
type Dropped struct {
	Bytes     int64 // removed from this disk
	KeptBytes int64 // which the pool cannot give back now, with what lies in the same files
	Stripes   int   // of those bytes: fewer than k of their shards are at nodes that answer

	Answering, Nodes int // nodes that were asked, but for those declared dead
}

// DropCache removes every clean local byte: placed segments and fetched
// blocks. What is not published yet stays, and, without force, what fewer
// nodes hold than are needed to read it of those that answer now; each is asked.
func (v *Volume) DropCache(ctx context.Context, force bool) (d Dropped, err error) {
	defer func() { err = wrap("drop cache", 0, err) }()
	if err := v.store.Rotate(); err != nil {
		return d, err
	}
	if v.network == nil {
		d.Bytes, err = v.store.DropClean(nil, nil)
		return d, err
	}
	if err := v.db.Flush(ctx); err != nil {
		return d, err
	}
	if err := v.network.publisher.release(ctx, v.network.publisher.published()); err != nil {
		return d, err
	}
	segments, stripes := make(map[uint64]bool), make(map[[16]byte]bool)
	if !force {
		answering, nodes := v.network.probe(ctx)
		d.Answering, d.Nodes = len(answering), nodes
		if segments, stripes, err = v.outOfReach(answering); err != nil {
			return d, err
		}
	}
	if d.Bytes, err = v.store.DropClean(segments, stripes); err != nil || len(stripes) == 0 {
		return d, err
	}
	if d.KeptBytes = v.store.Stats().CleanBytes; d.KeptBytes > 0 {
		d.Stripes = len(stripes)
	}
	return d, nil
}

// outOfReach returns the stripes of live bytes that cannot be read from the
// nodes that answer, and the segments that hold such bytes.
func (v *Volume) outOfReach(answering map[string]bool) (segments map[uint64]bool, stripes map[[16]byte]bool, err error) {
	segments, stripes = make(map[uint64]bool), make(map[[16]byte]bool)
	if err := v.db.Stripes(func(id [16]byte, info metastore.StripeInfo) bool {
		shards := 0
		for _, h := range info.Holders {
			if answering[h.Primary] || answering[h.Mirror] {
				shards++
			}
		}
		if shards < info.K && info.Purpose == metastore.PurposeContent {
			stripes[id] = true
		}
		return true
	}); err != nil {
		return nil, nil, err
	}
	for id := range stripes {
		var uses []metastore.Reference
		if err := v.db.References(id, func(r metastore.Reference) bool { uses = append(uses, r); return true }); err != nil {
			return nil, nil, err
		}
		if len(uses) == 0 {
			delete(stripes, id)
		}
		for _, r := range uses {
			if err := v.db.Extents(r.Ino, r.Off, r.Off+uint64(r.Len), func(e metastore.Extent) bool {
				if e.HasLocal() {
					segments[e.Local.Segment] = true
				}
				return true
			}); err != nil {
				return nil, nil, err
			}
		}
	}
	return segments, stripes, nil
}

// probe asks every node that is not declared dead for a sign of life, and
// returns those that gave one and how many were asked.
func (n *network) probe(ctx context.Context) (answering map[string]bool, nodes int) {
	ctx, cancel := context.WithTimeout(ctx, 3*probeTimeout)
	defer cancel()
	var mu sync.Mutex
	answering = make(map[string]bool) // guarded by mu
	var g errgroup.Group
	g.SetLimit(probesAtOnce)
	for _, m := range n.transport.Members() {
		if m.Role != p2p.RoleNode || m.State == p2p.Dead {
			continue
		}
		nodes++
		g.Go(func() error {
			if n.answers(ctx, m.ID) {
				mu.Lock()
				defer mu.Unlock()
				answering[string(m.ID)] = true
			}
			return nil
		})
	}
	g.Wait()
	return answering, nodes
}

func (n *network) answers(ctx context.Context, id placement.NodeID) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	_, _, err := n.transport.Call(ctx, id, &wire.Request{Op: &wire.Request_HasShards{HasShards: &wire.HasShards{}}}, nil)
	var refused *p2p.StatusError // an answer, too
	return err == nil || errors.As(err, &refused)
}
