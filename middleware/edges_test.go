package middleware_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A caller without a scope is nobody, with a key and without one.
func TestCallerWithoutAScopeHasNoTransactionEither(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{Optional: true}}, transfer)
	for _, account := range []string{"empty", strings.Repeat("a", 256)} {
		want(t, b.post(t, "/", "{}", "Account", account), 401, idempotency.OutcomeNotExecuted, idempotency.ReasonScope)
		want(t, b.post(t, "/", "{}", "Account", account, "Idempotency-Key", "k"), 401, idempotency.OutcomeNotExecuted, idempotency.ReasonScope)
	}
	if b.runs.Load() != 0 {
		t.Error("the handler ran")
	}
}

// tracer keeps what it is told.
type tracer struct {
	mu      sync.Mutex
	refused []idempotency.Refused
	ended   []idempotency.RequestEnd
	started []idempotency.RequestStart
}

func (t *tracer) TraceRequestStart(ctx context.Context, data idempotency.RequestStart) context.Context {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.started = append(t.started, data)
	return ctx
}

func (t *tracer) TraceStep(context.Context, idempotency.StepEnd) {}

func (t *tracer) TraceRequestEnd(_ context.Context, data idempotency.RequestEnd) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = append(t.ended, data)
}

func (t *tracer) TraceRefused(_ context.Context, data idempotency.Refused) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refused = append(t.refused, data)
}

// The tracer is told of each refusal as the client is, and of nothing that the client or the scope function said.
func TestTracerIsToldOfRefusals(t *testing.T) {
	t.Parallel()
	told := &tracer{}
	b := setup(t, setupOptions{middleware: &middleware.Options{BodyBytesMax: 10, Tracer: told}}, transfer)
	for i, got := range []reply{
		b.post(t, "/", "{}"),
		b.post(t, "/", "{}", "Idempotency-Key", "canary canary"),
		b.post(t, "/", "{}", "Idempotency-Key", "canary", "Account", ""),
		b.post(t, "/", "{}", "Idempotency-Key", "canary", "Account", "blocked"),
		b.post(t, "/", strings.Repeat("canary", 2), "Idempotency-Key", "canary"),
	} {
		last := told.refused[i]
		if string(last.Reason) != got.problem || last.Status != got.status || last.Err == nil {
			t.Errorf("told %+v of %d %s", last, got.status, got.problem)
		}
		if text := fmt.Sprint(last.Err); strings.Contains(text, "canary") || strings.Contains(text, "account") {
			t.Errorf("told %q", text)
		}
	}
	if len(told.refused) != 5 || len(told.ended) != 0 {
		t.Errorf("%d refusals and %d requests, want 5 and none", len(told.refused), len(told.ended))
	}
}

// The rest of a body that is refused unread is not waited for.
func TestRefusedBodyClosesTheConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{BodyBytesMax: 10}}, transfer)
	conn := b.dial(t)
	if _, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nContent-Length: 11\r\n\r\n12345678901"); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn) // until the server closes
	if err != nil || !strings.Contains(string(answer), "\r\nConnection: close\r\n") {
		t.Errorf("%v: %s", err, answer)
	}
}

// Retry-After is in full seconds, rounded up, and no problem is ever cached.
func TestRetryAfterIsRoundedUp(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{middleware: &middleware.Options{RetryAfter: 1500 * time.Millisecond}}, func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-release
		transfer(w, r)
	})
	done := make(chan reply)
	go func() { done <- b.post(t, "/", "{}", "Idempotency-Key", "k") }()
	<-entered
	conflict := b.post(t, "/", "{}", "Idempotency-Key", "k")
	close(release)
	want(t, <-done, 201, idempotency.OutcomeExecuted, "")
	if after, cache := conflict.header.Get("Retry-After"), conflict.header.Get("Cache-Control"); after != "2" || cache != "no-store" {
		t.Errorf("Retry-After %q, Cache-Control %q", after, cache)
	}
}

// The handler sees a body of known length, however it came.
func TestChunkedBodyHasALength(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 2 || len(r.TransferEncoding) != 0 {
			t.Errorf("Content-Length %d, Transfer-Encoding %q", r.ContentLength, r.TransferEncoding)
		}
		transfer(w, r)
	})
	want(t, b.send(t, "POST", "/", io.MultiReader(strings.NewReader("{}")), "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// What the operator is told names the reason and follows the key by its hash; no part of a request is in it.
func TestLogTellsTheOperatorAndNobodysSecrets(t *testing.T) {
	t.Parallel()
	const secret = "canary"
	b := setup(t, setupOptions{store: &postgres.Options{AcquireTimeout: 50 * time.Millisecond}, poolMax: 1}, func(http.ResponseWriter, *http.Request) { panic(secret) })
	send := func() reply {
		return b.post(t, "/"+secret, `{"pan":"`+secret+`"}`, "Idempotency-Key", secret, "Account", secret, "Authorization", "Bearer "+secret, "Cookie", "session="+secret)
	}
	hash := idempotency.Key{Scope: secret, Value: secret}.String()

	want(t, send(), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	failed := b.logs.String()
	b.logs.Reset()
	held, err := b.pool.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	want(t, send(), 503, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	for logged, parts := range map[string][]string{
		failed:          {"level=ERROR", "reason=handler-failed", "outcome=not-executed", "key=" + hash, "stack=", "edges_test.go"},
		b.logs.String(): {"level=WARN", "reason=unavailable", "outcome=not-executed", "key=" + hash},
	} {
		for _, part := range parts {
			if !strings.Contains(logged, part) {
				t.Errorf("%s is not in: %s", part, logged)
			}
		}
		if strings.Contains(logged, secret) {
			t.Errorf("logged: %s", logged)
		}
	}
}

// The limit of an answer is the longest that there may be.
func TestAnswerAtItsLimit(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{AnswerBytesMax: 100}}, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, 60))
		_, _ = w.Write(make([]byte, 40))
	})
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		got := b.post(t, "/", "{}", "Idempotency-Key", "k")
		want(t, got, 200, outcome, "")
		if len(got.body) != 100 {
			t.Errorf("%s: %d bytes, want 100", outcome, len(got.body))
		}
	}
}

