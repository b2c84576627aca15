package server

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
	"github.com/google/uuid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/internal/nodeid"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/storage/postgres"
)

// readyTimeout limits a readiness probe.
const readyTimeout = 2 * time.Second

// idempotency returns the middleware of the routes that need a key.
func (s *Server) idempotency(store *postgres.Store, watch *live.Live) *middleware.Middleware {
	return middleware.New(store, bank.Tenant, &middleware.Options{
		TTL: s.config.TTL, Wait: s.config.Wait, Timeouts: idempotency.Timeouts{Handler: s.config.HandlerTimeout},
		Tracer:      observe.Join(s.metrics, watch.Tracer()),
		RouterState: chiroute.State,
		Logger:      s.logger,
	})
}

// handler returns the handler of all routes of the bank.
func (s *Server) handler(idem *middleware.Middleware, operations *middleware.Status, store *postgres.Store, books *bank.Bank, ids *nodeid.Source, watch *live.Live) http.Handler {
	r := chi.NewRouter()
	r.Use(watch.Recognise, s.logRequests, chimiddleware.GetHead)
	books.Mount(r, s.protect(idem))
	if !s.config.withoutMiddleware {
		books.MountCalls(r, func(name string) func(http.Handler) http.Handler { return s.resumable(idem, operations, name) })
		r.Get(bank.OperationsPath+"{id}", operations.ServeHTTP)
	}
	watch.Mount(r)
	r.Get("/metrics", s.metrics.handler().ServeHTTP)
	r.Get("/healthz", func(w http.ResponseWriter, _ *http.Request) { alive(w) })
	r.Get("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := ready(r.Context(), store, books, ids); err != nil {
			s.logger.WarnContext(r.Context(), "not ready", "error", err)
			bank.WriteProblem(w, &bank.Problem{
				Status: http.StatusServiceUnavailable, Slug: "not-ready", Title: "Not ready",
				Detail: "The database does not answer, or its schema is not current.",
			})
			return
		}
		alive(w)
		s.probed()
	})
	r.NotFound(func(w http.ResponseWriter, _ *http.Request) {
		bank.WriteProblem(w, &bank.Problem{
			Status: http.StatusNotFound, Slug: "not-found", Title: "Not found", Detail: "There is nothing at this path.",
		})
	})
	r.MethodNotAllowed(func(w http.ResponseWriter, q *http.Request) {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			if r.Match(chi.NewRouteContext(), method, q.URL.Path) {
				w.Header().Add("Allow", method)
			}
		}
		bank.WriteProblem(w, &bank.Problem{
			Status: http.StatusMethodNotAllowed, Slug: "method-not-allowed", Title: "Method not allowed",
			Detail: "This path answers other methods.",
		})
	})
	return r
}

// protect returns the middleware for the routes that need a key. It is nil if tests run the bank
// without it.
func (s *Server) protect(idem *middleware.Middleware) func(http.Handler) http.Handler {
	switch {
	case s.config.withoutMiddleware:
		return nil
	case s.config.CrashPoint != nil:
		return s.config.CrashPoint.Protect(idem, bank.TransfersPath)
	}
	return idem.Handler
}

// resumable returns the middleware for a route that calls the processor. operations shows the
// route's open requests.
func (s *Server) resumable(idem *middleware.Middleware, operations *middleware.Status, name string) func(http.Handler) http.Handler {
	return idem.With(func(o *middleware.Options) {
		o.Resumable, o.BackoffMax, o.Accepted = name, bank.BackoffMax, operations
		s.config.CrashPoint.trace(o)
	}).Handler
}

// ready returns nil if a transfer would be executed now.
func ready(ctx context.Context, store *postgres.Store, books *bank.Bank, ids *nodeid.Source) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := store.Check(ctx); err != nil {
		return err
	}
	if err := books.Check(ctx); err != nil {
		return err
	}
	return ids.Check()
}

func alive(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, `{"status":"ok"}`+"\n") // ignored: the prober may be gone
}

// logRequests logs one line per request, at debug level only, so that a storm does not flood the
// log. It logs the route instead of the path, and nothing from headers or bodies.
func (s *Server) logRequests(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.logger.Enabled(r.Context(), slog.LevelDebug) {
			next.ServeHTTP(w, r)
			return
		}
		started := time.Now()
		seen := chimiddleware.NewWrapResponseWriter(w, r.ProtoMajor)
		next.ServeHTTP(seen, r)
		s.logger.DebugContext(r.Context(), "request", "method", r.Method,
			"route", chi.RouteContext(r.Context()).RoutePattern(), "status", seen.Status(),
			"outcome", seen.Header().Get("Idempotency-Status"), "duration", time.Since(started))
	})
}

// greet prints the bank's URL and commands to try. It prints the same curl line twice on purpose:
// both have the same key.
func (s *Server) greet(db *database) {
	curl := fmt.Sprintf(`curl -i %s/v1/transfers -H 'Content-Type: application/json' -H 'Idempotency-Key: %s' -d '{"from":"alice","to":"bob","amount":1250}'`,
		s.url, uuid.NewString())
	// A closed stdout is no reason not to serve.
	_, _ = fmt.Fprintf(s.config.Stdout, `demo-bank is at %s (%s)
The processor of its cards, payouts and mails is at %s (%s)
Kafka %s

Open it in a browser, press "Lose replies", and watch who loses money. Or:

Send a transfer: 201, Idempotency-Status: executed
  %s

Send it again: 201, Idempotency-Status: replayed, and the same bytes
  %s

Send thousands of duplicates and read the verdict:
  go run ./cmd/demo-bank storm --url %s
%s`, s.url, db.where, s.psp, s.wherePSP(), strings.Join(s.brokers, ","), curl, curl, s.url, db.lookAfter())
}
