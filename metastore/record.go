package metastore

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// recordVersion opens every journal record. FORMAT.md, "Metastore records".
const recordVersion = 1

// RecordBytesMax bounds an encoded record.
const RecordBytesMax = 32 << 20

type op uint8

const (
	opPut           op = 1 // key, value
	opDelete        op = 2 // key
	opSetGeneration op = 3 // generation
	opDropTouched   op = 4 // generation
)

// mutation is one change. For the two generation changes key only serves to
// find the mutation in its Txn and is not encoded.
type mutation struct {
	op         op
	key, value []byte
	generation uint64
}

func (m mutation) validate() error {
	switch m.op {
	case opPut, opDelete:
		switch {
		case len(m.key) == 0 || len(m.key) > KeyBytesMax:
			return fmt.Errorf("change of a key of %d bytes (1 to %d allowed)", len(m.key), KeyBytesMax)
		case !IsTreeKey(m.key) && !isLocalKey(m.key):
			return fmt.Errorf("change of a key of unknown kind %#x", m.key[0])
		case len(m.value) > ValueBytesMax:
			return fmt.Errorf("change to a value of %d bytes (at most %d allowed)", len(m.value), ValueBytesMax)
		case bytes.Equal(m.key, keyApplied) || bytes.Equal(m.key, keySchema) || bytes.Equal(m.key, keyGeneration):
			return fmt.Errorf("change of a key that the metastore keeps itself")
		}
	case opSetGeneration, opDropTouched:
		// Any number is a generation; the last one has no successor to end its
		// range of keys.
		if m.generation == 1<<64-1 {
			return fmt.Errorf("generation %d out of range", m.generation)
		}
	default:
		return fmt.Errorf("unknown change %d", m.op)
	}
	return nil
}

// Record returns the Txn as a journal record, owned by the caller:
//
//	version u8 | Lamport time u64 | count u32 | count × change
//
// It panics when Err is not nil or the record exceeds RecordBytesMax: such a
// record must never reach the journal.
func (t *Txn) Record() []byte {
	if t.err != nil {
		panic(fmt.Sprintf("metastore: record of a failed transaction: %v", t.err))
	}
	b := appendRecord(nil, t.Lamport, t.mutations)
	if len(b) > RecordBytesMax {
		panic(fmt.Sprintf("metastore: record of %d bytes exceeds %d", len(b), RecordBytesMax))
	}
	return b
}

// Bytes returns the size of the record that Record would return. Callers that
// build large transactions start a new one well before RecordBytesMax.
func (t *Txn) Bytes() int { return recordBytes(t.mutations) }

const recordHeaderBytes = 1 + 8 + 4

func recordBytes(mutations []mutation) int {
	n := recordHeaderBytes
	for _, m := range mutations {
		switch m.op {
		case opPut:
			n += 1 + 2 + len(m.key) + 4 + len(m.value)
		case opDelete:
			n += 1 + 2 + len(m.key)
		default:
			n += 1 + 8
		}
	}
	return n
}

func appendRecord(b []byte, lamport uint64, mutations []mutation) []byte {
	if b == nil {
		b = make([]byte, 0, recordBytes(mutations))
	}
	b = append(b, recordVersion)
	b = binary.BigEndian.AppendUint64(b, lamport)
	b = binary.BigEndian.AppendUint32(b, uint32(len(mutations)))
	for _, m := range mutations {
		b = append(b, byte(m.op))
		switch m.op {
		case opPut, opDelete:
			b = binary.BigEndian.AppendUint16(b, uint16(len(m.key)))
			b = append(b, m.key...)
			if m.op == opPut {
				b = binary.BigEndian.AppendUint32(b, uint32(len(m.value)))
				b = append(b, m.value...)
			}
		default:
			b = binary.BigEndian.AppendUint64(b, m.generation)
		}
	}
	return b
}

// decodeRecord calls fn for each change, after which key and value stay
// slices of record. It checks bounds before use and never allocates by a
// length that the record claims.
func decodeRecord(record []byte, fn func(lamport uint64, m mutation) error) error {
	if len(record) > RecordBytesMax {
		return fmt.Errorf("decode record of %d bytes: %w", len(record), ErrCorrupt)
	}
	d := decoder{b: record}
	d.require(d.u8() == recordVersion)
	lamport, count := d.u64(), d.u32()
	for i := uint32(0); i < count && !d.bad; i++ {
		m := mutation{op: op(d.u8())}
		switch m.op {
		case opPut:
			m.key = d.take(int(d.u16()))
			m.value = d.take(int(d.u32()))
		case opDelete:
			m.key = d.take(int(d.u16()))
		default:
			m.generation = d.u64()
		}
		if d.bad {
			break
		}
		if err := m.validate(); err != nil {
			return fmt.Errorf("decode record, change %d: %w: %w", i, err, ErrCorrupt)
		}
		if err := fn(lamport, m); err != nil {
			return err
		}
	}
	return d.end("record")
}
