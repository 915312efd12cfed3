package cache_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/defs-fs/defs/cache"
	"github.com/defs-fs/defs/cache/faultfs"
)

const testDir = "/store"

var testKey = [32]byte{1, 2, 3}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func options(disk *faultfs.FS) cache.Options {
	return cache.Options{
		Dir: testDir, Key: testKey, FS: disk, Logger: quiet(),
		SegmentBytes: 64 << 10, MaxJournalBytes: 8 << 20, MaxCleanBytes: 8 << 20,
	}
}

func mustOpen(t testing.TB, o cache.Options) *cache.Store {
	t.Helper()
	s, err := cache.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// record is what the tests remember of one append.
type record struct {
	seq        uint64
	ref        cache.Ref
	meta, data []byte
}

// content makes n bytes that depend on seed.
func content(seed, n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 7})
	rng.Read(b)
	return b
}

// appendRecord appends data with a meta that names it. note is called with the
// record before anything of it is written.
func appendRecord(s *cache.Store, data []byte, note func(record)) (record, error) {
	var sealed *cache.Sealed
	if data != nil {
		var err error
		if sealed, err = s.Seal(data); err != nil {
			return record{}, err
		}
	}
	var r record
	_, err := s.Append(sealed, func(seq uint64, ref cache.Ref) ([]byte, error) {
		meta := binary.BigEndian.AppendUint64([]byte("meta of "), seq)
		r = record{seq, ref, append(meta, data[:min(len(data), 10)]...), data}
		if note != nil {
			note(r)
		}
		return r.meta, nil
	})
	return r, err
}

func mustAppend(t testing.TB, s *cache.Store, data []byte) record {
	t.Helper()
	r, err := appendRecord(s, data, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func mustSync(t testing.TB, s *cache.Store, seq uint64) {
	t.Helper()
	if err := s.Sync(context.Background(), seq); err != nil {
		t.Fatal(err)
	}
}

// verify replays the whole store and reads all data. It returns how many
// records there are; they must be a prefix of want.
func verify(s *cache.Store, after uint64, want []record) error {
	next := after + 1
	err := s.Replay(after, func(seq uint64, meta []byte) error {
		if seq != next {
			return fmt.Errorf("replayed record %d, want %d", seq, next)
		}
		next++
		if int(seq) > len(want) {
			return fmt.Errorf("replayed record %d of %d", seq, len(want))
		}
		if !bytes.Equal(meta, want[seq-1].meta) {
			return fmt.Errorf("record %d: wrong meta", seq)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if s.LastSeq() != next-1 {
		return fmt.Errorf("LastSeq is %d after a replay up to %d", s.LastSeq(), next-1)
	}
	for _, r := range want[after : next-1] {
		if err := readBack(s, r); err != nil {
			return err
		}
	}
	return nil
}

func readBack(s *cache.Store, r record) error {
	got := make([]byte, len(r.data))
	if err := s.ReadAt(r.ref, 0, got); err != nil {
		return fmt.Errorf("record %d: %w", r.seq, err)
	}
	if !bytes.Equal(got, r.data) {
		return fmt.Errorf("record %d: wrong data", r.seq)
	}
	return nil
}

// eventually polls until ok, at most 10 s.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func isCorrupt(err error) bool {
	var where *cache.CorruptError
	return errors.Is(err, cache.ErrCorrupt) && errors.As(err, &where)
}
