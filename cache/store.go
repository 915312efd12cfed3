package cache

import (
	"context"
	"log/slog"
)

// Options of a Store. Zero fields take the defaults of EnsureDefaults.
type Options struct {
	Dir             string   // holds the store's files and nothing else; created if missing
	Key             [32]byte // device key; subkeys are derived from it
	SegmentBytes    int64    // size of a preallocated segment; default 64 MiB
	MaxJournalBytes int64    // cap of dirty bytes (WaitRoom); default 8 GiB
	MaxCleanBytes   int64    // cap of clean bytes on disk; default 8 GiB
	MaxMemoryBytes  int64    // cap of fetched slices kept in memory; default 64 MiB
	Logger          *slog.Logger
	FS              FS // default: the operating system's
}

// Ref says where a run of data lies. It is stored in extents and stays valid
// until the segment is evicted.
type Ref struct {
	Segment uint64
	Offset  uint32 // of the first sealed data block in the segment file
	Length  uint32 // plaintext bytes
	Nonce   uint64 // nonce counter of the first block
}

// State of a segment.
type State uint8

const (
	Dirty State = iota // pinned: the only copy of something
	Clean              // evictable: everything in it is published and placed
)

// SegmentInfo describes one segment on disk.
type SegmentInfo struct {
	ID                uint64
	FirstSeq, LastSeq uint64 // records in it; LastSeq may be an upper bound for segments of earlier opens
	Bytes             int64
	State             State
	Active            bool // still takes appends; call Rotate before MarkClean
}

// Stats of a store at one moment.
type Stats struct {
	JournalBytes, JournalMaxBytes int64 // dirty segments
	CleanBytes, CleanMaxBytes     int64 // clean segments and fetched slices on disk
	MemoryBytes                   int64 // fetched slices in memory
	LastSeq, DurableSeq           uint64
}

type Store struct{}
type Sealed struct{}

func (o *Options) EnsureDefaults()                                                 {}
func (o *Options) Validate() error                                                 { return nil }
func Open(o Options) (*Store, error)                                               { return nil, ErrClosed }
func (s *Store) Close() error                                                      { return ErrClosed }
func (s *Store) LastSeq() uint64                                                   { return 0 }
func (s *Store) Durable() uint64                                                   { return 0 }
func (s *Store) Replay(after uint64, fn func(seq uint64, meta []byte) error) error { return ErrClosed }
func (s *Store) Seal(data []byte) (*Sealed, error)                                 { return nil, ErrClosed }
func (s *Store) Append(sd *Sealed, build func(seq uint64, ref Ref) (meta []byte, err error)) (seq uint64, err error) {
	return 0, ErrClosed
}
func (s *Store) Sync(ctx context.Context, seq uint64) error                       { return ErrClosed }
func (s *Store) ReadAt(ref Ref, off int, dst []byte) error                        { return ErrClosed }
func (s *Store) Segments() []SegmentInfo                                          { return nil }
func (s *Store) Rotate() error                                                    { return ErrClosed }
func (s *Store) MarkClean(id uint64) error                                        { return ErrClosed }
func (s *Store) PutSlice(stripe [16]byte, slice uint32, sealed []byte)            {}
func (s *Store) GetSlice(stripe [16]byte, slice uint32, off int, dst []byte) bool { return false }
func (s *Store) DropClean() (bytes int64, err error)                              { return 0, ErrClosed }
func (s *Store) Stats() Stats                                                     { return Stats{} }
func (s *Store) WaitRoom(ctx context.Context, n int64) error                      { return ErrClosed }
