package p2p

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

const (
	// bodyPieceBytes is how much of a body moves before the idle timeout
	// starts anew.
	bodyPieceBytes = 1 << 20
	// bodyTrustBytes is how much memory a frame gets on its word; larger
	// bodies grow as they arrive, so that a claim costs the one who makes it.
	bodyTrustBytes = 8 << 20
	// inlineBodyBytes and smaller bodies are written together with their
	// message.
	inlineBodyBytes = 16 << 10
)

// writeFrame writes a varint length, the message and the raw body. step is
// called before each write, to move the deadline on.
func writeFrame(w io.Writer, msg proto.Message, body []byte, step func()) error {
	size := proto.Size(msg)
	if size > MessageBytesMax {
		return fmt.Errorf("%w: message of %d bytes, at most %d", ErrTooLarge, size, MessageBytesMax)
	}
	inline := 0
	if len(body) <= inlineBodyBytes {
		inline = len(body)
	}
	buf := make([]byte, 0, binary.MaxVarintLen32+size+inline)
	buf = binary.AppendUvarint(buf, uint64(size))
	buf, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(buf, msg)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	buf = append(buf, body[:inline]...)
	step()
	if _, err := w.Write(buf); err != nil {
		return err
	}
	for body = body[inline:]; len(body) > 0; {
		n := min(len(body), bodyPieceBytes)
		step()
		if _, err := w.Write(body[:n]); err != nil {
			return err
		}
		body = body[n:]
	}
	return nil
}

// readMessage reads a varint length and the message into msg. Messages above
// bytesMax are ErrTooLarge.
func readMessage(r *bufio.Reader, msg proto.Message, bytesMax int) error {
	size, err := binary.ReadUvarint(r)
	if err != nil {
		return err
	}
	if size > uint64(bytesMax) {
		return fmt.Errorf("%w: message of %d bytes, at most %d", ErrTooLarge, size, bytesMax)
	}
	buf, err := r.Peek(int(size)) // messages are mostly smaller than the buffer
	if errors.Is(err, bufio.ErrBufferFull) {
		buf = make([]byte, size)
		_, err = io.ReadFull(r, buf)
	} else if err == nil {
		_, err = r.Discard(int(size))
	}
	if err != nil {
		return noEOF(err)
	}
	if err := proto.Unmarshal(buf, msg); err != nil {
		return fmt.Errorf("decode message: %w", err)
	}
	return nil
}

// readBody reads n raw bytes into buf where they fit, else into a buffer of its
// own. step is called before each read, to move the deadline on.
func readBody(r io.Reader, n uint64, buf []byte, step func()) ([]byte, error) {
	if n > BodyBytesMax {
		return nil, fmt.Errorf("%w: body of %d bytes, at most %d", ErrTooLarge, n, BodyBytesMax)
	}
	if n == 0 {
		return nil, nil
	}
	body := buf[:min(n, uint64(cap(buf)))]
	if uint64(len(body)) < n {
		body = make([]byte, min(n, bodyTrustBytes))
	}
	for done := 0; ; {
		for done < len(body) {
			piece := body[done:min(done+bodyPieceBytes, len(body))]
			step()
			if _, err := io.ReadFull(r, piece); err != nil {
				return nil, noEOF(err)
			}
			done += len(piece)
		}
		if uint64(done) == n {
			return body, nil
		}
		grown := make([]byte, min(n, 2*uint64(done)))
		copy(grown, body)
		body = grown
	}
}

// noEOF turns an end in the middle of something into io.ErrUnexpectedEOF.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
