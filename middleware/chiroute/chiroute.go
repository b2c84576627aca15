// Package chiroute restores the state of a chi router when an idempotent handler has to run again.
// No other package imports chi, so a service that does not use chi does not need it.
//
//	idem := middleware.New(store, scope, &middleware.Options{RouterState: chiroute.State})
package chiroute

import (
	"context"
	"encoding/json"
	"errors"
	"slices"

	"github.com/go-chi/chi/v5"
)

// routerState is middleware.RouterState.
type routerState = interface {
	Restore(ctx context.Context) context.Context
	Stored() []byte
}

// State is a middleware.RouterStateFunc. chi keeps the state of routing in one value that the
// routers below Use, Route and Mount change in place: a second run would continue where the first
// one ended, and find no route. State takes a copy before the first run, and gives each further run
// a copy of that copy. A run that resumes the request in another process gets the path and its
// parameters back, but no Routes: its handler can't look up other routes.
func State(ctx context.Context, encoded []byte) (routerState, error) {
	if encoded != nil {
		return decode(encoded)
	}
	route := chi.RouteContext(ctx)
	if route == nil {
		return none{}, nil
	}
	return (*state)(clone(route)), nil
}

// none is the state of a request that chi did not route.
type none struct{}

func (none) Restore(ctx context.Context) context.Context { return ctx }

func (none) Stored() []byte { return nil }

type state chi.Context

func (s *state) Restore(ctx context.Context) context.Context {
	return context.WithValue(ctx, chi.RouteCtxKey, clone((*chi.Context)(s)))
}

// stored is the state as it is stored. The client's data is stored as bytes, because JSON would
// change a string that is not UTF-8.
type stored struct {
	Path     []byte   `json:"path,omitempty"`
	Method   string   `json:"method,omitempty"`
	Patterns []string `json:"patterns,omitempty"`
	Keys     []string `json:"keys,omitempty"`
	Values   [][]byte `json:"values,omitempty"`
}

func (s *state) Stored() []byte {
	kept := stored{Path: []byte(s.RoutePath), Method: s.RouteMethod, Patterns: s.RoutePatterns, Keys: s.URLParams.Keys}
	for _, value := range s.URLParams.Values {
		kept.Values = append(kept.Values, []byte(value))
	}
	encoded, err := json.Marshal(kept)
	if err != nil { // strings and bytes
		panic(err)
	}
	return encoded
}

func decode(encoded []byte) (routerState, error) {
	var kept stored
	if err := json.Unmarshal(encoded, &kept); err != nil || len(kept.Keys) != len(kept.Values) {
		return nil, errors.New("chiroute: stored state can't be read")
	}
	route := chi.NewRouteContext()
	route.RoutePath, route.RouteMethod, route.RoutePatterns, route.URLParams.Keys = string(kept.Path), kept.Method, kept.Patterns, kept.Keys
	for _, value := range kept.Values {
		route.URLParams.Values = append(route.URLParams.Values, string(value))
	}
	return (*state)(route), nil
}

func clone(route *chi.Context) *chi.Context {
	copied := *route
	copied.RoutePatterns = slices.Clone(route.RoutePatterns)
	copied.URLParams.Keys = slices.Clone(route.URLParams.Keys)
	copied.URLParams.Values = slices.Clone(route.URLParams.Values)
	return &copied
}
