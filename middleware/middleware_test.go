package middleware_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The table of the protocol, row by row.

func TestFirstRunThenReplay(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	first := b.post(t, "/transfers", "{}", "Idempotency-Key", "k")
	want(t, first, 201, idempotency.OutcomeExecuted, "")
	if first.header.Get("Set-Cookie") == "" || first.header.Get("Idempotent-Replayed") != "" {
		t.Errorf("header %v", first.header)
	}
	for _, key := range []string{"k", `"k"`} {
		replay := b.post(t, "/transfers", "{}", "Idempotency-Key", key)
		want(t, replay, 201, idempotency.OutcomeReplayed, "")
		if replay.body != first.body || replay.header.Get("Location") != first.header.Get("Location") || replay.header.Get("Content-Type") != first.header.Get("Content-Type") {
			t.Errorf("replayed %q %v", replay.body, replay.header)
		}
		if replay.header.Get("Idempotent-Replayed") != "true" || replay.header.Get("Set-Cookie") != "" {
			t.Errorf("header %v", replay.header)
		}
		created, err := time.Parse(time.RFC3339, replay.header.Get("Idempotency-Created-At"))
		if err != nil || time.Since(created) > time.Minute {
			t.Errorf("created at %v, %v", created, err)
		}
		expires, err := time.Parse(time.RFC3339, replay.header.Get("Idempotency-Expires-At"))
		if err != nil || expires.Sub(created).Round(time.Minute) != 24*time.Hour {
			t.Errorf("expires at %v, %v", expires, err)
		}
	}
	if b.runs.Load() != 1 || b.effects(t) != 1 || b.records(t) != 1 {
		t.Errorf("%d runs, %d effects, %d records", b.runs.Load(), b.effects(t), b.records(t))
	}
}

func TestCallerUnknown(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k", "Account", ""), 401, idempotency.OutcomeNotExecuted, idempotency.ReasonScope)
	want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k", "Account", "empty"), 401, idempotency.OutcomeNotExecuted, idempotency.ReasonScope)
	want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k", "Account", strings.Repeat("a", 256)), 401, idempotency.OutcomeNotExecuted, idempotency.ReasonScope)
	want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k", "Account", "message:ledger"), 401, idempotency.OutcomeNotExecuted, idempotency.ReasonScope) // of a consumer
	blocked := b.post(t, "/transfers", "{}", "Idempotency-Key", "k", "Account", "blocked")
	want(t, blocked, 403, idempotency.OutcomeNotExecuted, idempotency.ReasonScope)
	if !strings.Contains(blocked.body, "The account is blocked.") || blocked.header.Get("WWW-Authenticate") != "Bearer" {
		t.Errorf("header %v, body %s", blocked.header, blocked.body)
	}
	if b.runs.Load() != 0 {
		t.Error("the handler ran")
	}
	want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k", "Account", strings.Repeat("a", 255)), 201, idempotency.OutcomeExecuted, "")
}

func TestKeyReused(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	send := func(method, path, body, contentType string) reply {
		return b.send(t, method, path, strings.NewReader(body), "Idempotency-Key", "k", "Content-Type", contentType)
	}
	want(t, send("POST", "/a%2Fb?x=1&y=2", `{"a":1}`, "application/json"), 201, idempotency.OutcomeExecuted, "")
	for name, other := range map[string]reply{
		"another body":       send("POST", "/a%2Fb?x=1&y=2", `{"a":2}`, "application/json"),
		"one more space":     send("POST", "/a%2Fb?x=1&y=2", `{"a": 1}`, "application/json"),
		"another path":       send("POST", "/c?x=1&y=2", `{"a":1}`, "application/json"),
		"the path unescaped": send("POST", "/a/b?x=1&y=2", `{"a":1}`, "application/json"),
		"query order":        send("POST", "/a%2Fb?y=2&x=1", `{"a":1}`, "application/json"),
		"another method":     send("PUT", "/a%2Fb?x=1&y=2", `{"a":1}`, "application/json"),
		"another type":       send("POST", "/a%2Fb?x=1&y=2", `{"a":1}`, "application/merge-patch+json"),
		"a new boundary":     send("POST", "/a%2Fb?x=1&y=2", `{"a":1}`, "multipart/form-data; boundary=x"),
	} {
		t.Log(name)
		want(t, other, 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	}
	if b.runs.Load() != 1 {
		t.Errorf("%d runs, want 1", b.runs.Load())
	}
	// Another scope is another run, and so is a key in another case. A rotated credential is the
	// same account.
	want(t, b.post(t, "/t", "{}", "Idempotency-Key", "k", "Account", "globex"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/t", "{}", "Idempotency-Key", "K"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/t", "{}", "Idempotency-Key", "K", "Authorization", "Bearer rotated"), 201, idempotency.OutcomeReplayed, "")
	// Chunked or not, the same bytes are the same request.
	want(t, b.send(t, "POST", "/t", io.MultiReader(strings.NewReader("{}")), "Idempotency-Key", "K"), 201, idempotency.OutcomeReplayed, "")
	// A replay ignores preconditions and ranges.
	want(t, b.post(t, "/t", "{}", "Idempotency-Key", "K", "If-Match", `"x"`, "Range", "bytes=0-1"), 201, idempotency.OutcomeReplayed, "")
}

func TestInProgress(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-release
		transfer(w, r)
	})
	done := make(chan reply)
	go func() { done <- b.post(t, "/transfers", "{}", "Idempotency-Key", "k") }()
	<-entered
	conflict := b.post(t, "/transfers", "{}", "Idempotency-Key", "k")
	want(t, conflict, 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	if got := conflict.header.Get("Retry-After"); got != "1" {
		t.Errorf("Retry-After %q", got)
	}
	close(release)
	want(t, <-done, 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeReplayed, "")
}

