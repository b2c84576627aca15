package effect_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
)

// Requests and their retries run at once. Owners die anywhere, replies are lost, declines are not
// kept, and requests are taken over while their owner still runs. When all is settled each 201 has
// one charge and one posting, and each 402 has neither.
func TestStormSettlesEveryRequestOnce(t *testing.T) {
	t.Parallel()
	const keys, clients = 24, 3
	die := func(percent int) {
		if rand.N(100) < percent {
			runtime.Goexit()
		}
	}
	s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		e.Timeout, e.Lookup, p.random = 500*time.Millisecond, p.lookup, true
		e.Do = func(ctx context.Context, key string, in card) (charge, error) {
			die(10)
			out, err := p.do(ctx, key, in)
			die(10)
			return out, err
		}
		e.SettleAfter = 300 * time.Millisecond // the processor answers at once
	})
	var mu sync.Mutex
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		die(5)
		key, _ := idempotency.KeyFrom(ctx)
		paid, err := s.charge.Call(ctx, card{key.Value, 900})
		die(10)
		switch {
		case errors.Is(err, effect.ErrDeclined):
			return &idempotency.Answer{Status: 402}, nil
		case err != nil:
			return nil, err
		}
		return s.post(ctx, paid)
	}
	ctx, stop := context.WithTimeout(t.Context(), 60*time.Second)
	defer stop()
	var storm, clock sync.WaitGroup
	clock.Go(func() { // leases and pauses end early
		for ctx.Err() == nil {
			time.Sleep(20 * time.Millisecond)
			_, _ = s.Pool.Exec(ctx, "UPDATE idempotency_open SET next_at = now() WHERE parked IS NULL AND random() < 0.3")
		}
	})
	answers := map[string]map[int]int{} // statuses, by key
	for k := range keys {
		key := idempotency.Key{Scope: "acme", Value: fmt.Sprint("key-", k)}
		answers[key.Value] = map[int]int{}
		for range clients {
			storm.Go(func() {
				client := *s
				client.key = key
				for ctx.Err() == nil {
					result := client.request()
					if result.Outcome == idempotency.OutcomeNotExecuted && result.Accepted {
						t.Errorf("not-executed and accepted: %+v", result)
					}
					if result.Outcome == idempotency.OutcomeExecuted || result.Outcome == idempotency.OutcomeReplayed {
						mu.Lock()
						answers[key.Value][result.Answer.Status]++
						mu.Unlock()
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				t.Errorf("%s is not settled", key.Value)
			})
		}
	}
	storm.Wait()
	stop()
	clock.Wait()
	if n := s.Count(t, "SELECT count(*) FROM idempotency_open"); n != 0 {
		t.Errorf("%d requests are open: %q", n, s.Strings(t, "SELECT COALESCE(parked, last_reason, 'running') FROM idempotency_open"))
	}
	paid := 0
	for key, statuses := range answers {
		derived := s.Text(t, "SELECT derived_key::text FROM idempotency_effects WHERE key = $1", key)
		s.mu.Lock()
		charged := s.charges[derived]
		s.mu.Unlock()
		switch {
		case len(statuses) == 1 && statuses[201] == clients && charged == 900:
			paid++
		case len(statuses) == 1 && statuses[402] == clients && charged == 0:
		default:
			t.Errorf("%s: answers %v, charged %d", key, statuses, charged)
		}
	}
	if n := s.Effects(t); n != paid || len(s.charges) != paid {
		t.Errorf("%d postings and %d charges for %d payments", n, len(s.charges), paid)
	}
	t.Logf("%d paid, %d requests to the processor", paid, len(s.requests))
}
