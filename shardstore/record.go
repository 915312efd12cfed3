package shardstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Sizes of the pack format (FORMAT.md, "Shard store").
const (
	packHeaderBytes   = 64
	recordHeaderBytes = 64
	recordAlign       = 64
	sumBlockBytes     = 16 << 10 // bytes of data under one CRC32C
	metaBytesMax      = 128 << 10
	proofBytesMax     = 255
	dataBytesMax      = 40 << 20 // a 32 MiB shard, its outboard and column
	formatVersion     = 1
)

var (
	packMagic   = [8]byte{'D', 'E', 'F', 'S', 'P', 'A', 'C', 'K'}
	recordMagic = [4]byte{'D', 'S', 'P', 'R'}
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
)

var errRecord = errors.New("not a valid pack record")

// recordKind says what a record changes.
type recordKind uint8

const (
	kindShard   recordKind = 1 // a shard and its bytes
	kindCommit  recordKind = 2 // a provisional shard becomes permanent
	kindPartner recordKind = 3 // the other copy of a shard is elsewhere now
	kindDelete  recordKind = 4 // an owner deleted a shard: tombstone
	kindDrop    recordKind = 5 // a shard is gone without its owner's word: expired or moved away
	kindLock    recordKind = 6
	kindIndex   recordKind = 7 // an index record, on a keeper
	kindForget  recordKind = 8 // an index record is dropped
	kindHead    recordKind = 9
	kindMark    recordKind = 10 // nothing but the header's flushed and uptime

	kindLast = kindMark
)

// recordHeader is the fixed part of a record.
type recordHeader struct {
	Kind    recordKind
	Store   [8]byte // random per store: bytes sent by others never look like records
	Seq     uint64  // counts records from 1 through all packs
	Flushed uint64  // highest sequence known on the device when this was written
	Uptime  uint64  // seconds
	Meta    uint32  // bytes
	Data    uint32  // bytes
	MetaCRC uint32
}

func (h *recordHeader) encode() []byte {
	b := make([]byte, recordHeaderBytes)
	copy(b, recordMagic[:])
	b[4] = formatVersion
	b[5] = byte(h.Kind)
	copy(b[8:], h.Store[:])
	binary.LittleEndian.PutUint64(b[16:], h.Seq)
	binary.LittleEndian.PutUint64(b[24:], h.Flushed)
	binary.LittleEndian.PutUint64(b[32:], h.Uptime)
	binary.LittleEndian.PutUint32(b[40:], h.Meta)
	binary.LittleEndian.PutUint32(b[44:], h.Data)
	binary.LittleEndian.PutUint32(b[48:], h.MetaCRC)
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

func decodeRecordHeader(b []byte, store [8]byte) (recordHeader, error) {
	if len(b) < recordHeaderBytes || !bytes.Equal(b[:4], recordMagic[:]) {
		return recordHeader{}, errRecord
	}
	if crc32.Checksum(b[:60], castagnoli) != binary.LittleEndian.Uint32(b[60:]) {
		return recordHeader{}, fmt.Errorf("%w: header checksum", errRecord)
	}
	h := recordHeader{
		Kind:    recordKind(b[5]),
		Store:   [8]byte(b[8:16]),
		Seq:     binary.LittleEndian.Uint64(b[16:]),
		Flushed: binary.LittleEndian.Uint64(b[24:]),
		Uptime:  binary.LittleEndian.Uint64(b[32:]),
		Meta:    binary.LittleEndian.Uint32(b[40:]),
		Data:    binary.LittleEndian.Uint32(b[44:]),
		MetaCRC: binary.LittleEndian.Uint32(b[48:]),
	}
	switch {
	case b[4] != formatVersion:
		return h, fmt.Errorf("%w: version %d, known is %d", errRecord, b[4], formatVersion)
	case h.Kind == 0 || h.Kind > kindLast:
		return h, fmt.Errorf("%w: kind %d", errRecord, h.Kind)
	case h.Store != store:
		return h, fmt.Errorf("%w: of another store", errRecord)
	case h.Meta > metaBytesMax || h.Data > dataBytesMax || h.Meta < 4*uint32(sumBlocks(int64(h.Data))):
		return h, fmt.Errorf("%w: %d bytes of meta, %d of data", errRecord, h.Meta, h.Data)
	case h.Seq == 0 || h.Flushed >= h.Seq:
		return h, fmt.Errorf("%w: sequence %d, flushed %d", errRecord, h.Seq, h.Flushed)
	}
	return h, nil
}

// bytes is the space the record takes in its pack.
func (h *recordHeader) bytes() int64 { return recordBytes(int64(h.Meta), int64(h.Data)) }

func recordBytes(meta, data int64) int64 {
	return (recordHeaderBytes + meta + data + recordAlign - 1) &^ (recordAlign - 1)
}

func sumBlocks(data int64) int64 { return (data + sumBlockBytes - 1) / sumBlockBytes }

// appendSums appends the CRC32C of each 16 KiB block of the data, given in
// parts.
func appendSums(dst []byte, parts [][]byte) []byte {
	var sum uint32
	fill := 0
	for _, p := range parts {
		for len(p) > 0 {
			n := min(len(p), sumBlockBytes-fill)
			sum = crc32.Update(sum, castagnoli, p[:n])
			p = p[n:]
			if fill += n; fill == sumBlockBytes {
				dst = binary.LittleEndian.AppendUint32(dst, sum)
				sum, fill = 0, 0
			}
		}
	}
	if fill > 0 {
		dst = binary.LittleEndian.AppendUint32(dst, sum)
	}
	return dst
}

// checkSums verifies data, which begins at a block boundary, against the sums
// of its blocks.
func checkSums(sums, data []byte) bool {
	for len(data) > 0 {
		n := min(len(data), sumBlockBytes)
		if len(sums) < 4 || crc32.Checksum(data[:n], castagnoli) != binary.LittleEndian.Uint32(sums) {
			return false
		}
		sums, data = sums[4:], data[n:]
	}
	return true
}

// meta is the decoded second part of a record; which fields are used depends
// on the kind.
type meta struct {
	Key         Key      // shard, commit, partner, delete, drop
	ID          [32]byte // lock, index, forget: blind; head: address
	Version     uint64   // lock, index: version; head: sequence
	Provisional bool     // shard
	Coded       uint32   // shard: bytes of coded data, which come first
	Outboard    uint32   // shard: bytes of the outboard, which comes second; the column is last
	Partner     string   // shard, partner
	Blob        []byte   // shard: manifest; lock: the lock; commit: the proof
}

const flagProvisional = 1

func (m *meta) append(dst []byte, kind recordKind) []byte {
	switch kind {
	case kindShard, kindCommit, kindPartner, kindDelete, kindDrop:
		dst = append(dst, m.Key.Blind[:]...)
		dst = append(dst, m.Key.Index)
	case kindLock, kindIndex, kindForget, kindHead:
		dst = append(dst, m.ID[:]...)
		dst = binary.LittleEndian.AppendUint64(dst, m.Version)
	}
	if kind == kindShard {
		var flags byte
		if m.Provisional {
			flags = flagProvisional
		}
		dst = append(dst, flags)
		dst = binary.LittleEndian.AppendUint32(dst, m.Coded)
		dst = binary.LittleEndian.AppendUint32(dst, m.Outboard)
	}
	if kind == kindShard || kind == kindPartner {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(len(m.Partner)))
		dst = append(dst, m.Partner...)
	}
	return append(dst, m.Blob...)
}