// A handler that fails leaves nothing behind, and a retry runs again.
func TestHandlerFailed(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]http.HandlerFunc{
		"panic":                  func(http.ResponseWriter, *http.Request) { panic("canary") },
		"panic after the status": func(w http.ResponseWriter, r *http.Request) { transfer(w, r); panic(errors.New("canary")) },
		"nil dereference":        func(http.ResponseWriter, *http.Request) { var p *int; *p = 1 },
		"answer over the limit":  func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 101)) },
		"limit passed in pieces": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(make([]byte, 100))
			_, _ = w.Write([]byte{1})
		},
		"2xx on an aborted one": func(w http.ResponseWriter, r *http.Request) {
			_, _ = postgres.Tx(r.Context()).Exec(r.Context(), "SELECT 1/0")
			w.WriteHeader(201)
		},
		"a status that isn't one": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(99) },
		"switching protocols":     func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(101) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			failing := true
			b := setup(t, setupOptions{middleware: &middleware.Options{AnswerBytesMax: 100}}, func(w http.ResponseWriter, r *http.Request) {
				transfer(&headerless{w}, r)
				if failing {
					fail(w, r)
					return
				}
				w.WriteHeader(http.StatusOK)
			})
			failed := b.post(t, "/transfers", "{}", "Idempotency-Key", "k")
			want(t, failed, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			if strings.Contains(failed.body+b.logs.String(), "canary") {
				t.Errorf("the panic's value is shown: %s %s", failed.body, b.logs)
			}
			if !strings.Contains(b.logs.String(), "reason=handler-failed") {
				t.Errorf("logged: %s", b.logs)
			}
			if b.effects(t) != 0 || b.records(t) != 0 {
				t.Errorf("%d effects, %d records", b.effects(t), b.records(t))
			}
			failing = false // the retry runs again
			want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k"), 200, idempotency.OutcomeExecuted, "")
		})
	}
}

// headerless hides a handler's answer, and leaves its effect.
type headerless struct{ w http.ResponseWriter }

func (h *headerless) Header() http.Header { return http.Header{} }

func (h *headerless) WriteHeader(int) {}

func (h *headerless) Write(p []byte) (int, error) { return len(p), nil }

