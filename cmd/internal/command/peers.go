package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/defs-fs/defs/config"
)

func (a *app) peersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peers",
		Short: "List the pool as this device sees it",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			s, err := a.connect(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
			defer cancel()
			peers, err := s.Peers(ctx)
			if err != nil {
				return err
			}
			return a.print(peers, func(out io.Writer) {
				w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
				defer w.Flush()
				fmt.Fprintln(w, "PEER\tROLE\tSTATE\tHOST\tUSED\tCAPACITY\tRTT\tSEEN")
				for _, p := range peers.Peers {
					seen := "never"
					if p.Seen != nil {
						seen = humanize.Time(*p.Seen)
					}
					rtt := time.Duration(p.RTTMs * float64(time.Millisecond)).Round(10 * time.Microsecond)
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.ID, p.Role, p.State, p.Host, size(p.UsedBytes), size(p.CapacityBytes), rtt, seen)
				}
			})
		},
	}
	config.AddFlags(cmd.Flags(), openFlags...)
	return cmd
}
