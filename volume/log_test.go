package volume

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/defs-fs/defs/chunker"
	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/volume/headpb"
)

// golden reads the worked example of FORMAT.md, "Log" and "Heads": the
// hexadecimal digits below a line "# name", spaces and text after ; ignored.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/golden.txt")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "# "+name+"\n")
	if !ok {
		t.Fatalf("no example %q", name)
	}
	rest, _, _ = strings.Cut(rest, "\n#")
	var digits strings.Builder
	for line := range strings.Lines(rest) {
		line, _, _ = strings.Cut(line, ";")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func count(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

// exampleEntries are the entries of the worked example.
func exampleEntries() []logEntry {
	ino := metastore.NewIno(1, 2)
	key, value := metastore.PublicExtent(ino, metastore.Extent{
		Off: 0, Len: 5, Seq: 42, HasRemote: true,
		Remote: metastore.Remote{Stripe: [16]byte(count(0xa0, 16)), Slice: 3, StripeOff: 128, StoredLen: 9, SliceLen: 9, Off: 4},
	})
	be16 := []byte{0, 1, 0, 0, 0, 0, 0, 2}
	return []logEntry{
		{append([]byte{'o'}, be16...), []byte{}},
		{append(append([]byte{'x'}, be16...), "user.a"...), []byte("v")},
		{append(append([]byte{'d'}, 0, 0, 0, 0, 0, 0, 0, 1), "old"...), nil},
		{key, value},
	}
}

func encodeEntries(entries []logEntry) ([]byte, error) {
	w := &logWriter{}
	for _, e := range entries {
		var err error
		if e.value == nil {
			err = w.delete(e.key)
		} else {
			err = w.put(e.key, e.value)
		}
		if err != nil {
			return nil, err
		}
	}
	return w.buf, nil
}

func decodeEntries(b []byte) (entries []logEntry, err error) {
	err = decodeLog(b, func(e logEntry) error {
		entries = append(entries, e)
		return nil
	})
	return entries, err
}

func equalEntries(a, b []logEntry) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i].key, b[i].key) || (a[i].value == nil) != (b[i].value == nil) || !bytes.Equal(a[i].value, b[i].value) {
			return false
		}
	}
	return true
}

func TestGoldenLog(t *testing.T) {
	want := golden(t, "log slice")
	got, err := encodeEntries(exampleEntries())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("encoded %x, want %x: %v", got, want, err)
	}
	entries, err := decodeEntries(want)
	if err != nil {
		t.Fatal(err)
	}
	if !equalEntries(entries, exampleEntries()) {
		t.Errorf("decoded %x", entries)
	}
	for _, e := range entries {
		if _, err := metastore.ParseTreeKey(e.key); err != nil {
			t.Errorf("key %x: %v", e.key, err)
		}
	}
}

// exampleBody is the head body of the worked example.
func exampleBody(t *testing.T) *headpb.Body {
	t.Helper()
	info := metastore.StripeInfo{
		Purpose: metastore.PurposeLog, K: 1, M: 1, ShardBytes: 16 << 10, UsedBytes: 150,
		Epoch: 1, LockVersion: 1, Complete: true, IndexAcks: 2, IndexKeepers: 2,
		Holders: []metastore.Holder{{Primary: "p0"}, {Primary: "p1"}},
		Roots:   [][32]byte{[32]byte(bytes.Repeat([]byte{0x11}, 32)), [32]byte(bytes.Repeat([]byte{0x22}, 32))},
	}
	b, err := info.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return &headpb.Body{
		Version: 1, Volume: count(0xb0, 16), Name: "home", Slot: 2, Cut: 42, Time: 1_700_000_000_000_000_000,
		Policy: "rs-ratio:1+1", Chain: []byte{1, 2}, Bundles: [][]byte{{3, 4}}, Pool: count(0xc0, 32),
		Segments: []*headpb.Stripe{{
			Id: count(0xa0, 16), Info: b,
			Slices: []*headpb.Slice{{Offset: 0, StoredBytes: 102, PlainBytes: 102}},
		}},
		GenerationNext: 4, CheckpointStripes: 1,
		Contains: []*headpb.Contained{{Slot: 1, Sequence: 7, Time: 1_600_000_000_000_000_000}},
	}
}