// http.ErrAbortHandler is passed on, and nothing is executed.
func TestAbortHandlerGoesOn(t *testing.T) {
	t.Parallel()
	abort := true
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		transfer(w, r)
		if abort {
			panic(http.ErrAbortHandler)
		}
	})
	r, err := http.NewRequest("POST", b.server.URL, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Account", "acme")
	r.Header["Idempotency-Key"] = []string{"k"}
	r.GetBody = nil
	r.Body = io.NopCloser(strings.NewReader("x"))
	if response, err := b.client.Do(r); err == nil {
		_ = response.Body.Close()
		t.Errorf("status %d, want a cut connection", response.StatusCode)
	}
	if b.effects(t) != 0 || b.records(t) != 0 || b.logs.Len() != 0 {
		t.Errorf("%d effects, %d records, logged %q", b.effects(t), b.records(t), b.logs)
	}
	abort = false
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// The handler ended the transaction behind our back; storage/postgres shows how. Here a trigger
// stands in for it: it refuses the record as that of another transaction.
func TestTransactionLost(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	_, err := b.pool.Exec(context.Background(), `
		CREATE FUNCTION other_transaction() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.created_at = NULL; RETURN NEW; END $$;
		CREATE TRIGGER other_transaction BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION other_transaction()`)
	if err != nil {
		t.Fatal(err)
	}
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 500, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
}

func TestUnavailable(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{store: &postgres.Options{AcquireTimeout: 50 * time.Millisecond}, poolMax: 1}, transfer)
	held, err := b.pool.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	refused := b.post(t, "/", "{}", "Idempotency-Key", "k")
	want(t, refused, 503, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	if refused.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	held.Release()
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// If the reply to COMMIT is lost, and the key is held by others while its record is looked up, the
// outcome is unknown. Once the key is free a retry gets the truth.
func TestOutcomeUnknown(t *testing.T) {
	t.Parallel()
	var b *testBundle
	lock := idempotency.Key{Scope: "acme", Value: "k"}.LockNumber("public." + postgres.TableName)
	var holder *pgxpool.Conn
	b = setup(t, setupOptions{middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Resolve: 500 * time.Millisecond}}}, func(w http.ResponseWriter, r *http.Request) {
		transfer(w, r)
		if holder != nil {
			return
		}
		var pid int
		if err := postgres.Tx(r.Context()).QueryRow(r.Context(), "SELECT pg_backend_pid()").Scan(&pid); err != nil {
			t.Error(err)
		}
		if _, err := b.pool.Exec(context.Background(), "SELECT pg_terminate_backend($1, 5000)", pid); err != nil {
			t.Error(err)
		}
		var err error
		if holder, err = b.pool.Acquire(context.Background()); err == nil {
			_, err = holder.Exec(context.Background(), "SELECT pg_advisory_lock($1)", lock)
		}
		if err != nil {
			t.Error(err)
		}
	})
	unknown := b.post(t, "/", "{}", "Idempotency-Key", "k")
	want(t, unknown, 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if unknown.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if _, err := holder.Exec(context.Background(), "SELECT pg_advisory_unlock($1)", lock); err != nil {
		t.Error(err)
	}
	holder.Release()
	// The session that looked up the COMMIT may hold the lock for a moment more.
	want(t, b.settle(t, "k"), 201, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

func TestSafeMethodsPassThrough(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "TRACE", "QUERY"} {
		for range 2 {
			got := b.send(t, method, "/", strings.NewReader(map[string]string{"QUERY": "amount > 100"}[method]), "Idempotency-Key", "k", "Account", "")
			if got.status != http.StatusTeapot || got.outcome != "" {
				t.Errorf("%s: %d %q", method, got.status, got.outcome)
			}
		}
	}
	if b.runs.Load() != 10 {
		t.Errorf("%d runs, want 10", b.runs.Load())
	}
}

func TestAuthorizeReplay(t *testing.T) {
	t.Parallel()
	revoked := false
	var b *testBundle
	b = setup(t, setupOptions{poolMax: 1, middleware: &middleware.Options{AuthorizeReplay: func(r *http.Request, record *idempotency.Record) error {
		if record.Answer.Status != 201 {
			t.Errorf("record %+v", record)
		}
		if n := b.count(t, "SELECT 1"); n != 1 { // the connection was given back
			t.Error(n)
		}
		if revoked {
			return errors.New("revoked")
		}
		return nil
	}}}, transfer)
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeReplayed, "")
	revoked = true
	denied := b.post(t, "/", "{}", "Idempotency-Key", "k")
	want(t, denied, 403, idempotency.OutcomeUnknown, idempotency.ReasonReplayDenied)
	if denied.header.Get("Location") != "" || denied.header.Get("Idempotent-Replayed") != "" {
		t.Errorf("header %v", denied.header)
	}
}

func TestInFlightCapCountsNoSlowBodies(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{middleware: &middleware.Options{InFlightMax: 1}}, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Slow") != "" {
			close(entered)
			<-release
		}
		transfer(w, r)
	})
	for range 20 { // bodies that never arrive
		conn := b.dial(t)
		if _, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nContent-Length: 10\r\n\r\n{"); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan reply)
	go func() { done <- b.post(t, "/", "{}", "Idempotency-Key", "slow", "Slow", "1") }()
	<-entered
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "other"), 503, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	close(release)
	want(t, <-done, 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "other"), 201, idempotency.OutcomeExecuted, "")
}

