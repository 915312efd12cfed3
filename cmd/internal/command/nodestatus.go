package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
)

func (a *app) nodeStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Tell what the node in --data holds, repairs and checks",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, _, err := a.dialNode(cmd)
			if err != nil {
				return err
			}
			defer client.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
			defer cancel()
			n, err := client.Node(ctx)
			if err != nil {
				return err
			}
			return a.print(n, func(out io.Writer) { printNode(out, n) })
		},
	}
}

func (a *app) nodeDrainCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "drain",
		Short: "Empty the node in --data: every shard moves to another node",
		Long: `Empty the node in --data, which must run: every shard is copied to another node,
which proves it to the stripe's keepers before the copy here is dropped. The node
takes no more shards. When the command says that it is empty, the pool needs
nothing from it any more, and it can be stopped for good; if it is started again,
it is a node like any other. Ending the command ends the drain; what has moved
stays where it is.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, dir, err := a.dialNode(cmd)
			if err != nil {
				return err
			}
			defer client.Close()
			terminal := isTerminal(a.Err) && !a.json
			last, err := client.Drain(cmd.Context(), func(d control.Drain) {
				if terminal {
					fmt.Fprintf(a.Err, "\r%s moved, %d shards (%s) left\x1b[K", size(d.MovedBytes), d.Left, size(d.LeftBytes))
				}
			})
			if terminal {
				fmt.Fprint(a.Err, "\r\x1b[K")
			}
			if err != nil {
				return err
			}
			return a.print(last, func(out io.Writer) {
				if last.Moved == 0 {
					fmt.Fprintf(out, "The node in %s is empty already. It can be stopped.\n", dir)
					return
				}
				fmt.Fprintf(out, "The node in %s is empty: %s (%s) moved to other nodes. It can be stopped.\n", dir, plural(int(last.Moved), "shard"), size(last.MovedBytes))
			})
		},
	}
}

// dialNode finds the process of the node in --data, and returns that directory
// as well.
func (a *app) dialNode(cmd *cobra.Command) (*control.Client, string, error) {
	o, err := config.Load(config.Sources{Files: config.Files(""), Environ: a.Environ, Flags: cmd.Flags()})
	if err != nil {
		return nil, "", usage("%w", err)
	}
	if o.Data == "" {
		o.Data = config.NodeDir()
	}
	client, err := control.Dial(cmd.Context(), o.Data)
	if errors.Is(err, control.ErrNotServed) {
		err = fmt.Errorf("no node runs in %s: start it with defs node --data %s; of several in one process each has a directory node-N", o.Data, o.Data)
	}
	return client, o.Data, err
}

func printNode(out io.Writer, n control.Node) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	row := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("node", "%s", n.ID)
	row("stored", "%s; %s of %s are in use, with what is deleted and not yet cleared away", plural(int(n.Shards), "shard"), size(n.UsedBytes), size(n.CapacityBytes))
	row("background", "%s moved, at most %s per second", size(uint64(n.BackgroundBytes)), size(uint64(n.BackgroundBytesPerSecond)))
	row("scrub", "%d shards (%s) read again, each once in %v; %d damaged, %d of them healed",
		n.Scrub.Shards, size(uint64(n.Scrub.Bytes)), time.Duration(n.Scrub.EverySeconds*float64(time.Second)), n.Scrub.Damaged, n.Scrub.Healed)
	row("moves", "%d shards given to other nodes", n.Moves.Moved)
	if n.Moves.Draining {
		row("", "it is being drained, or is empty: it takes no shards until it is started again")
	}
	row("surplus", "%d shards (%s) are held elsewhere by now and wait for the owner's signature; %d dropped", n.Moves.Surplus, size(n.Moves.SurplusBytes), n.Moves.SurplusDropped)
	row("audit", "%d challenges proved by others, %d not", n.Audit.Proved, n.Audit.Failed)
	row("repair", "%d shards rebuilt, %d copied to mirrors; %d stripes are not whole", n.Repair.Rebuilt, n.Repair.Copied, n.Repair.Broken)
}
