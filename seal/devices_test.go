package seal

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func testDevice(slot uint16) Device {
	return Device{Slot: slot, Name: "laptop", Sign: [32]byte{byte(slot)}, Wrap: [32]byte{0, byte(slot)}}
}

// mustChain adds devices 1, 2 and 3 in epoch 1 and removes 2, starting epoch 2.
func mustChain(t testing.TB, authority ed25519.PrivateKey) Chain {
	t.Helper()
	var chain Chain
	var err error
	for slot := range uint16(3) {
		if chain, err = chain.Add(authority, testDevice(slot+1), 1); err != nil {
			t.Fatal(err)
		}
	}
	if chain, err = chain.Remove(authority, 2, 2); err != nil {
		t.Fatal(err)
	}
	return chain
}

func testAuthority(t testing.TB) (ed25519.PrivateKey, ed25519.PublicKey) {
	authority := mustRecovery(t, Root{1}).Authority()
	return authority, authority.Public().(ed25519.PublicKey)
}

func TestChainListsDevices(t *testing.T) {
	authority, public := testAuthority(t)
	chain := mustChain(t, authority)
	devices, err := chain.Verify(public)
	if err != nil || !slices.Equal(devices, []Device{testDevice(1), testDevice(3)}) {
		t.Fatalf("devices %+v: %v", devices, err)
	}
	if chain.Epoch() != 2 || (Chain)(nil).Epoch() != 0 {
		t.Errorf("epoch %d", chain.Epoch())
	}
	if devices, err := (Chain)(nil).Verify(public); err != nil || len(devices) != 0 {
		t.Errorf("empty chain: %+v: %v", devices, err)
	}
}

// Whatever is added and removed, the chain says what a plain set says.
func TestChainAgreesWithSet(t *testing.T) {
	authority, public := testAuthority(t)
	rapid.Check(t, func(rt *rapid.T) {
		var chain Chain
		epoch := uint32(1)
		want, used := map[uint16]bool{}, map[uint16]bool{}
		for range rapid.IntRange(0, 12).Draw(rt, "steps") {
			slot := rapid.Uint16Range(0, 5).Draw(rt, "slot")
			older := chain
			if rapid.Bool().Draw(rt, "add") {
				next, err := chain.Add(authority, testDevice(slot), epoch)
				if ok := slot != 0 && !used[slot]; ok != (err == nil) {
					rt.Fatalf("add %d: %v", slot, err)
				} else if ok {
					chain, want[slot], used[slot] = next, true, true
				}
			} else {
				next, err := chain.Remove(authority, slot, epoch+1)
				if ok := want[slot]; ok != (err == nil) {
					rt.Fatalf("remove %d: %v", slot, err)
				} else if ok {
					chain, epoch = next, epoch+1
					delete(want, slot)
				}
			}
			if !chain.Extends(older) || len(chain) > len(older) && older.Extends(chain) {
				rt.Fatal("the longer chain does not extend the shorter")
			}
		}
		again, err := UnmarshalChain(chain.Marshal())
		if err != nil || !slices.Equal(again, chain) {
			rt.Fatalf("another chain came back: %v", err)
		}
		devices, err := again.Verify(public)
		if err != nil || len(devices) != len(want) {
			rt.Fatalf("%d devices, want %d: %v", len(devices), len(want), err)
		}
		for _, d := range devices {
			if !want[d.Slot] {
				rt.Fatalf("device %d is not in the volume", d.Slot)
			}
		}
	})
}

