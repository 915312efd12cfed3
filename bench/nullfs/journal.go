package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// journalBytesMax is where the file is emptied and begun again: its content is never read.
const journalBytesMax = 1 << 30

// journal is the least that a promise of sealed and durable bytes costs: each write is sealed with AES-256-GCM and
// written to a file by one pwrite, and fsync flushes that file.
type journal struct {
	file    *os.File
	aead    cipher.AEAD
	buffers sync.Pool // of *[]byte

	mu     sync.Mutex // guards offset and count
	offset int64
	count  uint64 // of seals: the nonce
}

func openJournal(path string) (*journal, error) {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &journal{file: file, aead: aead, buffers: sync.Pool{New: func() any { return new([]byte) }}}, nil
}

func (j *journal) append(data []byte) error {
	sealedBytes := int64(len(data) + j.aead.Overhead())
	offset, count, err := j.reserve(sealedBytes)
	if err != nil {
		return err
	}
	var nonce [12]byte
	binary.BigEndian.PutUint64(nonce[4:], count)
	buffer := j.buffers.Get().(*[]byte)
	defer j.buffers.Put(buffer)
	*buffer = j.aead.Seal((*buffer)[:0], nonce[:], data, nil)
	_, err = j.file.WriteAt(*buffer, offset)
	return err
}

func (j *journal) reserve(sealedBytes int64) (offset int64, count uint64, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.offset+sealedBytes > journalBytesMax {
		if err := j.file.Truncate(0); err != nil {
			return 0, 0, err
		}
		j.offset = 0
	}
	offset = j.offset
	j.offset += sealedBytes
	j.count++
	return offset, j.count, nil
}

func (j *journal) sync() error { return unix.Fdatasync(int(j.file.Fd())) }
