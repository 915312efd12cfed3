package erasure

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Mode says how a stripe's K and M are found.
type Mode string

// The modes of a policy.
const (
	ModeFile    Mode = "file"     // K = 1; a stripe holds one file's data alone
	ModeSlice   Mode = "slice"    // K = 1; stripes are packed with slices of any file
	ModeRSSize  Mode = "rs-size"  // K from the data's size and a fixed shard size, up to the policy's K
	ModeRSRatio Mode = "rs-ratio" // K and M as given
	ModeAuto    Mode = "auto"     // K and M from the live pool and a durability target
)

// Mirror says whether every shard is also kept by a second node.
type Mirror string

// The mirror settings of a policy.
const (
	MirrorAuto Mirror = "auto" // when at least 2n + 2 nodes live
	MirrorOn   Mirror = "on"
	MirrorOff  Mirror = "off"
)

// Policy says how data is coded. The zero value means "auto".
type Policy struct {
	Mode       Mode
	K, M       int // both 0 in auto: from the live pool
	Mirror     Mirror
	ShardBytes int // of full stripes; one of ShardSizes
}

const policyTextMax = 256

// ParsePolicy reads MODE[:K+M][,mirror=auto|on|off][,shard=SIZE]. "4+2" alone
// means rs-ratio:4+2, "mirror=off" alone auto,mirror=off, and the empty text
// auto; SIZE is as in "64KiB". What is left out takes the default of
// EnsureDefaults. The error lists every violation.
func ParsePolicy(text string) (Policy, error) {
	var p Policy
	if text == "" {
		p.EnsureDefaults()
		return p, nil
	}
	if len(text) > policyTextMax {
		return p, invalid("policy", []string{fmt.Sprintf("text of %d bytes, at most %d are allowed", len(text), policyTextMax)})
	}
	var violations []string
	seen := map[string]bool{}
	for i, part := range strings.Split(text, ",") {
		part = strings.TrimSpace(part)
		key, value, isOption := strings.Cut(part, "=")
		if !isOption && i > 0 {
			violations = append(violations, fmt.Sprintf("%q is not NAME=VALUE", part))
			continue
		}
		if isOption && seen[key] {
			violations = append(violations, fmt.Sprintf("%s is given twice", key))
		}
		seen[key] = isOption
		var err error
		switch {
		case !isOption:
			p.Mode, p.K, p.M, err = parseMode(part)
		case key == "mirror":
			p.Mirror = Mirror(value)
		case key == "shard":
			p.ShardBytes, err = parseShardBytes(value)
		default:
			err = fmt.Errorf("unknown setting %q, want mirror or shard", key)
		}
		if err != nil {
			violations = append(violations, err.Error())
		}
	}
	p.EnsureDefaults()
	violations = append(violations, p.violations()...)
	if err := invalid(fmt.Sprintf("policy %q", text), violations); err != nil {
		return Policy{}, err
	}
	return p, nil
}

// parseMode reads MODE, MODE:K+M or K+M.
func parseMode(text string) (mode Mode, k, m int, err error) {
	name, counts, hasCounts := strings.Cut(text, ":")
	if !hasCounts && strings.Contains(name, "+") {
		name, counts, hasCounts = string(ModeRSRatio), name, true
	}
	if name == "" {
		return ModeRSRatio, 1, 1, fmt.Errorf("no mode in %q, want one as in rs-ratio:4+2 or auto", text)
	}
	mode = Mode(name)
	if !hasCounts {
		return mode, 0, 0, nil
	}
	before, after, _ := strings.Cut(counts, "+")
	k, errK := parseCount(before)
	m, errM := parseCount(after)
	if errK != nil || errM != nil {
		// 1+1 satisfies every mode, so that no second violation hides this one.
		return mode, 1, 1, fmt.Errorf("%q is not K+M as in 4+2, each 1 to %d", counts, shardsMax)
	}
	return mode, k, m, nil
}

func parseCount(text string) (int, error) {
	count, err := strconv.ParseUint(text, 10, 16)
	if err != nil || count == 0 {
		return 0, fmt.Errorf("%q is not a positive number", text)
	}
	return int(count), nil
}

