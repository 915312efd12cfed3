package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// Fetched slices: still sealed with the volume's keys, so they are stored as
// they are, in append-only files beside the segments (FORMAT.md,
// "Slice file"). CRC32C finds accidents; the volume's seal finds the rest.
const (
	sliceMagic       = "DSlc"
	sliceHeaderBytes = 36
	sliceBytesMax    = 16 << 20 // longest slice that is kept
	sliceFileBytes   = 16 << 20 // a file of this size is ended
	sliceQueueBytes  = 16 << 20 // waiting to be written; more is not written
	sliceQueueItems  = 256
	sliceMemoryItems = 1 << 16
)

type sliceKey struct {
	stripe [16]byte
	slice  uint32
}

type sliceItem struct {
	sliceKey
	sealed []byte
	round  uint64 // of drops; an item of an earlier round is void
}

// sliceAt is where a slice lies on disk.
type sliceAt struct {
	file   *sliceFile
	offset uint32 // of its header
	length uint32
}

// sliceFile is one file of slices. bytes changes under Store.cleanMu.
type sliceFile struct {
	id      uint64
	bytes   int64
	keys    []sliceKey // in it, superseded ones included
	lastUse atomic.Uint64
}

// sliceCache is the memory side of the clean slices.
type sliceCache struct {
	queue   chan sliceItem
	indexed chan struct{} // closed when the files of earlier opens are indexed

	mu        sync.Mutex // guards what follows; never held across a system call
	memory    *simplelru.LRU[sliceKey, []byte]
	memorySum int64
	memoryMax int64
	index     map[sliceKey]sliceAt
	files     map[uint64]*sliceFile
	active    *sliceFile // takes new slices
	nextID    uint64
	queued    int64 // bytes
	round     uint64
}

func newSliceCache(memoryMax int64) *sliceCache {
	c := &sliceCache{
		queue:     make(chan sliceItem, sliceQueueItems),
		indexed:   make(chan struct{}),
		memoryMax: memoryMax,
		index:     make(map[sliceKey]sliceAt),
		files:     make(map[uint64]*sliceFile),
		nextID:    1,
	}
	memory, err := simplelru.NewLRU(sliceMemoryItems, func(_ sliceKey, sealed []byte) { c.memorySum -= int64(len(sealed)) })
	if err != nil {
		panic(err) // the size is a positive constant
	}
	c.memory = memory
	return c
}

// PutSlice keeps a fetched slice, sealed as it came, in memory and, a little
// later, on disk. The store keeps sealed: the caller must not change it. Under
// load the slice may not reach the disk; slices over 16 MiB are not kept.
func (s *Store) PutSlice(stripe [16]byte, slice uint32, sealed []byte) {
	if len(sealed) == 0 || len(sealed) > sliceBytesMax {
		return
	}
	c, key := s.slices, sliceKey{stripe, slice}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.memory.Contains(key) {
		c.memorySum += int64(len(sealed))
		c.memory.Add(key, sealed)
		for c.memorySum > c.memoryMax {
			c.memory.RemoveOldest()
		}
	}
	if _, stored := c.index[key]; stored || c.queued+int64(len(sealed)) > sliceQueueBytes {
		return
	}
	select {
	case c.queue <- sliceItem{key, sealed, c.round}:
		c.queued += int64(len(sealed))
	default:
	}
}

// GetSlice copies len(dst) bytes from byte off on of a sealed slice and reports
// whether it had them.
func (s *Store) GetSlice(stripe [16]byte, slice uint32, off int, dst []byte) bool {
	if off < 0 {
		return false
	}
	c, key := s.slices, sliceKey{stripe, slice}
	c.mu.Lock()
	if sealed, ok := c.memory.Get(key); ok {
		c.mu.Unlock()
		return off+len(dst) <= len(sealed) && copy(dst, sealed[off:]) == len(dst)
	}
	at, ok := c.index[key]
	c.mu.Unlock()
	if !ok || off+len(dst) > int(at.length) {
		return false
	}
	at.file.lastUse.Store(s.uses.Add(1))
	err := s.readSlice(at, off, dst)
	if err == nil {
		return true
	}
	if !errors.Is(err, fs.ErrNotExist) {
		s.opts.Logger.Warn("a cached slice is damaged; it is fetched again", "stripe", fmt.Sprintf("%x", stripe), "slice", slice, "err", err)
	}
	c.mu.Lock()
	if c.index[key] == at {
		delete(c.index, key)
	}
	c.mu.Unlock()
	return false
}

// SliceInMemory returns a sealed slice that is in memory, else nil. It must not
// be changed.
func (s *Store) SliceInMemory(stripe [16]byte, slice uint32) []byte {
	c := s.slices
	c.mu.Lock()
	defer c.mu.Unlock()
	sealed, _ := c.memory.Get(sliceKey{stripe, slice})
	return sealed
}

