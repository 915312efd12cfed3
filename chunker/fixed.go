package chunker

import "iter"

// Range is a run of bytes of a file.
type Range struct {
	Off int64 // from the start of the file
	Len int   // bytes, at least 1
}

// FixedCut cuts [off, off+length) at the multiples of sizeBytes, so that
// rewriting a part of a file touches only the slices it lies in. Together the
// ranges cover it exactly, in order; only the first and last may be shorter
// than sizeBytes. off >= 0 and sizeBytes > 0; length <= 0 gives no range.
func FixedCut(off, length int64, sizeBytes int) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		size := int64(sizeBytes)
		for length > 0 {
			n := min(size-off%size, length)
			if !yield(Range{Off: off, Len: int(n)}) {
				return
			}
			off += n
			length -= n
		}
	}
}
