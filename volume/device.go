package volume

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/seal"
)

// deviceFile holds a device's secrets; only its owner may read it.
const deviceFile = "device.json"

// Errors about a volume's local directory.
var (
	// ErrNoVolume: the directory holds no volume.
	ErrNoVolume = errors.New("no volume here")
	// ErrVolumeExists: the directory holds one already.
	ErrVolumeExists = errors.New("a volume is here already")
)

// Device is what one machine knows of a volume: its keys and its place in the
// device chain. The root secret is not among them. FORMAT.md, "Device file".
type Device struct {
	Version     int    `json:"version"` // 1
	Volume      []byte `json:"volume"`  // 16
	Name        string `json:"name"`
	Policy      string `json:"policy"`
	Slot        uint16 `json:"slot"`         // from 1
	LocalKey    []byte `json:"local_key"`    // 32; seals the local state
	SignSeed    []byte `json:"sign_seed"`    // Ed25519, of this device
	WrapKey     []byte `json:"wrap_key"`     // HPKE private key of this device
	HeadKey     []byte `json:"head_key"`     // of this slot
	DevicesKey  []byte `json:"devices_key"`  // head key of slot 0
	RecoveryKey []byte `json:"recovery_key"` // HPKE public key
	Authority   []byte `json:"authority"`    // Ed25519 public key that signs the chain
	Chain       []byte `json:"chain"`
	// RecoveryPeer is the public key of the identity with which a machine that
	// has only the words joins the pool.
	RecoveryPeer []byte   `json:"recovery_peer"`
	Bundles      [][]byte `json:"bundles"`            // epoch bundles
	Pool         []byte   `json:"pool"`               // public key of the pool
	PoolKey      []byte   `json:"pool_key,omitempty"` // Ed25519 seed, on the founder's devices
	// Contains lists, by ascending slot, the heads that the tree of a recovered
	// device comes from: the one that was taken is the last.
	Contains []HeadRef `json:"contains,omitempty"`
	// Checksum covers all of the above. A key with a flipped bit would still
	// seal, and what it seals nobody could recover.
	Checksum []byte `json:"checksum"` // SHA-256
}

// checksum returns what Checksum should be: the SHA-256 of the compact JSON of
// all other fields.
func (d Device) checksum() ([]byte, error) {
	d.Checksum = nil
	b, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	return sum[:], nil
}

// NewDevice makes the first device of a new volume and returns the 24 words
// that recover it. The words are not kept.
func NewDevice(name string, policy erasure.Policy, pool ed25519.PublicKey, poolSeed []byte) (*Device, string, error) {
	words, err := seal.NewWords()
	if err != nil {
		return nil, "", err
	}
	root, err := seal.RootFromWords(words)
	if err != nil {
		return nil, "", err
	}
	recovery, err := root.Recovery()
	if err != nil {
		return nil, "", err
	}
	bundle, err := seal.NewBundle(1, rand.Reader)
	if err != nil {
		return nil, "", err
	}
	id := make([]byte, 16)
	rand.Read(id)
	d := &Device{
		Version: 1, Volume: id, Name: name, Policy: policy.String(),
		Bundles: [][]byte{bundle.Marshal()}, Pool: pool, PoolKey: poolSeed,
	}
	return d, words, d.enroll(recovery, 1)
}

// enroll draws the device's own keys and adds it to the device chain.
func (d *Device) enroll(r *seal.Recovery, slot uint16) error {
	_, sign, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	wrap, err := seal.NewWrapKey()
	if err != nil {
		return err
	}
	d.Slot = slot
	d.LocalKey = make([]byte, 32)
	rand.Read(d.LocalKey)
	d.SignSeed = sign.Seed()
	if d.WrapKey, err = wrap.Bytes(); err != nil {
		return err
	}
	d.HeadKey = r.HeadKey(slot).Marshal()
	d.DevicesKey = r.HeadKey(0).Marshal()
	d.RecoveryKey = r.PublicKey()
	d.Authority = r.Authority().Public().(ed25519.PublicKey)
	d.RecoveryPeer = r.Peer().Public().(ed25519.PublicKey)
	chain := seal.Chain{}
	if len(d.Chain) > 0 {
		if chain, err = seal.UnmarshalChain(d.Chain); err != nil {
			return fmt.Errorf("device chain: %w", err)
		}
	}
	bundle, err := d.newest()
	if err != nil {
		return err
	}
	device := seal.Device{Slot: slot, Sign: [32]byte(sign.Public().(ed25519.PublicKey)), Wrap: [32]byte(wrap.PublicKey())}
	if chain, err = chain.Add(r.Authority(), device, bundle.Epoch); err != nil {
		return fmt.Errorf("device chain: %w", err)
	}
	d.Chain = chain.Marshal()
	return nil
}

