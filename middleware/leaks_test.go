package middleware_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// meter is a tracer that keeps the same as metrics and traces do: names for labels, and the texts
// of errors.
type meter struct {
	mu       sync.Mutex
	text     strings.Builder
	outcomes map[string]int
}

func (m *meter) write(err error, labels ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, _ = fmt.Fprintln(&m.text, labels...)
	if err != nil {
		_, _ = fmt.Fprintf(&m.text, "%v\n%s\n%q\n", err, err.Error(), err)
	}
}

func (m *meter) TraceRequestStart(ctx context.Context, data idempotency.RequestStart) context.Context {
	m.write(nil, "start", data, fmt.Sprintf("%+v %#v", data, data.Key))
	return ctx
}

func (m *meter) TraceStep(_ context.Context, data idempotency.StepEnd) {
	m.write(data.Err, "step", data.Step, data.Attempt)
}

func (m *meter) TraceRequestEnd(_ context.Context, data idempotency.RequestEnd) {
	m.write(data.Result.Err, "end", data.Result.Outcome, data.Result.Reason, data.Key, data.Attempts)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.outcomes[strings.TrimSpace(fmt.Sprint(data.Result.Outcome, " ", data.Result.Reason))]++
}

func (m *meter) TraceRefused(_ context.Context, data idempotency.Refused) {
	m.write(data.Err, "refused", data.Reason, data.Status)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.outcomes["refused "+string(data.Reason)]++
}

