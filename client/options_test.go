package client_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// canned is a base RoundTripper without a network, so that a test can use the clock of a synctest
// bubble.
type canned func(r *http.Request) (*http.Response, error)

func (f canned) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// answerOf makes an answer with headers, given as names and values in turn.
func answerOf(r *http.Request, status int, headers ...string) *http.Response {
	response := &http.Response{StatusCode: status, Header: http.Header{}, Body: http.NoBody, Request: r}
	for i := 0; i < len(headers); i += 2 {
		response.Header.Set(headers[i], headers[i+1])
	}
	return response
}

// pauses runs one request against an answer that never changes, and returns its pauses and its
// error.
func pauses(t *testing.T, ctx context.Context, o *client.Options, answer func(r *http.Request) *http.Response) (list []time.Duration, err error) {
	t.Helper()
	if o.Honours == nil {
		o.Honours = client.Everywhere
	}
	o.Trace = func(_ context.Context, e client.Event) {
		if e.Kind == client.EventWaiting {
			list = append(list, e.Pause)
		}
	}
	transport := client.New(canned(func(r *http.Request) (*http.Response, error) { return answer(r), nil }), o)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://bank.example/", strings.NewReader("body"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = transport.RoundTrip(r)
	return list, err
}

func unavailable(r *http.Request) *http.Response {
	return answerOf(r, 503, "Idempotency-Status", "not-executed")
}

// TestBackoffIsFullJitterUnderItsBounds: each pause is below its bound, which doubles up to the
// maximum. Among many pauses some are near the bound, and some near zero.
func TestBackoffIsFullJitterUnderItsBounds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const first, most, requests = 100 * time.Millisecond, 400 * time.Millisecond, 200
		var low, high int
		for range requests {
			list, err := pauses(t, t.Context(), &client.Options{BackoffFirst: first, BackoffMax: most, AttemptsMax: 5, Unbudgeted: true}, unavailable)
			expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrAttemptsSpent)
			if len(list) != 4 {
				t.Fatalf("there were %d pauses", len(list))
			}
			for i, bound := range []time.Duration{first, 2 * first, most, most} {
				if list[i] < 0 || list[i] >= bound {
					t.Errorf("pause %d is %v, its bound is %v", i+1, list[i], bound)
				}
			}
			if list[3] < most/5 {
				low++
			}
			if list[3] > most*4/5 {
				high++
			}
		}
		if low == 0 || high == 0 {
			t.Errorf("of %d pauses %d were near zero and %d near the bound", requests, low, high)
		}
	})
}

func TestRetryAfterIsHonouredUpToItsMost(t *testing.T) {
	t.Parallel()
	at := func(d time.Duration) func(now time.Time) string {
		return func(now time.Time) string { return now.Add(d).UTC().Format(http.TimeFormat) }
	}
	text := func(s string) func(time.Time) string { return func(time.Time) string { return s } }
	for name, one := range map[string]struct {
		retryAfter, date func(now time.Time) string // nil: none
		want             time.Duration
	}{
		"none":                           {nil, nil, 0},
		"seconds":                        {text("7"), nil, 7 * time.Second},
		"at the most":                    {text("10"), nil, 10 * time.Second},
		"over the most":                  {text("11"), nil, 10 * time.Second},
		"a date":                         {at(5 * time.Second), nil, 5 * time.Second},
		"a date by the server's clock":   {at(time.Hour), at(time.Hour - 3*time.Second), 3 * time.Second},
		"a date that is over":            {at(-time.Hour), nil, 0},
		"negative":                       {text("-5"), nil, 0},
		"nonsense":                       {text("soon"), nil, 0},
		"more seconds than a number has": {text("99999999999999999999"), nil, 10 * time.Second},
		"a date that never comes":        {text("Fri, 31 Dec 9999 23:59:59 GMT"), nil, 10 * time.Second},
		"seconds with a fraction":        {text("1.5"), nil, 1500 * time.Millisecond},
		"an exponent":                    {text("1e3"), nil, 0},
		"no number":                      {text("."), nil, 0},
		"nothing":                        {text(" "), nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				list, err := pauses(t, t.Context(), &client.Options{
					BackoffFirst: time.Millisecond, BackoffMax: time.Millisecond, RetryAfterMax: 10 * time.Second, AttemptsMax: 2,
				}, func(r *http.Request) *http.Response {
					response := unavailable(r)
					if one.retryAfter != nil {
						response.Header.Set("Retry-After", one.retryAfter(time.Now()))
					}
					if one.date != nil {
						response.Header.Set("Date", one.date(time.Now()))
					}
					return response
				})
				expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrAttemptsSpent)
				if len(list) != 1 || list[0] < one.want || list[0] >= one.want+time.Millisecond {
					t.Errorf("pauses are %v, want %v and a bit", list, one.want)
				}
			})
		})
	}
}

