package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/p2p/wire"
	"github.com/defs-fs/defs/placement"
	"github.com/defs-fs/defs/seal"
	"github.com/defs-fs/defs/shardstore"
)

// kept is what the nodes' stores hold, read from their disks while no node runs.
type kept struct {
	nodes   []placement.NodeID
	stripes map[[32]byte]*keptStripe // by blinded id
	heads   map[uint16]int           // device slot → nodes with a head for it
}

// keptStripe is what is kept of one stripe. The shards have been read whole and
// match their root in the manifest.
type keptStripe struct {
	k, m        int
	holders     map[uint8][]placement.NodeID
	provisional int // shards that no keeper vouched for yet
	keepers     []placement.NodeID
	mirrored    bool // by the index record
}

// killAll ends mount and nodes as a power cut of the whole house does.
func (c *cluster) killAll() {
	var ending sync.WaitGroup
	if c.mount != nil {
		ending.Go(c.mount.kill)
	}
	for _, n := range c.nodes {
		ending.Go(n.kill)
	}
	ending.Wait()
	c.mount = nil
}

// readStores reads the stores of the nodes, none of which runs.
func (c *cluster) readStores() kept {
	c.t.Helper()
	words, err := os.ReadFile(c.words)
	check(c.t, err)
	root, err := seal.RootFromWords(string(words))
	check(c.t, err)
	recovery, err := root.Recovery()
	check(c.t, err)
	all := kept{stripes: make(map[[32]byte]*keptStripe), heads: make(map[uint16]int)}
	for _, n := range c.nodes {
		addrs, err := defs.ReadPeers(filepath.Join(n.dir, "addrs"))
		check(c.t, err)
		_, id, _ := strings.Cut(addrs[0], "/p2p/")
		all.nodes = append(all.nodes, placement.NodeID(id))
		store, err := shardstore.Open(shardstore.Options{Dir: filepath.Join(n.dir, "shards")})
		check(c.t, err)
		check(c.t, store.Shards(shardstore.Key{}, func(info shardstore.ShardInfo) bool {
			all.addShard(c.t, store, placement.NodeID(id), info)
			return true
		}))
		check(c.t, store.Indexes([32]byte{}, func(blind [32]byte) bool {
			b, err := store.Index(blind)
			check(c.t, err)
			record := &wire.IndexRecord{}
			check(c.t, proto.Unmarshal(b, record))
			check(c.t, record.Verify())
			s := all.stripe(blind)
			s.keepers, s.mirrored = append(s.keepers, placement.NodeID(id)), record.Mirrored
			return true
		}))
		for slot := range uint16(2) {
			if _, _, err := store.Head(recovery.HeadKey(slot).Address()); err == nil {
				all.heads[slot]++
			}
		}
		check(c.t, store.Close())
	}
	return all
}

func (k *kept) stripe(blind [32]byte) *keptStripe {
	s := k.stripes[blind]
	if s == nil {
		s = &keptStripe{holders: make(map[uint8][]placement.NodeID)}
		k.stripes[blind] = s
	}
	return s
}

