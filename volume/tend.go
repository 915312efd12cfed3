package volume

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
)

const (
	// tendTurnMax bounds a turn of tending while changes wait to be published.
	tendTurnMax = 3 * time.Second
	// tendPause is the least time between a turn that failed and the next.
	tendPause = 3 * time.Second
	// tendFailuresMax ends a turn: the pool is not ready.
	tendFailuresMax = 8
	// awayAsksMax bounds the stripes whose keepers are asked in one turn where
	// their shards are now, awayAsksAtOnce those asked together.
	awayAsksMax    = 1024
	awayAsksAtOnce = 16
	// awayAskAgain is how long a node is away before its stripes' keepers are asked anew.
	awayAskAgain = 5 * time.Minute
)

// tend looks after what is published: completes stripes and heads that some
// node missed, and deletes what no head needs any more.
func (p *publisher) tend(ctx context.Context) {
	if time.Now().Before(p.tendNext) {
		return
	}
	started := time.Now()
	over := func() bool {
		return ctx.Err() != nil || (p.v.lastChange.Load() > p.published() && time.Since(started) > tendTurnMax)
	}
	failed := func(what string, err error, attrs ...any) {
		p.log.Info(what, append(attrs, "err", err)...)
		p.tendNext = time.Now().Add(tendPause)
	}
	if err := p.noticeDeaths(); err != nil {
		failed("stripes on dead nodes could not be listed", err)
	}
	if err := p.noticeMoves(ctx, over); err != nil {
		failed("keepers could not be asked what has moved", err)
	}
	p.mu.Lock()
	ids := slices.Collect(maps.Keys(p.partial)) // in an order of chance: no stripe holds the others up
	headMissing := p.head != nil && (p.headNodes == 0 || p.headAcks < p.headNodes)
	p.mu.Unlock()
	if headMissing {
		if err := p.repeatHead(ctx); err != nil {
			failed("the head is not at every node yet", err)
		}
	}
	var unmet error
	defer func() {
		if ctx.Err() == nil {
			p.mu.Lock()
			p.unmet = unmet
			p.mu.Unlock()
		}
	}()
	failures := 0
	for _, id := range ids {
		if over() || failures == tendFailuresMax {
			return
		}
		if err := p.mend(ctx, id); err != nil {
			failures++
			unmet = fmt.Errorf("not durable yet: of %d stripes that do not meet their policy, one has %w", len(ids), err)
			failed("a stripe is not at its policy's target yet", err, "stripe", fmt.Sprintf("%x", id))
		}
	}
	if err := p.collect(ctx, over); err != nil {
		failed("stripes that nothing needs could not all be deleted yet", err)
	}
}