func parseShardBytes(text string) (int, error) {
	for _, size := range ShardSizes() {
		name := formatBytes(size)
		if text == name || text == strings.TrimSuffix(name, "iB") || text == strconv.Itoa(size) {
			return size, nil
		}
	}
	return 0, fmt.Errorf("unknown shard size %q, want one as in %s or %s", text, formatBytes(64<<10), formatBytes(1<<20))
}

// EnsureDefaults fills what is unset: mode auto, mirror auto, shards of 1 MiB,
// and for K+M 1+2 in file and slice, 10+4 in rs-size.
func (p *Policy) EnsureDefaults() {
	if p.Mode == "" {
		p.Mode = ModeAuto
	}
	if p.Mirror == "" {
		p.Mirror = MirrorAuto
	}
	if p.ShardBytes == 0 {
		p.ShardBytes = DefaultShardBytes
	}
	if p.K != 0 || p.M != 0 {
		return
	}
	switch p.Mode {
	case ModeFile, ModeSlice:
		p.K, p.M = 1, 2
	case ModeRSSize:
		p.K, p.M = 10, 4
	}
}

// Validate returns an error that lists every rule the policy breaks, after
// EnsureDefaults, or nil.
func (p Policy) Validate() error {
	p.EnsureDefaults()
	return invalid("policy "+p.String(), p.violations())
}

func (p Policy) violations() []string {
	var violations []string
	switch p.Mode {
	case ModeFile, ModeSlice:
		violations = append(violations, countViolations(p.K, p.M)...)
		if p.K > 1 {
			violations = append(violations, fmt.Sprintf("mode %s keeps data in one shard: K must be 1, not %d", p.Mode, p.K))
		}
	case ModeRSSize:
		violations = append(violations, countViolations(p.K, p.M)...)
	case ModeRSRatio:
		if p.K == 0 && p.M == 0 {
			violations = append(violations, "mode rs-ratio needs K+M, as in rs-ratio:4+2")
			break
		}
		violations = append(violations, countViolations(p.K, p.M)...)
	case ModeAuto:
		if p.K == 0 && p.M == 0 {
			break // from the live pool
		}
		violations = append(violations, countViolations(p.K, p.M)...)
		if p.K == 1 {
			violations = append(violations, "mode auto never uses K = 1, because any single shard would give the salt")
		}
	default:
		violations = append(violations, fmt.Sprintf("unknown mode %q, want file, slice, rs-size, rs-ratio or auto", string(p.Mode)))
	}
	if !slices.Contains([]Mirror{MirrorAuto, MirrorOn, MirrorOff}, p.Mirror) {
		violations = append(violations, fmt.Sprintf("unknown mirror setting %q, want auto, on or off", string(p.Mirror)))
	}
	return append(violations, shardViolations(p.ShardBytes)...)
}

// String returns the policy in the form that ParsePolicy reads, without what
// is the default.
func (p Policy) String() string {
	p.EnsureDefaults()
	text := string(p.Mode)
	if p.K != 0 || p.M != 0 {
		text += fmt.Sprintf(":%d+%d", p.K, p.M)
	}
	if p.Mirror != MirrorAuto {
		text += ",mirror=" + string(p.Mirror)
	}
	if p.ShardBytes != DefaultShardBytes {
		text += ",shard=" + formatBytes(p.ShardBytes)
	}
	return text
}