func (k *kept) addShard(t *testing.T, store *shardstore.Store, node placement.NodeID, info shardstore.ShardInfo) {
	t.Helper()
	shard, err := store.ReadShard(info.Key, 0, 0, nil)
	check(t, err)
	manifest := &wire.Manifest{}
	check(t, proto.Unmarshal(shard.Manifest, manifest))
	check(t, manifest.Verify())
	check(t, erasure.VerifyBody([32]byte(manifest.Roots[info.Index]), append(shard.Column[:], shard.Coded...)))
	s := k.stripe(info.Blind)
	s.k, s.m = int(manifest.K), int(manifest.M)
	s.holders[info.Index] = append(s.holders[info.Index], node)
	if info.Provisional {
		s.provisional++
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What `recoverable` and `durable` say is compared with the bytes on the disks
// of all nodes, read without asking any program that is part of the claim. At
// both moments everything is killed at once.
func TestStatesAreWhatNodesHold(t *testing.T) {
	for _, pool := range []struct {
		policy        string
		nodes, copies int
	}{
		{"4+2", 6, 1},
		{"2+1", 8, 2}, // mirrored from 2n + 2 nodes
	} {
		t.Run(pool.policy, func(t *testing.T) {
			c := newCluster(t, pool.policy, pool.nodes)
			c.mountNow()
			c.waitNodes(pool.nodes)
			content := make([]byte, 12<<20)
			rand.NewChaCha8([32]byte{3}).Read(content)
			for i := range 40 {
				c.write(fmt.Sprint(c.mnt, "/small-", i), strings.Repeat("x", 1+i*997))
			}
			c.write(c.mnt+"/large", string(content))
			reference := filepath.Join(c.dir, "reference")
			run(t, 60*time.Second, "rsync", "-aHX", c.mnt+"/", reference+"/")

			c.waitRecoverable(60 * time.Second)
			c.killAll()
			stores := c.readStores()
			for blind, s := range stores.stripes {
				if s.k == 0 || len(s.holders) < min(s.k+s.m, s.k+2) || len(s.keepers) <= placement.KeeperCount(s.m, s.mirrored, pool.nodes)/2 {
					t.Errorf("recoverable, but of stripe %x there are %d shards of %d+%d and %d index records", blind[:4], len(s.holders), s.k, s.m, len(s.keepers))
				}
			}
			if n := stores.heads[1]; n <= pool.nodes/2 {
				t.Errorf("recoverable, but %d of %d nodes have the head", n, pool.nodes)
			}
			c.startAll()
			_, addrs := c.addrs()
			other := filepath.Join(c.dir, "other")
			run(t, 60*time.Second, program("defs"), "recover", "--data", other, "--words-file", c.words, "--peer", "@"+addrs)
			check(t, os.RemoveAll(c.device))
			check(t, os.Rename(other, c.device))
			c.mountNow()
			c.sameTree(reference)

			c.write(c.mnt+"/last", string(content[:5<<20]))
			run(t, 60*time.Second, program("defs"), "wait", "--durable", "--timeout", "60s", "--data", c.device)
			status := c.status()
			c.killAll()
			stores = c.readStores()
			if len(stores.stripes) < status.Health.Stripes || status.Health.Stripes < 6 {
				t.Errorf("the volume counts %d stripes, the nodes have %d", status.Health.Stripes, len(stores.stripes))
			}
			for blind, s := range stores.stripes {
				if problem := s.wrong(blind, stores.nodes, pool.copies); problem != "" {
					t.Errorf("durable, but stripe %x %s", blind[:4], problem)
				}
			}
			for _, slot := range []uint16{0, 1} {
				if n := stores.heads[slot]; n != pool.nodes {
					t.Errorf("durable, but %d of %d nodes have the head of slot %d", n, pool.nodes, slot)
				}
			}
			t.Logf("%d stripes at %d nodes, each shard read and verified", len(stores.stripes), pool.nodes)
		})
	}
}

// wrong says what is missing of a stripe that is said to be durable.
func (s *keptStripe) wrong(blind [32]byte, nodes []placement.NodeID, copies int) string {
	n := s.k + s.m
	if s.k == 0 || len(s.holders) != n {
		return fmt.Sprintf("has %d of %d+%d shards", len(s.holders), s.k, s.m)
	}
	used := make(map[placement.NodeID]bool)
	for index, holders := range s.holders {
		if len(holders) != copies {
			return fmt.Sprintf("has shard %d at %d nodes, want %d", index, len(holders), copies)
		}
		for _, id := range holders {
			if used[id] {
				return fmt.Sprintf("has two shards at node %s", id)
			}
			used[id] = true
		}
	}
	if s.provisional > 0 {
		return fmt.Sprintf("has %d shards that would expire", s.provisional)
	}
	keepers := placement.Keepers(blind, nodes, placement.KeeperCount(s.m, copies > 1, len(nodes)))
	for _, id := range keepers {
		if !slices.Contains(s.keepers, id) {
			return fmt.Sprintf("has no index record at its keeper %s", id)
		}
	}
	return ""
}
