package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// behaviour is how a handler ends: with a status, or by failing in one of these ways.
type behaviour int

const (
	panics behaviour = -1 - iota
	aborts
	fails
	saysNothing
	endsItsGoroutine
)

// modelRecord is the model's record of an executed request.
type modelRecord struct {
	content string
	status  int
	body    string
	expires time.Time
}

// model is the promise in its shortest form, without transactions, facts or a table.
type model struct {
	now     time.Time
	records map[idempotency.Key]modelRecord
	runs    int
}

// modelRequest is a request and its prescribed fate.
type modelRequest struct {
	key     idempotency.Key
	content string
	ttl     time.Duration
	does    behaviour
	asks    int                          // the run that calls DerivedKey; 0 is none
	faults  map[idempotency.Step][]error // of the store, one after another
}

// modelResult is the result that the client of a request must get.
type modelResult struct {
	outcome idempotency.Outcome
	reason  idempotency.Reason
	status  int
	body    string
}

func (m *model) do(req modelRequest) (result modelResult) {
	runs, asked := 0, false
	defer func() { // without a record the effect at another service is unknown
		switch {
		case !asked || result.outcome != idempotency.OutcomeNotExecuted && result.outcome != idempotency.OutcomeMismatch:
		case result.reason == "":
			result.outcome = idempotency.OutcomeUnknown
		default:
			result = modelResult{outcome: idempotency.OutcomeUnknown, reason: idempotency.ReasonCallUnknown}
		}
	}()
	fault := func(step idempotency.Step) (err error) {
		if queue := req.faults[step]; len(queue) > 0 {
			err, req.faults[step] = queue[0], queue[1:]
		}
		return err
	}
	unavailable := modelResult{outcome: idempotency.OutcomeNotExecuted, reason: idempotency.ReasonUnavailable}
	failed := modelResult{outcome: idempotency.OutcomeNotExecuted, reason: idempotency.ReasonHandlerFailed}
	unknown := modelResult{outcome: idempotency.OutcomeUnknown, reason: idempotency.ReasonOutcomeUnknown}
	attempts, recorded := 3+1, false
	for ; attempts > 0; attempts-- {
		switch fault(idempotency.StepClaim) {
		case nil:
		case idempotency.ErrNotSerializable:
			continue
		case idempotency.ErrInProgress:
			return modelResult{outcome: idempotency.OutcomeInProgress, reason: idempotency.ReasonInProgress}
		case idempotency.ErrUnknown:
			return unknown
		default:
			return unavailable
		}
		if record, ok := m.records[req.key]; ok && record.content != req.content {
			return modelResult{outcome: idempotency.OutcomeMismatch, reason: idempotency.ReasonKeyReused}
		} else if ok {
			return modelResult{outcome: idempotency.OutcomeReplayed, status: record.status, body: record.body}
		}

		m.runs++
		runs++
		asked = asked || runs == req.asks
		status := int(req.does)
		if status < 0 {
			return failed
		}
		answered := modelResult{outcome: idempotency.OutcomeExecuted, status: status, body: fmt.Sprint("run ", m.runs)}
		keyless, declined := req.key.Value == "", status >= 400
		if status >= 500 || status == 401 || status == 429 || keyless && declined {
			answered.outcome = idempotency.OutcomeNotExecuted
			return answered
		}
		step := idempotency.StepCommit
		if declined {
			step = idempotency.StepDecline
		}
		switch err := fault(step); {
		case err == nil:
			if !keyless {
				m.records[req.key] = modelRecord{content: req.content, status: status, body: answered.body, expires: m.now.Add(req.ttl)}
			}
			return answered
		case err == idempotency.ErrKeyRecorded:
			unavailable = unknown // another attempt recorded the key
			if !recorded && attempts == 1 {
				attempts++ // to read the record
			}
			recorded = true
			continue
		case err == idempotency.ErrNotSerializable && !declined:
			continue
		case err == idempotency.ErrUnavailable, declined && (err == idempotency.ErrNotSerializable || err == idempotency.ErrAborted):
			return unavailable
		case err == idempotency.ErrAborted:
			return failed
		case keyless || fault(idempotency.StepResolve) != nil || declined:
			return unknown
		}
		return unavailable // looked up again: nothing was recorded
	}
	return unavailable
}

func (m *model) deleteExpired() (deleted int64) {
	for key, record := range m.records {
		if record.expires.Before(m.now) {
			delete(m.records, key)
			deleted++
		}
	}
	return deleted
}

