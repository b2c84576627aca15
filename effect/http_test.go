package effect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/effect"
)

// kindOf names the kind of an error of Do.
func kindOf(err error) string {
	switch {
	case err == nil:
		return "done"
	case errors.Is(err, effect.ErrDeclined):
		return "declined"
	case strings.HasPrefix(err.Error(), "not sent: "):
		return "not sent"
	case strings.HasPrefix(err.Error(), "only a person"):
		return "park"
	}
	return "unknown"
}

func TestFromHTTP(t *testing.T) {
	t.Parallel()
	const reused = `{"error":{"type":"idempotency_error","message":"Keys for idempotent requests can only be used with the same parameters."}}`
	for _, c := range []struct {
		status  int
		outcome idempotency.Outcome
		body    string
		want    string
	}{
		{status: 200, want: "done"}, {status: 201, want: "done"}, {status: 204, want: "done"},
		{status: 301, want: "unknown"}, {status: 303, want: "unknown"}, {status: 307, want: "unknown"},
		{status: 400, want: "declined"}, {status: 402, want: "declined"}, {status: 404, want: "declined"}, {status: 422, want: "declined"},
		{status: 401, want: "unknown"}, {status: 403, want: "unknown"}, {status: 405, want: "unknown"}, {status: 413, want: "unknown"},
		{status: 409, want: "unknown"}, {status: 425, want: "unknown"}, {status: 429, want: "unknown"},
		{status: 500, want: "unknown"}, {status: 502, want: "unknown"}, {status: 503, want: "unknown"}, {status: 504, want: "unknown"},
		{status: 400, body: reused, want: "park"},
		{status: 400, body: `{"errors":[{"code":"IDEMPOTENCY_KEY_REUSED"}]}`, want: "park"},
		{status: 422, body: `{"title":"Idempotency-Key is already used"}`, want: "park"},
		{status: 402, body: `{"idempotency_key":"1","code":"no_funds"}`, want: "declined"},
		{status: 402, body: strings.Repeat("x", effect.DeclineBodyBytesMax+1), want: "declined"},
		{status: 201, outcome: idempotency.OutcomeExecuted, want: "done"},
		{status: 201, outcome: idempotency.OutcomeReplayed, want: "done"},
		{status: 409, outcome: idempotency.OutcomeReplayed, want: "declined"},
		{status: 422, outcome: idempotency.OutcomeExecuted, body: reused, want: "declined"}, // its handler's own words
		{status: 500, outcome: idempotency.OutcomeReplayed, want: "unknown"},
		{status: 422, outcome: idempotency.OutcomeMismatch, want: "park"},
		{status: 409, outcome: idempotency.OutcomeInProgress, want: "unknown"},
		{status: 503, outcome: idempotency.OutcomeUnknown, want: "unknown"},
		{status: 503, outcome: idempotency.OutcomeNotExecuted, want: "not sent"},
		{status: 400, outcome: idempotency.OutcomeNotExecuted, want: "not sent"},
		{status: 202, outcome: "a word of a later release", want: "unknown"},
	} {
		resp := &http.Response{StatusCode: c.status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(c.body))}
		if c.outcome != "" {
			resp.Header.Set("Idempotency-Status", string(c.outcome))
		}
		if got := kindOf(effect.FromHTTP(resp, nil)); got != c.want {
			t.Errorf("%d %q %.30q: %s, want %s", c.status, c.outcome, c.body, got, c.want)
		}
	}
	cut := &http.Response{StatusCode: 402, Header: http.Header{}, Body: io.NopCloser(iotest.ErrReader(io.ErrUnexpectedEOF))}
	if got := kindOf(effect.FromHTTP(cut, nil)); got != "unknown" {
		t.Errorf("a decline that is cut off: %s", got)
	}
}

