package client_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
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
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// TestRedirectAfterALostReplyPaysOnce: http.Client follows a 307 with another request, which has
// another key.
func TestRedirectAfterALostReplyPaysOnce(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
		switch n {
		case 1: // it was executed
			lose()
		case 2: // something in front of the server
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		default:
			say(w, 201, "replayed")
		}
	})
	if _, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body"); err != nil {
		t.Error(err)
	}
	for _, r := range s.requests() {
		if r.key != s.requests()[0].key {
			t.Errorf("the same thing was asked for with keys %s and %s", s.requests()[0].key, r.key)
		}
	}
}

// TestTwoStatusesProveNothing: an intermediary added a second status, and the client can't tell
// which one is the server's.
func TestTwoStatusesProveNothing(t *testing.T) {
	t.Parallel()
	for _, statuses := range [][]string{{"not-executed", "unknown"}, {"unknown", "not-executed"}, {"executed", "not-executed"}, {"Not-Executed"}} {
		s := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
			w.Header()["Idempotency-Status"] = statuses
			w.WriteHeader(503)
		})
		_, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body")
		expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	}
}

// TestBodyThatDidNotArriveIsSentAgain: this 400 is the only one that the network causes.
func TestBodyThatDidNotArriveIsSentAgain(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(n int, w http.ResponseWriter, _ *http.Request) {
		if n == 1 {
			w.Header().Set("Content-Type", "application/problem+json")
			w.Header().Set("Idempotency-Status", "not-executed")
			w.WriteHeader(400)
			_, _ = io.WriteString(w, `{"type":"https://example.org/problems#body-unread"}`)
			return
		}
		say(w, 201, "executed")
	})
	response, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body")
	if err != nil || response.StatusCode != 201 {
		t.Errorf("answer is %v, %v", response, err)
	}
}

func TestOtherMethodsPassUntouched(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("503"))
	c := newClient(t, quick(func(o *client.Options) { o.Methods = []string{"PUT"} }))
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "TRACE", "QUERY", "POST", "DELETE"} {
		before := len(s.requests())
		r, err := http.NewRequestWithContext(t.Context(), method, s.server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		if arrived := s.requests()[before:]; len(arrived) != 1 || arrived[0].key != "" {
			t.Errorf("%s arrived as %+v", method, arrived)
		}
	}
	r, err := http.NewRequestWithContext(t.Context(), "PUT", s.server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Do(r)
	expectError(t, err, idempotency.OutcomeUnknown, nil)
}

// TestServerThatDoesNotHonourKeys: after a lost reply a request is not sent again before the route
// has shown that it honours keys, nor after an answer without Idempotency-Status.
func TestServerThatDoesNotHonourKeys(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost", "503", "201 executed", "lost", "201 replayed", "200", "lost"))
	c := newClient(t, quick(func(o *client.Options) { o.Honours = nil }))
	send := func(path string) (*http.Response, error) {
		response, _, err := post(t, c, t.Context(), s.server.URL+path, "body")
		return response, err
	}
	_, err := send("/a")
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrNotHonoured)
	if response, err := send("/a"); err != nil || response.StatusCode != 503 { // unchanged
		t.Errorf("answer is %v, %v", response, err)
	}
	if _, err := send("/a"); err != nil { // executed: now the route is known
		t.Error(err)
	}
	if response, err := send("/a"); err != nil || response.Header.Get("Idempotency-Status") != "replayed" {
		t.Errorf("the lost reply was not asked for again: %v, %v", response, err)
	}
	if response, err := send("/a"); err != nil || response.StatusCode != 200 {
		t.Errorf("answer is %v, %v", response, err)
	}
	_, err = send("/a") // the 200 had no status
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrNotHonoured)
	_, err = send("/b") // never seen
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrNotHonoured)
	if n := len(s.requests()); n != 8 {
		t.Errorf("%d requests arrived, want 8", n)
	}
}

// TestNobodyThere: no connection was made, so nothing was executed, whatever the server is.
func TestNobodyThere(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := "http://" + listener.Addr().String()
	_ = listener.Close()
	_, _, err = post(t, newClient(t, quick(func(o *client.Options) { o.Honours = nil })), t.Context(), address, "body")
	if e := expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrAttemptsSpent); e.Attempts != 4 {
		t.Errorf("there were %d attempts", e.Attempts)
	}
}

