package p2p

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"
)

// FuzzPeerKey reads what may have become of a peer's key file.
func FuzzPeerKey(f *testing.F) {
	f.Add([]byte(hex.EncodeToString(make([]byte, 32)) + "\n"))
	f.Add([]byte("zz"))
	path := filepath.Join(f.TempDir(), "peer.key")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		key, err := LoadOrCreateKey(path)
		if err == nil && len(key.Seed()) != 32 {
			t.Fatalf("a key of %d bytes", len(key))
		}
	})
}

// FuzzPeerAddr reads an address that a person, a ticket or a peer gives.
func FuzzPeerAddr(f *testing.F) {
	f.Add("/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5")
	f.Add("/p2p/12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5")
	f.Add("/ip4/192.0.2.1/tcp/4001")
	f.Fuzz(func(t *testing.T, text string) {
		info, err := parsePeerAddr(text)
		if err == nil && (len(info.Addrs) == 0 || info.ID == "") {
			t.Fatalf("%q is taken without an address or an id", text)
		}
	})
}
