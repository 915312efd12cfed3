package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/fusefs"
	"github.com/defs-fs/defs/volume"
)

// Results of an examination.
const (
	examFine   = "ok"
	examFixed  = "fixed"
	examWarn   = "warning"
	examFailed = "failed"
)

const (
	diskFreeBytesMin = 1 << 30
	openFilesMin     = 1024
	reachTimeout     = 10 * time.Second

	mountAnswerTimeout = 3 * time.Second
)

// exam is one thing that a doctor looks at.
type exam struct {
	Name   string `json:"name"`
	Result string `json:"result"`
	Detail string `json:"detail"` // what it is, and what to do about it
}

func (a *app) doctorCommand() *cobra.Command {
	var fix bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what keeps DeFS from working on this machine",
		Long: `Look for what keeps DeFS from working on this machine: the kernel's part, mounts
whose process has ended, the clock, limits, the disk, the peers. Where a volume is
named (--data, --volume), only its mounts are looked at, else all of this machine.`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, dir, err := a.volume(cmd)
			only := ""
			if cmd.Flag("data").Changed || cmd.Flag("volume").Changed {
				only = dir
			}
			exams := []exam{examFuse(), examHelper(), examMounts(only, fix), examClock(), examFiles()}
			if err == nil {
				_, err = volume.LoadDevice(dir)
			}
			switch code := exitCode(err); {
			case code == exitNoVolume:
				exams = append(exams, exam{"volume", examWarn, err.Error()})
			case code == exitUsage:
				exams = append(exams, exam{"settings", examFailed, err.Error()})
			case err != nil:
				exams = append(exams, exam{"volume", examFailed, err.Error()})
			default:
				exams = append(exams, examDisk(dir), a.examReach(cmd))
			}
			failed := false
			for _, e := range exams {
				failed = failed || e.Result == examFailed
			}
			if err := a.print(struct {
				Schema int    `json:"schema"`
				Exams  []exam `json:"exams"`
			}{control.Schema, exams}, func(w io.Writer) {
				for _, e := range exams {
					fmt.Fprintf(w, "%-8s %-10s %s\n", e.Result, e.Name, e.Detail)
				}
			}); err != nil || !failed {
				return err
			}
			return silentError(exitFailed)
		},
	}
	config.AddFlags(cmd.Flags(), openFlags...)
	cmd.Flags().BoolVar(&fix, "fix", false, "repair what can be repaired without asking: detach dead mounts")
	return cmd
}

func examFuse() exam {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		what := "load the kernel module (modprobe fuse), or give the container the device"
		if errors.Is(err, os.ErrPermission) {
			what = "let every user open it (chmod 666 /dev/fuse), as udev does"
		}
		return exam{"fuse", examFailed, fmt.Sprintf("%v: %s", err, what)}
	}
	f.Close()
	return exam{"fuse", examFine, "/dev/fuse can be opened"}
}

func examHelper() exam {
	path, err := exec.LookPath("fusermount3")
	switch {
	case err == nil:
		return exam{"helper", examFine, path}
	case os.Geteuid() == 0:
		return exam{"helper", examWarn, "fusermount3 is not installed: only root can mount (apt install fuse3)"}
	}
	return exam{"helper", examFailed, "fusermount3 is not installed (apt install fuse3)"}
}

// examMounts looks at the mounts of the volume in only, or at all for "".
func examMounts(only string, fix bool) exam {
	mounts, err := fusefs.Mounts()
	if err != nil {
		return exam{"mounts", examFailed, err.Error()}
	}
	if only != "" {
		mounts = slices.DeleteFunc(mounts, func(m fusefs.Mounted) bool { return volumeDir(m) != only })
	}
	var dead, silent, fixed int
	for _, m := range mounts {
		err := statfs(m.Mountpoint)
		if errors.Is(err, context.DeadlineExceeded) {
			silent++
		}
		if !errors.Is(err, unix.ENOTCONN) {
			continue
		}
		dead++
		if fix {
			if cleaned, err := fusefs.CleanStale(m.Mountpoint); err != nil {
				return exam{"mounts", examFailed, err.Error()}
			} else if cleaned {
				fixed++
			}
		}
	}
	switch {
	case dead > fixed:
		return exam{"mounts", examFailed, fmt.Sprintf("%d of %d are dead: their process has ended; --fix detaches them", dead-fixed, len(mounts))}
	case silent > 0:
		return exam{"mounts", examFailed, fmt.Sprintf("%d of %d do not answer: their process is stopped or very busy", silent, len(mounts))}
	case fixed > 0:
		return exam{"mounts", examFixed, fmt.Sprintf("%d dead ones detached", fixed)}
	}
	return exam{"mounts", examFine, fmt.Sprintf("%d, none dead", len(mounts))}
}