func TestRoutesHaveOptionsOfTheirOwn(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/day", idem.Handler(handler))
		mux.Handle("/hour", idem.With(func(o *middleware.Options) { o.TTL = time.Hour; o.Optional = true }).Handler(handler))
		return mux
	}}, transfer)
	want(t, b.post(t, "/day", "{}"), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing)
	want(t, b.post(t, "/hour", "{}"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/day", "{}", "Idempotency-Key", "day"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/hour", "{}", "Idempotency-Key", "hour"), 201, idempotency.OutcomeExecuted, "")
	if n := b.count(t, "SELECT count(*) FROM idempotency_keys WHERE (key, date_trunc('hour', expires_at - created_at)) IN (('day', '24 hours'), ('hour', '1 hour'))"); n != 2 {
		t.Errorf("%d records have their route's TTL, want 2", n)
	}
}

// A second run starts from the original request: its body, its headers, and its router's state.
func TestSecondRunStartsFromTheRequestAsItCame(t *testing.T) {
	t.Parallel()
	var runs int
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || string(body) != "{}" || r.Header.Get("Changed") != "" || r.URL.Path == "/changed" || w.Header().Get("Left") != "" || r.ContentLength != 2 {
			t.Errorf("run %d: body %q, %v, header %v, path %s", runs, body, err, r.Header, r.URL.Path)
		}
		r.Header.Set("Changed", "yes")
		r.URL.Path = "/changed"
		w.Header().Set("Left", "behind")
		if runs++; runs%2 == 1 {
			_, _ = postgres.Tx(r.Context()).Exec(r.Context(), "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		transfer(w, r)
	}
	for name, c := range map[string]struct {
		mount  func(idem *middleware.Middleware, handler http.Handler) http.Handler
		state  middleware.RouterStateFunc
		status int
		reason idempotency.Reason
	}{
		"net/http": {func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			mux := http.NewServeMux()
			mux.Handle("POST /v1/transfers", idem.Handler(handler))
			return mux
		}, nil, 201, ""},
		"chi With": {func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			r := chi.NewRouter()
			r.With(idem.Handler).Method("POST", "/v1/transfers", handler)
			return r
		}, chiroute.State, 201, ""},
		"chi Use": {func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			r := chi.NewRouter()
			r.Use(idem.Handler)
			r.Route("/v1", func(r chi.Router) { r.Method("POST", "/transfers", handler) })
			return r
		}, chiroute.State, 201, ""},
		"chi Route": {func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			r := chi.NewRouter()
			r.Route("/v1", func(r chi.Router) {
				r.Use(idem.Handler)
				r.Route("/transfers", func(r chi.Router) { r.Method("POST", "/", handler) })
			})
			return r
		}, chiroute.State, 201, ""},
		"chi Mount": {func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			inner := chi.NewRouter()
			inner.Method("POST", "/transfers", handler)
			r := chi.NewRouter()
			r.With(idem.Handler).Mount("/v1", inner)
			return r
		}, chiroute.State, 201, ""},
		"chi without its state": {func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			r := chi.NewRouter()
			r.Use(idem.Handler)
			r.Route("/v1", func(r chi.Router) { r.Method("POST", "/transfers", handler) })
			return r
		}, nil, 503, idempotency.ReasonUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			runs = 0
			b := setup(t, setupOptions{mount: c.mount, middleware: &middleware.Options{RouterState: c.state}}, handler)
			outcome := idempotency.OutcomeExecuted
			if c.status != 201 {
				outcome = idempotency.OutcomeNotExecuted
			}
			got := b.post(t, "/v1/transfers", "{}", "Idempotency-Key", "k")
			want(t, got, c.status, outcome, c.reason)
			if effects := b.effects(t); (effects == 1) != (c.status == 201) {
				t.Errorf("%d effects", effects)
			}
		})
	}
}

