package config

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// FuzzFile reads what somebody may have written into a configuration file.
func FuzzFile(f *testing.F) {
	f.Add([]byte("policy = \"4+2\"\njournal-max = \"4GiB\"\npeers = [\"@/a\", \"/ip4/192.0.2.1/tcp/1\"]\nsuspect-after = \"30s\"\n"))
	f.Add([]byte("journal-max = 5\n[peers]\na = 1\n"))
	f.Add([]byte("no-such-setting = 1979-05-27T07:32:00Z\nlisten = [[1], {a = 1}]\n"))
	path := filepath.Join(f.TempDir(), "config.toml")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		o, err := Load(Sources{Files: []string{path}})
		if err != nil {
			return
		}
		if err := o.Validate(); err != nil {
			t.Fatalf("taken, but not valid: %v", err)
		}
	})
}

// FuzzMountOptions reads what fstab may say.
func FuzzMountOptions(f *testing.F) {
	f.Add("ro,noatime,allow_other,data=/a,peers=@/b,peers=@/c,x-systemd.automount")
	f.Add("remount,rw")
	f.Add("journal-max=18446744073709551615EiB,=,,capacity=-1")
	f.Fuzz(func(t *testing.T, text string) {
		mount, err := ParseMountOptions(text)
		if err != nil {
			return
		}
		for name := range mount {
			if !slices.Contains(Keys(), name) {
				t.Fatalf("%q is no setting", name)
			}
		}
		if o, err := Load(Sources{Mount: mount}); err == nil {
			if err := o.Validate(); err != nil {
				t.Fatalf("taken, but not valid: %v", err)
			}
		}
	})
}
