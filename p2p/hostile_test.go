package p2p

import (
	"bufio"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	pubsub "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
)

// victim is a host, an honest member that asks it, and bare libp2p hosts that
// do as they like.
type victim struct {
	t      *testing.T
	host   *Host
	honest *Host
}

func newVictim(t *testing.T) *victim {
	t.Helper()
	v := &victim{t: t}
	v.host = startFixed(t, 3, nil, func(o *HostOptions) { o.IdleTimeout = 5 * time.Second })
	v.host.Handle(func(_ context.Context, _ Peer, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
		return nil, append([]byte(nil), body...), nil
	})
	v.honest = startFixed(t, 4, v.host.Addrs(), func(*HostOptions) {})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := v.honest.WaitMembers(ctx, 1); err != nil {
		t.Fatal(err)
	}
	return v
}

// serves checks that the honest member is served, and soon.
func (v *victim) serves(during string) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.t.Context(), 3*time.Second) // less than the victim waits for a slow peer
	defer cancel()
	req := &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{}}}
	if _, body, err := v.honest.Call(ctx, v.host.id, req, make([]byte, 2<<20)); err != nil || len(body) != 2<<20 {
		v.t.Errorf("%s: an honest member got %d bytes, %v", during, len(body), err)
	}
}

// intruder is connected to the victim; with a certificate if it is a member.
func (v *victim) intruder(seed byte, member bool) host.Host {
	v.t.Helper()
	key, err := crypto.UnmarshalEd25519PrivateKey(fixed(seed))
	if err != nil {
		v.t.Fatal(err)
	}
	h, err := libp2p.New(libp2p.Identity(key), libp2p.NoListenAddrs, libp2p.Transport(tcp.NewTCPTransport), libp2p.DisableMetrics(),
		libp2p.Security(libp2ptls.ID, libp2ptls.New), libp2p.ResourceManager(&network.NullResourceManager{}))
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = h.Close() })
	info, err := parsePeerAddr(v.host.Addrs()[0])
	if err != nil {
		v.t.Fatal(err)
	}
	if err := h.Connect(v.t.Context(), info); err != nil {
		v.t.Fatal(err)
	}
	if member {
		said := fixedAnnouncement(v.t, seed, func(*wire.Member) {})
		// It answers the Hello that the victim says in turn.
		h.SetStreamHandler(requestProtocol, func(s network.Stream) {
			defer s.Close()
			if readMessage(bufio.NewReader(s), new(wire.Request), MessageBytesMax) == nil {
				_ = writeFrame(s, &wire.Reply{Version: WireVersion, Result: &wire.Reply_Hello{Hello: &wire.HelloReply{Self: said, Nonce: make([]byte, NonceBytes)}}}, nil, nothing)
			}
		})
		rep, err := ask(v.t, v.host, h, &wire.Request{Version: WireVersion, Op: &wire.Request_Hello{Hello: &wire.Hello{Self: said, Session: make([]byte, sessionBytes)}}})
		if err != nil || rep.Status != wire.Status_STATUS_OK {
			v.t.Fatalf("hello: %v, %v", rep, err)
		}
	}
	return h
}

// sends opens a stream, sends bytes, and returns how the victim ended it.
func (v *victim) sends(h host.Host, b []byte) (*wire.Reply, error) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.t.Context(), 10*time.Second)
	defer cancel()
	s, err := h.NewStream(ctx, v.host.net.ID(), requestProtocol)
	if err != nil {
		v.t.Fatal(err)
	}
	defer func() { _ = s.Reset() }()
	_ = s.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := s.Write(b); err != nil {
		return nil, err
	}
	_ = s.CloseWrite()
	rep := new(wire.Reply)
	return rep, readMessage(bufio.NewReader(s), rep, MessageBytesMax)
}

func framed(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.AppendUvarint(nil, uint64(len(b))), b...)
}

