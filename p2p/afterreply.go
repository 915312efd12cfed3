package p2p

import "context"

type afterReplyKey struct{}

// afterReply collects what a handler wants done when its reply is out. It is
// used by one goroutine at a time.
type afterReply struct{ fns []func() }

func (a *afterReply) run() {
	for _, f := range a.fns {
		f()
	}
	a.fns = nil
}

// AfterReply has f called when the reply to the request that ctx belongs to has
// been sent or lost: the place to reuse the reply body's buffer. A handler may
// call it, on its own goroutine, any number of times. It reports false, and
// never calls f, when ctx is not that of a handler.
func AfterReply(ctx context.Context, f func()) bool {
	a, ok := ctx.Value(afterReplyKey{}).(*afterReply)
	if ok {
		a.fns = append(a.fns, f)
	}
	return ok
}
