package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
)

// secretBytesMax bounds words and tickets.
const secretBytesMax = 64 << 10

func (a *app) initCommand() *cobra.Command {
	var ticketFile string
	cmd := &cobra.Command{
		Use:   "init NAME",
		Short: "Make a volume and show its 24 recovery words, once",
		Args:  args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			if strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") || len(name) > 64 {
				return usage("a volume's name has at most 64 bytes, no slash, and does not begin with a dot")
			}
			o, err := config.Load(config.Sources{Files: config.Files(""), Environ: a.Environ, Flags: cmd.Flags()})
			if err != nil {
				return usage("%w", err)
			}
			if o.Data == "" {
				o.Volume = name
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
			words, err := defs.Init(defs.InitOptions{Dir: dir, Name: name, Policy: o.Policy, Ticket: ticket})
			if err != nil {
				return err
			}
			return a.print(struct {
				Schema int    `json:"schema"`
				Volume string `json:"volume"`
				Dir    string `json:"dir"`
				Words  string `json:"words"`
			}{control.Schema, name, dir, words}, func(w io.Writer) {
				fmt.Fprintf(a.Err, "Volume %s is in %s.\nThese 24 words bring it back when this machine is lost. Write them down; they are shown only now:\n\n", name, dir)
				all := strings.Fields(words)
				for i := 0; i < len(all); i += 6 {
					fmt.Fprintln(w, strings.Join(all[i:min(i+6, len(all))], " "))
				}
			})
		},
	}
	config.AddFlags(cmd.Flags(), "policy")
	cmd.Flags().StringVar(&ticketFile, "ticket-file", "", "file with a ticket of the pool to join, - for standard input; without it the volume founds a pool")
	return cmd
}

func (a *app) ticketCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ticket",
		Short: "Print a ticket, with which storage nodes join the volume's pool",
		Long: `Print a ticket, with which storage nodes join the volume's pool. Whoever has the
ticket can join: treat it as a secret. Addresses in it tell who joins where the
pool is: those given by --peers, else what the process that has the volume open
knows of itself and of others.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, dir, err := a.volume(cmd)
			if err != nil {
				return err
			}
			peers, err := expandPeers(o.Peers)
			if err != nil {
				return err
			}
			if len(peers) == 0 {
				if peers, err = reachableAddrs(cmd.Context(), dir); err != nil {
					return err
				}
			}
			ticket, err := defs.Ticket(dir, peers)
			if err != nil {
				return err
			}
			return a.print(struct {
				Schema int    `json:"schema"`
				Ticket string `json:"ticket"`
			}{control.Schema, ticket}, func(w io.Writer) { fmt.Fprintln(w, ticket) })
		},
	}
	config.AddFlags(cmd.Flags(), "peers")
	return cmd
}

// ticketAddrsMax bounds the addresses put into a ticket unasked.
const ticketAddrsMax = 12

// reachableAddrs asks the process that has the volume open, if there is one,
// for addresses in the pool that other machines may reach.
func reachableAddrs(ctx context.Context, dir string) ([]string, error) {
	client, err := control.Dial(ctx, dir)
	if errors.Is(err, control.ErrNotServed) || errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer client.Close()
	known, err := client.Peers(ctx)
	if err != nil {
		return nil, err
	}
	all := known.Addrs
	for _, p := range known.Peers {
		for _, addr := range p.Addrs {
			if p.State == "alive" {
				all = append(all, addr+"/p2p/"+p.ID)
			}
		}
	}
	var out []string
	for _, addr := range all {
		if len(out) < ticketAddrsMax && !strings.HasPrefix(addr, "/ip4/127.") && !strings.HasPrefix(addr, "/ip6/::1/") {
			out = append(out, addr)
		}
	}
	return out, nil
}

// readSecret returns text itself, or the content of @FILE, or of standard
// input for @- and -.
func readSecret(text string) (string, error) {
	path, isFile := strings.CutPrefix(text, "@")
	if !isFile && text != "-" {
		return text, nil
	}
	var in io.Reader = os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, secretBytesMax+1))
	if err != nil {
		return "", err
	}
	if len(b) > secretBytesMax {
		return "", errors.New("that is too long for a ticket or words")
	}
	return strings.TrimSpace(string(b)), nil
}
