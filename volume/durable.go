package volume

import (
	"fmt"
	"strings"
	"time"

	"github.com/defs-fs/defs/metastore"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/placement"
)

// What is durable is defined here, for Status, WaitDurable, FileState and the
// inspection alike: bytes that the newest head covers are durable when all nodes
// that should hold the head do, and when their stripe and those of the log are
// whole. A stripe is whole when it was placed as its policy wants it, at
// all keepers too, and every holder answers. What is covered and not durable
// is recoverable.

// Health of a stripe, by what is known of its holders.
const (
	HealthWhole       = "whole"
	HealthDegraded    = "degraded"     // fewer shards, mirrors or keepers than the policy wants
	HealthUnreachable = "out of reach" // fewer than k answer; with the silent ones there are enough
	HealthLost        = "lost"         // fewer than k are not declared dead
)

// members are the nodes of the pool by their ids.
type members map[placement.NodeID]p2p.Member

func (n *network) members() members {
	m := make(members)
	for _, member := range n.transport.Members() {
		if member.Role == p2p.RoleNode {
			m[member.ID] = member
		}
	}
	return m
}

// standing is a stripe as its holders are now.
type standing struct {
	health string
	pairs  []placement.Pair   // of the holders that answer
	away   []placement.NodeID // holders that do not, dead ones included
}

// whole says that the stripe keeps nothing from being durable.
func (s standing) whole() bool { return s.health == HealthWhole }

func (m members) stripe(info *metastore.StripeInfo) (s standing) {
	silent := 0
	for _, h := range info.Holders {
		var pair placement.Pair
		mayReturn := false
		for _, c := range []struct {
			id    string
			place *placement.NodeID
		}{{h.Primary, &pair.Primary}, {h.Mirror, &pair.Mirror}} {
			id := placement.NodeID(c.id)
			switch member := m[id]; {
			case id == "":
			case member.Answers():
				*c.place = id
			default:
				s.away = append(s.away, id)
				mayReturn = mayReturn || member.State != p2p.Dead
			}
		}
		if pair == (placement.Pair{}) {
			if mayReturn {
				silent++
			}
			continue
		}
		s.pairs = append(s.pairs, pair)
	}
	switch {
	case len(s.pairs)+silent < info.K:
		s.health = HealthLost
	case len(s.pairs) < info.K:
		s.health = HealthUnreachable
	case !info.Complete || len(s.away) > 0:
		s.health = HealthDegraded
	default:
		s.health = HealthWhole
	}
	return s
}

// shortfall gathers why published bytes are not durable.
type shortfall struct {
	members     members
	incomplete  int    // stripes that were never placed as their policy wants, or have lost something since
	first       string // how the first of them is
	silent      int    // stripes with holders that do not answer
	dead        int    // stripes with holders that are declared dead
	silentNodes map[placement.NodeID]bool
}

func (f *shortfall) add(info *metastore.StripeInfo, s standing) {
	dead := false
	quiet := false
	for _, id := range s.away {
		if f.members[id].State == p2p.Dead {
			dead = true
		} else {
			quiet = true
			f.silentNodes[id] = true
		}
	}
	if dead {
		f.dead++
	}
	if quiet {
		f.silent++
	}
	if !info.Complete && !dead && info.IndexAcks > 0 {
		if f.incomplete++; f.first == "" {
			f.first = placedWords(info)
		}
	}
}

// words are the reasons, each in a sentence without its point.
func (f *shortfall) words(headAcks, headNodes int, published bool, now time.Time) (reasons []string) {
	if published && headAcks < headNodes {
		reasons = append(reasons, fmt.Sprintf("the newest head is at %d of %s, and is sent to the others again", headAcks, plural(headNodes, "node")))
	}
	if f.incomplete > 0 {
		reasons = append(reasons, fmt.Sprintf("%s not at the policy's target yet (%s)", areWords(f.incomplete), f.first))
	}
	if f.silent > 0 {
		ids := make([]placement.NodeID, 0, len(f.silentNodes))
		for id := range f.silentNodes {
			ids = append(ids, id)
		}
		reasons = append(reasons, fmt.Sprintf("%s; a node that stays silent for dead-after (default 1 h) is declared dead, and its shards are made anew elsewhere", f.members.silence(plural(f.silent, "stripe"), f.silent, ids, now)))
	}
	if f.dead > 0 {
		reasons = append(reasons, fmt.Sprintf("%s a holder that is declared dead; the shards are being made anew elsewhere", haveWords(f.dead)))
	}
	return reasons
}

// silence tells of what has holders that do not answer, and since when.
func (m members) silence(what string, n int, ids []placement.NodeID, now time.Time) string {
	verb := "have"
	if n == 1 {
		verb = "has"
	}
	unheard := false
	var oldest time.Time
	for _, id := range ids {
		member := m[id]
		unheard = unheard || !member.Heard
		if !member.Seen.IsZero() && (oldest.IsZero() || member.Seen.Before(oldest)) {
			oldest = member.Seen
		}
	}
	var since string
	switch {
	case unheard && !oldest.IsZero():
		since = ", not heard since this process began, last seen " + ago(now.Sub(oldest)) + " ago"
	case unheard:
		since = ", not heard since this process began"
	case !oldest.IsZero():
		since = " since " + ago(now.Sub(oldest))
	}
	if len(ids) == 1 {
		return fmt.Sprintf("%s %s a holder that is silent%s", what, verb, since)
	}
	return fmt.Sprintf("%s %s holders among %d nodes that are silent%s", what, verb, len(ids), since)
}

// placedWords tells how far a stripe is from its policy's target.
func placedWords(info *metastore.StripeInfo) string {
	parts := []string{fmt.Sprintf("%d of %s", info.Placed(), plural(info.K+info.M, "shard"))}
	if info.Mirrored {
		mirrors := 0
		for _, h := range info.Holders {
			if h.Mirror != "" {
				mirrors++
			}
		}
		parts = append(parts, fmt.Sprintf("%d of %s", mirrors, plural(info.K+info.M, "mirror")))
	}
	return strings.Join(append(parts, fmt.Sprintf("%d of %s", info.IndexAcks, plural(info.IndexKeepers, "keeper"))), ", ")
}

// reason is why a stripe is not whole; "" for one that is.
func (m members) reason(info *metastore.StripeInfo, s standing, now time.Time) string {
	var parts []string
	var silent []placement.NodeID
	dead := 0
	for _, id := range s.away {
		if m[id].State == p2p.Dead {
			dead++
		} else {
			silent = append(silent, id)
		}
	}
	if len(silent) > 0 {
		parts = append(parts, m.silence("it", 1, silent, now))
	}
	if dead > 0 {
		parts = append(parts, fmt.Sprintf("%s declared dead", plural(dead, "holder")))
	}
	if !info.Complete && dead == 0 {
		parts = append(parts, placedWords(info))
	}
	return strings.Join(parts, "; ")
}

func areWords(stripes int) string {
	if stripes == 1 {
		return "1 stripe is"
	}
	return fmt.Sprintf("%d stripes are", stripes)
}

func haveWords(stripes int) string {
	if stripes == 1 {
		return "1 stripe has"
	}
	return fmt.Sprintf("%d stripes have", stripes)
}

func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// ago is a time that has passed, in its largest unit.
func ago(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	case d >= time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	case d >= time.Minute:
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d s", max(d, 0)/time.Second)
}
