package node

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestBudgetBoundsTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(1 << 20)
		began := time.Now()
		for range 24 { // more than the burst, in pieces below and above it
			if err := b.spend(t.Context(), 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.charge(t.Context(), 40<<20); err != nil {
			t.Fatal(err)
		}
		if took, want := time.Since(began), 60*time.Second; (took - want).Abs() > time.Second {
			t.Errorf("64 MiB took %v, want %v after a burst of 4 MiB", took, want)
		}
		if b.bytesMoved() != 64<<20 {
			t.Errorf("%d bytes counted", b.bytesMoved())
		}
	})
}

// Background work waits while devices ask, goes on as soon as they are quiet,
// and is not kept from going on for ever.
func TestBudgetYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(1 << 30)
		took := func(f func() error) time.Duration {
			t.Helper()
			began := time.Now()
			if err := f(); err != nil {
				t.Fatal(err)
			}
			return time.Since(began)
		}
		spend := func() error { return b.spend(t.Context(), 1) }
		if d := took(spend); d != 0 {
			t.Errorf("with nobody there it waits %v", d)
		}
		leave := b.enter()
		time.AfterFunc(200*time.Millisecond, leave)
		if d := took(spend); d != 200*time.Millisecond+quietTime {
			t.Errorf("it goes on after %v", d)
		}
		defer b.enter()()
		if d := took(spend); d != yieldMax {
			t.Errorf("under steady load it goes on after %v", d)
		}
		if d := took(func() error { return b.charge(t.Context(), 1) }); d != 0 {
			t.Errorf("what cannot wait waits %v", d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := b.spend(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("it is ended with %v", err)
		}
	})
}