// readSlice reads and checks the 16 KiB blocks that cover the wanted bytes.
func (s *Store) readSlice(at sliceAt, off int, dst []byte) error {
	if len(dst) == 0 {
		return nil
	}
	file, err := s.files.acquire(s.slicesPath(at.file.id), os.O_RDWR)
	if err != nil {
		return err
	}
	defer s.files.release(file)
	first, last := off/blockBytes, (off+len(dst)-1)/blockBytes
	sums := make([]byte, 4*(last-first+1))
	tableAt := int64(at.offset) + sliceHeaderBytes
	if err := readFull(file, sums, tableAt+int64(4*first)); err != nil {
		return err
	}
	bodyAt := tableAt + int64(4*blockCount(int(at.length)))
	block := s.buffers.get(blockBytes)
	defer s.buffers.put(block)
	for i := first; i <= last; i++ {
		b := (*block)[:min(blockBytes, int(at.length)-i*blockBytes)]
		if err := readFull(file, b, bodyAt+int64(i*blockBytes)); err != nil {
			return err
		}
		if crc32.Checksum(b, castagnoli()) != binary.BigEndian.Uint32(sums[4*(i-first):]) {
			return fmt.Errorf("slice block %d %w", i, errInvalid)
		}
		begin := max(off, i*blockBytes)
		copy(dst[begin-off:], b[begin-i*blockBytes:])
	}
	return nil
}

func (s *Store) slicesPath(id uint64) string {
	return s.path(fmt.Sprintf("%s%016x", slicesPrefix, id))
}

func blockCount(n int) int { return (n + blockBytes - 1) / blockBytes }

// castagnoli returns the CRC32C table; the standard library makes it once.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// encodeSliceHeader returns header and checksum table of a slice.
func encodeSliceHeader(key sliceKey, sealed []byte) []byte {
	b := make([]byte, sliceHeaderBytes, sliceHeaderBytes+4*blockCount(len(sealed)))
	copy(b, sliceMagic)
	b[4] = formatVersion
	copy(b[8:24], key.stripe[:])
	binary.BigEndian.PutUint32(b[24:], key.slice)
	binary.BigEndian.PutUint32(b[28:], uint32(len(sealed)))
	for i := 0; i < len(sealed); i += blockBytes {
		b = binary.BigEndian.AppendUint32(b, crc32.Checksum(sealed[i:min(i+blockBytes, len(sealed))], castagnoli()))
	}
	binary.BigEndian.PutUint32(b[32:], crc32.Checksum(b[:32], castagnoli()))
	return b
}

// decodeSliceHeader checks the fixed part of a slice's header.
func decodeSliceHeader(b []byte) (key sliceKey, length uint32, err error) {
	switch {
	case len(b) < sliceHeaderBytes || !bytes.Equal(b[:4], []byte(sliceMagic)):
		return key, 0, fmt.Errorf("slice header %w: no magic", errInvalid)
	case b[4] != formatVersion:
		return key, 0, fmt.Errorf("slice header %w: version %d, this program knows %d", errInvalid, b[4], formatVersion)
	case crc32.Checksum(b[:32], castagnoli()) != binary.BigEndian.Uint32(b[32:]):
		return key, 0, fmt.Errorf("slice header %w: wrong checksum", errInvalid)
	}
	copy(key.stripe[:], b[8:24])
	key.slice = binary.BigEndian.Uint32(b[24:])
	length = binary.BigEndian.Uint32(b[28:])
	if length == 0 || length > sliceBytesMax {
		return key, 0, fmt.Errorf("slice header %w: length %d", errInvalid, length)
	}
	return key, length, nil
}

