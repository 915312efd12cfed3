package main

// budget is how many MB/s the cores of this machine allow, by the stages'
// benchmarks of the same run: B in the targets.
//
// A stage that one thread does costs the seconds that its benchmark took. The
// network and FUSE have two sides, which together keep every core busy.
type budget struct {
	cores  float64
	stages map[string]float64 // MB/s of each, by package and benchmark
	// fuse are the MB/s of a FUSE filesystem that does nothing.
	fuseRead, fuseWrite float64
}

// share is a part of the work: so many bytes go through a stage for each byte
// of a file.
type share struct {
	stage string
	times float64
	sides float64 // 2: the benchmark measures both sides, on all cores
}

// read is the budget of a sequential read from the nodes. ok is false where a
// stage was not measured.
func (b budget) read() (mbPerSec float64, ok bool) {
	return b.sum(b.fuseRead,
		share{"p2p Call/get/tcp/1024KiB/4", 1, 2},
		share{"shardstore ReadShard/1MiB", 1, 1},
		share{"erasure VerifyCoded/1024KiB", 1, 1},
		share{"seal OpenSlice/1024K", 1, 1})
}

// drain is the budget of a sequential write and its way to the nodes, each byte
// of which becomes so many bytes on them.
func (b budget) drain(expansion float64) (mbPerSec float64, ok bool) {
	return b.sum(b.fuseWrite,
		share{"cache Append/1024KiB", 1, 1},
		share{"cache ReadAt/1024KiB", 1, 1},
		share{"chunker Next", 1, 1},
		share{"chunker Hash", 1, 1},
		share{"seal SealSlice/1024K", 1, 1},
		share{"erasure Build/10+4×256KiB", 1, 1},
		share{"p2p Call/put/tcp/1024KiB/4", expansion, 2},
		share{"shardstore PutShard1MiB", expansion, 1})
}

func (b budget) sum(fuse float64, shares ...share) (mbPerSec float64, ok bool) {
	if fuse <= 0 {
		return 0, false
	}
	secondsPerMB := b.cores / fuse
	for _, s := range shares {
		speed := b.stages[s.stage]
		if speed <= 0 {
			return 0, false
		}
		seconds := s.times / speed
		if s.sides > 1 {
			seconds *= b.cores
		}
		secondsPerMB += seconds
	}
	return b.cores / secondsPerMB, true
}
