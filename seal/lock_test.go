package seal

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	"pgregory.net/rapid"

	"github.com/defs-fs/defs/erasure"
)

func mustStripeKeys(t testing.TB, version uint32) *StripeKeys {
	t.Helper()
	k, err := mustBundle(t).StripeKeys(erasure.StripeID{1}, version)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func mustLock(t testing.TB, k *StripeKeys, kind LockKind) Lock {
	t.Helper()
	l, err := k.NewLock(kind)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func testOperation(k *StripeKeys) Operation {
	return Operation{Kind: OpDelete, Blind: k.Blind, Index: 3, Node: "12D3KooWnode", Nonce: []byte("0123456789abcdef"), Expiry: 1_900_000_000, Counter: 9}
}

func mustSign(t testing.TB, key *secp256k1.PrivateKey, kind LockKind, op Operation) []byte {
	t.Helper()
	unlock, err := Sign(key, kind, op)
	if err != nil {
		t.Fatal(err)
	}
	return unlock
}

func TestLockOpensForItsKey(t *testing.T) {
	keys := mustStripeKeys(t, FirstLockVersion)
	rapid.Check(t, func(rt *rapid.T) {
		kind := rapid.SampledFrom([]LockKind{P2PKH, P2PK}).Draw(rt, "kind")
		op := Operation{
			Kind: rapid.SampledFrom([]OperationKind{OpDelete, OpRelock, OpColumns}).Draw(rt, "operation"), Blind: keys.Blind,
			Index: rapid.Uint8().Draw(rt, "index"), Node: rapid.StringN(0, 50, 255).Draw(rt, "node"),
			Nonce: rapid.SliceOfN(rapid.Byte(), 0, 255).Draw(rt, "nonce"), Expiry: rapid.Int64().Draw(rt, "expiry"), Counter: rapid.Uint64().Draw(rt, "counter"),
		}
		unlock := mustSign(t, keys.Lock, kind, op)
		if len(unlock) > UnlockBytesMax {
			rt.Fatalf("unlocking script of %d bytes", len(unlock))
		}
		if err := mustLock(t, keys, kind).Verify(op, unlock); err != nil {
			rt.Fatal(err)
		}
	})
}

func TestLockScriptsAreStandard(t *testing.T) {
	// Key 1, whose public key and address everybody knows.
	one := secp256k1.PrivKeyFromBytes([]byte{1})
	for kind, want := range map[LockKind]string{
		P2PKH: "76a914751e76e8199196d454941c45d1b3a323f1433bd688ac",
		P2PK:  "210279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798ac",
	} {
		script, err := newScript(one.PubKey(), kind)
		if err != nil || hex.EncodeToString(script) != want {
			t.Errorf("kind %d: script %x, want %s: %v", kind, script, want, err)
		}
		if got, err := (Lock{Script: script}).kind(); err != nil || got != kind {
			t.Errorf("kind %d is read as %d: %v", kind, got, err)
		}
	}
	if _, err := newScript(one.PubKey(), 3); !errors.Is(err, ErrInvalid) {
		t.Errorf("kind 3: %v", err)
	}
}

// What was signed for one act is worth nothing for another one.
func TestUnlockIsForOneOperation(t *testing.T) {
	keys := mustStripeKeys(t, FirstLockVersion)
	for _, kind := range []LockKind{P2PKH, P2PK} {
		lock, op := mustLock(t, keys, kind), testOperation(keys)
		unlock := mustSign(t, keys.Lock, kind, op)
		if err := lock.Verify(op, unlock); err != nil {
			t.Fatal(err)
		}
		for name, change := range map[string]func(*Operation){
			"kind":                    func(o *Operation) { o.Kind = OpColumns },
			"stripe":                  func(o *Operation) { o.Blind[31]++ },
			"shard":                   func(o *Operation) { o.Index++ },
			"node":                    func(o *Operation) { o.Node = "12D3KooWother" },
			"nonce":                   func(o *Operation) { o.Nonce = []byte("0123456789abcdeg") },
			"no nonce":                func(o *Operation) { o.Nonce = nil },
			"expiry":                  func(o *Operation) { o.Expiry++ },
			"counter":                 func(o *Operation) { o.Counter++ },
			"bytes moved to the name": func(o *Operation) { o.Node, o.Nonce = o.Node+"0", o.Nonce[1:] },
		} {
			replayed := op
			change(&replayed)
			if err := lock.Verify(replayed, unlock); !errors.Is(err, ErrNotAuthentic) {
				t.Errorf("kind %d, other %s: %v", kind, name, err)
			}
		}
	}
	for name, change := range map[string]func(*Operation){
		"kind 0":     func(o *Operation) { o.Kind = 0 },
		"kind 4":     func(o *Operation) { o.Kind = 4 },
		"long node":  func(o *Operation) { o.Node = string(make([]byte, 256)) },
		"long nonce": func(o *Operation) { o.Nonce = make([]byte, 256) },
	} {
		op := testOperation(keys)
		change(&op)
		if _, err := Sign(keys.Lock, P2PKH, op); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: signed: %v", name, err)
		}
		if err := mustLock(t, keys, P2PKH).Verify(op, nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: verified: %v", name, err)
		}
	}
}

// A stranger's key, sent along with a good signature by it, opens nothing.
func TestKeyFromTheRequestIsNotTrusted(t *testing.T) {
	keys := mustStripeKeys(t, FirstLockVersion)
	stranger, err := secp256k1.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	op := testOperation(keys)
	for _, kind := range []LockKind{P2PKH, P2PK} {
		lock := mustLock(t, keys, kind)
		for _, form := range []LockKind{P2PKH, P2PK} {
			if err := lock.Verify(op, mustSign(t, stranger, form, op)); err == nil {
				t.Errorf("lock of kind %d opened by a stranger's script of kind %d", kind, form)
			}
		}
	}
	// The owner's key shown, the stranger's signature.
	forged := mustSign(t, stranger, P2PK, op)
	forged = append(append(forged, 33), keys.Lock.PubKey().SerializeCompressed()...)
	if err := mustLock(t, keys, P2PKH).Verify(op, forged); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("the owner's key with a stranger's signature: %v", err)
	}
}

