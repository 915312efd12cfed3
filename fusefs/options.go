package fusefs

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/defs-fs/defs/volume"
)

// Options says what to mount, where and how.
type Options struct {
	Volume     *volume.Volume
	Mountpoint string // an existing directory

	ReadOnly   bool // refuse every change
	AllowOther bool // let other users in; permission bits still apply
	NoAtime    bool // show the mount as noatime; volume.Options.NoAtime stops the recording
	NoSuid     bool // ignore set-user-ID and set-group-ID bits (always so for mounts by an ordinary user)
	NoDev      bool // ignore device nodes (always so for mounts by an ordinary user)
	NoExec     bool // run no programs from the mount

	FsName       string // the mount's source as df shows it; default "defs"
	ReadAheadKiB int    // how far the kernel reads ahead of a sequential reader; default 1024; only root can set it

	Logger *slog.Logger
}

// EnsureDefaults fills what was left empty.
func (o *Options) EnsureDefaults() {
	if o.FsName == "" {
		o.FsName = "defs"
	}
	if o.ReadAheadKiB == 0 {
		o.ReadAheadKiB = 1024
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports everything that is wrong with the options.
func (o *Options) Validate() error {
	var errs []error
	if !filepath.IsAbs(o.Mountpoint) {
		errs = append(errs, fmt.Errorf("mountpoint %q: give an absolute path", o.Mountpoint))
	}
	if o.ReadAheadKiB < 0 || o.ReadAheadKiB > 64<<10 {
		errs = append(errs, fmt.Errorf("read-ahead of %d KiB: use 1 to 65536", o.ReadAheadKiB))
	}
	return errors.Join(errs...)
}
