package wire

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"strings"
	"testing"
)

// TestGoldenSignatures is the example of FORMAT.md, "Signed bytes". Ed25519 is
// deterministic, so that a signature tells what was signed.
func TestGoldenSignatures(t *testing.T) {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))
	manifest := &Manifest{K: 1, M: 1, ShardBytes: 16 << 10, Roots: [][]byte{bytes.Repeat([]byte{0x11}, 32), bytes.Repeat([]byte{0x22}, 32)}}
	if err := manifest.Sign(key); err != nil {
		t.Fatal(err)
	}
	record := &IndexRecord{
		Manifest: manifest, Version: 7, Mirrored: true,
		Holders: []*Holder{{Index: 0, Primary: "p0", Mirror: "p1"}, {Index: 1, Primary: "p2"}},
		Lock:    &Lock{Version: 1, Script: []byte{0x76, 0xa9}},
	}
	record.SignHolders(key)
	commit := NewCommit(key)
	head := &Head{Sequence: 5, Previous: bytes.Repeat([]byte{0x33}, 32), Sealed: []byte("sealed")}
	head.Sign(key)
	hash := head.Hash()
	for what, err := range map[string]error{
		"manifest": manifest.Verify(), "index record": record.Verify(), "commit": commit.Verify(manifest.IndexKey), "head": head.Verify(),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	blind, number := string(manifest.Blind), func(n byte) string { return "\x00\x00\x00" + string([]byte{n}) }
	for what, c := range map[string]struct {
		signed    string
		signature []byte
	}{
		"manifest": {"defs manifest v1" + blind + string(manifest.IndexKey) + number(1) + number(1) + "\x00\x00\x40\x00" + strings.Repeat("\x11", 32) + strings.Repeat("\x22", 32), manifest.Signature},
		"list of holders": {"defs holders v1" + blind + number(0) + number(7) + "\x01" + number(2) +
			number(0) + number(2) + "p0" + number(2) + "p1" + number(1) + number(2) + "p2" + number(0) +
			number(1) + number(2) + "\x76\xa9", record.Signature},
		"commit": {"defs commit v1" + blind, commit.Signature},
		"head":   {"defs head signature v1" + string(head.Address) + number(0) + number(5) + number(32) + strings.Repeat("\x33", 32) + number(6) + "sealed", head.Signature},
	} {
		if !ed25519.Verify(manifest.IndexKey, []byte(c.signed), c.signature) {
			t.Errorf("the signature of the %s is not over the bytes of FORMAT.md", what)
		}
	}
	for _, c := range []struct {
		what string
		got  []byte
		want string
	}{
		{"public key", manifest.IndexKey, "ed4928c628d1c2c6eae90338905995612959273a5c63f93636c14614ac8737d1"},
		{"blind id", manifest.Blind, "61e502bced9954cf5b98b164fb19e4ec458a790b1c397928a66a6daea828a846"},
		{"manifest", manifest.Signature, "d0644edc1d42df786584952759ac2687a9914899815aa892d24848327699a9882082acf48451bfba71aeaf93b14eeb37d0224f0daaaeb49b0adc0989b5d0fe06"},
		{"list of holders", record.Signature, "9d985ac8de351ec5f70aec7c8fe0bfb219523b38dabc606c5aaabc1a604847d0c0031c57383bc373b44c87a3692d180f1861d6a0663087c23ef5e8e597094704"},
		{"commit", commit.Signature, "4d1ef88856311330f80befb25b87c141f449eb82bff157d1d18e3a9e9ccc470006e3ca4eb3206e2f14081f1b55a780435acfa6261a071075565c86859eeb5b08"},
		{"address", head.Address, "77f9f3120f697c65797685460400e1f41db623c67e42810901a0649691ffab92"},
		{"head", head.Signature, "4e82ea969325c33df8302ed555f23a5ad8482d595374a3aba7bd3731a9f1f111315c7a7ad20514353cdb76cbc8e0cee2e4b63ed2eee41ee46be692fc007dd70a"},
		{"hash of the head", hash[:], "8e436bec4e6e6098ad2bc9dbf7c174c8775a78b35d74b22aaf413249596dd2f6"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s is %s, want %s", c.what, got, c.want)
		}
	}
}
