package seal

import (
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/zeebo/blake3"
)

const (
	// ChainEntriesMax bounds the device chain of a volume.
	ChainEntriesMax = 1024
	// DeviceNameBytesMax bounds a device's name (UTF-8).
	DeviceNameBytesMax = 64

	chainVersion       = 1
	chainHeaderBytes   = 1 + 4
	entryFixedBytes    = 1 + 4 + 2 + 32 + 32 + 1 // before the name
	entryTrailerBytes  = 32 + ed25519.SignatureSize
	chainEntryBytesMin = entryFixedBytes + entryTrailerBytes
)

// Device is one machine that mounts the volume.
type Device struct {
	Slot uint16   // from 1, never given twice
	Name string   // for people; at most DeviceNameBytesMax bytes
	Sign [32]byte // Ed25519 public key
	Wrap [32]byte // HPKE public key, for WrapTo
}

// ChainAction says what an entry does.
type ChainAction uint8

// The actions of the device chain.
const (
	DeviceAdded   ChainAction = 1
	DeviceRemoved ChainAction = 2
)

// ChainEntry adds or removes one device.
type ChainEntry struct {
	Action    ChainAction
	Epoch     uint32   // current once the entry stands; a removal starts a new one
	Device    Device   // of a removal: the slot alone
	Previous  [32]byte // hash of the entry before; of the authority's key for the first
	Signature [64]byte // by the authority
}

// Chain is the signed list of a volume's devices, oldest entry first. Every
// entry names the hash of the one before it and is signed by the authority,
// which comes from the 24 words. It holds device names, so it travels sealed
// inside heads only.
type Chain []ChainEntry

// Add returns the chain with a device appended. epoch is the current one.
func (c Chain) Add(authority ed25519.PrivateKey, d Device, epoch uint32) (Chain, error) {
	return c.extend(authority, ChainEntry{Action: DeviceAdded, Epoch: epoch, Device: d})
}

// Remove returns the chain with the device in slot removed. epoch is the one
// that starts with the removal.
func (c Chain) Remove(authority ed25519.PrivateKey, slot uint16, epoch uint32) (Chain, error) {
	return c.extend(authority, ChainEntry{Action: DeviceRemoved, Epoch: epoch, Device: Device{Slot: slot}})
}

func (c Chain) extend(authority ed25519.PrivateKey, e ChainEntry) (Chain, error) {
	public := authority.Public().(ed25519.PublicKey)
	e.Previous = c.tip(public)
	if len(e.Device.Name) <= DeviceNameBytesMax { // else Verify refuses it below
		e.Signature = [64]byte(domainDevice.sign(authority, e.signed()))
	}
	longer := append(slices.Clip(c), e)
	if _, err := longer.Verify(public); err != nil {
		return nil, err
	}
	return longer, nil
}

// tip is the hash that the next entry must name.
func (c Chain) tip(authority ed25519.PublicKey) [32]byte {
	if len(c) == 0 {
		return blake3.Sum256(append([]byte("defs devices v1"), authority...))
	}
	return blake3.Sum256(append([]byte("defs device entry v1"), c[len(c)-1].encode()...))
}

// Verify checks every entry against authority, which must come from the words
// or from what a device stored when it was set up, and returns the devices
// that are in the volume, by slot. A chain cut short also verifies: compare it
// with the newest one known (Extends).
func (c Chain) Verify(authority ed25519.PublicKey) ([]Device, error) {
	if len(c) > ChainEntriesMax {
		return nil, fmt.Errorf("seal: verify device chain: %w: %d entries, at most %d", ErrMalformed, len(c), ChainEntriesMax)
	}
	if len(authority) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("seal: verify device chain: %w: authority of %d bytes", ErrInvalid, len(authority))
	}
	present := make(map[uint16]Device)
	used := make(map[uint16]bool)
	epoch := uint32(0)
	for i, e := range c {
		fail := func(why string) ([]Device, error) {
			return nil, fmt.Errorf("seal: verify device chain: entry %d, slot %d: %w: %s", i, e.Device.Slot, ErrNotAuthentic, why)
		}
		if len(e.Device.Name) > DeviceNameBytesMax {
			return fail("name is too long")
		}
		if e.Previous != c[:i].tip(authority) {
			return fail("does not continue the entry before it")
		}
		if err := domainDevice.verify(authority, e.signed(), e.Signature[:]); err != nil {
			return fail("not signed by the volume's authority")
		}
		slot := e.Device.Slot
		switch e.Action {
		case DeviceAdded:
			if slot == 0 || used[slot] {
				return fail("slot is taken or has been used before")
			}
			if e.Epoch == 0 || e.Epoch < epoch {
				return fail("epoch goes back")
			}
			used[slot] = true
			present[slot] = e.Device
		case DeviceRemoved:
			if _, ok := present[slot]; !ok {
				return fail("removes a device that is not in the volume")
			}
			if e.Epoch <= epoch {
				return fail("removal without a new epoch")
			}
			if e.Device != (Device{Slot: slot}) {
				return fail("removal with more than a slot")
			}
			delete(present, slot)
		default:
			return fail("unknown action")
		}
		epoch = e.Epoch
	}
	devices := make([]Device, 0, len(present))
	for _, d := range present {
		devices = append(devices, d)
	}
	slices.SortFunc(devices, func(a, b Device) int { return int(a.Slot) - int(b.Slot) })
	return devices, nil
}

