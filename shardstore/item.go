package shardstore

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Locks, index records and heads: one newest version for each id.

// PutLock stores a stripe's lock. A lower version, or another lock of the
// same version, is refused with ErrStale. The caller has checked that the
// previous lock's key signed it.
func (s *Store) PutLock(ctx context.Context, blind [32]byte, version uint32, lock []byte) error {
	p := newPending(kindLock, &meta{ID: blind, Version: uint64(version), Blob: lock})
	return s.putItem(ctx, "put lock", prefixLock, blind, uint64(version), p, func(old itemEntry) (bool, error) {
		_, m, _, err := s.recordMeta(old.location)
		if errors.Is(err, ErrCorrupt) {
			err = errReplace
		}
		return err == nil && string(m.Blob) == string(lock), err
	})
}

// Lock returns the newest lock of a stripe. ErrNotFound, ErrCorrupt.
func (s *Store) Lock(blind [32]byte) (version uint32, lock []byte, err error) {
	e, err := s.item(prefixLock, blind)
	var m meta
	if err == nil {
		_, m, _, err = s.recordMeta(e.location)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("lock of %x: %w", blind[:8], err)
	}
	return uint32(e.Version), m.Blob, nil
}

// PutIndex stores a stripe's index record. A lower version than the stored one
// is refused with ErrStale; at an equal one what is stored stays.
func (s *Store) PutIndex(ctx context.Context, blind [32]byte, version uint64, record []byte) error {
	p := newPending(kindIndex, &meta{ID: blind, Version: version}, record)
	return s.putItem(ctx, "put index record", prefixIndex, blind, version, p, func(old itemEntry) (bool, error) {
		_, err := s.readData(old.location)
		if errors.Is(err, ErrCorrupt) {
			return false, errReplace
		}
		return true, err
	})
}

// UpdateIndex replaces a stripe's index record, within its version, by what
// update makes of it; nil for no change. update must be quick: the store takes
// no other changes meanwhile. ErrNotFound, ErrCorrupt, and update's errors.
func (s *Store) UpdateIndex(ctx context.Context, blind [32]byte, update func(record []byte) ([]byte, error)) error {
	seq, err := s.change(ctx, idKey(prefixIndex, blind), func() (*pending, error) {
		e, err := s.item(prefixIndex, blind)
		if err != nil {
			return nil, err
		}
		record, err := s.readData(e.location)
		if err != nil {
			return nil, err
		}
		record, err = update(record)
		if err != nil || record == nil {
			return nil, err
		}
		p := newPending(kindIndex, &meta{ID: blind, Version: e.Version}, record)
		return &p, nil
	})
	if err == nil {
		err = s.wait(ctx, seq)
	}
	if err != nil {
		return fmt.Errorf("update index record of %x: %w", blind[:8], err)
	}
	return nil
}

// Index returns a stripe's index record. ErrNotFound, ErrCorrupt.
func (s *Store) Index(blind [32]byte) (record []byte, err error) {
	_, record, err = s.itemData("index record", prefixIndex, blind)
	return record, err
}

// ForgetIndex drops a stripe's index record, when stored.
func (s *Store) ForgetIndex(ctx context.Context, blind [32]byte) error {
	seq, err := s.change(ctx, idKey(prefixIndex, blind), func() (*pending, error) {
		e, found, err := get(s.index, idKey(prefixIndex, blind), decodeItemEntry)
		if err != nil || !found {
			return nil, err
		}
		p := newPending(kindForget, &meta{ID: blind, Version: e.Version})
		return &p, nil
	})
	if err == nil {
		err = s.wait(ctx, seq)
	}
	if err != nil {
		return fmt.Errorf("forget index record of %x: %w", blind[:8], err)
	}
	return nil
}

// Indexes calls fn with the blinded id of each index record stored after the
// given one, in ascending order, until fn returns false.
func (s *Store) Indexes(after [32]byte, fn func(blind [32]byte) bool) error {
	from := []byte(nil)
	if after != ([32]byte{}) {
		from = append(idKey(prefixIndex, after), 0)
	}
	return s.scan([]byte{prefixIndex}, from, func(key, _ []byte) (bool, error) {
		return fn([32]byte(key[1:])), nil
	})
}

// PutHead stores a head. A lower sequence, or another head of the same
// sequence, is refused with ErrStale. The caller has checked the signature.
func (s *Store) PutHead(ctx context.Context, address [32]byte, sequence uint64, head []byte) error {
	p := newPending(kindHead, &meta{ID: address, Version: sequence}, head)
	return s.putItem(ctx, "put head", prefixHead, address, sequence, p, func(old itemEntry) (bool, error) {
		stored, err := s.readData(old.location)
		if errors.Is(err, ErrCorrupt) {
			err = errReplace
		}
		return err == nil && string(stored) == string(head), err
	})
}

// Head returns the newest head of an address. ErrNotFound, ErrCorrupt.
func (s *Store) Head(address [32]byte) (sequence uint64, head []byte, err error) {
	return s.itemData("head", prefixHead, address)
}

// errReplace tells putItem that what is stored is damaged.
var errReplace = errors.New("stored item is damaged")

// putItem appends p when version is higher than what is stored. At an equal
// version same says whether what is stored will do, or errReplace.
func (s *Store) putItem(ctx context.Context, op string, prefix byte, id [32]byte, version uint64, p pending,
	same func(itemEntry) (bool, error),
) error {
	seq, err := s.change(ctx, idKey(prefix, id), func() (*pending, error) {
		old, found, err := get(s.index, idKey(prefix, id), decodeItemEntry)
		if err != nil || !found {
			return &p, err
		}
		if version < old.Version {
			return nil, fmt.Errorf("%w: %d, offered %d", ErrStale, old.Version, version)
		}
		if version > old.Version {
			return &p, nil
		}
		equal, err := same(old)
		if errors.Is(err, errReplace) {
			return &p, nil
		}
		if err == nil && !equal {
			err = fmt.Errorf("%w: another one of version %d", ErrStale, version)
		}
		return nil, err
	})
	if err == nil {
		err = s.wait(ctx, seq)
	}
	if err != nil {
		return fmt.Errorf("%s of %x: %w", op, id[:8], err)
	}
	return nil
}

func (s *Store) item(prefix byte, id [32]byte) (itemEntry, error) {
	e, found, err := get(s.index, idKey(prefix, id), decodeItemEntry)
	if err == nil && !found {
		err = ErrNotFound
	}
	return e, err
}

func (s *Store) itemData(what string, prefix byte, id [32]byte) (version uint64, data []byte, err error) {
	for attempt := 0; ; attempt++ {
		var e itemEntry
		e, err = s.item(prefix, id)
		if err == nil {
			data, err = s.readData(e.location)
		}
		if err == nil {
			return e.Version, data, nil
		}
		// It may have been replaced between index and pack.
		if !errors.Is(err, ErrCorrupt) || attempt > 0 {
			return 0, nil, fmt.Errorf("%s of %x: %w", what, id[:8], err)
		}
	}
}

// readData reads and verifies the whole data of a record.
func (s *Store) readData(loc location) ([]byte, error) {
	_, _, sums, err := s.recordMeta(loc)
	if err != nil {
		return nil, err
	}
	f, err := s.files.acquire(loc.Pack)
	if err != nil {
		return nil, err
	}
	defer s.files.release(f)
	b := make([]byte, loc.Data)
	if _, err := f.ReadAt(b, loc.dataOffset()); err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrCorrupt
		}
		return nil, err
	}
	if !checkSums(sums, b) {
		return nil, ErrCorrupt
	}
	return b, nil
}