// TestTimeIsBounded: no pause begins if it would end after TotalMax or the context's deadline. The
// error is returned at once.
func TestTimeIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		late := func(r *http.Request) *http.Response {
			return answerOf(r, 503, "Idempotency-Status", "unknown", "Retry-After", "10")
		}
		o := func(total time.Duration) *client.Options {
			return &client.Options{BackoffFirst: 1, BackoffMax: 1, TotalMax: total} // no jitter
		}
		for name, one := range map[string]struct {
			total, deadline time.Duration // 0: none
			pauses          int
			why             error
		}{
			"TotalMax, just enough for one":  {10 * time.Second, 0, 1, client.ErrTimeSpent},
			"TotalMax, not enough for one":   {10*time.Second - 1, 0, 0, client.ErrTimeSpent},
			"deadline, just enough for one":  {time.Hour, 10 * time.Second, 1, context.DeadlineExceeded},
			"deadline, not enough for one":   {time.Hour, 10*time.Second - 1, 0, context.DeadlineExceeded},
			"TotalMax, just enough for five": {50 * time.Second, 0, 5, client.ErrTimeSpent},
		} {
			ctx, cancel := context.WithCancel(t.Context())
			if one.deadline > 0 {
				ctx, cancel = context.WithTimeout(t.Context(), one.deadline)
			}
			started := time.Now()
			list, err := pauses(t, ctx, o(one.total), late)
			cancel()
			expectError(t, err, idempotency.OutcomeUnknown, one.why)
			if len(list) != one.pauses || time.Since(started) != time.Duration(one.pauses)*10*time.Second {
				t.Errorf("%s: %d pauses in %v, want %d", name, len(list), time.Since(started), one.pauses)
			}
		}
	})
}

// TestAttemptTimeout: an attempt that takes too long is lost, and the next one follows.
func TestAttemptTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for _, one := range []struct {
			takes time.Duration
			lost  bool
		}{{time.Second - 1, false}, {time.Second + 1, true}} {
			transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
				select {
				case <-time.After(one.takes):
					return answerOf(r, 201, "Idempotency-Status", "executed"), nil
				case <-r.Context().Done():
					return nil, r.Context().Err()
				}
			}), &client.Options{Honours: client.Everywhere, AttemptTimeout: time.Second, AttemptsMax: 3})
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bank.example/", nil)
			if err != nil {
				t.Fatal(err)
			}
			_, err = transport.RoundTrip(r)
			if !one.lost {
				if err != nil {
					t.Errorf("an attempt of %v was lost: %v", one.takes, err)
				}
				continue
			}
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptTimedOut)
		}
	})
}

// TestCancelEndsAtOnce: a cancellation ends the request in a pause and in an attempt, and the error
// has the true outcome.
func TestCancelEndsAtOnce(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		answer  string // before the pause; empty: it is canceled in the first attempt
		outcome idempotency.Outcome
	}{
		"in a pause, nothing executed": {"503 not-executed", idempotency.OutcomeNotExecuted},
		"in a pause, unknown":          {"503 unknown", idempotency.OutcomeUnknown},
		"in an attempt":                {"", idempotency.OutcomeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
				if one.answer == "" {
					cancel()
					<-r.Context().Done()
					return
				}
				each(one.answer)(n, w, r)
			})
			c := newClient(t, &client.Options{
				Honours: client.Everywhere, BackoffFirst: time.Minute, BackoffMax: time.Minute,
				Trace: func(_ context.Context, e client.Event) {
					if e.Kind == client.EventWaiting {
						cancel()
					}
				},
			})
			_, _, err := post(t, c, ctx, s.server.URL, "body")
			expectError(t, err, one.outcome, context.Canceled)
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := post(t, newClient(t, quick()), client.WithNewKey(ctx, "k"), "http://127.0.0.1:1", "body")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a request that was over before it began ended with %v", err)
	}
}

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]client.Options{
		"GET":                                {Methods: []string{"GET"}},
		"TRACE":                              {Methods: []string{"POST", "TRACE"}},
		"QUERY":                              {Methods: []string{"QUERY"}},
		"negative BackoffFirst":              {BackoffFirst: -1},
		"BackoffMax under BackoffFirst":      {BackoffFirst: 2, BackoffMax: 1},
		"negative RetryAfterMax":             {RetryAfterMax: -1},
		"negative AttemptTimeout":            {AttemptTimeout: -1},
		"negative TotalMax":                  {TotalMax: -1},
		"negative AttemptsMax":               {AttemptsMax: -1},
		"negative RetryPercent":              {RetryPercent: -1},
		"negative RetriesPerSecond":          {RetriesPerSecond: -1},
		"negative RetryBurst":                {RetryBurst: -1},
		"negative BodyBytesMax":              {BodyBytesMax: -1},
		"negative AnswerBytesMax":            {AnswerBytesMax: -1},
		"a credential is kept":               {IntentHeaders: []string{"authorization"}},
		"a cookie is kept":                   {IntentHeaders: []string{"Cookie"}},
		"a header is kept and omitted":       {IntentHeaders: []string{"X-Order"}, IntentHeadersOmitted: []string{"x-order"}},
		"a method that is none":              {Methods: []string{"PO ST"}},
		"intents, and nobody's word":         {Intents: newIntents()},
		"an intent too old while it is sent": {Intents: newIntents(), Honours: client.Everywhere, TotalMax: time.Hour, IntentAgeMax: time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			defer func() {
				if text, _ := recover().(string); !strings.HasPrefix(text, "idempotency/client: ") {
					t.Errorf("New said %q", text)
				}
			}()
			client.New(nil, &o)
		})
	}
	client.New(nil, nil)
	client.New(nil, &client.Options{Methods: []string{"PUT", "DELETE"}, Intents: newIntents(), Honours: client.Everywhere, IntentHeaders: []string{"X-Order"}})
}