// TestUnseenAttemptIsCounted: net/http sends a request without a body twice by itself if a kept
// connection breaks. The first may have been executed, and not-executed of the second proves
// nothing about it.
func TestUnseenAttemptIsCounted(t *testing.T) {
	t.Parallel()
	var posts atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodGet:
			say(w, 200, "")
		case posts.Add(1) == 1:
			lose() // and it may have been executed
		default:
			say(w, 503, "not-executed")
		}
	}))
	defer server.Close()
	c := newClient(t, quick(func(o *client.Options) { o.AttemptsMax = 1 }))
	warm, err := c.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, warm.Body)
	_ = warm.Body.Close()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Do(r)
	if e := expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent); e.Attempts != 1 || posts.Load() != 2 {
		t.Errorf("%d attempts, %d requests: net/http did not do what this is about", e.Attempts, posts.Load())
	}
}

// TestRequestIsSentOnceByNetHTTP: net/http can't repeat a request with a body, because it does not
// get GetBody.
func TestRequestIsSentOnceByNetHTTP(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("201 executed", "lost", "201 replayed"))
	var started atomic.Int64
	c := newClient(t, quick(func(o *client.Options) {
		o.Trace = func(_ context.Context, e client.Event) {
			if e.Kind == client.EventStarted {
				started.Add(1)
			}
		}
	}))
	for range 2 {
		if _, _, err := post(t, c, t.Context(), s.server.URL, "body"); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.requests()); int64(n) != started.Load() || n != 3 {
		t.Errorf("%d requests arrived, %d were started", n, started.Load())
	}
}

// TestBodies: the same bytes are sent again, up to the limit; a longer body only with GetBody.
func TestBodies(t *testing.T) {
	t.Parallel()
	const limit = 1000
	fits, over := strings.Repeat("b", limit), strings.Repeat("b", limit+1)
	// stream makes a body of unknown length, without GetBody.
	stream := func(s string) io.Reader { return io.MultiReader(strings.NewReader(s)) }
	for name, one := range map[string]struct {
		body io.Reader
		want string
		err  error
	}{
		"at the limit":                  {strings.NewReader(fits), fits, nil},
		"at the limit, a stream":        {stream(fits), fits, nil},
		"over the limit, with GetBody":  {strings.NewReader(over), over, nil},
		"over the limit, a stream":      {stream(over), "", client.ErrBodyTooLarge},
		"empty stream":                  {stream(""), "", nil},
		"none":                          {nil, "", nil},
		"a body that can't be read":     {io.MultiReader(strings.NewReader("b"), failing{}), "", errFailing},
		"another length than announced": {nil, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, each("lost", "503 unknown", "201 executed"))
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL, one.body)
			if err != nil {
				t.Fatal(err)
			}
			response, err := newClient(t, quick(func(o *client.Options) { o.BodyBytesMax = limit })).Do(r)
			if one.err != nil {
				expectError(t, err, idempotency.OutcomeNotExecuted, one.err)
				if n := len(s.requests()); n != 0 {
					t.Errorf("%d requests arrived", n)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_ = response.Body.Close()
			for _, arrived := range s.requests() {
				if arrived.body != one.want {
					t.Errorf("a body of %d bytes arrived, want %d", len(arrived.body), len(one.want))
				}
			}
			if n := len(s.requests()); n != 3 {
				t.Errorf("%d requests arrived, want 3", n)
			}
		})
	}
}

var errFailing = errors.New("no more")

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errFailing }

// closing notes that a body was closed.
type closing struct {
	io.Reader
	closed *atomic.Int64
}

func (c closing) Close() error {
	c.closed.Add(1)
	return nil
}

func TestBodyIsClosedAndAsLongAsAnnounced(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("201 executed"))
	c := newClient(t, quick())
	for _, one := range []struct {
		length int64
		ctx    context.Context
		sent   int
	}{{4, t.Context(), 1}, {5, t.Context(), 0}, {1<<20 + 1, t.Context(), 0}, {4, client.WithKey(t.Context(), "a b"), 0}} {
		before := len(s.requests())
		var closed atomic.Int64
		r, err := http.NewRequestWithContext(one.ctx, http.MethodPost, s.server.URL, closing{strings.NewReader("body"), &closed})
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = one.length
		response, err := c.Transport.RoundTrip(r)
		if err == nil {
			_ = response.Body.Close()
		} else {
			expectError(t, err, idempotency.OutcomeNotExecuted, nil)
		}
		if n := len(s.requests()) - before; n != one.sent || closed.Load() == 0 {
			t.Errorf("length %d: %d requests arrived, the body was closed %d times", one.length, n, closed.Load())
		}
	}
}

