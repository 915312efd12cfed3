package p2p

import (
	"log/slog"

	"github.com/libp2p/go-libp2p/gologshim"
)

// SilenceLibrary drops what libp2p itself logs to standard error, in this whole
// process: for programs whose standard error a person reads. It is called before
// the first host is made. What a host logs goes to its own logger all the same.
func SilenceLibrary() { gologshim.SetDefaultHandler(slog.DiscardHandler) }
