// Command nullfs mounts a filesystem that keeps everything in memory and does nothing else. It asks the kernel for
// exactly what DeFS asks for, so that what it reaches in a benchmark is the ceiling for DeFS on that machine.
//
//	nullfs MOUNTPOINT
//
// It prints "ready" when the mount answers, and ends when it is unmounted or gets SIGINT or SIGTERM.
package main

import (
	"context"
	"errors"
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
	if len(os.Args) != 2 {
		return errors.New("usage: nullfs MOUNTPOINT")
	}
	mountpoint, err := filepath.Abs(os.Args[1])
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	server, err := fusefs.MountRaw(ctx, newMemory(), fusefs.Options{
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