// Geometry returns the smallest geometry that holds dataBytes sealed bytes in
// a pool of liveNodes admitted nodes not declared dead, and whether its shards
// are mirrored. Where no stripe of the policy holds so much, it is the full
// geometry: math.MaxInt asks for that one.
//
// A smaller stripe lowers the shard size first, then K, to 2 where the policy
// has more (rs-size lowers K before the shard size). Where the pool is smaller
// than n, K is lowered to 2, then M to 1, then, except in auto, K to 1; with
// mirror=on a stripe needs 2n nodes. ErrTooFewNodes says that nothing fits,
// ErrInvalid that the policy breaks a rule.
func (p Policy) Geometry(liveNodes, dataBytes int) (g Geometry, mirrored bool, err error) {
	p.EnsureDefaults()
	if err := p.Validate(); err != nil {
		return Geometry{}, false, fmt.Errorf("erasure: geometry: %w", err)
	}
	g, mirrored, err = p.full(liveNodes)
	if err != nil {
		return Geometry{}, false, fmt.Errorf("erasure: geometry: %w", err)
	}
	dataBytes = max(0, min(dataBytes, g.DataBytes()))
	kMin := min(g.K, kMinThreshold)
	kForSize := g.K // the K for which the shard size is chosen
	if p.Mode == ModeRSSize {
		kForSize = kMin
	}
	for _, size := range ShardSizes() {
		if size < g.ShardBytes && kForSize*size >= dataBytes {
			g.ShardBytes = size
			break
		}
	}
	g.K = max(kMin, (dataBytes+g.ShardBytes-1)/g.ShardBytes)
	return g, mirrored, nil
}

// kMinThreshold is the least K at which a single shard does not give the salt.
const kMinThreshold = 2

// full returns the geometry of full stripes.
func (p Policy) full(liveNodes int) (g Geometry, mirrored bool, err error) {
	k, m := p.K, p.M
	if k == 0 {
		k, m = autoCounts(liveNodes, p.Mirror)
	}
	mirrored = p.Mirror == MirrorOn || p.Mirror == MirrorAuto && liveNodes >= 2*(k+m)+2
	copies := 1
	if p.Mirror == MirrorOn {
		copies = 2
	}
	room, wanted := liveNodes/copies, copies*(k+m)
	k = max(min(k, room-m), min(k, kMinThreshold))
	m = max(min(m, room-k), 1)
	if p.Mode != ModeAuto {
		k = max(min(k, room-m), 1)
	}
	if k+m > room {
		p.ShardBytes = DefaultShardBytes // no matter of nodes: not named
		return Geometry{}, false, fmt.Errorf("%w: %d live, policy %s wants %d and can do with %d", ErrTooFewNodes, liveNodes, p, wanted, copies*(k+m))
	}
	return Geometry{K: k, M: m, ShardBytes: p.ShardBytes}, mirrored, nil
}

// Limits of auto.
const (
	autoKMin, autoKMax = 4, 10
	autoMMin           = 2
	autoMirroredNMax   = 14    // 10+4
	autoLossMax        = 1e-11 // per stripe and year
)

// autoCounts chooses K and M for a pool. With mirrors, n grows to 10+4 as the
// pool allows, with two nodes to spare. Without, the largest K is taken for
// which enough parity to meet autoLossMax fits the pool with one node to
// spare; where none does, all spare nodes but one go to parity.
func autoCounts(liveNodes int, mirror Mirror) (k, m int) {
	n := (liveNodes - 2) / 2
	if mirror == MirrorOn || mirror == MirrorAuto && n >= autoKMin+autoMMin {
		n = max(3, min(n, autoMirroredNMax))
		m = (2*n + 6) / 7 // two sevenths, as in 10+4
		return n - m, m
	}
	for k := autoKMax; k >= autoKMin; k-- {
		for m := autoMMin; k+m < liveNodes; m++ {
			if annualLoss(k, m) <= autoLossMax {
				return k, m
			}
		}
	}
	return autoKMin, max(autoMMin, liveNodes-1-autoKMin)
}

// annualLoss estimates the probability that a stripe without mirrors is lost
// in a year: C(n, m+1) (m+1) (τ/MTTF)^m T/MTTF, for nodes that last 90 days
// and repairs that take one.
func annualLoss(k, m int) float64 {
	const repairDays, lifeDays, yearDays = 1, 90, 365
	ways := 1.0
	for i := 1; i <= m+1; i++ {
		ways = ways * float64(k+m+1-i) / float64(i)
	}
	return ways * float64(m+1) * math.Pow(repairDays/float64(lifeDays), float64(m)) * yearDays / lifeDays
}
