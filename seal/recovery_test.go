package seal

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/defs-fs/defs/erasure"
)

func mustRecovery(t testing.TB, root Root) *Recovery {
	t.Helper()
	r, err := root.Recovery()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRecoveryIsRepeatable(t *testing.T) {
	a, b, c := mustRecovery(t, Root{1}), mustRecovery(t, Root{1}), mustRecovery(t, Root{2})
	if !bytes.Equal(a.PublicKey(), b.PublicKey()) || !a.Authority().Equal(b.Authority()) || !a.Peer().Equal(b.Peer()) || a.HeadKey(3).Address() != b.HeadKey(3).Address() {
		t.Error("the same words give other keys")
	}
	if bytes.Equal(a.PublicKey(), c.PublicKey()) || a.Authority().Equal(c.Authority()) || a.HeadKey(3).Address() == c.HeadKey(3).Address() {
		t.Error("other words give the same keys")
	}
	if a.Authority().Equal(a.Peer()) || a.HeadKey(0).Address() == a.HeadKey(1).Address() || a.HeadKey(0).Seal == a.HeadKey(1).Seal || a.HeadKey(1).Sign.Equal(a.HeadKey(256).Sign) {
		t.Error("keys for different purposes are the same")
	}
}

// A secret comes back with every byte it had, leading zeros included.
func TestWrapKeepsEveryByte(t *testing.T) {
	recovery := mustRecovery(t, Root{1})
	device, err := NewWrapKey()
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		secret := rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(rt, "secret")
		clear(secret[:rapid.IntRange(0, len(secret)).Draw(rt, "zeros")])
		for _, key := range []*WrapKey{recovery.WrapKey, device} {
			wrapped, err := WrapTo(key.PublicKey(), "epoch", secret)
			if err != nil {
				rt.Fatal(err)
			}
			if len(wrapped) != len(secret)+WrapOverheadBytes {
				rt.Fatalf("%d bytes wrapped to %d", len(secret), len(wrapped))
			}
			got, err := key.Unwrap("epoch", wrapped)
			if err != nil || !bytes.Equal(got, secret) {
				rt.Fatalf("%x came back as %x: %v", secret, got, err)
			}
		}
	})
}

func TestUnwrapRefuses(t *testing.T) {
	key, other := mustRecovery(t, Root{1}), mustRecovery(t, Root{2})
	wrapped, err := WrapTo(key.PublicKey(), "epoch", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Unwrap("epoch", wrapped); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another key: %v", err)
	}
	if _, err := key.Unwrap("invite", wrapped); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another purpose: %v", err)
	}
	for i := range wrapped {
		changed := bytes.Clone(wrapped)
		changed[i] ^= 1
		if _, err := key.Unwrap("epoch", changed); err == nil {
			t.Errorf("byte %d changed: accepted", i)
		}
		if _, err := key.Unwrap("epoch", wrapped[:i]); err == nil {
			t.Errorf("cut to %d bytes: accepted", i)
		}
	}
	for _, pub := range [][]byte{nil, make([]byte, 31), make([]byte, 33), make([]byte, 32)} {
		if _, err := WrapTo(pub, "epoch", []byte("secret")); err == nil {
			t.Errorf("wrapped to a key of %d zero bytes", len(pub))
		}
	}
}

func TestWrapKeyRoundTrips(t *testing.T) {
	key, err := NewWrapKey()
	if err != nil {
		t.Fatal(err)
	}
	private, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseWrapKey(private)
	if err != nil || !bytes.Equal(again.PublicKey(), key.PublicKey()) {
		t.Fatalf("another key came back: %v", err)
	}
	if _, err := ParseWrapKey(private[:31]); !errors.Is(err, ErrMalformed) {
		t.Errorf("31 bytes: %v", err)
	}
}

func TestBundleRoundTrips(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		random := bytes.NewReader(rapid.SliceOfN(rapid.Byte(), 128, 128).Draw(rt, "random"))
		b, err := NewBundle(rapid.Uint32Min(1).Draw(rt, "epoch"), random)
		if err != nil {
			rt.Fatal(err)
		}
		got, err := UnmarshalBundle(b.Marshal())
		if err != nil || *got != *b {
			rt.Fatalf("%+v came back as %+v: %v", b, got, err)
		}
	})
	if _, err := NewBundle(0, rand.Reader); err == nil {
		t.Error("epoch 0 accepted")
	}
	if _, err := NewBundle(1, bytes.NewReader(make([]byte, 127))); err == nil {
		t.Error("a bundle was drawn from too little randomness")
	}
}

func FuzzUnmarshalBundle(f *testing.F) {
	b, err := NewBundle(1, rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b.Marshal())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		if b, err := UnmarshalBundle(data); err == nil && !bytes.Equal(b.Marshal(), data) {
			t.Fatal("marshals to other bytes")
		}
	})
}

