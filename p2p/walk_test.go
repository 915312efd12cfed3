package p2p_test

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ipfs/go-cid"
	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	dhtpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/multiformats/go-multihash"
)

// A lookup by the walk of a DHT that has a provider record for every holder of
// every stripe. There is no such DHT in this program; it is built here to be
// compared with: kad-dht with its defaults, on bare libp2p hosts, with full
// routing tables.
type walk struct {
	s        *simulation
	hosts    []host.Host // hosts[0] asks
	dhts     []*dht.IpfsDHT
	requests atomic.Int64
}

const (
	fetchProtocol = "/defs-test/shard"
	fetchBytes    = 16 << 10
	closestPeers  = 20 // that keep a record
)

func newWalk(t *testing.T, nodes int, oneWay time.Duration) *walk {
	w := &walk{s: newSimulation(t, oneWay)}
	for i := range nodes + 1 {
		var seed [ed25519.SeedSize]byte
		binary.BigEndian.PutUint32(seed[:], uint32(i+1))
		key, err := crypto.UnmarshalEd25519PrivateKey(ed25519.NewKeyFromSeed(seed[:]))
		w.s.ok(err)
		ip := net.IPv4(127, 1, byte(i/200), byte(i%200+1)).To4()
		h, err := libp2p.New(
			libp2p.Identity(key), libp2p.ListenAddrStrings(fmt.Sprintf("/ip4/%s/udp/8000/quic-v1", ip)), w.s.sockets(ip),
			libp2p.Transport(libp2pquic.NewTransport), libp2p.ResourceManager(&network.NullResourceManager{}),
			libp2p.DisableIdentifyAddressDiscovery(), libp2p.DisableMetrics(), libp2p.DisableRelay(), libp2p.Ping(false),
		)
		w.s.ok(err)
		h.SetStreamHandler(fetchProtocol, func(s network.Stream) {
			_, _ = s.Write(make([]byte, fetchBytes))
			_ = s.Close()
		})
		d, err := dht.New(h, dht.Mode(dht.ModeServer), dht.ProtocolPrefix("/defs-test"), dht.DisableAutoRefresh(),
			dht.OnRequestHook(func(context.Context, network.Stream, *dhtpb.Message) { w.requests.Add(1) }))
		w.s.ok(err)
		w.hosts, w.dhts = append(w.hosts, h), append(w.dhts, d)
	}
	for i, d := range w.dhts {
		for _, j := range pseudoRandom(uint64(i)).Perm(len(w.hosts)) {
			if other := w.hosts[j]; j != i && j != 0 {
				w.hosts[i].Peerstore().AddAddrs(other.ID(), other.Addrs(), peerstore.PermanentAddrTTL)
				_, _ = d.RoutingTable().TryAddPeer(other.ID(), true, false)
			}
		}
	}
	return w
}

func (w *walk) close() {
	var wg sync.WaitGroup
	for i := range w.hosts {
		wg.Go(func() {
			_ = w.dhts[i].Close()
			_ = w.hosts[i].Close()
		})
	}
	wg.Wait()
	w.s.net.Close()
}

func stripeCID(number int) cid.Cid {
	sum, err := multihash.Sum(fmt.Append(nil, "stripe ", number), multihash.SHA2_256, -1)
	if err != nil {
		panic(err)
	}
	return cid.NewCidV1(cid.Raw, sum)
}

// provide puts the records of a stripe where holders would have put them: at
// the peers whose ids are nearest.
func (w *walk) provide(number, holders int) {
	id := stripeCID(number)
	order := make([]int, 0, len(w.hosts)-1)
	for i := 1; i < len(w.hosts); i++ {
		order = append(order, i)
	}
	holder := pseudoRandom(uint64(number)).Perm(len(order))[:holders]
	slices.SortFunc(order, func(a, b int) int {
		if kb.Closer(w.hosts[a].ID(), w.hosts[b].ID(), string(id.Hash())) {
			return -1
		}
		return 1
	})
	for _, i := range order[:min(closestPeers, len(order))] {
		for _, h := range holder {
			at := w.hosts[h+1]
			w.s.ok(w.dhts[i].ProviderStore().AddProvider(w.s.t.Context(), id.Hash(), peer.AddrInfo{ID: at.ID(), Addrs: at.Addrs()}))
		}
	}
}

// connect makes connections of the asking host to all others, or ends them.
func (w *walk) connect(warm bool) {
	var wg sync.WaitGroup
	for _, h := range w.hosts[1:] {
		wg.Go(func() {
			if warm {
				w.s.ok(w.hosts[0].Connect(w.s.t.Context(), peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}))
			} else {
				_ = w.hosts[0].Network().ClosePeer(h.ID())
			}
		})
	}
	wg.Wait()
	time.Sleep(20 * time.Second)
	synctest.Wait()
}

// find looks stripes up, all at once, and fetches k shards of each. hops says
// how many requests long the path to the first record was, on average.
func (w *walk) find(k int, numbers ...int) figures {
	requests, packets, bytes := w.requests.Load(), w.s.packets.Load(), w.s.bytes.Load()
	var mu sync.Mutex
	var f figures
	start := time.Now()
	var wg sync.WaitGroup
	for _, number := range numbers {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(w.s.t.Context(), 25*time.Second)
			defer cancel()
			shards := make(chan struct{}, 64)
			go func() {
				defer close(shards)
				var fetches sync.WaitGroup
				defer fetches.Wait()
				for p := range w.dhts[0].FindProvidersAsync(ctx, stripeCID(number), 0) {
					fetches.Go(func() {
						s, err := w.hosts[0].NewStream(ctx, p.ID, fetchProtocol)
						if err != nil {
							return
						}
						defer s.Reset()
						if b, _ := io.ReadAll(s); len(b) == fetchBytes {
							shards <- struct{}{}
						}
					})
				}
			}()
			got := 0
			for range shards {
				mu.Lock()
				if got++; f.FirstByte == 0 {
					f.FirstByte = time.Since(start)
				}
				mu.Unlock()
				if got == k {
					break
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if got == k {
				f.Found++
			}
			f.KthShard = max(f.KthShard, time.Since(start))
			cancel()
		})
	}
	wg.Wait()
	f.Searches = int(w.requests.Load() - requests)
	f.Messages = 2 * (f.Searches + k*f.Found)
	f.Packets, f.PacketSum = int(w.s.packets.Load()-packets), int(w.s.bytes.Load()-bytes)
	return f
}
