package idempotency_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// Once any run has called DerivedKey, the request stays marked to its end, whatever later runs do.
func TestDerivedKeyOfAnEarlierRunIsNotForgotten(t *testing.T) {
	t.Parallel()
	again := turn{end: idempotency.ErrNotSerializable}
	record := func(f idempotency.Fingerprint) *idempotency.Record {
		return &idempotency.Record{Fingerprint: f, Answer: idempotency.Answer{Status: 201}}
	}
	for name, test := range map[string]struct {
		turns   []turn
		status  int // of the runs after the first
		outcome idempotency.Outcome
		reason  idempotency.Reason
	}{
		"the next run is committed":             {[]turn{again, {}}, 201, idempotency.OutcomeExecuted, ""},
		"the next run is declined":              {[]turn{again, {}}, 402, idempotency.OutcomeExecuted, ""},
		"the next run is forgotten":             {[]turn{again, {}}, 504, idempotency.OutcomeUnknown, ""},
		"the next run is forgotten, 429":        {[]turn{again, {}}, 429, idempotency.OutcomeUnknown, ""},
		"the next claim finds no database":      {[]turn{again, {begin: idempotency.ErrUnavailable}}, 0, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown},
		"the next claim finds the record":       {[]turn{again, {record: record(fingerprint)}}, 0, idempotency.OutcomeReplayed, ""},
		"the next claim finds another's record": {[]turn{again, {record: record(otherFingerprint)}}, 0, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown},
		"the next claim finds the key taken":    {[]turn{again, {begin: idempotency.ErrInProgress}}, 0, idempotency.OutcomeInProgress, idempotency.ReasonInProgress},
		"restarts are spent":                    {[]turn{again, again, again, again}, 201, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown},
		"the last commit is aborted":            {[]turn{again, {end: idempotency.ErrAborted}}, 201, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown},
		"the last commit is resolved absent":    {[]turn{again, {end: idempotency.ErrUnknown}}, 201, idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown},
		"a record was seen, and can't be read":  {[]turn{{end: idempotency.ErrKeyRecorded}, {begin: idempotency.ErrUnavailable}}, 0, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			runs := 0
			result := idempotency.NewEngine(scripted(test.turns...), nil).Do(t.Context(), keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
				if runs++; runs == 1 {
					return asking(answering(201))(ctx)
				}
				return answering(test.status)(ctx)
			})
			if result.Outcome != test.outcome || result.Reason != test.reason {
				t.Errorf("%s, %q; want %s, %q (%v)", result.Outcome, result.Reason, test.outcome, test.reason, result.Err)
			}
		})
	}
}

// Any goroutine of the handler sets the mark: one of many, or one that an earlier run left behind.
func TestDerivedKeyMayBeAskedForByAnyGoroutine(t *testing.T) {
	t.Parallel()
	result := idempotency.NewEngine(memory.New(nil), nil).Do(t.Context(), keyed("many"), func(ctx context.Context) (*idempotency.Answer, error) {
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() { _ = idempotency.DerivedKey(ctx, "charge") })
		}
		wg.Wait()
		return answering(504)(ctx)
	})
	if result.Outcome != idempotency.OutcomeUnknown {
		t.Errorf("many goroutines: %s", result.Outcome)
	}

	second, asked := make(chan struct{}), make(chan struct{})
	runs := 0
	result = idempotency.NewEngine(scripted(turn{end: idempotency.ErrNotSerializable}, turn{}), nil).Do(t.Context(), keyed("left"), func(ctx context.Context) (*idempotency.Answer, error) {
		if runs++; runs == 1 {
			go func() {
				<-second
				_ = idempotency.DerivedKey(ctx, "charge")
				close(asked)
			}()
			return answering(201)(ctx)
		}
		close(second)
		<-asked
		return answering(504)(ctx)
	})
	if result.Outcome != idempotency.OutcomeUnknown {
		t.Errorf("a goroutine that the first run left behind: %s", result.Outcome)
	}
}

