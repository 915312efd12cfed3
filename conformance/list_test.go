package conformance

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// entry is what getdents64(2) says of one name.
type entry struct {
	name   string
	ino    uint64
	cookie int64 // where a listing goes on after it
	kind   uint8 // DT_*
}

// listSome reads one buffer of a directory; none at its end.
func listSome(fd, size int) ([]entry, error) {
	buf := make([]byte, size)
	n, err := unix.Getdents(fd, buf)
	if err != nil {
		return nil, err
	}
	var out []entry
	for buf = buf[:n]; len(buf) > 0; {
		length := binary.NativeEndian.Uint16(buf[16:])
		name := buf[19:length]
		for i, c := range name {
			if c == 0 {
				name = name[:i]
				break
			}
		}
		out = append(out, entry{
			string(name), binary.NativeEndian.Uint64(buf), int64(binary.NativeEndian.Uint64(buf[8:])), buf[18],
		})
		buf = buf[length:]
	}
	return out, nil
}

// listRest reads a directory from where it is to the end.
func (t *T) listRest(fd, size int) []entry {
	var out []entry
	for {
		some, err := listSome(fd, size)
		t.must(err)
		if len(some) == 0 {
			return out
		}
		out = append(out, some...)
	}
}

func (t *T) list(name string) []entry {
	fd := t.open(name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	return t.listRest(fd, 32<<10)
}
