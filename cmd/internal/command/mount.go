package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/fusefs"
	"github.com/defs-fs/defs/volume"
)

const (
	mountTimeout = 30 * time.Second // until the kernel has the mount
	busyTimeout  = 10 * time.Second // for programs to leave, after a signal
	procsPerCore = 2
)

// mounting is everything that a mount needs to know.
type mounting struct {
	options    config.Options
	dir        string // of the volume
	source     string // as df shows it
	mountpoint string
}

func (a *app) mountCommand(use string, argsMin int) *cobra.Command {
	var optionLists []string
	var detach bool
	cmd := &cobra.Command{
		Use:   use,
		Short: "Show a volume as a folder",
		Long: `Show a volume as a folder, until it is unmounted or a signal ends it. -o takes the
options of mount(8) and every setting: -o ro,noatime,data=DIR,peers=@FILE.
Installed as /sbin/mount.fuse.defs it serves fstab:

    /home/me/.local/share/defs/volumes/home  /home/me/DeFS  fuse.defs  noauto,user,allow_other  0 0

There the volume is given as a directory: mount(8) may take a name for a path.`,
		Args: args(argsMin, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var name string
			if len(args) == 2 {
				name = args[0]
			}
			m, err := a.mounting(cmd, name, args[len(args)-1], strings.Join(optionLists, ","))
			if err != nil {
				return err
			}
			if isDaemon() {
				return a.mount(cmd.Context(), m)
			}
			if entries, err := os.ReadDir(m.mountpoint); err == nil && len(entries) > 0 {
				fmt.Fprintf(a.Err, "%s is not empty: what is in it is hidden while the volume is mounted there.\n", m.mountpoint)
			}
			if !detach {
				return a.mount(cmd.Context(), m)
			}
			if err := a.detach(m); err != nil {
				return err
			}
			return a.print(struct {
				Schema     int    `json:"schema"`
				Volume     string `json:"volume"`
				Mountpoint string `json:"mountpoint"`
			}{control.Schema, m.source, m.mountpoint}, func(io.Writer) {})
		},
	}
	cmd.Flags().StringArrayVarP(&optionLists, "options", "o", nil, "mount options, separated by commas")
	cmd.Flags().BoolVar(&detach, "daemon", false, "return when the mount answers, and serve it in the background")
	config.AddFlags(cmd.Flags(), append(openFlags, "read-only", "allow-other", "noatime", "fsync", "memory-max")...)
	return cmd
}

func (a *app) mounting(cmd *cobra.Command, name, mountpoint, optionList string) (m mounting, err error) {
	mount, err := config.ParseMountOptions(optionList)
	if err != nil {
		return m, usage("%w", err)
	}
	m.source = name
	_, hasData := mount["data"]
	if data := cmd.Flag("data"); data != nil {
		hasData = hasData || data.Changed
	}
	if name != "" && !hasData {
		mount["volume"] = name
	}
	var find error
	if m.options, m.dir, find, err = a.options(cmd, mount); err != nil {
		return m, err
	}
	if find != nil {
		return m, &exitError{exitNoVolume, find}
	}
	if _, err := volume.LoadDevice(m.dir); err != nil {
		return m, err
	}
	if filepath.Dir(m.dir) != config.VolumesDir() {
		m.source = m.dir // `defs umount` finds the volume by it
	} else {
		m.source = filepath.Base(m.dir)
	}
	m.mountpoint, err = usableMountpoint(mountpoint, m.dir)
	if err != nil {
		return m, &exitError{exitMountpoint, err}
	}
	if at := mountedAt(cmd.Context(), m.dir); at != "" {
		return m, &exitError{exitMountpoint, fmt.Errorf("%s is mounted at %s already: unmount it first", m.source, at)}
	}
	return m, nil
}

// mountedAt returns where another process shows the volume in dir; "" where
// none does, or one that is just ending.
func mountedAt(ctx context.Context, dir string) string {
	ctx, cancel := context.WithTimeout(ctx, mountAnswerTimeout)
	defer cancel()
	client, err := control.Dial(ctx, dir)
	if err != nil {
		return ""
	}
	defer client.Close()
	st, err := client.Status(ctx)
	if err != nil || !st.Mounted {
		return ""
	}
	if _, err := mountAt(st.Mountpoint); err != nil {
		return ""
	}
	return st.Mountpoint
}

