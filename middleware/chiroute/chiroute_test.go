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
	state, err := chiroute.State(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
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
		route = chi.RouteContext(state.Restore(ctx))
	}
}

func TestStateWithoutChi(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	state, err := chiroute.State(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := state.Restore(ctx); got != ctx || state.Stored() != nil {
		t.Errorf("the context became %v, stored %q", got, state.Stored())
	}
}

// A resumed request gets what was kept in another process, byte by byte.
func TestStateIsKept(t *testing.T) {
	t.Parallel()
	route := chi.NewRouteContext()
	route.RoutePath, route.RouteMethod = "/topups/\xff", "POST"
	route.RoutePatterns = []string{"/accounts/{id}/*"}
	route.URLParams.Add("id", "\xff\x00")
	route.URLParams.Add("*", "")
	state, err := chiroute.State(context.WithValue(context.Background(), chi.RouteCtxKey, route), nil)
	if err != nil {
		t.Fatal(err)
	}
	restored, err := chiroute.State(context.Background(), state.Stored())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got := chi.RouteContext(restored.Restore(context.Background()))
		if got.RoutePath != "/topups/\xff" || got.RouteMethod != "POST" || got.URLParam("id") != "\xff\x00" || len(got.URLParams.Keys) != 2 || got.RoutePattern() != "/accounts/{id}/*" {
			t.Errorf("%+v", got)
		}
		got.RoutePath, got.URLParams.Values[0] = "changed", "changed"
	}
	for _, broken := range []string{"", "{", `{"keys":["id"]}`, `{"path":7}`} {
		if _, err := chiroute.State(context.Background(), []byte(broken)); err == nil {
			t.Errorf("%q was read", broken)
		}
	}
}
