package cache

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write the golden file")

func sequence(from byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = from + byte(i)
	}
	return b
}

// golden builds the worked example of FORMAT.md, "Journal and clean cache".
func golden(t *testing.T) map[string][]byte {
	device := [32]byte(sequence(0, 32))
	header := segmentHeader{ID: 7, CreatedNs: 1_700_000_000_000_000_000, Key: [32]byte(sequence(0x80, 32))}
	aead := newGCM(header.Key[:])
	page := header.encode(deviceAEAD(device, "segment header"), nonce(sequence(0x40, 12)))

	data, meta := []byte("hello, segment"), []byte("a record")
	var name blockName
	name.set(0, uint32(len(data)), 0)
	sealedData := aead.Seal(nil, name.nonce[:], data, name.aad[:])
	h := frameHeader{Seq: 42, DataNonce: 0, MetaNonce: 1, DataLength: uint32(len(data)), MetaLength: uint32(len(meta)), Prev: chain(sequence(0x10, 16))}
	metaNonce, aad := makeNonce(purposeMeta, 1), metaAAD(42)
	sealedMeta := aead.Seal(nil, metaNonce[:], meta, aad[:])
	copy(h.MetaTag[:], sealedMeta[len(meta):])
	frame := make([]byte, frameBytes)
	h.encode(aead, 7, dataStart, frame)

	end := position{Seq: 42, Segment: 7, Offset: h.end(dataStart), Chain: h.Chain}
	inSegment := tailSlot{Generation: 1, position: end}
	slotPage, err := inSegment.encode(aead, makeNonce(purposeSlot, 2), 7)
	if err != nil {
		t.Fatal(err)
	}
	inTail := tailSlot{Generation: 3, position: end, Dirty: []uint64{5, 7}}
	tailPage, err := inTail.encode(deviceAEAD(device, "tail file"), nonce(sequence(0x60, 12)), 0)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"segment-header": page[:headerBytes],
		"segment-slot":   slotPage[:slotFixedBytes+tagBytes],
		"frame-header":   frame,
		"frame-data":     sealedData,
		"frame-meta":     sealedMeta[:len(meta)],
		"tail-slot":      tailPage[:slotFixedBytes+1+tagBytes],
		"slice-header":   encodeSliceHeader(sliceKey{[16]byte(sequence(0xa0, 16)), 9}, []byte("sealed slice")),
	}
}

const goldenFile = "testdata/golden.txt"

