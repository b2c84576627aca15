package probe

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// client sends each request on a connection of its own, over HTTP/1.1. It writes the bytes itself:
// package net/http would repeat a request with a key when a connection breaks, and can't hold back
// the end of a request.
type client struct {
	anyHost  bool
	interval time.Duration // between two requests
	patience time.Duration // for an answer that a retry may change

	mu   sync.Mutex
	next time.Time // of the next request
	left int       // number of requests that may still be sent
}

// request is a request, as it goes out.
type request struct {
	method string
	url    *url.URL
	fields []Field // all header lines but Content-Length, Connection and usually Host
	second []Field // the fields that are the second caller's
	body   []byte
}

// answer is the answer to a request, received in full. If there is none, err is the reason and
// status is 0.
type answer struct {
	status int
	header http.Header
	body   []byte
	took   time.Duration
	err    error
	line   string // the request, as a curl line
}

func (a *answer) ok() bool { return a.status >= 200 && a.status <= 299 }

func (a *answer) refused() bool { return a.status >= 400 && a.status <= 499 }

// busy reports whether a later retry may get another answer.
func (a *answer) busy() bool {
	switch a.status {
	case 0, http.StatusConflict, http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	}
	return a.status >= 500
}

// limited reports whether the request was refused because there are too many, whatever it says. It
// tells nothing about keys.
func (a *answer) limited() bool { return a.status == http.StatusTooManyRequests }

// retryAfter returns the answer's Retry-After. It is 0 if there is none, or if it is a date.
func (a *answer) retryAfter() time.Duration {
	seconds, err := strconv.Atoi(a.header.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return min(time.Duration(seconds), time.Hour/time.Second) * time.Second
}

func (a *answer) String() string {
	if a.err != nil {
		return "no answer (" + a.err.Error() + ")"
	}
	return fmt.Sprint(a.status)
}

// differsFrom returns the name of the part that differs from the first answer: "status", "body" or
// "Location". It returns "" if they are the same.
func (a *answer) differsFrom(first *answer) string {
	switch {
	case a.status != first.status:
		return "status"
	case !bytes.Equal(a.body, first.body):
		return "body"
	case a.header.Get("Location") != first.header.Get("Location"):
		return "Location"
	}
	return ""
}

// errUnreachable ends the examination: there is no connection to the host.
var errUnreachable = errors.New("the host can't be reached")

// errRequests ends the examination: RequestsMax is reached.
var errRequests = errors.New("the number of requests is used up")

// errLimited ends the examination: the API allows too few requests.
var errLimited = errors.New("the API answers with 429: examine it with a higher rate limit, or later")

// errNotHTTP is the error of an answer that can't be read. The error of package net/http may quote it.
var errNotHTTP = errors.New("it is not HTTP/1.1")

// pace blocks until n requests may be sent together.
func (c *client) pace(ctx context.Context, n int) error {
	c.mu.Lock()
	if c.left < n {
		c.mu.Unlock()
		return errRequests
	}
	c.left -= n
	now := time.Now()
	if c.next.Before(now) {
		c.next = now
	}
	at := c.next
	c.next = at.Add(time.Duration(n) * c.interval)
	c.mu.Unlock()
	return sleep(ctx, at.Sub(now))
}

// sleep blocks for a time. If ctx ends first, it returns the cause.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// exchange is one request on its connection. [exchange.hold] sends it without the end of its
// header, so that no handler runs until the rest is sent.
type exchange struct {
	conn    net.Conn
	request *request
	rest    []byte
	stop    func() bool
}

// open connects for a request. It sends nothing of it. An error ends the examination.
func (c *client) open(ctx context.Context, r *request) (*exchange, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	dialer := net.Dialer{Control: func(_, address string, _ syscall.RawConn) error {
		if at, err := netip.ParseAddrPort(address); !c.anyHost && (err != nil || !at.Addr().Unmap().IsLoopback()) {
			return errNotLoopback
		}
		return nil
	}}
	port := r.url.Port()
	if port == "" {
		port = r.url.Scheme // the names of both are known
	}
	conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(r.url.Hostname(), port))
	if err == nil && r.url.Scheme == "https" {
		secure := tls.Client(conn, &tls.Config{ServerName: r.url.Hostname(), NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12})
		if err = secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
		}
		conn = secure
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = errSilent
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnreachable, err)
	}
	return &exchange{conn: conn, request: r}, nil
}

// errNotLoopback refuses a connection to another host.
var errNotLoopback = errors.New("the host is not this machine")

// hold sends the request up to the end of its header.
func (x *exchange) hold(ctx context.Context) {
	r := x.request
	var head bytes.Buffer
	fmt.Fprintf(&head, "%s %s HTTP/1.1\r\n", r.method, r.url.RequestURI())
	if !hasField(r.fields, "Host") {
		fmt.Fprintf(&head, "Host: %s\r\n", r.url.Host)
	}
	for _, f := range r.fields {
		fmt.Fprintf(&head, "%s: %s\r\n", f.Name, f.Value)
	}
	if len(r.body) > 0 || r.method != http.MethodGet {
		fmt.Fprintf(&head, "Content-Length: %d\r\n", len(r.body))
	}
	head.WriteString("Connection: close\r\n")
	x.rest = append([]byte("\r\n"), r.body...)
	_ = x.conn.SetDeadline(time.Now().Add(requestTimeout))
	conn := x.conn
	x.stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
	_, _ = conn.Write(head.Bytes()) // release finds the same error
}

// release sends the end of the request.
func (x *exchange) release() error {
	_, err := x.conn.Write(x.rest)
	return err
}

// close closes the connection, whether an answer was received or not.
func (x *exchange) close() {
	x.stop()
	_ = x.conn.Close()
}

