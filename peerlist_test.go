package defs

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
)

func TestPeersAreRememberedOnceAndBounded(t *testing.T) {
	dir := t.TempDir()
	many := make([]string, 2*peersMax)
	for i := range many {
		many[i] = string(rune('a'+i%26)) + string(rune('a'+i/26))
	}
	for range 2 {
		if err := addPeers(dir, many); err != nil {
			t.Fatal(err)
		}
	}
	got, err := knownPeers(dir)
	if err != nil || !slices.Equal(got, many[:peersMax]) {
		t.Fatalf("%d peers, error %v", len(got), err)
	}
}

// FuzzFiles reads what may have become of the files that lie beside the device
// file: the list of peers, the certificate, the recovery member.
func FuzzFiles(f *testing.F) {
	certificate, err := proto.Marshal(&wire.Certificate{Pool: make([]byte, 32), Peer: "x"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("# a comment\n/ip4/192.0.2.1/tcp/4001/p2p/x\n\n"))
	f.Add(certificate)
	f.Add(make([]byte, messageBytesMax+1))
	path := filepath.Join(f.TempDir(), "file")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if addrs, err := ReadPeers(path); err == nil && len(addrs) > peersMax {
			t.Fatalf("%d peers", len(addrs))
		}
		err := readMessage(path, &wire.Certificate{})
		if err == nil && len(b) > messageBytesMax {
			t.Fatalf("a file of %d bytes was read", len(b))
		}
		_ = readMessage(path, &wire.Member{})
	})
}
