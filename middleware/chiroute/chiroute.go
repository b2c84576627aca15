// Package chiroute restores the state of a chi router when an idempotent handler has to run again.
// No other package imports chi, so a service that does not use chi does not need it.
//
//	idem := middleware.New(store, scope, &middleware.Options{RouterState: chiroute.State})
package chiroute

import (
	"context"
	"slices"

	"github.com/go-chi/chi/v5"
)

// State is a middleware.RouterStateFunc. chi keeps the state of routing in one value that the
// routers below Use, Route and Mount change in place: a second run would continue where the first
// one ended, and find no route. State takes a copy before the first run, and gives each further run
// a copy of that copy.
func State(ctx context.Context) func(context.Context) context.Context {
	route := chi.RouteContext(ctx)
	if route == nil {
		return func(ctx context.Context) context.Context { return ctx }
	}
	before := clone(route)
	return func(ctx context.Context) context.Context {
		return context.WithValue(ctx, chi.RouteCtxKey, clone(before))
	}
}

func clone(route *chi.Context) *chi.Context {
	copied := *route
	copied.RoutePatterns = slices.Clone(route.RoutePatterns)
	copied.URLParams.Keys = slices.Clone(route.URLParams.Keys)
	copied.URLParams.Values = slices.Clone(route.URLParams.Values)
	return &copied
}
