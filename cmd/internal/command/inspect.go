package command

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
)

// stripeOrShard is a stripe's id, or one with the number of a shard.
var stripeOrShard = regexp.MustCompile(`^([0-9a-f]{32})(?:/([0-9]{1,3}))?$`)

func (a *app) inspectCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect PATH|STRIPE|SHARD",
		Short: "Show where bytes are: extents, slices, stripes, shards, holders, health",
		Long: `Show where bytes are. PATH is a file in a mount, or, where there is none, a path
from the volume's root that begins with a slash. STRIPE is an id of 32 hexadecimal
digits, SHARD is STRIPE/NUMBER.

A stripe is K+M shards, as the policy says, or fewer: little data takes a smaller
K, and so does a pool with fewer nodes than the policy wants, later a smaller M.`,
		Args: args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			what := url.Values{}
			if match := stripeOrShard.FindStringSubmatch(args[0]); match != nil {
				what.Set("stripe", match[1])
				what.Set("shard", match[2])
			} else if what, err = a.inspectedFile(cmd, args[0]); err != nil {
				return err
			}
			s, err := a.connect(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			found, err := s.Inspect(cmd.Context(), what)
			if what.Has("path") && control.CodeOf(err) == control.CodeNotFound {
				return fmt.Errorf("%s is neither in a mount nor a path from the root of the volume", args[0])
			}
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return a.print(found, func(w io.Writer) { writeInspection(w, found) })
		},
	}
	config.AddFlags(cmd.Flags(), openFlags...)
	return cmd
}

// inspectedFile turns a path in a mount into the inode number, and names the
// mount's volume unless a volume is named.
func (a *app) inspectedFile(cmd *cobra.Command, path string) (url.Values, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if parent, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		abs = filepath.Join(parent, filepath.Base(abs))
	}
	m, mounted := mountAbove(abs)
	if !mounted {
		return url.Values{"path": {filepath.ToSlash(path)}}, nil
	}
	info, err := os.Lstat(abs)
	if err != nil {
		return nil, err
	}
	if !cmd.Flag("data").Changed && !cmd.Flag("volume").Changed {
		if err := cmd.Flags().Set("data", volumeDir(m)); err != nil {
			return nil, err
		}
	}
	return url.Values{"ino": {strconv.FormatUint(info.Sys().(*syscall.Stat_t).Ino, 10)}}, nil
}

func writeInspection(out io.Writer, found control.Inspection) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	switch {
	case found.File != nil:
		f := found.File
		fmt.Fprintf(w, "inode %d, %s, %s, policy %s\n", f.Ino, size(f.Bytes), f.State, f.Policy)
		for _, reason := range f.NotDurable {
			fmt.Fprintf(w, "not durable: %s\n", reason)
		}
		for _, e := range f.Extents {
			where := "on this disk alone"
			if e.Stripe != "" {
				where = fmt.Sprintf("stripe %s slice %d", e.Stripe, e.Slice)
				if e.Local {
					where += ", and on this disk"
				}
			}
			fmt.Fprintf(w, "%d\t+%d\t%s\t%s\n", e.Offset, e.Bytes, e.State, where)
		}
		for _, s := range f.Stripes {
			writeStripe(w, s)
		}
	case found.Stripe != nil:
		writeStripe(w, *found.Stripe)
	case found.Shard != nil:
		writeShard(w, *found.Shard)
	}
}

func writeStripe(w io.Writer, s control.Stripe) {
	kind := s.Purpose
	if s.Mirrored {
		kind += ", mirrored"
	}
	health := s.Health
	if s.SurvivesLosses >= 0 {
		health += ", survives the loss of " + plural(s.SurvivesLosses, "node")
	}
	if s.Reason != "" {
		health += ": " + s.Reason
	}
	fmt.Fprintf(w, "stripe %s: %s, %d+%d shards of %s, %s used, %s live, epoch %d, keepers %s, %s\n",
		s.ID, kind, s.K, s.M, size(s.ShardBytes), size(s.UsedBytes), size(s.LiveBytes), s.Epoch, s.Keepers, health)
	for _, sh := range s.Shards {
		writeShard(w, sh)
	}
}

func writeShard(w io.Writer, s control.Shard) {
	line := []string{"  shard " + strconv.Itoa(s.Index), s.Primary, s.PrimaryState}
	if s.Mirror != "" {
		line = append(line, s.Mirror, s.MirrorState)
	}
	fmt.Fprintln(w, strings.Join(line, "\t"))
}
