package operator_test

import (
	"reflect"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestGetTellsWhatTheRecordHolds(t *testing.T) {
	t.Parallel()
	for _, schema := range []string{"public", "payments"} {
		b := setupIn(t, schema, nil)
		k := key("canary")
		b.do(t, k, 201)
		state, err := b.operator.Get(t.Context(), k)
		if err != nil || state.Record == nil || state.Holder != nil {
			t.Fatalf("%+v, %v", state, err)
		}
		r := state.Record
		want := operator.Record{
			Key: k, Status: 201, Fingerprint: testservice.Request(k).Fingerprint, Attempt: r.Attempt, TraceID: "trace-canary", CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt,
			BodyBytes: 4, Header: map[string][]string{"Content-Type": {"text/plain"}, "Vary": {"A", "B"}},
		}
		if !reflect.DeepEqual(*r, want) || r.Attempt.IsZero() || !soon(r.CreatedAt) || !soon(state.Now) || r.ExpiresAt.Sub(r.CreatedAt) < 24*time.Hour {
			t.Errorf("%+v, want %+v", *r, want)
		}
		if body, err := b.operator.Body(t.Context(), k); string(body) != "done" || err != nil {
			t.Errorf("body %q, %v", body, err)
		}
	}
}

func TestGetOfAKeyThatNobodyUsed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	_, err := b.operator.Get(t.Context(), key("canary"))
	wantError(t, err, operator.ErrNotFound)
	_, err = b.operator.Body(t.Context(), key("canary"))
	wantError(t, err, operator.ErrNotFound)
	_, err = b.operator.Get(t.Context(), idempotency.Key{Scope: "acme", Value: "canary canary"})
	wantError(t, err, operator.ErrInvalid)
}

// While the handler runs there is no record, and the result names the session that holds the key.
func TestGetOfARunningAttempt(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	finish := b.Running(t, k)
	state, err := b.operator.Get(t.Context(), k)
	if err != nil || state.Record != nil || state.Holder == nil {
		t.Fatalf("%+v, %v", state, err)
	}
	if h := state.Holder; h.PID == 0 || !soon(h.Since) || h.Age < 0 || h.State != "idle in transaction" {
		t.Errorf("%+v", h)
	}
	if other, err := b.operator.Get(t.Context(), key("other")); err == nil {
		t.Errorf("another key: %+v", other)
	}
	if result := finish(); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatal(result.Err)
	}
	if state, err := b.operator.Get(t.Context(), k); err != nil || state.Record == nil || state.Holder != nil {
		t.Errorf("afterwards: %+v, %v", state, err)
	}
}

// A record with unreadable headers is shown all the same.
func TestGetOfACorruptRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("canary"), 201)
	b.Exec(t, `UPDATE idempotency_keys SET headers = '\x09'`)
	state, err := b.operator.Get(t.Context(), key("canary"))
	if err != nil || state.Record == nil || state.Record.HeaderErr == nil || state.Record.Header != nil {
		t.Errorf("%+v, %v", state, err)
	}
}

func TestBodyAtItsLimit(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("canary"), 201)
	b.Exec(t, `UPDATE idempotency_keys SET body = convert_to(repeat('x', $1), 'UTF8')`, operator.BodyBytesMax)
	if body, err := b.operator.Body(t.Context(), key("canary")); len(body) != operator.BodyBytesMax || err != nil {
		t.Errorf("%d bytes, %v", len(body), err)
	}
	b.Exec(t, `UPDATE idempotency_keys SET body = body || 'x'`)
	_, err := b.operator.Body(t.Context(), key("canary"))
	wantError(t, err, operator.ErrTooLarge)
}
