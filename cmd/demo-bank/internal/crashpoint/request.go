package crashpoint

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// Protect returns idem's Handler with the point in it. Only requests to path meet the point. idem must require keys.
func (p *Point) Protect(idem *middleware.Middleware, path string) func(http.Handler) http.Handler {
	crashing := idem.With(func(o *middleware.Options) {
		o.Tracer = &requestTracer{Tracer: o.Tracer, point: p}
		policy := o.Disposition
		o.Disposition = func(status int) idempotency.Disposition {
			disposition := policy(status)
			if disposition == idempotency.DispositionCommit {
				p.reached(beforeCommit) // the engine asks when the handler's transaction is sealed, and commits next
			}
			return disposition
		}
	})
	return func(next http.Handler) http.Handler {
		others := idem.Handler(next)
		chosen := crashing.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			p.reached(afterBegin)
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

// request is in the context of each request that meets the point, down to its connections.
type request struct {
	lost atomic.Bool // the reply to its COMMIT did not come
}

type requestKey struct{}

func requestFrom(ctx context.Context) *request {
	r, _ := ctx.Value(requestKey{}).(*request)
	return r
}

// requestTracer tells the service's own tracer first.
type requestTracer struct {
	idempotency.Tracer
	point *Point
}

// TraceRequestStart implements [idempotency.Tracer].
func (t *requestTracer) TraceRequestStart(ctx context.Context, start idempotency.RequestStart) context.Context {
	ctx = context.WithValue(t.Tracer.TraceRequestStart(ctx, start), requestKey{}, new(request))
	t.point.reached(afterBody)
	return ctx
}

// TraceStep implements [idempotency.Tracer].
func (t *requestTracer) TraceStep(ctx context.Context, step idempotency.StepEnd) {
	t.Tracer.TraceStep(ctx, step)
	switch step.Step {
	case idempotency.StepHandler:
		if step.Err == nil {
			t.point.reached(afterHandler)
		}
	case idempotency.StepCommit, idempotency.StepDecline:
		if r := requestFrom(ctx); r != nil && errors.Is(step.Err, idempotency.ErrUnknown) {
			r.lost.Store(true)
		}
		if step.Err == nil {
			t.point.reached(afterCommit)
		}
	}
}

// halfWriter sends half of a 201's body before it lets the process die.
type halfWriter struct {
	http.ResponseWriter
	point   *Point
	created bool
}

// WriteHeader implements http.ResponseWriter.
func (w *halfWriter) WriteHeader(status int) {
	w.created = status == http.StatusCreated
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter. The middleware writes a body at once.
func (w *halfWriter) Write(body []byte) (int, error) {
	if !w.created || w.point.name != halfResponse {
		return w.ResponseWriter.Write(body)
	}
	half := len(body) / 2
	n, err := w.ResponseWriter.Write(body[:half])
	if err != nil {
		return n, err
	}
	_ = http.NewResponseController(w.ResponseWriter).Flush() // a client that is gone hears of nothing either way
	w.point.reached(halfResponse)
	rest, err := w.ResponseWriter.Write(body[half:])
	return n + rest, err
}

// Unwrap serves http.ResponseController.
func (w *halfWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
