package shardstore

import (
	"os"

	"golang.org/x/sys/unix"
)

// Disk tells how many bytes of a directory's file system are free for the
// caller, and how many it has.
type Disk func(dir string) (free, total uint64, err error)

// OSDisk asks the operating system.
func OSDisk(dir string) (free, total uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return st.Bavail * uint64(st.Bsize), st.Blocks * uint64(st.Bsize), nil
}

// diskReserve is the part of a disk, one in so many, that shards leave free:
// the index, deletes and whatever else lives there need it.
const diskReserve = 20

// measureDisk sets what the packs may use: what they do and their share of the
// free bytes, but no more than the capacity that was asked for. It is called
// now and then, and after each flush.
func (s *Store) measureDisk() error {
	free, total, err := s.opts.Disk(s.opts.Dir)
	if err != nil {
		return err
	}
	free -= min(free, total/diskReserve)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.capacity = s.state.UsedBytes + s.queueBytes + free/s.opts.DiskShare
	if s.opts.CapacityBytes > 0 {
		s.capacity = min(s.capacity, s.opts.CapacityBytes)
	}
	return nil
}
