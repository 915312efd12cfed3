// Package p2p carries requests between the members of a pool. It is the only
// importer of libp2p.
//
// A Host listens on TCP (TLS 1.3, yamux) and QUIC, admits only members that
// show a certificate signed for its pool, keeps the list of members and how
// they are, and moves requests with raw bodies:
//
//	pool, _ := p2p.NewPool()
//	ticket, _ := pool.Ticket(time.Time{}, nil)
//	key, _ := p2p.LoadOrCreateKey(filepath.Join(dir, "peer.key"))
//	cert, _ := p2p.Join(ticket, key, p2p.RoleNode)
//	host, err := p2p.NewHost(ctx, p2p.HostOptions{Dir: dir, Key: key, Certificate: cert})
//	host.Handle(serve)
//	rep, body, err := host.Call(ctx, member, &wire.Request{Op: …}, nil)
//
// Goroutines: a Host starts its own and Close waits for all of them. Handlers
// run on goroutines of the host, at most HostOptions.HandlersPerPeerMax for
// one peer.
//
// Buffers: the body given to a Handler is the host's again once the handler
// has returned. The reply body that a handler returns must not change until
// AfterReply says that it is sent. The body that Call returns belongs to the caller.
//
// A crash loses nothing but the newest changes of the member file, which is a
// cache of addresses: the pool tells them again.
//
// Formats: FORMAT.md, sections "Wire", "Tickets and certificates" and "Member
// file".
package p2p
