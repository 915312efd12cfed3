package integration

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/internal/powercut"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
)

// A storage node is killed while shards, index records and heads arrive. What
// it, or its partner, acknowledged is there when it is back.
func TestNodeKilledDuringPuts(t *testing.T) {
	c := newCluster(t, "4+2", 2)
	crashNodes(t, c, crashes(t, 5), func(i int) { c.nodes[i].kill() }, false)
}

// The power of the nodes' disks is cut while they take puts.
func TestNodePowerCutDuringPuts(t *testing.T) {
	c := newCluster(t, "4+2", 2)
	disks := make([]*powercut.Disk, len(c.nodes))
	for i, n := range c.nodes {
		disks[i] = powercut.New(t, powercut.Filesystems[i])
		n.kill()
		dir := filepath.Join(disks[i].Dir, "node")
		run(t, toolTimeout, "cp", "-a", n.dir, dir)
		run(t, toolTimeout, "sync", "-f", dir)
		n.dir = dir
		t.Cleanup(func() { n.kill() }) // before its disk goes
		c.startNode(i)
	}
	crashNodes(t, c, crashes(t, 4), func(i int) {
		disks[i].Cut()
		c.nodes[i].kill()
		disks[i].Restore()
	}, true)
}

// crashNodes crashes one node after the other while shards, index records and
// heads arrive at both, and looks for what was acknowledged.
func crashNodes(t *testing.T, c *cluster, count int, crash func(node int), powerLost bool) {
	host := joinAsDevice(t, c)
	ids := make([]placement.NodeID, len(c.nodes))
	for i := range c.nodes {
		ids[i] = c.nodeID(i)
	}
	var shards, records, heads int
	var slowest time.Duration
	for round := range count {
		victim := round % 2
		var puts atomic.Int64
		var crashed atomic.Bool
		var putting sync.WaitGroup
		clients := make([]*putter, 8)
		for i := range clients {
			clients[i] = &putter{t: t, host: host, nodes: ids, first: i % 2, puts: &puts, crashed: &crashed, powerLost: powerLost}
			putting.Go(clients[i].putUntilCrash)
		}
		enough := int64(20 + mathrand.IntN(300))
		eventually(t, time.Minute, "puts are acknowledged", func() bool { return puts.Load() >= enough || t.Failed() })
		crashed.Store(true)
		crash(victim)
		putting.Wait()
		began := time.Now()
		c.startNode(victim)
		slowest = max(slowest, time.Since(began))
		for _, p := range clients {
			p.check()
			shards, records, heads = shards+len(p.shards), records+len(p.records), heads+int(p.sequence)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d crashes; %d shards, %d index records, %d heads were acknowledged and are there; slowest start %v",
		count, shards, records, heads, slowest.Round(time.Millisecond))
}

// joinAsDevice returns a host of this process that is a device in the pool.
func joinAsDevice(t *testing.T, c *cluster) *p2p.Host {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(c.ticket)
	check(err)
	ticket, err := p2p.ParseTicket(strings.TrimSpace(string(text)))
	check(err)
	dir := filepath.Join(c.dir, "host")
	check(os.Mkdir(dir, 0o700))
	key, err := p2p.LoadOrCreateKey(filepath.Join(dir, "peer.key"))
	check(err)
	certificate, err := p2p.Join(ticket, key, p2p.RoleDevice)
	check(err)
	addrs, _ := c.addrs()
	host, err := p2p.NewHost(t.Context(), p2p.HostOptions{
		Dir: dir, Key: key, Certificate: certificate, Listen: []string{"/ip4/127.0.0.1/tcp/0"}, Bootstrap: addrs,
		HeartbeatInterval: suspectAfter / 3, SuspectAfter: suspectAfter, DeadAfter: deadAfter, DialTimeout: dialTimeout,
		Logger: slog.New(slog.DiscardHandler),
	})
	check(err)
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	check(host.WaitMembers(ctx, len(c.nodes)))
	return host
}

// nodeID is the end of any of the node's addresses.
func (c *cluster) nodeID(i int) placement.NodeID {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.nodes[i].dir, "addrs"))
	if err != nil {
		c.t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return placement.NodeID(line[strings.LastIndex(line, "/")+1:])
}

// putter stores shards of its own making at a node, some with a mirror, and
// remembers what was acknowledged.
type putter struct {
	t     *testing.T
	host  *p2p.Host
	nodes []placement.NodeID
	first int // whom it puts to

	puts      *atomic.Int64 // acknowledged, of all putters
	crashed   *atomic.Bool  // a node is crashing
	powerLost bool          // then what is acknowledged from there on was never heard

	shards   []ownShard
	records  []*wire.IndexRecord
	headKey  ed25519.PrivateKey
	sequence uint64 // of the head that was acknowledged last
}

// ownShard is a shard that was acknowledged.
type ownShard struct {
	manifest *wire.Manifest
	index    int
	body     []byte
	at       []placement.NodeID
}

func (p *putter) call(to placement.NodeID, req *wire.Request, body []byte) (*wire.Reply, []byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), operationMax)
	defer cancel()
	rep, body, err := p.host.Call(ctx, to, req, body)
	if err == nil && p.powerLost && p.crashed.Load() && isPut(req) {
		err = errors.New("acknowledged after the power was cut")
	}
	return rep, body, err
}

func isPut(req *wire.Request) bool {
	return req.GetPutShard() != nil || req.GetPutIndex() != nil || req.GetPutHead() != nil
}

