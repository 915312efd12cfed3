package integration

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/shardstore"
)

// A member of the pool that knows all that nodes know (the blinded ids, the
// manifests, the head's address) asks real nodes to delete, overwrite, move and
// reveal what is not its own. Nothing of it is done, and the volume is whole.
func TestForgedRequests(t *testing.T) {
	c := newCluster(t, "2+1", 3)
	c.mountNow()
	c.waitNodes(3)
	content := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{4}).Read(content)
	c.write(c.mnt+"/file", string(content))
	c.waitDurable(60 * time.Second)
	c.unmount()

	// What one of the nodes has on its disk.
	c.nodes[0].kill()
	store, err := shardstore.Open(shardstore.Options{Dir: filepath.Join(c.nodes[0].dir, "shards")})
	check(t, err)
	var held []shardstore.Key
	check(t, store.Shards(shardstore.Key{}, func(info shardstore.ShardInfo) bool { held = append(held, info.Key); return true }))
	manifests := make(map[shardstore.Key]*wire.Manifest)
	records := make(map[shardstore.Key]*wire.IndexRecord)
	for _, key := range held {
		_, b, err := store.Manifest(key)
		check(t, err)
		manifests[key] = &wire.Manifest{}
		check(t, proto.Unmarshal(b, manifests[key]))
		if b, err := store.Index(key.Blind); err == nil {
			records[key] = &wire.IndexRecord{}
			check(t, proto.Unmarshal(b, records[key]))
		}
	}
	words, err := os.ReadFile(c.words)
	check(t, err)
	root, err := seal.RootFromWords(string(words))
	check(t, err)
	recovery, err := root.Recovery()
	check(t, err)
	address := recovery.HeadKey(1).Address()
	_, b, err := store.Head(address)
	check(t, err)
	head := &wire.Head{}
	check(t, proto.Unmarshal(b, head))
	check(t, store.Close())
	if len(held) < 2 || len(records) < 2 {
		t.Fatalf("a node holds %d shards and %d index records", len(held), len(records))
	}
	c.startNode(0)

	attacker := c.member()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	check(t, attacker.WaitMembers(ctx, 3))
	bundle, err := seal.NewBundle(1, rand.NewChaCha8([32]byte{5}))
	check(t, err)
	own, err := bundle.StripeKeys(erasure.StripeID{1}, seal.FirstLockVersion)
	check(t, err)
	counter := uint64(time.Now().UnixNano())
	sign := func(kind seal.OperationKind, key shardstore.Key, index uint8, to p2p.Member) *wire.ColumnRequest {
		nonce, err := attacker.Nonce(ctx, to.ID)
		check(t, err)
		counter++
		a := &wire.Authorization{Expiry: time.Now().Add(time.Minute).Unix(), Counter: counter}
		a.Unlock, err = seal.Sign(own.Lock, seal.P2PKH, seal.Operation{Kind: kind, Blind: key.Blind, Index: index, Node: string(to.ID), Nonce: nonce, Expiry: a.Expiry, Counter: a.Counter})
		check(t, err)
		return &wire.ColumnRequest{Blind: key.Blind[:], Index: uint32(index), Authorization: a}
	}
	ask := func(to p2p.Member, body []byte, req *wire.Request) *wire.Reply {
		rep, _, err := attacker.Call(ctx, to.ID, req, body)
		if err != nil && p2p.StatusOf(err) == wire.Status_STATUS_INTERNAL {
			t.Errorf("%s: %v", p2p.OpOf(req), err)
		}
		return rep
	}
	_, forger, err := ed25519.GenerateKey(rand.NewChaCha8([32]byte{6}))
	check(t, err)
	for _, to := range attacker.Members() {
		if to.Role != p2p.RoleNode {
			continue
		}
		for key, manifest := range manifests {
			for index := range manifest.K + manifest.M {
				i := uint8(index)
				deletes := &wire.DeleteShards{Requests: []*wire.ColumnRequest{
					sign(seal.OpDelete, key, i, to), sign(seal.OpDelete, key, wire.IndexNumber, to), {Blind: key.Blind[:], Index: index},
				}}
				for _, status := range ask(to, nil, &wire.Request{Op: &wire.Request_DeleteShards{DeleteShards: deletes}}).GetDeleteShards().GetStatus() {
					if status == wire.Status_STATUS_OK {
						t.Errorf("%s: a forged delete of %v was obeyed", to.ID, key)
					}
				}
				columns := &wire.GetColumns{Requests: []*wire.ColumnRequest{sign(seal.OpColumns, key, i, to), {Blind: key.Blind[:], Index: index}}}
				for _, column := range ask(to, nil, &wire.Request{Op: &wire.Request_GetColumns{GetColumns: columns}}).GetGetColumns().GetColumns() {
					if column.Status == wire.Status_STATUS_OK || len(column.Column) > 0 {
						t.Errorf("%s: told a column of %v", to.ID, key)
					}
				}
				// Another shard under the same name, in a manifest of the forger's.
				body := make([]byte, erasure.ColumnBytes+int(manifest.ShardBytes))
				forged := proto.CloneOf(manifest)
				sum := erasure.Root(body)
				forged.Roots[index] = sum[:]
				if rep := ask(to, body, &wire.Request{Op: &wire.Request_PutShard{PutShard: &wire.PutShard{
					Manifest: forged, Index: index, Crc32C: erasure.CRC(body),
				}}}); rep.GetStatus() == wire.Status_STATUS_OK {
					t.Errorf("%s: a forged shard of %v was taken", to.ID, key)
				}
			}
			commit := &wire.Commit{Blind: key.Blind[:], Signature: ed25519.Sign(forger, key.Blind[:])}
			if rep := ask(to, nil, &wire.Request{Op: &wire.Request_CommitShards{CommitShards: &wire.CommitShards{Commits: []*wire.Commit{commit}}}}); rep.GetStatus() == wire.Status_STATUS_OK {
				t.Errorf("%s: a forged commit of %v was obeyed", to.ID, key)
			}
			if record := records[key]; record != nil {
				forged := proto.CloneOf(record)
				forged.Version++
				forged.Holders = forged.Holders[:1]
				forged.Holders[0].Primary = string(attacker.Self())
				forged.SignHolders(forger)
				moved := proto.CloneOf(record)
				moved.Moves = append(moved.Moves, &wire.HolderMove{Index: record.Holders[0].Index, From: record.Holders[0].Primary, To: string(attacker.Self())})
				for _, status := range ask(to, nil, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{forged}}}}).GetPutIndex().GetStatus() {
					if status == wire.Status_STATUS_OK {
						t.Errorf("%s: a forged index record of %v was taken", to.ID, key)
					}
				}
				ask(to, nil, &wire.Request{Op: &wire.Request_PutIndex{PutIndex: &wire.PutIndex{Records: []*wire.IndexRecord{moved}}}})
				for _, h := range record.Holders {
					move := &wire.HolderMove{Index: h.Index, From: h.Primary, To: string(attacker.Self())}
					if rep := ask(to, nil, &wire.Request{Op: &wire.Request_MoveHolder{MoveHolder: &wire.MoveHolder{Blind: key.Blind[:], Move: move}}}); rep.GetStatus() == wire.Status_STATUS_OK {
						t.Errorf("%s: a shard of %v was moved by who does not hold it", to.ID, key)
					}
				}
			}
		}
		// A newer head: with the owner's key and no signature, and with a key of
		// the forger's for the same address.
		for _, key := range []ed25519.PublicKey{head.Key, forger.Public().(ed25519.PublicKey)} {
			forged := proto.CloneOf(head)
			forged.Sequence += 1000
			forged.Key = key
			if !bytes.Equal(key, head.Key) {
				forged.Sign(forger)
				forged.Address = head.Address
			}
			if rep := ask(to, nil, &wire.Request{Op: &wire.Request_PutHead{PutHead: &wire.PutHead{Head: forged}}}); rep.GetStatus() == wire.Status_STATUS_OK {
				t.Errorf("%s: a forged head was taken", to.ID)
			}
		}
	}

	// All of it is still there: for this machine, and from the words.
	_, addrs := c.addrs()
	check(t, os.RemoveAll(c.device))
	run(t, 60*time.Second, program("defs"), "recover", "--data", c.device, "--words-file", c.words, "--peer", "@"+addrs)
	c.mountNow()
	if b, err := os.ReadFile(c.mnt + "/file"); err != nil || !bytes.Equal(b, content) {
		t.Errorf("the file has %d bytes, %v", len(b), err)
	}
	c.waitDurable(60 * time.Second)
	status := c.status()
	if status.Health.Degraded+status.Health.Unreachable+status.Health.Lost > 0 {
		t.Errorf("after the attack: %+v", status.Health)
	}
}

// member joins the pool with its ticket, in this process.
func (c *cluster) member() *p2p.Host {
	c.t.Helper()
	text, err := os.ReadFile(c.ticket)
	check(c.t, err)
	ticket, err := p2p.ParseTicket(string(text))
	check(c.t, err)
	dir := filepath.Join(c.dir, fmt.Sprint("member-", time.Now().UnixNano()))
	key, err := p2p.LoadOrCreateKey(filepath.Join(dir, "peer.key"))
	check(c.t, err)
	certificate, err := p2p.Join(ticket, key, p2p.RoleDevice)
	check(c.t, err)
	addrs, _ := c.addrs()
	h, err := p2p.NewHost(c.t.Context(), p2p.HostOptions{
		Dir: dir, Key: key, Certificate: certificate, Bootstrap: addrs, Listen: []string{"/ip4/127.0.0.1/tcp/0"},
		HeartbeatInterval: suspectAfter / 3, SuspectAfter: suspectAfter, DeadAfter: deadAfter, DialTimeout: dialTimeout,
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	check(c.t, err)
	c.t.Cleanup(func() { check(c.t, h.Close()) })
	return h
}
