package stripe

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// broadcastWait bounds the wait for answers to one broadcast.
const broadcastWait = 3 * time.Second

// relocate finds holders that info does not name: step 0 asks the stripe's
// keepers in one round, step 1 the whole pool. It reports whether info has
// changed.
func (s *Store) relocate(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, step int) bool {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return false
	}
	if step == 0 {
		record := s.askKeepers(ctx, keys.Blind, info)
		return record != nil && adopt(info, record)
	}
	s.log.Info("keepers did not help; asking the whole pool", "stripe", id.String())
	return s.broadcast(ctx, keys.Blind, info)
}

// askKeepers returns the newest valid index record among twice as many
// keepers as there should be, in case the pool has changed since.
func (s *Store) askKeepers(ctx context.Context, blind erasure.BlindID, info *metastore.StripeInfo) *wire.IndexRecord {
	ctx, cancel := context.WithTimeout(ctx, s.o.RequestTimeout)
	defer cancel()
	var mu sync.Mutex
	var newest *wire.IndexRecord
	var g errgroup.Group
	for _, id := range s.keepers(blind, info.M, info.Mirrored, 2) {
		g.Go(func() error {
			rep, err := s.call(ctx, id, &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{blind[:]}}}})
			if err != nil {
				return nil
			}
			for _, r := range rep.GetGetIndex().GetRecords() {
				if r.Verify() != nil || [32]byte(r.Manifest.Blind) != blind {
					s.log.Warn("a keeper's index record does not verify", "peer", id)
					continue
				}
				mu.Lock()
				if newest == nil || r.Version > newest.Version || (r.Version == newest.Version && len(r.Moves) > len(newest.Moves)) {
					newest = r
				}
				mu.Unlock()
			}
			return nil
		})
	}
	g.Wait()
	return newest
}

// adopt replaces the holders of info by those of a verified record.
func adopt(info *metastore.StripeInfo, r *wire.IndexRecord) bool {
	holders := make([]metastore.Holder, info.K+info.M)
	for _, h := range r.CurrentHolders() {
		if int(h.Index) < len(holders) {
			holders[h.Index] = metastore.Holder{Primary: h.Primary, Mirror: h.Mirror}
		}
	}
	return replaceHolders(info, holders)
}

// replaceHolders reports whether that changed anything.
func replaceHolders(info *metastore.StripeInfo, holders []metastore.Holder) bool {
	changed := len(info.Holders) != len(holders)
	for i := range holders {
		changed = changed || info.Holders[i] != holders[i]
	}
	if changed {
		info.Holders = holders
	}
	return changed
}

// broadcast asks the whole pool where the shards of a stripe are, and waits
// until the answers name k shards or broadcastWait has passed.
func (s *Store) broadcast(ctx context.Context, blind erasure.BlindID, info *metastore.StripeInfo) bool {
	ctx, cancel := context.WithTimeout(ctx, broadcastWait)
	defer cancel()
	nonce := make([]byte, 16)
	rand.Read(nonce)
	answers, stop := s.answers.expect(nonce)
	defer stop()
	if err := s.t.Broadcast(ctx, &wire.Lookup{Nonce: nonce, Blinds: [][]byte{blind[:]}}); err != nil {
		s.log.Warn("a lookup could not be broadcast", "err", err)
		return false
	}
	holders := make([]metastore.Holder, info.K+info.M)
	copy(holders, info.Holders)
	fresh := make(map[int]bool)
	changed := false
	for len(fresh) < len(holders) {
		select {
		case a := <-answers:
			for _, r := range a.msg.GetRecords() {
				if r.Verify() == nil && [32]byte(r.Manifest.Blind) == blind {
					changed = adopt(info, r) || changed
				}
			}
			for _, h := range a.msg.GetHeld() {
				if h.GetManifest().Verify() != nil || [32]byte(h.Manifest.Blind) != blind || int(h.Index) >= len(holders) {
					continue
				}
				if i := int(h.Index); !fresh[i] {
					fresh[i] = true
					holders[i] = metastore.Holder{Primary: string(a.from), Mirror: h.Partner}
				}
			}
		case <-ctx.Done():
			if len(fresh) >= info.K {
				return replaceHolders(info, holders) || changed
			}
			return changed
		}
	}
	return replaceHolders(info, holders) || changed
}

// answers routes the unicast answers to broadcasts to those who wait for them.
type answers struct {
	mu      sync.Mutex
	waiting map[[16]byte]chan answer // guarded by mu
}

type answer struct {
	from placement.NodeID
	msg  *wire.LookupAnswer
}

// answersMax bounds the answers kept for one broadcast; more are dropped.
const answersMax = 256

func newAnswers() *answers { return &answers{waiting: make(map[[16]byte]chan answer)} }

func (a *answers) expect(nonce []byte) (<-chan answer, func()) {
	key := [16]byte(nonce)
	ch := make(chan answer, answersMax)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting[key] = ch
	return ch, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.waiting, key)
	}
}

// serve is the handler of a device, which serves nothing but answers to its
// own lookups.
func (a *answers) serve(_ context.Context, from p2p.Peer, req *wire.Request, _ []byte) (*wire.Reply, []byte, error) {
	msg := req.GetLookupAnswer()
	if msg == nil {
		return nil, nil, p2p.Statusf(wire.Status_STATUS_INVALID, "a device stores no shards")
	}
	if len(msg.Nonce) != 16 {
		return nil, nil, p2p.Statusf(wire.Status_STATUS_INVALID, "nonce of %d bytes", len(msg.Nonce))
	}
	a.mu.Lock()
	ch := a.waiting[[16]byte(msg.Nonce)]
	a.mu.Unlock()
	if ch != nil {
		select {
		case ch <- answer{from.Member.ID, msg}:
		default:
		}
	}
	return &wire.Reply{}, nil, nil
}
