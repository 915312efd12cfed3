package erasure_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/defs-fs/defs/erasure"
	"pgregory.net/rapid"
)

func TestParsePolicy(t *testing.T) {
	for text, want := range map[string]erasure.Policy{
		"":                          {Mode: "auto", Mirror: "auto", ShardBytes: 1 << 20},
		"auto":                      {Mode: "auto", Mirror: "auto", ShardBytes: 1 << 20},
		"mirror=off":                {Mode: "auto", Mirror: "off", ShardBytes: 1 << 20},
		"4+2":                       {Mode: "rs-ratio", K: 4, M: 2, Mirror: "auto", ShardBytes: 1 << 20},
		"rs-ratio:4+2,mirror=on":    {Mode: "rs-ratio", K: 4, M: 2, Mirror: "on", ShardBytes: 1 << 20},
		"auto:10+4":                 {Mode: "auto", K: 10, M: 4, Mirror: "auto", ShardBytes: 1 << 20},
		"file":                      {Mode: "file", K: 1, M: 2, Mirror: "auto", ShardBytes: 1 << 20},
		"slice:1+5, shard=64KiB":    {Mode: "slice", K: 1, M: 5, Mirror: "auto", ShardBytes: 64 << 10},
		"rs-size,shard=256K":        {Mode: "rs-size", K: 10, M: 4, Mirror: "auto", ShardBytes: 256 << 10},
		"100+100,shard=33554432":    {Mode: "rs-ratio", K: 100, M: 100, Mirror: "auto", ShardBytes: 32 << 20},
		"auto,mirror=auto,shard=1M": {Mode: "auto", Mirror: "auto", ShardBytes: 1 << 20},
	} {
		got, err := erasure.ParsePolicy(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
		if again, err := erasure.ParsePolicy(got.String()); err != nil || again != got {
			t.Errorf("%q: String %q reads as %+v, %v", text, got, again, err)
		}
	}
}

func TestParsePolicyViolations(t *testing.T) {
	for text, want := range map[string][]string{
		":4+2":                     {"no mode"},
		",mirror=on":               {"no mode"},
		"raid:4+2":                 {`unknown mode "raid"`},
		"rs-ratio":                 {"needs K+M"},
		"rs-ratio:0+2":             {"is not K+M"},
		"rs-ratio:4":               {"is not K+M"},
		"rs-ratio:4+-2":            {"is not K+M"},
		"4++2":                     {"is not K+M"},
		"101+100":                  {"K must be 1 to 100, not 101"},
		"4+101":                    {"M must be 1 to 100, not 101"},
		"auto:1+2":                 {"never uses K = 1"},
		"file:2+2":                 {"K must be 1, not 2"},
		"4+2,4+2":                  {"is not NAME=VALUE"},
		"4+2,size=3":               {`unknown setting "size"`},
		"4+2,shard=63KiB":          {`unknown shard size "63KiB"`},
		"4+2,mirror=on,mirror=off": {"mirror is given twice"},
		strings.Repeat("a", 257):   {"at most 256"},
		// All violations at once.
		"raid:200+300,mirror=maybe,shard=1": {`unknown mode "raid"`, `unknown mirror setting "maybe"`, `unknown shard size "1"`},
		"rs-ratio:200+300,mirror=":          {"K must be", "M must be"},
	} {
		_, err := erasure.ParsePolicy(text)
		if !errors.Is(err, erasure.ErrInvalid) {
			t.Errorf("%q: %v", text, err)
			continue
		}
		for _, part := range want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q: %q lacks %q", text, err, part)
			}
		}
	}
	bad := erasure.Policy{Mode: "rs-ratio", K: 0, M: 101, Mirror: "x", ShardBytes: 5}
	for _, part := range []string{"K must", "M must", "mirror setting", "shard size"} {
		if err := bad.Validate(); !errors.Is(err, erasure.ErrInvalid) || !strings.Contains(err.Error(), part) {
			t.Errorf("Validate: %v lacks %q", err, part)
		}
	}
	if _, _, err := bad.Geometry(9, 9); !errors.Is(err, erasure.ErrInvalid) {
		t.Errorf("Geometry: %v", err)
	}
}

