// Command defs makes, mounts, watches and recovers volumes, and runs storage
// nodes. See `defs --help`.
package main

import (
	"os"

	"github.com/defs-fs/defs/cmd/internal/command"
)

func main() { os.Exit(command.Defs(os.Args[1:], command.OS())) }
