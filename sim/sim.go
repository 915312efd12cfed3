package sim

import (
	"container/heap"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/defs-fs/defs/placement"
	"lukechampine.com/blake3"
)

// Result is what has happened.
type Result struct {
	Seed     uint64
	Stripes  int
	K, M     int
	Mirrored bool

	Lost        int           // stripes of which fewer than k shards are left anywhere
	Unavailable time.Duration // sum over stripes of the time with fewer than k shards at nodes that answer, as looked at when members come and go
	Unhealthy   int           // stripes that lack a copy at the end, lost ones not counted

	Deaths    int
	Absences  int
	Copies    int // shards copied by the holder that was left
	Rebuilds  int // shards rebuilt by keepers
	Cancelled int // repairs ended by a holder that came back, or that another repair has overtaken
	Moved     int // shards sent: one for a copy, k+1 for a rebuild, k+2 with its mirror

	FoundLying int
	Fired      map[Kind]int // what the faults of each kind have hit
}

// retryAfter is how long a repair waits that lacks shards, keepers or takers.
const retryAfter = 30 * time.Minute

// sampleMax is among how many members a new holder is drawn.
const sampleMax = 32

// ErrNeverFired says that a planned fault hit nothing.
var ErrNeverFired = errors.New("a planned fault never fired")

// Run simulates the pool. The error wraps ErrNeverFired where a fault hit
// nothing; the result is valid then too. Otherwise it tells what is wrong with
// the options.
func Run(o Options) (Result, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return Result{}, fmt.Errorf("simulate: %w", err)
	}
	g, mirrored, err := o.Policy.Geometry(o.Nodes, math.MaxInt)
	if err != nil {
		return Result{}, fmt.Errorf("simulate: %w", err)
	}
	s := &simulation{
		o: o, k: g.K, n: g.N(), m: g.M, copies: 1, rng: rand.New(rand.NewPCG(o.Seed, 0xdef5)),
		byID:   map[placement.NodeID]int32{},
		result: Result{Seed: o.Seed, Stripes: o.Stripes, K: g.K, M: g.M, Mirrored: mirrored, Fired: map[Kind]int{}},
	}
	if mirrored {
		s.copies = 2
	}
	if err := s.begin(); err != nil {
		return Result{}, fmt.Errorf("simulate: %w", err)
	}
	for s.events.Len() > 0 {
		e := heap.Pop(&s.events).(event)
		if e.at > o.Duration {
			break
		}
		s.now = e.at
		e.do()
	}
	s.now = o.Duration
	for i := range s.stripes {
		st := &s.stripes[i]
		s.look(st)
		if !st.lost && !s.whole(st) {
			s.result.Unhealthy++
		}
	}
	var errs []error
	for _, f := range o.Faults {
		if s.result.Fired[f.Kind] == 0 {
			errs = append(errs, fmt.Errorf("%w: %s at %v", ErrNeverFired, f.Kind, f.At))
		}
	}
	return s.result, errors.Join(errs...)
}

// event is something that happens at a time; equal times keep their order.
type event struct {
	at    time.Duration
	order int
	do    func()
}

type events []event

func (e events) Len() int      { return len(e) }
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].order < e[j].order
}

func (e *events) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	(*e)[last].do = nil
	*e = (*e)[:last]
	return x
}

// copyRef names one copy of one shard.
type copyRef struct {
	stripe int32
	shard  uint8
	copy   uint8
}

// node is one member, from its joining on; a replacement is another node.
type node struct {
	member  int // its place in simulation.members while it lives
	holds   []copyRef
	dead    bool // for good, with its disk
	lying   bool // has thrown its shards away
	caught  bool // lying and known for it
	slow    bool
	silent  bool
	since   time.Duration // of the silence
	silence int           // number of the silence: what belongs to an earlier one is over
	hour    time.Duration // of the day, at which it goes away
}

// held is where one copy lies: index in simulation.nodes, and in its holds.
type held struct {
	node     int32 // -1: nowhere
	position int32
}

type shard struct {
	copies  [2]held
	repairs [3]bool // under way: of each copy, and of the shard
}

type stripe struct {
	shards []shard
	lost   bool
	failed time.Duration // since when too few shards answer; -1: they do
}

type simulation struct {
	o       Options
	k, m, n int
	copies  int
	rng     *rand.Rand
	now     time.Duration
	events  events
	order   int
	nodes   []node
	members []placement.Node // as everybody sees them; Alive also tells who answers
	byID    map[placement.NodeID]int32
	pool    []placement.NodeID // not declared dead; nil: to be made anew
	undead  map[int32]bool     // died, not yet declared dead
	stripes []stripe
	result  Result
}