// TestMalformedFrames: what cannot be a request ends its stream and nothing
// else, whoever sends it.
func TestMalformedFrames(t *testing.T) {
	v := newVictim(t)
	request := &wire.Request{Version: WireVersion, Op: &wire.Request_GetShard{GetShard: &wire.GetShard{}}}
	huge := proto.CloneOf(request)
	huge.BodyBytes = BodyBytesMax + 1
	wrap := proto.CloneOf(request)
	wrap.BodyBytes = 1<<64 - 1
	short := proto.CloneOf(request)
	short.BodyBytes = 1 << 20
	noise := make([]byte, 64<<10)
	rand.NewChaCha8([32]byte{7}).Read(noise)
	whole := framed(t, request)
	for seed, member := range map[byte]bool{20: true, 21: false} {
		bad := v.intruder(seed, member)
		for name, b := range map[string][]byte{
			"a message over the bound":    binary.AppendUvarint(nil, MessageBytesMax+1),
			"a message of 2^63 bytes":     binary.AppendUvarint(nil, 1<<63),
			"a length that never ends":    {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
			"a length alone":              {100},
			"half a message":              whole[:len(whole)/2],
			"what is no message":          append([]byte{4}, 0xff, 0xff, 0xff, 0xff),
			"noise":                       noise,
			"a body over the bound":       framed(t, huge),
			"a body of 2^64 - 1 bytes":    framed(t, wrap),
			"a body that ends early":      append(framed(t, short), 1, 2, 3),
			"a request of no kind":        framed(t, &wire.Request{Version: WireVersion}),
			"a hello that has a body":     framed(t, &wire.Request{Version: WireVersion, BodyBytes: 1, Op: &wire.Request_Hello{Hello: &wire.Hello{}}}),
			"a hello with a long session": framed(t, &wire.Request{Version: WireVersion, Op: &wire.Request_Hello{Hello: &wire.Hello{Session: make([]byte, 1000)}}}),
		} {
			// What is within bounds and empty is the handler's to judge.
			if rep, err := v.sends(bad, b); err == nil && rep.Status == wire.Status_STATUS_OK && name != "a request of no kind" {
				t.Errorf("%s (member: %v) was answered: %v", name, member, rep)
			}
		}
		v.serves("malformed frames")
	}
}

// TestSlowBodies: a member that claims large bodies and does not send them
// holds up itself alone.
func TestSlowBodies(t *testing.T) {
	v := newVictim(t)
	bad := v.intruder(20, true)
	claim := &wire.Request{Version: WireVersion, BodyBytes: BodyBytesMax, Op: &wire.Request_PutShard{PutShard: &wire.PutShard{}}}
	for range 2 * v.host.o.HandlersPerPeerMax {
		s, err := bad.NewStream(t.Context(), v.host.net.ID(), requestProtocol)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write(framed(t, claim)); err != nil {
			t.Fatal(err)
		}
	}
	m := v.host.table.get(nodeIDOf(t, 20))
	eventually(t, "the handlers of the slow member are taken", func() bool { return len(m.handlers) == cap(m.handlers) })
	v.serves("slow bodies")
}

func nodeIDOf(t *testing.T, seed byte) placement.NodeID {
	t.Helper()
	id, err := NodeIDOf(fixed(seed))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestManyStreams: streams that say nothing, or only the beginning of
// something, are bounded for each peer and end by themselves.
func TestManyStreams(t *testing.T) {
	v := newVictim(t)
	for seed, member := range map[byte]bool{20: true, 21: false, 22: false} {
		bad := v.intruder(seed, member)
		opened := 0
		for range 3000 {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			s, err := bad.NewStream(ctx, v.host.net.ID(), requestProtocol)
			cancel()
			if err != nil {
				break
			}
			opened++
			_, _ = s.Write([]byte{0xff}) // the first byte of a length
		}
		if opened == 0 {
			t.Errorf("peer %d (member: %v) could open no stream", seed, member)
		}
		eventually(t, "most streams are ended", func() bool {
			served := 0
			for _, c := range v.host.net.Network().ConnsToPeer(bad.ID()) {
				served += len(c.GetStreams())
			}
			return served <= requestStreamsMax+16
		})
		v.serves("many streams")

		// The same without naming a protocol.
		for range 3000 {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			_, err := bad.Network().NewStream(ctx, v.host.net.ID())
			cancel()
			if err != nil {
				break
			}
		}
		v.serves("many streams that name no protocol")
	}
	// A new member can still come.
	v.intruder(30, true)
}

// TestGarbageGossip: what a member gossips beside the rules is heard by nobody.
func TestGarbageGossip(t *testing.T) {
	v := newVictim(t)
	bad := v.intruder(20, true)
	var heard atomic.Int64
	v.host.OnBroadcast(func(from placement.NodeID, l *wire.Lookup) { heard.Add(1) })
	v.host.OnHead(func(placement.NodeID, *wire.HeadNotice) { heard.Add(1000) })
	ps, err := pubsub.NewGossipSub(t.Context(), bad, pubsub.WithFloodPublish(true))
	if err != nil {
		t.Fatal(err)
	}
	noise := rand.NewChaCha8([32]byte{8})
	var topics []*pubsub.Topic
	for _, name := range topicNames {
		topic, err := ps.Join("/defs/1/" + v.host.table.pool.String() + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the victim hears the intruder", func() bool { return len(topic.ListPeers()) > 0 })
		topics = append(topics, topic)
	}
	before := len(v.host.Members())
	foreign, err := proto.Marshal(&wire.Lookup{Nonce: make([]byte, lookupNonceBytes), Sender: string(v.honest.id), Blinds: [][]byte{make([]byte, 32)}})
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		for _, topic := range topics {
			b := make([]byte, 1+noise.Uint64()%5000)
			noise.Read(b)
			if err := topic.Publish(t.Context(), b); err != nil {
				t.Fatal(err)
			}
		}
		if err := topics[topicLookups].Publish(t.Context(), foreign); err != nil {
			t.Fatal(err)
		}
	}
	v.serves("garbage gossip")
	// An honest lookup, sent after all that, is the only thing that arrives.
	eventually(t, "an honest lookup arrives", func() bool {
		if err := v.honest.Broadcast(t.Context(), &wire.Lookup{Blinds: [][]byte{make([]byte, 32)}}); err != nil {
			t.Fatal(err)
		}
		return heard.Load() > 0
	})
	if heard.Load() >= 1000 || len(v.host.Members()) != before {
		t.Errorf("heard %d, members %v", heard.Load(), v.host.Members())
	}
}