// usableMountpoint returns the absolute path of a directory on which the volume
// in dir can be mounted.
func usableMountpoint(path, dir string) (string, error) {
	if _, err := fusefs.CleanStale(path); err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("mountpoint: %w", err)
	}
	if !info.IsDir() {
		return "", fmt.Errorf("mountpoint %s is not a directory", path)
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", err
	}
	mounts, err := fusefs.Mounts()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.Mountpoint == path {
			return "", fmt.Errorf("%s is mounted at %s already", m.Source, path)
		}
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", err
	}
	if rel, err := filepath.Rel(path, dir); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
		return "", fmt.Errorf("mountpoint %s contains the volume's own directory %s: use another one", path, dir)
	}
	return path, nil
}

// mount shows the volume until it is unmounted or ctx ends.
func (a *app) mount(ctx context.Context, m mounting) (err error) {
	syscall.Umask(0o077) // local files are the user's own; the kernel applies each program's umask to the mount
	setMemoryLimit(m.options, 1)
	setProcs()
	log := logger(m.options, a.Err)
	options, err := clientOptions(m.options, m.dir)
	if err != nil {
		return err
	}
	options.Logger = log
	client, err := openWhenFree(ctx, options)
	if err != nil {
		return err
	}
	var served error // why the kernel may still send requests
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		if served != nil {
			// As when the process is killed, only that nothing waits for a flush.
			log.Warn("the volume is flushed, but not closed", "cause", served)
			err = errors.Join(err, client.Volume().Sync(ctx))
			return
		}
		err = errors.Join(err, client.Close(ctx))
		log.Info("closed")
	}()
	mountCtx, cancel := context.WithTimeout(ctx, mountTimeout)
	defer cancel()
	o := m.options
	server, err := fusefs.Mount(mountCtx, fusefs.Options{
		Volume: client.Volume(), Mountpoint: m.mountpoint, FsName: m.source,
		ReadOnly: o.ReadOnly, AllowOther: o.AllowOther, NoAtime: o.NoAtime, NoSuid: o.NoSuid, NoDev: o.NoDev, NoExec: o.NoExec,
		Logger: log,
	})
	if err != nil {
		for _, e := range []exam{examFuse(), examHelper()} {
			if e.Result == examFailed {
				return fmt.Errorf("%w: %s", err, e.Detail)
			}
		}
		return fmt.Errorf("%w (`defs doctor` tells what this machine may lack)", err)
	}
	mount := servedMount{server, m.mountpoint}
	socket, err := control.Serve(m.dir, client, mount)
	if err != nil {
		return errors.Join(err, server.Unmount())
	}
	log.Info("mounted", "pid", os.Getpid())
	daemon.SdNotify(false, daemon.SdNotifyReady)
	if a.parent != nil {
		a.tellParent(daemonReady)
	} else {
		fmt.Fprintf(a.Err, "%s is mounted at %s. Ctrl-C unmounts it.\n", m.source, m.mountpoint)
	}
	select {
	case <-server.Done():
	case <-ctx.Done():
		err = mount.leave(log)
	}
	if served = err; served == nil {
		served = server.Wait()
	}
	daemon.SdNotify(false, daemon.SdNotifyStopping)
	return errors.Join(err, socket.Close())
}

// servedMount is a mount as the control socket sees it.
type servedMount struct {
	*fusefs.Server
	mountpoint string
}

func (s servedMount) Mountpoint() string { return s.mountpoint }

// leave unmounts. Programs that are still in the mount get a moment to go;
// then it is detached, and they get errors.
func (s servedMount) leave(log *slog.Logger) error {
	for deadline := time.Now().Add(busyTimeout); time.Now().Before(deadline); {
		err := s.Unmount()
		select {
		case <-s.Done():
			return err
		default: // busy
		}
	}
	log.Warn("programs are still using the mount: they are cut off")
	return s.Detach()
}

// setMemoryLimit keeps the process near the wanted size: the collector works
// harder rather than letting it grow. count is how many share the process.
func setMemoryLimit(o config.Options, count int) {
	limit := int64(o.MemoryMax)
	if count > 1 {
		limit = max(limit, int64(count)*(100<<20))
	}
	debug.SetMemoryLimit(limit)
	if _, set := os.LookupEnv("GOGC"); !set && count == 1 {
		debug.SetGCPercent(60)
	}
}

// setProcs lets more goroutines run than there are cores. One that waits in a
// system call, for the kernel's next request or for the journal's file, counts
// as running until the scheduler notices; the next request must not wait for
// that.
func setProcs() {
	if _, set := os.LookupEnv("GOMAXPROCS"); !set {
		runtime.GOMAXPROCS(procsPerCore * runtime.GOMAXPROCS(0))
	}
}
