package metrics

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
)

// TestStepsAreCountedByTheirError: a failed step is counted by the sentinel that it wraps, and never by its text.
func TestStepsAreCountedByTheirError(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		want string
	}{
		{idempotency.ErrInProgress, "in-progress"},
		{idempotency.ErrUnavailable, "unavailable"},
		{idempotency.ErrSerialization, "serialization"},
		{idempotency.ErrAborted, "aborted"},
		{idempotency.ErrKeyRecorded, "key-recorded"},
		{idempotency.ErrTransactionLost, "transaction-lost"},
		{idempotency.ErrUnknown, "unknown"},
		{errors.New("canary"), "other"},
		{&idempotency.PanicError{Value: "canary"}, "other"},
		{fmt.Errorf("commit: %w: %w", idempotency.ErrUnknown, idempotency.ErrUnavailable), "unknown"},
		{errors.Join(idempotency.ErrUnavailable, fmt.Errorf("resolve: %w", idempotency.ErrUnknown)), "unknown"},
	} {
		m := New()
		m.TraceStep(context.Background(), idempotency.StepEnd{Step: idempotency.StepCommit, Duration: time.Millisecond})
		m.TraceStep(context.Background(), idempotency.StepEnd{Step: idempotency.StepCommit, Duration: time.Millisecond, Err: fmt.Errorf("commit: %w", test.err)})
		scrape := httptest.NewRecorder()
		m.Handler().ServeHTTP(scrape, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		var failures []string
		for line := range strings.Lines(scrape.Body.String()) {
			if strings.HasPrefix(line, "idempotency_step_failures_total{") {
				failures = append(failures, line)
			}
		}
		want := `idempotency_step_failures_total{error="` + test.want + `",step="commit"} 1` + "\n"
		if len(failures) != 1 || failures[0] != want {
			t.Errorf("%v: %q, want %q", test.err, failures, want)
		}
		if !strings.Contains(scrape.Body.String(), `idempotency_step_duration_seconds_count{step="commit"} 2`) {
			t.Errorf("%v: the steps are not counted", test.err)
		}
		if strings.Contains(scrape.Body.String(), "canary") {
			t.Errorf("%v: its text is shown", test.err)
		}
	}
}
