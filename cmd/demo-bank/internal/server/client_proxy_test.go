package server

import (
	"bufio"
	"bytes"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"testing"
	"time"
)

// fault is a fault that the proxy causes in one request.
type fault string

const (
	faultNone      fault = "none"
	faultCutBefore fault = "request lost"      // cut before anything reached the bank
	faultHalf      fault = "request half sent" // the bank gets a part of it
	faultCutAfter  fault = "reply lost"        // the bank answers, the client gets nothing
	// The client's connection breaks, and then the request reaches the bank.
	faultLate      fault = "request late"
	faultMidAnswer fault = "reply cut in the middle" // headers and a part of the body, then a reset
	faultSilence   fault = "reply never comes"       // the connection stays open
	faultDelay     fault = "slow"                    // otherwise good
	// Replaces the bank's answer, without Idempotency-Status.
	faultBadGateway fault = "gateway's own 502"
	// It was executed, but the answer is unknown, as if the bank could not find out in time.
	faultUnknown fault = "bank does not know"
	faultLimited fault = "gateway's own 429" // instead of a request
)

// faultShares are thousandths of all requests.
var faultShares = []struct {
	fault
	share int
}{
	{faultCutBefore, 40}, {faultHalf, 20}, {faultCutAfter, 60}, {faultLate, 30}, {faultMidAnswer, 40}, {faultSilence, 3}, {faultDelay, 60},
	{faultBadGateway, 20}, {faultUnknown, 20}, {faultLimited, 10},
}

const (
	faultDelayMax = 20 * time.Millisecond
	// From the break of the client's connection to the request's arrival.
	lateMax = 60 * time.Millisecond
)

// proxy forwards HTTP requests to a bank, and breaks some.
type proxy struct {
	address string
	bank    string

	group sync.WaitGroup
	mu    sync.Mutex
	open  map[net.Conn]struct{}
	ended bool
	count map[fault]int
}

func startProxy(t *testing.T, b *bundle) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: listener.Addr().String(), bank: strings.TrimPrefix(b.url, "http://"), open: map[net.Conn]struct{}{}, count: map[fault]int{}}
	p.group.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if p.hold(conn) {
				p.group.Go(func() { p.serve(conn) })
			}
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		p.mu.Lock()
		p.ended = true
		for conn := range p.open {
			_ = conn.Close() // it may have ended
		}
		p.mu.Unlock()
		p.group.Wait()
	})
	return p
}

// hold registers a connection to be closed at the end.
func (p *proxy) hold(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		_ = conn.Close()
		return false
	}
	p.open[conn] = struct{}{}
	return true
}

func (p *proxy) drop(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, conn)
	_ = conn.Close() // it may have ended
}

func (p *proxy) draw() fault {
	n := rand.IntN(1000)
	f := faultNone
	for _, one := range faultShares {
		if n -= one.share; n < 0 {
			f = one.fault
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count[f]++
	return f
}

// counts returns the number of each fault.
func (p *proxy) counts() map[fault]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.count)
}

// serve forwards the requests of one connection, each on its own connection to the bank.
func (p *proxy) serve(client net.Conn) {
	defer p.drop(client)
	reader := bufio.NewReader(client)
	for {
		r, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		request, err := httputil.DumpRequest(r, true) // unchanged
		if err != nil {
			return
		}
		if !p.pass(client, request) {
			return
		}
	}
}

// pass handles one request, and reports whether the client's connection stays open.
func (p *proxy) pass(client net.Conn, request []byte) bool {
	f := p.draw()
	switch f {
	case faultCutBefore:
		return p.hangUp(client)
	case faultHalf:
		p.hangUp(client)
		p.half(request)
		return false
	case faultLate:
		p.hangUp(client)
		time.Sleep(rand.N(lateMax)) // the simulated network delay
		p.ask(request)
		return false
	case faultLimited:
		_, err := io.WriteString(client, "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
		return err == nil
	case faultDelay:
		time.Sleep(rand.N(faultDelayMax))
	}
	answer := p.ask(request)
	switch {
	case answer == nil || f == faultCutAfter:
		return p.hangUp(client)
	case f == faultMidAnswer:
		_, _ = client.Write(answer[:1+rand.IntN(len(answer)-1)])
		return p.hangUp(client)
	case f == faultSilence:
		_, _ = client.Read(make([]byte, 1)) // until the client hangs up
		return false
	case f == faultUnknown:
		answer = []byte("HTTP/1.1 503 Service Unavailable\r\nIdempotency-Status: unknown\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
	case f == faultBadGateway:
		answer = []byte("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
	}
	_, err := client.Write(answer)
	return err == nil
}

// hangUp closes a client's connection with a RST or a FIN.
func (p *proxy) hangUp(client net.Conn) bool {
	if tcp, ok := client.(*net.TCPConn); ok && rand.IntN(2) == 0 {
		_ = tcp.SetLinger(0)
	}
	_ = client.Close() // drop closes it again
	return false
}

// ask sends a request to the bank and returns its raw answer, or nil if there is none.
func (p *proxy) ask(request []byte) []byte {
	bank, err := net.Dial("tcp", p.bank)
	if err != nil || !p.hold(bank) {
		return nil
	}
	defer p.drop(bank)
	if _, err := bank.Write(request); err != nil {
		return nil
	}
	response, err := http.ReadResponse(bufio.NewReader(bank), nil)
	if err != nil {
		return nil
	}
	answer, err := httputil.DumpResponse(response, true)
	if err != nil {
		return nil
	}
	return answer
}

func (p *proxy) half(request []byte) {
	bank, err := net.Dial("tcp", p.bank)
	if err != nil || !p.hold(bank) {
		return
	}
	defer p.drop(bank)
	_, _ = bank.Write(request[:len(request)-1-rand.IntN(len(request)/2)])
}
