package command

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/volume"
)

// faultsMax bounds the faults that are listed; all are counted.
const faultsMax = 1000

type fsckReport struct {
	Schema      int         `json:"schema"`
	Clean       bool        `json:"clean"`
	Inodes      int64       `json:"inodes"`
	Entries     int64       `json:"entries"`
	Extents     int64       `json:"extents"`
	LocalBytes  int64       `json:"local_bytes"`
	RemoteBytes int64       `json:"remote_bytes"`
	FaultCount  int         `json:"fault_count"`
	lostFaults  int         // of them, known losses
	Faults      []fsckFault `json:"faults"`

	Repairs      []string `json:"repairs,omitempty"`       // what --repair did
	FetchedBytes int64    `json:"fetched_bytes,omitempty"` // no longer readable here: read from the peers from now on
	LostBytes    int64    `json:"lost_bytes,omitempty"`    // readable nowhere: found lost by this repair
}

type fsckFault struct {
	Ino    uint64 `json:"ino"`
	Path   string `json:"path,omitempty"` // one of the inode's names, from the root
	Detail string `json:"detail"`
}

func (a *app) fsckCommand() *cobra.Command {
	var repair bool
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "Check the tree and every byte on this disk",
		Long: `Check the tree and every byte on this disk. The volume must not be mounted. It
changes nothing, except that opening a volume finishes what a crash left undone.

--repair makes a damaged volume mountable again: it puts the journal in order,
makes the metastore anew from the journal or with the peers' help, reads from
the peers what is damaged here, and marks as lost what nobody has, so that
reads of it fail. What it replaces is set aside, not deleted. It ends with 3
where bytes are lost.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, dir, err := a.volume(cmd)
			if err != nil {
				return err
			}
			if _, err := volume.LoadDevice(dir); err != nil {
				return err
			}
			if client, err := control.Dial(cmd.Context(), dir); err == nil {
				client.Close()
				if at := mountedAt(cmd.Context(), dir); at != "" {
					return fmt.Errorf("the volume is mounted at %s: unmount it first", at)
				}
				return errors.New("the volume is in use by another command: try again when it has ended")
			}
			report := fsckReport{Schema: control.Schema, Faults: []fsckFault{}}
			if repair {
				options, err := clientOptions(o, dir)
				if err != nil {
					return err
				}
				options.Logger = quietLogger(cmd, o, a.Err)
				if report.Repairs, err = defs.Repair(cmd.Context(), options); err != nil {
					for _, done := range report.Repairs {
						fmt.Fprintln(a.Err, done)
					}
					return err
				}
			}
			opened, err := a.open(cmd, o, dir)
			if err != nil {
				return err
			}
			if repair {
				report.FetchedBytes, report.LostBytes, err = opened.Volume().RepairContent(cmd.Context())
			}
			var checked volume.Checked
			inos := make(map[volume.Ino]bool)
			if err == nil {
				checked, err = opened.Volume().Fsck(cmd.Context(), func(f volume.Fault) {
					report.FaultCount++
					if f.Lost {
						report.lostFaults++
					}
					if len(report.Faults) < faultsMax {
						inos[f.Ino] = true
						report.Faults = append(report.Faults, fsckFault{Ino: uint64(f.Ino), Detail: f.Detail})
					}
				})
			}
			if err == nil && len(inos) > 0 {
				var paths map[volume.Ino]string
				paths, err = opened.Volume().Paths(cmd.Context(), inos)
				for i := range report.Faults {
					report.Faults[i].Path = paths[volume.Ino(report.Faults[i].Ino)]
				}
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), closeTimeout)
			defer cancel()
			if err := errors.Join(err, opened.Close(ctx)); err != nil {
				return err
			}
			report.Clean = report.FaultCount == 0
			report.Inodes, report.Entries, report.Extents = checked.Inodes, checked.Entries, checked.Extents
			report.LocalBytes, report.RemoteBytes = checked.LocalBytes, checked.RemoteBytes
			if err := a.print(report, func(w io.Writer) { writeFsck(w, report) }); err != nil || report.Clean {
				return err
			}
			if repair && report.lostFaults == report.FaultCount {
				return silentError(exitPartial)
			}
			return silentError(exitFailed)
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "repair what is damaged")
	config.AddFlags(cmd.Flags(), openFlags...)
	return cmd
}

func writeFsck(w io.Writer, r fsckReport) {
	for _, done := range r.Repairs {
		fmt.Fprintln(w, done)
	}
	if r.FetchedBytes > 0 {
		fmt.Fprintf(w, "%s could not be read here and come from the peers from now on\n", size(r.FetchedBytes))
	}
	if r.LostBytes > 0 {
		fmt.Fprintf(w, "%s could not be read here and are nowhere else: they are marked as lost\n", size(r.LostBytes))
	}
	for _, f := range r.Faults {
		switch {
		case f.Ino == 0:
			fmt.Fprintln(w, f.Detail)
		case f.Path != "":
			fmt.Fprintf(w, "%q, inode %d: %s\n", f.Path, f.Ino, f.Detail)
		default:
			fmt.Fprintf(w, "inode %d: %s\n", f.Ino, f.Detail)
		}
	}
	if r.FaultCount > len(r.Faults) {
		fmt.Fprintf(w, "and %d more\n", r.FaultCount-len(r.Faults))
	}
	fmt.Fprintf(w, "%d inodes, %d entries, %d extents, %s read from this disk, %s with the peers alone: ",
		r.Inodes, r.Entries, r.Extents, size(r.LocalBytes), size(r.RemoteBytes))
	if r.Clean {
		fmt.Fprintln(w, "clean")
	} else {
		fmt.Fprintf(w, "%d faults\n", r.FaultCount)
	}
}
