package p2p

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
)

func nothing() {}

// TestFrameGolden decodes the example of FORMAT.md.
func TestFrameGolden(t *testing.T) {
	b, err := hex.DecodeString(strings.ReplaceAll(goldenFrame, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(bytes.NewReader(b))
	req := new(wire.Request)
	if err := readMessage(r, req, MessageBytesMax); err != nil {
		t.Fatal(err)
	}
	body, err := readBody(r, req.BodyBytes, nil, nothing)
	if err != nil {
		t.Fatal(err)
	}
	put := req.GetPutShard()
	if req.Version != 1 || put.GetIndex() != 3 || put.GetCrc32C() != 0xdeadbeef || string(body) != "shard" {
		t.Fatalf("decoded %v with body %q", req, body)
	}
	var again bytes.Buffer
	if err := writeFrame(&again, req, body, nothing); err != nil || !bytes.Equal(again.Bytes(), b) {
		t.Fatalf("encoded again: % x, %v", again.Bytes(), err)
	}
}

func TestFrameSizes(t *testing.T) {
	for _, messageBytes := range []int{0, 1, 127, 4095, 4096, 5000, MessageBytesMax - 64} {
		for _, bodyBytes := range []int{0, 1, inlineBodyBytes, inlineBodyBytes + 1, bodyPieceBytes, bodyPieceBytes + 1, bodyTrustBytes, 3*bodyTrustBytes + 5} {
			req := &wire.Request{Version: 1, BodyBytes: uint64(bodyBytes), Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: &wire.Head{Sealed: make([]byte, messageBytes)}}}}
			body := bytes.Repeat([]byte{7}, bodyBytes)
			var buf bytes.Buffer
			if err := writeFrame(&buf, req, body, nothing); err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReaderSize(iotest.HalfReader(&buf), streamReadBytes)
			got := new(wire.Request)
			if err := readMessage(r, got, MessageBytesMax); err != nil || !proto.Equal(got, req) {
				t.Fatalf("message of %d bytes: %v", messageBytes, err)
			}
			gotBody, err := readBody(r, got.BodyBytes, nil, nothing)
			if err != nil || !bytes.Equal(gotBody, body) || len(gotBody) != cap(gotBody) {
				t.Fatalf("body of %d bytes: %d of %d, %v", bodyBytes, len(gotBody), cap(gotBody), err)
			}
			if _, err := r.ReadByte(); err != io.EOF {
				t.Fatalf("bytes left: %v", err)
			}
		}
	}
}

func TestFrameBounds(t *testing.T) {
	claim := binary.AppendUvarint(nil, MessageBytesMax+1)
	if err := readMessage(bufio.NewReader(bytes.NewReader(claim)), new(wire.Request), MessageBytesMax); !errors.Is(err, ErrTooLarge) {
		t.Errorf("message: %v", err)
	}
	if _, err := readBody(strings.NewReader(""), BodyBytesMax+1, nil, nothing); !errors.Is(err, ErrTooLarge) {
		t.Errorf("body: %v", err)
	}
	if err := writeFrame(io.Discard, &wire.Request{Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: &wire.Head{Sealed: make([]byte, MessageBytesMax)}}}}, nil, nothing); !errors.Is(err, ErrTooLarge) {
		t.Errorf("writing: %v", err)
	}
	for name, text := range map[string]string{"length cut": "\x80", "message cut": "\x05abc", "endless length": strings.Repeat("\xff", 20)} {
		if err := readMessage(bufio.NewReader(strings.NewReader(text)), new(wire.Request), MessageBytesMax); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := readBody(strings.NewReader("abc"), 4, nil, nothing); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("body cut: %v", err)
	}
}

// TestBodyClaimCostsLittle: 64 MiB announced and not sent must not be
// allocated.
func TestBodyClaimCostsLittle(t *testing.T) {
	const rounds = 4
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range rounds {
		_, _ = readBody(strings.NewReader("few"), BodyBytesMax, nil, nothing)
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) / rounds; n > bodyTrustBytes+1<<20 {
		t.Errorf("a claim cost %d bytes", n)
	}
}

