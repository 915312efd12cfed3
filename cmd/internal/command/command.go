// Package command is the command line of DeFS, for cmd/defs and cmd/defs-mount:
// what the flags mean, what is printed, and which code a command ends with.
//
//	os.Exit(command.Defs(os.Args[1:], command.OS()))
//
// A command talks to the process that has the volume open, if there is one, and
// else opens the volume itself for as long as it runs; it does the same in both
// cases.
package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/p2p"
)

// Streams are what a command reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	Environ  []string
}

// OS returns the streams of this process.
func OS() Streams {
	return Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Environ: os.Environ()}
}

// app is one run of a command.
type app struct {
	Streams
	json   bool
	parent *os.File // of a mount in the background, until it answers
}

// Defs runs the command `defs` and returns its exit code.
func Defs(args []string, s Streams) int {
	a := &app{Streams: s, parent: openDaemonPipe()}
	root := &cobra.Command{
		Use:   "defs",
		Short: "A folder that lives on your peers",
		Long: `A folder that lives on your peers: encrypted here, erasure-coded, and scattered
over machines that can neither read it nor lose it.

Exit codes: 0 done, 1 failed, 3 done in part, 4 degraded, 5 not yet durable,
10 no such volume, 12 wrong secret, 13 no space, 14 mountpoint cannot be used,
64 wrong usage, 124 timed out.`,
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		root.Version = info.Main.Version
	}
	config.AddFlags(root.PersistentFlags(), "data", "volume", "log-level")
	root.AddCommand(
		a.initCommand(), a.ticketCommand(), a.recoverCommand(), a.mountCommand("mount [VOLUME] MOUNTPOINT", 1), a.umountCommand(),
		a.nodeCommand(), a.statusCommand(), a.waitCommand(), a.peersCommand(), a.putCommand(), a.getCommand(), a.cacheCommand(),
		a.inspectCommand(), a.fsckCommand(), a.doctorCommand(),
	)
	return a.run(root, args)
}

// Mount runs the command `defs-mount`, which is also mount(8)'s helper
// mount.fuse.defs, and returns its exit code.
func Mount(args []string, s Streams, helper bool) int {
	a := &app{Streams: s, parent: openDaemonPipe()}
	root := a.mountCommand("defs-mount VOLUME MOUNTPOINT", 2)
	config.AddFlags(root.Flags(), "data", "log-level")
	if helper {
		root.Use = "mount.fuse.defs VOLUME MOUNTPOINT"
		// mount(8) passes these on; it expects the mount to be there on return.
		for _, flag := range []string{"sloppy s", "fake f", "no-mtab n", "verbose v"} {
			root.Flags().BoolP(flag[:len(flag)-2], flag[len(flag)-1:], false, "of mount(8)")
		}
		root.Flags().StringP("types", "t", "", "of mount(8)")
		if err := root.Flags().Set("daemon", "true"); err != nil {
			panic(err) // the flag is there
		}
	}
	return a.run(root, args)
}

func (a *app) run(root *cobra.Command, args []string) int {
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON, errors too")
	root.SetArgs(args)
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetGlobalNormalizationFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "peer" {
			name = "peers" // who gives one writes --peer
		}
		return pflag.NormalizedName(name)
	})
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if !errors.As(err, &unknown) || unknown.GetSpecifiedShortnames() != "" {
			return usage("%w", err)
		}
		var known []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { known = append(known, "--"+f.Name) })
		return usage("%w%s", err, config.Suggest("--"+unknown.GetSpecifiedName(), known))
	})
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ran, err := root.ExecuteContextC(ctx)
	if err != nil && ran == root && root.HasSubCommands() && !errors.As(err, new(*exitError)) {
		err = usage("%w", err) // cobra's: no such command
	}
	code := exitCode(err)
	if err == nil || errors.As(err, new(silentError)) {
		return code
	}
	text := inWords.Replace(err.Error())
	a.tellParent(text)
	if a.json {
		json.NewEncoder(a.Err).Encode(struct {
			Schema int    `json:"schema"`
			Error  string `json:"error"`
			Code   int    `json:"exit_code"`
		}{control.Schema, text, code})
		return code
	}
	fmt.Fprintf(a.Err, "%s: %s\n", root.Name(), text)
	if code == exitUsage {
		fmt.Fprintf(a.Err, "Try '%s --help'.\n", ran.CommandPath())
	}
	return code
}

// inWords says what the texts of Go's contexts mean to whoever typed a command.
var inWords = strings.NewReplacer(
	context.DeadlineExceeded.Error(), "the time for it is over",
	context.Canceled.Error(), "it was interrupted",
)

// args makes a check of the number of arguments that ends with the code for usage.
func args(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < least || len(args) > most {
			line := cmd.UseLine()
			if cmd.HasAvailableSubCommands() {
				line += ", or " + cmd.CommandPath() + " with one of: "
				var names []string
				for _, c := range cmd.Commands() {
					names = append(names, c.Name())
				}
				line += strings.Join(names, ", ")
			}
			return usage("%s given; it is used as: %s", plural(len(args), "argument"), line)
		}
		return nil
	}
}

// print writes v as JSON, or calls text.
func (a *app) print(v any, text func(w io.Writer)) error {
	if !a.json {
		text(a.Out)
		return nil
	}
	out := json.NewEncoder(a.Out)
	out.SetIndent("", "  ")
	return out.Encode(v)
}

// options loads the settings that hold for a command, and the directory of its
// volume. dir is "" when there is no volume; find says why.
func (a *app) options(cmd *cobra.Command, mount map[string]any) (o config.Options, dir string, find error, err error) {
	sources := config.Sources{Files: config.Files(""), Environ: a.Environ, Mount: mount, Flags: cmd.Flags()}
	if o, err = config.Load(sources); err != nil {
		return o, "", nil, usage("%w", err)
	}
	if dir, find = o.VolumeDir(); find != nil {
		return o, "", find, nil
	}
	sources.Files = config.Files(dir)
	if o, err = config.Load(sources); err != nil {
		return o, "", nil, usage("%w", err)
	}
	return o, dir, nil, nil
}

// volume loads the settings and the directory of the volume that is meant.
func (a *app) volume(cmd *cobra.Command) (config.Options, string, error) {
	o, dir, find, err := a.options(cmd, nil)
	if err == nil && find != nil {
		err = &exitError{exitNoVolume, find}
	}
	return o, dir, err
}

// logger writes to w what is worth the level.
func logger(o config.Options, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.LogLevel)); err != nil {
		level = slog.LevelInfo
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// quietLogger is for commands that a person waits for: only what needs attention.
// What libp2p logs of its own accord does not, such as that a listener is closed
// when the command ends.
func quietLogger(cmd *cobra.Command, o config.Options, w io.Writer) *slog.Logger {
	if f := cmd.Flag("log-level"); f == nil || !f.Changed {
		p2p.SilenceLibrary()
		o.LogLevel = "error"
	}
	return logger(o, w)
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}
