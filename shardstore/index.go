package shardstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// Index keys. Everything here can be rebuilt from the packs.
const (
	prefixShard       = 's' // blind, number → shardEntry
	prefixTombstone   = 't' // blind, number → uptime of the delete
	prefixProvisional = 'p' // uptime of the put, blind, number → nothing
	prefixPartner     = 'm' // partner, 0, blind, number → nothing
	prefixLock        = 'l' // blind → itemEntry
	prefixIndex       = 'i' // blind → itemEntry
	prefixHead        = 'h' // address → itemEntry
	prefixDead        = 'd' // uptime when due, sequence → deadEntry
	prefixState       = 'z' // one key: indexState
)

var stateKey = []byte{prefixState}

// location says where a record is.
type location struct {
	Pack   uint64
	Offset int64
	Seq    uint64
	Meta   uint32
	Data   uint32
}

func (l location) dataOffset() int64 { return l.Offset + recordHeaderBytes + int64(l.Meta) }

type shardEntry struct {
	location
	Uptime      uint64 // of the put
	Provisional bool
	Proof       []byte // of the commit, at most proofBytesMax
	Partner     string
}

// itemEntry is the newest lock, index record or head of one id.
type itemEntry struct {
	location
	Version uint64
}

// deadEntry is data that may be punched out of its pack.
type deadEntry struct {
	location
	Tombstone *Key // purged with the data
}

// indexState is where the index stands: it holds all records before (Pack,
// Offset), which would hold sequence Seq.
type indexState struct {
	Pack       uint64
	Offset     int64
	Seq        uint64
	Uptime     uint64
	UsedBytes  uint64
	Shards     uint64
	Tombstones uint64
}

var errIndex = errors.New("index entry is malformed")

func (k Key) append(dst []byte) []byte { return append(append(dst, k.Blind[:]...), k.Index) }

func decodeKey(b []byte) Key {
	var k Key
	copy(k.Blind[:], b)
	k.Index = b[32]
	return k
}

const keyBytes = 33

func shardKey(k Key) []byte     { return k.append([]byte{prefixShard}) }
func tombstoneKey(k Key) []byte { return k.append([]byte{prefixTombstone}) }
func idKey(prefix byte, id [32]byte) []byte {
	return append([]byte{prefix}, id[:]...)
}
func provisionalKey(uptime uint64, k Key) []byte {
	return k.append(binary.BigEndian.AppendUint64([]byte{prefixProvisional}, uptime))
}
func partnerPrefix(partner string) []byte {
	return append(append([]byte{prefixPartner}, partner...), 0)
}
func partnerKey(partner string, k Key) []byte { return k.append(partnerPrefix(partner)) }
func deadKey(due, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte{prefixDead}, due), seq)
}

// prefixEnd is the first key after all that begin with prefix.
func prefixEnd(prefix []byte) []byte {
	end := append([]byte(nil), prefix...)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i]++; end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}

const locationBytes = 32

func (l location) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, l.Pack)
	b = binary.BigEndian.AppendUint64(b, uint64(l.Offset))
	b = binary.BigEndian.AppendUint64(b, l.Seq)
	b = binary.BigEndian.AppendUint32(b, l.Meta)
	return binary.BigEndian.AppendUint32(b, l.Data)
}

// decodeLocation needs len(b) >= locationBytes.
func decodeLocation(b []byte) location {
	return location{
		Pack:   binary.BigEndian.Uint64(b),
		Offset: int64(binary.BigEndian.Uint64(b[8:])),
		Seq:    binary.BigEndian.Uint64(b[16:]),
		Meta:   binary.BigEndian.Uint32(b[24:]),
		Data:   binary.BigEndian.Uint32(b[28:]),
	}
}

