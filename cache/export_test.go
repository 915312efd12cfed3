package cache

// WaitIndexed waits until the slices of earlier opens are indexed.
func (s *Store) WaitIndexed() { <-s.slices.indexed }
