package defs

import (
	"slices"
	"testing"
)

func TestFillPorts(t *testing.T) {
	for _, c := range []struct{ listen, addrs, want []string }{
		{[]string{"/ip4/127.0.0.1/tcp/0"}, []string{"/ip4/127.0.0.1/tcp/4001/p2p/ID"}, []string{"/ip4/127.0.0.1/tcp/4001"}},
		{[]string{"/ip4/0.0.0.0/tcp/0"}, []string{"/ip4/192.0.2.1/tcp/4001/p2p/ID"}, []string{"/ip4/0.0.0.0/tcp/4001"}},
		{[]string{"/ip4/127.0.0.1/tcp/0"}, []string{"/ip4/192.0.2.1/tcp/4001"}, []string{"/ip4/127.0.0.1/tcp/0"}},
		{[]string{"/ip4/0.0.0.0/udp/0/quic-v1"}, []string{"/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.1/udp/2/quic-v1"}, []string{"/ip4/0.0.0.0/udp/2/quic-v1"}},
		{[]string{"/ip6/::/tcp/0"}, []string{"/ip4/192.0.2.1/tcp/1", "/ip6/2001:db8::1/tcp/2"}, []string{"/ip6/::/tcp/2"}},
		{[]string{"/ip4/0.0.0.0/tcp/4001"}, []string{"/ip4/192.0.2.1/tcp/1"}, []string{"/ip4/0.0.0.0/tcp/4001"}},
		{[]string{"nonsense", ""}, []string{"", "nonsense"}, []string{"nonsense", ""}},
	} {
		if got := fillPorts(c.listen, c.addrs); !slices.Equal(got, c.want) {
			t.Errorf("fillPorts(%q, %q) is %q, want %q", c.listen, c.addrs, got, c.want)
		}
	}
}

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