// noticeDeaths marks the stripes that have lost a shard, or a copy of one, with nodes
// declared dead, once for each set of dead nodes. A mirrored shard is copied by the
// partner that is left, long before; where, the keepers tell.
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
			if (dead[h.Primary] || dead[h.Mirror]) && !s.Condemned {
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

// noticeMoves takes over what keepers say of stripes whose holders are silent or
// leaving, and may have given their shards to others. The stripes are asked
// about once for each time that a node goes away, and again every awayAskAgain;
// those of a node that leaves, until it has given all away.
func (p *publisher) noticeMoves(ctx context.Context, over func() bool) error {
	away, leaving := make(map[string]bool), make(map[string]bool)
	for _, m := range p.t.Members() {
		if m.Role == p2p.RoleNode && m.State != p2p.Dead && (m.Leaving() || m.State != p2p.Alive) {
			away[string(m.ID)] = true
			leaving[string(m.ID)] = m.Leaving() && m.State == p2p.Alive
		}
	}
	if now := time.Now(); now.Sub(p.awaySince) >= awayAskAgain {
		p.away, p.awaySince = nil, now
	}
	names := func(holders []metastore.Holder, nodes map[string]bool) (n int) {
		for _, h := range holders {
			for _, node := range []string{h.Primary, h.Mirror} {
				if nodes[node] {
					n++
				}
			}
		}
		return n
	}
	fresh := maps.Clone(away)
	maps.DeleteFunc(fresh, func(node string, _ bool) bool { return p.away[node] })
	if len(fresh) > 0 {
		if err := p.v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
			if !s.Condemned && names(s.Holders, fresh) > 0 {
				p.unasked[id] = true
			}
			return true
		}); err != nil {
			return err
		}
	}
	p.away = away
	if len(fresh) == 0 && time.Now().Before(p.awayNext) {
		return nil
	}
	p.awayNext = time.Now().Add(tendPause)

	var mu sync.Mutex // guards what follows
	var same [][16]byte
	moved, silent := make(map[[16]byte]metastore.StripeInfo), 0
	asked := 0
	var g errgroup.Group
	g.SetLimit(awayAsksAtOnce)
	for id := range p.unasked {
		mu.Lock()
		enough := silent >= tendFailuresMax
		mu.Unlock()
		if enough || asked == awayAsksMax || over() {
			break
		}
		info, err := p.v.db.Stripe(id)
		before := names(info.Holders, away)
		switch {
		case errors.Is(err, metastore.ErrNotFound) || (err == nil && (info.Condemned || before == 0)):
			delete(p.unasked, id)
			continue
		case err != nil:
			return errors.Join(err, g.Wait())
		case !info.Complete:
			continue // it is mended first
		}
		asked++
		g.Go(func() error {
			holders, err := p.stripes.Holders(ctx, id, info)
			if err != nil {
				return err
			}
			now := metastore.StripeInfo{Holders: holders}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case holders == nil:
				silent++
			case names(holders, leaving) > 0:
				// It has not given the shard away yet. Who signed now could undo a move.
			case names(holders, away) < before && now.Placed() >= info.Placed():
				moved[id] = now
			default:
				same = append(same, id)
			}
			return nil
		})
	}
	err := g.Wait()
	for _, id := range same {
		delete(p.unasked, id)
	}
	for id, now := range moved {
		p.learned(id, now)
		delete(p.unasked, id)
	}
	return err
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
	mended, failed := p.stripes.Mend(ctx, id, info)
	if _, err := p.commit(func(t *tx) error { t.PutStripe(id, mended); return nil }); err != nil {
		return err
	}
	p.v.network.fetcher.forget(id)
	if failed != nil {
		return failed
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

// collect deletes the stripes of this device that its newest head no longer
// refers to, and only its log's once a later device may refer to the others. A
// content stripe without references is condemned first; once a head that does
// not list it is published, its shards are deleted. over ends it early.
func (p *publisher) collect(ctx context.Context, over func() bool) error {
	p.mu.Lock()
	head := p.head
	p.mu.Unlock()
	if head == nil {
		return nil
	}
	named := make(map[string]bool)
	for _, s := range head.Segments {
		named[string(s.Id)] = true
	}
	var unused, condemned [][16]byte
	if err := p.v.db.Stripes(func(id [16]byte, s metastore.StripeInfo) bool {
		switch {
		case s.CreatedSeq == metastore.CreatedElsewhere || s.CreatedSeq >= head.Cut || named[string(id[:])]:
		case s.Condemned:
			condemned = append(condemned, id)
		case s.Purpose == metastore.PurposeContent && head.Cut > p.sifted:
			unused = append(unused, id)
		}
		return true
	}); err != nil {
		return err
	}
	var failed []error
	if len(condemned)+len(unused) == 0 {
		p.sifted = head.Cut
		return nil
	}
	if len(condemned) > 0 {
		// What says that they are not needed must not be lost any more.
		if err := p.v.syncThrough(ctx, p.v.lastSeq.Load()); err != nil {
			return err
		}
	}
	if later, err := p.laterDevice(ctx); err != nil {
		return err
	} else if later {
		// The log is this device's alone. Content may be in the later one's tree.
		content := func(id [16]byte) bool {
			info, err := p.v.db.Stripe(id)
			return err != nil || info.Purpose == metastore.PurposeContent
		}
		condemned, unused = slices.DeleteFunc(condemned, content), nil
	}
	// In an order of chance: no stripe holds the others up.
	rand.Shuffle(len(condemned), func(i, j int) { condemned[i], condemned[j] = condemned[j], condemned[i] })
	for _, id := range condemned {
		if over() || len(failed) == tendFailuresMax {
			return errors.Join(failed...)
		}
		info, err := p.v.db.Stripe(id)
		if err != nil {
			return err
		}
		if err := p.stripes.Delete(ctx, id, &info); err != nil {
			failed = append(failed, err)
			continue
		}
		if _, err := p.commit(func(t *tx) error { t.DeleteStripe(id); return nil }); err != nil {
			return err
		}
	}
	for _, id := range unused {
		if over() {
			return errors.Join(failed...)
		}
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
			info.Condemned, info.CreatedSeq = true, t.seq
			t.PutStripe(id, info)
			return nil
		}); err != nil {
			return err
		}
	}
	p.sifted = head.Cut
	return errors.Join(failed...)
}