// The status of the other service's answer is recorded for operators, and the error is in the
// result, and so in the log. Nothing else of the error is recorded.
func TestStatusOfAnAnswerIsKeptForOperators(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.Do = func(context.Context, string, card) (charge, error) {
			return charge{}, fmt.Errorf("canary: %w", effect.FromHTTP(&http.Response{StatusCode: 401, Body: http.NoBody}, nil))
		}
	})
	result := s.request()
	s.wantOpen(t, result)
	if !strings.Contains(fmt.Sprint(result.Err), "canary: the other service answered 401") {
		t.Errorf("the result's error is %v", result.Err)
	}
	if n := strings.Count(fmt.Sprint(result.Err), "answered 401"); n != 2 { // in the reason and in the cause, which says more
		t.Errorf("the result's error is %v", result.Err)
	}
	if got := s.Text(t, "SELECT last_reason FROM idempotency_open"); got != "effect charge: its result is not known: the other service answered 401" {
		t.Errorf("recorded: %q", got)
	}
}

func TestFromHTTPOfErrors(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"dial":                 {fmt.Errorf("post: %w", &net.OpError{Op: "dial", Err: errors.New("refused")}), "not sent"},
		"proxy":                {&net.OpError{Op: "proxyconnect", Err: errors.New("refused")}, "unknown"},
		"read":                 {&net.OpError{Op: "read", Err: errors.New("reset")}, "unknown"},
		"end of file":          {io.EOF, "unknown"},
		"timeout":              {context.DeadlineExceeded, "unknown"},
		"neither":              {nil, "unknown"},
		"client, not executed": {fmt.Errorf("post: %w", &client.Error{Outcome: idempotency.OutcomeNotExecuted, Err: client.ErrAttemptsSpent}), "not sent"},
		"client, unknown": {&client.Error{Outcome: idempotency.OutcomeUnknown, Err: &net.OpError{Op: "dial", Err: errors.New("refused")}},
			"unknown"}, // the last attempt was not sent, an earlier one was
	} {
		if got := kindOf(effect.FromHTTP(nil, c.err)); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// The transport of net/http sends a request with a key again if a reused connection breaks. If the
// second connection is refused, the error does not show that the first request was received.
func TestRefusedConnectionAfterABrokenOneIsNotProof(t *testing.T) {
	t.Parallel()
	var received atomic.Int64
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if received.Add(1) == 2 {
			_ = server.Listener.Close()
			panic(http.ErrAbortHandler)
		}
	}))
	t.Cleanup(server.Close)
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	send := func(ctx context.Context, key string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL, strings.NewReader("{}"))
		if err != nil {
			return err
		}
		req.Header.Set("Idempotency-Key", key)
		resp, err := client.Do(req)
		if err := effect.FromHTTP(resp, err); err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return errors.Join(err, resp.Body.Close())
	}
	if err := send(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	var said error
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.AtMostOnce = true
		e.Do = func(ctx context.Context, key string, _ card) (charge, error) {
			said = send(ctx, key)
			return charge{}, said
		}
	})
	result := s.request()
	if got := kindOf(said); got != "not sent" || received.Load() != 2 {
		t.Skipf("%s after %d requests: %v: this net/http does not repeat them", got, received.Load(), said)
	}
	if result.Answer == nil || result.Answer.Status != 202 { // ErrMaybe, not ErrDeclined
		t.Errorf("%+v", result)
	}
}

func TestProfilesAreSafe(t *testing.T) {
	t.Parallel()
	for _, p := range effect.Profiles() {
		if p.Source == "" || p.Note == "" {
			t.Errorf("%s has no source or note", p.Service)
		}
		if _, err := time.Parse(time.DateOnly, p.Read); err != nil {
			t.Errorf("%s: %v", p.Service, err)
		}
		if effect.ProfileOf(p.Service) != p {
			t.Errorf("%s is not found", p.Service)
		}
		effect.New("charge", effect.Effect[int, int]{ // zero means the default, not for ever
			Do: func(context.Context, string, int) (int, error) { return 0, nil }, KeyLifetime: p.KeyLifetime, KeepsDeclines: p.KeepsDeclines,
		})
	}
	defer func() {
		if said := fmt.Sprint(recover()); !strings.Contains(said, "no profile of nobody") {
			t.Error(said)
		}
	}()
	effect.ProfileOf("nobody")
}
