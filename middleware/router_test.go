package middleware_test

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// foreignContext is a context of outer middleware. Its values may change at any time, under a lock
// that only their owner has: printing a map while another goroutine writes to it ends the process.
type foreignContext struct {
	context.Context
	Values foreignValues
}

type foreignValues struct{ read *atomic.Int64 }

func (v foreignValues) String() string { v.read.Add(1); return "values" }

// A second run does not look into other code's contexts. Such a context may hide the state of a
// router, so the service has to set Options.RouterState.
func TestSecondRunReadsNobodysContext(t *testing.T) {
	t.Parallel()
	var read atomic.Int64
	foreign := func(inner http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			inner.ServeHTTP(w, r.WithContext(foreignContext{r.Context(), foreignValues{&read}}))
		})
	}
	values := func(inner http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			inner.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), foreignValues{}, foreignValues{&read})))
		})
	}
	nothing := func(context.Context, []byte) (middleware.RouterState, error) {
		return restoring(func(ctx context.Context) context.Context { return ctx }), nil
	}
	for name, c := range map[string]struct {
		outer  func(http.Handler) http.Handler
		state  middleware.RouterStateFunc
		status int
	}{
		"a value":                               {values, nil, 201},
		"a context of another package":          {foreign, nil, 503},
		"that context, and no state to restore": {foreign, nothing, 201},
	} {
		t.Run(name, func(t *testing.T) {
			runs := 0
			b := setup(t, setupOptions{middleware: &middleware.Options{RouterState: c.state}, mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
				return c.outer(idem.Handler(handler))
			}}, func(w http.ResponseWriter, r *http.Request) {
				if runs++; runs == 1 {
					_, _ = postgres.Tx(r.Context()).Exec(r.Context(), "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
					return
				}
				transfer(w, r)
			})
			outcome, reason := idempotency.OutcomeExecuted, idempotency.Reason("")
			if c.status != 201 {
				outcome, reason = idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable
			}
			want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k"), c.status, outcome, reason)
			if logged := b.logs.String(); (c.status == 503) != strings.Contains(logged, "set Options.RouterState") {
				t.Errorf("the log does not name the remedy: %s", logged)
			}
		})
	}
	if n := read.Load(); n != 0 {
		t.Errorf("values of others were read %d times", n)
	}
}

// restoring is a middleware.RouterState that keeps nothing.
type restoring func(ctx context.Context) context.Context

func (f restoring) Restore(ctx context.Context) context.Context { return f(ctx) }

func (restoring) Stored() []byte { return nil }
