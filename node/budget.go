package node

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/defs-fs/defs/p2p"
)

const (
	// quietTime is how long devices must have asked for nothing before
	// background work goes on: their requests come in rows.
	quietTime = 50 * time.Millisecond
	// yieldMax is how long one step of background work waits for devices at
	// most. Under steady load it goes on at one step in this time, so that a
	// busy pool does not stay damaged.
	yieldMax = time.Second
	// burstBytes is what background work may move at once after a rest.
	burstBytes = 4 << 20
)

// budget bounds what the node moves of its own accord, that is for repair,
// mirrors, moves, audits and scrubbing, and holds it back while devices ask
// for something.
type budget struct {
	limiter *rate.Limiter // bytes

	mu      sync.Mutex // guards what follows
	serving int        // requests of devices under way
	quiet   time.Time  // when the last of them ended
	idle    chan struct{}
	moved   int64 // bytes, since the node was made
}

func newBudget(bytesPerSecond int64) *budget {
	return &budget{limiter: rate.NewLimiter(rate.Limit(bytesPerSecond), burstBytes), idle: make(chan struct{})}
}

// enter notes a request of a device; the caller calls leave when it is answered.
func (b *budget) enter() (leave func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serving++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.serving--; b.serving == 0 {
			b.quiet = time.Now()
			close(b.idle)
			b.idle = make(chan struct{})
		}
	}
}

// spend waits until so many bytes may be moved in the background.
func (b *budget) spend(ctx context.Context, bytes int) error {
	if err := b.yield(ctx); err != nil {
		return err
	}
	return b.charge(ctx, bytes)
}

// charge is spend for what cannot wait for devices: one more loss and data is gone.
func (b *budget) charge(ctx context.Context, bytes int) error {
	for left := bytes; left > 0; left -= burstBytes {
		if err := b.limiter.WaitN(ctx, min(left, burstBytes)); err != nil {
			return err
		}
	}
	b.mu.Lock()
	b.moved += int64(bytes)
	b.mu.Unlock()
	return nil
}

// yield returns when devices have been quiet for a moment, or after yieldMax.
func (b *budget) yield(ctx context.Context) error {
	enough := time.NewTimer(yieldMax)
	defer enough.Stop()
	for {
		b.mu.Lock()
		busy, idle, wait := b.serving > 0, b.idle, quietTime-time.Since(b.quiet)
		b.mu.Unlock()
		if !busy && wait <= 0 {
			return ctx.Err()
		}
		var rested <-chan time.Time
		if !busy {
			rested = time.After(wait)
		}
		select {
		case <-idle:
		case <-rested:
		case <-enough.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// bytesMoved are those that were spent.
func (b *budget) bytesMoved() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.moved
}

// foreground says whether somebody waits for the answer to this peer's
// requests. Nodes ask for themselves.
func foreground(from p2p.Peer) bool { return from.Member.Role != p2p.RoleNode }
