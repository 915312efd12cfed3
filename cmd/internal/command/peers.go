package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
)

func (a *app) peersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peers",
		Short: "List the pool as this device, or the node in --data, sees it",
		Long: `List the pool as this device, or the node in --data, sees it.

ROLE is node (stores shards), device (has a volume open), or recovery: the member
as which the 24 words get in. Nobody runs that one until a volume is recovered.
STATE is what this process knows from hearing the peer itself; unknown is one that
it has not heard since it was started.

TRUST is what this process itself has seen of a node: of what it was asked for or
challenged to prove, a lie leaves 0.6 of it, a loss 0.8, an answer that did not
come 0.85. Half of that is forgotten in a week. Below 0.5 a node is contained: it
is given no shards, and what it holds is put elsewhere.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			client, done, err := a.connectAny(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
			defer cancel()
			peers, err := client.Peers(ctx)
			if err != nil {
				return err
			}
			return a.print(peers, func(out io.Writer) {
				w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
				defer w.Flush()
				fmt.Fprintln(w, "PEER\tROLE\tSTATE\tHOST\tUSED\tCAPACITY\tRTT\tSEEN\tTRUST")
				for _, p := range peers.Peers {
					seen := "never"
					if p.Seen != nil {
						seen = humanize.Time(*p.Seen)
					}
					rtt := time.Duration(p.RTTMs * float64(time.Millisecond)).Round(10 * time.Microsecond)
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.ID, p.Role, p.State, p.Host, size(p.UsedBytes), size(p.CapacityBytes), rtt, seen, trust(p))
				}
			})
		},
	}
	config.AddFlags(cmd.Flags(), openFlags...)
	return cmd
}

// connectAny finds the node that runs in --data, or the volume.
func (a *app) connectAny(cmd *cobra.Command) (*control.Client, func() error, error) {
	if o, _, _, err := a.options(cmd, nil); err == nil && o.Data != "" {
		if client, err := control.Dial(cmd.Context(), o.Data); err == nil {
			return client, func() error { client.Close(); return nil }, nil
		}
	}
	s, err := a.connect(cmd)
	if err != nil {
		return nil, nil, err
	}
	return s.Client, s.close, nil
}

// trust explains what is known of a node.
func trust(p control.Peer) string {
	if p.Role != "node" {
		return ""
	}
	text := fmt.Sprintf("%.2f", p.Trust)
	var why []string
	for _, c := range []struct {
		count float64
		what  string
	}{{p.Lied, "lied"}, {p.Lost, "lost"}, {p.Stalled, "stalled"}} {
		if c.count >= 0.05 {
			why = append(why, fmt.Sprintf("%s %.1f", c.what, c.count))
		}
	}
	if p.Contained {
		text += " contained"
	}
	if len(why) > 0 {
		text += ": " + strings.Join(why, ", ") + fmt.Sprintf(" (proved %.0f)", p.Proved)
	}
	return text
}
