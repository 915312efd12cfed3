package command

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

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
	Faults      []fsckFault `json:"faults"`
}

type fsckFault struct {
	Ino    uint64 `json:"ino"`
	Detail string `json:"detail"`
}

func (a *app) fsckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "fsck",
		Short: "Check the tree and every byte on this disk",
		Long: `Check the tree and every byte on this disk. The volume must not be mounted. It
changes nothing, except that opening a volume finishes what a crash left undone.`,
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
			opened, err := a.open(cmd, o, dir)
			if err != nil {
				return err
			}
			report := fsckReport{Schema: control.Schema, Faults: []fsckFault{}}
			checked, err := opened.Volume().Fsck(cmd.Context(), func(f volume.Fault) {
				report.FaultCount++
				if len(report.Faults) < faultsMax {
					report.Faults = append(report.Faults, fsckFault{uint64(f.Ino), f.Detail})
				}
			})
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
			return silentError(exitFailed)
		},
	}
}

func writeFsck(w io.Writer, r fsckReport) {
	for _, f := range r.Faults {
		fmt.Fprintf(w, "inode %d: %s\n", f.Ino, f.Detail)
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
