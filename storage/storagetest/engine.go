package storagetest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/paidonce/idempotency"
)

var engineCases = []testCase{
	{
		name: "StormHasOneEffectPerKey",
		rule: "However many copies of a request come at once, one is executed and all get its answer. A first attempt that fails is followed by one that does not.",
		run:  storm,
	},
	{
		name: "PanicFreesTheKey",
		rule: "After a handler's panic nothing of the attempt is left, and the retry runs.",
		run: func(c *check) {
			engine := idempotency.NewEngine(c.Store, nil)
			req := requestOf("acme", "k")
			result := engine.Do(c.ctx, req, func(ctx context.Context) (*idempotency.Answer, error) {
				if !c.features.WritesStay {
					if err := c.Write(ctx, "w"); err != nil {
						return nil, err
					}
				}
				panic("handler")
			})
			if result.Outcome != idempotency.OutcomeNotExecuted {
				c.Errorf("a panic ends as %s: %v", result.Outcome, result.Err)
			}
			if !c.features.WritesStay {
				c.wantWritten("w", 0)
			}
			result = engine.Do(c.ctx, req, func(context.Context) (*idempotency.Answer, error) { return answer(201, "done"), nil })
			if result.Outcome != idempotency.OutcomeExecuted {
				c.Errorf("the retry ends as %s: %v", result.Outcome, result.Err)
			}
		},
	},
}

// storm sends a few requests many times concurrently, and repeats each until it is settled.
func storm(c *check) {
	const keys, copies = 6, 12
	s := &stormCounts{runs: map[string]int{}, executed: map[string]int{}, answers: map[string]map[string]int{}}
	engine := idempotency.NewEngine(c.Store, &idempotency.Options{InFlightMax: -1})
	statuses := map[string]int{}
	for key := range keys {
		// These are committed, declined, and failed at first.
		statuses[fmt.Sprint(key)] = []int{201, 402, 200}[key%3]
	}
	errs := make([]error, keys*copies)
	atOnce(keys*copies, func(i int) {
		key := fmt.Sprint(i % keys)
		errs[i] = s.untilSettled(c, engine, key, statuses[key])
	})
	for _, err := range errs {
		if err != nil {
			c.Fatalf("storm: %v", err)
		}
	}
	for key, status := range statuses {
		if s.executed[key] != 1 {
			c.Errorf("key %s, status %d: executed %d times, want 1", key, status, s.executed[key])
		}
		if len(s.answers[key]) != 1 {
			c.Errorf("key %s, status %d: %d different answers: %v", key, status, len(s.answers[key]), s.answers[key])
		}
		runs := 1
		if status == 200 {
			runs = 2
		}
		// After a decline's writes are undone and before its record is committed, another attempt
		// may claim the key and run: it leaves nothing, and loses.
		if s.runs[key] < runs || s.runs[key] > runs && status != 402 && !c.features.RunsAgain {
			c.Errorf("key %s, status %d: its handler ran %d times, want %d", key, status, s.runs[key], runs)
		}
		if !c.features.WritesStay {
			want := 1
			if status == 402 {
				want = 0
			}
			c.wantWritten(key, want)
		}
	}
}

type stormCounts struct {
	mu       sync.Mutex
	runs     map[string]int            // of each key's handler
	executed map[string]int            // the number of executed outcomes
	answers  map[string]map[string]int // each key's different answers
}

// run counts a run of a key's handler and returns the number of runs.
func (s *stormCounts) run(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.runs[key]++
	return s.runs[key]
}

func (s *stormCounts) settled(key string, result idempotency.Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if result.Outcome == idempotency.OutcomeExecuted {
		s.executed[key]++
	}
	if s.answers[key] == nil {
		s.answers[key] = map[string]int{}
	}
	s.answers[key][fmt.Sprint(result.Answer.Status, " ", string(result.Answer.Body))]++
}

// untilSettled is a client: it retries until it has a final answer.
func (s *stormCounts) untilSettled(c *check, engine *idempotency.Engine, key string, status int) error {
	for c.ctx.Err() == nil {
		result := engine.Do(c.ctx, requestOf("acme", key), func(ctx context.Context) (*idempotency.Answer, error) {
			run := s.run(key)
			if !c.features.WritesStay {
				if err := c.Write(ctx, key); err != nil {
					return nil, err
				}
			}
			runtime.Gosched() // let the others see the claim
			if status == 200 && run == 1 {
				return answer(500, "failed"), nil
			}
			id, _ := idempotency.AttemptIDFrom(ctx)
			return answer(status, id.String()), nil
		})
		switch result.Outcome {
		case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed:
			s.settled(key, result)
			return nil
		case idempotency.OutcomeInProgress, idempotency.OutcomeNotExecuted:
			runtime.Gosched()
		default:
			return fmt.Errorf("key %s ended as %s: %w", key, result.Outcome, result.Err)
		}
	}
	return errors.New("no answer in time")
}
