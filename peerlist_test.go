package defs

import (
	"slices"
	"testing"
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