// decodeMeta splits a record's meta into the sums of its data and the fields.
// The blob shares b's memory.
func decodeMeta(h recordHeader, b []byte) (m meta, sums []byte, err error) {
	n := 4 * int(sumBlocks(int64(h.Data)))
	if len(b) != int(h.Meta) || len(b) < n {
		return m, nil, fmt.Errorf("%w: meta is short", errRecord)
	}
	sums, b = b[:n], b[n:]
	short := false
	take := func(n int) []byte {
		if len(b) < n {
			short = true
			return make([]byte, n)
		}
		p := b[:n]
		b = b[n:]
		return p
	}
	switch h.Kind {
	case kindShard, kindCommit, kindPartner, kindDelete, kindDrop:
		copy(m.Key.Blind[:], take(32))
		m.Key.Index = take(1)[0]
	case kindLock, kindIndex, kindForget, kindHead:
		copy(m.ID[:], take(32))
		m.Version = binary.LittleEndian.Uint64(take(8))
	}
	if h.Kind == kindShard {
		m.Provisional = take(1)[0]&flagProvisional != 0
		m.Coded = binary.LittleEndian.Uint32(take(4))
		m.Outboard = binary.LittleEndian.Uint32(take(4))
		if uint64(m.Coded)+uint64(m.Outboard)+columnBytes != uint64(h.Data) {
			return m, nil, fmt.Errorf("%w: shard of %d+%d bytes in %d of data", errRecord, m.Coded, m.Outboard, h.Data)
		}
	}
	if h.Kind == kindShard || h.Kind == kindPartner {
		m.Partner = string(take(int(binary.LittleEndian.Uint16(take(2)))))
	}
	if short {
		return m, nil, fmt.Errorf("%w: meta is short", errRecord)
	}
	if h.Kind == kindShard || h.Kind == kindLock || h.Kind == kindCommit && len(b) <= proofBytesMax {
		m.Blob = b
	} else if len(b) != 0 {
		return m, nil, fmt.Errorf("%w: %d bytes too many in meta", errRecord, len(b))
	}
	return m, sums, nil
}

// encodePackHeader gives the first bytes of a pack file.
func encodePackHeader(store [8]byte, id uint64) []byte {
	b := make([]byte, packHeaderBytes)
	copy(b, packMagic[:])
	b[8] = formatVersion
	copy(b[16:], store[:])
	binary.LittleEndian.PutUint64(b[24:], id)
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

func decodePackHeader(b []byte) (store [8]byte, id uint64, err error) {
	switch {
	case len(b) < packHeaderBytes || !bytes.Equal(b[:8], packMagic[:]):
		return store, 0, errors.New("not a pack file")
	case crc32.Checksum(b[:60], castagnoli) != binary.LittleEndian.Uint32(b[60:]):
		return store, 0, errors.New("pack header checksum")
	case b[8] != formatVersion:
		return store, 0, fmt.Errorf("pack version %d, known is %d", b[8], formatVersion)
	}
	return [8]byte(b[16:24]), binary.LittleEndian.Uint64(b[24:]), nil
}
