package volume

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"

	"google.golang.org/protobuf/proto"
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
