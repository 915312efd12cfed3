package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/adrg/xdg"
	"github.com/spf13/pflag"
)

const peer = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWGRUGh"

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLaterSourcesOverrideEarlier(t *testing.T) {
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	AddFlags(flags, "cache-max", "peers", "noatime")
	flags.String("format", "", "of the command itself")
	if err := flags.Parse([]string{"--cache-max", "5GiB", "--peers", peer, "--format", "x"}); err != nil {
		t.Fatal(err)
	}
	mount, err := ParseMountOptions("rw,noatime,journal-max=4GiB,cache-max=4GiB,x-systemd.automount,peers=@a,peers=@b")
	if err != nil {
		t.Fatal(err)
	}
	o, err := Load(Sources{
		Files: []string{
			filepath.Join(t.TempDir(), "missing.toml"),
			write(t, "volume = 'home'\nsuspect-after = '2s'\njournal-max = 1048576\ncapacity = '1GiB'\nread-only = true\n"),
			write(t, "capacity = '2GiB'\nlisten = ['/ip4/127.0.0.1/tcp/0', '/ip6/::1/tcp/0']"),
		},
		Environ: []string{"DEFS_CAPACITY=3GiB", "DEFS_JOURNAL_MAX=3GiB", "DEFS_CACHE_MAX=3GiB", "HOME=/x", "DEFS_ZONE="},
		Mount:   mount,
		Flags:   flags,
	})
	if err != nil {
		t.Fatal(err)
	}
	if o.Volume != "home" || o.SuspectAfter != 2*time.Second || o.Capacity != 3<<30 || o.JournalMax != 4<<30 || o.CacheMax != 5<<30 {
		t.Errorf("wrong order: %+v", o)
	}
	if !o.NoAtime || !o.ReadOnly || !slices.Equal(o.Peers, []string{peer}) || len(o.Listen) != 2 {
		t.Errorf("wrong values: %+v", o)
	}
	if o.Policy != "auto" || o.LogLevel != "info" || o.HeartbeatInterval() >= o.SuspectAfter {
		t.Errorf("wrong defaults: %+v", o)
	}
}

func TestMountListsAccumulate(t *testing.T) {
	mount, err := ParseMountOptions("peers=@a,peers=@b")
	if err != nil {
		t.Fatal(err)
	}
	o, err := Load(Sources{Mount: mount})
	if err != nil || !slices.Equal(o.Peers, []string{"@a", "@b"}) {
		t.Fatalf("peers %q, error %v", o.Peers, err)
	}
}

func TestLoadListsEveryViolation(t *testing.T) {
	_, err := Load(Sources{
		Files:   []string{write(t, "jurnal-max = '1GiB'\npolicy = '0+0'\ncapacity = 'much'\nsuspect-after = 'soon'\nlisten = ['here']\n")},
		Environ: []string{"DEFS_PEERZ=x", "DEFS_LOG_LEVEL=loud", "DEFS_MEMORY_MAX=1KiB", "DEFS_JOURNAL_MAX=1MiB"},
	})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		`unknown setting "jurnal-max" (did you mean "journal-max"?)`, `unknown setting "peerz" (did you mean "peers"?)`,
		"policy: ", "capacity: much", "suspect-after: soon", `listen: "here"`, `log-level: "loud"`, "memory-max: 1.0 KiB", "journal-max: 1.0 MiB",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %q in:\n%v", want, err)
		}
	}
}

func TestLoadSaysWhereTOMLIsWrong(t *testing.T) {
	path := write(t, "volume = 'a'\npeers = [\n")
	_, err := Load(Sources{Files: []string{path}})
	if err == nil || !strings.Contains(err.Error(), path+":") {
		t.Fatalf("error %v", err)
	}
}

func TestParseMountOptionsSuggests(t *testing.T) {
	_, err := ParseMountOptions("noatme,alow_other,ro,zzzzzzzz")
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{`"noatme" (did you mean "noatime"?)`, `"alow_other" (did you mean "allow_other"?)`, `unknown mount option "zzzzzzzz"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %q in:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), `"ro"`) || strings.Contains(err.Error(), "zzzzzzzz\" (did") {
		t.Errorf("wrong complaint: %v", err)
	}
}

func TestVolumeDirTakesTheOnlyVolume(t *testing.T) {
	home := xdg.DataHome
	t.Cleanup(func() { xdg.DataHome = home })
	xdg.DataHome = t.TempDir()
	volume := func(name string) string { return filepath.Join(VolumesDir(), name) }
	var o Options
	if _, err := o.VolumeDir(); !errors.Is(err, ErrNoVolume) {
		t.Errorf("without any: %v", err)
	}
	for _, name := range []string{"cut-short", "home"} {
		if err := os.MkdirAll(volume(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.VolumeDir(); !errors.Is(err, ErrNoVolume) {
		t.Errorf("of directories alone: %v", err)
	}
	if err := os.WriteFile(filepath.Join(volume("home"), deviceFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if dir, err := o.VolumeDir(); err != nil || dir != volume("home") {
		t.Errorf("%q, %v", dir, err)
	}
}

func TestVolumeDir(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{Data: "/a/b"}, "/a/b"},
		{Options{Volume: "/a/b"}, "/a/b"},
		{Options{Volume: "home"}, filepath.Join(VolumesDir(), "home")},
	} {
		if dir, err := c.o.VolumeDir(); err != nil || dir != c.want {
			t.Errorf("%+v: %q, %v; want %q", c.o, dir, err, c.want)
		}
	}
}