func (s *simulation) after(delay time.Duration, do func()) {
	s.order++
	heap.Push(&s.events, event{s.now + delay, s.order, do})
}

// exponential draws a duration of that mean.
func (s *simulation) exponential(mean time.Duration) time.Duration {
	return time.Duration(min(s.rng.ExpFloat64()*float64(mean), float64(100*Year)))
}

func (s *simulation) begin() error {
	s.undead = map[int32]bool{}
	s.members = make([]placement.Node, s.o.Nodes)
	for i := range s.members {
		s.join(i)
	}
	s.stripes = make([]stripe, s.o.Stripes)
	for i := range s.stripes {
		st := &s.stripes[i]
		st.failed = -1
		st.shards = make([]shard, s.n)
		pairs, err := placement.Choose(s.rng, s.members, s.n, s.copies == 2)
		if err != nil {
			return err
		}
		for j, pair := range pairs {
			st.shards[j].copies = [2]held{{node: -1}, {node: -1}}
			for c, id := range []placement.NodeID{pair.Primary, pair.Mirror}[:s.copies] {
				s.place(copyRef{int32(i), uint8(j), uint8(c)}, s.byID[id])
			}
		}
	}
	for _, f := range s.o.Faults {
		s.after(f.At, func() { s.fault(f) })
	}
	return nil
}

// join puts a new member in a place of the pool.
func (s *simulation) join(member int) {
	host := member % s.o.Hosts
	index := int32(len(s.nodes))
	id := nodeID(index)
	s.members[member] = placement.Node{
		ID: id, Host: fmt.Sprint("h", host), Subnet: fmt.Sprint("s", host%s.o.Subnets), Zone: fmt.Sprint("z", host%s.o.Subnets%s.o.Zones),
		CapacityBytes: 1 << 40, Uptime: 1, Alive: true,
	}
	s.nodes = append(s.nodes, node{member: member, hour: time.Duration(s.rng.Int64N(int64(Day)))})
	s.byID[id], s.pool = index, nil
	s.after(s.exponential(s.o.Life), func() { s.die(index) })
	if s.o.Absent > 0 {
		s.after((s.nodes[index].hour-s.now%Day+Day)%Day, func() { s.leave(index) })
	}
}

func nodeID(index int32) placement.NodeID {
	return placement.NodeID(fmt.Sprintf("node-%07d", index))
}

func (s *simulation) place(ref copyRef, at int32) {
	n := &s.nodes[at]
	s.stripes[ref.stripe].shards[ref.shard].copies[ref.copy] = held{at, int32(len(n.holds))}
	n.holds = append(n.holds, ref)
}

// forget ends that a copy counts.
func (s *simulation) forget(ref copyRef) {
	h := &s.stripes[ref.stripe].shards[ref.shard].copies[ref.copy]
	if h.node < 0 {
		return
	}
	n := &s.nodes[h.node]
	last := n.holds[len(n.holds)-1]
	n.holds[h.position] = last
	s.stripes[last.stripe].shards[last.shard].copies[last.copy].position = h.position
	n.holds = n.holds[:len(n.holds)-1]
	h.node = -1
}

// die ends a member for good, and puts an empty one in its place.
func (s *simulation) die(index int32) {
	n := &s.nodes[index]
	if n.dead {
		return
	}
	s.result.Deaths++
	n.dead = true
	s.undead[index] = true
	if !n.silent {
		s.silence(index)
	}
	s.join(n.member)
	for _, ref := range s.nodes[index].holds {
		s.look(&s.stripes[ref.stripe])
	}
}

// leave is the daily absence.
func (s *simulation) leave(index int32) {
	n := &s.nodes[index]
	if n.dead {
		return
	}
	s.after(Day, func() { s.leave(index) })
	if n.silent || n.caught {
		return
	}
	s.result.Absences++
	s.cut(index, min(s.exponential(s.o.Absent), Day-time.Minute))
}

// cut silences a member for a while.
func (s *simulation) cut(index int32, span time.Duration) {
	s.silence(index)
	silence := s.nodes[index].silence
	s.after(span, func() {
		n := &s.nodes[index]
		if n.dead || n.silence != silence {
			return
		}
		n.silent = false
		s.members[n.member].Alive = !n.caught
		s.pool = nil
		for _, ref := range n.holds {
			s.look(&s.stripes[ref.stripe])
			if s.copies == 2 {
				s.mend(ref.stripe) // it may be the one that copies
			}
		}
	})
}