func (d *Device) newest() (*seal.Bundle, error) {
	if len(d.Bundles) == 0 {
		return nil, errors.New("the device has no key bundle")
	}
	return seal.UnmarshalBundle(d.Bundles[len(d.Bundles)-1])
}

// recovered says that the volume was brought back on this device: a head of
// another slot covers what was there.
func (d *Device) recovered() bool { return d.Slot > 1 }

// Save writes the device file, once: an existing one is never replaced.
func (d *Device) Save(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("save device: %w", err)
	}
	path := filepath.Join(dir, deviceFile)
	if _, err := os.Stat(path); err == nil {
		return fmt.Errorf("save device in %s: %w", dir, ErrVolumeExists)
	}
	sum, err := d.checksum()
	if err != nil {
		return fmt.Errorf("save device: %w", err)
	}
	d.Checksum = sum
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return fmt.Errorf("save device: %w", err)
	}
	tmp, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("save device: %w", err)
	}
	_, err = tmp.Write(append(b, '\n'))
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("save device: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// deviceBytesMax bounds the device file: a few hundred epochs and devices.
const deviceBytesMax = 4 << 20

// LoadDevice reads the device file of a volume's directory; ErrNoVolume when
// there is none.
func LoadDevice(dir string) (*Device, error) {
	path := filepath.Join(dir, deviceFile)
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", dir, ErrNoVolume)
	}
	if err != nil {
		return nil, fmt.Errorf("load device: %w", err)
	}
	if st.Size() > deviceBytesMax {
		return nil, fmt.Errorf("load device: %s has %d bytes, at most %d are expected", path, st.Size(), deviceBytesMax)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("load device: %w", err)
	}
	return parseDevice(b)
}

func parseDevice(b []byte) (*Device, error) {
	d := &Device{}
	if err := json.Unmarshal(b, d); err != nil {
		return nil, fmt.Errorf("load device: %s is damaged: %w. Restore it from a copy, or recover the volume from its 24 words into another directory with defs recover", deviceFile, err)
	}
	sum, err := d.checksum()
	if err != nil {
		return nil, fmt.Errorf("load device: %w", err)
	}
	switch {
	case d.Version != 1:
		return nil, fmt.Errorf("load device: version %d is not known; use a newer defs", d.Version)
	case !bytes.Equal(d.Checksum, sum):
		return nil, fmt.Errorf("load device: %s is damaged: its checksum does not match. Restore it from a copy, or recover the volume from its 24 words into another directory with defs recover", deviceFile)
	case len(d.Volume) != 16 || len(d.LocalKey) != 32 || d.Slot == 0 || len(d.Bundles) == 0 ||
		len(d.Authority) != ed25519.PublicKeySize || len(d.RecoveryPeer) != ed25519.PublicKeySize || len(d.SignSeed) != ed25519.SeedSize:
		return nil, errors.New("load device: a key is missing or has the wrong length")
	}
	for _, load := range []func() error{
		func() error { _, err := seal.UnmarshalHeadKey(d.HeadKey); return err },
		func() error { _, err := seal.UnmarshalHeadKey(d.DevicesKey); return err },
		func() error { _, err := d.newest(); return err },
		func() error { _, err := erasure.ParsePolicy(d.Policy); return err },
	} {
		if err := load(); err != nil {
			return nil, fmt.Errorf("load device: %w", err)
		}
	}
	return d, nil
}

// keyring is the device's epoch bundles in memory.
type keyring struct {
	mu      sync.Mutex
	bundles map[uint32]*seal.Bundle // guarded by mu
	newest  uint32                  // guarded by mu
}

func newKeyring(d *Device) (*keyring, error) {
	k := &keyring{bundles: make(map[uint32]*seal.Bundle)}
	for _, b := range d.Bundles {
		bundle, err := seal.UnmarshalBundle(b)
		if err != nil {
			return nil, err
		}
		k.bundles[bundle.Epoch] = bundle
		k.newest = max(k.newest, bundle.Epoch)
	}
	return k, nil
}

// Bundle returns the keys of an epoch.
func (k *keyring) Bundle(epoch uint32) (*seal.Bundle, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if b := k.bundles[epoch]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("no keys for epoch %d on this device", epoch)
}

// Epoch returns the newest epoch.
func (k *keyring) Epoch() uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.newest
}
