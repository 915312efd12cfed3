package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/adrg/xdg"
)

// Errors about the volume that is meant.
var (
	ErrNoVolume   = errors.New("there is no volume yet: make one with `defs init NAME`")
	ErrManyVolume = errors.New("there are several volumes: name one with --volume")
)

// fileName is the configuration file of a program's user, and of a directory.
const fileName = "config.toml"

// deviceFile is written last when a volume is made: without it there is none.
const deviceFile = "device.json"

// Files lists the configuration files: the user's, and that of the volume or
// node in dir, unless dir is empty.
func Files(dir string) []string {
	files := []string{filepath.Join(xdg.ConfigHome, "defs", fileName)}
	if dir != "" {
		files = append(files, filepath.Join(dir, fileName))
	}
	return files
}

// VolumesDir is where volumes are kept that have no directory of their own.
func VolumesDir() string { return filepath.Join(xdg.DataHome, "defs", "volumes") }

// NodeDir is where a storage node keeps its state by default.
func NodeDir() string { return filepath.Join(xdg.DataHome, "defs", "node") }

// VolumeDir says which directory is meant: Data, or Volume as a path, or the
// volume of that name, or, when nothing is named, the only one there is.
func (o *Options) VolumeDir() (string, error) {
	switch {
	case o.Data != "":
		return filepath.Abs(o.Data)
	case strings.ContainsRune(o.Volume, filepath.Separator) || o.Volume == "." || o.Volume == "..":
		return filepath.Abs(o.Volume)
	case o.Volume != "":
		return filepath.Join(VolumesDir(), o.Volume), nil
	}
	entries, err := os.ReadDir(VolumesDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	var names []string
	for _, e := range entries {
		// What an init or a recovery that was cut short has left is no volume.
		if _, err := os.Stat(filepath.Join(VolumesDir(), e.Name(), deviceFile)); err == nil {
			names = append(names, e.Name())
		}
	}
	switch len(names) {
	case 0:
		return "", ErrNoVolume
	case 1:
		return filepath.Join(VolumesDir(), names[0]), nil
	}
	return "", fmt.Errorf("%w; there are %s", ErrManyVolume, strings.Join(names, ", "))
}
