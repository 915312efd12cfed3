package cache

import (
	"crypto/cipher"
	"fmt"
	"sync"
	"sync/atomic"
)

// session is one open of the store: one random key, one nonce counter. All
// segments that an open creates share its key; a counter value is used once.
type session struct {
	key     [32]byte
	aead    cipher.AEAD
	counter atomic.Uint64
}

// take reserves n consecutive counter values and returns the first.
func (s *session) take(n int) uint64 { return s.counter.Add(uint64(n)) - uint64(n) }

// Sealed is data that is ready to be appended. It belongs to the Store that
// made it and is used up by Append.
type Sealed struct {
	buf    *[]byte // pooled; sealed blocks one after the other
	length int     // plaintext bytes
	nonce  uint64  // counter of the first block
}

// Seal encrypts data for Append, in blocks of 16 KiB, and keeps no part of it.
// It takes no lock: callers seal in parallel and append in order. len(data) is
// at most MaxDataBytes.
func (s *Store) Seal(data []byte) (*Sealed, error) {
	if len(data) > MaxDataBytes {
		return nil, fmt.Errorf("cache: seal %d bytes: %w: at most %d", len(data), ErrTooLarge, MaxDataBytes)
	}
	blocks := (len(data) + blockBytes - 1) / blockBytes
	sd := &Sealed{buf: s.buffers.get(int(sealedBytes(len(data)))), length: len(data), nonce: s.session.take(blocks)}
	out := (*sd.buf)[:0]
	var name blockName
	for i := range blocks {
		plain := data[i*blockBytes : min((i+1)*blockBytes, len(data))]
		name.set(sd.nonce, uint32(len(data)), i)
		out = s.session.aead.Seal(out, name.nonce[:], plain, name.aad[:])
	}
	*sd.buf = out
	return sd, nil
}

// bufferClasses fit the sealed form of common writes (4 KiB, 128 KiB, 1 MiB)
// and the scratch of reads (one block, 1 MiB).
var bufferClasses = [...]int{8 << 10, 34 << 10, 160 << 10, 1<<20 + 18<<10}

// buffers lends byte slices by size class. Larger ones are not kept.
type buffers struct {
	pools [len(bufferClasses)]sync.Pool
}

// get returns a buffer of length n.
func (b *buffers) get(n int) *[]byte {
	for i, size := range bufferClasses {
		if n <= size {
			buf, ok := b.pools[i].Get().(*[]byte)
			if !ok {
				made := make([]byte, size)
				buf = &made
			}
			*buf = (*buf)[:n]
			return buf
		}
	}
	buf := make([]byte, n)
	return &buf
}

func (b *buffers) put(buf *[]byte) {
	for i, size := range bufferClasses {
		if cap(*buf) == size {
			b.pools[i].Put(buf)
			return
		}
	}
}
