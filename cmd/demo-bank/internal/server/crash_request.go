package server

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/middleware"
)

// Protect returns idem's Handler with the point in it. Only requests to path can reach the point.
// idem must require keys.
func (p *CrashPoint) Protect(idem *middleware.Middleware, path string) func(http.Handler) http.Handler {
	crashing := idem.With(func(o *middleware.Options) {
		o.Tracer = &crashTracer{Tracer: o.Tracer, point: p}
		policy := o.Disposition
		o.Disposition = func(answer idempotency.Answer) idempotency.Disposition {
			disposition := policy(answer)
			if disposition == idempotency.DispositionCommit {
				// The engine calls this after it sealed the handler's transaction, and commits
				// next.
				p.reached(crashpoint.BeforeCommit)
			}
			return disposition
		}
	})
	return func(next http.Handler) http.Handler {
		others := idem.Handler(next)
		chosen := crashing.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			p.reached(crashpoint.AfterBegin)
			next.ServeHTTP(w, r)
		}))
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != path {
				others.ServeHTTP(w, r)
				return
			}
			chosen.ServeHTTP(&halfWriter{ResponseWriter: w, point: p}, r)
		})
	}
}

// crashRequest is in the context of each request that can reach the point, and so in the context of
// its connections.
type crashRequest struct {
	lost atomic.Bool // the reply to its COMMIT was lost
}

type crashRequestKey struct{}

func crashRequestFrom(ctx context.Context) *crashRequest {
	r, _ := ctx.Value(crashRequestKey{}).(*crashRequest)
	return r
}

// crashTracer calls the service's own tracer first.
type crashTracer struct {
	idempotency.Tracer
	point *CrashPoint
}

// TraceRequestStart implements [idempotency.Tracer].
func (t *crashTracer) TraceRequestStart(ctx context.Context, start idempotency.RequestStart) context.Context {
	ctx = context.WithValue(t.Tracer.TraceRequestStart(ctx, start), crashRequestKey{}, new(crashRequest))
	t.point.reached(crashpoint.AfterBody)
	return ctx
}

// TraceStep implements [idempotency.Tracer].
func (t *crashTracer) TraceStep(ctx context.Context, step idempotency.StepEnd) {
	t.Tracer.TraceStep(ctx, step)
	switch step.Step {
	case idempotency.StepHandler:
		if step.Err == nil {
			t.point.reached(crashpoint.AfterHandler)
		}
	case idempotency.StepCommit, idempotency.StepDecline:
		if r := crashRequestFrom(ctx); r != nil && errors.Is(step.Err, idempotency.ErrUnknown) {
			r.lost.Store(true)
		}
		if step.Err == nil {
			t.point.reached(crashpoint.AfterCommit)
		}
	}
}

// halfWriter sends half of a 201's body, and then can kill the process.
type halfWriter struct {
	http.ResponseWriter
	point   *CrashPoint
	created bool
}

// WriteHeader implements http.ResponseWriter.
func (w *halfWriter) WriteHeader(status int) {
	w.created = status == http.StatusCreated
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter. The middleware writes a whole body in one call.
func (w *halfWriter) Write(body []byte) (int, error) {
	if !w.created || w.point.name != crashpoint.HalfResponse {
		return w.ResponseWriter.Write(body)
	}
	half := len(body) / 2
	n, err := w.ResponseWriter.Write(body[:half])
	if err != nil {
		return n, err
	}
	// Ignored: the client may be gone.
	_ = http.NewResponseController(w.ResponseWriter).Flush()
	w.point.reached(crashpoint.HalfResponse)
	rest, err := w.ResponseWriter.Write(body[half:])
	return n + rest, err
}

// Unwrap serves http.ResponseController.
func (w *halfWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
