package sim_test

import (
	"math"
	"testing"
	"time"

	"github.com/defs-fs/defs/sim"
)

func chain(k, m int, mirrored bool, lifeDays, repairDays int) sim.Chain {
	repair := time.Duration(repairDays) * sim.Day
	return sim.Chain{K: k, M: m, Mirrored: mirrored, Life: time.Duration(lifeDays) * sim.Day, Copy: repair, Rebuild: repair, Urgent: repair}
}

// Values that another program has computed from the same chains, for a year of
// 365.25 days.
func TestChainLoss(t *testing.T) {
	for _, c := range []struct {
		chain sim.Chain
		want  float64
	}{
		{chain(4, 2, false, 30, 1), .4619},
		{chain(10, 4, false, 30, 1), .0827},
		{chain(4, 2, false, 90, 1), .0270},
		{chain(10, 4, false, 90, 3), .0281},
		{chain(10, 4, true, 30, 7), .1733},
		{chain(4, 2, true, 30, 7), .3889},
	} {
		if got := c.chain.Loss(8766 * time.Hour); math.Abs(got-c.want) > 6e-5 {
			t.Errorf("%+v: %.4f, want %.4f", c.chain, got, c.want)
		}
	}
}

// Where repairs are much faster than losses the closed form holds, down to
// probabilities that a subtraction from one would lose.
func TestChainMeetsTheClosedForm(t *testing.T) {
	for _, c := range []sim.Chain{chain(4, 2, false, 3650, 1), chain(10, 4, false, 3650, 1), chain(4, 2, true, 3650, 1), chain(10, 4, true, 3650, 1)} {
		got, want := c.Loss(sim.Year), c.LossApproximately(sim.Year)
		if ratio := got / want; !(ratio > .97 && ratio < 1.03) {
			t.Errorf("%+v: %.3g, closed form %.3g", c, got, want)
		}
	}
}

func TestChainTraffic(t *testing.T) {
	// Each of 6 shards is lost every 100 days and costs 4+1; mirrored, each of
	// 12 copies costs 1.
	for _, c := range []struct {
		chain sim.Chain
		want  float64
	}{{chain(4, 2, false, 100, 1), 6 * 3.65 * 5}, {chain(4, 2, true, 100, 1), 12 * 3.65}} {
		c.chain.Copy, c.chain.Rebuild, c.chain.Urgent = time.Hour, time.Hour, time.Hour
		if got := c.chain.Traffic(sim.Year); math.Abs(got/c.want-1) > .01 {
			t.Errorf("%+v: %.1f shards, want %.1f", c.chain, got, c.want)
		}
	}
}
