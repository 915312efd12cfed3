package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/memnet"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/shardstore"
)

var ctx = context.Background()

func testLogger() *slog.Logger {
	if os.Getenv("DEFS_TEST_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.NewTextHandler(io.Discard, nil))
}

// logText collects what nodes log.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logText) has(words string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Contains(l.text.Bytes(), []byte(words))
}

func (l *logText) all() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// pool is some nodes and one device on a network in memory.
type pool struct {
	t      testing.TB
	log    *logText // of all nodes
	net    *memnet.Network
	set    func(*Options)
	nodes  map[placement.NodeID]*member
	device *memnet.Node
	count  uint64 // of authorizations
}

type member struct {
	id        placement.NodeID
	dir       string
	store     *shardstore.Store
	transport p2p.Transport
	node      *Node
	cancel    context.CancelFunc
}

func nodeID(i int) placement.NodeID { return placement.NodeID(fmt.Sprintf("node%02d", i)) }

func newPool(t testing.TB, nodes int) *pool { return newPoolWith(t, nodes, nil) }

// newPoolWith is newPool with nodes whose options set has changed.
func newPoolWith(t testing.TB, nodes int, set func(*Options)) *pool {
	p := &pool{t: t, set: set, log: &logText{}, net: memnet.New(), nodes: map[placement.NodeID]*member{}}
	p.device = p.net.Add(p2p.Member{ID: "device", Role: p2p.RoleDevice})
	for i := range nodes {
		p.add(nodeID(i))
	}
	t.Cleanup(func() {
		p.device.Close()
		if t.Failed() {
			t.Logf("what the nodes logged:\n%s", p.log.all())
		}
	})
	return p
}

func (p *pool) add(id placement.NodeID) {
	m := startMember(p.t, p.net.Add(p2p.Member{ID: id, Role: p2p.RoleNode, Host: "host of " + string(id), CapacityBytes: 1 << 30}), p.t.TempDir(), slog.New(slog.NewTextHandler(p.log, nil)), p.set)
	p.nodes[id] = m
}

func startMember(t testing.TB, transport p2p.Transport, dir string, log *slog.Logger, set func(*Options)) *member {
	store, err := shardstore.Open(shardstore.Options{Dir: dir, CapacityBytes: 1 << 30, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Store: store, Transport: transport, Logger: log,
		MirrorInterval: 20 * time.Millisecond, HandoverDelay: 40 * time.Millisecond, CallTimeout: 2 * time.Second,
		RepairInterval: 20 * time.Millisecond, CensusInterval: 200 * time.Millisecond,
	}
	if set != nil {
		set(&o)
	}
	n, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	runCtx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = n.Run(runCtx) }()
	t.Cleanup(func() {
		cancel()
		<-ended
		transport.Close()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return &member{id: transport.Self(), dir: dir, store: store, transport: transport, node: n, cancel: cancel}
}

func (p *pool) call(to placement.NodeID, op *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	c, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	op.Version, op.BodyBytes = p2p.WireVersion, uint64(len(body))
	return p.device.Call(c, to, op, body)
}

// stripe is a whole stripe in the hands of its owner.
type stripe struct {
	id       erasure.StripeID
	keys     *seal.StripeKeys
	geometry erasure.Geometry
	bodies   [][]byte
	columns  [][]byte
	manifest *wire.Manifest
	lock     *wire.Lock
}

func newStripe(t testing.TB, k, m, shardBytes int) *stripe {
	s := &stripe{geometry: erasure.Geometry{K: k, M: m, ShardBytes: shardBytes}}
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	bundle, err := seal.NewBundle(1, rand.Reader)
	check(err)
	_, err = rand.Read(s.id[:])
	check(err)
	s.keys, err = bundle.StripeKeys(s.id, seal.FirstLockVersion)
	check(err)
	code, err := erasure.New(k, m)
	check(err)
	s.columns, _, err = code.NewColumns(rand.Reader)
	check(err)
	data := make([]byte, s.geometry.DataBytes())
	_, err = rand.Read(data)
	check(err)
	s.bodies, err = code.Build(nil, s.columns, data)
	check(err)
	s.manifest = &wire.Manifest{K: uint32(k), M: uint32(m), ShardBytes: uint32(shardBytes)}
	for _, b := range s.bodies {
		root := erasure.Root(b)
		s.manifest.Roots = append(s.manifest.Roots, root[:])
	}
	check(s.manifest.Sign(s.keys.Index))
	lock, err := s.keys.NewLock(seal.P2PKH)
	check(err)
	s.lock = &wire.Lock{Version: lock.Version, Script: lock.Script, PreviousSignature: lock.PrevSig}
	return s
}

func (s *stripe) put(i int) *wire.PutShard {
	return &wire.PutShard{Manifest: s.manifest, Index: uint32(i), Lock: s.lock, Crc32C: erasure.CRC(s.bodies[i])}
}

func (s *stripe) key(i int) shardstore.Key {
	return shardstore.Key{Blind: s.keys.Blind, Index: uint8(i)}
}

func (s *stripe) record(version uint64, holders ...*wire.Holder) *wire.IndexRecord {
	r := &wire.IndexRecord{Manifest: s.manifest, Holders: holders, Version: version, Lock: s.lock, Mirrored: true}
	r.SignHolders(s.keys.Index)
	return r
}

func (p *pool) mustPut(to placement.NodeID, s *stripe, i int, mirror placement.NodeID) *wire.PutShardReply {
	p.t.Helper()
	op := s.put(i)
	op.Mirror = string(mirror)
	rep, _, err := p.call(to, &wire.Request{Op: &wire.Request_PutShard{PutShard: op}}, s.bodies[i])
	if err != nil {
		p.t.Fatal(err)
	}
	return rep.GetPutShard()
}

func (p *pool) commit(to placement.NodeID, s *stripe) {
	p.t.Helper()
	rep, _, err := p.call(to, &wire.Request{Op: &wire.Request_CommitShards{CommitShards: &wire.CommitShards{Commits: []*wire.Commit{wire.NewCommit(s.keys.Index)}}}}, nil)
	if err != nil || !rep.GetCommitShards().Held[0] {
		p.t.Fatal(rep, err)
	}
}

func getShard(s *stripe, i, off, n int) *wire.Request {
	return &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{Blind: s.keys.Blind[:], Index: uint32(i), Offset: uint32(off), Length: uint32(n)}}}
}

