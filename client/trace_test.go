package client_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/paidonce/idempotency/client"
)

// TestEvents: the trace of a request that loses a reply, waits, and is answered.
func TestEvents(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost", "409 in-progress", "201 replayed"))
	type name struct{}
	var kinds []string
	c := newClient(t, quick(func(o *client.Options) {
		o.Trace = func(ctx context.Context, e client.Event) {
			if ctx.Value(name{}) != "x" || e.Key.Value != "mine" {
				t.Errorf("event of another request: %+v", e)
			}
			kinds = append(kinds, fmt.Sprintf("%s %d %d %s", e.Kind, e.Attempt, e.Status, e.Outcome))
		}
	}))
	if _, _, err := post(t, c, client.WithKey(context.WithValue(t.Context(), name{}, "x"), "mine"), s.server.URL, "body"); err != nil {
		t.Fatal(err)
	}
	want := "started 1 0 ,lost 1 0 ,waiting 1 0 ,started 2 0 ,answered 2 409 in-progress,waiting 2 0 ,started 3 0 ,answered 3 201 replayed,ended 3 201 replayed"
	if got := strings.Join(kinds, ","); got != want {
		t.Errorf("events are\n%s, want\n%s", got, want)
	}
}
