package metastore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cockroachdb/errors/oserror"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// The anchor file holds a position that the state on disk once had reached.
// Without it, a manifest that lost its end would pass for an older state.

const (
	anchorName    = "anchor"
	anchorVersion = 1
)

func readAnchor(fs *sealedFS, dir string) (uint64, error) {
	f, err := fs.Open(fs.PathJoin(dir, anchorName))
	if oserror.IsNotExist(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read anchor: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, 64))
	if err = errors.Join(err, f.Close()); err != nil {
		return 0, fmt.Errorf("read anchor: %w", err)
	}
	d := decoder{b: b}
	d.require(d.u8() == anchorVersion)
	seq := d.u64()
	return seq, d.end("anchor")
}

// writeAnchor replaces the anchor atomically and durably.
func writeAnchor(fs *sealedFS, dir string, seq uint64) error {
	name := fs.PathJoin(dir, anchorName)
	f, err := fs.Create(name+".new", vfs.WriteCategoryUnspecified)
	if err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	_, err = f.Write(binary.BigEndian.AppendUint64([]byte{anchorVersion}, seq))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	if err := fs.Rename(name+".new", name); err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	d, err := fs.OpenDir(dir)
	if err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	err = d.Sync()
	if err = errors.Join(err, d.Close(), fs.state.error()); err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	return nil
}
