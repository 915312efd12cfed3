package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
)

func (a *app) statusCommand() *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how safe a volume is",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			s, err := a.connect(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			ctx, cancel := context.WithTimeout(cmd.Context(), answerTimeout)
			defer cancel()
			st, err := s.Status(ctx)
			if err != nil {
				return err
			}
			if err := a.print(st, func(w io.Writer) { writeStatus(w, st) }); err != nil || !check {
				return err
			}
			switch {
			case st.Health.Lost > 0 || st.ReadOnly != "":
				return silentError(exitFailed)
			case st.Health.Degraded+st.Health.Unreachable > 0:
				return silentError(exitDegraded)
			case st.Bytes.Journaled+st.Bytes.Queued+st.Bytes.Recoverable > 0 || len(st.NotDurable) > 0:
				return silentError(exitNotDurable)
			}
			return nil
		},
	}
	config.AddFlags(cmd.Flags(), openFlags...)
	cmd.Flags().BoolVar(&check, "check", false, "end with 1, 4 or 5 when something is lost, degraded or not yet durable")
	return cmd
}

func writeStatus(out io.Writer, s control.Status) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	row := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("volume", "%s", s.Volume)
	if s.Mounted {
		row("mounted", "at %s", s.Mountpoint)
	} else {
		row("mounted", "no")
	}
	row("on this disk alone", "%s", size(s.Bytes.Journaled))
	row("on the way", "%s", size(s.Bytes.Queued))
	row("recoverable", "%s", size(s.Bytes.Recoverable))
	row("durable", "%s", size(s.Bytes.Durable))
	row("journal", "%s of %s", size(s.Journal.Bytes), size(s.Journal.MaxBytes))
	row("cache", "%s of %s", size(s.Cache.CleanBytes), size(s.Cache.MaxBytes))
	row("pool", "%s on %s alive", plural(s.Pool.Nodes, "node"), plural(s.Pool.Hosts, "host"))
	row("stripes", "%d, %d degraded, %d out of reach, %d lost", s.Health.Stripes, s.Health.Degraded, s.Health.Unreachable, s.Health.Lost)
	row("survives", "the loss of %s, or %s", plural(s.SurvivesLosses.Nodes, "node"), plural(s.SurvivesLosses.Hosts, "host"))
	for _, reason := range s.NotDurable {
		row("not durable", "%s", reason)
	}
	if s.Published != nil {
		row("published", "%s", humanize.Time(*s.Published))
	}
	for _, t := range s.Tasks {
		row(t.Kind, "%s of %s", size(t.DoneBytes), size(t.TotalBytes))
	}
	if s.ReadOnly != "" {
		row("read-only", "%s", s.ReadOnly)
	}
	if s.Problem != "" {
		row("problem", "%s", s.Problem)
	}
}

// plural is a number of things, such as 1 node and 2 nodes.
func plural(n int, thing string) string { return english.Plural(n, thing, "") }

func size[T int64 | uint64 | uint32](n T) string { return humanize.IBytes(uint64(max(n, 0))) }

func (a *app) waitCommand() *cobra.Command {
	var durable bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait --durable",
		Short: "Wait until the peers have everything",
		Args:  args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if !durable {
				return usage("say what to wait for: --durable")
			}
			s, err := a.connect(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			ctx := cmd.Context()
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, timeout)
				defer cancel()
			}
			if err := a.waitDurable(ctx, s.Client); err != nil {
				return err
			}
			if !a.json {
				return nil
			}
			st, err := s.Status(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(st, nil)
		},
	}
	config.AddFlags(cmd.Flags(), openFlags...)
	cmd.Flags().BoolVar(&durable, "durable", false, "until everything acknowledged so far has the protection that the policy wants")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up after so long, such as 5m; 0 is never")
	return cmd
}

// tellAfter is how long protection may be missing before a command that waits says why.
const tellAfter = 5 * time.Second

// waitDurable shows a bar while it waits, if somebody watches, and tells once
// what it waits for when that is not the bytes themselves.
func (a *app) waitDurable(ctx context.Context, client *control.Client) error {
	var out io.Writer = a.Err
	var published time.Time // when only protection was first seen to be missing
	told := false
	tell := func(s control.Status) {
		switch {
		case s.Bytes.Journaled+s.Bytes.Queued > 0:
			published = time.Time{}
		case published.IsZero():
			published = time.Now()
		case !told && len(s.NotDurable) > 0 && time.Since(published) > tellAfter:
			told = true
			fmt.Fprintf(out, "still waiting: %s\n", strings.Join(s.NotDurable, "; "))
		}
	}
	show := tell
	var bars *mpb.Progress
	if isTerminal(a.Err) {
		bars = mpb.New(mpb.WithOutput(a.Err), mpb.WithWidth(50))
		out = bars
		bar := bars.AddBar(0,
			mpb.PrependDecorators(decor.Name("durable "), decor.CountersKibiByte("% .1f / % .1f")),
			mpb.AppendDecorators(decor.Percentage()),
		)
		show = func(s control.Status) {
			tell(s)
			// Two steps for each byte: placed, and in a head.
			done, total := s.Bytes.Durable, s.Bytes.Journaled+s.Bytes.Queued+s.Bytes.Recoverable+s.Bytes.Durable
			for _, t := range s.Tasks {
				done += t.DoneBytes
			}
			bar.SetTotal(max(total, 1), false)
			bar.SetCurrent(min(done, total))
		}
		defer func() {
			bar.Abort(false)
			bars.Wait()
		}()
	}
	err := client.WaitDurable(ctx, show)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return &exitError{exitTimeout, fmt.Errorf("not yet durable, %s: the time for it is over", a.whyNotDurable(ctx, client))}
	case ctx.Err() != nil:
		return &exitError{exitNotDurable, fmt.Errorf("not yet durable: %w", err)}
	}
	return err
}

// whyNotDurable asks for the reasons, after the time to wait is over.
func (a *app) whyNotDurable(ctx context.Context, client *control.Client) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), mountAnswerTimeout)
	defer cancel()
	st, err := client.Status(ctx)
	if err != nil {
		return "the process that has the volume open does not tell why"
	}
	reasons := st.NotDurable
	if st.Problem != "" {
		reasons = append(reasons, st.Problem)
	}
	if len(reasons) == 0 {
		return "it has become so since"
	}
	return strings.Join(reasons, "; ")
}
