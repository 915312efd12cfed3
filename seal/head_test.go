package seal

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"testing"

	"pgregory.net/rapid"
)

func TestHeadRoundTrips(t *testing.T) {
	key := mustRecovery(t, Root{1}).HeadKey(2)
	rapid.Check(t, func(rt *rapid.T) {
		seq := rapid.Uint64().Draw(rt, "seq")
		body := rapid.SliceOfN(rapid.Byte(), 0, 3000).Draw(rt, "body")
		sealed, err := key.SealHead(seq, body)
		if err != nil {
			rt.Fatal(err)
		}
		// A machine restored from an image may use a number again.
		if again, err := key.SealHead(seq, body); err != nil || bytes.Equal(again[1:65], sealed[1:65]) {
			rt.Fatalf("one key for two heads: %v", err)
		}
		got, err := key.OpenHead(seq, sealed)
		if err != nil || !bytes.Equal(got, body) {
			rt.Fatalf("other bytes came back: %v", err)
		}
		if _, err := key.OpenHead(seq+1, sealed); !errors.Is(err, ErrNotAuthentic) {
			rt.Fatalf("another number: %v", err)
		}
	})
}

func TestHeadIsForOneSlot(t *testing.T) {
	recovery := mustRecovery(t, Root{1})
	a, b := recovery.HeadKey(1), recovery.HeadKey(2)
	sealed, err := a.SealHead(1, []byte("body"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.OpenHead(1, sealed); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another slot: %v", err)
	}
	mixed := HeadKey{Sign: b.Sign, Seal: a.Seal}
	if _, err := mixed.OpenHead(1, sealed); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another address: %v", err)
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		if _, err := a.OpenHead(1, changed); err == nil {
			t.Errorf("byte %d changed: accepted", i)
		}
	}
}

func TestHeadBounds(t *testing.T) {
	key := mustRecovery(t, Root{1}).HeadKey(1)
	largest := make([]byte, SealedHeadBytesMax-recordOverheadBytes)
	sealed, err := key.SealHead(1, largest)
	if err != nil || len(sealed) != SealedHeadBytesMax {
		t.Fatalf("largest head: %d bytes: %v", len(sealed), err)
	}
	if _, err := key.OpenHead(1, sealed); err != nil {
		t.Error(err)
	}
	if _, err := key.SealHead(1, append(largest, 0)); !errors.Is(err, ErrInvalid) {
		t.Errorf("one byte more: %v", err)
	}
	if _, err := key.OpenHead(1, append(sealed, 0)); !errors.Is(err, ErrMalformed) {
		t.Errorf("one byte more, sealed: %v", err)
	}
}

func TestHeadKeyRoundTrips(t *testing.T) {
	for slot := range uint16(50) {
		key := mustRecovery(t, Root{1}).HeadKey(slot)
		key.Seal[0] = 0
		got, err := UnmarshalHeadKey(key.Marshal())
		if err != nil || !got.Sign.Equal(key.Sign) || got.Seal != key.Seal {
			t.Fatalf("slot %d: another key came back: %v", slot, err)
		}
	}
}

func FuzzUnmarshalHeadKey(f *testing.F) {
	f.Add(mustRecovery(f, Root{1}).HeadKey(1).Marshal())
	f.Fuzz(func(t *testing.T, data []byte) {
		if key, err := UnmarshalHeadKey(data); err == nil && !bytes.Equal(key.Marshal(), data) {
			t.Fatal("marshals to other bytes")
		}
	})
}

func TestSignaturesAreForOneDomain(t *testing.T) {
	keys := mustStripeKeys(t, 1)
	index := keys.Index.Public().(ed25519.PublicKey)
	message := []byte("message")
	domains := []domain{domainLock, domainDevice}
	for _, signed := range domains {
		signature := signed.sign(keys.Index, message)
		for _, checked := range domains {
			err := checked.verify(index, message, signature)
			if (err == nil) != (signed == checked) {
				t.Errorf("signed for %q, checked for %q: %v", signed, checked, err)
			}
			if signed != checked && bytes.HasPrefix([]byte(checked), []byte(signed)) {
				t.Errorf("%q is a prefix of %q", signed, checked)
			}
		}
		if err := signed.verify(index, []byte("messagf"), signature); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("another message: %v", err)
		}
		if err := signed.verify(index[1:], message, signature); !errors.Is(err, ErrMalformed) {
			t.Errorf("key of 31 bytes: %v", err)
		}
		if err := signed.verify(index, message, signature[1:]); !errors.Is(err, ErrMalformed) {
			t.Errorf("signature of 63 bytes: %v", err)
		}
	}
}
