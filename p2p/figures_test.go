package p2p_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/defs-fs/defs/sim"
)

const byWalk way = "DHT walk"

// row is one line of docs/lookup.md.
type row struct {
	Way     way
	Nodes   int
	Cold    bool
	Missing bool // nobody has the stripe
	Stripes int
	Real    bool // measured with the real code, else by the model
	figures
}

const (
	oneWay    = 50 * time.Millisecond
	realMax   = 100 // nodes: more take more memory and hours
	manyOnes  = 1000
	tries     = 3 // single lookups of each kind; the median is shown
	shardsInK = 4
)

var sizes = []int{20, 100, 300, 1000}

// TestLookupFigures measures lookups. Where DEFS_LOOKUP names a directory it
// measures all sizes, puts the figures into lookup.json there, and draws
// lookup.md and lookup.svg from that file: a run of some subtests replaces
// their figures alone. With DEFS_LOOKUP_100 the real nodes run in a pool of 100
// too, whose connections alone take minutes of processor time.
func TestLookupFigures(t *testing.T) {
	docs := os.Getenv("DEFS_LOOKUP")
	realSizes, walkSizes, many := []int{}, []int{20}, 50
	if docs != "" {
		realSizes, walkSizes, many = []int{20}, sizes, manyOnes
		if os.Getenv("DEFS_LOOKUP_100") != "" {
			realSizes = append(realSizes, 100)
		}
	}
	measure := func(name string, walk bool, n, stripes int, run func(t *testing.T, nodes, stripes int) []row) {
		t.Run(fmt.Sprint(name, n), func(t *testing.T) {
			rows := run(t, n, stripes)
			t.Logf("the last row: %+v", rows[len(rows)-1])
			if docs != "" {
				save(t, docs, rows, func(r row) bool {
					return r.Nodes == n && (r.Way == byWalk) == walk && (r.Stripes == 1) == (stripes == 1)
				})
			}
		})
	}
	for _, n := range walkSizes {
		measure("walk", true, n, 1, walks)
	}
	for _, n := range realSizes {
		measure("nodes", false, n, 1, lookups)
	}
	measure("many-walk", true, sizes[0], many, walks)
	if docs != "" {
		measure("many-nodes", false, sizes[0], many, lookups)
	}
}

// save replaces rows of lookup.json and draws the documents.
func save(t *testing.T, docs string, rows []row, replaced func(row) bool) {
	t.Helper()
	path := filepath.Join(docs, "lookup.json")
	var all []row
	if b, err := os.ReadFile(path); err == nil {
		if err := json.Unmarshal(b, &all); err != nil {
			t.Fatal(err)
		}
	}
	all = append(slices.DeleteFunc(all, replaced), rows...)
	var lines bytes.Buffer
	for i, r := range all {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&lines, "%s%s\n", []string{"[", ","}[min(i, 1)], b)
	}
	fmt.Fprintln(&lines, "]")
	more := models(all)
	for name, b := range map[string][]byte{
		"lookup.json": lines.Bytes(), "lookup.md": document(all, more), "lookup.svg": plot(slices.Concat(all, more)),
	} {
		if err := os.WriteFile(filepath.Join(docs, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func median(all []figures) figures {
	slices.SortFunc(all, func(a, b figures) int { return cmp.Compare(a.KthShard, b.KthShard) })
	return all[len(all)/2]
}

// lookups measures the real nodes: single stripes in every way, or many at once.
func lookups(t *testing.T, nodes, many int) (rows []row) {
	began := realNow()
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t, oneWay)
		s.heartbeat = 5 * time.Minute
		defer s.close()
		c := s.client(s.pool(nodes), "4+2,shard=16KiB")
		t.Logf("%d nodes know each other after %v", nodes, realNow().Sub(began))
		var stripes []stored
		for range max(tries, many) {
			stripes = append(stripes, c.put())
		}
		t.Logf("%d nodes have %d stripes after %v", nodes, len(stripes), realNow().Sub(began))
		for _, way := range []way{byHint, byKeepers, byBroadcast} {
			if many > 1 {
				rows = append(rows, row{Way: way, Nodes: nodes, Stripes: many, Real: true, figures: c.read(way, false, stripes...)})
				continue
			}
			for _, cold := range []bool{false, true} {
				var all []figures
				for _, st := range stripes {
					all = append(all, c.read(way, cold, st))
				}
				rows = append(rows, row{Way: way, Nodes: nodes, Cold: cold, Stripes: 1, Real: true, figures: median(all)})
			}
		}
		if many == 1 {
			rows = append(rows, row{Way: byKeepers, Nodes: nodes, Missing: true, Stripes: 1, Real: true, figures: c.read(byKeepers, false, c.unknown(stripes[0]))})
		}
		t.Logf("%d nodes took %v", nodes, realNow().Sub(began))
	})
	return rows
}

