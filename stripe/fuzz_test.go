package stripe

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// recorder keeps the replies of real nodes.
type recorder struct {
	p2p.Transport
	mu      sync.Mutex
	replies map[string]recorded // by kind of request
}

type recorded struct{ reply, body []byte }

func (r *recorder) Call(ctx context.Context, to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	rep, replyBody, err := r.Transport.Call(ctx, to, req, body)
	if b, failed := proto.Marshal(rep); failed == nil && rep != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		kind := p2p.OpOf(req)
		if len(replyBody) == 0 || len(replyBody) < len(r.replies[kind].body) || r.replies[kind].body == nil {
			r.replies[kind] = recorded{b, bytes.Clone(replyBody)}
		}
	}
	return rep, replyBody, err
}

// liar gives the same reply to every request, and the same answer to every
// lookup, from each of the nodes.
type liar struct {
	p2p.Transport
	nodes  []p2p.Member
	handle p2p.Handler

	mu     sync.Mutex
	reply  recorded // guarded by mu
	answer []byte   // guarded by mu
}

func (l *liar) Members() []p2p.Member { return l.nodes }
func (l *liar) Handle(h p2p.Handler)  { l.handle = h }
func (l *liar) Nonce(context.Context, placement.NodeID) ([]byte, error) {
	return make([]byte, p2p.NonceBytes), nil
}

func (l *liar) Call(context.Context, placement.NodeID, *wire.Request, []byte) (*wire.Reply, []byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rep := &wire.Reply{}
	if err := proto.Unmarshal(l.reply.reply, rep); err != nil {
		return nil, nil, p2p.ErrUnreachable
	}
	return rep, bytes.Clone(l.reply.body), nil
}

func (l *liar) Broadcast(ctx context.Context, lookup *wire.Lookup) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	answer := &wire.LookupAnswer{}
	if proto.Unmarshal(l.answer, answer) != nil {
		return p2p.ErrUnreachable
	}
	answer.Nonce = lookup.Nonce
	for _, m := range l.nodes {
		l.handle(ctx, p2p.Peer{Member: m}, &wire.Request{Op: &wire.Request_LookupAnswer{LookupAnswer: answer}}, nil)
	}
	return nil
}

// FuzzReplies reads a stripe from nodes that reply anything: what is returned
// without an error is the stripe's.
func FuzzReplies(f *testing.F) {
	h := newHarness(f, 4, "rs-ratio:2+1")
	st := h.put(random(20_000))
	seen := &recorder{Transport: h.Store.t, replies: map[string]recorded{}}
	o := h.o
	o.Transport = seen
	honest := NewStore(o)
	info := st.info
	if _, _, err := honest.Read(ctx, st.ID, &info, 17_000, 9); err != nil {
		f.Fatal(err)
	}
	if _, _, err := honest.Salt(ctx, st.ID, &info); err != nil {
		f.Fatal(err)
	}
	keys, err := h.Keys(st.ID, info.Epoch, info.LockVersion)
	if err != nil {
		f.Fatal(err)
	}
	records := honest.askKeepers(ctx, keys.Blind, &info)
	held := &wire.LookupAnswer{Records: records, Held: []*wire.Held{{Manifest: st.Manifest, Index: 1, Partner: "p"}, {Manifest: st.Manifest, Index: 900}, {}}}
	answer, err := proto.Marshal(held)
	if err != nil {
		f.Fatal(err)
	}
	if len(seen.replies) < 3 || len(records) == 0 {
		f.Fatalf("only %d kinds of replies", len(seen.replies))
	}
	for _, r := range seen.replies {
		f.Add(r.reply, r.body, answer)
	}
	f.Add([]byte{}, []byte{}, []byte{})

	l := &liar{nodes: h.Store.t.Members()}
	o.Transport, o.ReadTimeout, o.RequestTimeout, o.HedgeAfter = l, 5*time.Millisecond, 5*time.Millisecond, time.Millisecond
	s := NewStore(o)
	f.Fuzz(func(t *testing.T, reply, body, answer []byte) {
		l.mu.Lock()
		l.reply, l.answer = recorded{reply, body}, answer
		l.mu.Unlock()
		info := st.info
		info.Holders = slices.Clone(st.info.Holders)
		got, _, err := s.Read(ctx, st.ID, &info, 17_000, 9)
		if err == nil && !bytes.Equal(got, st.data[17_000:17_009]) {
			t.Fatal("other bytes were taken")
		}
		if salt, _, err := s.Salt(ctx, st.ID, &info); err == nil && salt != st.Salt {
			t.Fatal("another salt was taken")
		}
		if len(info.Holders) != info.K+info.M {
			t.Fatalf("%d holders", len(info.Holders))
		}
	})
}