func fixedAnnouncement(t testing.TB, seed byte, change func(*wire.Member)) *wire.Member {
	t.Helper()
	key := fixed(seed)
	m := &wire.Member{Certificate: fixedCertificate(t, key), Addrs: []string{"/ip4/192.0.2.7/tcp/4001"}, Host: "h", Sequence: 5}
	change(m)
	if err := signAnnouncement(m, key); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestAnnouncementRefusals(t *testing.T) {
	pool := PoolKey(fixed(1)).ID()
	good := fixedAnnouncement(t, 3, func(*wire.Member) {})
	a, err := verifyAnnouncement(proto.CloneOf(good), pool, time.Now())
	if err != nil || subnetOf(a.addrs) != "192.0.2.0/24" {
		t.Fatalf("good: %v, subnet %s", err, subnetOf(a.addrs))
	}
	changed := func(change func(*wire.Member)) *wire.Member {
		m := proto.CloneOf(good)
		change(m)
		return m
	}
	for name, m := range map[string]*wire.Member{
		"nil":                 nil,
		"empty":               {},
		"address changed":     changed(func(m *wire.Member) { m.Addrs[0] = "/ip4/192.0.2.8/tcp/4001" }),
		"sequence changed":    changed(func(m *wire.Member) { m.Sequence++ }),
		"no signature":        changed(func(m *wire.Member) { m.Signature = nil }),
		"another's signature": changed(func(m *wire.Member) { m.Signature = fixedAnnouncement(t, 4, func(*wire.Member) {}).Signature }),
		"another's certificate": changed(func(m *wire.Member) {
			m.Certificate = fixedCertificate(t, fixed(4))
		}),
		"many addresses": fixedAnnouncement(t, 3, func(m *wire.Member) { m.Addrs = make([]string, memberAddrsMax+1) }),
		"long address":   fixedAnnouncement(t, 3, func(m *wire.Member) { m.Addrs[0] = strings.Repeat("a", memberAddrBytesMax+1) }),
		"long host":      fixedAnnouncement(t, 3, func(m *wire.Member) { m.Host = strings.Repeat("a", nameBytesMax+1) }),
		"large":          fixedAnnouncement(t, 3, func(m *wire.Member) { m.Zone = strings.Repeat("a", announcementMax) }),
	} {
		if _, err := verifyAnnouncement(m, pool, time.Now()); err == nil {
			t.Errorf("%s: was taken", name)
		}
	}
}

func TestMemberFile(t *testing.T) {
	file := &wire.MemberFile{
		Members: []*wire.Member{fixedAnnouncement(t, 3, func(*wire.Member) {}), fixedAnnouncement(t, 4, func(*wire.Member) {})},
		Listen:  []string{"/ip4/127.0.0.1/tcp/4001"},
	}
	b, err := encodeMemberFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeMemberFile(b)
	if err != nil || !proto.Equal(got, file) {
		t.Fatalf("got %v, %v", got, err)
	}
	for i := range b {
		c := bytes.Clone(b)
		c[i] ^= 0x10
		if _, err := decodeMemberFile(c); err == nil {
			t.Fatalf("byte %d flipped: no error", i)
		}
		if _, err := decodeMemberFile(b[:i]); err == nil {
			t.Fatalf("cut at %d: no error", i)
		}
	}
}

func FuzzFrame(f *testing.F) {
	golden, _ := hex.DecodeString(strings.ReplaceAll(goldenFrame, " ", ""))
	f.Add(golden)
	f.Add([]byte{0})
	f.Add([]byte{2, 0x10, 5, 1, 2, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		req := new(wire.Request)
		if err := readMessage(r, req, MessageBytesMax); err != nil {
			return
		}
		body, err := readBody(r, req.BodyBytes, nil, nothing)
		if err != nil {
			return
		}
		if uint64(len(body)) != req.BodyBytes {
			t.Fatalf("body of %d bytes, %d were announced", len(body), req.BodyBytes)
		}
		_ = OpOf(req)
		_ = readMessage(bufio.NewReader(bytes.NewReader(b)), new(wire.Reply), MessageBytesMax)
	})
}

func FuzzAnnouncement(f *testing.F) {
	b, err := proto.Marshal(fixedAnnouncement(f, 3, func(*wire.Member) {}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(wire.Member)
		if proto.Unmarshal(b, m) != nil {
			return
		}
		a, err := verifyAnnouncement(m, PoolKey(fixed(1)).ID(), time.Unix(1700000000, 0))
		if err == nil && string(a.id) != m.Certificate.Peer {
			t.Fatalf("announcement of %s taken for one of %s", m.Certificate.Peer, a.id)
		}
	})
}

func FuzzMemberFile(f *testing.F) {
	b, err := encodeMemberFile(&wire.MemberFile{Members: []*wire.Member{fixedAnnouncement(f, 3, func(*wire.Member) {})}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if file, err := decodeMemberFile(b); err == nil && len(file.Members) > membersMax {
			t.Fatal("too many members")
		}
	})
}

func FuzzGossip(f *testing.F) {
	lookup, err := proto.Marshal(&wire.Lookup{Nonce: make([]byte, 16), Sender: "x", Blinds: [][]byte{make([]byte, 32)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(byte(topicLookups), lookup)
	f.Add(byte(topicDeaths), []byte{})
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		decoded, err := decodeGossip(topicKind(kind%topicCount), "x", b)
		if err != nil {
			return
		}
		if l, ok := decoded.(*wire.Lookup); ok && (l.Sender != "x" || checkLookup(l) != nil) {
			t.Fatalf("taken: %v", l)
		}
	})
}
