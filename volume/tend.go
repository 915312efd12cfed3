package volume

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
)

// tend looks after what is published: completes stripes and heads that some
// node missed, and deletes what no head needs any more.
func (p *publisher) tend(ctx context.Context) {
	if err := p.noticeDeaths(); err != nil {
		p.log.Warn("stripes on dead nodes could not be listed", "err", err)
	}
	p.mu.Lock()
	ids := make([][16]byte, 0, len(p.partial))
	for id := range p.partial {
		ids = append(ids, id)
	}
	headMissing := p.head != nil && p.headAcks < p.headNodes
	headUnknown := p.head != nil && p.headNodes == 0
	p.mu.Unlock()
	for _, id := range ids {
		if ctx.Err() != nil {
			return
		}
		if err := p.mend(ctx, id); err != nil {
			p.log.Info("a stripe is not at its policy's target yet", "stripe", fmt.Sprintf("%x", id), "err", err)
			break // the pool is not ready: the next turn tries again
		}
	}
	if headMissing || headUnknown {
		if err := p.repeatHead(ctx); err != nil {
			p.log.Info("the head is not at every node yet", "err", err)
		}
	}
	if err := p.collect(ctx); err != nil {
		p.log.Info("stripes that nothing needs could not all be deleted yet", "err", err)
	}
}

// noticeDeaths marks the stripes that have lost a shard with a node declared
// dead, once for each set of dead nodes. Mirrored shards are copied by the
// partner that is left.
func (p *publisher) noticeDeaths() error {
	dead := make(map[string]bool)
	for _, m := range p.t.Members() {
		if m.Role == p2p.RoleNode && m.State == p2p.Dead {
			dead[string(m.ID)] = true
		}
	}
	if maps.Equal(dead, p.dead) {
		return nil
	}
	var hit [][16]byte
	if err := p.v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
		for _, h := range s.Holders {
			if dead[h.Primary] && !s.Mirrored && !s.Condemned {
				hit = append(hit, id)
				break
			}
		}
		return true
	}); err != nil {
		return err
	}
	for len(hit) > 0 {
		batch := hit[:min(len(hit), 256)]
		hit = hit[len(batch):]
		if _, err := p.commit(func(t *tx) error {
			for _, id := range batch {
				s, err := t.v.db.Stripe(id)
				if err != nil {
					return err
				}
				s.Complete = false
				t.PutStripe(id, s)
			}
			return nil
		}); err != nil {
			return err
		}
		p.mu.Lock()
		for _, id := range batch {
			p.partial[id] = true
		}
		p.mu.Unlock()
	}
	p.dead = dead
	return nil
}

// mend brings one stripe to its policy's target.
func (p *publisher) mend(ctx context.Context, id [16]byte) error {
	info, err := p.v.db.Stripe(id)
	if errors.Is(err, metastore.ErrNotFound) || (err == nil && (info.Complete || info.Condemned)) {
		p.mu.Lock()
		delete(p.partial, id)
		p.progress()
		p.mu.Unlock()
		return nil
	}
	if err != nil {
		return err
	}
	mended, err := p.stripes.Mend(ctx, id, info)
	if err != nil {
		return err
	}
	if _, err := p.commit(func(t *tx) error { t.PutStripe(id, mended); return nil }); err != nil {
		return err
	}
	if !mended.Complete {
		return fmt.Errorf("%d of %d shards, %d of %d keepers", mended.Placed(), mended.K+mended.M, mended.IndexAcks, mended.IndexKeepers)
	}
	p.mu.Lock()
	delete(p.partial, id)
	p.progress()
	p.mu.Unlock()
	return nil
}

// collectMax bounds the stripes deleted in one turn.
const collectMax = 256

// collect deletes the stripes that the newest head no longer refers to. A
// content stripe without references is condemned first; once a head that does
// not list it is published, its shards are deleted.
func (p *publisher) collect(ctx context.Context) error {
	p.mu.Lock()
	head := p.head
	p.mu.Unlock()
	if head == nil {
		return nil
	}
	var unused, condemned [][16]byte
	if err := p.v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
		switch {
		case s.Condemned && (s.Purpose == metastore.PurposeLog || s.CreatedSeq < head.Cut):
			condemned = append(condemned, id)
		case !s.Condemned && s.Purpose == metastore.PurposeContent && s.CreatedSeq < head.Cut:
			unused = append(unused, id)
		}
		return len(condemned) < collectMax
	}); err != nil {
		return err
	}
	var failed []error
	for _, id := range condemned {
		info, err := p.v.db.Stripe(id)
		if err != nil {
			return err
		}
		if err := p.stripes.Delete(ctx, id, &info); err != nil {
			failed = append(failed, err)
			if ctx.Err() != nil {
				break
			}
			continue
		}
		if _, err := p.commit(func(t *tx) error { t.DeleteStripe(id); return nil }); err != nil {
			return err
		}
	}
	for _, id := range unused {
		used := false
		if err := p.v.db.References(id, func(metastore.Reference) bool { used = true; return false }); err != nil {
			return err
		}
		if used {
			continue
		}
		if _, err := p.commit(func(t *tx) error {
			info, err := t.v.db.Stripe(id)
			if err != nil {
				return err
			}
			// Between here and the delete lies a head that does not list it.
			info.Condemned, info.CreatedSeq = true, t.v.lastSeq.Load()+1
			t.PutStripe(id, info)
			return nil
		}); err != nil {
			return err
		}
	}
	return errors.Join(failed...)
}
