package metastore

import (
	"fmt"
	"log/slog"

	"github.com/cockroachdb/pebble/v2"
)

// comparer orders keys by their bytes. It prints only a key's kind and length:
// keys hold file names, and Pebble puts keys into errors and logs.
func comparer() *pebble.Comparer {
	c := *pebble.DefaultComparer
	c.Name = "defs.metastore.v1"
	c.FormatKey = func(key []byte) fmt.Formatter { return hiddenKey(key) }
	c.FormatValue = nil
	return &c
}

type hiddenKey []byte

func (k hiddenKey) Format(s fmt.State, _ rune) {
	if len(k) == 0 {
		fmt.Fprint(s, "empty key")
		return
	}
	fmt.Fprintf(s, "%q key of %d bytes", k[0], len(k))
}

// pebbleLogger keeps Pebble quiet: its chatter goes to the debug level.
type pebbleLogger struct {
	logger *slog.Logger
	fail   func(error)
}

func (l pebbleLogger) Infof(format string, args ...any) {
	l.logger.Debug("metastore: " + fmt.Sprintf(format, args...))
}

func (l pebbleLogger) Errorf(format string, args ...any) {
	l.logger.Error("metastore: " + fmt.Sprintf(format, args...))
}

// Fatalf stops all writing instead of the process: the tree stays readable and
// the volume can say what happened. Pebble goes on with an error where it asks
// for this after a failed manifest write.
func (l pebbleLogger) Fatalf(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	l.fail(err)
	l.logger.Error("metastore: writing stopped; open the volume again", "err", err)
}
