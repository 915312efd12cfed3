package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// input is what the work reads: all of it in memory, or in files in memory.
type input struct {
	random  []byte // of the sequential file; new for each round, so that nothing is known already
	scratch string // directory in memory
	tree    string // tar of a source tree
	repo    string // git repository of it
	sql     string // script of transactions
	rng     *rand.ChaCha8
}

// treeDir is the part of the Go toolchain's source that is unpacked and cloned:
// about 900 files.
const treeDir = "src/net"

func newInput(ctx context.Context, s *scratch, p plan) (*input, error) {
	in := &input{
		random: make([]byte, max(p.seqMiB<<20, p.randMiB<<20, p.files*smallBytes)), rng: rand.NewChaCha8([32]byte{1}), scratch: s.memory,
		tree: filepath.Join(s.memory, "tree.tar"), repo: filepath.Join(s.memory, "repo"), sql: filepath.Join(s.memory, "sql"),
	}
	goroot, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	if err := writeTar(in.tree, filepath.Join(strings.TrimSpace(string(goroot)), treeDir)); err != nil {
		return nil, fmt.Errorf("tar: %w", err)
	}
	var sql strings.Builder
	sql.WriteString("PRAGMA journal_mode=DELETE; PRAGMA synchronous=FULL; CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT);\n")
	for i := range p.txs {
		fmt.Fprintf(&sql, "INSERT INTO t(v) VALUES('transaction %d writes one row of about a line of text');\n", i)
	}
	if err := os.WriteFile(in.sql, []byte(sql.String()), 0o600); err != nil {
		return nil, err
	}
	if err := os.Mkdir(in.repo, 0o700); err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"tar", "--no-same-owner", "-xf", in.tree, "-C", in.repo},
		{"git", "-C", in.repo, "init", "-q"},
		{"git", "-C", in.repo, "add", "-A"},
		{"git", "-C", in.repo, "-c", "user.name=bench", "-c", "user.email=bench@example.org", "commit", "-q", "-m", "tree"},
	} {
		if out, err := program(ctx, args...).CombinedOutput(); err != nil {
			fmt.Printf("# no source tree to clone: %s: %v: %s\n", args[0], err, out)
			in.repo = ""
			break
		}
	}
	in.renew()
	return in, nil
}

// renew makes the random bytes new.
func (in *input) renew() {
	_, _ = in.rng.Read(in.random) // never fails
}

func writeTar(path, dir string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	return errors.Join(w.AddFS(os.DirFS(dir).(fs.ReadDirFS)), w.Close(), f.Close())
}

// program is a command that no setting of the user changes.
func program(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
	return cmd
}
