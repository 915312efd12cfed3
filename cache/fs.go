package cache

// FS is the part of an operating system that the store uses. Names are full
// paths. Tests pass one that fails on purpose (package faultfs).
type FS interface {
	MkdirAll(dir string) error
	// OpenFile takes the flags of os.OpenFile; new files get mode 0600.
	OpenFile(name string, flag int) (File, error)
	Remove(name string) error
	Rename(oldName, newName string) error
	// ReadDir returns the names of the regular files in dir, sorted.
	ReadDir(dir string) ([]string, error)
	// SyncDir makes creations, renames and removals in dir durable.
	SyncDir(dir string) error
	// Free returns how many bytes the disk of dir has for the caller.
	Free(dir string) (int64, error)
}

// File is one open file.
type File interface {
	// ReadAt and WriteAt are as in io.ReaderAt and io.WriterAt.
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// Writev writes the buffers one after the other at off, whole or with an error.
	Writev(bufs [][]byte, off int64) error
	// Sync makes the file's bytes and size durable (fdatasync).
	Sync() error
	// Allocate reserves disk space for bytes 0 to size and grows the file to size.
	Allocate(size int64) error
	Truncate(size int64) error
	Size() (int64, error)
	Close() error
}
