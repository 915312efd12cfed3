package powercut_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/defs-fs/defs/internal/powercut"
)

// A cut loses what was not flushed and keeps what was, again and again.
func TestCut(t *testing.T) {
	for _, filesystem := range powercut.Filesystems {
		t.Run(filesystem, func(t *testing.T) {
			disk := powercut.New(t, filesystem)
			path := filepath.Join(disk.Dir, "file")
			for round := range 3 {
				f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
				if err != nil {
					t.Fatal(err)
				}
				write := func(text string) {
					t.Helper()
					if _, err := f.WriteString(text); err != nil {
						t.Fatal(err)
					}
				}
				write("synced")
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
				write("not synced")
				if err := os.WriteFile(filepath.Join(disk.Dir, "name not synced"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				disk.Cut()
				if _, err := f.WriteString("after the cut"); err == nil {
					t.Error("a write succeeds after the cut")
				}
				f.Close()
				disk.Restore()
				if b, err := os.ReadFile(path); err != nil || len(b) != (round+1)*len("synced") {
					t.Errorf("round %d: %q, %v", round, b, err)
				}
				if _, err := os.Stat(filepath.Join(disk.Dir, "name not synced")); !os.IsNotExist(err) {
					t.Errorf("round %d: a name that was not synced: %v", round, err)
				}
			}
		})
	}
}