// walks measures the DHT in the same way.
func walks(t *testing.T, nodes, many int) (rows []row) {
	synctest.Test(t, func(t *testing.T) {
		w := newWalk(t, nodes, oneWay)
		defer w.close()
		numbers := make([]int, max(tries, many))
		for i := range numbers {
			numbers[i] = i
			w.provide(i, 12)
		}
		if many > 1 {
			w.connect(true)
			rows = append(rows, row{Way: byWalk, Nodes: nodes, Stripes: many, Real: true, figures: w.find(shardsInK, numbers...)})
			return
		}
		for _, cold := range []bool{false, true} {
			var all []figures
			for _, number := range numbers {
				w.connect(!cold)
				all = append(all, w.find(shardsInK, number))
			}
			rows = append(rows, row{Way: byWalk, Nodes: nodes, Cold: cold, Stripes: 1, Real: true, figures: median(all)})
		}
		w.connect(true)
		rows = append(rows, row{Way: byWalk, Nodes: nodes, Missing: true, Stripes: 1, Real: true, figures: w.find(shardsInK, len(numbers))})
	})
	return rows
}

// find returns the row of a kind.
func findRow(rows []row, way way, nodes int, cold, missing bool, stripes int) (row, bool) {
	i := slices.IndexFunc(rows, func(r row) bool {
		return r.Way == way && r.Nodes == nodes && r.Cold == cold && r.Missing == missing && r.Stripes == stripes
	})
	if i < 0 {
		return row{}, false
	}
	return rows[i], true
}

// measured is the largest pool of real nodes among the rows.
func measured(rows []row) (nodes int) {
	for _, r := range rows {
		if r.Way != byWalk && r.Real {
			nodes = max(nodes, r.Nodes)
		}
	}
	return nodes
}

// models carries hints, keepers and broadcasts on to sizes at which the real
// nodes did not run. Hints and keepers cost what they do at the largest size
// measured: nothing in them knows the size. For broadcasts the question's way
// through the pool is simulated; what else they cost is taken from the
// measurements.
func models(rows []row) (more []row) {
	realMax := measured(rows)
	for _, n := range sizes {
		if n <= realMax {
			continue
		}
		for _, way := range []way{byHint, byKeepers, byBroadcast} {
			for _, cold := range []bool{false, true} {
				r, ok := findRow(rows, way, realMax, cold, false, 1)
				if !ok {
					continue
				}
				r.Nodes, r.Real = n, false
				if way == byBroadcast {
					before, now := question(realMax, 0), question(n, 0)
					moved := now.Enough - before.Enough
					r.FirstByte, r.KthShard = r.FirstByte+moved, r.KthShard+moved
					r.Packets, r.PacketSum = 0, r.PacketSum+copyBytes(rows)*(now.Copies-before.Copies)
				}
				more = append(more, r)
			}
		}
	}
	return more
}

func question(nodes, connected int) sim.Broadcasted {
	return sim.Lookup{Seed: 1, Nodes: nodes, Connected: connected, OneWay: oneWay, Dial: 3 * 2 * oneWay, Answerers: 18, Enough: shardsInK}.Broadcast()
}