func TestOwnFingerprint(t *testing.T) {
	t.Parallel()
	byHeader := func(name string) func(*http.Request, []byte) []byte {
		return func(r *http.Request, _ []byte) []byte { return []byte(r.Header.Get(name)) }
	}
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		programs := map[string]http.Handler{}
		for program, fingerprints := range map[string][]middleware.Fingerprinter{
			"built-in": nil,
			"own":      {{Version: 100, Content: byHeader("One")}, middleware.FingerprinterV1()},
			"newer":    {{Version: 101, Content: byHeader("Two")}, {Version: 100, Content: byHeader("One")}},
		} {
			programs[program] = idem.With(func(o *middleware.Options) { o.Fingerprinters = fingerprints }).Handler(handler)
		}
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { programs[r.Header.Get("Program")].ServeHTTP(w, r) })
	}}, transfer)
	want(t, b.post(t, "/x", "a", "Program", "built-in", "Idempotency-Key", "v1"), 201, idempotency.OutcomeExecuted, "")
	// Compared with the old function.
	want(t, b.post(t, "/x", "a", "Program", "own", "Idempotency-Key", "v1"), 201, idempotency.OutcomeReplayed, "")
	want(t, b.post(t, "/x", "b", "Program", "own", "Idempotency-Key", "v1"), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)

	want(t, b.post(t, "/x", "a", "Program", "own", "Idempotency-Key", "v100", "One", "1"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/x", "b", "Program", "own", "Idempotency-Key", "v100", "One", "1"), 201, idempotency.OutcomeReplayed, "")
	want(t, b.post(t, "/x", "b", "Program", "newer", "Idempotency-Key", "v100", "One", "1", "Two", "2"), 201, idempotency.OutcomeReplayed, "")
	want(t, b.post(t, "/x", "b", "Program", "newer", "Idempotency-Key", "v100", "One", "2", "Two", "2"), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)

	// A record with an unknown fingerprint function can't be compared, and so is never replayed.
	want(t, b.post(t, "/x", "a", "Program", "built-in", "Idempotency-Key", "v100", "One", "1"), 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
}

// Two routes that look alike to their handlers are still two requests: the target that the client
// sent counts.
func TestFingerprintIsOfTheTargetAsItWasSent(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/alice/", http.StripPrefix("/alice", idem.Handler(handler)))
		mux.Handle("/bob/", http.StripPrefix("/bob", idem.Handler(handler)))
		return mux
	}}, transfer)
	want(t, b.post(t, "/alice/debit", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/alice/debit", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeReplayed, "")
	want(t, b.post(t, "/bob/debit", "{}", "Idempotency-Key", "k"), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
}

// A caller without a scope is refused, with a key and without one.
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

// tracer keeps the events.
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

// The tracer gets the status and reason of each refusal that the client gets, and no text of the
// client or the scope function.
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

// The operator's log names the reason and the hash of the key, and contains no part of a request.
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
		failed:          {"level=ERROR", "reason=handler-failed", "outcome=not-executed", "key=" + hash, "stack=", "middleware_test.go"},
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

// The record keeps the trace of the executed run, not of a retry.
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

// If a client hangs up, in whatever phase, its request is executed once, as the retry finds.
func TestClientThatHangsUp(t *testing.T) {
	t.Parallel()
	entered := make(chan context.Context)
	release := make(chan struct{})
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		entered <- r.Context()
		<-release
		transfer(w, r)
	})
	head := func(key string) string {
		return "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nContent-Type: application/json\r\nIdempotency-Key: " + key + "\r\nContent-Length: 2\r\n\r\n"
	}
	hang := func(text string) {
		conn := b.dial(t)
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // a reset
			t.Fatal(err)
		}
		_ = conn.Close()
	}
	hang(head("in-the-head")[:40])
	hang(head("in-the-body") + "{")

	// While the handler runs: its context does not end.
	conn := b.dial(t)
	if _, err := io.WriteString(conn, head("in-the-handler")+"{}"); err != nil {
		t.Fatal(err)
	}
	ctx := <-entered
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "in-the-handler"), 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	if ctx.Err() != nil {
		t.Errorf("the handler's context ended with its client: %v", ctx.Err())
	}
	close(release)
	go func() {
		for range entered { // later handlers need not wait
		}
	}()
	t.Cleanup(func() { close(entered) })
	want(t, b.settle(t, "in-the-handler"), 201, idempotency.OutcomeReplayed, "")
	hang(head("before-the-answer") + "{}")
	for _, key := range []string{"in-the-head", "in-the-body", "before-the-answer"} {
		if got := b.settle(t, key); got.status != 201 {
			t.Errorf("%s: %d %s", key, got.status, got.body)
		}
	}
	if b.effects(t) != 4 || b.records(t) != 4 {
		t.Errorf("%d effects, %d records; want 4 of each", b.effects(t), b.records(t))
	}
}

// 200 concurrent duplicates are one run.
func TestDuplicatesAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	const copies = 200
	start := make(chan struct{})
	answers := make(chan reply, copies)
	for range copies {
		go func() {
			<-start
			answers <- b.post(t, "/", "{}", "Idempotency-Key", "k")
		}()
	}
	close(start)
	seen := map[string]int{}
	bodies := map[string]bool{}
	for range copies {
		got := <-answers
		seen[fmt.Sprint(got.status, " ", got.outcome)]++
		if got.status == 201 {
			bodies[got.body] = true
		}
	}
	if seen["201 executed"] != 1 || seen["201 executed"]+seen["201 replayed"]+seen["409 in-progress"]+seen["503 not-executed"] != copies || len(bodies) != 1 {
		t.Errorf("answers %v, bodies %v", seen, bodies)
	}
	if b.runs.Load() != 1 || b.effects(t) != 1 {
		t.Errorf("%d runs, %d effects", b.runs.Load(), b.effects(t))
	}
}