// What the handler says of its headers stands: an encoded body gets no guessed type, and what it took away of the
// headers set outside stays away.
func TestHeadersOfTheAnswerAreTheHandlers(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		inner := idem.Handler(handler)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Outside", "set")
			w.Header().Set("X-Kept", "set")
			inner.ServeHTTP(w, r)
		})
	}}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Del("X-Outside")
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = io.WriteString(w, "\x1f\x8b\x08")
	})
	r, err := http.NewRequest("POST", b.server.URL, strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Account": {"acme"}, "Idempotency-Key": {"k"}, "Accept-Encoding": {"gzip"}} // or the transport decodes it
	response, err := b.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	got := read(t, response)
	want(t, got, 200, idempotency.OutcomeExecuted, "")
	if _, set := got.header["Content-Type"]; set || got.header.Get("X-Outside") != "" || got.header.Get("X-Kept") != "set" {
		t.Errorf("header %v", got.header)
	}
}

// Every method that may change something is made idempotent.
func TestUnsafeMethodsAreIdempotent(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "CONNECTED", "get"} {
		want(t, b.send(t, method, "/", http.NoBody), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing)
		want(t, b.send(t, method, "/", http.NoBody, "Idempotency-Key", method), 201, idempotency.OutcomeExecuted, "")
		want(t, b.send(t, method, "/", http.NoBody, "Idempotency-Key", method), 201, idempotency.OutcomeReplayed, "")
	}
	if b.effects(t) != 6 {
		t.Errorf("%d effects, want 6", b.effects(t))
	}
}

// Routes with options of their own share one count of requests in flight.
func TestRoutesShareTheInFlightCap(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	var inFlight func() int
	b := setup(t, setupOptions{
		middleware: &middleware.Options{InFlightMax: 1},
		mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			mux := http.NewServeMux()
			mux.Handle("/one", idem.Handler(handler))
			mux.Handle("/other", idem.With(func(o *middleware.Options) { o.TTL = time.Hour }).Handler(handler))
			inFlight = idem.InFlight
			return mux
		},
	}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/other" {
			close(entered)
			<-release
		}
		transfer(w, r)
	})
	done := make(chan reply)
	go func() { done <- b.post(t, "/other", "{}", "Idempotency-Key", "other") }()
	<-entered
	if n := inFlight(); n != 1 {
		t.Errorf("%d in flight, want 1", n)
	}
	want(t, b.post(t, "/one", "{}", "Idempotency-Key", "one"), 503, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	close(release)
	want(t, <-done, 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/one", "{}", "Idempotency-Key", "one"), 201, idempotency.OutcomeExecuted, "")
	if n := inFlight(); n != 0 {
		t.Errorf("%d in flight, want none", n)
	}
}

// The record keeps the trace of the run that was executed, not of a retry.
func TestTraceOfTheFirstRunIsRecorded(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	const first, second = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k", "Traceparent", "00-"+first+"-00f067aa0ba902b7-01"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k", "Traceparent", "00-"+second+"-00f067aa0ba902b7-01"), 201, idempotency.OutcomeReplayed, "")
	if n := b.count(t, "SELECT count(*) FROM idempotency_keys WHERE trace_id = '"+first+"'"); n != 1 {
		t.Errorf("%d records have the first trace, want 1", n)
	}
}

// A body that something outside has read is no empty body: two transfers would have one fingerprint.
func TestBodyReadOutsideIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		inner := idem.Handler(handler)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = r.ParseForm()
			inner.ServeHTTP(w, r)
		})
	}}, transfer)
	for _, body := range []string{"amount=1", "amount=1000"} {
		got := b.post(t, "/", body, "Idempotency-Key", "k", "Content-Type", "application/x-www-form-urlencoded")
		want(t, got, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
	for _, body := range []string{"amount=1", "amount=1000"} { // nor where no length was announced
		got := b.send(t, http.MethodPost, "/", io.MultiReader(strings.NewReader(body)), "Idempotency-Key", "chunked", "Content-Type", "application/x-www-form-urlencoded")
		want(t, got, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
	if b.runs.Load() != 0 {
		t.Error("the handler ran")
	}
	if logged := b.logs.String(); strings.Count(logged, "level=ERROR") != 4 || !strings.Contains(logged, "inside") {
		t.Errorf("the log names no remedy: %s", logged)
	}
}

// A handler that wants no Content-Type gets none, and a replay has none either.
func TestReplayGuessesNoType(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil
		_, _ = io.WriteString(w, "<html>")
	})
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		got := b.post(t, "/", "{}", "Idempotency-Key", "k")
		want(t, got, 200, outcome, "")
		if types := got.header["Content-Type"]; types != nil {
			t.Errorf("%s: Content-Type %q", outcome, types)
		}
	}
}
