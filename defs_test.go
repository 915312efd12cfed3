package defs_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/internal/powercut"
)

var loopback = []string{"/ip4/127.0.0.1/tcp/0"}

// pool makes a volume that founds a pool, and starts storage nodes.
func pool(t *testing.T, policy string, count int) (dir, words string, nodes []*defs.Node) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "device")
	words, err := defs.Init(defs.InitOptions{Dir: dir, Name: "test", Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	ticket, err := defs.Ticket(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range count {
		o := defs.NodeOptions{Dir: t.TempDir(), Ticket: ticket, Listen: loopback, CapacityBytes: 1 << 30}
		if len(nodes) > 0 {
			o.Peers = nodes[0].Addrs()
		}
		n, err := defs.OpenNode(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := n.Close(); err != nil {
				t.Error(err)
			}
		})
		nodes = append(nodes, n)
	}
	return dir, words, nodes
}

func open(t *testing.T, dir string, peers []string) *defs.Client {
	t.Helper()
	c, err := defs.New(t.Context(), defs.Options{Dir: dir, Listen: loopback, Peers: peers})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func closeClient(t *testing.T, c *defs.Client) {
	t.Helper()
	if err := c.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestUploadRecoverDownload(t *testing.T) {
	dir, words, nodes := pool(t, "2+1", 4)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := open(t, dir, nodes[0].Addrs())
	c.WaitNodes(ctx)

	files := map[string][]byte{}
	random := rand.NewChaCha8([32]byte{1})
	for _, size := range []int{0, 1, 100, 512 << 10, 3<<20 + 1} { // also those that are small, and larger than a message
		content := make([]byte, size)
		random.Read(content)
		id, err := c.Upload(ctx, "same name", bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		files[id] = content
	}
	if len(files) != 5 {
		t.Fatalf("%d different ids for 5 files", len(files))
	}
	if err := c.WaitDurable(ctx, nil); err != nil {
		t.Fatal(err)
	}
	st, err := c.Status(ctx)
	if err != nil || st.Durable == 0 || st.Journaled+st.Queued+st.Recoverable != 0 || st.SurvivesNodes < 1 {
		t.Errorf("status %+v, error %v", st, err)
	}
	if _, err := defs.New(ctx, defs.Options{Dir: dir}); !errors.Is(err, defs.ErrBusy) {
		t.Errorf("opened twice: %v", err)
	}
	closeClient(t, c)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}

	if _, err := defs.Recover(ctx, defs.RecoverOptions{Dir: dir, Words: words, Peers: nodes[2].Addrs()}); err != nil {
		t.Fatal(err)
	}
	c = open(t, dir, nil) // it remembers the peers
	defer closeClient(t, c)
	for id, want := range files {
		var got bytes.Buffer
		if err := c.Download(ctx, id, &got); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("file of %d bytes: got %d, error %v", len(want), got.Len(), err)
		}
	}
	if err := c.Download(ctx, "zzzz", &bytes.Buffer{}); !errors.Is(err, defs.ErrNoFile) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestRecoverRefuses(t *testing.T) {
	dir, words, nodes := pool(t, "2+1", 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := defs.Recover(ctx, defs.RecoverOptions{Dir: dir, Words: words, Peers: nodes[0].Addrs()}); !errors.Is(err, defs.ErrVolumeExists) {
		t.Errorf("over a volume: %v", err)
	}
	swapped := strings.Fields(words)
	slices.Reverse(swapped)
	if _, err := defs.Recover(ctx, defs.RecoverOptions{Dir: t.TempDir(), Words: strings.Join(swapped[:23], " "), Peers: nodes[0].Addrs()}); !errors.Is(err, defs.ErrWords) {
		t.Errorf("23 words: %v", err)
	}
	if _, err := defs.Recover(ctx, defs.RecoverOptions{Dir: t.TempDir(), Words: words, Peers: nodes[0].Addrs()}); err == nil {
		t.Error("a volume that no node has heard of came back")
	}
}

func TestNodeNeedsATicketOnce(t *testing.T) {
	if _, err := defs.OpenNode(t.Context(), defs.NodeOptions{Dir: t.TempDir(), Listen: loopback}); !errors.Is(err, defs.ErrNotJoined) {
		t.Fatalf("without a ticket: %v", err)
	}
	device := t.TempDir()
	if _, err := defs.Init(defs.InitOptions{Dir: device, Name: "test"}); err != nil {
		t.Fatal(err)
	}
	ticket, err := defs.Ticket(device, nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var addrs []string
	for turn := range 2 {
		o := defs.NodeOptions{Dir: dir, Listen: loopback}
		if turn == 0 {
			o.Ticket = ticket
		}
		n, err := defs.OpenNode(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		written, err := defs.ReadPeers(filepath.Join(dir, "addrs"))
		if err != nil || !slices.Equal(written, n.Addrs()) {
			t.Errorf("addrs has %q, the node %q, error %v", written, n.Addrs(), err)
		}
		if turn > 0 && !slices.Equal(addrs, n.Addrs()) {
			t.Errorf("addresses were %q, are %q", addrs, n.Addrs())
		}
		addrs = n.Addrs()
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestInitTwice(t *testing.T) {
	dir := t.TempDir()
	if _, err := defs.Init(defs.InitOptions{Dir: dir, Name: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := defs.Init(defs.InitOptions{Dir: dir, Name: "test"}); !errors.Is(err, defs.ErrVolumeExists) {
		t.Fatalf("error %v", err)
	}
}

// The power may fail as soon as a volume has been made, and as soon as a node
// has joined.
func TestPowerCutAfterInit(t *testing.T) {
	for _, filesystem := range powercut.Filesystems {
		t.Run(filesystem, func(t *testing.T) {
			disk := powercut.New(t, filesystem)
			device, nodeDir := filepath.Join(disk.Dir, "device"), filepath.Join(disk.Dir, "node")
			if _, err := defs.Init(defs.InitOptions{Dir: device, Name: "test"}); err != nil {
				t.Fatal(err)
			}
			disk.Cut()
			disk.Restore()
			ticket, err := defs.Ticket(device, nil)
			if err != nil {
				t.Fatal(err)
			}
			o := defs.NodeOptions{Dir: nodeDir, Ticket: ticket, Listen: loopback, CapacityBytes: 1 << 30}
			n, err := defs.OpenNode(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			disk.Cut()
			disk.Restore()
			o.Ticket = ""
			if n, err = defs.OpenNode(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			closeClient(t, open(t, device, n.Addrs()))
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A damaged identity is told, not tripped over.
func TestEmptyCertificate(t *testing.T) {
	dir, _, _ := pool(t, "2+1", 0)
	if err := os.WriteFile(filepath.Join(dir, "certificate"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := defs.New(t.Context(), defs.Options{Dir: dir, Listen: loopback}); err == nil {
		closeClient(t, c)
		t.Fatal("opened")
	}
}
