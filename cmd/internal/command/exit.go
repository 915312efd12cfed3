package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/defs-fs/defs"
	"github.com/defs-fs/defs/config"
	"github.com/defs-fs/defs/control"
	"github.com/defs-fs/defs/volume"
)

// Exit codes: a contract with scripts.
const (
	exitOK         = 0
	exitFailed     = 1
	exitPartial    = 3  // part of it was done
	exitDegraded   = 4  // all is there, with less protection than wanted
	exitNotDurable = 5  // not yet safe with the peers
	exitNoVolume   = 10 // there is no such volume
	exitSecret     = 12 // wrong recovery words, or a wrong ticket
	exitNoSpace    = 13
	exitMountpoint = 14 // the mountpoint cannot be used
	exitUsage      = 64 // EX_USAGE of sysexits.h
	exitTimeout    = 124
)

// exitError is an error that ends a command with a code of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// silentError ends a command with a code after everything has been said.
type silentError int

func (e silentError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func exitCode(err error) int {
	var e *exitError
	var silent silentError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &e):
		return e.code
	case errors.As(err, &silent):
		return int(silent)
	case errors.Is(err, defs.ErrNoVolume), errors.Is(err, config.ErrNoVolume):
		return exitNoVolume
	case errors.Is(err, defs.ErrWords), errors.Is(err, defs.ErrTicket), errors.Is(err, defs.ErrNoHead):
		return exitSecret
	case errors.Is(err, volume.NoSpace), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), control.CodeOf(err) == control.CodeNoSpace:
		return exitNoSpace
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return exitTimeout
	}
	return exitFailed
}
