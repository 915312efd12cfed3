package volume

// countTable holds a small count for each of very many inodes: little more than a byte each where their numbers are
// near each other, as they are of inodes that were made together. The zero value is empty.
type countTable struct {
	pages map[uint64]*countPage
	large map[Ino]uint64 // counts that a byte does not hold
}

const (
	countsPerPage = 64
	countIsLarge  = 255
)

type countPage struct {
	counts [countsPerPage]uint8
	used   uint8 // that are not 0
}

func (c *countTable) get(ino Ino) uint64 {
	p := c.pages[uint64(ino)/countsPerPage]
	if p == nil {
		return 0
	}
	n := p.counts[uint64(ino)%countsPerPage]
	if n == countIsLarge {
		return c.large[ino]
	}
	return uint64(n)
}

func (c *countTable) set(ino Ino, n uint64) {
	at := uint64(ino) / countsPerPage
	p := c.pages[at]
	if p == nil {
		if n == 0 {
			return
		}
		if c.pages == nil {
			c.pages, c.large = make(map[uint64]*countPage), make(map[Ino]uint64)
		}
		p = new(countPage)
		c.pages[at] = p
	}
	slot := &p.counts[uint64(ino)%countsPerPage]
	if *slot == countIsLarge {
		delete(c.large, ino)
	}
	switch {
	case *slot == 0 && n > 0:
		p.used++
	case *slot > 0 && n == 0:
		p.used--
	}
	if n >= countIsLarge {
		*slot = countIsLarge
		c.large[ino] = n
		return
	}
	*slot = uint8(n)
	if p.used == 0 {
		delete(c.pages, at)
	}
}
