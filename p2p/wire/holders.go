package wire

import "google.golang.org/protobuf/proto"

// CurrentHolders returns the holder list with the moves applied, oldest move
// first. It shares no memory with r.
func (r *IndexRecord) CurrentHolders() []*Holder {
	holders := make([]*Holder, 0, len(r.GetHolders()))
	for _, h := range r.GetHolders() {
		holders = append(holders, proto.Clone(h).(*Holder))
	}
	for _, move := range r.GetMoves() {
		for _, h := range holders {
			if h.Index == move.Index {
				h.move(move)
			}
		}
	}
	return holders
}

func (h *Holder) move(m *HolderMove) {
	if m.Mirror {
		h.Mirror = m.To
	} else {
		h.Primary = m.To
	}
}

// Move appends a change of holder after checking that it fits the current
// holders: what is at move.From holds the shard in that role, and move.To holds
// no shard of the stripe. A later move of the same role replaces an earlier
// one. It returns false and changes nothing when the move does not fit.
func (r *IndexRecord) Move(move *HolderMove) bool {
	fits := false
	for _, h := range r.CurrentHolders() {
		if move.To != "" && (h.Primary == move.To || h.Mirror == move.To) {
			return false
		}
		if h.Index == move.Index {
			fits = move.Mirror && h.Mirror == move.From || !move.Mirror && h.Primary == move.From && move.To != ""
		}
	}
	if !fits || len(r.Moves) >= movesMax {
		return false
	}
	kept := r.Moves[:0:0]
	for _, m := range r.Moves {
		if m.Index != move.Index || m.Mirror != move.Mirror {
			kept = append(kept, m)
		}
	}
	r.Moves = append(kept, proto.Clone(move).(*HolderMove))
	return true
}
