package middleware_test

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// After a handler has called DerivedKey its client is never answered not-executed, unless an answer
// is recorded. It retries with the same key, and the next run passes on the same derived key.
func TestCallToAnotherServiceIsNeverNotExecuted(t *testing.T) {
	t.Parallel()
	exec := func(r *http.Request, sql string) { _, _ = postgres.Tx(r.Context()).Exec(r.Context(), sql) }
	answering := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
	}
	for name, c := range map[string]struct {
		end     http.HandlerFunc
		status  int
		outcome idempotency.Outcome
		reason  idempotency.Reason
		logged  []string
	}{
		"504": {answering(504), 504, idempotency.OutcomeUnknown, "", []string{"level=WARN", "outcome=unknown", "status=504", "derived key"}},
		"500": {answering(500), 500, idempotency.OutcomeUnknown, "", []string{"level=WARN", "status=500"}},
		"429": {answering(429), 429, idempotency.OutcomeUnknown, "", []string{"status=429"}},
		"401": {answering(401), 401, idempotency.OutcomeUnknown, "", []string{"status=401"}},
		"402": {answering(402), 402, idempotency.OutcomeExecuted, "", nil}, // recorded, and so replayed
		"panic": {func(http.ResponseWriter, *http.Request) { panic("handler") }, 503, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown,
			[]string{"level=ERROR", "reason=call-unknown", "stack="}},
		"too long an answer": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 1<<10)) }, 503, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown, nil},
		"201 on an aborted transaction": {func(w http.ResponseWriter, r *http.Request) { exec(r, "SELECT 1/0"); w.WriteHeader(201) },
			503, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown, nil},
		"COMMIT that is refused": {func(w http.ResponseWriter, r *http.Request) {
			exec(r, "CREATE TABLE later (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
			exec(r, "INSERT INTO later VALUES (1), (1)")
			w.WriteHeader(201)
		}, 503, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown, nil},
		"serialization failures without end": {func(w http.ResponseWriter, r *http.Request) {
			exec(r, "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
			w.WriteHeader(201)
		}, 503, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown, nil},
		"a backend that is terminated": {func(w http.ResponseWriter, r *http.Request) {
			exec(r, "SELECT pg_terminate_backend(pg_backend_pid())")
			w.WriteHeader(201)
		}, 503, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var keys []string
			failing := true
			b := setup(t, setupOptions{middleware: &middleware.Options{AnswerBytesMax: 1 << 9}}, func(w http.ResponseWriter, r *http.Request) {
				keys = append(keys, idempotency.DerivedKey(r.Context(), "charge"))
				if failing {
					c.end(w, r)
					return
				}
				transfer(w, r)
			})
			got := b.post(t, "/transfers", "{}", "Idempotency-Key", "k")
			want(t, got, c.status, c.outcome, c.reason)
			if retry := got.header.Get("Retry-After"); (retry != "") != (c.reason != "") {
				t.Errorf("Retry-After %q with problem %q", retry, c.reason)
			}
			for _, part := range c.logged {
				if !strings.Contains(b.logs.String(), part) {
					t.Errorf("%s is not in: %s", part, b.logs)
				}
			}
			failing = false
			if c.outcome == idempotency.OutcomeExecuted {
				want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k"), c.status, idempotency.OutcomeReplayed, "")
				return
			}
			again := b.post(t, "/transfers", "{}", "Idempotency-Key", "k")
			for deadline := time.Now().Add(10 * time.Second); again.outcome == string(idempotency.OutcomeInProgress) && time.Now().Before(deadline); {
				// A terminated session keeps its locks for a moment.
				again = b.post(t, "/transfers", "{}", "Idempotency-Key", "k")
			}
			want(t, again, 201, idempotency.OutcomeExecuted, "")
			for _, key := range keys {
				if key != keys[0] {
					t.Errorf("the runs derived %q", keys)
				}
			}
			if len(keys) < 2 || b.effects(t) != 1 || b.records(t) != 1 {
				t.Errorf("%d runs, %d effects, %d records", len(keys), b.effects(t), b.records(t))
			}
		})
	}
}

// Only the retry can settle a call to another service. So attempts that left no record do not use
// up the account's quota.
func TestCallToAnotherServiceTakesNoPlaceInTheQuota(t *testing.T) {
	t.Parallel()
	var failing atomic.Int64
	b := setup(t, setupOptions{middleware: &middleware.Options{Quota: middleware.Quota{KeysMax: 1, Window: time.Hour}}}, func(w http.ResponseWriter, r *http.Request) {
		_ = idempotency.DerivedKey(r.Context(), "charge")
		switch failing.Add(1) % 3 {
		case 1:
			w.WriteHeader(http.StatusGatewayTimeout)
		case 2:
			panic("handler")
		default:
			transfer(w, r)
		}
	})
	post := func() reply { return b.post(t, "/", "{}", "Idempotency-Key", "k") }
	want(t, post(), 504, idempotency.OutcomeUnknown, "")
	want(t, post(), 503, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown)
	want(t, post(), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "another"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
}

// A service's name comes through the middleware's options, and With keeps it.
func TestServiceNamesItsDerivedKeys(t *testing.T) {
	t.Parallel()
	keys := map[string]bool{}
	for _, service := range []string{"", "orders", "refunds"} {
		b := setup(t, setupOptions{middleware: &middleware.Options{Service: service}, mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			return idem.With(func(o *middleware.Options) { o.TTL = time.Hour }).Handler(handler)
		}}, func(w http.ResponseWriter, r *http.Request) {
			keys[idempotency.DerivedKey(r.Context(), "charge")] = true
			transfer(w, r)
		})
		want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
	}
	if len(keys) != 3 {
		t.Errorf("three services derive %d keys", len(keys))
	}
}
