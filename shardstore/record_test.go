package shardstore

import (
	"bytes"
	"encoding/hex"
	"hash/crc32"
	"strings"
	"testing"
)

// example is the worked example of FORMAT.md, "Shard store": a pack
// with one shard.
const example = `
44454653 5041434b 01000000 00000000 a1a2a3a4 a5a6a7a8 01000000 00000000
00000000 00000000 00000000 00000000 00000000 00000000 00000000 d5fd5c09
44535052 01010000 a1a2a3a4 a5a6a7a8 01000000 00000000 00000000 00000000
3c000000 00000000 35000000 28000000 f11d8e22 00000000 00000000 ef6f8b98
4301c8f9 11111111 11111111 11111111 11111111 11111111 11111111 11111111
11111111 02010500 00000300 00000200 70326d61 6e636f64 65646f75 74222222
22222222 22222222 22222222 22222222 22222222 22222222 22222222 22000000
00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000`

func examplePack() []byte {
	store := [8]byte{0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8}
	m := meta{Key: Key{Index: 2}, Provisional: true, Coded: 5, Outboard: 3, Partner: "p2", Blob: []byte("man")}
	for i := range m.Key.Blind {
		m.Key.Blind[i] = 0x11
	}
	p := newPending(kindShard, &m, []byte("coded"), []byte("out"), bytes.Repeat([]byte{0x22}, columnBytes))
	h := recordHeader{Kind: kindShard, Store: store, Seq: 1, Uptime: 60, Meta: uint32(len(p.meta)), Data: uint32(p.dataBytes()), MetaCRC: crc32.Checksum(p.meta, castagnoli)}
	out := append(encodePackHeader(store, 1), h.encode()...)
	out = append(out, p.meta...)
	for _, d := range p.data {
		out = append(out, d...)
	}
	return append(out, make([]byte, packHeaderBytes+int(h.bytes())-len(out))...)
}

func TestGolden(t *testing.T) {
	b, err := hex.DecodeString(strings.Join(strings.Fields(example), ""))
	if err != nil {
		t.Fatal(err)
	}
	if want := examplePack(); !bytes.Equal(b, want) {
		t.Fatalf("the format has changed; it now gives\n%s", dump(want))
	}
	store, id, err := decodePackHeader(b)
	if err != nil || id != 1 {
		t.Fatal(id, err)
	}
	h, err := decodeRecordHeader(b[packHeaderBytes:], store)
	if err != nil || h.Kind != kindShard || h.Seq != 1 || h.Uptime != 60 || h.bytes() != 192 {
		t.Fatalf("%+v %v", h, err)
	}
	rest := b[packHeaderBytes+recordHeaderBytes:]
	m, sums, err := verifyMeta(h, rest[:h.Meta])
	if err != nil || m.Key.Index != 2 || m.Partner != "p2" || string(m.Blob) != "man" || !m.Provisional {
		t.Fatalf("%+v %v", m, err)
	}
	data := rest[h.Meta:][:h.Data]
	if !checkSums(sums, data) || string(data[:m.Coded]) != "coded" || string(data[m.Coded:][:m.Outboard]) != "out" {
		t.Fatalf("data %x", data)
	}
}

func dump(b []byte) string {
	var s strings.Builder
	for i := 0; i < len(b); i += 4 {
		s.WriteString(hex.EncodeToString(b[i:min(i+4, len(b))]))
		s.WriteByte(" \n"[btoi(i%32 == 28)])
	}
	return s.String()
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// FuzzRecord decodes what a damaged disk may hold.
func FuzzRecord(f *testing.F) {
	f.Add(examplePack())
	f.Add(encodePackHeader([8]byte{1}, 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		store, _, err := decodePackHeader(b)
		if err != nil || len(b) < packHeaderBytes {
			store = [8]byte{0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8}
		} else {
			b = b[packHeaderBytes:]
		}
		h, err := decodeRecordHeader(b, store)
		if err != nil {
			return
		}
		if !bytes.Equal(h.encode()[:52], b[:52]) && b[6]|b[7] == 0 {
			t.Fatal("header does not encode to what it was decoded from")
		}
		b = b[recordHeaderBytes:]
		if len(b) < int(h.Meta) {
			return
		}
		m, sums, err := decodeMeta(h, b[:h.Meta])
		if err != nil {
			return
		}
		if len(sums) != 4*int(sumBlocks(int64(h.Data))) {
			t.Fatal("sums do not cover the data")
		}
		again, _, err := decodeMeta(h, m.append(append([]byte(nil), sums...), h.Kind))
		if err != nil || again.Key != m.Key || again.ID != m.ID || again.Partner != m.Partner || !bytes.Equal(again.Blob, m.Blob) {
			t.Fatalf("meta does not round-trip: %v", err)
		}
	})
}

// FuzzMeta reaches behind the checksums.
func FuzzMeta(f *testing.F) {
	f.Add(byte(1), uint32(40), examplePack()[128:])
	f.Add(byte(9), uint32(0), make([]byte, 40))
	f.Fuzz(func(t *testing.T, kind byte, data uint32, b []byte) {
		if len(b) > metaBytesMax || data > dataBytesMax {
			return
		}
		h := recordHeader{Kind: recordKind(kind), Meta: uint32(len(b)), Data: data}
		m, _, err := decodeMeta(h, b)
		if err == nil && uint64(m.Coded)+uint64(m.Outboard) > uint64(data) {
			t.Fatal("shard is larger than its record")
		}
	})
}

// FuzzIndexEntry decodes what a damaged index may hold.
func FuzzIndexEntry(f *testing.F) {
	f.Add(shardEntry{Partner: "x"}.encode())
	f.Add(itemEntry{}.encode())
	f.Add(deadEntry{Tombstone: &Key{}}.encode())
	f.Add(indexState{Seq: 1}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := decodeShardEntry(b); err == nil && len(e.encode()) != len(b) {
			t.Fatal("shard entry")
		}
		if e, err := decodeItemEntry(b); err == nil && !bytes.Equal(e.encode(), b) {
			t.Fatal("item entry")
		}
		if e, err := decodeDeadEntry(b); err == nil && !bytes.Equal(e.encode(), b) {
			t.Fatal("dead entry")
		}
		if e, err := decodeIndexState(b); err == nil && !bytes.Equal(e.encode(), b) {
			t.Fatal("state")
		}
	})
}
