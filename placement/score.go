package placement

import "math"

// Half-way points: a node at one of these values gets half of that factor.
const (
	halfFreeBytes    = 64 << 30
	halfBandwidthBps = 10 << 20
	halfLatencyMs    = 50

	unknownFactor = 0.5 // for a value that nobody has measured yet
	floorFactor   = 0.1 // of uptime, bandwidth and latency: a slow node is drawn less, not never
)

// ShardRoom returns how many bytes of shards a node of that capacity still
// takes. A part of it is left to index records and heads: a pool full of shards
// must still take the head that lets some of them go.
func ShardRoom(capacityBytes, usedBytes uint64) uint64 {
	room := capacityBytes - min(capacityBytes/16, 4<<30)
	return room - min(room, usedBytes)
}

// Score returns a node's weight in Choose: 0 for one that is not alive, full or
// contained, else in (0, 1]. It is the product of five factors: trust, room (free bytes,
// saturating, so that nodes fill up alike), uptime (squared: stability counts
// most), bandwidth and latency, which stands for location.
func Score(n Node) float64 {
	if !n.Alive || n.Reputation.Contained() {
		return 0
	}
	room := unknownFactor
	if n.CapacityBytes > 0 {
		if n.UsedBytes >= n.CapacityBytes {
			return 0
		}
		free := float64(n.CapacityBytes - n.UsedBytes)
		room = free / (free + halfFreeBytes)
	}
	bandwidth := unknownFactor
	if known(n.BandwidthBps) {
		bandwidth = n.BandwidthBps / (n.BandwidthBps + halfBandwidthBps)
	}
	latency := unknownFactor
	if known(n.LatencyMs) {
		latency = halfLatencyMs / (n.LatencyMs + halfLatencyMs)
	}
	uptime := 0.0
	if known(n.Uptime) {
		uptime = min(n.Uptime, 1)
	}
	return n.Reputation.Trust() * room * lift(uptime*uptime) * lift(bandwidth) * lift(latency)
}

func known(value float64) bool { return value > 0 && !math.IsInf(value, 1) } // false for NaN too

func lift(factor float64) float64 { return floorFactor + (1-floorFactor)*factor }
