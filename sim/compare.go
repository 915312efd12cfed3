package sim

import (
	"math"

	"gonum.org/v1/gonum/stat/distuv"
)

// Comparison sets what was simulated beside what the Markov model predicts.
type Comparison struct {
	Result
	Expected  float64 // stripes lost, by the model
	Low, High float64 // the model has to lie here: the confidence interval of what Lost is a sample of
	Traffic   float64 // shards moved for a stripe, simulated
	Predicted float64 // the same by the model
}

// Confidence of the interval of Compare, and how far traffic may be off.
const (
	Confidence    = 0.99
	TrafficOffMax = 0.15
)

// Compare runs a simulation and its Markov model.
func Compare(o Options) (Comparison, error) {
	chain, err := o.Chain()
	if err != nil {
		return Comparison{}, err
	}
	o.EnsureDefaults()
	c := Comparison{Expected: chain.Loss(o.Duration) * float64(o.Stripes)}
	if c.Predicted, err = o.Traffic(); err != nil {
		return Comparison{}, err
	}
	if c.Result, err = Run(o); err != nil {
		return Comparison{}, err
	}
	c.Low, c.High = interval(c.Result, Confidence)
	c.Traffic = float64(c.Moved) / float64(o.Stripes)
	return c, nil
}

// Agrees reports whether losses and traffic are those of the model.
func (c Comparison) Agrees() (losses, traffic bool) {
	return c.Low <= c.Expected && c.Expected <= c.High, math.Abs(c.Traffic/c.Predicted-1) <= TrafficOffMax
}

// interval is where the mean of Lost lies with that confidence. Two things vary:
// which stripes the deaths hit, and how many deaths there are, which all
// stripes share; losses grow with the power m+1 of it, 2(m+1) with mirrors:
//
//	Lost · exp(±z √(1/Lost + (m+1)²/Deaths))
func interval(r Result, confidence float64) (low, high float64) {
	if r.Lost == 0 {
		return 0, -math.Log(1 - confidence)
	}
	power := float64(r.M + 1)
	if r.Mirrored {
		power *= 2
	}
	z := distuv.UnitNormal.Quantile(1 - (1-confidence)/2)
	spread := math.Exp(z * math.Sqrt(1/float64(r.Lost)+power*power/float64(r.Deaths)))
	return float64(r.Lost) / spread, float64(r.Lost) * spread
}
