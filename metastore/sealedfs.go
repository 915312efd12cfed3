package metastore

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// sealedFS encrypts the content of the files that Pebble writes. Names and
// directories are as they are underneath. FORMAT.md, "Metastore files":
//
//	file   = header ‖ slot 0 ‖ slot 1 ‖ …
//	header = magic ‖ file id (16) ‖ nonce (12) ‖ file key sealed with the device key (32 + 16)
//	slot   = offset u64 ‖ synced u32 ‖ length u32 ‖ sealed bytes (length ‖ tag 16)
//
// Slots lie slotBytes apart and hold up to blockBytes of the file. A file key
// is used for one file and slot i is sealed once, with nonce i: files only
// grow, and what was synced is never rewritten. So a sync in the middle of a
// block ends its slot short, and the next byte opens a new slot. Only files
// that are synced while they grow (manifests) have short slots before the
// last; only those need an index of their slots.
//
// synced tells what a sync had covered when the slot was written: 0 before the
// first sync, else 1 + the number of slots. A crash may lose or tear any slot that no sync covered: reading
// stops before it, as at the end of the file. A bad slot that a later slot
// knows to be synced is corruption.
type sealedFS struct {
	vfs.FS
	aead       cipher.AEAD  // device key
	beforeSync func() error // write-ahead rule
	state      *failState
	buffers    *sync.Pool // of *slotBuffer
	mayPark    bool       // a write after a failed one may wait for Close
}

const (
	fileMagic   = "DeFSmst1"
	fileIDBytes = 16
	keyBytes    = 32
	nonceBytes  = 12
	tagBytes    = 16
	headerBytes = len(fileMagic) + fileIDBytes + nonceBytes + keyBytes + tagBytes

	blockBytes      = 4 << 10
	slotHeaderBytes = 8 + 4 + 4
	slotBytes       = slotHeaderBytes + blockBytes + tagBytes
)

var (
	_ vfs.FS   = (*sealedFS)(nil)
	_ vfs.File = (*sealedWriter)(nil)
	_ vfs.File = (*sealedReader)(nil)
	_ vfs.File = (*plainDir)(nil)
)

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func newSealedFS(inner vfs.FS, key [32]byte, beforeSync func() error) (*sealedFS, error) {
	aead, err := newGCM(key[:])
	if err != nil {
		return nil, err
	}
	return &sealedFS{
		FS: inner, aead: aead, beforeSync: beforeSync, state: newFailState(), mayPark: true,
		buffers: &sync.Pool{New: func() any { return new(slotBuffer) }},
	}, nil
}

// foreground returns the same file system for callers that must not wait
// after a failed write.
func (fs *sealedFS) foreground() *sealedFS {
	out := *fs
	out.mayPark = false
	return &out
}

func (fs *sealedFS) check() error { return fs.state.check(fs.mayPark) }

// writeFailed stops all writing and names the file. For callers that must not
// wait a full disk is no reason to stop: they try again another time.
func (fs *sealedFS) writeFailed(op, name string, err error) error {
	noSpace := isNoSpace(err)
	err = fmt.Errorf("%s %s: %w", op, fs.PathBase(name), err)
	if fs.mayPark || !noSpace {
		fs.state.fail(err)
	}
	return err
}

// waitRoom says, after err, that the disk was full and it is time to try again.
func (fs *sealedFS) waitRoom(err error) bool {
	return isNoSpace(err) && fs.mayPark && fs.state.waitRoom()
}

// newFileHeader draws a file key and returns the header that carries it.
func (fs *sealedFS) newFileHeader() (header []byte, aead cipher.AEAD, err error) {
	var key [keyBytes]byte
	rand.Read(key[:])
	header = make([]byte, len(fileMagic)+fileIDBytes+nonceBytes, headerBytes)
	copy(header, fileMagic)
	rand.Read(header[len(fileMagic):])
	identity, nonce := header[:len(fileMagic)+fileIDBytes], header[len(fileMagic)+fileIDBytes:]
	header = fs.aead.Seal(header, nonce, key[:], identity)
	aead, err = newGCM(key[:])
	return header, aead, err
}

