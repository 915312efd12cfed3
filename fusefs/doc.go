// Package fusefs shows a volume as a mounted folder: it turns the kernel's FUSE requests into calls on
// package volume, and volume's errors into errno.
//
//	server, err := fusefs.Mount(ctx, fusefs.Options{Mountpoint: "/home/me/DeFS", Volume: vol})
//	if err != nil { … }
//	defer server.Unmount()
//	server.Wait() // until somebody unmounts
//
// # Design
//
// A FUSE node id is the inode number of the volume (the root is 1), and every request carries it, so no tree and no
// table of open files is kept. OPEN, OPENDIR and FLUSH are answered "not implemented": from then on the kernel opens
// and closes without asking, which saves up to three of the requests that creating or reading a small file costs.
// What the kernel still knows of an inode is counted by the volume (Acquire, Release): a file that is unlinked while
// open lives until the kernel forgets it.
//
// Only this mount changes what it shows. Names, attributes and pages therefore stay in the kernel's caches until
// memory is short; a change that comes by another way has to be announced with [Server.InvalidateContent] or
// [Server.InvalidateEntry].
// Writes go through: there is no writeback cache, and what write(2) acknowledged is in the volume's journal.
//
// The process that serves a mount must not use it through memory maps, nor start a child with its working directory
// in it: a page fault, or a child before exec, can wait for the server while it keeps the Go runtime from running it.
// It had better not use it at all: killed while it waits for its own answer, it never ends, and keeps the volume
// locked until the connection is aborted in /sys/fs/fuse/connections.
//
// # Ownership
//
// [Mount] starts the goroutines that serve the kernel; they end when the mount ends, and [Server.Wait] waits for
// them. A mount that has copies elsewhere is cut off there soon after it was unmounted, so that they do end. Buffers handed to the volume belong to the kernel request and are valid until the volume's call returns.
// The package holds no state that a crash could lose. A crash leaves a mount whose every use fails with "transport
// endpoint is not connected"; [CleanStale] removes it, and Mount calls it first.
package fusefs
