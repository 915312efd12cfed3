// Command defs-mount shows a volume as a folder. Installed, or linked, as
// mount.fuse.defs it is the helper that mount(8) and fstab(5) use.
package main

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/defs-fs/defs/cmd/internal/command"
)

func main() {
	helper := strings.HasPrefix(filepath.Base(os.Args[0]), "mount.")
	os.Exit(command.Mount(os.Args[1:], command.OS(), helper))
}