func TestGeometryValidate(t *testing.T) {
	if err := (erasure.Geometry{K: 4, M: 2, ShardBytes: 64 << 10}).Validate(); err != nil {
		t.Error(err)
	}
	err := erasure.Geometry{K: 0, M: 101, ShardBytes: 3}.Validate()
	for _, part := range []string{"K must", "M must", "shard size must"} {
		if !errors.Is(err, erasure.ErrInvalid) || !strings.Contains(err.Error(), part) {
			t.Errorf("%v lacks %q", err, part)
		}
	}
}

// The sentences of the design, as a table.
func TestGeometryOfPools(t *testing.T) {
	const full = math.MaxInt
	const kib, mib = 1 << 10, 1 << 20
	for _, c := range []struct {
		policy string
		live   int
		bytes  int
		want   string // "" for too few nodes
	}{
		{"auto", 1, full, ""},
		{"auto", 2, full, ""}, // k is never below 2
		{"auto", 3, full, "2+1×1MiB"},
		{"auto", 4, full, "2+2×1MiB"},
		{"auto", 5, full, "3+2×1MiB"},
		{"auto", 6, full, "4+2×1MiB"},
		{"auto", 7, full, "4+2×1MiB"},
		{"auto", 8, full, "4+3×1MiB"},  // parity in pools too small for mirrors
		{"auto", 13, full, "4+8×1MiB"}, // meets the durability target
		{"auto", 14, full, "4+2×1MiB mirrored"},
		{"auto", 20, full, "6+3×1MiB mirrored"},
		{"auto", 30, full, "10+4×1MiB mirrored"},
		{"auto", 500, full, "10+4×1MiB mirrored"},
		{"auto,mirror=off", 14, full, "5+8×1MiB"},
		{"auto,mirror=off", 20, full, "10+9×1MiB"},
		{"auto,mirror=on", 5, full, ""},
		{"auto,mirror=on", 6, full, "2+1×1MiB mirrored"},
		{"auto,mirror=on", 12, full, "3+2×1MiB mirrored"},
		{"auto:4+2", 5, full, "3+2×1MiB"},
		{"auto:4+2", 2, full, ""},
		{"4+2", 1, full, ""},
		{"4+2", 2, full, "1+1×1MiB"},
		{"4+2", 3, full, "2+1×1MiB"},
		{"4+2", 5, full, "3+2×1MiB"},
		{"4+2", 6, full, "4+2×1MiB"},
		{"4+2", 13, full, "4+2×1MiB"},
		{"4+2", 14, full, "4+2×1MiB mirrored"},
		{"4+2,mirror=off", 14, full, "4+2×1MiB"},
		{"4+2,mirror=on", 12, full, "4+2×1MiB mirrored"},
		{"4+2,mirror=on", 11, full, "3+2×1MiB mirrored"},
		{"4+2,mirror=on", 3, full, ""},
		{"100+100", 200, full, "100+100×1MiB"},
		{"100+100", 150, full, "50+100×1MiB"},
		{"100+100", 50, full, "2+48×1MiB"},
		{"file", 2, full, "1+1×1MiB"},
		{"slice:1+5", 4, full, "1+3×1MiB"},

		// Partial stripes: shard size first, then k.
		{"4+2", 6, 4 * mib, "4+2×1MiB"},
		{"4+2", 6, 3*mib + 1, "4+2×1MiB"},
		{"4+2", 6, 3 * mib, "3+2×1MiB"},
		{"4+2", 6, 2*mib + 1, "3+2×1MiB"},
		{"4+2", 6, mib + 1, "3+2×512KiB"},
		{"4+2", 6, mib, "4+2×256KiB"},
		{"4+2", 6, 100 * kib, "4+2×32KiB"},
		{"4+2", 6, 64 * kib, "4+2×16KiB"},
		{"4+2", 6, 16 * kib, "2+2×16KiB"},
		{"4+2", 6, 0, "2+2×16KiB"},
		{"4+2", 14, 0, "2+2×16KiB mirrored"},
		{"4+2", 12, 0, "2+2×16KiB"}, // mirrors count for the full stripe
		{"auto", 6, 1, "2+2×16KiB"},
		{"slice", 3, 1, "1+2×16KiB"},
		{"slice", 3, 16*kib + 1, "1+2×32KiB"},
		{"file:1+2", 3, 300 * kib, "1+2×512KiB"},
		{"1+2,shard=32MiB", 3, 17 * mib, "1+2×32MiB"},

		// rs-size: k from the size.
		{"rs-size,shard=256KiB", 14, 256*kib + 1, "2+4×256KiB"},
		{"rs-size:10+4,shard=256KiB", 14, 2560 * kib, "10+4×256KiB"},
		{"rs-size:10+4,shard=256KiB", 14, 1024 * kib, "4+4×256KiB"},
		{"rs-size:10+4,shard=256KiB", 14, 513 * kib, "3+4×256KiB"},
		{"rs-size:10+4,shard=256KiB", 14, 512 * kib, "2+4×256KiB"},
		{"rs-size:10+4,shard=256KiB", 14, 10 * kib, "2+4×16KiB"},
	} {
		policy, err := erasure.ParsePolicy(c.policy)
		if err != nil {
			t.Fatal(err)
		}
		g, mirrored, err := policy.Geometry(c.live, c.bytes)
		got := g.String()
		if mirrored {
			got += " mirrored"
		}
		if c.want == "" {
			if !errors.Is(err, erasure.ErrTooFewNodes) {
				t.Errorf("%s on %d nodes: %s, %v; want too few nodes", c.policy, c.live, got, err)
			}
		} else if err != nil || got != c.want {
			t.Errorf("%s on %d nodes, %d bytes: %s, %v; want %s", c.policy, c.live, c.bytes, got, err, c.want)
		}
	}
}