// buffer is a log that many goroutines write to.
type buffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// However a request ends, no part of it or of its answer is in a log, a metric, an error's text or
// a problem document. The table has the key, the scope and the recorded answer, and no credential.
func TestNoCanaryInLogsMetricsAndErrors(t *testing.T) {
	t.Parallel()
	const (
		key, scope, query   = "canary-key", "canary-scope", "canary-query"
		body, token, cookie = "canary-body", "canary-token", "canary-cookie"
		answer, setCookie   = "canary-answer", "canary-set-cookie"
		thrown              = "canary-thrown"
	)
	var cut atomic.Bool
	var proxy *pgfault.Proxy
	logs, told := &buffer{}, &meter{outcomes: map[string]int{}}
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{
		poolMax: 2,
		url: func(database string) string {
			network, address, err := pgfault.Upstream(database)
			if err != nil {
				t.Fatal(err)
			}
			proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(commit pgfault.Commit) pgfault.Fault {
				if cut.Load() && bytes.Contains(commit.Messages, []byte(key)) {
					proxy.SetRefuse(true) // so that looking for it fails too
					return pgfault.Fault{Kind: pgfault.CutAfter}
				}
				return pgfault.Fault{}
			}})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = proxy.Close() })
			return proxy.URL(database)
		},
		store: &postgres.Options{AcquireTimeout: 3 * time.Second},
		middleware: &middleware.Options{
			BodyBytesMax: 1000,
			Quota:        middleware.Quota{KeysMax: 100},
			Logger:       slog.New(slog.NewJSONHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
			Tracer:       told, Timeouts: idempotency.Timeouts{Resolve: 300 * time.Millisecond},
			AuthorizeReplay: func(r *http.Request, _ *idempotency.Record) error {
				if r.Header.Get("Revoked") != "" {
					return errors.New(thrown)
				}
				return nil
			},
		},
		server: func(s *http.Server) { s.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(logs, nil), slog.LevelError) },
	}, func(w http.ResponseWriter, r *http.Request) {
		tx := postgres.Tx(r.Context())
		switch r.URL.Path {
		case "/running":
			close(entered)
			<-release
		case "/panic":
			panic(thrown)
		case "/panic-error":
			panic(fmt.Errorf("read %s: %w", thrown, io.ErrUnexpectedEOF))
		case "/failed":
			http.Error(w, answer, http.StatusInternalServerError)
			return
		case "/swallowed": // PostgreSQL quotes input that it can't read
			_, _ = tx.Exec(r.Context(), "SELECT '"+thrown+"'::text::int")
			w.WriteHeader(http.StatusCreated)
			return
		case "/raised":
			_, _ = tx.Exec(r.Context(), "DO $$ BEGIN RAISE EXCEPTION '"+thrown+"' USING DETAIL = '"+thrown+"', HINT = '"+thrown+"'; END $$")
			return
		case "/long":
			_, _ = io.WriteString(w, strings.Repeat(answer, (1<<20)/len(answer)+1))
			return
		case "/header":
			w.Header().Set("Etag", strings.Repeat(answer, idempotency.HeaderBytesMax/len(answer)+1))
		case "/declined":
			http.Error(w, answer, http.StatusPaymentRequired)
			return
		}
		w.Header().Set("Set-Cookie", setCookie)
		transfer(w, r)
		_, _ = io.WriteString(w, answer)
	})
	b.client.Timeout = time.Minute

	post := func(path, key string, headers ...string) reply {
		t.Helper()
		got := b.post(t, path+"?access_token="+query, `{"pan":"`+body+`"}`, append([]string{"Idempotency-Key", key, "Account", scope,
			"Authorization", "Bearer " + token, "Cookie", "session=" + cookie, "Traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}, headers...)...)
		if got.problem != "" && strings.Contains(got.body, "canary") {
			t.Errorf("%s: the problem document says %s", path, got.body)
		}
		return got
	}
	want(t, post("/ok", key), 201, idempotency.OutcomeExecuted, "")
	want(t, post("/ok", key), 201, idempotency.OutcomeReplayed, "")
	want(t, post("/declined", key+"-declined"), 402, idempotency.OutcomeExecuted, "")
	want(t, post("/other", key), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	want(t, post("/ok", key, "Revoked", "yes"), 403, idempotency.OutcomeUnknown, idempotency.ReasonReplayDenied)
	want(t, post("/ok", key+" with a space"), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
	want(t, post("/ok", key, "Account", strings.Repeat(scope, 25)), 401, idempotency.OutcomeNotExecuted, idempotency.ReasonScope)
	want(t, b.post(t, "/ok", strings.Repeat(body, 100), "Idempotency-Key", key), 413, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge)
	for _, path := range []string{"/panic", "/panic-error", "/swallowed", "/raised", "/long", "/header"} {
		want(t, post(path, key+"-failed"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
	want(t, post("/failed", key+"-failed"), 500, idempotency.OutcomeNotExecuted, "")

	running := make(chan reply, 1)
	go func() { running <- post("/running", key+"-running") }()
	<-entered
	want(t, post("/running", key+"-running"), 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	close(release)
	want(t, <-running, 201, idempotency.OutcomeExecuted, "")

	var held []*pgxpool.Conn
	for range 2 {
		conn, err := b.pool.Acquire(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, conn)
	}
	want(t, post("/ok", key+"-unavailable"), 503, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	for _, conn := range held {
		conn.Release()
	}

	for changed, change := range map[string]string{"record-corrupt": "SET headers = $2", "outcome-unknown": "SET headers = '\\x02'::bytea || $2"} {
		want(t, post("/ok", key+"-"+changed), 201, idempotency.OutcomeExecuted, "")
		if _, err := b.pool.Exec(context.Background(), "UPDATE idempotency_keys "+change+" WHERE key = $1", key+"-"+changed, encodeRecorded("Set-Cookie", setCookie)); err != nil {
			t.Fatal(err)
		}
		if got := post("/ok", key+"-"+changed); got.outcome != string(idempotency.OutcomeUnknown) || got.problem != changed {
			t.Errorf("%s: %d %s %s", changed, got.status, got.outcome, got.problem)
		}
	}
	cut.Store(true)
	want(t, post("/ok", key+"-lost"), 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	cut.Store(false)
	proxy.SetRefuse(false)
	want(t, post("/ok", key+"-lost"), 201, idempotency.OutcomeReplayed, "")

	told.mu.Lock()
	defer told.mu.Unlock()
	for _, outcome := range []string{
		"executed", "replayed", "mismatch key-reused", "in-progress in-progress", "not-executed", "not-executed handler-failed", "not-executed unavailable",
		"unknown outcome-unknown", "refused record-corrupt", "refused replay-denied", "refused key-invalid", "refused scope", "refused body-too-large",
	} {
		if told.outcomes[outcome] == 0 {
			t.Errorf("no request ended %s: %v", outcome, told.outcomes)
		}
	}
	for where, text := range map[string]string{"the log": logs.String(), "metrics and errors": told.text.String()} {
		if !strings.Contains(text, "handler-failed") || !strings.Contains(text, idempotency.Key{Scope: scope, Value: key + "-failed"}.String()) {
			t.Errorf("%s holds nothing to look through: %.500s", where, text)
		}
		for line := range strings.Lines(text) {
			if strings.Contains(line, "canary") {
				t.Errorf("in %s: %.500s", where, line)
			}
		}
	}

	// bytea prints as hexadecimal digits; escape shows the text.
	row := `SELECT count(*) FROM idempotency_keys r WHERE concat_ws(' ', created_at, scope, key, trace_id, encode(headers, 'escape'), encode(body, 'escape'), r::text) LIKE '%`
	for canary, inTable := range map[string]bool{key: true, scope: true, answer: true, body: false, token: false, cookie: false, query: false, thrown: false} {
		if n := b.count(t, row+canary+"%'"); (n > 0) != inTable {
			t.Errorf("%d records hold %s", n, canary)
		}
	}
	if n := b.count(t, row+setCookie+"%'"); n != 2 { // the planted ones
		t.Errorf("%d records hold a cookie, want the 2 that were planted", n)
	}
}