// Behind an http.TimeoutHandler the client gets a 503, the work is finished, and the retry is a
// replay.
func TestTimeoutHandlerOutside(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		return http.TimeoutHandler(idem.Handler(handler), 50*time.Millisecond, "too slow")
	}}, func(w http.ResponseWriter, r *http.Request) {
		<-release
		transfer(w, r)
	})
	if got := b.post(t, "/", "{}", "Idempotency-Key", "k"); got.status != 503 || got.outcome != "" {
		t.Errorf("%d %q", got.status, got.outcome)
	}
	close(release)
	want(t, b.settle(t, "k"), 201, idempotency.OutcomeReplayed, "")
	if b.runs.Load() != 1 || b.effects(t) != 1 {
		t.Errorf("%d runs, %d effects", b.runs.Load(), b.effects(t))
	}
}

// A handler that takes longer than its timeout.
func TestHandlerTimeout(t *testing.T) {
	t.Parallel()
	slow := true
	b := setup(t, setupOptions{middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Handler: 200 * time.Millisecond}}}, func(w http.ResponseWriter, r *http.Request) {
		if slow {
			<-r.Context().Done()
		}
		transfer(w, r)
	})
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 503, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	slow = false
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// spellings returns the ways in which a handler that fills the map itself may write a name.
func spellings(name string) []string {
	return []string{http.CanonicalHeaderKey(name), strings.ToLower(name), strings.ToUpper(name)}
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

// A timeout inside abandons the handler, and its goroutine continues: it finds the transaction
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

// Of several requests with one key that are sent without waiting for answers (pipelining), the
// first is executed and the others get replays.
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

// Middleware outside changes an answer's headers and its length, and may change them differently
// for a retry.

// outside returns a mount with outer middleware that sets headers.
func outside(set func(h http.Header, r *http.Request)) func(*middleware.Middleware, http.Handler) http.Handler {
	return func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		inner := idem.Handler(handler)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			set(w.Header(), r)
			inner.ServeHTTP(w, r)
		})
	}
}

