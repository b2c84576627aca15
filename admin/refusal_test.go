package admin_test

import (
	"net/http"
	"strings"
	"testing"
)

// A client that asks for JSON gets a problem document.
func TestRefusalAsProblemDocument(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	response := b.as("").with("Accept", "application/json").get("live")
	body := text(t, response, http.StatusUnauthorized)
	if got := response.Header.Get("Content-Type"); got != "application/problem+json" || !strings.Contains(body, `"status":401`) {
		t.Errorf("%s: %s", got, body)
	}
	response = b.as("").with("Accept", "text/html,application/json").get("live")
	if got := response.Header.Get("Content-Type"); !strings.HasPrefix(got, "text/html") {
		t.Errorf("a browser gets %s", got)
	}
}
