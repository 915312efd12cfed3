package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
)

func (a *app) putCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "put FILE",
		Short: "Store one file in the volume's folder uploads, without a mount, and print its id",
		Long: `Store one file in the volume's folder uploads, without a mount, and print its id.
Where no mount keeps the volume open, it waits until the peers have the file.`,
		Args: args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			s, err := a.connect(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			id, err := s.Upload(cmd.Context(), filepath.Base(args[0]), f)
			if err != nil {
				return err
			}
			if err := a.print(control.Uploaded{Schema: control.Schema, ID: id}, func(w io.Writer) { fmt.Fprintln(w, id) }); err != nil || !s.own {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			if err := a.waitDurable(ctx, s.Client); err != nil {
				return &exitError{exitNotDurable, fmt.Errorf("the file is on this disk and goes to the peers when the volume is open next: %w", err)}
			}
			return nil
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait for the peers")
	config.AddFlags(cmd.Flags(), openFlags...)
	return cmd
}

func (a *app) getCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get ID FILE",
		Short: "Write a file that was put to FILE, or to standard output for -",
		Args:  args(2, 2),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			s, err := a.connect(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			id, path := args[0], args[1]
			if path == "-" {
				return s.Download(cmd.Context(), id, a.Out)
			}
			// FILE is all of it or what it was.
			f, err := os.CreateTemp(filepath.Dir(path), ".defs-get-*")
			if err != nil {
				return err
			}
			defer os.Remove(f.Name())
			if err := errors.Join(s.Download(cmd.Context(), id, f), f.Sync(), f.Close()); err != nil {
				return err
			}
			if err := os.Rename(f.Name(), path); err != nil {
				return err
			}
			return a.print(struct {
				Schema int    `json:"schema"`
				ID     string `json:"id"`
				File   string `json:"file"`
			}{control.Schema, id, path}, func(io.Writer) {})
		},
	}
	config.AddFlags(cmd.Flags(), openFlags...)
	return cmd
}

func (a *app) cacheCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cache",
		Short: "Manage the bytes on this disk that the peers have too",
		Args:  args(0, 0),
		RunE:  func(*cobra.Command, []string) error { return usage("say what to do with them: cache drop") },
	}
	var force bool
	drop := &cobra.Command{
		Use:   "drop",
		Short: "Remove the local bytes that the peers can give back",
		Long: `Remove the local bytes that the peers can give back. The nodes are asked first: what
too few of those that answer hold stays on this disk, and the command ends with 3.
--force removes that as well: it cannot be read until enough nodes answer again.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			s, err := a.connect(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			dropped, err := s.DropCache(cmd.Context(), force)
			if err != nil {
				return err
			}
			if err := a.print(dropped, func(w io.Writer) {
				fmt.Fprintf(w, "%s removed\n", size(dropped.Bytes))
				if dropped.KeptBytes > 0 {
					fmt.Fprintf(w, "%s kept: too few nodes answer to give %s back (%d of %d); --force removes them too\n",
						size(dropped.KeptBytes), plural(dropped.KeptStripes, "stripe"), dropped.Answering, dropped.Nodes)
				}
			}); err != nil || dropped.KeptBytes == 0 {
				return err
			}
			return silentError(exitPartial)
		},
	}
	drop.Flags().BoolVar(&force, "force", false, "also what the peers cannot give back now")
	config.AddFlags(drop.Flags(), openFlags...)
	cmd.AddCommand(drop)
	return cmd
}
