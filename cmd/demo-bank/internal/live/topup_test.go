package live

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestOneTopUpAtATime: a second top-up is refused, and so is every top-up after the bank began to
// stop.
func TestOneTopUpAtATime(t *testing.T) {
	t.Parallel()
	l := New(nil, "http://127.0.0.1:0", time.Hour, nil)
	refused := func(want int) {
		t.Helper()
		w := httptest.NewRecorder()
		if l.postTopUp(w, httptest.NewRequest(http.MethodPost, "/live/topup", nil)); w.Code != want {
			t.Errorf("%d %s, want %d", w.Code, w.Body, want)
		}
	}
	l.topUp.Store(&demonstration{live: l})
	refused(http.StatusConflict)
	l.topUp.Store(nil)
	l.Stop()
	refused(http.StatusServiceUnavailable)
}

// TestWireLosesNothingElse: only the first reply of a demonstration's own charges is lost.
func TestWireLosesNothingElse(t *testing.T) {
	t.Parallel()
	var bodies []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		bodies = append(bodies, string(body))
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"id":"ch_1"}`)
	}))
	t.Cleanup(server.Close)
	l := New(nil, "http://127.0.0.1:0", time.Hour, nil)
	client := &http.Client{Transport: l.Wire(http.DefaultTransport)}
	post := func(path, reference string) error {
		body := `{"reference":"top-up of ` + reference + `"}`
		response, err := client.Post(server.URL+path, "application/json", strings.NewReader(body))
		if bodies[len(bodies)-1] != body {
			t.Errorf("it sent %s, want %s", bodies[len(bodies)-1], body)
		}
		if err != nil {
			return err
		}
		answer, err := io.ReadAll(response.Body)
		if err == nil && string(answer) != `{"id":"ch_1"}` {
			t.Errorf("it got %s", answer)
		}
		return errors.Join(err, response.Body.Close())
	}
	if err := post("/charges", "ours"); err != nil {
		t.Errorf("without a demonstration: %v", err)
	}
	l.topUp.Store(&demonstration{live: l, accounts: [2]string{"ours", "other"}})
	for _, c := range []struct {
		path, reference string
		lost            bool
	}{{"/charges", "alice", false}, {"/payouts", "ours", false}, {"/charges", "ours", true}, {"/charges", "ours", false}, {"/charges", "other", true}} {
		if err := post(c.path, c.reference); errors.Is(err, errReplyLost) != c.lost || !c.lost && err != nil {
			t.Errorf("%s of %s: %v", c.path, c.reference, err)
		}
	}
}
