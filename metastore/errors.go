package metastore

import "errors"

var (
	// ErrNotFound: no such key.
	ErrNotFound = errors.New("not found")
	// ErrCorrupt: bytes on disk or in a record are not what was written.
	ErrCorrupt = errors.New("corrupt")
	// ErrFailed: a write to the metastore's files failed earlier. Reads still
	// work; nothing is applied any more until the volume is opened again.
	ErrFailed = errors.New("metastore stopped after a failed write")
	// ErrClosed: the metastore is closed.
	ErrClosed = errors.New("metastore is closed")
)