func TestChainRefuses(t *testing.T) {
	authority, public := testAuthority(t)
	stranger := mustRecovery(t, Root{2}).Authority()
	chain := mustChain(t, authority)
	change := func(i int, f func(*ChainEntry)) Chain {
		changed := slices.Clone(chain)
		f(&changed[i])
		return changed
	}
	// resign makes entries that the authority never should, with good
	// signatures and hashes.
	resign := func(entries ...ChainEntry) Chain {
		var out Chain
		for _, e := range entries {
			e.Previous = out.tip(public)
			e.Signature = [64]byte(domainDevice.sign(authority, e.signed()))
			out = append(out, e)
		}
		return out
	}
	added := func(slot uint16, epoch uint32) ChainEntry {
		return ChainEntry{Action: DeviceAdded, Epoch: epoch, Device: testDevice(slot)}
	}
	removed := func(slot uint16, epoch uint32) ChainEntry {
		return ChainEntry{Action: DeviceRemoved, Epoch: epoch, Device: Device{Slot: slot}}
	}
	fat := removed(1, 2)
	fat.Device = testDevice(1)
	for name, c := range map[string]Chain{
		"signing key changed":     change(1, func(e *ChainEntry) { e.Device.Sign[0]++ }),
		"wrap key changed":        change(1, func(e *ChainEntry) { e.Device.Wrap[0]++ }),
		"name changed":            change(0, func(e *ChainEntry) { e.Device.Name = "lapto" }),
		"name too long":           change(0, func(e *ChainEntry) { e.Device.Name = string(make([]byte, 300)) }),
		"epoch changed":           change(3, func(e *ChainEntry) { e.Epoch++ }),
		"action changed":          change(3, func(e *ChainEntry) { e.Action = DeviceAdded }),
		"signature changed":       change(3, func(e *ChainEntry) { e.Signature[63] ^= 1 }),
		"first entry dropped":     chain[1:],
		"middle entry dropped":    slices.Concat(chain[:1], chain[2:]),
		"entries swapped":         {chain[1], chain[0]},
		"entry repeated":          slices.Concat(chain[:1], chain[:1]),
		"slot 0":                  resign(added(0, 1)),
		"slot twice":              resign(added(1, 1), added(1, 1)),
		"slot again":              resign(added(1, 1), removed(1, 2), added(1, 2)),
		"removal of none":         resign(removed(1, 1)),
		"removal twice":           resign(added(1, 1), removed(1, 2), removed(1, 3)),
		"removal in same epoch":   resign(added(1, 1), removed(1, 1)),
		"removal with keys":       resign(added(1, 1), fat),
		"epoch goes back":         resign(added(1, 2), added(2, 1)),
		"epoch 0":                 resign(added(1, 0)),
		"unknown action":          resign(ChainEntry{Action: 3, Epoch: 1, Device: testDevice(1)}),
		"signed by a stranger":    mustChain(t, stranger),
		"stranger's continuation": append(slices.Clone(chain), mustChain(t, stranger)[0]),
	} {
		if _, err := c.Verify(public); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := chain.Add(stranger, testDevice(9), 2); err == nil {
		t.Error("a stranger extended the chain")
	}
	if _, err := make(Chain, ChainEntriesMax+1).Verify(public); !errors.Is(err, ErrMalformed) {
		t.Errorf("too many entries: %v", err)
	}
	if _, err := chain.Verify(nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("no authority: %v", err)
	}
}

func TestExtendsTellsForksAndRollbacks(t *testing.T) {
	authority, _ := testAuthority(t)
	chain := mustChain(t, authority)
	fork, err := chain[:2].Add(authority, testDevice(4), 1)
	if err != nil {
		t.Fatal(err)
	}
	if !chain.Extends(nil) || !chain.Extends(chain) || !chain.Extends(chain[:2]) {
		t.Error("a chain does not extend its own beginning")
	}
	if chain[:2].Extends(chain) || fork.Extends(chain) || chain.Extends(fork) {
		t.Error("a fork or rollback passes for an extension")
	}
}

// Adding to one chain twice leaves the first result as it was.
func TestAddDoesNotShareMemory(t *testing.T) {
	authority, public := testAuthority(t)
	base := mustChain(t, authority)
	a, err := base.Add(authority, testDevice(10), 2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := base.Add(authority, testDevice(11), 2); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Verify(public); err != nil || a[len(a)-1].Device.Slot != 10 {
		t.Fatalf("slot %d: %v", a[len(a)-1].Device.Slot, err)
	}
}

func FuzzUnmarshalChain(f *testing.F) {
	authority, public := testAuthority(f)
	chain := mustChain(f, authority)
	f.Add(chain.Marshal())
	f.Add([]byte{1, 0xff, 0xff, 0xff, 0xff})
	f.Add((Chain)(nil).Marshal())
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := UnmarshalChain(data)
		if err != nil {
			return
		}
		if !bytes.Equal(c.Marshal(), data) {
			t.Fatal("marshals to other bytes")
		}
		if _, err := c.Verify(public); err == nil && !chain.Extends(c) {
			t.Fatal("a forged chain verifies")
		}
	})
}

func TestUnmarshalChainRefuses(t *testing.T) {
	authority, _ := testAuthority(t)
	data := mustChain(t, authority).Marshal()
	for i := range data {
		if _, err := UnmarshalChain(data[:i]); !errors.Is(err, ErrMalformed) {
			t.Fatalf("cut to %d bytes: %v", i, err)
		}
	}
	if _, err := UnmarshalChain(append(bytes.Clone(data), 0)); !errors.Is(err, ErrMalformed) {
		t.Errorf("one byte more: %v", err)
	}
	long := bytes.Clone(data)
	long[chainHeaderBytes+71] = DeviceNameBytesMax + 1
	if _, err := UnmarshalChain(long); !errors.Is(err, ErrMalformed) {
		t.Errorf("name too long: %v", err)
	}
	if allocs := testing.AllocsPerRun(10, func() {
		_, _ = UnmarshalChain([]byte{1, 0, 0, 4, 0, 9, 9, 9})
	}); allocs > 10 {
		t.Errorf("%v allocations for a count that cannot be", allocs)
	}
}
