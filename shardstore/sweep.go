package shardstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

const sweepMax = 1024 // entries of one kind in one round

// sweeper runs Sweep at intervals.
func (s *Store) sweeper() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.wg.Go(func() {
		<-s.stop
		cancel()
	})
	tick := time.NewTicker(s.opts.SweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := errors.Join(s.Sweep(ctx), s.measureDisk()); err != nil && ctx.Err() == nil {
				s.log.Warn("shard store: sweep failed, tried again later", "err", err)
			}
		case <-s.stop:
			return
		}
	}
}

// Sweep drops provisional shards that are too old and gives the bytes of dead
// records back to the filesystem. The store calls it at intervals.
func (s *Store) Sweep(ctx context.Context) error {
	if err := s.expire(ctx); err != nil {
		return fmt.Errorf("expire provisional shards: %w", err)
	}
	// Uptime goes on when nothing is stored, and only what a record on the
	// device knows to be flushed may be punched: catching up verifies the
	// bytes of all records after that.
	if err := s.markUptime(ctx); err != nil {
		return fmt.Errorf("mark: %w", err)
	}
	for {
		more, err := s.punch()
		if err != nil {
			return fmt.Errorf("punch dead records: %w", err)
		}
		if !more || ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// markUptime marks when something was appended since the last mark or 5 min
// of uptime are not on the device.
func (s *Store) markUptime(ctx context.Context) error {
	s.mu.Lock()
	old := s.uptime() >= s.state.Uptime+300
	if old {
		s.marked = 0
	}
	s.mu.Unlock()
	return s.mark(ctx)
}

func (s *Store) expire(ctx context.Context) error {
	age := uint64(s.opts.ProvisionalAge / time.Second)
	now := s.uptime()
	if now < age {
		return nil
	}
	for {
		var keys []Key
		err := s.scan([]byte{prefixProvisional}, nil, func(key, _ []byte) (bool, error) {
			if binary.BigEndian.Uint64(key[1:]) > now-age {
				return false, nil
			}
			keys = append(keys, decodeKey(key[9:]))
			return len(keys) < sweepMax, nil
		})
		if err != nil || len(keys) == 0 {
			return err
		}
		// A commit may have come in between: look again under the lock.
		_, err = s.onShards(ctx, keys, func(k Key, e shardEntry) *pending {
			if !e.Provisional || e.Uptime > now-age {
				return nil
			}
			p := newPending(kindDrop, &meta{Key: k})
			return &p
		})
		if err != nil {
			return err
		}
		s.log.Info("shard store: dropped shards that were never committed", "count", len(keys))
		if len(keys) < sweepMax {
			return nil
		}
	}
}

// punch gives back one round of dead data.
func (s *Store) punch() (more bool, err error) {
	type due struct {
		key []byte
		deadEntry
	}
	var list []due
	s.mu.Lock()
	marked, failed := s.marked, s.failed
	s.mu.Unlock()
	if failed != nil {
		return false, failed
	}
	now := s.uptime()
	err = s.scan([]byte{prefixDead}, nil, func(key, value []byte) (bool, error) {
		if binary.BigEndian.Uint64(key[1:]) > now {
			return false, nil
		}
		e, err := decodeDeadEntry(value)
		if err != nil {
			return false, err
		}
		if e.Seq < marked {
			list = append(list, due{key: append([]byte(nil), key...), deadEntry: e})
		}
		return len(list) < sweepMax, nil
	})
	if err != nil || len(list) == 0 {
		return false, err
	}
	for _, d := range list {
		if err := s.punchRecord(d.location); err != nil {
			return false, err
		}
	}

	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.mu.Lock()
	state := s.state
	s.mu.Unlock()
	x := &indexer{batch: s.index.NewIndexedBatch(), state: &state}
	for _, d := range list {
		err = errors.Join(err, x.unset(d.key))
		state.UsedBytes -= min(state.UsedBytes, uint64(d.Data))
		if d.Tombstone != nil {
			state.Tombstones -= min(state.Tombstones, 1)
			err = errors.Join(err, x.unset(tombstoneKey(*d.Tombstone)))
		}
	}
	if err = errors.Join(err, x.commit()); err != nil {
		return false, err
	}
	s.mu.Lock()
	s.state = state
	s.mu.Unlock()
	return len(list) == sweepMax, nil
}

func (s *Store) punchRecord(loc location) error {
	if loc.Data == 0 {
		return nil
	}
	f, err := s.files.acquire(loc.Pack)
	if err != nil {
		return err
	}
	defer s.files.release(f)
	return f.Punch(loc.dataOffset(), int64(loc.Data))
}
