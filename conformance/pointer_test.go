package conformance

import "unsafe"

// pointer returns the address of a slice's first element, for system calls that x/sys does not have.
func pointer[E any](s []E) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(s)) }
