package command

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/volume"
)

func (a *app) recoverCommand() *cobra.Command {
	var wordsFile, wordsCommand, ticketFile string
	var head uint16
	cmd := &cobra.Command{
		Use:   "recover [NAME]",
		Short: "Bring a volume back from its 24 words and the addresses of some nodes",
		Long: `Bring a volume back, into an empty directory, from its 24 words and the addresses
of some nodes. The words come from a file, from a command's output, or from
standard input; never from the command line, which others can read.

Where several devices have written to the volume, each on its own, their states
are not merged. The newest is taken, or that of the device named with --head. The
others are listed, and the command ends with code 3; they stay with the peers.

A device that still has the volume mounted goes on apart: what it writes later is
not in what is brought back. Devices of the pool that seem to be running are
listed.`,
		Args: args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := config.Load(config.Sources{Files: config.Files(""), Environ: a.Environ, Flags: cmd.Flags()})
			if err != nil {
				return usage("%w", err)
			}
			if len(args) == 1 && o.Data == "" {
				o.Volume = args[0]
			}
			if o.Data == "" && o.Volume == "" {
				return usage("say where to: a volume's NAME, or --data DIR")
			}
			addrs, err := expandPeers(o.Peers)
			if err != nil {
				return err
			}
			if len(addrs) == 0 && len(o.Peers) > 0 {
				return fmt.Errorf("there is no address in %s", strings.Join(o.Peers, ", "))
			}
			if len(addrs) == 0 {
				return usage("give the address of at least one node of the pool: --peers /ip4/192.0.2.1/tcp/4001/p2p/ID, or --peers @FILE")
			}
			dir, err := o.VolumeDir()
			if err != nil {
				return err
			}
			var ticket string
			if ticketFile != "" {
				if ticket, err = readSecret("@" + ticketFile); err != nil {
					return err
				}
			}
			words, err := a.readWords(wordsFile, wordsCommand)
			if err != nil {
				return err
			}
			report, err := defs.Recover(cmd.Context(), defs.RecoverOptions{
				Dir: dir, Words: words, Peers: addrs, Ticket: ticket, Head: head, Logger: quietLogger(cmd, o, a.Err),
			})
			if err != nil {
				return err
			}
			running := make([]string, len(report.Running))
			for i, id := range report.Running {
				running[i] = string(id)
			}
			if err := a.print(struct {
				Schema   int               `json:"schema"`
				Volume   string            `json:"volume"`
				Dir      string            `json:"dir"`
				Cut      time.Time         `json:"cut"`
				Entries  int               `json:"entries"`
				Device   uint16            `json:"device"` // that this machine is now
				Head     volume.HeadRef    `json:"head"`   // that was taken
				Left     []volume.LeftHead `json:"left"`
				Warnings []string          `json:"warnings"`
				Running  []string          `json:"running"` // devices of the pool
			}{
				control.Schema, report.Device.Name, dir, report.Head.Time, report.Entries, report.Device.Slot,
				report.Head, append([]volume.LeftHead{}, report.Left...), append([]string{}, report.Warnings...), running,
			}, func(w io.Writer) { printRecovered(w, dir, report) }); err != nil {
				return err
			}
			if len(report.Left)+len(report.Warnings) > 0 {
				return silentError(exitPartial)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&wordsFile, "words-file", "", "file with the 24 words, - for standard input")
	cmd.Flags().StringVar(&wordsCommand, "words-command", "", "shell command that prints the 24 words")
	cmd.Flags().StringVar(&ticketFile, "ticket-file", "", "file with a ticket of the pool, needed where another volume founded it")
	cmd.Flags().Uint16Var(&head, "head", 0, "number of the device whose state is taken (default: the newest)")
	config.AddFlags(cmd.Flags(), "peers")
	return cmd
}

func printRecovered(w io.Writer, dir string, r *volume.Recovered) {
	fmt.Fprintf(w, "Volume %s is back in %s, as device %d had it at %s. Its content comes from the peers as it is read.\n",
		r.Device.Name, dir, r.Head.Device, localTime(r.Head.Time))
	for _, l := range r.Left {
		switch {
		case l.Problem != "":
			fmt.Fprintf(w, "NOT in it: what device %d has published, which cannot be read: %s.\n", l.Device, l.Problem)
		case l.Since != nil:
			fmt.Fprintf(w, "NOT in it: what device %d has changed up to %s, from the state that device %d had at %s on.\n",
				l.Device, localTime(l.Time), l.Since.Device, localTime(l.Since.Time))
		default:
			fmt.Fprintf(w, "NOT in it: what device %d has changed, up to %s.\n", l.Device, localTime(l.Time))
		}
	}
	for _, l := range r.Left {
		if l.Problem == "" {
			fmt.Fprintf(w, "To have the state of device %d beside this one: defs recover --head %d into another directory.\n", l.Device, l.Device)
		}
	}
	for _, id := range r.Running {
		fmt.Fprintf(w, "Warning: device %s of this pool is running, or was until a moment ago. If it has volume %s mounted, unmount it there for good: what each of the two writes from here on stays apart.\n",
			id, r.Device.Name)
	}
	for _, text := range r.Warnings {
		fmt.Fprintf(w, "Warning: %s.\n", text)
	}
}

func localTime(t time.Time) string { return t.Local().Format(time.DateTime) }

func (a *app) readWords(file, command string) (string, error) {
	switch {
	case file != "" && command != "":
		return "", usage("give --words-file or --words-command, not both")
	case file == "-":
		return readAll(a.In)
	case file != "":
		f, err := os.Open(file)
		if err != nil {
			return "", err
		}
		defer f.Close()
		return readAll(f)
	case command != "":
		run := exec.Command("sh", "-c", command)
		run.Stdin, run.Stderr = os.Stdin, a.Err
		out, err := run.Output()
		if err != nil {
			return "", fmt.Errorf("words command: %w", err)
		}
		return readAll(bytes.NewReader(out))
	case isTerminal(a.In):
		return a.promptWords()
	}
	return readAll(a.In)
}

// promptWords reads lines until there are 24 words. They are shown as they are
// typed, because nobody types 24 words blindly.
func (a *app) promptWords() (string, error) {
	fmt.Fprintln(a.Err, "The 24 words, on one line or several:")
	var words []string
	lines := bufio.NewScanner(a.In)
	for len(words) < 24 && lines.Scan() {
		words = append(words, strings.Fields(lines.Text())...)
	}
	return strings.Join(words, " "), lines.Err()
}

func readAll(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, secretBytesMax+1))
	if err == nil && len(b) > secretBytesMax {
		err = errors.New("that is too long for 24 words")
	}
	return strings.Join(strings.Fields(string(b)), " "), err
}
