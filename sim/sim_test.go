package sim_test

import (
	"errors"
	"os"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/sim"
)

func policy(t testing.TB, text string) erasure.Policy {
	t.Helper()
	p, err := erasure.ParsePolicy(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// seed is fixed, or DEFS_SIM_SEED; a failing test prints it.
func seed(t testing.TB) uint64 {
	t.Helper()
	s := uint64(1)
	if text := os.Getenv("DEFS_SIM_SEED"); text != "" {
		var err error
		if s, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("DEFS_SIM_SEED=%d", s)
	return s
}

// A slice of what sim/durability does at length: pools in which so much is lost
// that the Markov model can be wrong about it.
func TestLossesAndTrafficAreTheModels(t *testing.T) {
	for _, c := range []struct {
		policy string
		repair time.Duration
	}{{"4+2,mirror=off", 4 * sim.Day}, {"2+1,mirror=on", 10 * sim.Day}} {
		o := sim.Options{
			Seed: seed(t), Nodes: 250, Stripes: 1000, Duration: sim.Year / 2, Policy: policy(t, c.policy),
			Life: 60 * sim.Day, Absent: time.Hour, CopyAfter: 2 * time.Hour, DeadAfter: 2 * time.Hour,
			CopyTime: c.repair, RebuildTime: c.repair,
		}
		r, err := sim.Compare(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d lost, model %.1f; %.1f shards moved, model %.1f", c.policy, r.Lost, r.Expected, r.Traffic, r.Predicted)
		if losses, traffic := r.Agrees(); !losses || !traffic || r.Lost < 20 {
			t.Errorf("%s: %+v", c.policy, r)
		}
		// A model that is off by a factor of two is told apart.
		wrong := r
		if wrong.Expected *= 2; wrong.Expected > wrong.High {
			continue
		}
		t.Errorf("%s: the interval up to %.1f does not exclude %.1f", c.policy, r.High, wrong.Expected)
	}
}

func faulty(t *testing.T) sim.Options {
	return sim.Options{
		Seed: seed(t), Nodes: 120, Hosts: 60, Subnets: 20, Zones: 5, Stripes: 300, Duration: 60 * sim.Day,
		Policy: policy(t, "4+2"), Life: 90 * sim.Day, Absent: time.Minute,
		Faults: []sim.Fault{
			{Kind: sim.Slow, At: 2 * sim.Day, Nodes: 10},
			{Kind: sim.Lying, At: 4 * sim.Day, Nodes: 5},
			{Kind: sim.Crash, At: 20 * sim.Day, Nodes: 4},
			{Kind: sim.Partition, At: 25 * sim.Day, Nodes: 20, For: 10 * time.Hour},
			{Kind: sim.SubnetCut, At: 30 * sim.Day, For: 5 * time.Hour},
			{Kind: sim.HostLoss, At: 35 * sim.Day},
			{Kind: sim.ZoneLoss, At: 40 * sim.Day},
		},
	}
}

// Every kind of fault hits, nothing is lost, and all stripes are whole at the
// end but those that the last hours' churn has hit.
func TestFaults(t *testing.T) {
	r, err := sim.Run(faulty(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	if r.Lost > 0 || r.FoundLying == 0 || r.Copies == 0 || r.Rebuilds == 0 || r.Cancelled == 0 {
		t.Errorf("%+v", r)
	}
	if r.Unhealthy > 20 {
		t.Errorf("%d of %d stripes are not whole", r.Unhealthy, r.Stripes)
	}
}

func TestSameSeedSameResult(t *testing.T) {
	a, errA := sim.Run(faulty(t))
	b, errB := sim.Run(faulty(t))
	if errA != nil || errB != nil || !reflect.DeepEqual(a, b) {
		t.Errorf("%+v %v\n%+v %v", a, errA, b, errB)
	}
	o := faulty(t)
	o.Seed++
	if c, _ := sim.Run(o); reflect.DeepEqual(a.Moved, c.Moved) {
		t.Error("another seed gives the same traffic")
	}
}

func TestAFaultThatNeverFiresIsAnError(t *testing.T) {
	o := faulty(t)
	o.Faults = []sim.Fault{{Kind: sim.Crash, At: sim.Day, Nodes: 0}}
	if _, err := sim.Run(o); !errors.Is(err, sim.ErrNeverFired) {
		t.Errorf("%v", err)
	}
	o.Faults[0].At = sim.Year
	if _, err := sim.Run(o); err == nil {
		t.Error("a fault after the end is accepted")
	}
}

// A zone is lost: stripes that are spread over zones survive, the same pool
// without zones known loses some.
func TestZonesAreWorthKnowing(t *testing.T) {
	o := sim.Options{
		Seed: seed(t), Nodes: 120, Hosts: 120, Subnets: 120, Zones: 6, Stripes: 1000, Duration: 10 * sim.Day,
		Policy: policy(t, "4+2,mirror=off"), Life: 100 * sim.Year,
		Faults: []sim.Fault{{Kind: sim.ZoneLoss, At: sim.Day}},
	}
	known, err := sim.Run(o)
	if err != nil || known.Lost > 0 {
		t.Errorf("%+v, %v", known, err)
	}
	o.Zones = 1
	o.Faults = []sim.Fault{{Kind: sim.Crash, At: sim.Day, Nodes: 20}}
	unknown, err := sim.Run(o)
	if err != nil || unknown.Lost < 10 {
		t.Errorf("%+v, %v", unknown, err)
	}
}
