package metastore

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/cockroachdb/errors/oserror"
	"github.com/cockroachdb/pebble/v2"
)

// Fill applies a record that is at no place of the journal, to a metastore that
// is being built anew and that nobody uses yet. Flush makes it durable.
func (db *DB) Fill(record []byte) error {
	db.applyMu.Lock()
	defer db.applyMu.Unlock()
	if db.closed.Load() {
		return ErrClosed
	}
	if err := db.gate(len(record)); err != nil {
		return err
	}
	if err := db.drainLocked(); err != nil {
		return err
	}
	batch := db.pebble.NewBatchWithSize(4*len(record) + 256)
	err := decodeRecord(record, func(lamport uint64, m mutation) error {
		switch m.op {
		case opPut:
			return errors.Join(batch.Set(m.key, m.value, nil), db.touch(batch, lamport, m.key))
		case opDelete:
			return errors.Join(batch.Delete(m.key, nil), db.touch(batch, lamport, m.key))
		}
		return fmt.Errorf("change %d of a generation: %w", m.op, ErrCorrupt)
	})
	if err == nil {
		err = batch.Commit(pebble.NoSync)
	}
	if err = errors.Join(err, batch.Close()); err != nil {
		return fmt.Errorf("metastore: fill: %w", err)
	}
	return nil
}

// Merge adds the changes of a journal record to a Txn whose state is not the one
// that the record was made for: what is derived from tree keys follows the
// state. Generations are left out; a metastore built anew counts its own.
func (t *Txn) Merge(record []byte) error {
	// What is derived may be under one key before and after: deletes go first.
	for _, kind := range []op{opDelete, opPut} {
		if err := decodeRecord(record, func(_ uint64, m mutation) error {
			switch {
			case m.op != kind:
				return nil
			case IsTreeKey(m.key) && kind == opDelete:
				return t.DeleteTree(m.key)
			case IsTreeKey(m.key):
				return t.PutTree(m.key, m.value)
			case m.key[0] == prefixMeta || m.key[0] == prefixSalt || m.key[0] == prefixDedup:
				t.add(mutation{op: kind, key: append([]byte(nil), m.key...), value: append([]byte(nil), m.value...)})
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return t.err
}

// Verify reads every byte of the metastore's files. ErrCorrupt names the file
// that is damaged.
func (db *DB) Verify(ctx context.Context) error {
	names, err := db.fs.List(db.dir)
	if err != nil {
		return fmt.Errorf("metastore: verify: %w", err)
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := db.verifyFile(db.fs.PathJoin(db.dir, name)); err != nil && !oserror.IsNotExist(err) {
			return fmt.Errorf("metastore: verify %s: %w", name, err)
		}
	}
	return nil
}

func (db *DB) verifyFile(path string) error {
	info, err := db.fs.FS.Stat(path)
	if err != nil || info.IsDir() || info.Size() == 0 {
		return err
	}
	f, err := db.fs.Open(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, f)
	return errors.Join(err, f.Close())
}
