package metastore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// TestNamesOfTheLog refuses keys whose entry would lead out of its directory.
func TestNamesOfTheLog(t *testing.T) {
	for _, name := range []string{".", "..", "/", "a/b", "../x", "a\x00b"} {
		if _, err := ParseTreeKey(append([]byte("d\x00\x00\x00\x00\x00\x00\x00\x01"), name...)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestInodeRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Make[Inode]().Filter(func(n Inode) bool {
			return len(n.Target) <= TargetBytesMax && len(n.Policy) <= NameBytesMax
		}).Draw(t, "inode")
		b, err := n.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var got Inode
		if err := got.UnmarshalBinary(b); err != nil || got != n {
			t.Fatalf("got %+v, %v, want %+v", got, err, n)
		}
	})
}

func TestInodeBounds(t *testing.T) {
	for _, n := range []Inode{{Target: strings.Repeat("x", TargetBytesMax+1)}, {Policy: strings.Repeat("x", NameBytesMax+1)}} {
		if _, err := n.MarshalBinary(); err == nil {
			t.Errorf("no error for a target of %d bytes, a policy of %d", len(n.Target), len(n.Policy))
		}
	}
}

func TestExtentRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 1000 {
		e := randomExtent(rng, rng.Uint64())
		got, err := decodeExtent(e.Off, encodeExtent(e))
		if err != nil || got != e {
			t.Fatalf("got %+v, %v, want %+v", got, err, e)
		}
	}
}

