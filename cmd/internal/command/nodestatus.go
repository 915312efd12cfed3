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
	row("stored", "%d shards, %s of %s", n.Shards, size(n.UsedBytes), size(n.CapacityBytes))
	row("background", "%s moved, at most %s per second", size(uint64(n.BackgroundBytes)), size(uint64(n.BackgroundBytesPerSecond)))
	row("scrub", "%d shards (%s) read again, each once in %v; %d damaged, %d of them healed",
		n.Scrub.Shards, size(uint64(n.Scrub.Bytes)), time.Duration(n.Scrub.EverySeconds*float64(time.Second)), n.Scrub.Damaged, n.Scrub.Healed)
	row("audit", "%d challenges proved by others, %d not", n.Audit.Proved, n.Audit.Failed)
	row("repair", "%d shards rebuilt, %d copied to mirrors", n.Repair.Rebuilt, n.Repair.Copied)
}