func TestSignatureHasOneEncoding(t *testing.T) {
	keys := mustStripeKeys(t, FirstLockVersion)
	op := testOperation(keys)
	lock := mustLock(t, keys, P2PK)
	unlock := mustSign(t, keys.Lock, P2PK, op)
	der := unlock[1:]
	signature, err := ecdsa.ParseDERSignature(der)
	if err != nil {
		t.Fatal(err)
	}
	push := func(der []byte) []byte { return append([]byte{byte(len(der))}, der...) }

	r, s := signature.R(), signature.S()
	s.Negate()
	if err := lock.Verify(op, push(highS(&r, &s))); !errors.Is(err, ErrMalformed) {
		t.Errorf("high S: %v", err)
	}
	// An extra leading zero in R.
	rBytes := int(der[3])
	padded := append([]byte{0x30, der[1] + 1, 0x02, byte(rBytes + 1), 0}, der[4:]...)
	if err := lock.Verify(op, push(padded)); !errors.Is(err, ErrMalformed) {
		t.Errorf("padded R: %v", err)
	}
	for name, script := range map[string][]byte{
		"empty":                nil,
		"push alone":           unlock[:1],
		"push too long":        append([]byte{byte(len(der) + 1)}, der...),
		"hash type appended":   push(append(bytes.Clone(der), 1)),
		"byte appended":        append(bytes.Clone(unlock), 0),
		"OP_PUSHDATA1":         append([]byte{0x4c}, unlock...),
		"zero signature":       push([]byte{0x30, 6, 2, 1, 0, 2, 1, 0}),
		"P2PKH form":           mustSign(t, keys.Lock, P2PKH, op),
		"cut":                  unlock[:len(unlock)-1],
		"two signatures":       append(bytes.Clone(unlock), unlock...),
		"long-form DER length": push(append([]byte{0x30, 0x81}, der[1:]...)),
	} {
		if err := lock.Verify(op, script); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for i := range unlock {
		changed := bytes.Clone(unlock)
		changed[i] ^= 1
		if err := lock.Verify(op, changed); err == nil {
			t.Errorf("byte %d changed: accepted", i)
		}
	}
}

// highS encodes r and s as DER without lowering s.
func highS(r, s *secp256k1.ModNScalar) []byte {
	encode := func(v *secp256k1.ModNScalar) []byte {
		b := v.Bytes()
		out := bytes.TrimLeft(b[:], "\x00")
		if out[0] >= 0x80 {
			out = append([]byte{0}, out...)
		}
		return append([]byte{2, byte(len(out))}, out...)
	}
	body := append(encode(r), encode(s)...)
	return append([]byte{0x30, byte(len(body))}, body...)
}

func TestLockVersions(t *testing.T) {
	v1, v2, v3 := mustStripeKeys(t, 1), mustStripeKeys(t, 2), mustStripeKeys(t, 3)
	for _, kinds := range [][2]LockKind{{P2PKH, P2PKH}, {P2PK, P2PKH}, {P2PKH, P2PK}} {
		first := mustLock(t, v1, kinds[0])
		if err := first.VerifyFirst(v1.Index.Public().(ed25519.PublicKey)); err != nil {
			t.Fatal(err)
		}
		second, err := v1.NextLock(first, v2, kinds[1])
		if err != nil {
			t.Fatal(err)
		}
		if err := first.VerifyNext(v1.Blind, second); err != nil {
			t.Fatal(err)
		}
		third, err := v2.NextLock(second, v3, P2PKH)
		if err != nil {
			t.Fatal(err)
		}
		if err := second.VerifyNext(v1.Blind, third); err != nil {
			t.Fatal(err)
		}

		// The new lock opens for the new key alone.
		op := testOperation(v1)
		if err := second.Verify(op, mustSign(t, v2.Lock, kinds[1], op)); err != nil {
			t.Error(err)
		}
		if err := second.Verify(op, mustSign(t, v1.Lock, kinds[1], op)); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("the old key opens the new lock: %v", err)
		}

		stranger, err := secp256k1.GeneratePrivateKeyFromRand(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		thief := &StripeKeys{Index: v1.Index, Blind: v1.Blind, Lock: stranger}
		stolen, err := thief.NextLock(first, thief, P2PKH)
		if err != nil {
			t.Fatal(err)
		}
		renamed := second
		renamed.Version = 3
		rewritten := second
		rewritten.Script = third.Script
		for name, next := range map[string]Lock{
			"the same again": first, "a version skipped": third, "by a stranger": stolen,
			"version changed": renamed, "script changed": rewritten,
			"unsigned": {Version: 2, Script: second.Script}, "no script": {Version: 2, PrevSig: second.PrevSig},
		} {
			if err := first.VerifyNext(v1.Blind, next); err == nil {
				t.Errorf("next lock: %s: accepted", name)
			}
		}
		if err := second.VerifyNext(v1.Blind, first); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("an old lock came back: %v", err)
		}
		if err := first.VerifyNext(erasure.BlindID{}, second); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("the lock of another stripe: %v", err)
		}
	}
}

