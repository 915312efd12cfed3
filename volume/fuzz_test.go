package volume

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/volume/headpb"
)

func FuzzDecodeLog(f *testing.F) {
	f.Add(golden(f, "log slice"))
	f.Add([]byte{logVersion})
	f.Add([]byte{logVersion, logPut, 1, 'o', 0, logDelete, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := decodeEntries(b)
		if err != nil {
			return
		}
		again, err := encodeEntries(entries)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			return // the writer makes no slice without entries
		}
		got, err := decodeEntries(again)
		if err != nil || !equalEntries(got, entries) {
			t.Fatalf("%x became %x: %v", b, again, err)
		}
	})
}

func FuzzDecodeHeadState(f *testing.F) {
	f.Add(golden(f, "head state"))
	f.Add(bytes.Repeat([]byte{1}, 41))
	f.Fuzz(func(t *testing.T, b []byte) {
		sequence, hash, body, err := decodeHeadState(b)
		if err != nil {
			return
		}
		again, err := encodeHeadState(sequence, hash, body)
		if err != nil {
			t.Fatal(err)
		}
		sequence2, hash2, body2, err := decodeHeadState(again)
		if err != nil || sequence2 != sequence || !bytes.Equal(hash2, hash) || !proto.Equal(body2, body) {
			t.Fatalf("%x became %x: %v", b, again, err)
		}
	})
}

func FuzzParseDevice(f *testing.F) {
	example, err := os.ReadFile("testdata/device.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := parseDevice(b)
		if err != nil {
			return
		}
		if _, err := newKeyring(d); err != nil && len(d.Bundles) == 1 {
			t.Fatalf("a device that parses has no keys: %v", err)
		}
		again, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseDevice(again); err != nil {
			t.Fatalf("written and read again: %v", err)
		}
	})
}

// FuzzBody goes through all that recovery does with the body of a head before
// it asks for the log.
func FuzzBody(f *testing.F) {
	f.Add(golden(f, "head state")[41:])
	f.Add([]byte{8, 1, 18, 0, 122, 4, 8, 1, 16, 9})
	words, err := seal.NewWords()
	if err != nil {
		f.Fatal(err)
	}
	root, err := seal.RootFromWords(words)
	if err != nil {
		f.Fatal(err)
	}
	recovery, err := root.Recovery()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		key := recovery.HeadKey(2)
		sealed, err := key.SealHead(3, b)
		if err != nil {
			return
		}
		head := &wire.Head{Sequence: 3, Sealed: sealed}
		body, err := openBody(key, head)
		if err != nil {
			return
		}
		mine := &foundHead{slot: 2, head: head, body: body}
		other := &foundHead{slot: 1, head: &wire.Head{Sequence: 7}, body: &headpb.Body{}}
		found := &foundHeads{heads: []*foundHead{mine, other}}
		if taken, err := found.choose(0); err == nil {
			found.left(taken)
		}
		found.left(other)
		if d, err := adoptBody(recovery, body, 3); err == nil && d.Slot != 3 {
			t.Fatalf("device %d", d.Slot)
		}
		for _, s := range body.Segments {
			var info metastore.StripeInfo
			if info.UnmarshalBinary(s.Info) == nil && (info.K < 1 || len(info.Roots) != info.K+info.M) {
				t.Fatalf("stripe %+v", info)
			}
		}
	})
}
