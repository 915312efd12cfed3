package fusefs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

// TestPosix runs go-fuse's suite, each test in a directory of its own, in both permission modes.
func TestPosix(t *testing.T) {
	for mode, change := range map[string]func(*Options){"root only": func(*Options) {}, "for others": forOthers} {
		t.Run(mode, func(t *testing.T) {
			mnt := mount(t, change)
			for name, test := range posixtest.All {
				if name == "FcntlFlockLocksFile" {
					continue // wants a process to conflict with its own POSIX lock, which no kernel does
				}
				t.Run(name, func(t *testing.T) {
					dir := filepath.Join(mnt, name)
					must(t, os.Mkdir(dir, 0o755))
					test(t, dir)
				})
			}
		})
	}
}
