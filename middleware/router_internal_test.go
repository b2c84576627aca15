package middleware

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
)

// ownContext is a context of an unknown package.
type ownContext struct{ context.Context }

// stringKey is a context key that reads like chi's.
type stringKey string

// chi is found below every context of package context, and any other context may hide it. If a Go
// release changes the layout of its contexts, this test fails.
func TestChiIsFoundBelowEveryContext(t *testing.T) {
	t.Parallel()
	routed := context.WithValue(context.Background(), chi.RouteCtxKey, chi.NewRouteContext())
	for name, c := range map[string]struct {
		ctx  context.Context
		want bool
	}{
		"background":    {context.Background(), false},
		"todo":          {context.TODO(), false},
		"chi":           {routed, true},
		"chi's other":   {context.WithValue(context.Background(), chimiddleware.RequestIDKey, "id"), false},
		"chi's log key": {context.WithValue(context.Background(), chimiddleware.LogEntryCtxKey, "entry"), false},
		"another key":   {context.WithValue(context.Background(), ownContext{}, chi.NewRouteContext()), false},
		"only the text": {context.WithValue(context.Background(), stringKey("*chi.contextKey"), 1), false},
		"unknown":       {ownContext{context.Background()}, true},
		"unknown's own": {&ownContext{context.Background()}, true},
		"nil":           {nil, true},
	} {
		if got := mayCarryChiRoute(c.ctx); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		if c.ctx == nil {
			continue
		}
		value := context.WithValue(c.ctx, ownContext{}, 1)
		cancel, stop := context.WithCancel(c.ctx)
		defer stop()
		cause, stopCause := context.WithCancelCause(c.ctx)
		defer stopCause(nil)
		timeout, stopTimeout := context.WithTimeout(c.ctx, time.Hour)
		defer stopTimeout()
		timeoutCause, stopTimeoutCause := context.WithTimeoutCause(c.ctx, time.Hour, errors.New("cause"))
		defer stopTimeoutCause()
		all, stopAll := context.WithTimeout(context.WithoutCancel(context.WithValue(cancel, ownContext{}, 1)), time.Hour)
		defer stopAll()
		for above, ctx := range map[string]context.Context{
			"value": value, "cancel": cancel, "cause": cause, "timeout": timeout, "timeout with a cause": timeoutCause,
			"without cancel": context.WithoutCancel(c.ctx), "all of them": all,
		} {
			if got := mayCarryChiRoute(ctx); got != c.want {
				t.Errorf("%s below %s: %v, want %v", name, above, got, c.want)
			}
		}
	}
}

// fasthttp's context is found below each kind of context that package context makes.
func TestFasthttpBelowOtherContexts(t *testing.T) {
	t.Parallel()
	for name, bottom := range map[string]context.Context{"fasthttp": fasthttps{t.Context()}, "net/http": t.Context()} {
		ctx, cancel := context.WithCancel(context.WithValue(bottom, routeKey{}, 1))
		defer cancel()
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if got := onFasthttp(ctx); got != (name == "fasthttp") {
			t.Errorf("%s: %t", name, got)
		}
	}
}

type routeKey struct{}

type fasthttps struct{ context.Context }

func (fasthttps) VisitUserValuesAll(func(key, value any)) {}