// A handler that only reads its request's properties calls no other service, and neither does a
// request that was refused before its handler ran.
func TestOnlyADerivedKeyMarksARequest(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"k", ""} {
		result := idempotency.NewEngine(memory.New(nil), nil).Do(t.Context(), keyed(value), func(ctx context.Context) (*idempotency.Answer, error) {
			_, _ = idempotency.AttemptIDFrom(ctx)
			_, _ = idempotency.KeyFrom(ctx)
			return answering(504)(ctx)
		})
		if result.Outcome != idempotency.OutcomeNotExecuted {
			t.Errorf("key %q: %s", value, result.Outcome)
		}
	}
	engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{InFlightMax: 1})
	result := engine.Do(t.Context(), keyed("outer"), asking(func(ctx context.Context) (*idempotency.Answer, error) {
		if inner := engine.Do(ctx, keyed("inner"), asking(answering(201))); inner.Outcome != idempotency.OutcomeNotExecuted {
			t.Errorf("over the limit: %s", inner.Outcome)
		}
		return answering(201)(ctx)
	}))
	if result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("the outer request: %s", result.Outcome)
	}
}

// A request without a key can't be retried with the same derived key. Its effect at another service
// stays unknown, even with a 4xx, which is not recorded without a key.
func TestDerivedKeyOfARequestWithoutAKeyIsUnknown(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]idempotency.Outcome{
		201: idempotency.OutcomeExecuted, 402: idempotency.OutcomeUnknown, 429: idempotency.OutcomeUnknown, 504: idempotency.OutcomeUnknown,
	} {
		result := idempotency.NewEngine(memory.New(nil), nil).Do(t.Context(), keyed(""), asking(answering(status)))
		if result.Outcome != want || result.Answer == nil || result.Answer.Status != status {
			t.Errorf("%d: %s with answer %v, want %s with the handler's own", status, result.Outcome, result.Answer, want)
		}
	}
}

func TestDerivedKeyOfAHandlerThatTookTooLongIsUnknown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for ask, want := range map[bool]idempotency.Reason{true: idempotency.ReasonCallUnknown, false: idempotency.ReasonUnavailable} {
			run := func(ctx context.Context) (*idempotency.Answer, error) {
				<-ctx.Done()
				return answering(504)(ctx)
			}
			if ask {
				run = asking(run)
			}
			result := idempotency.NewEngine(memory.New(nil), nil).Do(t.Context(), keyed("k"), run)
			if unknown := result.Outcome == idempotency.OutcomeUnknown; unknown != ask || result.Reason != want {
				t.Errorf("asked %v: %s, %q", ask, result.Outcome, result.Reason)
			}
		}
	})
}

// A request that waits behind one with such an end is its retry: the key is free, so it runs, and
// derives the same key.
func TestDerivedKeyOfTheLeaderLeavesTheTurnToThoseThatWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Wait: time.Second})
		var mu sync.Mutex
		var keys []string
		release := make(chan struct{})
		pay := func(ctx context.Context) (*idempotency.Answer, error) {
			mu.Lock()
			keys = append(keys, idempotency.DerivedKey(ctx, "charge"))
			first := len(keys) == 1
			mu.Unlock()
			if first {
				<-release
				return answering(504)(ctx)
			}
			return answering(201)(ctx)
		}
		results := make([]idempotency.Result, 3)
		var wg sync.WaitGroup
		for i := range results {
			wg.Go(func() { results[i] = engine.Do(context.Background(), keyed("k"), pay) })
			synctest.Wait()
		}
		close(release)
		wg.Wait()
		var outcomes []string
		for _, result := range results {
			outcomes = append(outcomes, string(result.Outcome))
		}
		if got := strings.Join(outcomes, " "); got != "unknown executed replayed" {
			t.Errorf("outcomes %s", got)
		}
		if len(keys) != 2 || keys[0] != keys[1] {
			t.Errorf("derived keys %q, want the same twice", keys)
		}
	})
}

// A waiting request claims again and again. An earlier run still counts, even if its restart found
// the key taken.
func TestDerivedKeyIsNotForgottenWhileTheRequestWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		taken := turn{begin: idempotency.ErrInProgress}
		store := scripted(turn{end: idempotency.ErrNotSerializable}, taken, taken, turn{})
		runs := 0
		result := idempotency.NewEngine(store, &idempotency.Options{Wait: time.Second}).Do(t.Context(), keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
			if runs++; runs == 1 {
				return asking(answering(201))(ctx)
			}
			return answering(504)(ctx)
		})
		if runs != 2 || result.Outcome != idempotency.OutcomeUnknown || result.Answer == nil {
			t.Errorf("%d runs, %s, %v", runs, result.Outcome, result.Answer)
		}
	})
}