func TestDirentRoundTrip(t *testing.T) {
	e := Dirent{Ino: NewIno(7, 99), Type: 4, Cookie: 12, Name: "a name"}
	if got, err := decodeDirent(e.Name, encodeDirent(e)); err != nil || got != e {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := decodeListing(e.Cookie, encodeListing(e)); err != nil || got != e {
		t.Errorf("got %+v, %v", got, err)
	}
	if e.Ino.Slot() != 7 || e.Ino != 7<<48|99 {
		t.Errorf("inode number %#x", uint64(e.Ino))
	}
}

func testStripe() StripeInfo {
	return StripeInfo{
		Purpose: PurposeContent, K: 2, M: 1, ShardBytes: 1 << 20, UsedBytes: 1 << 21, Epoch: 3, LockVersion: 1,
		Mirrored: true, Complete: true, Condemned: true, IndexAcks: 2, IndexKeepers: 3, CreatedSeq: 77,
		Holders: []Holder{{"node-a", "node-b"}, {"node-c", ""}, {"", ""}},
		Roots:   [][32]byte{{1}, {2}, {3}},
	}
}

func TestStripeRoundTrip(t *testing.T) {
	for _, clear := range []func(*StripeInfo){
		func(*StripeInfo) {},
		func(s *StripeInfo) { s.Mirrored = false },
		func(s *StripeInfo) { s.Complete = false },
		func(s *StripeInfo) { s.Condemned = false },
		func(s *StripeInfo) { s.Purpose = PurposeLog },
		func(s *StripeInfo) {
			s.K, s.M, s.Holders, s.Roots = 100, 100, make([]Holder, 200), make([][32]byte, 200)
		},
	} {
		s := testStripe()
		clear(&s)
		b, err := s.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var got StripeInfo
		if err := got.UnmarshalBinary(b); err != nil || !reflect.DeepEqual(got, s) {
			t.Errorf("got %+v, %v, want %+v", got, err, s)
		}
	}
	if n := testStripe().Placed(); n != 2 {
		t.Errorf("placed %d, want 2", n)
	}
}

func TestStripeBounds(t *testing.T) {
	for name, spoil := range map[string]func(*StripeInfo){
		"k 0":         func(s *StripeInfo) { s.K = 0 },
		"k 101":       func(s *StripeInfo) { s.K = 101 },
		"m 101":       func(s *StripeInfo) { s.M = 101 },
		"holders":     func(s *StripeInfo) { s.Holders = s.Holders[1:] },
		"roots":       func(s *StripeInfo) { s.Roots = s.Roots[1:] },
		"acks":        func(s *StripeInfo) { s.IndexAcks = 256 },
		"long holder": func(s *StripeInfo) { s.Holders[0].Primary = strings.Repeat("x", HolderBytesMax+1) },
	} {
		s := testStripe()
		spoil(&s)
		if _, err := s.MarshalBinary(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// Every strict prefix of a value is refused, and so is a byte too many and
// another version.
func TestDecodersRefuseDamage(t *testing.T) {
	inode, _ := Inode{Target: "target", Policy: "auto"}.MarshalBinary()
	stripe, _ := testStripe().MarshalBinary()
	rng := rand.New(rand.NewPCG(2, 2))
	var extent Extent
	for !extent.HasRemote || !extent.HasLocal() {
		extent = randomExtent(rng, 0)
	}
	txn := newTxn(reader{})
	txn.Put([]byte("gname"), []byte("value"))
	txn.Delete(inodeKey(2))
	txn.SetGeneration(4)
	for name, c := range map[string]struct {
		value  []byte
		decode func([]byte) error
	}{
		"inode":  {inode, new(Inode).UnmarshalBinary},
		"dirent": {encodeDirent(Dirent{Name: "n"}), func(b []byte) error { _, err := decodeDirent("n", b); return err }},
		"extent": {encodeExtent(extent), func(b []byte) error { _, err := decodeExtent(0, b); return err }},
		"stripe": {stripe, new(StripeInfo).UnmarshalBinary},
		"dedup":  {encodeDedup(extent.Remote), func(b []byte) error { _, err := decodeDedup(b); return err }},
		"record": {txn.Record(), func(b []byte) error {
			return decodeRecord(b, func(uint64, mutation) error { return nil })
		}},
	} {
		if err := c.decode(c.value); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		bad := [][]byte{append(bytes.Clone(c.value), 0), append([]byte{9}, c.value[1:]...)}
		for n := range c.value {
			bad = append(bad, c.value[:n])
		}
		for _, b := range bad {
			if err := c.decode(b); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s of %d bytes (whole: %d): got %v", name, len(b), len(c.value), err)
			}
		}
	}
}

func TestRecordRefusesForeignKeys(t *testing.T) {
	encode := func(m mutation) []byte { return appendRecord(nil, 1, []mutation{m}) }
	for name, m := range map[string]mutation{
		"empty key":   {op: opPut},
		"long key":    {op: opPut, key: bytes.Repeat([]byte{'i'}, KeyBytesMax+1)},
		"long value":  {op: opPut, key: []byte("ga"), value: make([]byte, ValueBytesMax+1)},
		"unknown key": {op: opPut, key: []byte("zebra")},
		"position":    {op: opPut, key: keyApplied},
		"schema":      {op: opDelete, key: keySchema},
		"generation":  {op: opSetGeneration, generation: 1<<64 - 1},
		"unknown op":  {op: 9, key: []byte("ga")},
	} {
		if err := decodeRecord(encode(m), func(uint64, mutation) error { return nil }); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: got %v", name, err)
		}
		txn := newTxn(reader{})
		if txn.add(m); txn.Err() == nil {
			t.Errorf("%s: the transaction took it", name)
		}
	}
	// A count beyond the bytes ends early, whatever it claims.
	huge := binary.BigEndian.AppendUint32(append([]byte{recordVersion}, make([]byte, 8)...), 1<<32-1)
	if err := decodeRecord(huge, func(uint64, mutation) error { return nil }); !errors.Is(err, ErrCorrupt) {
		t.Errorf("huge count: got %v", err)
	}
}

func TestSuccessor(t *testing.T) {
	for in, want := range map[string]string{"a": "b", "a\xff": "b", "\xff\xff": "", "ab\xff\xff": "ac"} {
		if got := string(successor([]byte(in))); got != want {
			t.Errorf("successor of %q is %q, want %q", in, got, want)
		}
	}
}

func FuzzInode(f *testing.F) {
	b, _ := Inode{Mode: 1, Target: "t", Policy: "p"}.MarshalBinary()
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var n Inode
		if n.UnmarshalBinary(b) == nil {
			if again, err := n.MarshalBinary(); err != nil || !bytes.Equal(again, b) {
				t.Errorf("%x decodes but encodes to %x, %v", b, again, err)
			}
		}
	})
}