func TestStripeKeys(t *testing.T) {
	bundle := mustBundle(t)
	keys := func(id byte, version uint32) *StripeKeys {
		k, err := bundle.StripeKeys(erasure.StripeID{id}, version)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	a, again, relocked, other := keys(1, 1), keys(1, 1), keys(1, 2), keys(2, 1)
	if !a.Index.Equal(again.Index) || a.Blind != again.Blind || a.Lock.Key != again.Lock.Key {
		t.Error("the same stripe gives other keys")
	}
	if !a.Index.Equal(relocked.Index) || a.Blind != relocked.Blind {
		t.Error("a relocked stripe is no longer found")
	}
	if a.Lock.Key == relocked.Lock.Key {
		t.Error("a relocked stripe keeps its old key")
	}
	if a.Blind == other.Blind || a.Lock.Key == other.Lock.Key {
		t.Error("two stripes share a key")
	}
	if a.Blind != BlindOf(a.Index.Public().(ed25519.PublicKey)) {
		t.Error("blind id is not that of the index key")
	}
	if bytes.Contains(a.Blind[:], []byte{1, 0, 0, 0, 0, 0}) {
		t.Error("blind id shows the stripe id")
	}
}

func mustBundle(t testing.TB) *Bundle {
	t.Helper()
	random := make([]byte, 128)
	for i := range random {
		random[i] = byte(i)
	}
	b, err := NewBundle(7, bytes.NewReader(random))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestLocalKeys(t *testing.T) {
	key, err := NewLocalKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	derived := map[LocalKey]bool{key: true}
	for _, purpose := range []string{"segment", "segments"} {
		for _, id := range []string{"", "\x00", "\x00\x00", "1", "s"} {
			derived[key.Derive(purpose, []byte(id))] = true
		}
	}
	if len(derived) != 11 {
		t.Errorf("10 derived keys are %d different ones", len(derived)-1)
	}
	if key.Derive("segment", []byte("1")) != key.Derive("segment", []byte("1")) {
		t.Error("derived keys are not repeatable")
	}
	a := key.AEAD()
	if a.NonceSize() != 12 || a.Overhead() != 16 {
		t.Errorf("nonce of %d, tag of %d bytes", a.NonceSize(), a.Overhead())
	}

	body := []byte{0, 0, 0, 42}
	sealed, err := key.Seal("file key", body)
	if err != nil {
		t.Fatal(err)
	}
	got, err := key.Open("file key", sealed)
	if err != nil || !bytes.Equal(got, body) {
		t.Fatalf("%x came back as %x: %v", body, got, err)
	}
	if again, err := key.Seal("file key", body); err != nil || bytes.Equal(again, sealed) {
		t.Errorf("sealed twice the same: %v", err)
	}
	if _, err := key.Open("other", sealed); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another purpose: %v", err)
	}
	if _, err := key.Derive("x", nil).Open("file key", sealed); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another key: %v", err)
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		if _, err := key.Open("file key", changed); err == nil {
			t.Errorf("byte %d changed: accepted", i)
		}
		if _, err := key.Open("file key", sealed[:i]); err == nil {
			t.Errorf("cut to %d bytes: accepted", i)
		}
	}
}

func FuzzOpenRecord(f *testing.F) {
	var root Root
	ascending(root[:], 0)
	recovery := mustRecovery(f, root)
	good, err := hex.DecodeString(exampleSealedHead)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{1})
	key := recovery.HeadKey(1)
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := key.OpenHead(5, data); err == nil && !bytes.Equal(data, good) {
			t.Fatal("a forged head was opened")
		}
		if _, err := LocalKey(key.Seal).Open("p", data); err == nil {
			t.Fatal("a forged record was opened")
		}
		if _, err := recovery.Unwrap("p", data); err == nil {
			t.Fatal("a forged secret was unwrapped")
		}
	})
}

// FuzzUnwrap opens wrapped secrets that nobody has wrapped, and reads wrap keys.
func FuzzUnwrap(f *testing.F) {
	words, err := NewWords()
	if err != nil {
		f.Fatal(err)
	}
	root, err := RootFromWords(words)
	if err != nil {
		f.Fatal(err)
	}
	r, err := root.Recovery()
	if err != nil {
		f.Fatal(err)
	}
	wrapped, err := WrapTo(r.PublicKey(), "purpose", []byte("secret"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wrapped)
	f.Add(make([]byte, 32))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if secret, err := r.Unwrap("purpose", b); err == nil && !bytes.Equal(b, wrapped) {
			t.Fatalf("%x opens to %x", b, secret)
		}
		if k, err := ParseWrapKey(b); err == nil {
			kept, err := k.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			again, err := ParseWrapKey(kept)
			if err != nil || !bytes.Equal(again.PublicKey(), k.PublicKey()) {
				t.Fatalf("%x became %x: %v", b, kept, err)
			}
		}
	})
}