// TestAnswerThatBreaksOffIsLost: an answer that breaks off within the limit for reading answers is
// lost. Beyond the limit the caller reads the rest.
func TestAnswerThatBreaksOffIsLost(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	for name, one := range map[string]struct {
		length, cut int // of the first answer's body, and the offset at which the connection breaks
		requests    int
		readErr     bool
	}{
		"whole, at the limit":        {limit, limit, 1, false},
		"whole, over the limit":      {limit + 1, limit + 1, 1, false},
		"cut at once":                {limit, 0, 2, false},
		"cut before the limit":       {limit, limit - 1, 2, false},
		"cut far beyond the limit":   {4 * limit, 3 * limit, 1, true},
		"over, and cut before it is": {4 * limit, limit / 2, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, func(n int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Idempotency-Status", "executed")
				if n > 1 {
					_, _ = io.WriteString(w, "replay")
					return
				}
				w.Header().Set("Content-Length", fmt.Sprint(one.length))
				_, _ = w.Write(bytes.Repeat([]byte("a"), one.cut))
				if one.cut < one.length {
					_ = http.NewResponseController(w).Flush()
					lose()
				}
			})
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			response, err := newClient(t, quick(func(o *client.Options) { o.AnswerBytesMax = limit })).Do(r)
			if err != nil {
				t.Fatal(err)
			}
			content, err := io.ReadAll(response.Body)
			if closeErr := response.Body.Close(); closeErr != nil {
				t.Error(closeErr)
			}
			if (err != nil) != one.readErr || len(s.requests()) != one.requests {
				t.Errorf("%d requests; the caller read %d bytes: %v", len(s.requests()), len(content), err)
			}
			if one.requests == 1 && !one.readErr && len(content) != one.length {
				t.Errorf("the caller read %d bytes of %d", len(content), one.length)
			}
		})
	}
}

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
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptTimedOut)
	for _, r := range s.requests() {
		if r.key != s.requests()[0].key {
			t.Errorf("keys %s and %s", r.key, s.requests()[0].key)
		}
	}
}

// TestCompressedAnswerTakesWhatItMay: 64 MB of zeros are 64 kB on the wire. AnswerBytesMax counts
// the bytes after unpacking.
func TestCompressedAnswerTakesWhatItMay(t *testing.T) {
	// Not parallel: it measures allocations.
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

// TestCompressedAnswerIsWhatTheBaseMakesOfIt: the base unpacks an answer only if it asked for
// compression itself.
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

// TestRedirectsInACircleEnd: http.Client ends them, and nothing is retried.
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

// TestConnectionThatWasClosedWhileIdleLosesNothing: a balancer closes idle connections. Each
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

// TestRequestThatStoodStillIsNotSentAgain: a process may be stopped during a pause for longer than
// the server keeps a key. If it sent the request again, it would be executed again.
func TestRequestThatStoodStillIsNotSentAgain(t *testing.T) {
	t.Parallel()
	for name, stopped := range map[string]time.Duration{"within TotalMax": 9 * time.Second, "past TotalMax": 25 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			sent := 0
			transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
				if sent++; sent == 2 {
					return answerOf(r, 201, "Idempotency-Status", "executed"), nil
				}
				return answerOf(r, 503, "Idempotency-Status", "unknown"), nil
			}), &client.Options{
				Honours: client.Everywhere, TotalMax: 10 * time.Second, BackoffFirst: 1, BackoffMax: 1,
				Trace: func(_ context.Context, e client.Event) {
					if e.Kind == client.EventWaiting {
						time.Sleep(stopped) // the request's goroutine stands still, and all clocks run on
					}
				},
			})
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bank.example/", strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			response, err := transport.RoundTrip(r)
			if stopped < 10*time.Second {
				if err != nil || response.StatusCode != 201 || sent != 2 {
					t.Errorf("%s: sent %d times: %v", name, sent, err)
				}
				return
			}
			if sent != 1 {
				t.Errorf("%s: sent %d times", name, sent)
			}
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrTimeSpent)
		})
	}
}