func TestFirstLockIsTheIndexKeys(t *testing.T) {
	keys := mustStripeKeys(t, FirstLockVersion)
	other, err := mustBundle(t).StripeKeys(erasure.StripeID{2}, FirstLockVersion)
	if err != nil {
		t.Fatal(err)
	}
	index := keys.Index.Public().(ed25519.PublicKey)
	lock := mustLock(t, keys, P2PKH)
	if err := mustLock(t, other, P2PKH).VerifyFirst(index); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("lock of another stripe: %v", err)
	}
	changed := lock
	changed.Script = mustLock(t, other, P2PKH).Script
	if err := changed.VerifyFirst(index); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("another script: %v", err)
	}
	changed = lock
	changed.Version = 0
	if err := changed.VerifyFirst(index); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("version 0: %v", err)
	}
	notAPoint := lock
	notAPoint.Script = append(append([]byte{33}, make([]byte, 33)...), opCheckSig)
	if err := notAPoint.VerifyFirst(index); !errors.Is(err, ErrMalformed) {
		t.Errorf("P2PK without a key: %v", err)
	}
	if err := lock.VerifyFirst(index[:31]); !errors.Is(err, ErrMalformed) {
		t.Errorf("index key of 31 bytes: %v", err)
	}
}

func FuzzLockVerify(f *testing.F) {
	keys := mustStripeKeys(f, FirstLockVersion)
	op := testOperation(keys)
	for _, kind := range []LockKind{P2PKH, P2PK} {
		lock := mustLock(f, keys, kind)
		f.Add(lock.Script, mustSign(f, keys.Lock, kind, op), lock.PrevSig)
	}
	f.Add([]byte{}, []byte{}, []byte{})
	own := mustLock(f, keys, P2PKH)
	good := mustSign(f, keys.Lock, P2PKH, op)
	f.Fuzz(func(t *testing.T, script, unlock, prevSig []byte) {
		lock := Lock{Version: 1, Script: script, PrevSig: prevSig}
		_ = lock.Verify(op, unlock)
		_ = lock.VerifyFirst(keys.Index.Public().(ed25519.PublicKey))
		if err := own.Verify(op, unlock); err == nil && !bytes.Equal(unlock, good) {
			t.Fatal("a second encoding opened the lock")
		}
		if err := own.VerifyNext(keys.Blind, Lock{Version: 2, Script: script, PrevSig: prevSig}); err == nil {
			t.Fatal("a forged lock was accepted")
		}
	})
}

func BenchmarkLockSign(b *testing.B) {
	keys := mustStripeKeys(b, FirstLockVersion)
	op := testOperation(keys)
	for b.Loop() {
		mustSign(b, keys.Lock, P2PKH, op)
	}
}

func BenchmarkLockVerify(b *testing.B) {
	keys := mustStripeKeys(b, FirstLockVersion)
	op := testOperation(keys)
	lock, unlock := mustLock(b, keys, P2PKH), mustSign(b, keys.Lock, P2PKH, op)
	for b.Loop() {
		if err := lock.Verify(op, unlock); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStripeKeys(b *testing.B) {
	bundle := mustBundle(b)
	for b.Loop() {
		if _, err := bundle.StripeKeys(erasure.StripeID{1}, 1); err != nil {
			b.Fatal(err)
		}
	}
}
