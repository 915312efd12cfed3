package p2p

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/zeebo/blake3"
	"google.golang.org/protobuf/proto"

	"github.com/defs-fs/defs/p2p/wire"
)

const (
	memberFileMagic    = "DEFSMBR1"
	memberFileBytesMax = 64 << 20
	checksumBytes      = 32
)

// encodeMemberFile is magic (8) ‖ MemberFile ‖ BLAKE3 of both (32).
// FORMAT.md, "Member file".
func encodeMemberFile(file *wire.MemberFile) ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte(memberFileMagic), file)
	if err != nil {
		return nil, fmt.Errorf("encode member file: %w", err)
	}
	sum := blake3.Sum256(b)
	return append(b, sum[:]...), nil
}

func decodeMemberFile(b []byte) (*wire.MemberFile, error) {
	if len(b) < len(memberFileMagic)+checksumBytes || !bytes.HasPrefix(b, []byte(memberFileMagic)) {
		return nil, errors.New("decode member file: it does not start with " + memberFileMagic)
	}
	b, sum := b[:len(b)-checksumBytes], b[len(b)-checksumBytes:]
	if want := blake3.Sum256(b); !bytes.Equal(sum, want[:]) {
		return nil, errors.New("decode member file: wrong checksum")
	}
	file := new(wire.MemberFile)
	if err := proto.Unmarshal(b[len(memberFileMagic):], file); err != nil {
		return nil, fmt.Errorf("decode member file: %w", err)
	}
	if len(file.Members) > membersMax {
		return nil, fmt.Errorf("decode member file: %d members, at most %d", len(file.Members), membersMax)
	}
	return file, nil
}

// loadMembers fills the table from the last run and returns where it listened.
// A file that cannot be read costs a bootstrap, no more: it is said and left.
func (h *Host) loadMembers() (listen []string) {
	file, err := readMemberFile(h.o.memberPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		h.log.Error("The member file is unusable; members will be asked for at the bootstrap addresses.", "err", err)
		return nil
	}
	now := time.Now()
	for _, said := range file.Members {
		seen := said.Seen
		m, err := h.table.learn(said, now)
		if err != nil || m == nil {
			continue // expired since, or of a pool that this host has left
		}
		if seen > 0 {
			m.seen = time.Unix(seen, 0)
		}
	}
	h.table.dirty = false
	return file.Listen
}

func readMemberFile(path string) (*wire.MemberFile, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if info.Size() > memberFileBytesMax {
		return nil, fmt.Errorf("member file: %w: %d bytes", ErrTooLarge, info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return decodeMemberFile(b)
}

// saveMembers writes the table if it has changed.
func (h *Host) saveMembers() error {
	h.table.mu.Lock()
	if !h.table.dirty {
		h.table.mu.Unlock()
		return nil
	}
	h.table.dirty = false
	file := &wire.MemberFile{Listen: h.bound}
	for _, m := range h.table.byID {
		said := proto.CloneOf(m.said.wire)
		said.Seen = unixOrZero(m.seen)
		file.Members = append(file.Members, said)
	}
	h.table.mu.Unlock()
	b, err := encodeMemberFile(file)
	if err == nil {
		err = WriteFile(h.o.memberPath(), b)
	}
	if err != nil {
		h.table.mu.Lock()
		h.table.dirty = true
		h.table.mu.Unlock()
		return fmt.Errorf("save members: %w", err)
	}
	return nil
}