func (e shardEntry) encode() []byte {
	b := binary.BigEndian.AppendUint64(e.location.append(nil), e.Uptime)
	if e.Provisional {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	b = append(append(b, byte(len(e.Proof))), e.Proof...)
	return append(b, e.Partner...)
}

func decodeShardEntry(b []byte) (shardEntry, error) {
	const fixed = locationBytes + 10
	if len(b) < fixed || len(b) < fixed+int(b[fixed-1]) {
		return shardEntry{}, errIndex
	}
	partner := fixed + int(b[fixed-1])
	return shardEntry{
		location:    decodeLocation(b),
		Uptime:      binary.BigEndian.Uint64(b[locationBytes:]),
		Provisional: b[locationBytes+8] == 1,
		Proof:       append([]byte(nil), b[fixed:partner]...),
		Partner:     string(b[partner:]),
	}, nil
}

func (e itemEntry) encode() []byte {
	return binary.BigEndian.AppendUint64(e.location.append(nil), e.Version)
}

func decodeItemEntry(b []byte) (itemEntry, error) {
	if len(b) != locationBytes+8 {
		return itemEntry{}, errIndex
	}
	return itemEntry{location: decodeLocation(b), Version: binary.BigEndian.Uint64(b[locationBytes:])}, nil
}

func (e deadEntry) encode() []byte {
	b := e.location.append(nil)
	if e.Tombstone != nil {
		b = e.Tombstone.append(b)
	}
	return b
}

func decodeDeadEntry(b []byte) (deadEntry, error) {
	switch len(b) {
	case locationBytes:
		return deadEntry{location: decodeLocation(b)}, nil
	case locationBytes + keyBytes:
		k := decodeKey(b[locationBytes:])
		return deadEntry{location: decodeLocation(b), Tombstone: &k}, nil
	}
	return deadEntry{}, errIndex
}

func (s indexState) encode() []byte {
	b := []byte{formatVersion}
	for _, v := range []uint64{s.Pack, uint64(s.Offset), s.Seq, s.Uptime, s.UsedBytes, s.Shards, s.Tombstones} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

func decodeIndexState(b []byte) (indexState, error) {
	if len(b) != 1+7*8 || b[0] != formatVersion {
		return indexState{}, errIndex
	}
	at := func(i int) uint64 { return binary.BigEndian.Uint64(b[1+8*i:]) }
	return indexState{Pack: at(0), Offset: int64(at(1)), Seq: at(2), Uptime: at(3), UsedBytes: at(4), Shards: at(5), Tombstones: at(6)}, nil
}

// get reads and decodes one key; found is false when it is not there.
func get[T any](r pebble.Reader, key []byte, decode func([]byte) (T, error)) (v T, found bool, err error) {
	b, closer, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return v, false, nil
	}
	if err != nil {
		return v, false, fmt.Errorf("shard index: %w", err)
	}
	v, err = decode(b)
	if cerr := closer.Close(); err == nil {
		err = cerr
	}
	return v, err == nil, err
}

// logged is a record that is in a pack, on its way into the index.
type logged struct {
	header recordHeader
	meta   meta
	loc    location
}

// indexer applies records to the index. Applying the same records from the
// same state gives the same index, so that a rebuilt index is an equal one.
type indexer struct {
	batch *pebble.Batch // indexed: records of one batch see each other
	state *indexState
	keep  time.Duration // how long deleted bytes are kept
}

func (x *indexer) set(key, value []byte) error { return x.batch.Set(key, value, nil) }
func (x *indexer) unset(key []byte) error      { return x.batch.Delete(key, nil) }

func (x *indexer) apply(r logged) error {
	x.state.Pack, x.state.Offset, x.state.Seq = r.loc.Pack, r.loc.Offset+r.header.bytes(), r.header.Seq+1
	x.state.Uptime = max(x.state.Uptime, r.header.Uptime)
	x.state.UsedBytes += uint64(r.header.bytes())
	switch r.header.Kind {
	case kindShard:
		return x.shard(r)
	case kindCommit, kindPartner:
		return x.change(r)
	case kindDelete, kindDrop:
		return x.remove(r)
	case kindLock:
		return x.item(prefixLock, r)
	case kindIndex:
		return x.item(prefixIndex, r)
	case kindForget:
		return x.forget(r)
	case kindHead:
		return x.item(prefixHead, r)
	}
	return nil
}

func (x *indexer) shard(r logged) error {
	old, found, err := get(x.batch, shardKey(r.meta.Key), decodeShardEntry)
	if err != nil {
		return err
	}
	e := shardEntry{location: r.loc, Uptime: r.header.Uptime, Provisional: r.meta.Provisional, Partner: r.meta.Partner}
	errs := []error{}
	if found { // a healed copy: only the bytes change
		e.Provisional, e.Proof = old.Provisional, old.Proof
		errs = append(errs, x.unlink(r.meta.Key, old), x.bury(old.location, r.header.Uptime, nil))
	} else {
		x.state.Shards++
	}
	return errors.Join(append(errs, x.link(r.meta.Key, e))...)
}

// change applies a commit or a new partner.
func (x *indexer) change(r logged) error {
	e, found, err := get(x.batch, shardKey(r.meta.Key), decodeShardEntry)
	if err != nil || !found {
		return err
	}
	if err := x.unlink(r.meta.Key, e); err != nil {
		return err
	}
	if r.header.Kind == kindCommit {
		e.Provisional, e.Proof = false, r.meta.Blob
	} else {
		e.Partner = r.meta.Partner
	}
	return x.link(r.meta.Key, e)
}

func (x *indexer) remove(r logged) error {
	e, found, err := get(x.batch, shardKey(r.meta.Key), decodeShardEntry)
	if err != nil {
		return err
	}
	if found {
		x.state.Shards--
		if err := errors.Join(x.unlink(r.meta.Key, e), x.unset(shardKey(r.meta.Key))); err != nil {
			return err
		}
	}
	if r.header.Kind == kindDrop {
		if !found {
			return nil
		}
		return x.bury(e.location, r.header.Uptime, nil)
	}
	// Without the shard, bury the tombstone alone: its record has no data.
	loc := r.loc
	if found {
		loc = e.location
	}
	x.state.Tombstones++
	return errors.Join(
		x.set(tombstoneKey(r.meta.Key), binary.BigEndian.AppendUint64(nil, r.header.Uptime)),
		x.bury(loc, r.header.Uptime+uint64(x.keep/time.Second), &r.meta.Key))
}

func (x *indexer) link(k Key, e shardEntry) error {
	errs := []error{x.set(shardKey(k), e.encode())}
	if e.Provisional {
		errs = append(errs, x.set(provisionalKey(e.Uptime, k), nil))
	}
	if e.Partner != "" {
		errs = append(errs, x.set(partnerKey(e.Partner, k), nil))
	}
	return errors.Join(errs...)
}

func (x *indexer) unlink(k Key, e shardEntry) error {
	var errs []error
	if e.Provisional {
		errs = append(errs, x.unset(provisionalKey(e.Uptime, k)))
	}
	if e.Partner != "" {
		errs = append(errs, x.unset(partnerKey(e.Partner, k)))
	}
	return errors.Join(errs...)
}

func (x *indexer) item(prefix byte, r logged) error {
	key := idKey(prefix, r.meta.ID)
	old, found, err := get(x.batch, key, decodeItemEntry)
	if err != nil {
		return err
	}
	if found {
		if err := x.bury(old.location, r.header.Uptime, nil); err != nil {
			return err
		}
	}
	return x.set(key, itemEntry{location: r.loc, Version: r.meta.Version}.encode())
}

func (x *indexer) forget(r logged) error {
	key := idKey(prefixIndex, r.meta.ID)
	old, found, err := get(x.batch, key, decodeItemEntry)
	if err != nil || !found {
		return err
	}
	return errors.Join(x.unset(key), x.bury(old.location, r.header.Uptime, nil))
}

// bury lists data that nothing refers to any more for the sweeper.
func (x *indexer) bury(loc location, due uint64, tombstone *Key) error {
	if loc.Data == 0 && tombstone == nil {
		return nil
	}
	return x.set(deadKey(due, loc.Seq), deadEntry{location: loc, Tombstone: tombstone}.encode())
}

// commit writes the batch with the position it leads to, in one step.
func (x *indexer) commit() error {
	if err := x.set(stateKey, x.state.encode()); err != nil {
		return err
	}
	return x.batch.Commit(pebble.NoSync)
}