// Epoch is the epoch of the last entry, 0 for an empty chain.
func (c Chain) Epoch() uint32 {
	if len(c) == 0 {
		return 0
	}
	return c[len(c)-1].Epoch
}

// Extends tells whether c is older or older with entries appended. A chain
// that does not extend the newest one known is a fork or a rollback.
func (c Chain) Extends(older Chain) bool {
	return len(c) >= len(older) && slices.Equal(c[:len(older)], older)
}

// signed is the encoding of an entry up to its signature.
func (e *ChainEntry) signed() []byte {
	out := make([]byte, 0, chainEntryBytesMin+len(e.Device.Name))
	out = append(out, byte(e.Action))
	out = binary.BigEndian.AppendUint32(out, e.Epoch)
	out = binary.BigEndian.AppendUint16(out, e.Device.Slot)
	out = append(out, e.Device.Sign[:]...)
	out = append(out, e.Device.Wrap[:]...)
	out = append(out, byte(len(e.Device.Name)))
	out = append(out, e.Device.Name...)
	return append(out, e.Previous[:]...)
}

func (e *ChainEntry) encode() []byte { return append(e.signed(), e.Signature[:]...) }

// Marshal returns the encoding of the chain.
func (c Chain) Marshal() []byte {
	out := []byte{chainVersion}
	out = binary.BigEndian.AppendUint32(out, uint32(len(c)))
	for i := range c {
		out = append(out, c[i].encode()...)
	}
	return out
}

// UnmarshalChain reads what Marshal wrote. It does not verify: call Verify.
func UnmarshalChain(data []byte) (Chain, error) {
	fail := func(why string, args ...any) (Chain, error) {
		return nil, fmt.Errorf("seal: unmarshal device chain of %d bytes: %w: %s", len(data), ErrMalformed, fmt.Sprintf(why, args...))
	}
	if len(data) < chainHeaderBytes || data[0] != chainVersion {
		return fail("not of version %d", chainVersion)
	}
	count := int(binary.BigEndian.Uint32(data[1:]))
	rest := data[chainHeaderBytes:]
	if count > ChainEntriesMax || count > len(rest)/chainEntryBytesMin {
		return fail("%d entries", count)
	}
	chain := make(Chain, count)
	for i := range chain {
		if len(rest) < chainEntryBytesMin {
			return fail("ends in entry %d", i)
		}
		e := &chain[i]
		e.Action = ChainAction(rest[0])
		e.Epoch = binary.BigEndian.Uint32(rest[1:])
		e.Device.Slot = binary.BigEndian.Uint16(rest[5:])
		e.Device.Sign = [32]byte(rest[7:])
		e.Device.Wrap = [32]byte(rest[39:])
		name := int(rest[71])
		if name > DeviceNameBytesMax || len(rest) < chainEntryBytesMin+name {
			return fail("name of %d bytes in entry %d", name, i)
		}
		rest = rest[entryFixedBytes:]
		e.Device.Name = string(rest[:name])
		rest = rest[name:]
		e.Previous = [32]byte(rest)
		e.Signature = [64]byte(rest[32:])
		rest = rest[entryTrailerBytes:]
	}
	if len(rest) != 0 {
		return fail("%d bytes after the last entry", len(rest))
	}
	return chain, nil
}