// TestEngineDoesWhatTheModelSays sends random requests to the engine and to the model. After each
// it compares the results, the number of runs, and the records.
func TestEngineDoesWhatTheModelSays(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		m := &model{now: time.Date(2025, 7, 1, 12, 0, 0, 0, time.UTC), records: map[idempotency.Key]modelRecord{}}
		var faults map[idempotency.Step][]error
		store := memory.New(&memory.Options{
			Now: func() time.Time { return m.now },
			Fault: func(step idempotency.Step) (err error) {
				if queue := faults[step]; len(queue) > 0 {
					err, faults[step] = queue[0], queue[1:]
				}
				return err
			},
		})
		engine := idempotency.NewEngine(store, nil)
		runs := 0
		t.Repeat(map[string]func(*rapid.T){
			"request": func(t *rapid.T) {
				req := drawRequest(t)
				faults = map[idempotency.Step][]error{}
				for step, errs := range req.faults {
					faults[step] = slices.Clone(errs)
				}
				want := m.do(req)
				// A duplicate that arrives while a handler runs must not take a fault that is meant
				// for the first request.
				mayCopy := func() bool { return req.key.Value != "" && len(faults[idempotency.StepClaim]) == 0 }
				got, returned := send(t, engine, req, &runs, mayCopy)
				if runs != m.runs {
					t.Fatalf("the handler ran %d times, want %d", runs, m.runs)
				}
				if returned && got != want {
					t.Fatalf("the client saw %+v, want %+v", got, want)
				}
			},
			"time passes": func(t *rapid.T) {
				m.now = m.now.Add(time.Duration(rapid.IntRange(0, 40).Draw(t, "minutes")) * time.Minute)
			},
			"reaper": func(t *rapid.T) {
				want := m.deleteExpired()
				if got, err := store.DeleteExpired(context.Background()); err != nil || got != want {
					t.Fatalf("%d records were deleted, %v; want %d", got, err, want)
				}
			},
			"": func(t *rapid.T) {
				if engine.InFlight() != 0 {
					t.Fatalf("%d requests in flight", engine.InFlight())
				}
				records := store.Records()
				if len(records) != len(m.records) {
					t.Fatalf("%d records, want %d", len(records), len(m.records))
				}
				for key, want := range m.records {
					got := records[key]
					if got == nil || got.Answer.Status != want.status || string(got.Answer.Body) != want.body ||
						!got.ExpiresAt.Equal(want.expires) || got.Fingerprint != idempotency.NewFingerprint(100, []byte(want.content)) {
						t.Fatalf("key %v: record %+v, want %+v", key, got, want)
					}
				}
			},
		})
	})
}

func drawRequest(t *rapid.T) modelRequest {
	faults := func(errs ...error) []error {
		if rapid.IntRange(0, 3).Draw(t, "faulty") > 0 {
			return nil
		}
		return rapid.SliceOfN(rapid.SampledFrom(errs), 1, 5).Draw(t, "faults")
	}
	return modelRequest{
		key: idempotency.Key{
			Scope: rapid.SampledFrom([]string{"acme", "initech"}).Draw(t, "scope"),
			Value: rapid.SampledFrom([]string{"", "k", "K"}).Draw(t, "key"),
		},
		content: rapid.SampledFrom([]string{"x", "x", "y"}).Draw(t, "content"),
		ttl:     rapid.SampledFrom([]time.Duration{time.Minute, time.Hour}).Draw(t, "ttl"),
		does: rapid.SampledFrom([]behaviour{
			200, 201, 303, 399, 400, 402, 401, 429, 500, 503, panics, aborts, fails, saysNothing, endsItsGoroutine,
		}).Draw(t, "does"),
		asks: rapid.IntRange(0, 3).Draw(t, "asks"),
		faults: map[idempotency.Step][]error{
			idempotency.StepClaim:   faults(nil, idempotency.ErrNotSerializable, idempotency.ErrUnavailable, idempotency.ErrInProgress, idempotency.ErrUnknown, errOther),
			idempotency.StepCommit:  faults(idempotency.ErrNotSerializable, idempotency.ErrKeyRecorded, idempotency.ErrAborted, idempotency.ErrUnavailable, idempotency.ErrUnknown, errOther),
			idempotency.StepResolve: faults(nil, nil, idempotency.ErrUnknown, errOther),
			idempotency.StepDecline: faults(idempotency.ErrNotSerializable, idempotency.ErrKeyRecorded, idempotency.ErrAborted, idempotency.ErrUnavailable, idempotency.ErrUnknown, errOther),
		},
	}
}

// send sends a request and returns the client's result, or false if the handler ended its
// goroutine. Duplicates that arrive while the handler runs must get in-progress, and run nothing.
func send(t *rapid.T, engine *idempotency.Engine, req modelRequest, runs *int, mayCopy func() bool) (result modelResult, returned bool) {
	request := idempotency.Request{Key: req.key, Fingerprint: idempotency.NewFingerprint(100, []byte(req.content)), TTL: req.ttl}
	copyOutcome := idempotency.OutcomeInProgress
	var got idempotency.Result
	done := make(chan struct{})
	ran := 0
	go func() {
		defer close(done)
		got = engine.Do(context.Background(), request, func(ctx context.Context) (*idempotency.Answer, error) {
			*runs++
			if ran++; ran == req.asks {
				_ = idempotency.DerivedKey(ctx, "charge")
			}
			if mayCopy() {
				copied := engine.Do(ctx, request, func(context.Context) (*idempotency.Answer, error) {
					*runs += 1000
					return nil, errors.New("the handler of a copy ran")
				})
				copyOutcome = copied.Outcome
			}
			switch req.does {
			case panics:
				panic("handler")
			case aborts:
				panic(http.ErrAbortHandler)
			case fails:
				return nil, errOther
			case saysNothing:
				return nil, nil
			case endsItsGoroutine:
				runtime.Goexit()
			}
			return &idempotency.Answer{Status: int(req.does), Body: fmt.Append(nil, "run ", *runs)}, nil
		})
		returned = true
	}()
	<-done
	if copyOutcome != idempotency.OutcomeInProgress {
		t.Fatalf("a copy that came while the handler ran was told %s", copyOutcome)
	}
	result = modelResult{outcome: got.Outcome, reason: got.Reason}
	if got.Answer != nil {
		result.status, result.body = got.Answer.Status, string(got.Answer.Body)
	}
	return result, returned
}
