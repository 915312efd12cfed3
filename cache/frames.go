package cache

import (
	"errors"
	"fmt"
)

// frameReader reads frames of one segment in order, through one window.
type frameReader struct {
	file   File
	seg    *segment
	window []byte
	at     int64 // offset of window in the file
	valid  int   // bytes of window that were read
	plain  []byte
}

const windowBytes = 64 << 10

func newFrameReader(f File, seg *segment) *frameReader {
	return &frameReader{file: f, seg: seg, window: make([]byte, windowBytes)}
}

// failed turns invalid bytes into corruption and leaves other errors alone.
func (r *frameReader) failed(corrupt func(string) (position, error), err error) (position, error) {
	if errors.Is(err, errInvalid) {
		return corrupt(err.Error())
	}
	return position{}, fmt.Errorf("cache: replay segment %d: %w", r.seg.id, err)
}

// bytes returns n bytes at off, valid until the next call. Zeros stand for what
// lies beyond the end of the file.
func (r *frameReader) bytes(off int64, n int) ([]byte, error) {
	if off < r.at || off+int64(n) > r.at+int64(r.valid) {
		if n > len(r.window) {
			r.window = make([]byte, n)
		}
		if err := readFull(r.file, r.window, off); err != nil {
			return nil, err
		}
		r.at, r.valid = off, len(r.window)
	}
	return r.window[off-r.at:][:n], nil
}

func (r *frameReader) header(off int64) (frameHeader, error) {
	b, err := r.bytes(off, frameBytes)
	if err != nil {
		return frameHeader{}, err
	}
	return decodeFrameHeader(r.seg.keys.aead, r.seg.id, off, b)
}

// meta opens the meta of the frame h at off; valid until the next call.
func (r *frameReader) meta(off int64, h frameHeader) ([]byte, error) {
	b, err := r.bytes(h.metaOffset(off), int(h.MetaLength))
	if err != nil {
		return nil, err
	}
	n, aad := makeNonce(purposeMeta, h.MetaNonce), metaAAD(h.Seq)
	r.plain = append(append(r.plain[:0], b...), h.MetaTag[:]...)
	meta, err := r.seg.keys.aead.Open(r.plain[:0], n[:], r.plain, aad[:])
	if err != nil {
		return nil, fmt.Errorf("meta of record %d %w", h.Seq, errInvalid)
	}
	return meta, nil
}

// verifyData reads the data of the frame h at off and opens each block.
func (r *frameReader) verifyData(off int64, h frameHeader, scratch []byte) error {
	ref := Ref{Segment: r.seg.id, Offset: uint32(h.dataOffset(off)), Length: h.DataLength, Nonce: h.DataNonce}
	err := openBlocks(r.file, r.seg.keys.aead, ref, 0, int(h.DataLength), scratch, nil)
	if errors.Is(err, errInvalid) {
		return fmt.Errorf("data of record %d %w", h.Seq, errInvalid)
	}
	return err
}

// follow verifies whole frames from off on and returns the end of the last good one.
func (r *frameReader) follow(end position, off int64, scratch []byte) (position, error) {
	for {
		h, err := r.header(off)
		if err == nil && (h.Seq != end.Seq+1 || h.Prev != end.Chain) {
			return end, nil
		}
		if err == nil {
			err = r.verifyData(off, h, scratch)
		}
		if err == nil {
			_, err = r.meta(off, h)
		}
		if errors.Is(err, errInvalid) {
			return end, nil
		}
		if err != nil {
			return end, err
		}
		off = h.end(off)
		end = position{Seq: h.Seq, Segment: r.seg.id, Offset: off, Chain: h.Chain}
	}
}
