package volume

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/defs-fs/defs/metastore"
)

// Fsync modes: what Fsync waits for.
const (
	FsyncJournal     = "journal"     // the flush to this disk
	FsyncRecoverable = "recoverable" // and a published head that covers it
)

// xattrFsync is the attribute of a directory or file that says which mode holds for what is in it.
const xattrFsync = "user.defs.fsync"

// recoverableWaitMax bounds how long Fsync waits for the peers.
const recoverableWaitMax = 2 * time.Minute

// errPeersLate is the cause of a TimedOut of Fsync.
var errPeersLate = errors.New("the peers did not take it in time; it is safe on this disk and will be tried again")

func checkFsyncMode(mode string) error {
	if mode != FsyncJournal && mode != FsyncRecoverable {
		return fmt.Errorf("fsync mode %q: use %s or %s", mode, FsyncJournal, FsyncRecoverable)
	}
	return nil
}

// Fsync returns when everything acknowledged for the inode, its name included, survives a power cut; in mode
// recoverable when it survives the loss of this machine as well, or with TimedOut after 2 minutes: then it is on this
// disk alone. The flush is not given up when ctx ends, the wait for the peers is.
// Where bytes of the volume can be read nowhere any more, it fails in that mode rather than call a hole recoverable.
// One flush and one head serve all callers that wait; so they cover all that the volume acknowledged before.
func (v *Volume) Fsync(ctx context.Context, ino Ino) error {
	const op = "fsync"
	change := v.lastChange.Load()
	if err := v.syncThrough(context.WithoutCancel(ctx), v.lastSeq.Load()); err != nil {
		return wrap(op, ino, err)
	}
	mode, err := v.fsyncMode(ino)
	if err != nil || mode == FsyncJournal {
		return wrap(op, ino, err)
	}
	if v.network == nil {
		return wrap(op, ino, NotSupported)
	}
	bounded, cancel := context.WithTimeoutCause(ctx, v.recoverableWait, errPeersLate)
	defer cancel()
	err = v.network.publisher.await(bounded, nil, func(p *publisher) bool { return p.covers(change) }, nil)
	if err != nil && context.Cause(bounded) == errPeersLate {
		err = &Error{Op: op, Kind: TimedOut, Ino: ino, Err: fmt.Errorf("%w: %w", errPeersLate, err)}
	}
	return wrap(op, ino, err)
}

// fsyncMode returns the mode of ino, else of the nearest directory above that has one, else the volume's.
func (v *Volume) fsyncMode(ino Ino) (string, error) {
	for {
		n, err := v.inodes.get(ino)
		if err == NotExist {
			return v.fsync, nil // the directory of a name that is gone
		}
		if err != nil {
			return "", err
		}
		if n.Flags&flagXattrs != 0 {
			mode, err := v.db.Xattr(ino, xattrFsync)
			if !errors.Is(err, metastore.ErrNotFound) {
				return string(mode), err
			}
		}
		if ino == RootIno || n.Parent == 0 {
			return v.fsync, nil
		}
		ino = n.Parent
	}
}

// ownFsyncMode returns what setFsyncMode set; NoAttr where it did not.
func (v *Volume) ownFsyncMode(_ context.Context, ino Ino) ([]byte, error) {
	mode, err := v.db.Xattr(ino, xattrFsync)
	if errors.Is(err, metastore.ErrNotFound) {
		err = NoAttr
	}
	return mode, err
}

// setFsyncMode sets the mode of a directory or file; nil takes it away.
func (v *Volume) setFsyncMode(ctx context.Context, ino Ino, mode []byte) error {
	if mode != nil && checkFsyncMode(string(mode)) != nil {
		return Invalid
	}
	if err := v.waitRoom(ctx, recordBytes); err != nil {
		return err
	}
	_, err := v.commit(func(t *tx) error {
		n, err := t.inode(ino)
		if err == NotExist {
			err = Stale
		}
		if err != nil {
			return err
		}
		if mode != nil {
			t.putXattr(ino, &n, xattrFsync, mode)
		} else if exists, err := t.hasXattr(ino, &n, xattrFsync); err != nil {
			return err
		} else if !exists {
			return NoAttr
		} else {
			t.DeleteXattr(ino, xattrFsync)
		}
		n.Ctime = t.now
		t.putInode(ino, n)
		return nil
	})
	return err
}
