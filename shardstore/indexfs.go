package shardstore

import (
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// indexRetry is how long the index rests after a failed write.
const indexRetry = time.Second

// indexFS is the file system of the index. Pebble tries a failed flush again at
// once and without end; here it rests before it makes the next file. A disk
// that was full is written to again when there is room: the tables are new, and
// what never gets into one is caught up with from the packs.
type indexFS struct {
	vfs.FS
	log     *slog.Logger
	failing atomic.Bool   // the last write has failed
	failed  chan error    // one slot: a write has failed
	broken  chan error    // one slot: the index can be written no more
	stop    chan struct{} // closed when the store closes: no more rest
}

func newIndexFS(log *slog.Logger, stop chan struct{}) *indexFS {
	return &indexFS{FS: vfs.Default, log: log, failed: make(chan error, 1), broken: make(chan error, 1), stop: stop}
}

func (f *indexFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if f.failing.Swap(false) {
		rest := time.NewTimer(indexRetry)
		defer rest.Stop()
		select {
		case <-rest.C:
		case <-f.stop:
		}
	}
	return f.FS.Create(name, category)
}

// fail takes note. It is called under locks of Pebble.
func (f *indexFS) fail(err error) {
	f.log.Warn("shard index: a write failed; the disk may be full", "err", err, "next_try", indexRetry)
	f.failing.Store(true)
	select {
	case f.failed <- err:
	default:
	}
}

func openIndex(dir string, cacheBytes int64, fs *indexFS) (*pebble.DB, error) {
	cache := pebble.NewCache(cacheBytes)
	defer cache.Unref()
	opts := &pebble.Options{
		FS:                 fs,
		Cache:              cache,
		MemTableSize:       4 << 20,
		DisableWAL:         true, // the packs are the log
		FormatMajorVersion: pebble.FormatNewest,
		Logger:             pebbleLogger{fs},
		EventListener:      &pebble.EventListener{BackgroundError: fs.fail},
	}
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	return pebble.Open(dir, opts)
}

// flushIndex writes the index out, or returns why that cannot be done now.
func (s *Store) flushIndex() error {
	select {
	case <-s.indexFS.failed: // of an earlier try
	default:
	}
	done, err := s.index.AsyncFlush()
	if err != nil {
		return err
	}
	select {
	case <-done:
		return nil
	case err := <-s.indexFS.failed:
		return fmt.Errorf("flush shard index: %w", err)
	}
}

// pebbleLogger keeps Pebble's chatter out of the log and never exits.
type pebbleLogger struct{ fs *indexFS }

func (pebbleLogger) Infof(string, ...any) {}
func (l pebbleLogger) Errorf(format string, args ...any) {
	l.fs.log.Error("shard index", "event", fmt.Sprintf(format, args...))
}

// Fatalf is called when Pebble cannot tell what is on the disk. It goes on with
// an error then.
func (l pebbleLogger) Fatalf(format string, args ...any) {
	err := fmt.Errorf("shard index: "+format, args...)
	l.fs.fail(err)
	select {
	case l.fs.broken <- err:
	default:
	}
}
