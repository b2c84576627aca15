package middleware_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// setupHTTP2 serves a handler over HTTP/2 without TLS (h2c), to a client that speaks only that. It
// counts connections.
func setupHTTP2(t *testing.T, opts setupOptions, handler http.HandlerFunc) (*testBundle, *atomic.Int64) {
	t.Helper()
	var conns atomic.Int64
	opts.store = &postgres.Options{AcquireTimeout: 20 * time.Second} // duration does not matter here
	opts.server = func(s *http.Server) {
		s.Protocols = new(http.Protocols)
		s.Protocols.SetUnencryptedHTTP2(true)
		s.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				conns.Add(1)
			}
		}
	}
	b := setup(t, opts, handler)
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	b.client = &http.Client{Transport: transport}
	return b, &conns
}

// Many requests at once on one connection: duplicates are executed once, and do not delay other
// requests.
func TestHTTP2StreamsOfOneConnection(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	b, conns := setupHTTP2(t, setupOptions{middleware: &middleware.Options{Wait: 30 * time.Second}}, func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			t.Errorf("%s", r.Proto)
		}
		if key, _ := idempotency.KeyFrom(r.Context()); key.Value == "same" {
			once.Do(func() { close(entered) })
			<-release
		}
		transfer(w, r)
	})
	const duplicates, others = 60, 40
	answers := make(chan reply, duplicates)
	post := func(key string) reply { return b.post(t, "/", "{}", "Idempotency-Key", key) }
	go func() { answers <- post("same") }()
	<-entered
	for range duplicates - 1 {
		go func() { answers <- post("same") }()
	}
	var group sync.WaitGroup
	for i := range others {
		group.Go(func() { want(t, post(fmt.Sprint("other-", i)), 201, idempotency.OutcomeExecuted, "") })
	}
	group.Wait() // while the others run or wait
	close(release)
	seen, bodies := map[string]int{}, map[string]bool{}
	for range duplicates {
		got := <-answers
		seen[got.outcome]++
		bodies[got.body] = true
	}
	if seen["executed"] != 1 || seen["replayed"] != duplicates-1 || len(bodies) != 1 {
		t.Errorf("%v, %d bodies", seen, len(bodies))
	}
	if b.effects(t) != 1+others || conns.Load() != 1 {
		t.Errorf("%d effects on %d connections, want %d on one", b.effects(t), conns.Load(), 1+others)
	}
}

// If a client resets a stream, that is a client that hangs up: the work is finished, and the retry
// on the same connection is a replay.
func TestHTTP2ResetStreamIsFinished(t *testing.T) {
	t.Parallel()
	entered, release := make(chan context.Context), make(chan struct{})
	b, conns := setupHTTP2(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		entered <- r.Context()
		<-release
		transfer(w, r)
	})
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, b.server.URL+"/", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Account": {"acme"}, "Idempotency-Key": {"k"}, "Content-Type": {"application/json"}}
	gone := make(chan error, 1)
	go func() {
		response, err := b.client.Do(r)
		if err == nil {
			_ = response.Body.Close()
		}
		gone <- err
	}()
	handler := <-entered
	cancel() // RST_STREAM
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("the client got %v", err)
	}
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	if handler.Err() != nil {
		t.Errorf("the handler's context ended with its stream: %v", handler.Err())
	}
	close(release)
	want(t, b.settle(t, "k"), 201, idempotency.OutcomeReplayed, "")
	if b.effects(t) != 1 || conns.Load() != 1 {
		t.Errorf("%d effects, %d connections", b.effects(t), conns.Load())
	}
}

// If a server sends GOAWAY in the middle of a request, because it shuts down, it still answers on
// the same connection, and the retry at another replica is a replay. A request that arrives at the
// same time is executed once, here or there.
func TestHTTP2GoawayOfTheServer(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b, conns := setupHTTP2(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(entered)
			<-release
		}
		transfer(w, r)
	})
	replica := &http.Server{Handler: b.server.Config.Handler, Protocols: b.server.Config.Protocols}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- replica.Serve(listener) }()
	t.Cleanup(func() { _ = replica.Close(); <-served })

	first := make(chan reply, 1)
	go func() { first <- b.post(t, "/slow", "{}", "Idempotency-Key", "k") }()
	<-entered
	stopped := make(chan error, 1)
	closing := make(chan struct{})
	b.server.Config.RegisterOnShutdown(func() { close(closing) })
	go func() { stopped <- b.server.Config.Shutdown(context.Background()) }()
	<-closing // GOAWAY is on its way, and no new connection is taken
	late, err := http.NewRequest(http.MethodPost, b.server.URL+"/", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	late.Header = http.Header{"Account": {"acme"}, "Idempotency-Key": {"late"}, "Content-Type": {"application/json"}}
	// The outcome of the retry is executed, unless the connection took the request before the
	// GOAWAY.
	outcome := idempotency.OutcomeExecuted
	if response, err := b.client.Do(late); err == nil {
		if got := read(t, response); got.outcome == "executed" {
			outcome = idempotency.OutcomeReplayed
		}
	}
	close(release)
	answer := <-first
	want(t, answer, 201, idempotency.OutcomeExecuted, "")
	if err := <-stopped; err != nil {
		t.Errorf("shutdown: %v", err)
	}
	if conns.Load() != 1 {
		t.Errorf("%d connections", conns.Load())
	}
	b.server.URL = "http://" + listener.Addr().String()
	again := b.post(t, "/slow", "{}", "Idempotency-Key", "k")
	want(t, again, 201, idempotency.OutcomeReplayed, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "late"), 201, outcome, "")
	if again.body != answer.body || b.effects(t) != 2 {
		t.Errorf("%s, then %s; %d effects", answer.body, again.body, b.effects(t))
	}
}

