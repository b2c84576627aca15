// Package proxytest puts a TCP proxy between a test's programs: to lead one client to two banks, or to make a database
// slow to reach.
package proxytest

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Proxy passes TCP connections on until the test ends.
type Proxy struct {
	Address string
	Delay   atomic.Int64 // nanoseconds that each piece of data is held back on its way to the server
}

// Start returns a proxy on 127.0.0.1 that passes the n-th connection on to what dial returns for n.
func Start(t testing.TB, dial func(n int) (net.Conn, error)) *Proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{Address: listener.Addr().String()}
	var group sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	t.Cleanup(func() {
		_ = listener.Close()
		mu.Lock()
		for _, conn := range open {
			_ = conn.Close() // it may have ended
		}
		mu.Unlock()
		group.Wait()
	})
	group.Go(func() {
		for n := 0; ; n++ {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := dial(n)
			if err != nil {
				_ = client.Close() // which says as much
				continue
			}
			mu.Lock()
			open = append(open, client, server)
			mu.Unlock()
			group.Go(func() { p.pass(server, client, true) })
			group.Go(func() { p.pass(client, server, false) })
		}
	})
	return p
}

// pass copies until one side ends, and then ends both: a reset must not become a goodbye.
func (p *Proxy) pass(to, from net.Conn, slow bool) {
	defer func() { _, _ = to.Close(), from.Close() }() // either may be closed already
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if delay := p.Delay.Load(); slow && delay > 0 {
			time.Sleep(time.Duration(delay)) // a slow line, which is what is to be shown
		}
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