// A deployment between a request and its retry changes the headers that are set outside: the retry
// gets those that the first client got.
func TestReplayOutlivesADeployment(t *testing.T) {
	t.Parallel()
	defaults := map[string]string{"Content-Type": "application/json", "Cache-Control": "no-store", "Content-Language": "de", "X-Request-Id": "1"}
	now := defaults
	b := setup(t, setupOptions{mount: outside(func(h http.Header, _ *http.Request) {
		for name, value := range now {
			h.Set(name, value)
		}
	})}, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"id":1}`) })
	first := b.post(t, "/", "{}", "Idempotency-Key", "k")
	want(t, first, 200, idempotency.OutcomeExecuted, "")
	for _, now = range []map[string]string{
		{}, defaults, {"Content-Type": "text/html", "Cache-Control": "max-age=60", "Content-Language": "en", "X-Request-Id": "2", "X-Frame-Options": "DENY"},
	} {
		replay := b.post(t, "/", "{}", "Idempotency-Key", "k")
		want(t, replay, 200, idempotency.OutcomeReplayed, "")
		for _, name := range []string{"Content-Type", "Cache-Control", "Content-Language"} {
			if got := replay.header.Values(name); !slices.Equal(got, first.header.Values(name)) {
				t.Errorf("%s %q, want %q", name, got, first.header.Values(name))
			}
		}
		// These headers come from this answer, not from the record.
		for _, name := range []string{"X-Request-Id", "X-Frame-Options"} {
			if replay.header.Get(name) != now[name] {
				t.Errorf("%s %q, want %q", name, replay.header.Get(name), now[name])
			}
		}
	}
}

// cors does the same as CORS middleware. Mounted outside, its headers are on every answer; a
// preflight carries no key and passes.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Origin")
		w.Header().Set("Access-Control-Allow-Origin", r.Header.Get("Origin"))
		w.Header().Set("Access-Control-Expose-Headers", "Idempotency-Status")
		if r.Method == http.MethodOptions {
			w.Header().Set("Access-Control-Allow-Headers", "Idempotency-Key, Content-Type")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// A page can read every answer, whatever the outcome, and also a replay of another page's request:
// the CORS headers belong to the request that is answered.
func TestPagesOfTwoOriginsReadTheirAnswers(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{
		mount: func(idem *middleware.Middleware, h http.Handler) http.Handler { return cors(idem.Handler(h)) },
	}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(entered)
			<-release
		}
		transfer(w, r)
	})
	readable := func(got reply, origin string) {
		t.Helper()
		if got.header.Get("Access-Control-Allow-Origin") != origin || len(got.header.Values("Access-Control-Allow-Origin")) != 1 || !slices.Equal(got.header.Values("Vary"), []string{"Origin"}) {
			t.Errorf("%d %s: Access-Control-Allow-Origin %q, Vary %q", got.status, got.outcome, got.header.Values("Access-Control-Allow-Origin"), got.header.Values("Vary"))
		}
	}
	for _, origin := range []string{"https://shop.example", "https://app.example"} {
		preflight := b.send(t, http.MethodOptions, "/", nil, "Origin", origin, "Access-Control-Request-Headers", "idempotency-key")
		if preflight.status != 204 || preflight.outcome != "" {
			t.Errorf("preflight: %d %q", preflight.status, preflight.outcome)
		}
		// Executed, then replayed.
		readable(b.post(t, "/", "{}", "Idempotency-Key", "k", "Origin", origin), origin)
		readable(b.post(t, "/", "{1}", "Idempotency-Key", "k", "Origin", origin), origin)
		readable(b.post(t, "/", "{}", "Origin", origin), origin)
	}
	first := make(chan reply)
	go func() { first <- b.post(t, "/slow", "{}", "Idempotency-Key", "slow", "Origin", "https://shop.example") }()
	<-entered
	conflict := b.post(t, "/slow", "{}", "Idempotency-Key", "slow", "Origin", "https://app.example")
	want(t, conflict, 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	readable(conflict, "https://app.example")
	close(release)
	readable(<-first, "https://shop.example")
	if b.effects(t) != 2 {
		t.Errorf("%d effects", b.effects(t))
	}
}

// A canceled call proves nothing about the request, so its answer is not final. A 423 or 424 is,
// unless the policy says otherwise.
func TestCanceledCallIsNoAnswerForGood(t *testing.T) {
	t.Parallel()
	for status, kept := range map[int]bool{408: false, 499: false, 423: true, 424: true} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			first := true
			b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
				if first {
					first = false
					w.WriteHeader(status)
					return
				}
				transfer(w, r)
			})
			outcome := map[bool]idempotency.Outcome{true: idempotency.OutcomeExecuted, false: idempotency.OutcomeNotExecuted}[kept]
			want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), status, outcome, "")
			if kept {
				want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), status, idempotency.OutcomeReplayed, "")
			} else {
				want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
			}
		})
	}
}

// The threats of docs/security.md, on a real server and a real database.

// bank is a service's authentication, mounted outside: it knows the account of each token, and
// which accounts may still see their answers.
type bank struct {
	mu      sync.Mutex
	tokens  map[string]string // account by token
	revoked map[string]bool   // accounts that may no longer see their answers
}

func (k *bank) change(do func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	do()
}

func (k *bank) authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		account, ok := k.tokens[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
		k.mu.Unlock()
		if !ok {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		r.Header.Set("Account", account)
		next.ServeHTTP(w, r)
	})
}

func TestRetryAfterTokenRotationDoesNotPayTwice(t *testing.T) {
	t.Parallel()
	auth := &bank{tokens: map[string]string{"first": "acme", "theirs": "globex"}}
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		return auth.authenticate(idem.Handler(handler))
	}}, transfer)
	post := func(token string) reply {
		t.Helper()
		return b.post(t, "/", "{}", "Idempotency-Key", "k", "Authorization", "Bearer "+token)
	}
	first := post("first")
	want(t, first, 201, idempotency.OutcomeExecuted, "")
	auth.change(func() { delete(auth.tokens, "first"); auth.tokens["second"] = "acme" })
	if got := post("first"); got.status != 401 || got.body != "" {
		t.Errorf("the old token: %d %s", got.status, got.body)
	}
	again := post("second")
	want(t, again, 201, idempotency.OutcomeReplayed, "")
	if again.body != first.body || b.effects(t) != 1 {
		t.Errorf("replayed %s of %s, %d effects", again.body, first.body, b.effects(t))
	}
	// The same key of another account is another request.
	want(t, post("theirs"), 201, idempotency.OutcomeExecuted, "")
	if b.effects(t) != 2 {
		t.Errorf("%d effects, want 2", b.effects(t))
	}
}

func TestAnswerIsNotReplayedToACallerWhoLostTheRight(t *testing.T) {
	t.Parallel()
	auth := &bank{tokens: map[string]string{"t": "acme"}, revoked: map[string]bool{}}
	b := setup(t, setupOptions{
		middleware: &middleware.Options{AuthorizeReplay: func(r *http.Request, _ *idempotency.Record) error {
			auth.mu.Lock()
			defer auth.mu.Unlock()
			if auth.revoked[r.Header.Get("Account")] {
				return errors.New("revoked")
			}
			return nil
		}},
		mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			return auth.authenticate(idem.Handler(handler))
		},
	}, transfer)
	post := func() reply {
		t.Helper()
		return b.post(t, "/", "{}", "Idempotency-Key", "k", "Authorization", "Bearer t")
	}
	first := post()
	want(t, first, 201, idempotency.OutcomeExecuted, "")
	auth.change(func() { auth.revoked["acme"] = true })
	denied := post()
	want(t, denied, 403, idempotency.OutcomeUnknown, idempotency.ReasonReplayDenied)
	for _, name := range []string{"Location", "Idempotent-Replayed", "Idempotency-Created-At", "Idempotency-Expires-At"} {
		if denied.header.Get(name) != "" {
			t.Errorf("%s: %s", name, denied.header.Get(name))
		}
	}
	if strings.Contains(denied.body, strings.TrimSpace(first.body)) {
		t.Errorf("the answer is shown: %s", denied.body)
	}
	auth.change(func() { auth.revoked["acme"] = false })
	want(t, post(), 201, idempotency.OutcomeReplayed, "")
	if b.effects(t) != 1 {
		t.Errorf("%d effects", b.effects(t))
	}
}

// Only the first client gets a one-time secret: retries and the table get status and Location.
func TestStatusAndLocationOnly(t *testing.T) {
	t.Parallel()
	const secret = "canary-one-time-password"
	handler := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "/passwords/1")
		w.Header().Set("Etag", `"`+secret+`"`)
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, secret)
	}
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/whole", idem.Handler(handler))
		mux.Handle("/reduced", idem.With(func(o *middleware.Options) { o.Reduce = middleware.StatusAndLocation }).Handler(handler))
		return mux
	}}, handler)
	scan := func() (found int) {
		t.Helper()
		return b.count(t, `SELECT count(*) FROM idempotency_keys r WHERE position('\x`+fmt.Sprintf("%x", secret)+`'::bytea IN body) > 0
			OR position('\x`+fmt.Sprintf("%x", secret)+`'::bytea IN headers) > 0 OR r::text LIKE '%`+secret+`%'`)
	}
	first := b.post(t, "/reduced", "{}", "Idempotency-Key", "k")
	want(t, first, 201, idempotency.OutcomeExecuted, "")
	if first.body != secret || first.header.Get("Etag") == "" {
		t.Errorf("the first client got %q %v", first.body, first.header)
	}
	if scan() != 0 {
		t.Error("the secret is in the table")
	}
	again := b.post(t, "/reduced", "{}", "Idempotency-Key", "k")
	want(t, again, 201, idempotency.OutcomeReplayed, "")
	if again.body != "" || again.header.Get("Location") != "/passwords/1" || again.header.Get("Etag") != "" || again.header.Get("Content-Type") != "" || again.header.Get("Content-Length") != "0" {
		t.Errorf("replayed %q %v", again.body, again.header)
	}
	want(t, b.post(t, "/whole", "{}", "Idempotency-Key", "whole"), 201, idempotency.OutcomeExecuted, "")
	if scan() != 1 {
		t.Error("the scan finds nothing, not even where all of it is recorded")
	}
}

// A header that no replay may have is not recorded, even if Reduce puts it into its answer: the
// record would be taken for a forged one, and the key would be useless until it expires.
func TestReducedAnswerCanBeReplayed(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{Reduce: func(answer idempotency.Answer) idempotency.Answer {
		header := http.Header{"Content-Length": {"0"}, "date": {"today"}, "Idempotency-Status": {"executed"}, "Location": {"/1"}}
		return idempotency.Answer{Status: answer.Status, Header: header}
	}}}, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, outcome, "")
	}
}

// plant changes a record's headers in the table.
func (b *testBundle) plant(t *testing.T, key string, headers []byte) {
	t.Helper()
	if _, err := b.pool.Exec(context.Background(), "UPDATE idempotency_keys SET headers = $2 WHERE key = $1", key, headers); err != nil {
		t.Fatal(err)
	}
}