func TestGoldenHead(t *testing.T) {
	sequence, hash, body, err := decodeHeadState(golden(t, "head state"))
	if err != nil {
		t.Fatal(err)
	}
	if sequence != 5 || !bytes.Equal(hash, bytes.Repeat([]byte{0xee}, 32)) {
		t.Errorf("sequence %d, hash %x", sequence, hash)
	}
	if want := exampleBody(t); !proto.Equal(body, want) {
		t.Errorf("body %v, want %v", body, want)
	}
	again, err := encodeHeadState(sequence, hash, body)
	if err != nil {
		t.Fatal(err)
	}
	_, _, body, err = decodeHeadState(again)
	if err != nil || !proto.Equal(body, exampleBody(t)) {
		t.Errorf("encoded and decoded again: %v: %v", body, err)
	}
}

func TestGoldenDevices(t *testing.T) {
	list := &headpb.Devices{}
	if err := proto.Unmarshal(golden(t, "devices"), list); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(list, &headpb.Devices{Version: 1, Slots: []uint32{1, 2}}) {
		t.Errorf("decoded %v", list)
	}
}

func TestGoldenDevice(t *testing.T) {
	b, err := os.ReadFile("testdata/device.json")
	if err != nil {
		t.Fatal(err)
	}
	d, err := parseDevice(b)
	if err != nil {
		t.Fatal(err)
	}
	if d.Slot != 1 || d.Name != "home" || d.Policy != "rs-ratio:4+2" || !bytes.Equal(d.Volume, count(0xb0, 16)) || !bytes.Equal(d.LocalKey, count(0, 32)) {
		t.Errorf("device %+v", d)
	}
	if bundle, err := d.newest(); err != nil || bundle.Epoch != 7 {
		t.Errorf("bundle: %v", err)
	}
}

// TestDamagedDeviceIsRefused flips every bit of every key in turn.
func TestDamagedDeviceIsRefused(t *testing.T) {
	b, err := os.ReadFile("testdata/device.json")
	if err != nil {
		t.Fatal(err)
	}
	want, err := parseDevice(b)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		for bit := range 7 {
			damaged := bytes.Clone(b)
			damaged[i] ^= 1 << bit
			if d, err := parseDevice(damaged); err == nil && !reflect.DeepEqual(d, want) {
				t.Fatalf("bit %d of byte %d: taken", bit, i)
			}
		}
	}
}

func TestLogRoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var want []logEntry
		for range rapid.IntRange(1, 20).Draw(t, "entries") {
			e := logEntry{key: rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "key")}
			if rapid.Bool().Draw(t, "put") {
				e.value = append([]byte{}, rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "value")...)
			}
			want = append(want, e)
		}
		b, err := encodeEntries(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeEntries(b)
		if err != nil || !equalEntries(got, want) {
			t.Fatalf("decoded %x, want %x: %v", got, want, err)
		}
	})
}

func TestLogRefusesDamage(t *testing.T) {
	long := append([]byte{1, logDelete}, 0x81, 0x08) // a key of 1,025 bytes
	long = append(long, make([]byte, metastore.KeyBytesMax+1)...)
	for name, b := range map[string][]byte{
		"empty":               {},
		"other version":       {2},
		"unknown entry":       {1, 3, 0},
		"no length":           {1, logPut},
		"key cut short":       {1, logPut, 4, 'a'},
		"no value":            {1, logPut, 1, 'a'},
		"value cut short":     {1, logPut, 1, 'a', 9, 'b'},
		"length without end":  {1, logDelete, 0xff, 0xff},
		"length of 2^64":      {1, logDelete, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01},
		"key above its bound": long,
	} {
		if _, err := decodeEntries(b); !errors.Is(err, errLog) {
			t.Errorf("%s: %v", name, err)
		}
	}
	unpack, err := chunker.NewCompressor(1)
	if err != nil {
		t.Fatal(err)
	}
	asked := false
	open := func([]byte, int) ([]byte, error) { asked = true; return nil, nil }
	for _, s := range []*headpb.Slice{{PlainBytes: logSliceBytesMax + 1}, {StoredBytes: logSliceBytesMax + 1}} {
		if _, err := readLogSlice(nil, s, open, unpack); !errors.Is(err, errLog) || asked {
			t.Errorf("slice %v: %v", s, err)
		}
	}
}
