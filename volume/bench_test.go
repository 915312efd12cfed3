package volume

import (
	"fmt"
	"syscall"
	"testing"
)

func BenchmarkCreate(b *testing.B) {
	f := newFS(b)
	dir := f.mkdir(RootIno, "d")
	i := 0
	for b.Loop() {
		f.file(dir, fmt.Sprint("file", i))
		i++
	}
}

func BenchmarkCreateUnlink(b *testing.B) {
	f := newFS(b)
	dir := f.mkdir(RootIno, "d")
	for b.Loop() {
		ino := f.file(dir, "file")
		f.Acquire(ino, 1)
		f.ok(f.Unlink(f.ctx, dir, "file"))
		f.Release(ino, 1)
	}
}

func benchmarkWrite(b *testing.B, bytes int, next func(i, bytes int) int64) {
	f := newFS(b)
	ino := f.file(RootIno, "a")
	data := make([]byte, bytes)
	b.SetBytes(int64(bytes))
	i := 0
	for b.Loop() {
		if _, err := f.Write(f.ctx, ino, next(i, bytes), data, WriteFlags{KillPriv: true}); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

func BenchmarkWrite(b *testing.B) {
	sequential := func(i, bytes int) int64 { return int64(i * bytes) }
	overwrite := func(i, bytes int) int64 { return int64(i * 7919 % 4096 * bytes) }
	b.Run("sequential-4K", func(b *testing.B) { benchmarkWrite(b, 4<<10, sequential) })
	b.Run("overwrite-4K", func(b *testing.B) { benchmarkWrite(b, 4<<10, overwrite) })
	b.Run("same-4K", func(b *testing.B) { benchmarkWrite(b, 4<<10, func(int, int) int64 { return 4096 }) })
	b.Run("sequential-128K", func(b *testing.B) { benchmarkWrite(b, 128<<10, sequential) })
	b.Run("sequential-1M", func(b *testing.B) { benchmarkWrite(b, 1<<20, sequential) })
}

func BenchmarkRead(b *testing.B) {
	for _, bytes := range []int{4 << 10, 128 << 10} {
		b.Run(fmt.Sprintf("%dK", bytes>>10), func(b *testing.B) {
			f := newFS(b)
			ino := f.file(RootIno, "a")
			const count = 64
			data := make([]byte, bytes)
			for i := range count {
				f.write(ino, int64(i*bytes), string(data))
			}
			b.SetBytes(int64(bytes))
			i := 0
			for b.Loop() {
				if _, err := f.Read(f.ctx, ino, int64(i*7919%count*bytes), data); err != nil {
					b.Fatal(err)
				}
				i++
			}
		})
	}
}

func BenchmarkLookups(b *testing.B) {
	f := newFS(b)
	dir := f.mkdir(RootIno, "d")
	const count = 10000
	inos, names := make([]Ino, count), make([]string, count)
	for i := range count {
		names[i] = fmt.Sprint("file", i)
		inos[i] = f.create(dir, names[i], syscall.S_IFREG|0o644)
	}
	i := 0
	b.Run("getattr", func(b *testing.B) {
		for b.Loop() {
			if _, err := f.GetAttr(f.ctx, inos[i%count]); err != nil {
				b.Fatal(err)
			}
			i++
		}
	})
	b.Run("lookup", func(b *testing.B) {
		for b.Loop() {
			if _, err := f.Lookup(f.ctx, dir, names[i*7919%count]); err != nil {
				b.Fatal(err)
			}
			i++
		}
	})
	b.Run("lookup-missing", func(b *testing.B) {
		for b.Loop() {
			if _, err := f.Lookup(f.ctx, dir, "none"); err == nil {
				b.Fatal("found")
			}
		}
	})
	b.Run("readdir-entry", func(b *testing.B) {
		for n := 0; n < b.N; n += count {
			f.names(dir)
		}
	})
}
