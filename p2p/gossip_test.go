package p2p

import (
	"testing"
	"time"

	pubsub "github.com/libp2p/go-libp2p-pubsub"
	pb "github.com/libp2p/go-libp2p-pubsub/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
)

// TestGossipIsChecked: only members are heard, and only within bounds.
func TestGossipIsChecked(t *testing.T) {
	h, _ := guarded(t)
	member := fixedAnnouncement(t, 5, func(*wire.Member) {})
	if _, err := h.table.learn(member, time.Now()); err != nil {
		t.Fatal(err)
	}
	validate := func(kind topicKind, seed byte, msg proto.Message) pubsub.ValidationResult {
		t.Helper()
		id, err := NodeIDOf(fixed(seed))
		if err != nil {
			t.Fatal(err)
		}
		author, err := peer.Decode(string(id))
		if err != nil {
			t.Fatal(err)
		}
		data, err := proto.Marshal(msg)
		if err != nil {
			t.Fatal(err)
		}
		return h.gossip.validate(kind, &pubsub.Message{Message: &pb.Message{From: []byte(author), Data: data}})
	}
	lookup := func(nonce byte) *wire.Lookup {
		return &wire.Lookup{Nonce: append(make([]byte, 15), nonce), Sender: member.Certificate.Peer, Blinds: [][]byte{make([]byte, 32)}}
	}
	forged := lookup(9)
	forged.Sender = string(h.id)
	for _, c := range []struct {
		name string
		kind topicKind
		seed byte
		msg  proto.Message
		want pubsub.ValidationResult
	}{
		{"lookup", topicLookups, 5, lookup(1), pubsub.ValidationAccept},
		{"the same lookup", topicLookups, 5, lookup(1), pubsub.ValidationIgnore},
		{"another lookup", topicLookups, 5, lookup(2), pubsub.ValidationAccept},
		{"a stranger's lookup", topicLookups, 6, lookup(3), pubsub.ValidationIgnore},
		{"a lookup in another's name", topicLookups, 5, forged, pubsub.ValidationReject},
		{"an empty lookup", topicLookups, 5, &wire.Lookup{}, pubsub.ValidationReject},
		{"head", topicHeads, 5, &wire.HeadNotice{Address: make([]byte, 32)}, pubsub.ValidationAccept},
		{"short head", topicHeads, 5, &wire.HeadNotice{Address: make([]byte, 31)}, pubsub.ValidationReject},
		{"announcement", topicMembers, 5, member, pubsub.ValidationAccept},
		{"another's announcement", topicMembers, 5, fixedAnnouncement(t, 6, func(*wire.Member) {}), pubsub.ValidationReject},
		{"death", topicDeaths, 5, &wire.Death{Peer: string(h.id)}, pubsub.ValidationAccept},
		{"large death", topicDeaths, 5, &wire.Death{Peer: string(make([]byte, 1000))}, pubsub.ValidationReject},
	} {
		if got := validate(c.kind, c.seed, c.msg); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	// One member is stopped by its own budget, several by that of the pool.
	flood := func(seed byte) (accepted int) {
		author, err := NodeIDOf(fixed(seed))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 1000 {
			l := &wire.Lookup{Nonce: make([]byte, 16), Sender: string(author), Blinds: [][]byte{make([]byte, 32)}}
			l.Nonce[0], l.Nonce[1] = byte(i), byte(1+i>>8)
			if validate(topicLookups, seed, l) == pubsub.ValidationAccept {
				accepted++
			}
		}
		return accepted
	}
	sum := flood(5)
	if sum < 100 || sum > 300 {
		t.Errorf("%d of 1000 lookups at once were passed on", sum)
	}
	for seed := byte(10); seed < 15; seed++ {
		if _, err := h.table.learn(fixedAnnouncement(t, seed, func(*wire.Member) {}), time.Now()); err != nil {
			t.Fatal(err)
		}
		sum += flood(seed)
	}
	if sum < lookupsBurst-5 || sum > 2*lookupsBurst {
		t.Errorf("%d lookups of six members at once were passed on, the pool's budget is %d", sum, lookupsBurst)
	}
}