// real is a service behind the real middleware. Its handler runs count as effects.
type real struct {
	url     string
	pool    *pgxpool.Pool // nil: the store is in memory
	effects func() int
}

// lossy loses the replies of every third request, and every fifth request before it arrives.
func lossy(next http.Handler) http.Handler {
	var n atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch n := n.Add(1); {
		case n%3 == 0:
			next.ServeHTTP(httptest.NewRecorder(), r)
			lose()
		case n%5 == 0:
			lose()
		}
		next.ServeHTTP(w, r)
	})
}

func onMemory(t *testing.T) *real {
	var runs atomic.Int64
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "effect %d", runs.Add(1))
	})
	idem := middleware.New(memory.New(nil), account, nil)
	server := httptest.NewServer(lossy(idem.Handler(handler)))
	t.Cleanup(server.Close)
	return &real{url: server.URL, effects: func() int { return int(runs.Load()) }}
}

func account(*http.Request) (string, error) { return "acme", nil }

func onPostgreSQL(t *testing.T) *real {
	s := testservice.New(t, nil)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var id int64
		if err := postgres.Tx(r.Context()).QueryRow(r.Context(), "INSERT INTO effects DEFAULT VALUES RETURNING id").Scan(&id); err != nil {
			http.Error(w, "failed", http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "effect %d", id)
	})
	idem := middleware.New(s.Store, account, nil)
	server := httptest.NewServer(lossy(idem.Handler(handler)))
	t.Cleanup(server.Close)
	return &real{url: server.URL, pool: s.Pool, effects: func() int { return s.Effects(t) }}
}

// TestLostRepliesHaveOneEffect: with the real middleware, in memory and on PostgreSQL, each request
// has one effect, its caller gets its answer, and no two callers get the same one.
func TestLostRepliesHaveOneEffect(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) *real{"memory": onMemory, "PostgreSQL": onPostgreSQL} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			service := start(t)
			c := newClient(t, quick(func(o *client.Options) { o.AttemptsMax, o.Unbudgeted = 50, true }))
			const requests = 60
			var mu sync.Mutex
			answers := map[string]int{}
			replayed := 0
			var group sync.WaitGroup
			for range 6 {
				group.Go(func() {
					for range requests / 6 {
						response, body, err := post(t, c, t.Context(), service.url, "body")
						if err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						answers[body]++
						if response.Header.Get("Idempotency-Status") == "replayed" {
							replayed++
						}
						mu.Unlock()
					}
				})
			}
			group.Wait()
			if n := service.effects(); n != requests || len(answers) != requests || replayed == 0 {
				t.Errorf("%d requests had %d effects and %d answers, %d of them replayed", requests, n, len(answers), replayed)
			}
		})
	}
}

// TestRealRefusalsAreTheCallers: if the middleware refuses the request itself, the caller gets that
// answer at once.
func TestRealRefusalsAreTheCallers(t *testing.T) {
	t.Parallel()
	refuse := func(*http.Request) (string, error) { return "", fmt.Errorf("nobody") }
	service := middleware.New(memory.New(nil), refuse, nil).Handler(http.NotFoundHandler())
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		service.ServeHTTP(w, r)
	}))
	defer server.Close()
	response, _, err := post(t, newClient(t, quick()), t.Context(), server.URL, "body")
	if err != nil || response.StatusCode != 401 || response.Header.Get("Idempotency-Status") != string(idempotency.OutcomeNotExecuted) || requests.Load() != 1 {
		t.Errorf("after %d requests: %v, %v", requests.Load(), response, err)
	}

	good := onMemory(t)
	c := newClient(t, quick(func(o *client.Options) { o.AttemptsMax, o.Unbudgeted = 50, true }))
	ctx := client.WithKey(t.Context(), "mine")
	if response, _, err := post(t, c, ctx, good.url, "body"); err != nil || response.StatusCode != 201 {
		t.Errorf("the first request: %v, %v", response, err)
	}
	if response, _, err := post(t, c, ctx, good.url, "another body"); err != nil || response.StatusCode != 422 {
		t.Errorf("another request with the key: %v, %v", response, err)
	}
}
