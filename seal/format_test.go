package seal

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/defs-fs/defs/erasure"
)

// The worked example of FORMAT.md, "Seal": everything follows from the root 00
// 01 … 1f, the bundle keys 00 01 … 7f and what is written here.
const (
	exampleWords      = "abandon amount liar amount expire adjust cage candy arch gather drum bullet absurd math era live bid rhythm alien crouch range attend journey unaware"
	exampleRecovery   = "b95a826e46c91a9ac6074766c0ce6b8ccf074f231a5c1c9c00dd99c336dadf19"
	exampleAuthority  = "4afa2d920fe5863f4b3ecbb3f9c5c324ae87a267b772febd7b8e66c76bc665dc"
	examplePeer       = "b26e6ecb12463a0a90ed27b51f14098699fe281c0acc62dd0a6b48b95009b630"
	exampleHeadKey    = "0110a7e549b7b9fbdc2ca2eefa9fcf1f6f6cbbb361beba0adf200b6daf0e4106fe4de077e4dc91565b08e5b2c88642b73952fbd56abc0b896336cf527f7da7db1f"
	exampleAddress    = "7c29e7eb9054396f3567fa204231b22ab781f85f8a6f3fdfb733792df5038330"
	exampleWrapped    = "018043e589c734248f53e93af3050ba238a293ef4d772f6517557d144a1507d0756361f37b083df5dbebc52bdacb7bb62ad554badf"
	exampleSealedHead = "01fb98dfa1350ebc4721de3e1254d135ad3e02ae62efb165818574106a5563cb7f3a1b4fb3561c8377e097faac6859a0d356f850e11a9831de6e123da3f183b9e1946f6473bcaaa97383adef519818016da59718d0"
	exampleIndex      = "69135688f714c68e04b6798a21bbad75b193ccefdf2bc68bca8187f2fb6e4655"
	exampleBlind      = "1b1692ad72091365ff7e9ae2a10b563d8a3f54ba8c1730eb2f60b27293341556"
	exampleLockKey    = "03a18d329832bb48ed243812ebfef0bedef1b40c75f02d034165fd688428749e41"
	exampleScript     = "76a914022032d960d48076c312c31eeee166489b99820688ac"
	exampleLockSig    = "4b70ee06bfc8fc586714a6490259d0cf83da412f09bee066268c9e1f4ac0d5d9d8b1e2e5828edb637d048de0ef7ba07b7f36174db7552ce972e9cb95e80da90c"
	exampleDigest     = "6bf190549b1c6e3a90d718284abbf471a7d3a436755bfa256247bdfb63946f31"
	exampleUnlock     = "473045022100c4a9773c020657b34d73592a07ba7cb41ff3997e9664ae7b6ef8911f4b6c518402205abc0a408a34ee3ebaa69eb45e2f7f375f73cefb1c2bd0b0e12c45fd0f7205382103a18d329832bb48ed243812ebfef0bedef1b40c75f02d034165fd688428749e41"
	exampleSlice      = "acc950e68ef04b78036f44ca26cc43aa799137c6eb81a60b76e8003aa96bad16a4698e4cd392dc98504587afc15b951a00b22ca46f"
	exampleChain      = "01000000010100000007000169135688f714c68e04b6798a21bbad75b193ccefdf2bc68bca8187f2fb6e4655b95a826e46c91a9ac6074766c0ce6b8ccf074f231a5c1c9c00dd99c336dadf19016136e2e9d767812ebb9090390335b489d55286c16840cb96ee27e5d5713a350eb5ce36b8cc9155d1810481838f9647ada7ee156bc1274f5be5b97682103491ab3ec71aca19f6b9d37bb28e0ed97e4b136e5571fc9a84632c520cab2fe835c42c04"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func expect(t *testing.T, what string, got []byte, want string) {
	t.Helper()
	if hex.EncodeToString(got) != want {
		t.Errorf("%s is %x, want %s", what, got, want)
	}
}

// ascending fills b with first, first+1, …
func ascending(b []byte, first byte) {
	for i := range b {
		b[i] = first + byte(i)
	}
}

func TestFormatExampleKeys(t *testing.T) {
	var want Root
	ascending(want[:], 0)
	root, err := RootFromWords(exampleWords)
	if err != nil || root != want {
		t.Fatalf("root %x: %v", root, err)
	}
	recovery := mustRecovery(t, root)
	expect(t, "recovery key", recovery.PublicKey(), exampleRecovery)
	expect(t, "authority", recovery.Authority().Public().(ed25519.PublicKey), exampleAuthority)
	expect(t, "peer", recovery.Peer().Public().(ed25519.PublicKey), examplePeer)

	secret, err := recovery.Unwrap("defs example", unhex(t, exampleWrapped))
	if err != nil || !bytes.Equal(secret, []byte{0, 0, 1, 2}) {
		t.Errorf("unwrapped %x: %v", secret, err)
	}

	key := recovery.HeadKey(1)
	expect(t, "head key of slot 1", key.Marshal(), exampleHeadKey)
	address := key.Address()
	expect(t, "its address", address[:], exampleAddress)
	sealed := unhex(t, exampleSealedHead)
	body, err := key.OpenHead(5, sealed)
	if err != nil || string(body) != "body" {
		t.Errorf("opened head %q: %v", body, err)
	}
	chain, err := UnmarshalChain(unhex(t, exampleChain))
	if err != nil {
		t.Fatal(err)
	}
	devices, err := chain.Verify(unhex(t, exampleAuthority))
	if err != nil || len(devices) != 1 {
		t.Fatalf("%d devices: %v", len(devices), err)
	}
	if d := devices[0]; d.Slot != 1 || d.Name != "a" || fmt.Sprintf("%x", d.Sign) != exampleIndex || fmt.Sprintf("%x", d.Wrap) != exampleRecovery || chain.Epoch() != 7 {
		t.Errorf("device %+v", d)
	}
}

func TestFormatExampleStripe(t *testing.T) {
	marshalled := make([]byte, BundleBytes)
	copy(marshalled, []byte{1, 0, 0, 0, 7})
	ascending(marshalled[5:], 0)
	bundle, err := UnmarshalBundle(marshalled)
	if err != nil {
		t.Fatal(err)
	}
	var id erasure.StripeID
	ascending(id[:], 0xa0)
	keys, err := bundle.StripeKeys(id, FirstLockVersion)
	if err != nil {
		t.Fatal(err)
	}
	index := keys.Index.Public().(ed25519.PublicKey)
	expect(t, "index key", index, exampleIndex)
	expect(t, "blind id", keys.Blind[:], exampleBlind)
	expect(t, "lock key", keys.Lock.PubKey().SerializeCompressed(), exampleLockKey)

	lock := Lock{Version: FirstLockVersion, Script: unhex(t, exampleScript), PrevSig: unhex(t, exampleLockSig)}
	if err := lock.VerifyFirst(index); err != nil {
		t.Error(err)
	}
	op := Operation{Kind: OpDelete, Blind: keys.Blind, Index: 3, Node: "node", Nonce: []byte{1, 2, 3, 4}, Expiry: 1_900_000_000, Counter: 9}
	digest, err := op.Digest()
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "digest", digest[:], exampleDigest)
	if err := lock.Verify(op, unhex(t, exampleUnlock)); err != nil {
		t.Error(err)
	}
	expect(t, "unlocking script", mustSign(t, keys.Lock, P2PKH, op), exampleUnlock)

	c := SliceContext{Stripe: id, Slice: 2, Epoch: 7, Length: 5, Purpose: PurposeContent}
	ascending(c.Volume[:], 0xb0)
	var salt [32]byte
	ascending(salt[:], 0xc0)
	plain, err := OpenSlice(nil, bundle.Content, salt, c, unhex(t, exampleSlice))
	if err != nil || string(plain) != "hello" {
		t.Errorf("opened %q: %v", plain, err)
	}
	sealed, err := SealSlice(nil, bundle.Content, salt, c, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "sealed slice", sealed, exampleSlice)
}
