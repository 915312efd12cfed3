package volume

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// TestOneSilentHolder finds Status, WaitDurable, FileState and the inspection of one
// mind about bytes that were durable before a node became silent, and says why.
func TestOneSilentHolder(t *testing.T) {
	pool := newTestPool(t, 7)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	data := random(1 << 20)
	ino := v.put(t, "file", data)
	wait(t, v.Volume)
	holder := func() (id string, stripe [16]byte) {
		if err := v.Stripes(func(s [16]byte) bool {
			info, err := v.db.Stripe(s)
			if err != nil {
				t.Fatal(err)
			}
			id, stripe = info.Holders[0].Primary, s
			return false
		}); err != nil {
			t.Fatal(err)
		}
		return id, stripe
	}
	agree := func(durable bool, health, reason string) {
		t.Helper()
		s, err := v.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(s.Shortfalls, "; "); (s.Durable == int64(len(data))) != durable || s.Durable+s.Recoverable != int64(len(data)) ||
			(s.Degraded+s.Unreachable == 0) != durable || (got == "") != durable || !strings.Contains(got, reason) {
			t.Errorf("status %+v, want durable %v, %q", s, durable, reason)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if err := v.WaitDurable(ctx, nil); (err == nil) != durable || err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait: %v, want durable %v", err, durable)
		}
		if state, err := v.FileState(t.Context(), ino); err != nil || (state == StateDurable) != durable || state == StateJournaled || state == StateQueued {
			t.Errorf("state %s, %v, want durable %v", state, err, durable)
		}
		_, stripe := holder()
		if view, err := v.InspectStripe(t.Context(), stripe); err != nil || view.Health != health || !strings.Contains(view.Reason, reason) {
			t.Errorf("stripe %s, %q, %v; want %s, %q", view.Health, view.Reason, err, health, reason)
		}
	}
	agree(true, HealthWhole, "")
	id, _ := holder()
	for _, node := range pool.ids {
		if string(node) == id {
			pool.net.Kill(node)
			defer pool.net.Restart(node)
		}
	}
	agree(false, HealthDegraded, "a holder that is silent")
	for _, node := range pool.ids {
		pool.net.Kill(node)
		defer pool.net.Restart(node)
	}
	if _, err := v.DropCache(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	agree(false, HealthUnreachable, "silent")
	v.reopen(t, pool) // knows nothing but what it has kept
	agree(false, HealthUnreachable, "silent")
	for _, node := range pool.ids {
		pool.net.Restart(node)
	}
	agree(true, HealthWhole, "")
}
