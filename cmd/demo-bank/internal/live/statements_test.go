package live

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/events"
)

// TestActsThatAreRefused: an act that does not exist, a redrive without its message, a second act
// at a time, one on a database where no COMMIT can be seen, and any after the bank has begun to
// stop.
func TestActsThatAreRefused(t *testing.T) {
	t.Parallel()
	l := New(nil, "http://127.0.0.1:0", time.Hour, nil)
	refused := func(want int, slug string, fields url.Values) {
		t.Helper()
		r := httptest.NewRequest(http.MethodPost, "/live/statements", strings.NewReader(fields.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		if l.postStatements(w, r); w.Code != want || !strings.Contains(w.Body.String(), "#"+slug) {
			t.Errorf("%v: %d %s, want %d %s", fields, w.Code, w.Body, want, slug)
		}
	}
	kill := url.Values{"act": {"kill"}}
	for _, fields := range []url.Values{{}, {"act": {"break"}}, {"act": {"redrive"}}, {"act": {"kill"}, "id": {"1"}}, {"act": {strings.Repeat("k", formBytesMax)}}} {
		refused(http.StatusBadRequest, "invalid-act", fields)
	}
	refused(http.StatusConflict, "act-unavailable", kill)
	l.Consumers(Consumers{DatabaseURL: "postgres://bank@127.0.0.1/bank?sslmode=require", Broker: &events.Broker{}})
	refused(http.StatusConflict, "act-unavailable", url.Values{"act": {"lose"}})
	l.statementsRun = true
	refused(http.StatusConflict, "act-runs", kill)
	l.statementsRun = false
	l.Stop()
	refused(http.StatusServiceUnavailable, "unavailable", kill)
}

// TestCommitsAreSeenWithoutTLSOnly: a proxy can't look into TLS.
func TestCommitsAreSeenWithoutTLSOnly(t *testing.T) {
	t.Parallel()
	for database, want := range map[string]bool{
		"postgres://bank@127.0.0.1/bank":                   true, // prefer
		"postgres://bank@127.0.0.1/bank?sslmode=disable":   true,
		"postgres://bank@127.0.0.1/bank?sslmode=require":   false,
		"host=127.0.0.1 dbname=bank user=bank":             false, // no URL to put a proxy's address into
		"postgres://bank@127.0.0.1:port-of-nothing/bank?x": false,
	} {
		if got := losesCommits(database); got != want {
			t.Errorf("%s: %t", database, got)
		}
	}
}
