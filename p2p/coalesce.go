package p2p

import (
	"bufio"
	"context"
	"net"
	"sync"

	pool "github.com/libp2p/go-buffer-pool"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
)

const (
	tlsRecordBytes    = 16 << 10
	tlsOverheadBytes  = 64 // of one record, at most
	socketReadBytes   = 64 << 10
	muxerMessageBytes = 256 << 10 // what yamux writes at once, at most
)

// coalescingTLS is libp2p's TLS over sockets that are read and written in
// large pieces: crypto/tls does one system call for each record of 16 KiB,
// which costs more than its cryptography.
type coalescingTLS struct {
	*libp2ptls.Transport
}

func newCoalescingTLS(id protocol.ID, key crypto.PrivKey, muxers []upgrader.StreamMuxer) (*coalescingTLS, error) {
	t, err := libp2ptls.New(id, key, muxers)
	if err != nil {
		return nil, err
	}
	return &coalescingTLS{t}, nil
}

func (t *coalescingTLS) SecureInbound(ctx context.Context, insecure net.Conn, p peer.ID) (sec.SecureConn, error) {
	s := newSocket(insecure)
	c, err := t.Transport.SecureInbound(ctx, s, p)
	if err != nil {
		return nil, err
	}
	return &coalescingConn{c, s}, nil
}

func (t *coalescingTLS) SecureOutbound(ctx context.Context, insecure net.Conn, p peer.ID) (sec.SecureConn, error) {
	s := newSocket(insecure)
	c, err := t.Transport.SecureOutbound(ctx, s, p)
	if err != nil {
		return nil, err
	}
	return &coalescingConn{c, s}, nil
}

// coalescingConn writes all records of one Write together. yamux has one
// writer, so holding them back delays nobody.
type coalescingConn struct {
	sec.SecureConn
	socket *socket
}

func (c *coalescingConn) Write(p []byte) (int, error) {
	if len(p) <= tlsRecordBytes {
		return c.SecureConn.Write(p)
	}
	c.socket.hold(len(p) + (len(p)/tlsRecordBytes+2)*tlsOverheadBytes)
	n, err := c.SecureConn.Write(p)
	if ferr := c.socket.release(); err == nil && ferr != nil {
		return 0, ferr
	}
	return n, err
}

// socket reads ahead, and gathers what is written between hold and release.
type socket struct {
	net.Conn
	r *bufio.Reader

	mu      sync.Mutex
	held    bool
	pending []byte // from the buffer pool while held
}

func newSocket(c net.Conn) *socket {
	return &socket{Conn: c, r: bufio.NewReaderSize(c, socketReadBytes)}
}

func (s *socket) Read(p []byte) (int, error) { return s.r.Read(p) }

func (s *socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held {
		s.pending = append(s.pending, p...)
		return len(p), nil
	}
	return s.Conn.Write(p)
}

func (s *socket) hold(bytesMax int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held, s.pending = true, pool.Get(bytesMax)[:0]
}

func (s *socket) release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.Conn.Write(s.pending)
	pool.Put(s.pending)
	s.held, s.pending = false, nil
	return err
}
