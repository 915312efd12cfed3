package defs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/defs-fs/defs/p2p"
)

// peersFile lists, one per line, multiaddrs of members to ask first.
const peersFile = "peers"

// peersMax bounds a list of peers.
const peersMax = 256

// addPeers adds addresses to the directory's list of peers.
func addPeers(dir string, addrs []string) error {
	old, err := knownPeers(dir)
	if err != nil {
		return err
	}
	all := joinPeers(addrs, old)
	if len(all) == len(old) {
		return nil
	}
	return p2p.WriteFile(filepath.Join(dir, peersFile), []byte(strings.Join(all, "\n")+"\n"))
}

// knownPeers reads the directory's list of peers; a missing file is empty.
func knownPeers(dir string) ([]string, error) {
	addrs, err := ReadPeers(filepath.Join(dir, peersFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return addrs, err
}

// ReadPeers reads a file of multiaddrs, one per line, such as the file "addrs"
// of a storage node. It takes the first 256.
func ReadPeers(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read peers: %w", err)
	}
	defer f.Close()
	var addrs []string
	lines := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for lines.Scan() && len(addrs) < peersMax {
		if line := strings.TrimSpace(lines.Text()); line != "" && !strings.HasPrefix(line, "#") {
			addrs = append(addrs, line)
		}
	}
	return addrs, lines.Err()
}

// joinPeers appends lists, without repetitions, up to the bound.
func joinPeers(lists ...[]string) []string {
	var all []string
	for _, list := range lists {
		for _, a := range list {
			if len(all) < peersMax && !slices.Contains(all, a) {
				all = append(all, a)
			}
		}
	}
	return all
}