// silence begins: what it leads to happens after CopyAfter and DeadAfter.
func (s *simulation) silence(index int32) {
	n := &s.nodes[index]
	n.silent, n.since = true, s.now
	n.silence++
	silence := n.silence
	if s.byID[s.members[n.member].ID] == index {
		s.members[n.member].Alive = false
	}
	for _, ref := range n.holds {
		s.look(&s.stripes[ref.stripe])
	}
	notice := func() {
		n := &s.nodes[index]
		if n.silence != silence || !n.silent {
			return
		}
		if s.gone(index, s.o.DeadAfter) {
			s.pool = nil
			delete(s.undead, index)
		}
		for _, ref := range slices.Clone(n.holds) {
			s.mend(ref.stripe)
		}
	}
	s.after(s.o.CopyAfter, notice)
	if s.o.DeadAfter > s.o.CopyAfter {
		s.after(s.o.DeadAfter, notice)
	}
}

// gone reports whether a node counts as lost after so much silence.
func (s *simulation) gone(index int32, silence time.Duration) bool {
	if index < 0 {
		return true
	}
	n := &s.nodes[index]
	return n.caught || n.silent && s.now-n.since >= silence
}

// answers reports whether a node serves what it holds.
func (s *simulation) answers(index int32) bool {
	return index >= 0 && !s.nodes[index].silent && !s.nodes[index].lying
}

// exists reports whether a copy is there, reachable or not.
func (s *simulation) exists(index int32) bool {
	return index >= 0 && !s.nodes[index].dead && !s.nodes[index].lying
}

// count counts the shards of which a copy fulfils something.
func (s *simulation) count(st *stripe, fulfils func(int32) bool) (shards int) {
	for i := range st.shards {
		for _, h := range st.shards[i].copies[:s.copies] {
			if fulfils(h.node) {
				shards++
				break
			}
		}
	}
	return shards
}

// whole reports whether every copy of a stripe is at a node that has it.
func (s *simulation) whole(st *stripe) bool {
	for i := range st.shards {
		for _, h := range st.shards[i].copies[:s.copies] {
			if !s.exists(h.node) {
				return false
			}
		}
	}
	return true
}

// look notes whether a stripe is lost, and whether it can be read.
func (s *simulation) look(st *stripe) {
	if st.lost {
		return
	}
	readable := s.count(st, s.answers) >= s.k
	switch {
	case !readable && st.failed < 0:
		st.failed = s.now
	case st.failed >= 0:
		if readable || s.now == s.o.Duration {
			s.result.Unavailable += s.now - st.failed
			st.failed = -1
		}
	}
	if !readable && s.count(st, s.exists) < s.k {
		st.lost = true
		s.result.Lost++
	}
}

// lostFor is the silence after which a shard without a copy is rebuilt: Node.assess
// of package node.
func (s *simulation) lostFor(st *stripe) time.Duration {
	healthy := s.count(st, func(i int32) bool { return !s.gone(i, s.o.CopyAfter) })
	if healthy > s.k+1 {
		return s.o.DeadAfter
	}
	return s.o.CopyAfter
}

// isLost reports whether no copy of a shard is left.
func (s *simulation) isLost(sh *shard, silence time.Duration) bool {
	return !slices.ContainsFunc(sh.copies[:s.copies], func(h held) bool { return !s.gone(h.node, silence) })
}

// mend starts the repairs that a stripe needs.
func (s *simulation) mend(index int32) {
	st := &s.stripes[index]
	if st.lost {
		return
	}
	silence := s.lostFor(st)
	for i := range st.shards {
		sh := &st.shards[i]
		if s.isLost(sh, silence) {
			if !sh.repairs[2] {
				sh.repairs[2] = true
				s.rebuild(index, i)
			}
			continue
		}
		for c, h := range sh.copies[:s.copies] {
			other := sh.copies[1-c].node
			if s.copies == 2 && s.gone(h.node, s.o.CopyAfter) && s.answers(other) && !sh.repairs[c] {
				sh.repairs[c] = true
				s.after(s.transfer(s.o.CopyTime, other), func() { s.copied(copyRef{index, uint8(i), uint8(c)}) })
			}
		}
	}
}

func (s *simulation) transfer(mean time.Duration, from int32) time.Duration {
	if from >= 0 && s.nodes[from].slow {
		mean *= SlowFactor
	}
	return s.exponential(mean)
}

