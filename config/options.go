// Package config holds the settings of every DeFS program: one struct, filled
// from the configuration files (TOML), the environment (DEFS_*), mount options
// (-o) and flags, each overriding the ones before it.
//
//	config.AddFlags(cmd.Flags(), "data", "peers")
//	o, err := config.Load(config.Sources{Files: files, Environ: os.Environ(), Flags: cmd.Flags()})
//
// A setting has the same name everywhere: journal-max in a file is
// DEFS_JOURNAL_MAX in the environment and --journal-max as a flag.
//
// The package starts no goroutine and keeps no state.
package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/defs-fs/defs/erasure"
)

// Size is a number of bytes, written as 4GiB or 500MB.
type Size int64

// UnmarshalText reads a size with an optional unit.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := humanize.ParseBytes(string(text))
	if err != nil || n > 1<<62 {
		return fmt.Errorf("%q is no size: write it as 500MB or 4GiB", text)
	}
	*s = Size(n)
	return nil
}

// String writes the size with a binary unit.
func (s Size) String() string { return humanize.IBytes(uint64(max(s, 0))) }

// Options are all settings. A zero value means the default of the part that
// uses it.
type Options struct {
	Data   string `koanf:"data" usage:"directory of all state of one volume or node"`
	Volume string `koanf:"volume" usage:"volume to use: a name, or the path of its directory"`

	Policy string   `koanf:"policy" usage:"how files are spread: auto, or MODE:K+M,mirror=auto|on|off (4+2 alone is rs-ratio:4+2)"`
	Listen []string `koanf:"listen" usage:"multiaddrs to listen on"`
	Peers  []string `koanf:"peers" usage:"multiaddrs of peers to ask first; @FILE reads them from a file"`

	Host     string `koanf:"host" usage:"label of the machine, a failure domain"`
	Zone     string `koanf:"zone" usage:"label of the place, a failure domain"`
	Capacity Size   `koanf:"capacity" usage:"bytes that the node stores for others (default: what its disk has free, less a twentieth)"`

	BackgroundRate Size          `koanf:"background-rate" usage:"most bytes per second that the node moves for repair, mirrors, moves and scrubbing (default 16MiB)"`
	ScrubEvery     time.Duration `koanf:"scrub-every" usage:"time in which the node reads every shard again once (default 168h)"`

	JournalMax Size `koanf:"journal-max" usage:"most bytes that wait on this disk for the peers"`
	CacheMax   Size `koanf:"cache-max" usage:"most bytes kept on this disk although the peers have them"`
	MemoryMax  Size `koanf:"memory-max" usage:"memory at which the garbage collector works harder"`

	SuspectAfter time.Duration `koanf:"suspect-after" usage:"silence after which a peer is read around (default 30s)"`
	DeadAfter    time.Duration `koanf:"dead-after" usage:"silence after which a peer's shards are made anew elsewhere (default 1h)"`
	CopyAfter    time.Duration `koanf:"copy-after" usage:"silence after which a partner's shards are copied (default 5m)"`
	DialTimeout  time.Duration `koanf:"dial-timeout" usage:"longest wait for a connection"`

	ReadOnly   bool `koanf:"read-only" usage:"refuse every change"`
	AllowOther bool `koanf:"allow-other" usage:"let other users in"`
	NoAtime    bool `koanf:"noatime" usage:"record no access times"`
	NoSuid     bool `koanf:"nosuid" usage:"ignore set-user-ID bits"`
	NoDev      bool `koanf:"nodev" usage:"ignore device nodes"`
	NoExec     bool `koanf:"noexec" usage:"run no programs from the mount"`

	Fsync string `koanf:"fsync" usage:"when fsync returns: journal, flushed to this disk; or recoverable, taken by the peers too"`

	LogLevel string `koanf:"log-level" usage:"debug, info, warn or error"`
}

// EnsureDefaults fills what has a default that no other part knows.
func (o *Options) EnsureDefaults() {
	if o.Policy == "" {
		o.Policy = string(erasure.ModeAuto)
	}
	if o.MemoryMax == 0 {
		o.MemoryMax = 220 << 20
	}
	if o.LogLevel == "" {
		o.LogLevel = "info"
	}
}

// Validate reports every violation at once.
func (o *Options) Validate() error {
	var errs []error
	wrong := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %w", key, fmt.Errorf(format, args...)))
	}
	if _, err := erasure.ParsePolicy(o.Policy); err != nil {
		wrong("policy", "%w", err)
	}
	for _, a := range o.Listen {
		if !isAddr(a) {
			wrong("listen", "%q is no multiaddr: write it as /ip4/0.0.0.0/tcp/4001", a)
		}
	}
	for _, a := range o.Peers {
		if !strings.HasPrefix(a, "@") && (!isAddr(a) || !strings.Contains(a, "/p2p/")) {
			wrong("peers", "%q is no peer: write it as /ip4/192.0.2.1/tcp/4001/p2p/ID, or @FILE", a)
		}
	}
	for key, n := range map[string]Size{"capacity": o.Capacity, "journal-max": o.JournalMax, "cache-max": o.CacheMax, "background-rate": o.BackgroundRate, "memory-max": o.MemoryMax} {
		if n < 0 {
			wrong(key, "%d is negative", n)
		}
	}
	if o.JournalMax > 0 && o.JournalMax < 128<<20 {
		wrong("journal-max", "%s is too little: use at least 128MiB", o.JournalMax)
	}
	if o.MemoryMax > 0 && o.MemoryMax < 64<<20 {
		wrong("memory-max", "%s is too little: use at least 64MiB", o.MemoryMax)
	}
	for key, d := range map[string]time.Duration{
		"suspect-after": o.SuspectAfter, "dead-after": o.DeadAfter, "copy-after": o.CopyAfter, "dial-timeout": o.DialTimeout,
		"scrub-every": o.ScrubEvery,
	} {
		if d < 0 {
			wrong(key, "%s is negative", d)
		}
	}
	if o.SuspectAfter > 0 && o.DeadAfter > 0 && o.DeadAfter < o.SuspectAfter {
		wrong("dead-after", "%s is shorter than suspect-after, %s", o.DeadAfter, o.SuspectAfter)
	}
	if o.Fsync != "" && o.Fsync != "journal" && o.Fsync != "recoverable" {
		wrong("fsync", "%q is unknown: use journal or recoverable", o.Fsync)
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.LogLevel)); err != nil {
		wrong("log-level", "%q is unknown: use debug, info, warn or error", o.LogLevel)
	}
	if o.Data != "" && o.Volume != "" && o.Volume != filepath.Base(o.Volume) {
		wrong("volume", "%q is a path, and data is given too: give one of them", o.Volume)
	}
	return errors.Join(errs...)
}

// HeartbeatInterval is how often peers say that they are there, so that a few
// may get lost before one is suspected. Zero is the default.
func (o *Options) HeartbeatInterval() time.Duration {
	return min(o.SuspectAfter/3, 10*time.Second)
}

// MirrorInterval is how often partners are looked at. Zero is the default.
func (o *Options) MirrorInterval() time.Duration {
	return min(o.CopyAfter/4, 30*time.Second)
}

// isAddr checks the shape of a multiaddr; what opens the address checks the rest.
func isAddr(a string) bool {
	parts := strings.Split(a, "/")
	if len(parts) < 5 || parts[0] != "" {
		return false
	}
	switch parts[1] {
	case "ip4", "ip6":
		_, err := netip.ParseAddr(parts[2])
		return err == nil
	case "dns", "dns4", "dns6", "dnsaddr":
		return parts[2] != ""
	}
	return false
}
