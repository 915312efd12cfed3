package stripe

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// broadcastWait bounds the wait for answers to one broadcast.
const broadcastWait = 3 * time.Second

// relocate looks for holders that info does not name: step 0 asks the stripe's
// keepers in one round, step 1 the whole pool. What is told goes into more, and
// into info what most say. It reports whether there is anything new to try.
func (s *Store) relocate(ctx context.Context, id erasure.StripeID, info *metastore.StripeInfo, more *copies, step int) bool {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return false
	}
	if step == 0 {
		return adopt(info, more, s.askKeepers(ctx, keys.Blind, info))
	}
	s.log.Info("keepers did not help; asking the whole pool", "stripe", id.String())
	return s.broadcast(ctx, keys.Blind, info, more)
}

// askKeepers returns the valid index records among twice as many keepers as
// there should be, in case the pool has changed since. Keepers that are late
// by HedgeAfter are not waited for.
func (s *Store) askKeepers(ctx context.Context, blind erasure.BlindID, info *metastore.StripeInfo) (records []*wire.IndexRecord) {
	ctx, cancel := context.WithTimeout(ctx, s.o.RequestTimeout)
	defer cancel()
	ids := s.keepers(blind, info.M, info.Mirrored, 2)
	replies := make(chan []*wire.IndexRecord, len(ids))
	for _, id := range ids {
		go func() {
			rep, err := s.call(ctx, id, &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{blind[:]}}}})
			if err != nil {
				replies <- nil
				return
			}
			replies <- s.valid(rep.GetGetIndex().GetRecords(), blind, id)
		}()
	}
	var enough <-chan time.Time
	for range ids {
		select {
		case r := <-replies:
			if records = append(records, r...); len(records) > 0 && enough == nil {
				enough = time.After(s.o.HedgeAfter)
			}
		case <-enough:
			cancel()
			enough = nil
			records = append(records, <-replies...)
		}
	}
	return records
}

// valid drops the records that are not the stripe's, or more than one.
func (s *Store) valid(records []*wire.IndexRecord, blind erasure.BlindID, from placement.NodeID) []*wire.IndexRecord {
	for _, r := range records {
		if r.Verify() == nil && [32]byte(r.Manifest.Blind) == blind {
			return []*wire.IndexRecord{r}
		}
		s.log.Warn("a keeper's index record does not verify", "peer", from)
	}
	return nil
}

// adopt takes over what keepers say. The owner has signed a record's holders;
// later moves are one keeper's word, so that each shard's holder is the one
// that most of the newest records name. Every place named is worth a try.
func adopt(info *metastore.StripeInfo, more *copies, records []*wire.IndexRecord) (news bool) {
	if len(records) == 0 {
		return false
	}
	var newest uint64
	for _, r := range records {
		newest = max(newest, r.Version)
		for _, h := range r.CurrentHolders() {
			news = more.add(info, int(h.Index), h.Primary) || news
			news = more.add(info, int(h.Index), h.Mirror) || news
		}
		for _, h := range r.Holders {
			news = more.add(info, int(h.Index), h.Primary) || news
			news = more.add(info, int(h.Index), h.Mirror) || news
		}
	}
	votes := make([]map[metastore.Holder]int, info.K+info.M)
	for i := range votes {
		votes[i] = make(map[metastore.Holder]int)
	}
	for _, r := range records {
		if r.Version != newest {
			continue
		}
		for _, h := range r.CurrentHolders() {
			if int(h.Index) < len(votes) {
				votes[h.Index][metastore.Holder{Primary: h.Primary, Mirror: h.Mirror}]++
			}
		}
	}
	holders := make([]metastore.Holder, len(votes))
	for i := range votes {
		most := 0
		for h, n := range votes[i] {
			if n > most {
				holders[i], most = h, n
			}
		}
	}
	info.Holders = holders
	return news
}

// broadcast asks the whole pool where the shards of a stripe are, and waits
// until the answers name k shards, and a little for more.
func (s *Store) broadcast(ctx context.Context, blind erasure.BlindID, info *metastore.StripeInfo, more *copies) (news bool) {
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
	var enough <-chan time.Time
	named := make(map[uint32]bool)
	var records []*wire.IndexRecord
	for {
		select {
		case a := <-answers:
			records = append(records, s.valid(a.msg.GetRecords(), blind, a.from)...)
			for _, h := range a.msg.GetHeld() {
				if h.GetManifest().Verify() != nil || [32]byte(h.Manifest.Blind) != blind {
					continue
				}
				named[h.Index] = true
				news = more.add(info, int(h.Index), string(a.from)) || news
				news = more.add(info, int(h.Index), h.Partner) || news
				break // a node holds one shard of a stripe
			}
			if len(named) >= info.K && enough == nil {
				enough = time.After(s.o.HedgeAfter)
			}
			if len(named) < info.K+info.M {
				continue
			}
		case <-enough:
		case <-ctx.Done():
		}
		return adopt(info, more, records) || news
	}
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
