package metastore

// PublicExtent returns the tree key and the value by which the log publishes
// an extent that has a remote place.
func PublicExtent(ino Ino, e Extent) (key, value []byte) {
	e.Local.Length = 0 // no local place: the rest of Local is not encoded
	return extentKey(ino, e.Off), encodeExtent(e)
}

// DeleteExtentAt removes whatever extent starts at off. The key counts as
// changed even when there was none.
func (t *Txn) DeleteExtentAt(ino Ino, off uint64) error { return t.DeleteTree(extentKey(ino, off)) }
