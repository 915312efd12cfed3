package sim

import (
	"math"
	"time"
)

// Chain is the Markov model of one stripe.
//
// Without mirrors its states are the number i of shards that are lost: a
// further one is lost at rate (n-i)λ, each lost one is rebuilt at rate μ, where
// 1/μ is Urgent if at most k+1 shards are healthy and Rebuild otherwise; at
// i = m+1 the stripe is lost. For λ ≪ μ that is
//
//	P ≈ C(n, m+1) (m+1) (τ/MTTF)^m T/MTTF
//
// With mirrors a state is (a, b): a shards with one copy, b without. Whole pairs
// lose a copy at rate 2λ(n-a-b), a single copy is lost at rate λa and copied at
// rate a/Copy, and each lost shard is rebuilt, mirror included, at rate μ; at
// b = m+1 the stripe is lost. For λ ≪ μ:
//
//	P ≈ C(n, m+1) (m+1) (2λ²τ_copy)^(m+1) τ_rebuild^m T
type Chain struct {
	K, M     int
	Mirrored bool
	Life     time.Duration // mean lifetime of a node, 1/λ
	Copy     time.Duration // mean time from the loss of one copy to the new one
	Rebuild  time.Duration // mean time from the loss of a shard to the new one
	Urgent   time.Duration // the same where at most k+1 shards are healthy
}

type state struct{ single, lost int }

// flow is a transition with its rate per hour and the shards that it moves.
type flow struct {
	from, to int
	rate     float64
	moved    float64
}

// flows lists the transitions between states; the last state is the loss.
func (c Chain) flows() (flows []flow, states int) {
	n := c.K + c.M
	var all []state
	index := map[state]int{}
	for lost := range c.M + 1 {
		for single := 0; single <= n-lost && (single == 0 || c.Mirrored); single++ {
			index[state{single, lost}] = len(all)
			all = append(all, state{single, lost})
		}
	}
	gone := len(all)
	lambda := 1 / c.Life.Hours()
	add := func(from state, to state, rate, moved float64) {
		target, ok := index[to]
		if !ok {
			target = gone
		}
		if rate > 0 {
			flows = append(flows, flow{index[from], target, rate, moved})
		}
	}
	for _, s := range all {
		whole := float64(n - s.single - s.lost)
		rebuild := c.Rebuild
		if n-s.lost <= c.K+1 {
			rebuild = c.Urgent
		}
		if c.Mirrored {
			add(s, state{s.single + 1, s.lost}, 2*lambda*whole, 0)
			add(s, state{s.single - 1, s.lost + 1}, lambda*float64(s.single), 0)
			add(s, state{s.single - 1, s.lost}, float64(s.single)/c.Copy.Hours(), 1)
			add(s, state{s.single, s.lost - 1}, float64(s.lost)/rebuild.Hours(), float64(c.K+2))
		} else {
			add(s, state{0, s.lost + 1}, lambda*whole, 0)
			add(s, state{0, s.lost - 1}, float64(s.lost)/rebuild.Hours(), float64(c.K+1))
		}
	}
	return flows, gone + 1
}

// matrix holds the probabilities of going from one state to another.
type matrix [][]float64

func newMatrix(size int) matrix {
	m := make(matrix, size)
	for i := range m {
		m[i] = make([]float64, size)
	}
	return m
}

func (m matrix) times(other matrix) matrix {
	product := newMatrix(len(m))
	for i, row := range m {
		for j, x := range row {
			if x == 0 {
				continue
			}
			for l, y := range other[j] {
				product[i][l] += x * y
			}
		}
	}
	return product
}

// transition returns exp(Qt), of nonnegative terms only, so that tiny
// probabilities keep their digits: a Taylor series of a short step of the
// uniformized chain, squared until the step is t.
func (c Chain) transition(t time.Duration) matrix {
	flows, size := c.flows()
	fastest := 0.0
	out := make([]float64, size)
	for _, f := range flows {
		out[f.from] += f.rate
		fastest = max(fastest, out[f.from])
	}
	jump := newMatrix(size)
	for i := range size {
		jump[i][i] = 1 - out[i]/fastest
	}
	for _, f := range flows {
		jump[f.from][f.to] += f.rate / fastest
	}
	squarings := max(0, int(math.Ceil(math.Log2(2*fastest*t.Hours()))))
	step := fastest * t.Hours() / math.Exp2(float64(squarings)) // at most 1/2
	sum, power := newMatrix(size), newMatrix(size)
	for i := range size {
		power[i][i] = 1
	}
	weight := math.Exp(-step)
	for term := 1; weight > 1e-40; term++ {
		for i := range size {
			for j := range size {
				sum[i][j] += weight * power[i][j]
			}
		}
		power = power.times(jump)
		weight *= step / float64(term)
	}
	for range squarings {
		sum = sum.times(sum)
	}
	return sum
}

// Loss returns the probability that a stripe, whole at first, is lost within t.
func (c Chain) Loss(t time.Duration) float64 {
	p := c.transition(t)
	return p[0][len(p)-1]
}

// Traffic returns the number of shards that repair moves for a stripe within t:
// one for a copy, k+1 for a rebuilt shard, k+2 where it gets a mirror. It takes
// the mean over the states at 64 times.
func (c Chain) Traffic(t time.Duration) float64 {
	const steps = 64
	flows, size := c.flows()
	p := c.transition(t / steps)
	now := make([]float64, size)
	now[0] = 1
	total := 0.0
	for range steps {
		next := make([]float64, size)
		for i, x := range now {
			for j, y := range p[i] {
				next[j] += x * y
			}
		}
		for _, f := range flows {
			total += next[f.from] * f.rate * f.moved * (t / steps).Hours()
		}
		now = next
	}
	return total
}

// LossApproximately is the closed form in the comment of Chain, with Rebuild
// for every rebuild.
func (c Chain) LossApproximately(t time.Duration) float64 {
	n, m := c.K+c.M, c.M
	ways := float64(m + 1)
	for i := 1; i <= m+1; i++ {
		ways *= float64(n+1-i) / float64(i)
	}
	lambda, rebuild := 1/c.Life.Hours(), c.Rebuild.Hours()
	if c.Mirrored {
		return ways * math.Pow(2*lambda*lambda*c.Copy.Hours(), float64(m+1)) * math.Pow(rebuild, float64(m)) * t.Hours()
	}
	return ways * math.Pow(lambda*rebuild, float64(m)) * lambda * t.Hours()
}