// storeSlice appends a slice to the active slice file. Cleaner only.
func (s *Store) storeSlice(item sliceItem) {
	s.cleanMu.Lock()
	defer s.cleanMu.Unlock()
	c := s.slices
	c.mu.Lock()
	c.queued -= int64(len(item.sealed))
	_, stored := c.index[item.sliceKey]
	void := stored || item.round != c.round
	file := c.active
	if !void && file == nil {
		file = &sliceFile{id: c.nextID}
		c.nextID++
	}
	c.mu.Unlock()
	if void {
		return
	}
	flag := os.O_RDWR
	if file.bytes == 0 {
		flag |= os.O_CREATE | os.O_EXCL
	}
	name := s.slicesPath(file.id)
	header := encodeSliceHeader(item.sliceKey, item.sealed)
	h, err := s.files.acquire(name, flag)
	if err == nil {
		err = h.Writev([][]byte{header, item.sealed}, file.bytes)
		s.files.release(h)
	}
	if err != nil {
		s.opts.Logger.Warn("could not store a fetched slice; it is fetched again when needed", "err", err)
		if file.bytes == 0 {
			_ = s.removeFile(name) // an empty file is no harm
		}
		c.mu.Lock()
		c.active = nil
		c.mu.Unlock()
		return
	}
	added := int64(len(header) + len(item.sealed))
	c.mu.Lock()
	c.index[item.sliceKey] = sliceAt{file, uint32(file.bytes), uint32(len(item.sealed))}
	file.keys = append(file.keys, item.sliceKey)
	file.bytes += added
	file.lastUse.Store(s.uses.Add(1))
	c.files[file.id] = file
	c.active = file
	if file.bytes >= sliceFileBytes {
		c.active = nil
	}
	c.mu.Unlock()
	s.mu.Lock()
	s.cleanBytes += added
	s.mu.Unlock()
}

func (s *Store) endSliceFile() {
	s.slices.mu.Lock()
	defer s.slices.mu.Unlock()
	s.slices.active = nil
}

// findSliceFiles lists the slice files of earlier opens; the cleaner indexes them.
func (s *Store) findSliceFiles(names []string) error {
	c := s.slices
	for _, name := range names {
		id, ok := parseName(name, slicesPrefix)
		if !ok {
			continue
		}
		h, err := s.files.acquire(s.path(name), os.O_RDWR)
		if err != nil {
			return err
		}
		size, err := h.Size()
		s.files.release(h)
		if err != nil {
			return err
		}
		file := &sliceFile{id: id, bytes: size}
		file.lastUse.Store(s.uses.Add(1))
		c.files[id] = file
		c.nextID = max(c.nextID, id+1)
		s.cleanBytes += size
	}
	return nil
}

// indexSliceFiles reads the headers in the slice files of earlier opens. A
// damaged header ends its file.
func (s *Store) indexSliceFiles() {
	c := s.slices
	defer close(c.indexed)
	c.mu.Lock()
	var found []*sliceFile
	for _, file := range c.files {
		found = append(found, file)
	}
	c.mu.Unlock()
	for _, file := range found {
		select {
		case <-s.stop:
			return
		default:
			s.indexSliceFile(file)
		}
	}
}

func (s *Store) indexSliceFile(file *sliceFile) {
	h, err := s.files.acquire(s.slicesPath(file.id), os.O_RDWR)
	if err != nil {
		return // dropped meanwhile
	}
	defer s.files.release(h)
	header := make([]byte, sliceHeaderBytes)
	for off := int64(0); off+sliceHeaderBytes <= file.bytes; {
		if readFull(h, header, off) != nil {
			return
		}
		key, length, err := decodeSliceHeader(header)
		if err != nil {
			return
		}
		end := off + sliceHeaderBytes + int64(4*blockCount(int(length))) + int64(length)
		if end > file.bytes {
			return
		}
		s.slices.add(key, sliceAt{file, uint32(off), length})
		off = end
	}
}

// add enters a slice of an earlier open, unless its file was dropped meanwhile.
func (c *sliceCache) add(key sliceKey, at sliceAt) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.files[at.file.id] == at.file {
		c.index[key] = at
		at.file.keys = append(at.file.keys, key)
	}
}

// oldest returns the least recently used slice file that is not to be kept, nil if there is none.
func (c *sliceCache) oldest(keep func(*sliceFile) bool) (oldest *sliceFile) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, file := range c.files {
		if (oldest == nil || file.lastUse.Load() < oldest.lastUse.Load()) && !keep(file) {
			oldest = file
		}
	}
	return oldest
}

// removeSliceFile removes a slice file and its slices. Callers hold cleanMu.
func (s *Store) removeSliceFile(file *sliceFile) error {
	c := s.slices
	c.mu.Lock()
	delete(c.files, file.id)
	if c.active == file {
		c.active = nil
	}
	for _, key := range file.keys {
		if c.index[key].file == file {
			delete(c.index, key)
		}
	}
	c.mu.Unlock()
	s.mu.Lock()
	s.cleanBytes -= file.bytes
	s.mu.Unlock()
	return s.removeFile(s.slicesPath(file.id))
}

// dropMemory forgets the slices in memory and those that wait to be written,
// but for those of the stripes that are to be kept.
func (c *sliceCache) dropMemory(keep map[[16]byte]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(keep) == 0 {
		c.memory.Purge()
		c.round++
		return
	}
	for _, key := range c.memory.Keys() {
		if !keep[key.stripe] {
			c.memory.Remove(key)
		}
	}
}

func (c *sliceCache) memoryBytes() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.memorySum
}
