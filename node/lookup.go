package node

import (
	"context"
	"encoding/hex"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// lookup is a broadcast question waiting for an answer.
type lookup struct {
	from placement.NodeID
	msg  *wire.Lookup
}

func blindText(b [32]byte) string { return hex.EncodeToString(b[:8]) }

// enqueueLookup takes a broadcast from the transport. When there are too many,
// the newest are left to other nodes.
func (n *Node) enqueueLookup(from placement.NodeID, msg *wire.Lookup) {
	if len(msg.GetBlinds()) > wire.LookupMax || from == n.transport.Self() {
		return
	}
	if seen, _ := n.answered.ContainsOrAdd(string(from)+string(msg.Nonce), struct{}{}); seen {
		return
	}
	if !n.answers.Allow() {
		return
	}
	select {
	case n.lookups <- lookup{from, msg}:
	default:
	}
}

// answerer answers lookups with what this node keeps and holds, directly.
func (n *Node) answerer(ctx context.Context) {
	for {
		select {
		case l := <-n.lookups:
			n.answer(ctx, l)
		case <-ctx.Done():
			return
		}
	}
}

func (n *Node) answer(ctx context.Context, l lookup) {
	answer := &wire.LookupAnswer{Nonce: l.msg.Nonce}
	room := messageRoom
	send := func() {
		if len(answer.Records)+len(answer.Held) == 0 {
			return
		}
		if _, _, err := n.call(ctx, l.from, &wire.Request{Op: &wire.Request_LookupAnswer{LookupAnswer: answer}}, nil); err != nil {
			n.log.Debug("A lookup could not be answered.", "peer", string(l.from), "err", err)
		}
		answer, room = &wire.LookupAnswer{Nonce: l.msg.Nonce}, messageRoom
	}
	fit := func(m proto.Message) {
		size := proto.Size(m) + 8
		if size > room {
			send()
		}
		room -= size
	}
	for _, b := range l.msg.Blinds {
		if len(b) != 32 {
			continue
		}
		blind := [32]byte(b)
		if r, err := n.index(blind); err == nil {
			fit(r)
			answer.Records = append(answer.Records, r)
		}
		shards, err := n.store.StripeShards(blind)
		if err != nil {
			n.log.Error("Shards cannot be listed.", "stripe", blindText(blind), "err", err)
			continue
		}
		for _, s := range shards {
			info, b, err := n.store.Manifest(s.Key)
			held := &wire.Held{Manifest: new(wire.Manifest), Index: uint32(s.Index), Partner: info.Partner}
			if err != nil || proto.Unmarshal(b, held.Manifest) != nil {
				continue
			}
			fit(held)
			answer.Held = append(answer.Held, held)
		}
	}
	send()
}
