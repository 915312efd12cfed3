// Package erasure turns a stripe's sealed bytes into n = k + m shards and
// back, and checks what peers return.
//
// A shard's body is a 32-byte column followed by ShardBytes coded bytes. Both
// are rows of one systematic Reed–Solomon code over GF(2^8), so any k bodies
// rebuild any other body bit for bit without a key. The columns of the data
// shards are random; the stripe's salt is coordinate n+1 of the same code over
// the columns. Any k columns give the salt, fewer tell nothing about it
// (McEliece and Sarwate, "On sharing secrets and Reed–Solomon codes", 1981).
// With k = 1 there is no threshold: the salt follows from any single shard.
//
// A stripe is written so:
//
//	g, mirrored, err := policy.Geometry(liveNodes, sealedBytes)
//	code, err := codes.Get(g.K, g.M) // codes is an erasure.Codes of the caller
//	columns, salt, err := code.NewColumns(rand.Reader)
//	data := seal(salt, g.DataBytes(), ...) // not this package
//	bodies, err := code.Build(nil, columns, data)
//	root := erasure.Root(bodies[i]) // goes into the stripe's manifest
//
// and read so, from any k shards:
//
//	err = erasure.VerifyRange(root, columnHash, g.ShardBytes, off, n, proof, shards[i])
//	err = code.Reconstruct(shards, nil)         // equal ranges of the shards will do
//
// The package is pure: no files, no network, no clock. It starts no
// goroutines of its own (codes with k or m over 10 use two inside the
// Reed–Solomon library, which end before the call returns), keeps no global
// state, and retains no buffer of the caller after a call returns. Nothing is
// lost in a crash because nothing is kept.
package erasure