func checkRange(t testing.TB, s *stripe, i, off, n int, rep *wire.Reply, proof []byte) {
	t.Helper()
	if n == 0 {
		n = s.geometry.ShardBytes - off
	}
	root, columnHash := [32]byte(s.manifest.Roots[i]), [32]byte(rep.GetGetShard().ColumnHash)
	got, err := proof, error(nil)
	if n == s.geometry.ShardBytes { // the coded bytes are their own proof
		err = erasure.VerifyCoded(root, columnHash, proof)
	} else {
		got = make([]byte, n)
		err = erasure.VerifyRange(root, columnHash, s.geometry.ShardBytes, off, n, proof, got)
	}
	if err != nil || !bytes.Equal(got, s.bodies[i][erasure.ColumnBytes+off:][:n]) {
		t.Fatalf("range %d+%d: %v", off, n, err)
	}
}

// authorization signs one operation on the nonce that a node drew for the device.
func (p *pool) authorization(s *stripe, kind seal.OperationKind, node placement.NodeID, index int) *wire.ColumnRequest {
	p.t.Helper()
	nonce, err := p.device.Nonce(ctx, node)
	if err != nil {
		p.t.Fatal(err)
	}
	p.count++
	a := &wire.Authorization{Expiry: time.Now().Add(time.Minute).Unix(), Counter: p.count}
	a.Unlock, err = seal.Sign(s.keys.Lock, seal.P2PKH, seal.Operation{
		Kind: kind, Blind: s.keys.Blind, Index: uint8(index), Node: string(node), Nonce: nonce, Expiry: a.Expiry, Counter: a.Counter,
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return &wire.ColumnRequest{Blind: s.keys.Blind[:], Index: uint32(index), Authorization: a}
}

func (p *pool) columns(to placement.NodeID, r ...*wire.ColumnRequest) []*wire.Column {
	p.t.Helper()
	rep, _, err := p.call(to, &wire.Request{Op: &wire.Request_GetColumns{GetColumns: &wire.GetColumns{Requests: r}}}, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return rep.GetGetColumns().Columns
}

func (p *pool) delete(to placement.NodeID, r ...*wire.ColumnRequest) []wire.Status {
	p.t.Helper()
	rep, _, err := p.call(to, &wire.Request{Op: &wire.Request_DeleteShards{DeleteShards: &wire.DeleteShards{Requests: r}}}, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return rep.GetDeleteShards().Status
}

// eventually polls until ok, for a bounded time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen in time", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// damage flips a byte of what is found in the packs under dir.
func damage(t testing.TB, dir string, needle []byte) {
	t.Helper()
	packs, _ := filepath.Glob(filepath.Join(dir, "packs", "*.pack"))
	for _, path := range packs {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		i := bytes.Index(b, needle)
		if i < 0 {
			continue
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte{b[i] ^ 1}, int64(i)); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("bytes to damage not found")
}
