package client_test

import (
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// TestAnswerThatNeverEndsIsLost: a byte comes now and then. The attempt's time bounds it, and all
// attempts have one key.
func TestAnswerThatNeverEndsIsLost(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(_ int, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Idempotency-Status", "executed")
		for tick := time.NewTicker(time.Millisecond); ; {
			_, _ = io.WriteString(w, "x") // the client leaves
			_ = http.NewResponseController(w).Flush()
			select {
			case <-tick.C:
			case <-r.Context().Done():
				tick.Stop()
				return
			}
		}
	})
	c := newClient(t, quick(func(o *client.Options) { o.AttemptTimeout, o.AttemptsMax = 50*time.Millisecond, 3 }))
	_, _, err := post(t, c, t.Context(), s.server.URL, "body")
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptTimeout)
	for _, r := range s.requests() {
		if r.key != s.requests()[0].key {
			t.Errorf("keys %s and %s", r.key, s.requests()[0].key)
		}
	}
}

// TestCompressedAnswerTakesWhatItMay: 64 MB of zeros are 64 kB on the wire. An answer is read up to
// AnswerBytesMax, unpacked.
func TestCompressedAnswerTakesWhatItMay(t *testing.T) { // not parallel: it measures what is allocated
	const attempts, announced, most = 3, 64 << 20, 1 << 20
	zeros := make([]byte, 1<<20)
	var packed strings.Builder
	z := gzip.NewWriter(&packed)
	for range announced / len(zeros) {
		if _, err := z.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	s := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Idempotency-Status", "unknown")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, packed.String()) // the client leaves
	})
	c := newClient(t, quick(func(o *client.Options) { o.AnswerBytesMax, o.AttemptsMax = most, attempts }))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, _, err := post(t, c, t.Context(), s.server.URL, "body")
	runtime.ReadMemStats(&after)
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	if mb := (after.TotalAlloc - before.TotalAlloc) >> 20; mb > attempts*16*most>>20 {
		t.Errorf("%d MB were allocated for %d answers of which %d MB may be read", mb, attempts, most>>20)
	}
}

// TestCompressedAnswerIsWhatTheBaseMakesOfIt: the base unpacks it if it asked for it, and leaves it
// alone otherwise.
func TestCompressedAnswerIsWhatTheBaseMakesOfIt(t *testing.T) {
	t.Parallel()
	var packed strings.Builder
	z := gzip.NewWriter(&packed)
	_, _ = io.WriteString(z, `{"id":1}`) // in memory
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	s := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Idempotency-Status", "executed")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, packed.String())
	})
	for left, want := range map[bool]string{false: `{"id":1}`, true: packed.String()} {
		base := &http.Transport{DisableCompression: left}
		t.Cleanup(base.CloseIdleConnections)
		response, body, err := post(t, &http.Client{Transport: client.New(base, quick())}, t.Context(), s.server.URL, "body")
		if err != nil {
			t.Fatal(err)
		}
		if encoding := response.Header.Get("Content-Encoding"); body != want || response.Uncompressed == left || (encoding == "gzip") != left {
			t.Errorf("%q, unpacked %t, Content-Encoding %q", body, response.Uncompressed, encoding)
		}
	}
}

// TestRedirectsInACircleEnd, as http.Client ends them. Nothing is retried.
func TestRedirectsInACircleEnd(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprint("/", n), http.StatusTemporaryRedirect)
	})
	_, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body")
	if n := len(s.requests()); err == nil || n != 10 {
		t.Errorf("%d requests, %v", n, err)
	}
}

// TestKeyOfAContextIsForOneRequest: a second request with the context has the same key. The server
// refuses it, and it is not executed in place of the first.
func TestKeyOfAContextIsForOneRequest(t *testing.T) {
	t.Parallel()
	var paths []string
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		paths = append(paths, r.URL.Path)
		w.WriteHeader(http.StatusCreated)
	})
	account := func(*http.Request) (string, error) { return "acme", nil }
	server := httptest.NewServer(middleware.New(memory.New(nil), account, nil).Handler(handler))
	t.Cleanup(server.Close)
	c := newClient(t, quick())
	ctx := client.WithKey(t.Context(), "order-1")
	if response, _, err := post(t, c, ctx, server.URL+"/customers", "body"); err != nil || response.StatusCode != http.StatusCreated {
		t.Fatal(response, err)
	}
	response, _, err := post(t, c, ctx, server.URL+"/charges", "body")
	if err != nil || response.StatusCode != http.StatusUnprocessableEntity || response.Header.Get("Idempotency-Status") != "mismatch" {
		t.Errorf("%v, %v", response, err)
	}
	if len(paths) != 1 {
		t.Errorf("executed: %q", paths)
	}
}

// TestConnectionThatWasClosedWhileIdleLosesNothing: a balancer closes connections that rest. Each
// request is served once, and answered.
func TestConnectionThatWasClosedWhileIdleLosesNothing(t *testing.T) {
	t.Parallel()
	var served atomic.Int64
	var mu sync.Mutex
	var conns []net.Conn
	closed := make(chan struct{}, 10)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		served.Add(1)
		say(w, 201, "executed")
	}))
	server.Config.ConnState = func(conn net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
		case http.StateIdle:
			_ = conn.Close()
			closed <- struct{}{}
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	c := newClient(t, quick())
	const requests = 3
	for range requests {
		if _, _, err := post(t, c, t.Context(), server.URL, "body"); err != nil {
			t.Fatal(err)
		}
		<-closed
	}
	mu.Lock()
	defer mu.Unlock()
	if served.Load() != requests || len(conns) != requests {
		t.Errorf("%d requests were served over %d connections, want %d", served.Load(), len(conns), requests)
	}
}
