package erasure_test

import (
	"fmt"
	"testing"

	"github.com/defs-fs/defs/erasure"
)

func benchmarkGeometries(b *testing.B, run func(b *testing.B, g erasure.Geometry)) {
	for _, g := range []erasure.Geometry{
		{K: 4, M: 2, ShardBytes: 16 << 10},
		{K: 4, M: 2, ShardBytes: 1 << 20},
		{K: 10, M: 4, ShardBytes: 256 << 10},
		{K: 20, M: 8, ShardBytes: 64 << 10},
	} {
		b.Run(g.String(), func(b *testing.B) { run(b, g) })
	}
}

func BenchmarkBuild(b *testing.B) {
	benchmarkGeometries(b, func(b *testing.B, g erasure.Geometry) {
		code := newCode(b, g.K, g.M)
		columns, _ := newColumns(b, code, 1)
		data := randomBytes(b, 1, g.DataBytes())
		var bodies [][]byte
		b.SetBytes(int64(g.DataBytes()))
		for b.Loop() {
			var err error
			if bodies, err = code.Build(bodies, columns, data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	benchmarkGeometries(b, func(b *testing.B, g erasure.Geometry) {
		code, bodies, _, _ := stripe(b, g.K, g.M, g.ShardBytes, 1)
		b.SetBytes(int64(g.DataBytes()))
		for b.Loop() {
			if err := code.Encode(bodies); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkReconstruct loses the first min(k, m) data shards.
func BenchmarkReconstruct(b *testing.B) {
	benchmarkGeometries(b, func(b *testing.B, g erasure.Geometry) {
		code, bodies, _, _ := stripe(b, g.K, g.M, g.ShardBytes, 1)
		want := make([]bool, g.N())
		for i := range min(g.K, g.M) {
			want[i] = true
		}
		b.SetBytes(int64(g.DataBytes()))
		for b.Loop() {
			for i := range want {
				if want[i] {
					bodies[i] = bodies[i][:0]
				}
			}
			if err := code.Reconstruct(bodies, want); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkNew(b *testing.B) {
	for _, counts := range [][2]int{{4, 2}, {10, 4}, {100, 100}} {
		b.Run(fmt.Sprintf("%d+%d", counts[0], counts[1]), func(b *testing.B) {
			for b.Loop() {
				newCode(b, counts[0], counts[1])
			}
		})
	}
}

func BenchmarkSalt(b *testing.B) {
	code := newCode(b, 10, 4)
	columns, _ := newColumns(b, code, 1)
	columns[0], columns[3] = nil, nil
	for b.Loop() {
		if _, err := code.Salt(columns); err != nil {
			b.Fatal(err)
		}
	}
}

func benchmarkShards(b *testing.B, run func(b *testing.B, s shard)) {
	for _, shardBytes := range []int{16 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", shardBytes>>10), func(b *testing.B) {
			s := newShard(b, shardBytes)
			b.SetBytes(int64(shardBytes))
			b.ReportAllocs()
			run(b, s)
		})
	}
}

func BenchmarkCRC(b *testing.B) {
	benchmarkShards(b, func(b *testing.B, s shard) {
		for b.Loop() {
			erasure.CRC(s.body)
		}
	})
}

func BenchmarkRoot(b *testing.B) {
	benchmarkShards(b, func(b *testing.B, s shard) {
		for b.Loop() {
			erasure.Root(s.body)
		}
	})
}

func BenchmarkOutboard(b *testing.B) {
	benchmarkShards(b, func(b *testing.B, s shard) {
		for b.Loop() {
			if _, err := erasure.Outboard(s.coded); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkProve(b *testing.B) {
	benchmarkShards(b, func(b *testing.B, s shard) {
		for b.Loop() {
			if _, err := s.prove(0, len(s.coded)); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkVerifyRange(b *testing.B) {
	benchmarkShards(b, func(b *testing.B, s shard) {
		proof, err := s.prove(0, len(s.coded))
		if err != nil {
			b.Fatal(err)
		}
		dst := make([]byte, len(s.coded))
		for b.Loop() {
			if err := erasure.VerifyRange(s.root, s.columnHash, len(s.coded), 0, len(s.coded), proof, dst); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkVerifyCoded(b *testing.B) {
	benchmarkShards(b, func(b *testing.B, s shard) {
		for b.Loop() {
			if err := erasure.VerifyCoded(s.root, s.columnHash, s.coded); err != nil {
				b.Fatal(err)
			}
		}
	})
}
