package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
)

// nodesMax bounds the nodes of one process.
const nodesMax = 64

// loopback is where the nodes of a local pool listen.
var loopback = []string{"/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"}

func (a *app) nodeCommand() *cobra.Command {
	var join string
	var count int
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Store shards for others",
		Long: `Store shards for others, until a signal ends it. The first time it needs a ticket
(--join TICKET, or @FILE, or - for standard input). It prints the addresses at
which it can be reached and writes them to the file addrs in its directory.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if count < 1 || count > nodesMax {
				return usage("--count is %d: use 1 to %d", count, nodesMax)
			}
			o, err := config.Load(config.Sources{Files: config.Files(""), Environ: a.Environ, Flags: cmd.Flags()})
			if err != nil {
				return usage("%w", err)
			}
			if o.Data == "" {
				o.Data = config.NodeDir()
			}
			if o, err = config.Load(config.Sources{Files: config.Files(o.Data), Environ: append(a.Environ, "DEFS_DATA="+o.Data), Flags: cmd.Flags()}); err != nil {
				return usage("%w", err)
			}
			ticket, err := readSecret(join)
			if err != nil {
				return err
			}
			if join != "" && ticket == join {
				fmt.Fprintln(a.Err, "The ticket is a secret, and others on this computer can see command lines: give it as --join @FILE or --join - next time.")
			}
			return a.runNodes(cmd.Context(), o, ticket, count)
		},
	}
	config.AddFlags(cmd.Flags(), "listen", "peers", "capacity", "host", "zone", "suspect-after", "dead-after", "copy-after", "dial-timeout", "background-rate", "scrub-every", "memory-max")
	cmd.Flags().StringVar(&join, "join", "", "ticket of the pool, needed the first time; @FILE reads it from a file")
	cmd.AddCommand(a.nodeStatusCommand(), a.nodeDrainCommand())
	cmd.Flags().IntVar(&count, "count", 1, "nodes to run in this process: a local pool, on loopback unless --listen is given")
	return cmd
}

// runNodes starts the nodes, says that they serve, and stops them when ctx ends.
func (a *app) runNodes(ctx context.Context, o config.Options, ticket string, count int) (err error) {
	setMemoryLimit(o, count)
	peers, err := expandPeers(o.Peers)
	if err != nil {
		return err
	}
	log := logger(o, a.Err)
	var nodes []*defs.Node
	var servers []*control.Server
	defer func() {
		daemon.SdNotify(false, daemon.SdNotifyStopping)
		errs := make([]error, len(nodes))
		var wg sync.WaitGroup
		for _, s := range servers {
			errs = append(errs, s.Close())
		}
		for i, n := range nodes {
			wg.Go(func() { errs[i] = n.Close() })
		}
		wg.Wait()
		err = errors.Join(append(errs, err)...)
	}()
	var addrs []string
	for i := range count {
		dir, listen := o.Data, o.Listen
		if count > 1 {
			dir = filepath.Join(o.Data, fmt.Sprintf("node-%d", i+1))
			if len(listen) == 0 {
				listen = loopback
			}
		}
		n, err := defs.OpenNode(ctx, defs.NodeOptions{
			Dir: dir, Ticket: ticket, Listen: listen, Peers: append(addrs, peers...), CapacityBytes: uint64(o.Capacity), DiskShare: count, Host: o.Host, Zone: o.Zone,
			HeartbeatInterval: o.HeartbeatInterval(), SuspectAfter: o.SuspectAfter, DeadAfter: o.DeadAfter, DialTimeout: o.DialTimeout,
			CopyAfter: o.CopyAfter, MirrorInterval: o.MirrorInterval(), BackgroundRate: int64(o.BackgroundRate), ScrubInterval: o.ScrubEvery,
			Logger: log.With("node", i+1),
		})
		if err != nil {
			return err
		}
		nodes = append(nodes, n)
		server, err := control.ServeNode(dir, n)
		if err != nil {
			return err
		}
		servers = append(servers, server)
		addrs = append(addrs, n.Addrs()...)
	}
	if count > 1 {
		// One list for those who are to find the pool.
		if err := os.WriteFile(filepath.Join(o.Data, "addrs"), []byte(strings.Join(addrs, "\n")+"\n"), 0o644); err != nil {
			return err
		}
	}
	if err := a.print(struct {
		Schema int      `json:"schema"`
		Nodes  int      `json:"nodes"`
		Addrs  []string `json:"addrs"`
	}{control.Schema, count, addrs}, func(w io.Writer) {
		for _, addr := range addrs {
			fmt.Fprintln(w, addr)
		}
	}); err != nil {
		return err
	}
	daemon.SdNotify(false, daemon.SdNotifyReady)
	<-ctx.Done()
	return nil
}
