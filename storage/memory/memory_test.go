package memory_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testclock"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/storagetest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	features := storagetest.Features{WritesStay: true, NotDurable: true, ClaimsAreCertain: true, NotKept: true}
	storagetest.Run(t, features, func(*testing.T) *storagetest.Harness {
		clock := testclock.New()
		store := memory.New(&memory.Options{Now: clock.Now})
		return &storagetest.Harness{
			Store:         store,
			Advance:       func(_ context.Context, d time.Duration) error { clock.Advance(d); return nil },
			DeleteExpired: store.DeleteExpired,
		}
	})
}

func do(e *idempotency.Engine, value string, status int) idempotency.Result {
	req := idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: value},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "", nil),
	}
	return e.Do(context.Background(), req, func(context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: status, Header: map[string][]string{"X-Empty": {}}, Body: []byte("done")}, nil
	})
}

func TestRecordsAreCopies(t *testing.T) {
	t.Parallel()
	clock := testclock.New()
	store := memory.New(&memory.Options{Now: clock.Now})
	engine := idempotency.NewEngine(store, &idempotency.Options{TTL: time.Hour})
	do(engine, "k1", 201)
	do(engine, "k2", 404)
	do(engine, "k3", 500)
	records := store.Records()
	if len(records) != 2 || store.Len() != 2 {
		t.Fatalf("%d records, Len %d; want 2: an answer 500 is forgotten", len(records), store.Len())
	}
	record := records[idempotency.Key{Scope: "acme", Value: "k1"}]
	if record == nil || record.Answer.Status != 201 || string(record.Answer.Body) != "done" || len(record.Answer.Header) != 0 {
		t.Fatalf("record of k1: %+v", record)
	}
	if !record.CreatedAt.Equal(clock.Now()) || !record.ExpiresAt.Equal(clock.Now().Add(time.Hour)) {
		t.Errorf("record counts from %v to %v; want an hour from %v", record.CreatedAt, record.ExpiresAt, clock.Now())
	}
	record.Answer.Body[0] = 'X'
	delete(records, idempotency.Key{Scope: "acme", Value: "k2"})
	if again := do(engine, "k1", 201); again.Outcome != idempotency.OutcomeReplayed || string(again.Answer.Body) != "done" {
		t.Errorf("the snapshot is not a copy: %v %s", again.Outcome, again.Answer.Body)
	}
	if store.Len() != 2 {
		t.Errorf("the snapshot is not a copy: %d records left", store.Len())
	}
}

func TestFaultIsReportedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	something := errors.New("something else")
	for _, test := range []struct {
		steps  []idempotency.Step
		status int
		fault  error
		want   idempotency.Outcome
	}{
		{[]idempotency.Step{idempotency.StepClaim}, 201, idempotency.ErrUnavailable, idempotency.OutcomeNotExecuted},
		{[]idempotency.Step{idempotency.StepClaim}, 201, idempotency.ErrInProgress, idempotency.OutcomeInProgress},
		{[]idempotency.Step{idempotency.StepCommit}, 201, idempotency.ErrAborted, idempotency.OutcomeNotExecuted},
		{[]idempotency.Step{idempotency.StepDecline}, 402, idempotency.ErrUnavailable, idempotency.OutcomeNotExecuted},
		// If the outcome of COMMIT is unknown, the look-up proves that it did not happen. It proves
		// nothing if it fails too, or after a decline, because the record of a decline may still
		// come.
		{[]idempotency.Step{idempotency.StepCommit}, 201, idempotency.ErrUnknown, idempotency.OutcomeNotExecuted},
		{[]idempotency.Step{idempotency.StepCommit}, 201, something, idempotency.OutcomeNotExecuted},
		{[]idempotency.Step{idempotency.StepDecline}, 402, idempotency.ErrUnknown, idempotency.OutcomeUnknown},
		{[]idempotency.Step{idempotency.StepCommit, idempotency.StepResolve}, 201, idempotency.ErrUnknown, idempotency.OutcomeUnknown},
		{[]idempotency.Step{idempotency.StepCommit, idempotency.StepResolve}, 201, something, idempotency.OutcomeUnknown},
		{[]idempotency.Step{idempotency.StepDecline, idempotency.StepResolve}, 402, idempotency.ErrUnknown, idempotency.OutcomeUnknown},
	} {
		faults := map[idempotency.Step]error{}
		for _, step := range test.steps {
			faults[step] = test.fault
		}
		store := memory.New(&memory.Options{Fault: func(step idempotency.Step) error { return faults[step] }})
		engine := idempotency.NewEngine(store, nil)
		if got := do(engine, "k", test.status); got.Outcome != test.want || !errors.Is(got.Err, test.fault) {
			t.Errorf("%s: %v gives %s, %v; want %s", test.steps, test.fault, got.Outcome, got.Err, test.want)
		}
		clear(faults)
		if got := do(engine, "k", test.status); got.Outcome != idempotency.OutcomeExecuted {
			t.Errorf("%s: after %v the key is not free: %s, %v", test.steps, test.fault, got.Outcome, got.Err)
		}
	}
}

func TestAttemptThatIsEndedTwicePanics(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"", "k"} {
		store := memory.New(nil)
		attempt, _, err := store.Begin(t.Context(), &idempotency.Claim{Key: idempotency.Key{Scope: "acme", Value: key}})
		if err != nil {
			t.Fatal(err)
		}
		attempt.Rollback(t.Context())
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("key %q: a second end did not panic", key)
				}
			}()
			attempt.Rollback(t.Context())
		}()
	}
}

func TestStepOnADeadContextIsUnavailable(t *testing.T) {
	t.Parallel()
	dead, cancel := context.WithCancel(t.Context())
	cancel()
	store := memory.New(nil)
	claim := &idempotency.Claim{Key: idempotency.Key{Scope: "acme", Value: "k"}}
	if _, _, err := store.Begin(dead, claim); !errors.Is(err, idempotency.ErrUnavailable) {
		t.Errorf("claim: %v", err)
	}
	for name, end := range map[string]func(idempotency.Attempt) error{
		"commit":  func(a idempotency.Attempt) error { return a.Commit(dead, &idempotency.Answer{Status: 201}) },
		"decline": func(a idempotency.Attempt) error { return a.Decline(dead, &idempotency.Answer{Status: 402}) },
	} {
		attempt, _, err := store.Begin(t.Context(), claim)
		if err != nil {
			t.Fatal(err)
		}
		if err := end(attempt); !errors.Is(err, idempotency.ErrUnavailable) || store.Len() != 0 {
			t.Errorf("%s: %v, %d records", name, err, store.Len())
		}
	}
}
