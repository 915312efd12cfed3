package shardstore

import (
	"sync/atomic"
	"testing"
)

func BenchmarkPutShard1MiB(b *testing.B) {
	o := testOptions(b.TempDir())
	o.PackBytes, o.CapacityBytes = 256<<20, 1<<40
	s := mustOpen(b, o)
	sh := testShard(1, 1<<20)
	var n atomic.Uint32
	b.SetBytes(int64(len(sh.Body)))
	b.SetParallelism(8)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			sh := sh
			i := n.Add(1)
			sh.Blind[0], sh.Blind[1], sh.Blind[2] = byte(i), byte(i>>8), byte(i>>16)
			if err := s.PutShard(ctx, sh); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkPutIndex(b *testing.B) {
	s := mustOpen(b, testOptions(b.TempDir()))
	rec := make([]byte, 1000)
	var n atomic.Uint32
	b.SetParallelism(32)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			i := n.Add(1)
			if err := s.PutIndex(ctx, [32]byte{byte(i), byte(i >> 8), byte(i >> 16)}, 1, rec); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkReadShard(b *testing.B) {
	o := testOptions(b.TempDir())
	o.PackBytes = 256 << 20
	s := mustOpen(b, o)
	sh := testShard(1, 1<<20)
	if err := s.PutShard(ctx, sh); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 2<<20)
	for name, n := range map[string]int{"1MiB": 0, "16KiB": 16 << 10} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(max(n, (n-1)&(1<<20))))
			for b.Loop() {
				if _, err := s.ReadShard(sh.Key, 0, n, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
