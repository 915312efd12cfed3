package fusefs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// fsType is the type of our mounts in /proc/self/mountinfo.
const fsType = "fuse.defs"

// staleProbeTimeout bounds the question whether a mount is alive. A dead one answers at once.
const staleProbeTimeout = 5 * time.Second

// CleanStale detaches mounts at mountpoint whose process has died ("transport endpoint is not connected") and says
// whether there were any. A live mount is left alone, and so is a dead one of another filesystem. What another user
// mounted shows nothing of its state, not even to root, and is left alone too.
func CleanStale(mountpoint string) (cleaned bool, err error) {
	path, err := resolveMountpoint(mountpoint)
	if err != nil {
		return false, err
	}
	const stackedMax = 16 // mounts on top of each other
	for range stackedMax {
		if ours, err := topMountIsOurs(path); err != nil || !ours {
			return cleaned, err
		}
		if !isStale(path) {
			return cleaned, nil
		}
		if err := detach(path); err != nil {
			return cleaned, fmt.Errorf("stale mount at %s: %w", path, err)
		}
		cleaned = true
	}
	return cleaned, fmt.Errorf("more than %d stale mounts at %s: unmount them by hand", stackedMax, path)
}

// resolveMountpoint follows symbolic links as the kernel did when it recorded the mount. The last element is not
// followed if it cannot be: a stale mount does not even answer lstat.
func resolveMountpoint(mountpoint string) (string, error) {
	abs, err := filepath.Abs(mountpoint)
	if err != nil {
		return "", err
	}
	if path, err := filepath.EvalSymlinks(abs); err == nil {
		return path, nil
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(abs)), nil
}

// topMountIsOurs looks the path up in the mount table, without touching the mount itself.
func topMountIsOurs(path string) (bool, error) {
	mounts, err := mountsAt(path)
	if err != nil || len(mounts) == 0 {
		return false, err
	}
	return mounts[len(mounts)-1].fsType == fsType, nil
}

// deviceOf returns the device, MAJOR:MINOR, of the topmost mount at path, without touching the mount itself.
func deviceOf(path string) (string, error) {
	path, err := resolveMountpoint(path)
	if err != nil {
		return "", err
	}
	mounts, err := mountsAt(path)
	if err == nil && len(mounts) == 0 {
		err = errors.New("nothing is mounted there")
	}
	if err != nil {
		return "", err
	}
	return mounts[len(mounts)-1].device, nil
}

// Mounted is a mount of a volume, by any process.
type Mounted struct {
	Source     string // Options.FsName
	Mountpoint string
}

// Mounts lists the mounts of volumes on this machine, oldest first. It does not touch them: a dead one cannot answer.
func Mounts() ([]Mounted, error) {
	mounts, err := readMounts()
	var ours []Mounted
	for _, m := range mounts {
		if m.fsType == fsType {
			ours = append(ours, Mounted{m.source, m.path})
		}
	}
	return ours, err
}

// mounted is a line of the mount table.
type mounted struct {
	device string // MAJOR:MINOR
	path   string
	fsType string
	source string
}

// mountsAt returns the mounts at path, lowest first.
func mountsAt(path string) ([]mounted, error) {
	mounts, err := readMounts()
	return slices.DeleteFunc(mounts, func(m mounted) bool { return m.path != path }), err
}

func readMounts() ([]mounted, error) {
	table, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer table.Close()
	return parseMounts(table)
}

// parseMounts reads a mount table (proc_pid_mountinfo(5)), oldest mounts first.
func parseMounts(table io.Reader) ([]mounted, error) {
	var mounts []mounted
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		before, after, found := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		tail := strings.Fields(after)
		if !found || len(fields) < 5 || len(tail) < 2 {
			return nil, errors.New("mount table: a line is not as expected")
		}
		mounts = append(mounts, mounted{fields[2], unescapeMountPath(fields[4]), tail[0], unescapeMountPath(tail[1])})
	}
	return mounts, lines.Err()
}

// unescapeMountPath decodes the \ooo of the mount table (space, tab, newline and backslash).
func unescapeMountPath(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if code, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(code))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// isStale asks the mount for its statfs, which the kernel cannot answer from its caches. The answer is waited for in
// a goroutine of its own, because a live mount that hangs may never give one.
func isStale(path string) bool {
	answer := make(chan error, 1)
	go func() {
		var st syscall.Statfs_t
		answer <- syscall.Statfs(path, &st)
	}()
	select {
	case err := <-answer:
		return errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.ECONNABORTED)
	case <-time.After(staleProbeTimeout):
		return false
	}
}
