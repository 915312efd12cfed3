// Command nullfs mounts a filesystem that keeps everything in memory and does nothing else. It asks the kernel for
// exactly what DeFS asks for, so that what it reaches in a benchmark is the ceiling for DeFS on that machine.
//
//	nullfs [-journal FILE] MOUNTPOINT
//
// With -journal it also does the least that sealed and durable writes cost: one AES-GCM seal and one pwrite to FILE for
// each write, and fdatasync of FILE for each fsync.
//
// It prints "ready" when the mount answers, and ends when it is unmounted or gets SIGINT or SIGTERM.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/defs-fs/defs/fusefs"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "nullfs:", err)
		os.Exit(1)
	}
}

func run() error {
	journalPath := flag.String("journal", "", "`file` that each write is sealed and appended to")
	flag.Parse()
	if flag.NArg() != 1 {
		return errors.New("usage: nullfs [-journal FILE] MOUNTPOINT")
	}
	mountpoint, err := filepath.Abs(flag.Arg(0))
	if err != nil {
		return err
	}
	files := newMemory()
	if *journalPath != "" {
		if files.journal, err = openJournal(*journalPath); err != nil {
			return err
		}
		defer files.journal.file.Close()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	server, err := fusefs.MountRaw(ctx, files, fusefs.Options{
		Mountpoint: mountpoint,
		FsName:     "nullfs",
		Logger:     slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	select {
	case <-server.Done():
		return nil
	case <-ctx.Done():
		return server.Unmount()
	}
}
