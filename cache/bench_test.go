package cache_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/defs-fs/defs/cache"
)

// benchStore is on the disk of the working directory's temporary files and
// drops what it wrote, so that it stays small.
func benchStore(b *testing.B) *cache.Store {
	return mustOpen(b, cache.Options{Dir: b.TempDir(), Key: testKey, Logger: quiet(), MaxCleanBytes: 64 << 20})
}

// reportCPU measures the processor time of an operation, which a busy machine
// disturbs less than the clock.
func reportCPU(b *testing.B) (stop func()) {
	used := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	start := used()
	return func() { b.ReportMetric(float64(used()-start)/float64(b.N), "cpu-ns/op") }
}

func noMeta(uint64, cache.Ref) ([]byte, error) { return make([]byte, 100), nil }

func benchAppend(b *testing.B, s *cache.Store, data []byte) uint64 {
	sealed, err := s.Seal(data)
	if err != nil {
		b.Fatal(err)
	}
	seq, err := s.Append(sealed, noMeta)
	if err != nil {
		b.Fatal(err)
	}
	return seq
}

// trimJournal turns all full segments clean.
func trimJournal(b *testing.B, s *cache.Store) {
	for _, info := range s.Segments() {
		if !info.Active && info.LastSeq <= s.Durable() {
			if err := s.MarkClean(info.ID); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{0, 4 << 10, 128 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", n>>10), func(b *testing.B) {
			s, data := benchStore(b), make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			defer reportCPU(b)()
			for i := 0; b.Loop(); i++ {
				benchAppend(b, s, data)
				if i%256 == 0 {
					trimJournal(b, s)
				}
			}
		})
	}
}

func BenchmarkSync(b *testing.B) {
	for _, goroutines := range []int{1, 16} {
		b.Run(fmt.Sprint(goroutines), func(b *testing.B) {
			s, data := benchStore(b), make([]byte, 4096)
			var failed atomic.Bool
			defer reportCPU(b)()
			b.SetParallelism(goroutines / 2) // times GOMAXPROCS
			if goroutines == 1 {
				for b.Loop() {
					if s.Sync(context.Background(), benchAppend(b, s, data)) != nil {
						b.Fatal("sync")
					}
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if s.Sync(context.Background(), benchAppend(b, s, data)) != nil {
						failed.Store(true)
					}
				}
			})
			if failed.Load() {
				b.Fatal("sync")
			}
		})
	}
}

func BenchmarkReadAt(b *testing.B) {
	for _, n := range []int{4 << 10, 128 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", n>>10), func(b *testing.B) {
			s := benchStore(b)
			r := mustAppend(b, s, content(1, 1<<20))
			dst := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			defer reportCPU(b)()
			for b.Loop() {
				if err := s.ReadAt(r.ref, (1<<20)-n, dst); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