func FuzzStripe(f *testing.F) {
	b, _ := testStripe().MarshalBinary()
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var s StripeInfo
		if s.UnmarshalBinary(b) == nil {
			if again, err := s.MarshalBinary(); err != nil || !bytes.Equal(again, b) {
				t.Errorf("%x decodes but encodes to %x, %v", b, again, err)
			}
		}
	})
}

func FuzzExtent(f *testing.F) {
	rng := rand.New(rand.NewPCG(3, 3))
	for range 6 {
		f.Add(encodeExtent(randomExtent(rng, 0)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeExtent(8, b)
		if err != nil {
			return
		}
		// A zero local length marks a missing local place, so it cannot decode.
		if again := encodeExtent(e); !bytes.Equal(again, b) {
			t.Errorf("%x decodes but encodes to %x", b, again)
		}
	})
}

func FuzzSmallValues(f *testing.F) {
	f.Add("name", encodeDirent(Dirent{Ino: 5, Type: 8, Cookie: 9, Name: "name"}))
	f.Add("name", encodeListing(Dirent{Ino: 5, Type: 8, Cookie: 9, Name: "name"}))
	f.Add("name", encodeDedup(Remote{Slice: 1}))
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		if e, err := decodeDirent(name, b); err == nil && !bytes.Equal(encodeDirent(e), b) {
			t.Errorf("entry %x encodes differently", b)
		}
		if e, err := decodeListing(1, b); err == nil && !bytes.Equal(encodeListing(e), b) {
			t.Errorf("listing %x encodes differently", b)
		}
		if r, err := decodeDedup(b); err == nil && !bytes.Equal(encodeDedup(r), b) {
			t.Errorf("dedup entry %x encodes differently", b)
		}
	})
}

func FuzzRecord(f *testing.F) {
	rng := rand.New(rand.NewPCG(4, 4))
	txn := newTxn(reader{})
	txn.PutInode(3, Inode{Size: rng.Uint64()})
	txn.DeleteInode(4)
	txn.SetGeneration(2)
	txn.DropTouched(1)
	f.Add(txn.Record())
	f.Fuzz(func(t *testing.T, b []byte) {
		var mutations []mutation
		var time uint64
		err := decodeRecord(b, func(lamport uint64, m mutation) error {
			mutations, time = append(mutations, m), lamport
			return nil
		})
		if err == nil && len(mutations) > 0 {
			if again := appendRecord(nil, time, mutations); !bytes.Equal(again, b) {
				t.Errorf("%x decodes but encodes to %x", b, again)
			}
		}
	})
}

func FuzzTreeKey(f *testing.F) {
	for _, key := range [][]byte{inodeKey(1), direntKey(1, "n"), extentKey(1, 2), xattrKey(1, "u"), orphanKey(4), stripeKey([16]byte{}), volumeKey("v")} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key []byte) {
		p, err := ParseTreeKey(key)
		if err != nil {
			return
		}
		var again []byte
		switch p.Kind {
		case prefixInode:
			again = inodeKey(p.Ino)
		case prefixOrphan:
			again = orphanKey(p.Ino)
		case prefixExtent:
			again = extentKey(p.Ino, p.Off)
		case prefixDirent:
			again = direntKey(p.Ino, p.Name)
		case prefixXattr:
			again = xattrKey(p.Ino, p.Name)
		case prefixStripe:
			again = stripeKey(p.Stripe)
		case prefixVolume:
			again = volumeKey(p.Name)
		}
		if !bytes.Equal(again, key) {
			t.Errorf("key %x parses as %+v", key, p)
		}
	})
}
