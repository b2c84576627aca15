package client_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/paidonce/idempotency/client"
)

// A caller may stop asking once the server has said that it will end the request by itself, and
// only then.
func TestAcceptedIsRead(t *testing.T) {
	t.Parallel()
	const document, accepted = "application/problem+json", `{"type":"https://example.com/problems#outcome-unknown","accepted":true}`
	for name, c := range map[string]struct {
		outcome, contentType, body string
		accepted                   bool
	}{
		"accepted":             {"unknown", document, accepted, true},
		"with a charset":       {"unknown", document + "; charset=utf-8", accepted, true},
		"not accepted":         {"unknown", document, `{"type":"x","accepted":false}`, false},
		"does not say":         {"unknown", document, `{"type":"x"}`, false},
		"a handler's own body": {"unknown", "application/json", accepted, false},
		"another outcome":      {"in-progress", document, accepted, false},
		"no outcome":           {"", document, accepted, false},
		"no document":          {"unknown", document, accepted[1:], false},
		"too long":             {"unknown", document, strings.Repeat(" ", 64<<10) + accepted, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, func(n int, w http.ResponseWriter, _ *http.Request) {
				if n > 1 { // a gateway's answer: the server's promise stands
					http.Error(w, "bad gateway", http.StatusBadGateway)
					return
				}
				w.Header().Set("Content-Type", c.contentType)
				if c.outcome != "" {
					w.Header().Set("Idempotency-Status", c.outcome)
				}
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = io.WriteString(w, c.body)
			})
			_, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body")
			var e *client.Error
			if !errors.As(err, &e) || !errors.Is(err, client.ErrUnknown) || e.Accepted != c.accepted || strings.Contains(e.Error(), "accepted") != c.accepted {
				t.Errorf("%v", err)
			}
		})
	}
}