// copyBytes is what one copy of a question costs in the network, from the two
// sizes measured: the growth of the bytes by that of the copies.
func copyBytes(rows []row) int {
	realMax := measured(rows)
	small, _ := findRow(rows, byBroadcast, sizes[0], false, false, 1)
	large, _ := findRow(rows, byBroadcast, realMax, false, false, 1)
	copies := question(realMax, 0).Copies - question(sizes[0], 0).Copies
	if copies == 0 { // one size alone: with the answers
		hint, _ := findRow(rows, byHint, realMax, false, false, 1)
		return (small.PacketSum - hint.PacketSum) / max(1, question(realMax, 0).Copies)
	}
	return (large.PacketSum - small.PacketSum) / copies
}

func ms(d time.Duration) string {
	if d == 0 {
		return "–"
	}
	return fmt.Sprint(d.Round(time.Millisecond).Milliseconds())
}

func document(rows, more []row) []byte {
	var b bytes.Buffer
	realMax, all := measured(rows), slices.Concat(rows, more)
	ways := []way{byHint, byKeepers, byBroadcast, byWalk}
	table := func(pick func(row) bool) {
		fmt.Fprintln(&b, "| by | nodes | connections | first byte, ms | k-th shard, ms | questions | messages | KB in the network | code |")
		fmt.Fprintln(&b, "| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
		for _, way := range ways {
			for _, n := range sizes {
				for _, r := range all {
					if r.Way != way || r.Nodes != n || !pick(r) {
						continue
					}
					warm, code := "warm", "real"
					if r.Cold {
						warm = "cold"
					}
					if !r.Real {
						code = "model"
					}
					messages := r.Messages
					if way == byBroadcast || r.Missing && way == byKeepers {
						messages += question(n, 0).Copies
					}
					fmt.Fprintf(&b, "| %s | %d | %s | %s | %s | %d | %d | %d | %s |\n", way, n, warm, ms(r.FirstByte), ms(r.KthShard), r.Searches, messages, r.PacketSum/1000, code)
				}
			}
		}
	}
	fmt.Fprintf(&b, lookupIntro, realMax)
	fmt.Fprint(&b, "## One stripe that is there\n\n")
	table(func(r row) bool { return r.Stripes == 1 && !r.Missing })
	fmt.Fprint(&b, "\n![time to the k-th shard by size of the pool](lookup.svg)\n\n")
	fmt.Fprint(&b, verdict(all))
	fmt.Fprint(&b, "\n## A stripe that is not there\n\nk-th shard: until the reader is told. By keepers, with the broadcast after them; by the DHT, until the walk has converged.\n\n")
	table(func(r row) bool { return r.Missing })
	if slices.ContainsFunc(all, func(r row) bool { return r.Stripes > 1 }) {
		fmt.Fprintf(&b, "\n## %d stripes at once\n\nWarm. The shards are 66 MB, which take 5.2 s at 100 Mbit/s.\n\n", manyOnes)
		fmt.Fprintln(&b, "| by | nodes | found | first byte, ms | last k-th shard, ms | questions | KB in the network |")
		fmt.Fprintln(&b, "| --- | --- | --- | --- | --- | --- | --- |")
		for _, way := range ways {
			for _, r := range all {
				if r.Way == way && r.Stripes > 1 {
					fmt.Fprintf(&b, "| %s | %d | %d | %s | %s | %d | %d |\n", way, r.Nodes, r.Found, ms(r.FirstByte), ms(r.KthShard), r.Searches, r.PacketSum/1000)
				}
			}
		}
	}
	fmt.Fprint(&b, "\n## A member with few connections\n\nThe model's broadcast by a member that is connected to 16 others only, such as one with a home profile; the answers of others dial it.\n\n")
	fmt.Fprintln(&b, "| nodes | hops to the last member | first answer, ms | k shards named, ms | copies of the question |\n| --- | --- | --- | --- | --- |")
	for _, n := range sizes {
		q := question(n, 16)
		fmt.Fprintf(&b, "| %d | %d | %s | %s | %d |\n", n, q.Hops, ms(q.First), ms(q.Enough), q.Copies)
	}
	return b.Bytes()
}

// verdict compares broadcast and walk by what was measured.
func verdict(all []row) string {
	var b strings.Builder
	fmt.Fprintln(&b, "| nodes | broadcast, warm | DHT, warm | first at the k-th shard | broadcast, cold | DHT, cold | first |\n| --- | --- | --- | --- | --- | --- | --- |")
	for _, n := range sizes {
		fmt.Fprintf(&b, "| %d ", n)
		for _, cold := range []bool{false, true} {
			x, okX := findRow(all, byBroadcast, n, cold, false, 1)
			y, okY := findRow(all, byWalk, n, cold, false, 1)
			first := "–"
			if okX && okY {
				switch ratio := float64(x.KthShard) / float64(y.KthShard); {
				case ratio < 0.95:
					first = "broadcast"
				case ratio > 1.05:
					first = "DHT"
				default:
					first = "neither"
				}
			}
			fmt.Fprintf(&b, "| %s | %s | %s ", ms(x.KthShard), ms(y.KthShard), first)
		}
		fmt.Fprintln(&b, "|")
	}
	const fetch = 2 * oneWay
	at := func(way way, n int, cold bool) row {
		r, _ := findRow(all, way, n, cold, false, 1)
		return r
	}
	trips := func(cold bool) (least, most float64) {
		least = math.Inf(1)
		for _, n := range sizes {
			took := math.Round(float64(at(byWalk, n, cold).FirstByte-fetch) / float64(fetch))
			least, most = min(least, took), max(most, took)
		}
		return least, most
	}
	small, large := sizes[0], sizes[len(sizes)-1]
	warmLeast, warmMost := trips(false)
	coldLeast, coldMost := trips(true)
	holds := "does not hold"
	if warmLeast >= 3 {
		holds = "holds"
	}
	fmt.Fprintf(&b, verdictText, holds, span(warmLeast, warmMost), span(coldLeast, coldMost),
		ms(at(byBroadcast, small, false).KthShard), ms(at(byBroadcast, large, false).KthShard),
		ms(at(byWalk, small, false).KthShard), ms(at(byWalk, large, false).KthShard),
		at(byBroadcast, small, false).PacketSum/1000, at(byBroadcast, large, false).PacketSum/1000,
		at(byWalk, small, false).PacketSum/1000, at(byWalk, large, false).PacketSum/1000,
		ms(at(byBroadcast, small, true).KthShard), ms(at(byBroadcast, large, true).KthShard),
		ms(at(byWalk, small, true).KthShard), ms(at(byWalk, large, true).KthShard))
	return b.String()
}

func span(least, most float64) string {
	switch {
	case least == most && most == 1:
		return "1 round trip"
	case least == most:
		return fmt.Sprintf("%.0f round trips", most)
	}
	return fmt.Sprintf("%.0f to %.0f round trips", least, most)
}

const verdictText = `
**The claim "one broadcast against 3 to 5 DHT hops" %s.** Before the fetch, a walk of the DHT takes %s with warm connections and %s with cold ones,
where each new peer costs a dial: it asks 10 peers at once, and among 1,000 a full routing table always knows somebody near the record.

- Warm, as members of a pool are by their heartbeats: the broadcast has k shards after %s ms at 20 nodes and %s ms at 1,000, the DHT after %s ms and %s ms. Neither wins by time. By bytes
  the broadcast grows with the pool, from %d to %d KB, the walk does not: %d and %d KB.
- Cold: the broadcast takes %s ms and %s ms, the DHT %s ms and %s ms; the table says who wins at which size. A question waits until some members are connected, up to a second:
  what is published before leaves with gossip's next heartbeat, which made it 1,230 ms.
- Keepers beat both: as fast when warm, the same few messages at every size, and nothing to publish or to renew. The broadcast is left for stripes whose keepers are all gone.
`

const lookupIntro = `# Lookup, measured

` + "`make lookup`" + ` writes this file and its plot. Every link takes 50 ms each way and carries 100 Mbit/s. A stripe is 4+2, mirrored, of 16 KiB shards. *First byte* and
*k-th shard* are the times from the call of the reader until the first verified shard, and until k of them, fetching included: one round trip of 100 ms of each figure is the fetch.
*Questions* are requests that ask where shards are, or broadcasts. *Messages* are requests, replies and answers, those of the fetch included, and for a broadcast the copies of the
question that members pass on, as the model counts them. *KB in the network* is all that all members send meanwhile, the shards (66 KB) included. *Cold* means that the reader has lost
all its connections the moment before; a member then connects to all others at once, which is most of its KB, and which the model does not count.

- Real code up to %d nodes: hosts of package ` + "`p2p`" + `, nodes with their stores, the reader of package ` + "`stripe`" + `, over marcopolo/simnet, the network below go-libp2p's
  ` + "`x/simlibp2p`" + `, under testing/synctest. Above that size, a model (` + "`sim.Lookup`" + `), set to what the real code took at the sizes below.
- The DHT is kad-dht v0.42.1 with its defaults, at every size, on bare libp2p hosts with full routing tables and a provider record for each of the 12 copies at the 20 nearest
  members. This program has no such records; the walk is there to be compared with.
- Medians of 3.

`

// plot draws the time to the k-th shard by size.
func plot(rows []row) []byte {
	const width, height, left, top, right, bottom = 760, 420, 60, 20, 170, 50
	colours := map[way]string{byHint: "#2b8a3e", byKeepers: "#1864ab", byBroadcast: "#e8590c", byWalk: "#862e9c"}
	most := 0.0
	for _, r := range rows {
		if r.Stripes == 1 && !r.Missing {
			most = max(most, float64(r.KthShard.Milliseconds()))
		}
	}
	most = math.Ceil(most/200) * 200
	x := func(n int) float64 {
		return left + (width-left-right)*(math.Log(float64(n))-math.Log(20))/(math.Log(1000)-math.Log(20))
	}
	y := func(ms float64) float64 { return height - bottom - (height-top-bottom)*ms/most }
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	for tick := 0.0; tick <= most; tick += 200 {
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.0f</text>`+"\n",
			left, width-right, y(tick), y(tick), left-8, y(tick)+4, tick)
	}
	for _, n := range sizes {
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%d</text>`+"\n", x(n), height-bottom+18, n)
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">nodes</text><text x="14" y="%d" transform="rotate(-90 14 %d)" text-anchor="middle">ms to the k-th shard</text>`+"\n",
		(left+width-right)/2, height-12, height/2, height/2)
	legend := 0
	for _, way := range []way{byHint, byKeepers, byBroadcast, byWalk} {
		for _, cold := range []bool{false, true} {
			dash, name := "", string(way)+", warm"
			if cold {
				dash, name = ` stroke-dasharray="6 4"`, string(way)+", cold"
			}
			var points []string
			for _, n := range sizes {
				if r, ok := findRow(rows, way, n, cold, false, 1); ok {
					px, py := x(n), y(float64(r.KthShard.Milliseconds()))
					points = append(points, fmt.Sprintf("%.1f,%.1f", px, py))
					fill := colours[way]
					if !r.Real {
						fill = "white"
					}
					fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s" stroke="%s"/>`+"\n", px, py, fill, colours[way])
				}
			}
			fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="1.5"%s/>`+"\n", strings.Join(points, " "), colours[way], dash)
			at := top + 10 + 20*legend
			fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="%s" stroke-width="1.5"%s/><text x="%d" y="%d">%s</text>`+"\n",
				width-right+15, width-right+45, at, at, colours[way], dash, width-right+52, at+4, name)
			legend++
		}
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d">filled: real code</text><text x="%d" y="%d">hollow: model</text>`+"\n</svg>\n", width-right+15, top+200, width-right+15, top+218)
	return b.Bytes()
}