// putUntilCrash ends when a node has crashed. No put may fail before.
func (p *putter) putUntilCrash() {
	_, p.headKey, _ = ed25519.GenerateKey(rand.Reader)
	for !p.crashed.Load() {
		if err := p.putStripe(); err != nil {
			if !p.crashed.Load() || !p.powerLost && !errors.Is(err, p2p.ErrUnreachable) {
				p.t.Errorf("put: %v", err)
			}
			return
		}
	}
}

// putStripe makes a stripe and puts its shards, its index record and a head.
func (p *putter) putStripe() error {
	const k, m = 2, 1
	bundle, err := seal.NewBundle(1, rand.Reader)
	if err != nil {
		return err
	}
	var id erasure.StripeID
	rand.Read(id[:])
	keys, err := bundle.StripeKeys(id, seal.FirstLockVersion)
	if err != nil {
		return err
	}
	code, err := erasure.New(k, m)
	if err != nil {
		return err
	}
	columns, _, err := code.NewColumns(rand.Reader)
	if err != nil {
		return err
	}
	shardBytes := []int{16 << 10, 64 << 10, 256 << 10}[mathrand.IntN(3)]
	data := make([]byte, k*shardBytes)
	rand.Read(data)
	bodies, err := code.Build(nil, columns, data)
	if err != nil {
		return err
	}
	manifest := &wire.Manifest{K: k, M: m, ShardBytes: uint32(shardBytes)}
	for _, b := range bodies {
		root := erasure.Root(b)
		manifest.Roots = append(manifest.Roots, root[:])
	}
	if err := manifest.Sign(keys.Index); err != nil {
		return err
	}
	lock, err := keys.NewLock(seal.P2PKH)
	if err != nil {
		return err
	}
	wireLock := &wire.Lock{Version: lock.Version, Script: lock.Script, PreviousSignature: lock.PrevSig}

	index := mathrand.IntN(k + m) // a node holds one shard of a stripe
	put := &wire.PutShard{Manifest: manifest, Index: uint32(index), Lock: wireLock, Crc32C: erasure.CRC(bodies[index])}
	to, partner := p.nodes[p.first], p.nodes[1-p.first]
	if mathrand.IntN(2) == 0 {
		put.Mirror = string(partner)
	}
	rep, _, err := p.call(to, &wire.Request{Op: &wire.Request_PutShard{PutShard: put}}, bodies[index])
	if err != nil {
		return err
	}
	own := ownShard{manifest, index, bodies[index], []placement.NodeID{to}}
	if rep.GetPutShard().Mirrored {
		own.at = append(own.at, partner)
	}
	p.shards = append(p.shards, own)
	p.puts.Add(1)

	record := &wire.IndexRecord{Manifest: manifest, Holders: []*wire.Holder{{Index: uint32(index), Primary: string(to)}}, Version: 1, Lock: wireLock}
	record.SignHolders(keys.Index)
	rep, _, err = p.call(to, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{record}}}}, nil)
	if err != nil {
		return err
	}
	if s := rep.GetPutIndex().Status; len(s) != 1 || s[0] != wire.Status_STATUS_OK {
		return fmt.Errorf("put index: %v", s)
	}
	p.records = append(p.records, record)
	p.puts.Add(1)

	head := &wire.Head{Sequence: p.sequence + 1, Sealed: fmt.Append(nil, "head ", p.sequence+1)}
	head.Sign(p.headKey)
	if _, _, err := p.call(to, &wire.Request{Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: head}}}, nil); err != nil {
		return err
	}
	p.sequence++
	p.puts.Add(1)
	return nil
}

// check asks the nodes for everything that they acknowledged.
func (p *putter) check() {
	p.t.Helper()
	to := p.nodes[p.first]
	ask := func(to placement.NodeID, req *wire.Request) (rep *wire.Reply, body []byte) {
		p.t.Helper()
		eventually(p.t, operationMax, "the node answers", func() bool {
			var err error
			rep, body, err = p.call(to, req, nil)
			if err != nil && !errors.Is(err, p2p.ErrUnreachable) {
				p.t.Errorf("%T: %v", req.Op, err)
			}
			return err == nil || p.t.Failed()
		})
		return rep, body
	}
	for _, s := range p.shards {
		for _, at := range s.at {
			rep, coded := ask(at, &wire.Request{Op: &wire.Request_GetShard{GetShard: &wire.GetShard{Blind: s.manifest.Blind, Index: uint32(s.index)}}})
			if p.t.Failed() {
				return
			}
			if err := erasure.VerifyCoded([32]byte(s.manifest.Roots[s.index]), [32]byte(rep.GetGetShard().ColumnHash), coded); err != nil {
				p.t.Errorf("shard: %v", err)
			}
			if !bytes.Equal(coded, s.body[erasure.ColumnBytes:]) {
				p.t.Error("a shard comes back with other bytes")
			}
		}
	}
	for _, r := range p.records {
		rep, _ := ask(to, &wire.Request{Op: &wire.Request_GetIndex{GetIndex: &wire.GetIndex{Blinds: [][]byte{r.Manifest.Blind}}}})
		if found := rep.GetGetIndex().GetRecords(); len(found) != 1 || found[0].Verify() != nil || found[0].Version != 1 {
			p.t.Errorf("an index record is gone: %v", found)
		}
	}
	if p.sequence > 0 {
		probe := &wire.Head{}
		probe.Sign(p.headKey)
		rep, _ := ask(to, &wire.Request{Op: &wire.Request_GetHead{GetHead: &wire.GetHead{Addresses: [][]byte{probe.Address}}}})
		found := rep.GetGetHead().GetHeads()
		if len(found) != 1 || found[0].Verify() != nil || found[0].Sequence < p.sequence || found[0].Sequence > p.sequence+1 {
			p.t.Errorf("head %d was acknowledged, this is there: %v", p.sequence, found)
		}
	}
}
