package stripe

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

const (
	broadcastWait = 3 * time.Second       // for answers to one broadcast
	joinWait      = 10 * time.Millisecond // for other readers, whose stripes are asked for in the same broadcast
	missFor       = 5 * time.Second       // a stripe that nobody knows is not asked for again
	missesMax     = 4096

	// Broadcasts of one store; members pass on 20 a second of one author.
	broadcastsPerSecond = 10
	broadcastBurst      = 20
)

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
	if until, ok := s.misses.Get(keys.Blind); ok && time.Now().Before(until) {
		return false
	}
	s.log.Info("keepers did not help; asking the whole pool", "stripe", id.String())
	return s.broadcast(ctx, keys.Blind, info, more)
}

// Holders asks a stripe's keepers where its shards are now; nil where none of
// them tells.
func (s *Store) Holders(ctx context.Context, id erasure.StripeID, info metastore.StripeInfo) ([]metastore.Holder, error) {
	keys, err := s.Keys(id, info.Epoch, info.LockVersion)
	if err != nil {
		return nil, err
	}
	info.Holders = nil
	adopt(&info, &copies{}, s.askKeepers(ctx, keys.Blind, &info))
	return info.Holders, nil
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
	// Of equals the one counts that has heard of more moves.
	slices.SortStableFunc(records, func(a, b *wire.IndexRecord) int { return cmp.Compare(len(b.Moves), len(a.Moves)) })
	holders, most := make([]metastore.Holder, len(votes)), make([]int, len(votes))
	for _, r := range records {
		if r.Version != newest {
			continue
		}
		for _, told := range r.CurrentHolders() {
			h := metastore.Holder{Primary: told.Primary, Mirror: told.Mirror}
			if i := int(told.Index); i < len(votes) && votes[i][h] > most[i] {
				holders[i], most[i] = h, votes[i][h]
			}
		}
	}
	info.Holders = holders
	return news
}

// broadcast asks the whole pool where the shards of a stripe are, and waits
// until the answers name k shards, and a little for more. Stripes that are
// looked for at the same time share a broadcast.
func (s *Store) broadcast(reader context.Context, blind erasure.BlindID, info *metastore.StripeInfo, more *copies) (news bool) {
	ctx, cancel := context.WithTimeout(reader, broadcastWait)
	defer cancel()
	q, answers, first := s.answers.join(blind)
	defer s.answers.leave(q)
	if first {
		s.send(ctx, q)
	}
	var enough <-chan time.Time
	named := make(map[uint32]bool)
	var records []*wire.IndexRecord
	for {
		select {
		case a := <-answers:
			records = append(records, s.valid(a.records, blind, a.from)...)
			for _, h := range a.held {
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
			if len(named)+len(records) == 0 && reader.Err() == nil {
				s.misses.Add(blind, time.Now().Add(missFor))
			}
		}
		return adopt(info, more, records) || news
	}
}

// send broadcasts a question once other readers have had time to join it, and
// the budget allows it; until then more join.
func (s *Store) send(ctx context.Context, q *question) {
	join := time.NewTimer(joinWait)
	defer join.Stop()
	select {
	case <-join.C:
	case <-ctx.Done():
	}
	err := s.broadcasts.Wait(ctx)
	if errors.Is(err, context.Canceled) {
		err = nil // this reader has gone, not those who have joined
	}
	blinds := s.answers.close(q)
	if err == nil {
		err = s.t.Broadcast(context.WithoutCancel(ctx), &wire.Lookup{Nonce: q.nonce[:], Blinds: blinds})
	}
	if err != nil {
		s.log.Warn("a lookup could not be broadcast", "stripes", len(blinds), "err", err)
	}
}

// question is one broadcast and those who wait for its answers.
type question struct {
	nonce   [16]byte
	blinds  [][]byte
	waiting map[erasure.BlindID][]chan answer
	readers int
}

// answers routes the unicast answers to broadcasts to those who wait for them.
type answers struct {
	mu    sync.Mutex
	open  *question              // not sent yet; guarded by mu, as what follows
	asked map[[16]byte]*question // by nonce
}

// answer is what one node says about one stripe.
type answer struct {
	from    placement.NodeID
	records []*wire.IndexRecord
	held    []*wire.Held
}

// answersMax bounds the answers kept for one reader; more are dropped.
const answersMax = 256

func newAnswers() *answers { return &answers{asked: make(map[[16]byte]*question)} }

// join adds a stripe to the question that is not sent yet, or begins one, which
// the caller then has to send. Who has joined must leave.
func (a *answers) join(blind erasure.BlindID) (q *question, answers <-chan answer, first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if q = a.open; q == nil || len(q.blinds) == wire.LookupMax {
		q = &question{waiting: make(map[erasure.BlindID][]chan answer)}
		rand.Read(q.nonce[:])
		a.open, a.asked[q.nonce], first = q, q, true
	}
	if q.waiting[blind] == nil {
		q.blinds = append(q.blinds, blind[:])
	}
	ch := make(chan answer, answersMax)
	q.waiting[blind] = append(q.waiting[blind], ch)
	q.readers++
	return q, ch, first
}

// close ends that others join a question, and returns what it asks for.
func (a *answers) close(q *question) [][]byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.open == q {
		a.open = nil
	}
	return q.blinds
}

func (a *answers) leave(q *question) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if q.readers--; q.readers == 0 {
		delete(a.asked, q.nonce)
	}
}

// deliver gives each reader what an answer says about its stripe.
func (a *answers) deliver(from placement.NodeID, msg *wire.LookupAnswer) {
	said := make(map[erasure.BlindID]*answer)
	about := func(b []byte) *answer {
		if len(b) != len(erasure.BlindID{}) {
			return &answer{}
		}
		blind := erasure.BlindID(b)
		if said[blind] == nil {
			said[blind] = &answer{from: from}
		}
		return said[blind]
	}
	for _, r := range msg.Records {
		x := about(r.GetManifest().GetBlind())
		x.records = append(x.records, r)
	}
	for _, h := range msg.Held {
		x := about(h.GetManifest().GetBlind())
		x.held = append(x.held, h)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	q := a.asked[[16]byte(msg.Nonce)]
	if q == nil {
		return
	}
	for blind, x := range said {
		for _, ch := range q.waiting[blind] {
			select {
			case ch <- *x:
			default:
			}
		}
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
	a.deliver(from.Member.ID, msg)
	return &wire.Reply{}, nil, nil
}
