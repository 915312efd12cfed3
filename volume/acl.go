package volume

import "encoding/binary"

// acl is a POSIX.1e access control list in the order of its extended attribute, whose form Linux fixes
// (include/uapi/linux/posix_acl_xattr.h): a 32-bit version, then per entry 16-bit tag, 16-bit permissions and
// 32-bit id, all little-endian.
type acl []aclEntry

type aclEntry struct {
	tag, perm uint16
	id        uint32 // of tagUser and tagGroup
}

const (
	aclVersion    = 2
	aclEntryBytes = 8
	aclEntriesMax = (xattrValueMaxBytes - 4) / aclEntryBytes

	tagUserObj  = 0x01
	tagUser     = 0x02
	tagGroupObj = 0x04
	tagGroup    = 0x08
	tagMask     = 0x10
	tagOther    = 0x20
)

// parseACL decodes and checks an ACL; empty for a value without entries, Invalid for what no kernel makes.
func parseACL(b []byte) (acl, error) {
	if len(b) == 0 {
		return nil, nil
	}
	if len(b) < 4 || (len(b)-4)%aclEntryBytes != 0 || len(b) > 4+aclEntriesMax*aclEntryBytes || binary.LittleEndian.Uint32(b) != aclVersion {
		return nil, Invalid
	}
	var a acl
	for b = b[4:]; len(b) > 0; b = b[aclEntryBytes:] {
		a = append(a, aclEntry{
			tag:  binary.LittleEndian.Uint16(b),
			perm: binary.LittleEndian.Uint16(b[2:]),
			id:   binary.LittleEndian.Uint32(b[4:]),
		})
	}
	return a, a.check()
}

// check accepts one each of owner, group and others, and one mask where users or groups are named.
func (a acl) check() error {
	if len(a) == 0 {
		return nil
	}
	count := make(map[uint16]int)
	for _, e := range a {
		switch e.tag {
		case tagUserObj, tagUser, tagGroupObj, tagGroup, tagMask, tagOther:
		default:
			return Invalid
		}
		if e.perm > 7 {
			return Invalid
		}
		count[e.tag]++
	}
	named := count[tagUser]+count[tagGroup] > 0
	if count[tagUserObj] != 1 || count[tagGroupObj] != 1 || count[tagOther] != 1 || count[tagMask] > 1 || named && count[tagMask] != 1 {
		return Invalid
	}
	return nil
}

func (a acl) marshal() []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, 4+len(a)*aclEntryBytes), aclVersion)
	for _, e := range a {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// minimal reports whether the list says no more than a mode.
func (a acl) minimal() bool { return len(a) == 3 }

// groupClass returns the entry that stands for the group bits of the mode: the mask where there is one.
func (a acl) groupClass() *aclEntry {
	var group *aclEntry
	for i := range a {
		switch a[i].tag {
		case tagMask:
			return &a[i]
		case tagGroupObj:
			group = &a[i]
		}
	}
	return group
}

func (a acl) find(tag uint16) *aclEntry {
	for i := range a {
		if a[i].tag == tag {
			return &a[i]
		}
	}
	return nil
}

// mode returns the nine permission bits that agree with the list.
func (a acl) mode() uint32 {
	return uint32(a.find(tagUserObj).perm)<<6 | uint32(a.groupClass().perm)<<3 | uint32(a.find(tagOther).perm)
}

// setMode makes the list agree with a mode.
func (a acl) setMode(mode uint32) {
	a.find(tagUserObj).perm = uint16(mode >> 6 & 7)
	a.groupClass().perm = uint16(mode >> 3 & 7)
	a.find(tagOther).perm = uint16(mode & 7)
}

// limit takes away what the mode asked for at creation does not grant.
func (a acl) limit(mode uint32) {
	a.find(tagUserObj).perm &= uint16(mode >> 6 & 7)
	a.groupClass().perm &= uint16(mode >> 3 & 7)
	a.find(tagOther).perm &= uint16(mode & 7)
}
