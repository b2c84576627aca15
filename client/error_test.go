package client_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// TestErrorNeverShowsTheKey: no verb of fmt shows the key, in the error or in a value that contains
// it.
func TestErrorNeverShowsTheKey(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost"))
	var mu sync.Mutex
	var events []client.Event
	c := newClient(t, quick(func(o *client.Options) {
		o.Trace = func(_ context.Context, e client.Event) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, e)
		}
	}))
	key := uuid.NewString()
	_, _, err := post(t, c, client.WithKey(t.Context(), key), s.server.URL, "body")
	e := expectError(t, err, idempotency.OutcomeUnknown, nil)
	intent := client.Intent{Key: e.Key, Body: []byte("secret body")}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		for _, value := range []any{err, e, *e, events, intent, &intent} {
			if text := fmt.Sprintf(verb, value); strings.Contains(text, key) || strings.Contains(text, "secret") || strings.Contains(text, fmt.Sprintf("%x", key)) {
				t.Errorf("%s of a %T shows the key: %s", verb, value, text)
			}
		}
	}
	if e.Key.Value != key {
		t.Errorf("the error carries %q", e.Key.Value)
	}
	if _, err := intent.MarshalJSON(); err == nil {
		t.Error("an intent has JSON")
	}
}