// Types and flags of frames (RFC 9113, section 6).
const (
	frameData, frameHeaders, frameReset, frameSettings, frameGoaway = 0x0, 0x1, 0x3, 0x4, 0x7
	flagEndStream, flagEndHeaders                                   = 0x1, 0x4
)

// http2Conn is a connection on which a test writes the frames itself.
type http2Conn struct {
	net.Conn
	t *testing.T
}

func (b *testBundle) dialHTTP2(t *testing.T) http2Conn {
	t.Helper()
	c := http2Conn{b.dial(t), t}
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	c.frame(frameSettings, 0, 0, nil)
	return c
}

func (c http2Conn) frame(kind, flags byte, stream uint32, payload []byte) {
	c.t.Helper()
	head := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	head = binary.BigEndian.AppendUint32(append(head, flags), stream)
	if _, err := c.Write(append(head, payload...)); err != nil {
		c.t.Fatal(err)
	}
}

// headers opens stream 1 with a POST, its fields as literals without indexing (RFC 7541, section
// 6.2.2).
func (c http2Conn) headers(fields ...string) {
	c.t.Helper()
	var block []byte
	for i, fields := 0, append([]string{":method", "POST", ":scheme", "http", ":path", "/", ":authority", "x", "account", "acme", "content-type", "application/json", "idempotency-key", "k"}, fields...); i < len(fields); i += 2 {
		block = append(block, 0, byte(len(fields[i])))
		block = append(append(block, fields[i]...), byte(len(fields[i+1])))
		block = append(block, fields[i+1]...)
	}
	c.frame(frameHeaders, flagEndHeaders, 1, block)
}

// answer reads until stream 1 ends, and returns its body, or reset if the server reset it.
func (c http2Conn) answer() (body string, reset bool) {
	c.t.Helper()
	var content bytes.Buffer
	for {
		var head [9]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			c.t.Fatal(err)
		}
		payload := make([]byte, binary.BigEndian.Uint32(head[:4])>>8)
		if _, err := io.ReadFull(c, payload); err != nil {
			c.t.Fatal(err)
		}
		if binary.BigEndian.Uint32(head[5:]) != 1 {
			continue
		}
		switch kind, flags := head[3], head[4]; {
		case kind == frameReset:
			return content.String(), true
		case kind == frameData:
			content.Write(payload)
			fallthrough
		default:
			if flags&flagEndStream != 0 {
				return content.String(), false
			}
		}
	}
}

// If a client sends GOAWAY in the middle of its request it still gets the answer. If it is gone
// before the answer comes, a retry replays it.
func TestHTTP2GoawayOfTheClient(t *testing.T) {
	t.Parallel()
	for _, waits := range []bool{true, false} {
		entered, release := make(chan struct{}), make(chan struct{})
		b, _ := setupHTTP2(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
			close(entered)
			<-release
			transfer(w, r)
		})
		c := b.dialHTTP2(t)
		c.headers("content-length", "2")
		c.frame(frameData, flagEndStream, 1, []byte("{}"))
		<-entered
		c.frame(frameGoaway, 0, 0, make([]byte, 8))
		body := ""
		if waits {
			close(release)
			body, _ = c.answer()
		} else {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			close(release)
		}
		again := b.settle(t, "k")
		want(t, again, 201, idempotency.OutcomeReplayed, "")
		if waits && body != again.body || b.effects(t) != 1 {
			t.Errorf("waits %t: %q, then %q; %d effects", waits, body, again.body, b.effects(t))
		}
	}
}

// A stream that ends with less than its content-length is refused. An empty one without a length
// gets 411, as over HTTP/1.1. A body without a length is one request, however many frames it has.
func TestHTTP2Bodies(t *testing.T) {
	t.Parallel()
	b, _ := setupHTTP2(t, setupOptions{}, transfer)

	c := b.dialHTTP2(t)
	c.headers("content-length", "10")
	c.frame(frameData, flagEndStream, 1, []byte("{}"))
	if body, reset := c.answer(); !reset && !strings.Contains(body, string(idempotency.ReasonBodyUnread)) {
		t.Errorf("a short body is answered %s", body)
	}
	c = b.dialHTTP2(t)
	c.headers()
	c.frame(frameData, flagEndStream, 1, nil)
	if body, _ := c.answer(); !strings.Contains(body, string(idempotency.ReasonBodyUnread)) || !strings.Contains(body, "Content-Length: 0") {
		t.Errorf("an empty body without a length is answered %s", body)
	}
	if b.runs.Load() != 0 {
		t.Fatalf("%d runs", b.runs.Load())
	}
	bodies := map[string]bool{}
	for _, parts := range [][]string{{"{", "}"}, {"{}"}, {"", "{}", ""}} {
		c = b.dialHTTP2(t)
		c.headers()
		for _, part := range parts {
			c.frame(frameData, 0, 1, []byte(part))
		}
		c.frame(frameData, flagEndStream, 1, nil)
		body, _ := c.answer()
		bodies[body] = true
	}
	if len(bodies) != 1 || b.effects(t) != 1 {
		t.Errorf("answers %v, %d effects", bodies, b.effects(t))
	}
}