// statfs asks a mount for its figures. One whose process is stopped never
// answers, and the goroutine that asked ends with this process.
func statfs(path string) error {
	answer := make(chan error, 1)
	go func() {
		var st unix.Statfs_t
		answer <- unix.Statfs(path, &st)
	}()
	select {
	case err := <-answer:
		return err
	case <-time.After(mountAnswerTimeout):
		return context.DeadlineExceeded
	}
}

// examClock asks the kernel whether something keeps the clock right
// (adjtimex(2)). Certificates and signatures have times in them.
func examClock() exam {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case err != nil:
		return exam{"clock", examWarn, err.Error()}
	case time.Now().Year() < 2025:
		return exam{"clock", examFailed, "it is in the past: set it"}
	case state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0:
		return exam{"clock", examWarn, "nothing keeps it right: install a time service such as systemd-timesyncd"}
	}
	return exam{"clock", examFine, "synchronised"}
}

func examFiles() exam {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return exam{"files", examWarn, err.Error()}
	}
	if limit.Max < openFilesMin {
		return exam{"files", examWarn, fmt.Sprintf("at most %d can be open: raise the limit to %d (ulimit -n)", limit.Max, openFilesMin)}
	}
	return exam{"files", examFine, fmt.Sprintf("up to %d open", limit.Max)}
}

func examDisk(dir string) exam {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return exam{"disk", examFailed, err.Error()}
	}
	free := int64(st.Bavail) * st.Bsize
	if free < diskFreeBytesMin {
		return exam{"disk", examFailed, fmt.Sprintf("%s free: what is written waits there for the peers; `defs cache drop` frees what they have", size(free))}
	}
	return exam{"disk", examFine, size(free) + " free"}
}

func (a *app) examReach(cmd *cobra.Command) exam {
	s, err := a.connect(cmd)
	if err != nil {
		return exam{"peers", examFailed, err.Error()}
	}
	defer func() {
		if err := s.close(); err != nil {
			fmt.Fprintf(a.Err, "close the volume: %v\n", err)
		}
	}()
	ctx, cancel := context.WithTimeout(cmd.Context(), reachTimeout)
	defer cancel()
	st, err := s.Status(ctx)
	switch {
	case err != nil:
		return exam{"peers", examFailed, err.Error()}
	case st.Health.Lost > 0:
		return exam{"peers", examFailed, fmt.Sprintf("%s alive, too few for %d stripes: bring nodes back", plural(st.Pool.Nodes, "node"), st.Health.Lost)}
	case st.Pool.Nodes == 0:
		return exam{"peers", examFailed, "no storage node answers: start nodes, or give their addresses (peers)"}
	case st.Problem != "":
		return exam{"peers", examWarn, st.Problem}
	case st.Health.Unreachable > 0:
		return exam{"peers", examWarn, fmt.Sprintf("%s alive; %d stripes are out of reach until silent nodes answer again", plural(st.Pool.Nodes, "node"), st.Health.Unreachable)}
	case st.Health.Degraded > 0:
		return exam{"peers", examWarn, fmt.Sprintf("%s alive, %d stripes have fewer shards than they should", plural(st.Pool.Nodes, "node"), st.Health.Degraded)}
	}
	return exam{"peers", examFine, fmt.Sprintf("%s on %s alive", plural(st.Pool.Nodes, "node"), plural(st.Pool.Hosts, "host"))}
}