// finish sends the end of the request and receives the answer in full.
func (x *exchange) finish() *answer {
	defer x.close()
	started := time.Now()
	// A server that refuses a request early may close before it has read the body: its answer counts.
	sent := x.release()
	a, err := x.receive()
	if err != nil {
		if sent != nil {
			err = sent
		}
		a = &answer{err: plain(err)}
	}
	a.took, a.line = time.Since(started), x.request.curl()
	return a
}

func (x *exchange) receive() (*answer, error) {
	limit := &io.LimitedReader{R: x.conn, N: headBytesMax}
	reader := bufio.NewReader(limit)
	for {
		response, err := http.ReadResponse(reader, &http.Request{Method: x.request.method})
		if err != nil {
			if limit.N <= 0 {
				err = tooLong{"header of the answer", headBytesMax}
			}
			return nil, err
		}
		if response.StatusCode < 200 && response.StatusCode != http.StatusSwitchingProtocols {
			continue // 103, for example
		}
		limit.N = math.MaxInt64
		body, err := io.ReadAll(io.LimitReader(response.Body, answerBytesMax+1))
		if err == nil && len(body) > answerBytesMax {
			err = tooLong{"answer", answerBytesMax}
		}
		if err != nil {
			return nil, err
		}
		return &answer{status: response.StatusCode, header: response.Header, body: body}, nil
	}
}

// tooLong is the error of an answer over a limit.
type tooLong struct {
	what string
	max  int
}

func (t tooLong) Error() string { return fmt.Sprintf("the %s is longer than %d bytes", t.what, t.max) }

// errSilent is the error of an answer, or of a connection, that does not come in time.
var errSilent = fmt.Errorf("nothing within %v", requestTimeout)

// plain returns common errors without addresses and names of operations. No error quotes the answer.
func plain(err error) error {
	var network net.Error
	var long tooLong
	switch {
	case errors.As(err, &network) && network.Timeout():
		return errSilent
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return errors.New("the connection was closed")
	case errors.As(err, &network), errors.As(err, &long):
		return err
	}
	return errNotHTTP
}

// send sends a request and receives its answer. If it is refused with 429 it is sent again. An
// error ends the examination.
func (c *client) send(ctx context.Context, r *request) (*answer, error) {
	a, err := c.sendWhile(ctx, r, (*answer).limited)
	if err == nil && a.limited() {
		err = errLimited
	}
	return a, err
}

// sendWhile sends a request again as long as its answer is one that a later retry may change, or
// until patience has elapsed. It returns the last answer.
func (c *client) sendWhile(ctx context.Context, r *request, changes func(*answer) bool) (*answer, error) {
	pause := 50 * time.Millisecond
	for deadline := time.Now().Add(c.patience); ; pause = min(2*pause, time.Second) {
		if err := c.pace(ctx, 1); err != nil {
			return nil, err
		}
		x, err := c.open(ctx, r)
		if err != nil {
			return nil, err
		}
		x.hold(ctx)
		a := x.finish()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		wait := pause
		if a.limited() {
			wait = max(pause, a.retryAfter())
		}
		if !changes(a) || time.Now().Add(wait).After(deadline) {
			return a, nil
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// held opens n exchanges with the same request and holds them.
func (c *client) held(ctx context.Context, r *request, n int) ([]*exchange, error) {
	var all []*exchange
	for range n {
		x, err := c.open(ctx, r)
		if err != nil {
			for _, x := range all {
				x.close()
			}
			return nil, err
		}
		x.hold(ctx)
		all = append(all, x)
	}
	return all, nil
}

// sendTogether sends n copies of a request at once.
func (c *client) sendTogether(ctx context.Context, r *request, n int) ([]*answer, error) {
	if err := c.pace(ctx, n); err != nil {
		return nil, err
	}
	all, err := c.held(ctx, r, n)
	if err != nil {
		return nil, err
	}
	answers := make([]*answer, n)
	var group sync.WaitGroup
	start := make(chan struct{})
	for i, x := range all {
		group.Go(func() {
			<-start
			answers[i] = x.finish()
		})
	}
	close(start)
	group.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return answers, nil
}

// sendTwice sends a request, and sends it again as soon as the answer was received in full.
func (c *client) sendTwice(ctx context.Context, r *request) (first, second *answer, err error) {
	if err := c.pace(ctx, 2); err != nil {
		return nil, nil, err
	}
	both, err := c.held(ctx, r, 2)
	if err != nil {
		return nil, nil, err
	}
	first = both[0].finish()
	second = both[1].finish()
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	return first, second, nil
}

// cut sends a whole request, and closes the connection after a time without reading an answer.
func (c *client) cut(ctx context.Context, r *request, after time.Duration) error {
	if err := c.pace(ctx, 1); err != nil {
		return err
	}
	x, err := c.open(ctx, r)
	if err != nil {
		return err
	}
	defer x.close()
	x.hold(ctx)
	if err := x.release(); err != nil {
		return nil // it was cut earlier
	}
	if after == 0 {
		return nil
	}
	return sleep(ctx, after)
}

// loopback reports whether all addresses of a host are this machine's.
func loopback(ctx context.Context, host string) bool {
	addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil || len(addresses) == 0 {
		return false
	}
	for _, address := range addresses {
		if !address.Unmap().IsLoopback() {
			return false
		}
	}
	return true
}

// Foreign returns the host of the first URL that is not on this machine, or "". A host without an
// address counts as another machine.
func (c *Config) Foreign(ctx context.Context) string {
	for _, u := range []*url.URL{c.URL, c.EffectsURL} {
		if u != nil && !loopback(ctx, u.Hostname()) {
			return u.Hostname()
		}
	}
	return ""
}
