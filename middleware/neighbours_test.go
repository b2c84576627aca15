package middleware_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Other parts of a service's chain: proxies, timeouts, limits and clients.

// A gateway mounts a reverse proxy as the handler. The upstream may stream, send 1xx, speak the
// same protocol, or break off: an answer that broke off is not recorded, and its writes are undone.
func TestReverseProxyAsHandler(t *testing.T) {
	t.Parallel()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		flush := http.NewResponseController(w).Flush
		switch r.Header.Get("Mode") {
		case "break":
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(http.StatusCreated)
			_, _ = io.WriteString(w, "half")
			_ = flush()
			panic(http.ErrAbortHandler)
		case "hints":
			w.Header().Set("Link", "</a.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
		case "stream":
			w.WriteHeader(http.StatusCreated)
			for range 3 {
				_, _ = io.WriteString(w, "x")
				_ = flush()
			}
			return
		}
		w.Header().Set("Idempotency-Status", "replayed")
		w.Header().Set("Idempotent-Replayed", "true")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "key "+r.Header.Get("Idempotency-Key"))
	}))
	t.Cleanup(upstream.Close)
	target, err := url.Parse(upstream.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.FlushInterval = -1
	proxy.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
			t.Error(err)
		}
		proxy.ServeHTTP(w, r)
	})
	for mode, body := range map[string]string{"plain": "key plain", "hints": "key hints", "stream": "xxx"} {
		for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
			got := b.post(t, "/", "{}", "Idempotency-Key", mode, "Mode", mode)
			want(t, got, 201, outcome, "")
			if got.body != body {
				t.Errorf("%s: %q, want %q", mode, got.body, body)
			}
		}
	}
	before := b.effects(t)
	for range 2 {
		r, err := http.NewRequest(http.MethodPost, b.server.URL, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header = http.Header{"Account": {"acme"}, "Idempotency-Key": {"break"}, "Mode": {"break"}}
		response, err := b.client.Do(r)
		if err == nil {
			_, err = io.ReadAll(response.Body)
			_ = response.Body.Close()
		}
		if err == nil {
			t.Error("the client got an answer")
		}
	}
	if n := b.effects(t); n != before || b.records(t) != 3 {
		t.Errorf("%d effects of an answer that broke off, %d records", n-before, b.records(t))
	}
}

// A timeout outside that writes its 504 after the handler has returned comes too late: the answer
// is already written.
func TestTimeoutOfAContextOutside(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		inner := idem.Handler(h)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), time.Millisecond)
			defer func() {
				cancel()
				if ctx.Err() == context.DeadlineExceeded {
					w.WriteHeader(http.StatusGatewayTimeout)
				}
			}()
			<-ctx.Done()
			inner.ServeHTTP(w, r.WithContext(ctx))
		})
	}}, func(w http.ResponseWriter, r *http.Request) {
		if r.Context().Err() != nil {
			t.Error("the handler's context ended with that of the request")
		}
		transfer(w, r)
	})
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeReplayed, "")
}

// A timeout inside abandons the handler, and its goroutine goes on: it finds the transaction
// sealed.
func TestTimeoutHandlerInside(t *testing.T) {
	t.Parallel()
	slow, sealed, late := true, make(chan struct{}), make(chan error, 1)
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		return idem.Handler(http.TimeoutHandler(h, 100*time.Millisecond, "too slow"))
	}}, func(w http.ResponseWriter, r *http.Request) {
		if !slow {
			transfer(w, r)
			return
		}
		ctx := context.WithoutCancel(r.Context())
		tx := postgres.Tx(ctx)
		// On a busy machine the timeout may have passed by now.
		_, _ = tx.Exec(ctx, "INSERT INTO effects DEFAULT VALUES")
		<-sealed
		_, err := tx.Exec(ctx, "INSERT INTO effects DEFAULT VALUES")
		late <- err
	})
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 503, idempotency.OutcomeNotExecuted, "")
	close(sealed)
	if err := <-late; err == nil {
		t.Error("the late write succeeded")
	}
	slow = false
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects", n)
	}
}