func drawPolicy(t *rapid.T, kMax, mMax int) erasure.Policy {
	p := erasure.Policy{
		Mode:       rapid.SampledFrom([]erasure.Mode{"file", "slice", "rs-size", "rs-ratio", "auto"}).Draw(t, "mode"),
		Mirror:     rapid.SampledFrom([]erasure.Mirror{"auto", "on", "off"}).Draw(t, "mirror"),
		ShardBytes: rapid.SampledFrom(erasure.ShardSizes()[:4]).Draw(t, "shard"),
	}
	given := rapid.Bool().Draw(t, "counts given")
	switch {
	case p.Mode == "rs-ratio" || given && p.Mode == "rs-size":
		p.K, p.M = rapid.IntRange(1, kMax).Draw(t, "k"), rapid.IntRange(1, mMax).Draw(t, "m")
	case given && p.Mode == "auto":
		p.K, p.M = rapid.IntRange(2, kMax).Draw(t, "k"), rapid.IntRange(1, mMax).Draw(t, "m")
	case given:
		p.K, p.M = 1, rapid.IntRange(1, mMax).Draw(t, "m")
	}
	p.EnsureDefaults()
	return p
}

func TestGeometryProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPolicy(t, 100, 100)
		if again, err := erasure.ParsePolicy(p.String()); err != nil || again != p {
			t.Fatalf("%+v: %q reads as %+v, %v", p, p, again, err)
		}
		live := rapid.IntRange(0, 450).Draw(t, "live")
		full, mirrored, err := p.Geometry(live, math.MaxInt)
		if err != nil {
			enough := 3
			if p.Mode != erasure.ModeAuto {
				enough = 2
			}
			if p.Mirror == erasure.MirrorOn {
				enough *= 2
			}
			if !errors.Is(err, erasure.ErrTooFewNodes) || live >= enough {
				t.Fatalf("%s on %d nodes: %v", p, live, err)
			}
			return
		}
		bytes := rapid.IntRange(0, full.DataBytes()).Draw(t, "bytes")
		g, gMirrored, err := p.Geometry(live, bytes)
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Validate(); err != nil {
			t.Fatal(err)
		}
		nodes := g.N()
		if mirrored {
			nodes *= 2
		}
		switch {
		case g.DataBytes() < bytes:
			t.Fatalf("%s does not hold %d bytes", g, bytes)
		case nodes > live:
			t.Fatalf("%s on %d nodes", g, live)
		case gMirrored != mirrored:
			t.Fatal("a partial stripe is mirrored otherwise than a full one")
		case p.Mirror == erasure.MirrorOff && mirrored, p.Mirror == erasure.MirrorOn && !mirrored:
			t.Fatalf("%s: mirrored %v", p, mirrored)
		case p.Mirror == erasure.MirrorAuto && mirrored != (live >= 2*full.N()+2):
			t.Fatalf("%s on %d nodes: mirrored %v", full, live, mirrored)
		case p.Mode == erasure.ModeAuto && g.K < 2:
			t.Fatalf("auto with %s", g)
		case full.K >= 2 && g.K < 2:
			t.Fatalf("a partial stripe lost the threshold: %s of %s", g, full)
		case g.K > full.K || g.M != full.M || g.ShardBytes > p.ShardBytes:
			t.Fatalf("%s is no part of %s", g, full)
		case g.K > min(2, full.K) && (g.K-1)*g.ShardBytes >= bytes:
			t.Fatalf("%s for %d bytes: fewer data shards would do", g, bytes)
		}
	})
}

