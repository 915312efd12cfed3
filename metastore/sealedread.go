package metastore

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// sealedReader is a file open for reading. ReadAt may run concurrently; Read
// is for one goroutine.
type sealedReader struct {
	vfs.File
	aead     cipher.AEAD
	buffers  *sync.Pool // of *slotBuffer
	diskSize int64      // bytes of the sealed file
	size     int64      // bytes of its content
	starts   []int64    // content offset of each slot; nil when every slot but the last is full
	slots    int        // number of readable slots
	pos      int64      // of Read
}

// readSlots is the number of slots that one read of the disk takes at most.
const readSlots = 16

type slotBuffer [readSlots * slotBytes]byte

func (fs *sealedFS) newSealedReader(inner vfs.File) (*sealedReader, error) {
	info, err := inner.Stat()
	if err != nil {
		return nil, err
	}
	f := &sealedReader{File: inner, buffers: fs.buffers, diskSize: info.Size()}
	if f.diskSize == 0 {
		return f, nil // created, then lost by a crash before anything reached the disk
	}
	header := make([]byte, headerBytes)
	if _, err := inner.ReadAt(header, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if f.aead, err = fs.openFileHeader(header); err != nil {
		return nil, err
	}
	f.slots = int((f.diskSize - int64(headerBytes) + slotBytes - 1) / slotBytes)
	if f.slots <= 0 {
		f.slots = 0
		return f, nil
	}
	// A file that was written in one go has full slots up to the last, which
	// therefore tells the size.
	buf := fs.buffers.Get().(*slotBuffer)
	defer fs.buffers.Put(buf)
	raw, err := f.readRaw(buf[:], f.slots-1, 1)
	if err != nil {
		return nil, err
	}
	last, block, ok := f.openSlot(raw, f.slots-1)
	if ok && last.synced == 0 && last.offset == int64(f.slots-1)*blockBytes {
		f.size = last.offset + int64(len(block))
		return f, nil
	}
	return f, f.index(buf[:])
}

type slotHeader struct {
	offset int64
	synced uint32
}

// openSlot opens the first slot of raw in place. block lies in raw.
func (f *sealedReader) openSlot(raw []byte, slot int) (h slotHeader, block []byte, ok bool) {
	if len(raw) < slotHeaderBytes+tagBytes {
		return h, nil, false
	}
	header := raw[:slotHeaderBytes]
	h.offset = int64(binary.BigEndian.Uint64(header))
	h.synced = binary.BigEndian.Uint32(header[8:])
	length := int64(binary.BigEndian.Uint32(header[12:]))
	if length == 0 || length > blockBytes || h.offset < 0 || int64(len(raw)) < slotHeaderBytes+length+tagBytes {
		return h, nil, false
	}
	sealed := raw[slotHeaderBytes : slotHeaderBytes+length+tagBytes]
	block, err := f.aead.Open(sealed[:0], slotNonce(uint32(slot)), sealed, header)
	return h, block, err == nil
}

// readRaw reads up to count slots from slot on; fewer at the end of the file.
func (f *sealedReader) readRaw(buf []byte, slot, count int) ([]byte, error) {
	from := int64(headerBytes) + int64(slot)*slotBytes
	n := min(int64(count)*slotBytes, f.diskSize-from)
	got, err := f.File.ReadAt(buf[:n], from)
	if errors.Is(err, io.EOF) || int64(got) == n {
		return buf[:got], nil
	}
	return buf[:got], err
}

// index reads the whole file to find where its slots start and where it ends.
func (f *sealedReader) index(buf []byte) error {
	bad := -1 // first slot that does not open
	for first := 0; first < f.slots; first += readSlots {
		count := min(readSlots, f.slots-first)
		raw, err := f.readRaw(buf, first, count)
		if err != nil {
			return err
		}
		for i := range count {
			slot := first + i
			h, block, ok := f.openSlot(raw[min(i*slotBytes, len(raw)):], slot)
			switch {
			case !ok:
				if bad < 0 {
					bad = slot
				}
			case bad >= 0:
				if int64(h.synced) > int64(bad)+1 {
					return fmt.Errorf("slot %d, which was synced: %w", bad, ErrCorrupt)
				}
			case h.offset != f.size:
				return fmt.Errorf("slot %d starts at %d, not %d: %w", slot, h.offset, f.size, ErrCorrupt)
			default:
				f.starts = append(f.starts, h.offset)
				f.size += int64(len(block))
			}
		}
	}
	f.slots = len(f.starts)
	return nil
}

// find returns the slot that holds the byte at off < size.
func (f *sealedReader) find(off int64) int {
	if f.starts == nil {
		return int(off / blockBytes)
	}
	return sort.Search(len(f.starts), func(i int) bool { return f.starts[i] > off }) - 1
}

// extent returns where in the content a slot starts and ends.
func (f *sealedReader) extent(slot int) (start, end int64) {
	if f.starts == nil {
		start = int64(slot) * blockBytes
		return start, min(start+blockBytes, f.size)
	}
	start, end = f.starts[slot], f.size
	if slot+1 < len(f.starts) {
		end = f.starts[slot+1]
	}
	return start, end
}

func (f *sealedReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: negative offset", off)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= f.size {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), f.size-off)]
	buf := f.buffers.Get().(*slotBuffer)
	defer f.buffers.Put(buf)
	done := 0
	for slot, last := f.find(off), f.find(off+int64(len(want))-1); slot <= last; {
		count := min(readSlots, last-slot+1)
		raw, err := f.readRaw(buf[:], slot, count)
		if err != nil {
			return done, err
		}
		for i := 0; i < count; i, slot = i+1, slot+1 {
			start, end := f.extent(slot)
			h, block, ok := f.openSlot(raw[min(i*slotBytes, len(raw)):], slot)
			if !ok || h.offset != start || int64(len(block)) != end-start {
				return done, fmt.Errorf("slot %d of %d: %w", slot, f.slots, ErrCorrupt)
			}
			done += copy(want[done:], block[off+int64(done)-start:])
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func (f *sealedReader) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.pos)
	f.pos += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

func (f *sealedReader) Stat() (vfs.FileInfo, error) {
	info, err := f.File.Stat()
	if err != nil {
		return nil, err
	}
	return sizedInfo{FileInfo: info, size: f.size}, nil
}

// Prefetch asks for the slots that hold a range.
func (f *sealedReader) Prefetch(offset, length int64) error {
	if length <= 0 || offset < 0 || offset >= f.size {
		return nil
	}
	first, last := f.find(offset), f.find(min(offset+length, f.size)-1)
	return f.File.Prefetch(int64(headerBytes)+int64(first)*slotBytes, int64(last-first+1)*slotBytes)
}

func (f *sealedReader) Write([]byte) (int, error)          { return 0, errors.ErrUnsupported }
func (f *sealedReader) WriteAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
func (f *sealedReader) Preallocate(int64, int64) error     { return errors.ErrUnsupported }
func (f *sealedReader) Sync() error                        { return nil }
func (f *sealedReader) SyncData() error                    { return nil }
func (f *sealedReader) SyncTo(int64) (bool, error)         { return false, nil }

// Fd hides the descriptor: Pebble must not go around this file.
func (f *sealedReader) Fd() uintptr { return vfs.InvalidFd }
