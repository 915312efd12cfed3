package cache

import (
	"crypto/cipher"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// ReadAt fills dst with the plaintext of ref from byte off on. It reads and
// opens only the 16 KiB blocks that it needs. off+len(dst) <= ref.Length.
//
// Errors: ErrEvicted when the segment is no longer there; ErrCorrupt (a
// *CorruptError) when a block does not verify, dst then holds nothing useful;
// ErrClosed; errors of the file system. Reads go on after ErrReadOnly.
func (s *Store) ReadAt(ref Ref, off int, dst []byte) error {
	if off < 0 || off+len(dst) > int(ref.Length) {
		return fmt.Errorf("cache: read: bytes %d to %d of a run of %d", off, off+len(dst), ref.Length)
	}
	if len(dst) == 0 {
		return nil
	}
	s.mu.RLock()
	seg, broken := s.segments[ref.Segment], s.broken
	s.mu.RUnlock()
	if errors.Is(broken, ErrClosed) {
		return broken
	}
	if seg == nil {
		return fmt.Errorf("cache: read segment %d: %w", ref.Segment, ErrEvicted)
	}
	seg.lastUse.Store(s.uses.Add(1))
	file, err := s.files.acquire(seg.path, os.O_RDWR)
	if errors.Is(err, fs.ErrNotExist) { // evicted between the two steps
		return fmt.Errorf("cache: read segment %d: %w", ref.Segment, ErrEvicted)
	}
	if err != nil {
		return fmt.Errorf("cache: read segment %d: %w", ref.Segment, err)
	}
	defer s.files.release(file)
	blocks := (off+len(dst)-1)/blockBytes - off/blockBytes + 1
	scratch := s.buffers.get(readBufferBytes(min(blocks, readBlocksMax)))
	defer s.buffers.put(scratch)
	err = openBlocks(file.File, seg.keys.aead, ref, off, len(dst), *scratch, dst)
	if err != nil {
		s.damaged.Add(1)
		if !seg.damaged.Swap(true) {
			s.opts.Logger.Error("bytes on this disk cannot be read; what the peers have is read from there. Unmount and run defs fsck --repair",
				"segment", ref.Segment, "offset", ref.Offset, "reason", err)
		}
	}
	if errors.Is(err, errInvalid) {
		return &CorruptError{Op: "read", Segment: ref.Segment, Offset: int64(ref.Offset), Reason: err.Error()}
	}
	if err != nil {
		return fmt.Errorf("cache: read segment %d: %w", ref.Segment, err)
	}
	return nil
}

// readBlocksMax is the number of sealed blocks read at once.
const readBlocksMax = 64

// readBufferBytes is the scratch for reading so many blocks at once: room for
// them and for one opened block.
func readBufferBytes(blocks int) int { return blocks*(blockBytes+tagBytes) + blockBytes }

// openBlocks reads and opens the blocks of ref that cover n bytes from off on,
// and copies those bytes to dst; with dst nil it only verifies. len(scratch) is
// readBufferBytes of at least one block.
func openBlocks(f File, aead cipher.AEAD, ref Ref, off, n int, scratch, dst []byte) error {
	var name blockName
	plain, chunk := scratch[:0:blockBytes], scratch[blockBytes:]
	last := (off + n - 1) / blockBytes
	for block := off / blockBytes; n > 0 && block <= last; {
		count := min(last-block+1, len(chunk)/(blockBytes+tagBytes))
		from := block * (blockBytes + tagBytes)
		to := min(from+count*(blockBytes+tagBytes), int(sealedBytes(int(ref.Length))))
		sealed := chunk[:to-from]
		if err := readFull(f, sealed, int64(ref.Offset)+int64(from)); err != nil {
			return err
		}
		for range count {
			size := min(blockBytes, int(ref.Length)-block*blockBytes)
			name.set(ref.Nonce, ref.Length, block)
			begin := max(off, block*blockBytes) // wanted bytes of this block
			end := min(off+n, block*blockBytes+size)
			whole := dst != nil && end-begin == size
			out := plain
			if whole {
				out = dst[begin-off : begin-off : end-off]
			}
			opened, err := aead.Open(out, name.nonce[:], sealed[:size+tagBytes], name.aad[:])
			if err != nil {
				return fmt.Errorf("block %d of a run of %d bytes %w", block, ref.Length, errInvalid)
			}
			if dst != nil && !whole {
				copy(dst[begin-off:end-off], opened[begin-block*blockBytes:])
			}
			sealed = sealed[size+tagBytes:]
			block++
		}
	}
	return nil
}