// Every mode stores and returns every size, from any k verified shards.
func TestEveryModeRoundTrips(t *testing.T) {
	var codes erasure.Codes
	modes := map[erasure.Mode]int{}
	rapid.Check(t, func(t *rapid.T) {
		p := drawPolicy(t, 6, 4)
		p.ShardBytes = min(p.ShardBytes, 256<<10)
		full, _, err := p.Geometry(24, math.MaxInt)
		if err != nil {
			t.Fatal(err)
		}
		size := rapid.OneOf(
			rapid.SampledFrom([]int{0, 1, 15, 16<<10 - 1, 16 << 10, 16<<10 + 1, full.DataBytes() - 1, full.DataBytes()}),
			rapid.IntRange(0, full.DataBytes()),
		).Draw(t, "size")
		size = min(size, full.DataBytes())
		g, _, err := p.Geometry(24, size)
		if err != nil {
			t.Fatal(err)
		}
		modes[p.Mode]++

		code, err := codes.Get(g.K, g.M)
		if err != nil {
			t.Fatal(err)
		}
		columns, salt, err := code.NewColumns(randomness(byte(size)))
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, g.DataBytes())
		randomness(byte(size >> 8)).Read(data)
		bodies, err := code.Build(nil, columns, data)
		if err != nil {
			t.Fatal(err)
		}
		order := rapid.Permutation(indexes(g.N())).Draw(t, "order")
		shards, kept := make([][]byte, g.N()), make([][]byte, g.N())
		for _, i := range order[:g.K] {
			fetchShard(t, bodies[i], g, &shards[i], &kept[i])
		}
		if err := code.Reconstruct(shards, nil); err != nil {
			t.Fatal(err)
		}
		if got := bytes.Join(shards[:g.K], nil)[:size]; !bytes.Equal(got, data[:size]) {
			t.Fatalf("%s, %d bytes: data differs", g, size)
		}
		if got, err := code.Salt(kept); err != nil || got != salt {
			t.Fatalf("%s: salt %x, want %x, %v", g, got, salt, err)
		}
	})
	if len(modes) != 5 {
		t.Fatalf("modes tried: %v", modes)
	}
}

// fetchShard plays a node and a reader: body → outboard and proof → verified
// coded bytes and column.
func fetchShard(t *rapid.T, body []byte, g erasure.Geometry, coded, column *[]byte) {
	stored := body[erasure.ColumnBytes:]
	outboard, err := erasure.Outboard(stored)
	if err != nil {
		t.Fatal(err)
	}
	codedRoot, err := erasure.OutboardRoot(outboard)
	if err != nil {
		t.Fatal(err)
	}
	root := erasure.Root(body)
	*column = body[:erasure.ColumnBytes]
	if err := erasure.VerifyColumn(root, *column, codedRoot); err != nil {
		t.Fatal(err)
	}
	proof, err := erasure.Prove(stored, outboard, 0, g.ShardBytes)
	if err != nil {
		t.Fatal(err)
	}
	*coded = make([]byte, g.ShardBytes)
	if err := erasure.VerifyRange(root, erasure.ColumnHash(*column), g.ShardBytes, 0, g.ShardBytes, proof, *coded); err != nil {
		t.Fatal(err)
	}
}

func FuzzParsePolicy(f *testing.F) {
	for _, text := range []string{"", "auto", "4+2", "rs-ratio:4+2,mirror=auto", "file:1+2,shard=64KiB", "rs-size:,mirror=", ",,=", "auto:0+0"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := erasure.ParsePolicy(text)
		if err != nil {
			if !errors.Is(err, erasure.ErrInvalid) {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		if err := p.Validate(); err != nil {
			t.Fatalf("%q: parsed to an invalid policy: %v", text, err)
		}
		again, err := erasure.ParsePolicy(p.String())
		if err != nil || again != p {
			t.Fatalf("%q: %q reads as %+v, %v", text, p, again, err)
		}
		if g, _, err := p.Geometry(14, 1<<20); err == nil && g.Validate() != nil {
			t.Fatalf("%q: geometry %s", text, fmt.Sprint(g))
		}
	})
}