func TestGolden(t *testing.T) {
	built := golden(t)
	if *update {
		var out strings.Builder
		for _, name := range []string{"segment-header", "segment-slot", "frame-header", "frame-data", "frame-meta", "tail-slot", "slice-header"} {
			fmt.Fprintf(&out, "%s %x\n", name, built[name])
		}
		os.MkdirAll("testdata", 0o755)
		if err := os.WriteFile(goldenFile, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	stored := make(map[string][]byte)
	for line := range strings.Lines(string(text)) {
		name, digits, _ := strings.Cut(strings.TrimSpace(line), " ")
		if stored[name], err = hex.DecodeString(digits); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(stored[name], built[name]) {
			t.Errorf("%s is encoded differently", name)
		}
	}
	device := [32]byte(sequence(0, 32))
	header, err := decodeSegmentHeader(deviceAEAD(device, "segment header"), stored["segment-header"])
	if err != nil || header.ID != 7 || header.Key != [32]byte(sequence(0x80, 32)) {
		t.Fatal(header, err)
	}
	aead := newGCM(header.Key[:])
	frame, err := decodeFrameHeader(aead, 7, dataStart, stored["frame-header"])
	if err != nil || frame.Seq != 42 || frame.DataLength != 14 || frame.MetaLength != 8 {
		t.Fatal(frame, err)
	}
	var name blockName
	name.set(frame.DataNonce, frame.DataLength, 0)
	if data, err := aead.Open(nil, name.nonce[:], stored["frame-data"], name.aad[:]); err != nil || string(data) != "hello, segment" {
		t.Fatal(data, err)
	}
	n, aad := makeNonce(purposeMeta, frame.MetaNonce), metaAAD(42)
	if meta, err := aead.Open(nil, n[:], append(stored["frame-meta"], frame.MetaTag[:]...), aad[:]); err != nil || string(meta) != "a record" {
		t.Fatal(meta, err)
	}
	slot, err := decodeTailSlot(aead, 7, append(stored["segment-slot"], make([]byte, pageBytes)...))
	if err != nil || slot.Seq != 42 || slot.Offset != 12414 || slot.Chain != frame.Chain {
		t.Fatal(slot, err)
	}
	slot, err = decodeTailSlot(deviceAEAD(device, "tail file"), 0, append(stored["tail-slot"], make([]byte, pageBytes)...))
	if err != nil || slot.Generation != 3 || !slices.Equal(slot.Dirty, []uint64{5, 7}) {
		t.Fatal(slot, err)
	}
	key, length, err := decodeSliceHeader(stored["slice-header"])
	if err != nil || key.slice != 9 || length != 12 {
		t.Fatal(key, length, err)
	}
}

func TestTailSlotRoundTrip(t *testing.T) {
	aead := newGCM(make([]byte, 32))
	rapid.Check(t, func(t *rapid.T) {
		slot := tailSlot{Generation: rapid.Uint64().Draw(t, "generation"), position: position{
			Seq: rapid.Uint64().Draw(t, "seq"), Segment: rapid.Uint64().Draw(t, "segment"), Offset: rapid.Int64().Draw(t, "offset"),
		}}
		id := rapid.Uint64Range(1, 1<<60).Draw(t, "first")
		for _, gap := range rapid.SliceOfN(rapid.Uint64Range(1, 300), 0, 90).Draw(t, "gaps") {
			slot.Dirty = append(slot.Dirty, id)
			id += gap
		}
		page, err := slot.encode(aead, nonce{1}, 5)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeTailSlot(aead, 5, page)
		if err != nil || got.Generation != slot.Generation || got.position != slot.position || !slices.Equal(got.Dirty, slot.Dirty) {
			t.Fatalf("%+v, %v; want %+v", got, err, slot)
		}
		if _, err := decodeTailSlot(aead, 6, page); err == nil {
			t.Fatal("a slot is valid in another segment")
		}
	})
	wide := tailSlot{Dirty: []uint64{1, 1 + slotMaxDirty*8}}
	if _, err := wide.encode(aead, nonce{}, 0); err == nil {
		t.Error("a span that does not fit was encoded")
	}
}

func TestFrameHeaderIsBoundToItsPlace(t *testing.T) {
	aead := newGCM(make([]byte, 32))
	h := frameHeader{Seq: 1, MetaNonce: 3, DataLength: 10, MetaLength: 20}
	b := make([]byte, frameBytes)
	h.encode(aead, 4, 5000, b)
	if got, err := decodeFrameHeader(aead, 4, 5000, b); err != nil || got != h {
		t.Fatal(got, err)
	}
	if _, err := decodeFrameHeader(aead, 5, 5000, b); err == nil {
		t.Error("valid in another segment")
	}
	if _, err := decodeFrameHeader(aead, 4, 5001, b); err == nil {
		t.Error("valid at another offset")
	}
	h.DataLength = MaxDataBytes + 1
	h.encode(aead, 4, 5000, b)
	if _, err := decodeFrameHeader(aead, 4, 5000, b); err == nil {
		t.Error("a length over the limit")
	}
}

func FuzzDecodeSegmentHeader(f *testing.F) {
	aead := newGCM(make([]byte, 32))
	f.Add(segmentHeader{ID: 3}.encode(aead, nonce{})[:headerBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeSegmentHeader(aead, b)
		if err == nil && !bytes.Equal(h.encode(aead, nonce(b[32:44]))[:12], b[:12]) && b[10] == 0 && b[11] == 0 {
			t.Error("decoded differently from how it is encoded")
		}
	})
}

func FuzzDecodeFrameHeader(f *testing.F) {
	aead := newGCM(make([]byte, 32))
	h, b := frameHeader{Seq: 9, DataLength: 100}, make([]byte, frameBytes)
	h.encode(aead, 1, dataStart, b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeFrameHeader(aead, 1, dataStart, b)
		if err == nil && (h.DataLength > MaxDataBytes || h.MetaLength > MaxMetaBytes) {
			t.Error("lengths over the limits")
		}
	})
}

func FuzzDecodeTailSlot(f *testing.F) {
	aead := newGCM(make([]byte, 32))
	slot := tailSlot{Generation: 2, Dirty: []uint64{1, 9}}
	page, _ := slot.encode(aead, nonce{}, 0)
	f.Add(page[:120])
	f.Fuzz(func(t *testing.T, b []byte) {
		pages := append(append(b, make([]byte, 2*pageBytes)...)[:pageBytes:pageBytes], page...)
		if _, found, torn := newestSlot(aead, 0, pages); !found || torn {
			t.Error("damage to one slot hides the other")
		}
	})
}

func FuzzDecodeSliceHeader(f *testing.F) {
	f.Add(encodeSliceHeader(sliceKey{slice: 1}, make([]byte, 40000)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, length, err := decodeSliceHeader(b); err == nil && (length == 0 || length > sliceBytesMax) {
			t.Error("length over the limit")
		}
	})
}