// copied ends the copy of one shard by the holder that is left.
func (s *simulation) copied(ref copyRef) {
	st := &s.stripes[ref.stripe]
	sh := &st.shards[ref.shard]
	sh.repairs[ref.copy] = false
	if st.lost {
		return
	}
	if !s.gone(sh.copies[ref.copy].node, s.o.CopyAfter) || !s.answers(sh.copies[1-ref.copy].node) {
		s.result.Cancelled++
		s.mend(ref.stripe)
		return
	}
	to, ok := s.taker(st)
	if !ok {
		sh.repairs[ref.copy] = true
		s.after(retryAfter, func() { s.copied(ref) })
		return
	}
	s.forget(ref)
	s.place(ref, to)
	s.result.Copies++
	s.result.Moved++
	s.look(st)
}

// rebuild starts the repair of a shard without copies.
func (s *simulation) rebuild(index int32, i int) {
	s.after(s.exponential(s.o.RebuildTime), func() { s.rebuilt(index, i, false) })
}

// rebuilt ends the repair of a shard by the stripe's keepers: by the first in
// rank that answers, later if it has to stand in for others or is slow, which
// is waited for once.
func (s *simulation) rebuilt(index int32, i int, waited bool) {
	st := &s.stripes[index]
	sh := &st.shards[i]
	if st.lost {
		return
	}
	if !s.isLost(sh, s.lostFor(st)) {
		sh.repairs[2] = false
		s.result.Cancelled++
		s.mend(index)
		return
	}
	again := func(delay time.Duration) { s.after(delay, func() { s.rebuilt(index, i, true) }) }
	if s.count(st, s.answers) < s.k {
		again(retryAfter)
		return
	}
	keepers := s.keepers(index)
	agree, first := 0, -1
	for rank, id := range keepers {
		if s.answers(s.byID[id]) {
			agree++
			if first < 0 {
				first = rank
			}
		}
	}
	if agree <= len(keepers)/2 {
		again(retryAfter)
		return
	}
	if delay := time.Duration(first) * s.o.StandIn; !waited {
		if s.nodes[s.byID[keepers[first]]].slow {
			delay += s.exponential((SlowFactor - 1) * s.o.RebuildTime)
		}
		if delay > 0 {
			again(delay)
			return
		}
	}
	var to [2]int32
	for c := range s.copies {
		var ok bool
		if to[c], ok = s.taker(st); !ok {
			again(retryAfter)
			return
		}
		ref := copyRef{index, uint8(i), uint8(c)}
		s.forget(ref)
		s.place(ref, to[c]) // so that the mirror is drawn elsewhere
	}
	sh.repairs[2] = false
	s.result.Rebuilds++
	s.result.Moved += s.k + s.copies
	s.look(st)
}

// keepers ranks the members that are not declared dead.
func (s *simulation) keepers(index int32) []placement.NodeID {
	if s.pool == nil {
		for i := range s.members {
			if !s.gone(s.byID[s.members[i].ID], s.o.DeadAfter) {
				s.pool = append(s.pool, s.members[i].ID)
			}
		}
		for i := range s.undead {
			s.pool = append(s.pool, nodeID(i))
		}
	}
	blind := blake3.Sum256(fmt.Append(nil, "stripe ", s.o.Seed, " ", index))
	return placement.Keepers(blind, s.pool, placement.KeeperCount(s.m, s.copies == 2, len(s.pool)))
}

// taker draws a node for a shard: one that holds none of the stripe, apart by
// host from the holders where there is such a node.
func (s *simulation) taker(st *stripe) (int32, bool) {
	var holders []int
	for i := range st.shards {
		for _, h := range st.shards[i].copies[:s.copies] {
			if h.node >= 0 && !s.nodes[h.node].dead {
				holders = append(holders, s.nodes[h.node].member)
			}
		}
	}
	free := func(member int) bool { return s.members[member].Alive && !slices.Contains(holders, member) }
	apart := func(member int) bool {
		return free(member) && !slices.ContainsFunc(holders, func(h int) bool { return h%s.o.Hosts == member%s.o.Hosts })
	}
	// A random part of a large pool will do: to draw among all takes as long as
	// all the rest.
	var drawn []int
	var nodes []placement.Node
	for range 4 * sampleMax {
		member := s.rng.IntN(len(s.members))
		if len(drawn) < sampleMax && apart(member) && !slices.Contains(drawn, member) {
			drawn, nodes = append(drawn, member), append(nodes, s.members[member])
		}
	}
	if len(nodes) == 0 {
		for member := range s.members {
			if free(member) {
				nodes = append(nodes, s.members[member])
			}
		}
	}
	pairs, err := placement.Choose(s.rng, nodes, 1, false)
	if err != nil {
		return 0, false
	}
	return s.byID[pairs[0].Primary], true
}