func (fs *sealedFS) openFileHeader(header []byte) (cipher.AEAD, error) {
	if len(header) != headerBytes || !bytes.HasPrefix(header, []byte(fileMagic)) {
		return nil, fmt.Errorf("header: %w", ErrCorrupt)
	}
	identity, rest := header[:len(fileMagic)+fileIDBytes], header[len(fileMagic)+fileIDBytes:]
	key, err := fs.aead.Open(nil, rest[:nonceBytes], rest[nonceBytes:], identity)
	if err != nil {
		return nil, fmt.Errorf("header does not open with this device's key: %w", ErrCorrupt)
	}
	return newGCM(key)
}

func (fs *sealedFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if err := fs.check(); err != nil {
		return nil, err
	}
	header, aead, err := fs.newFileHeader()
	if err != nil {
		return nil, fs.writeFailed("create", name, err)
	}
	inner, err := fs.FS.Create(name, category)
	for err != nil && fs.waitRoom(err) {
		inner, err = fs.FS.Create(name, category)
	}
	if err != nil {
		return nil, fs.writeFailed("create", name, err)
	}
	return &sealedWriter{
		File: inner, fs: fs, name: name, aead: aead,
		block: make([]byte, 0, blockBytes),
		out:   append(make([]byte, 0, len(header)+slotBytes), header...),
	}, nil
}

func (fs *sealedFS) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	inner, err := fs.FS.Open(name, opts...)
	if err != nil {
		return nil, err
	}
	f, err := fs.newSealedReader(inner)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", fs.PathBase(name), err), inner.Close())
	}
	return f, nil
}

// OpenReadWrite is for Pebble's shared cache, which is not used.
func (fs *sealedFS) OpenReadWrite(name string, _ vfs.DiskWriteCategory, _ ...vfs.OpenOption) (vfs.File, error) {
	return nil, fmt.Errorf("open %s for rewriting: %w", fs.PathBase(name), errors.ErrUnsupported)
}

// ReuseForWrite removes oldname and makes newname: a sealed file is never
// rewritten.
func (fs *sealedFS) ReuseForWrite(oldname, newname string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if err := fs.Remove(oldname); err != nil {
		return nil, err
	}
	return fs.Create(newname, category)
}

func (fs *sealedFS) OpenDir(name string) (vfs.File, error) {
	inner, err := fs.FS.OpenDir(name)
	if err != nil {
		return nil, err
	}
	return &plainDir{File: inner, fs: fs, name: name}, nil
}

// Remove refuses after a failure: what Pebble believes obsolete may be what
// the next start needs.
func (fs *sealedFS) Remove(name string) error {
	if err := fs.state.error(); err != nil {
		return err
	}
	return fs.FS.Remove(name)
}

func (fs *sealedFS) RemoveAll(name string) error {
	if err := fs.state.error(); err != nil {
		return err
	}
	return fs.FS.RemoveAll(name)
}

func (fs *sealedFS) Rename(oldname, newname string) error {
	if err := fs.check(); err != nil {
		return err
	}
	if err := fs.FS.Rename(oldname, newname); err != nil {
		return fs.writeFailed("rename", oldname, err)
	}
	return nil
}

func (fs *sealedFS) Link(oldname, newname string) error {
	if err := fs.check(); err != nil {
		return err
	}
	return fs.FS.Link(oldname, newname)
}

func (fs *sealedFS) Stat(name string) (vfs.FileInfo, error) {
	info, err := fs.FS.Stat(name)
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return info, err
	}
	f, err := fs.Open(name)
	if err != nil {
		return nil, err
	}
	info, err = f.Stat()
	return info, errors.Join(err, f.Close())
}

func (fs *sealedFS) Unwrap() vfs.FS { return fs.FS }

// sizedInfo shows the size of a file's content.
type sizedInfo struct {
	vfs.FileInfo
	size int64
}

func (i sizedInfo) Size() int64 { return i.size }

// plainDir is a directory. Pebble panics when syncing one fails; writing is
// stopped instead.
type plainDir struct {
	vfs.File
	fs   *sealedFS
	name string
}

func (d *plainDir) Sync() error {
	if err := d.fs.state.error(); err != nil {
		return nil // nothing that is written now counts any more
	}
	if err := d.File.Sync(); err != nil {
		d.fs.writeFailed("sync directory", d.name, err)
	}
	return nil
}

