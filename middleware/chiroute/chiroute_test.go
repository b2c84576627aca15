package chiroute_test

import (
	"context"
	"testing"

	"github.com/go-chi/chi/v5"

	"github.com/paidonce/idempotency/middleware/chiroute"
)

// Each run gets the state from before the first run, whatever earlier runs did to theirs.
func TestStateIsThatOfTheFirstRun(t *testing.T) {
	t.Parallel()
	route := chi.NewRouteContext()
	route.RoutePath = "/transfers"
	route.RoutePatterns = append(make([]string, 0, 8), "/v1/*")
	route.URLParams.Add("account", "acme")
	ctx := context.WithValue(context.Background(), chi.RouteCtxKey, route)
	restore := chiroute.State(ctx)
	for run := range 3 {
		if route.RoutePath != "/transfers" || len(route.RoutePatterns) != 1 || route.RoutePatterns[0] != "/v1/*" ||
			len(route.URLParams.Keys) != 1 || route.URLParams.Keys[0] != "account" || route.URLParams.Values[0] != "acme" {
			t.Errorf("run %d: path %q, patterns %q, parameters %+v", run, route.RoutePath, route.RoutePatterns, route.URLParams)
		}
		route.RoutePath = "/"
		route.RoutePatterns[0] = "/changed"
		route.RoutePatterns = append(route.RoutePatterns, "/more")
		route.URLParams.Keys[0], route.URLParams.Values[0] = "changed", "changed"
		route.URLParams.Add("more", "more")
		route = chi.RouteContext(restore(ctx))
	}
}

func TestStateWithoutChi(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	if got := chiroute.State(ctx)(ctx); got != ctx {
		t.Errorf("the context became %v", got)
	}
}