// An outer body limit that is lower than ours still applies.
func TestMaxBytesHandlerOutside(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		return http.MaxBytesHandler(idem.Handler(h), 10)
	}}, transfer)
	want(t, b.post(t, "/", strings.Repeat("x", 11), "Idempotency-Key", "k"), 413, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge)
	want(t, b.post(t, "/", strings.Repeat("x", 10), "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// A handler of server-sent events finds that it can't stream, and answers so.
func TestServerSentEventsAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) {
		if _, ok := w.(http.Flusher); !ok {
			http.Error(w, "streaming is not supported", http.StatusInternalServerError)
		}
	})
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 500, idempotency.OutcomeNotExecuted, "")
}

// Requests with one key that are sent without waiting for answers (pipelining) are executed once,
// in their order.
func TestPipelinedRequestsAreOne(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	conn := b.dial(t)
	if _, err := io.WriteString(conn, strings.Repeat("POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nContent-Length: 2\r\n\r\n{}", 3)); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(conn)
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeReplayed} {
		response, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		want(t, read(t, response), 201, outcome, "")
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects", n)
	}
}

// A retry with a new signature is the same request if the signature is in headers. In the query it
// is another one, unless a fingerprint leaves it out. The path is compared byte by byte.
func TestWhatIsSpelledAnewIsAnotherRequest(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/", idem.Handler(h))
		mux.Handle("/signed", idem.With(func(o *middleware.Options) {
			o.Fingerprinters = []middleware.Fingerprinter{{Version: 100, Content: func(r *http.Request, body []byte) []byte {
				query := r.URL.Query()
				query.Del("ts")
				query.Del("sig")
				return fmt.Appendf(nil, "%q %q %q %q", r.Method, r.URL.Path, query.Encode(), body)
			}}}
		}).Handler(h))
		return mux
	}}, transfer)
	for i, c := range []struct {
		first, second string // targets
		status        int
	}{
		{"/t", "/t", 201}, {"/t?ts=1&sig=a", "/t?ts=2&sig=b", 422}, {"/signed?to=bob&ts=1&sig=a", "/signed?ts=2&sig=b&to=bob", 201},
		{"/signed?to=bob&ts=1&sig=a", "/signed?ts=2&sig=b&to=eve", 422}, {"/caf%c3%a9", "/caf%C3%A9", 422}, {"/a%7eb", "/a~b", 422},
	} {
		key := fmt.Sprint("k", i)
		want(t, b.post(t, c.first, "{}", "Idempotency-Key", key, "X-Signature", "a"), 201, idempotency.OutcomeExecuted, "")
		got := b.post(t, c.second, "{}", "Idempotency-Key", key, "X-Signature", "b")
		if got.status != c.status {
			t.Errorf("%s, then %s: %d %s, want %d", c.first, c.second, got.status, got.outcome, c.status)
		}
	}
}

// A retry that is compressed again is another request if the handler unpacks it: the bytes count,
// and compressors write the time. Mounted outside, the decompressor makes them one
// (TestBodyReplacedOutside).
func TestBodyCompressedAnewIsAnotherRequestToAHandlerThatUnpacks(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		return idem.Handler(decompress(h, false, false))
	}}, transfer)
	send := func(at int64) reply {
		return b.post(t, "/", zipped(t, `{"to":"bob"}`, time.Unix(at, 0)), "Idempotency-Key", "k", "Content-Encoding", "gzip")
	}
	want(t, send(1_700_000_000), 201, idempotency.OutcomeExecuted, "")
	want(t, send(1_700_000_000), 201, idempotency.OutcomeReplayed, "")
	want(t, send(1_700_000_030), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
}

// Only the status decides, not the body: an error within a 200, as in GraphQL, is a final answer,
// and its writes are committed.
func TestErrorWithinA200IsAnAnswer(t *testing.T) {
	t.Parallel()
	const failed = `{"data":null,"errors":[{"message":"upstream timed out"}]}`
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(w, failed)
	})
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		got := b.post(t, "/graphql", `{"query":"mutation{pay}"}`, "Idempotency-Key", "k")
		want(t, got, 200, outcome, "")
		if got.body != failed {
			t.Errorf("%s: %s", outcome, got.body)
		}
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects", n)
	}
}