// sealedWriter is a file that grows.
type sealedWriter struct {
	vfs.File
	fs   *sealedFS
	name string
	aead cipher.AEAD

	block  []byte // bytes of the slot that is not sealed yet
	out    []byte // header and slots that are sealed but not written yet
	pad    int    // bytes that the last slot was short, before the next one
	size   int64  // bytes in sealed slots
	slots  uint32 // number of sealed slots
	synced uint32 // 1 + number of slots that a sync covered; 0 before the first
}

// outBytesMax bounds what is sealed but not written.
const outBytesMax = 32 * slotBytes

func slotNonce(slot uint32) []byte {
	nonce := make([]byte, nonceBytes)
	binary.BigEndian.PutUint32(nonce[nonceBytes-4:], slot)
	return nonce
}

func (f *sealedWriter) Write(p []byte) (int, error) {
	if err := f.fs.check(); err != nil {
		return 0, err
	}
	n := len(p)
	for len(p) > 0 {
		take := min(len(p), blockBytes-len(f.block))
		f.block = append(f.block, p[:take]...)
		p = p[take:]
		if len(f.block) == blockBytes {
			if err := f.seal(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// seal ends the current slot.
func (f *sealedWriter) seal() error {
	if len(f.block) == 0 {
		return nil
	}
	if f.slots == 1<<32-2 {
		return f.fs.writeFailed("write", f.name, errors.New("file too large"))
	}
	f.out = append(f.out, make([]byte, f.pad)...)
	at := len(f.out)
	f.out = binary.BigEndian.AppendUint64(f.out, uint64(f.size))
	f.out = binary.BigEndian.AppendUint32(f.out, f.synced)
	f.out = binary.BigEndian.AppendUint32(f.out, uint32(len(f.block)))
	header := f.out[at : at+slotHeaderBytes : at+slotHeaderBytes]
	f.out = f.aead.Seal(f.out, slotNonce(f.slots), f.block, header)
	f.size += int64(len(f.block))
	f.pad = blockBytes - len(f.block)
	f.slots++
	f.block = f.block[:0]
	if len(f.out) >= outBytesMax {
		return f.flush()
	}
	return nil
}

func (f *sealedWriter) flush() error {
	if len(f.out) == 0 {
		return nil
	}
	for rest := f.out; len(rest) > 0; {
		n, err := f.File.Write(rest)
		rest = rest[n:]
		if err != nil && !f.fs.waitRoom(err) {
			return f.fs.writeFailed("write", f.name, err)
		}
	}
	f.out = f.out[:0]
	return nil
}

// Sync ends the current slot, flushes the journal, then the file.
func (f *sealedWriter) Sync() error {
	if err := f.fs.check(); err != nil {
		return err
	}
	if err := errors.Join(f.seal(), f.flush()); err != nil {
		return err
	}
	if err := f.fs.beforeSync(); err != nil {
		return f.fs.writeFailed("sync", f.name, err)
	}
	if err := f.File.Sync(); err != nil {
		return f.fs.writeFailed("sync", f.name, err)
	}
	f.synced = f.slots + 1
	return nil
}

func (f *sealedWriter) SyncData() error { return f.Sync() }

// SyncTo promises nothing, by its contract.
func (f *sealedWriter) SyncTo(int64) (fullSync bool, err error) { return false, nil }

func (f *sealedWriter) Close() error {
	var err error
	if f.fs.state.error() == nil {
		err = errors.Join(f.seal(), f.flush())
	}
	return errors.Join(err, f.File.Close())
}

func (f *sealedWriter) Stat() (vfs.FileInfo, error) {
	info, err := f.File.Stat()
	if err != nil {
		return nil, err
	}
	return sizedInfo{FileInfo: info, size: f.size + int64(len(f.block))}, nil
}

func (f *sealedWriter) Read([]byte) (int, error)           { return 0, errors.ErrUnsupported }
func (f *sealedWriter) ReadAt([]byte, int64) (int, error)  { return 0, errors.ErrUnsupported }
func (f *sealedWriter) WriteAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
func (f *sealedWriter) Preallocate(int64, int64) error     { return nil }
func (f *sealedWriter) Prefetch(int64, int64) error        { return nil }

// Fd hides the descriptor: Pebble must not go around this file.
func (f *sealedWriter) Fd() uintptr { return vfs.InvalidFd }
