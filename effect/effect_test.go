package effect_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/storage/postgres"
)

// once returns a function that ends its goroutine the first time, as the death of the process
// would: nothing of the request goes on.
func once() func() {
	var died atomic.Bool
	return func() {
		if !died.Swap(true) {
			runtime.Goexit()
		}
	}
}

func withLookup(p *processor, e *effect.Effect[card, charge]) { e.Lookup = p.lookup }

func TestOneCallOnePosting(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.wantPaid(t, s.request(), 900)
	if result := s.request(); result.Outcome != idempotency.OutcomeReplayed || string(result.Answer.Body) != "ch_1" {
		t.Errorf("the retry: %+v", result)
	}
	s.wantSent(t, 1)
}

func TestDeathBeforeTheSendIsMadeGoodOnce(t *testing.T) {
	t.Parallel()
	die := once()
	s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		e.Do = func(ctx context.Context, key string, in card) (charge, error) {
			die()
			return p.do(ctx, key, in)
		}
	})
	if result := s.request(); result.Reason != "died" {
		t.Fatalf("%+v", result)
	}
	if result := s.request(); result.Outcome != idempotency.OutcomeInProgress {
		t.Errorf("within the lease of the dead: %+v", result)
	}
	s.wantPaid(t, s.resume(t), 900)
	s.wantSent(t, 1)
}

// The process dies after the charge, and the price changes before the next run: the posted amount
// is the charged one.
func TestDeathAfterTheChargeChargesOnceAndPostsTheSame(t *testing.T) {
	t.Parallel()
	die := once()
	s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		e.Do = func(ctx context.Context, key string, in card) (charge, error) {
			out, err := p.do(ctx, key, in)
			die()
			return out, err
		}
	})
	s.request()
	s.price = 1000
	s.wantPaid(t, s.resume(t), 900)
	s.wantSent(t, 2)
	for _, in := range s.requests {
		if in.Amount != 900 {
			t.Errorf("sent %+v", in)
		}
	}
	if end := s.ends.last(t); !end.Drift || !end.Resumed || !end.Sent || end.Result != idempotency.EffectResultDone {
		t.Errorf("traced: %+v", end)
	}
}

func TestDeathAfterTheResultAsksNobody(t *testing.T) {
	t.Parallel()
	s := newShop(t, withLookup)
	s.afterCall = once()
	s.request()
	s.wantPaid(t, s.resume(t), 900)
	if n := s.sent(t); n != 1 || s.lookups != 0 {
		t.Errorf("sent %d times, looked up %d times", n, s.lookups)
	}
	if end := s.ends.last(t); end.Sent || end.Result != idempotency.EffectResultDone {
		t.Errorf("traced: %+v", end)
	}
}

// The reply to the COMMIT of the result is lost: the result is found, or the call is sent again
// with the same key.
func TestLostReplyToTheResultIsNoFailure(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault pgfault.Kind
		sent  int
	}{"committed": {pgfault.CutAfter, 1}, "not committed": {pgfault.CutBefore, 2}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			var cut atomic.Bool
			store := s.through(t, func(commit pgfault.Commit) pgfault.Fault {
				if !bytes.Contains(commit.Messages, []byte("ch_1")) || cut.Swap(true) {
					return pgfault.Fault{}
				}
				return pgfault.Fault{Kind: c.fault}
			})
			s.serve(store, idempotency.Timeouts{})
			s.wantOpen(t, s.request())
			s.wantPaid(t, s.resume(t), 900)
			if n := s.sent(t); n != c.sent {
				t.Errorf("sent %d times, want %d", n, c.sent)
			}
		})
	}
}

// through returns a store on the shop's database, with connections through a proxy.
func (s *shop) through(t *testing.T, onCommit func(pgfault.Commit) pgfault.Fault) *postgres.Store {
	t.Helper()
	config, err := pgconn.ParseConfig(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: onCommit})
	if err != nil {
		t.Fatal(err)
	}
	store, err := postgres.Open(t.Context(), proxy.URL(s.URL), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		store.Close()
		_ = proxy.Close()
	})
	return store
}

func TestLostReplyIsAskedForAgainWithTheSameKey(t *testing.T) {
	t.Parallel()
	for name, behavior := range map[string]behavior{
		"hung up": loses, "half an answer": cutsOff, "504": times504, "nothing applied": forgets,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			s.does(behavior)
			result := s.request()
			s.wantOpen(t, result)
			if result.Err == nil || !strings.Contains(result.Err.Error(), "its result is not known") { // for the operator's log
				t.Errorf("the error is %v", result.Err)
			}
			s.wantPaid(t, s.resume(t), 900)
			s.wantSent(t, 2)
		})
	}
}

// The first request is still under way when its retry is declined, and the processor doesn't keep a
// no: it may still apply the first.
func TestDeclineOfARetryIsNotFinal(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.Timeout = 200 * time.Millisecond })
	s.does(stalls, refuses, refuses)
	s.wantOpen(t, s.request())
	<-s.received
	s.wantOpen(t, s.resume(t)) // 402
	// The decline must not count as a doubtful send of its own: the first one's age decides.
	if n := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE doubt_at IS NULL AND state = 1"); n != 1 {
		t.Error("the decline was taken for a doubtful send")
	}
	s.older(t, 50*time.Second)
	s.wantOpen(t, s.resume(t)) // 402 again
	s.release <- struct{}{}
	for len(s.charged()) == 0 {
		time.Sleep(time.Millisecond)
	}
	s.wantPaid(t, s.resume(t), 900)
}

// The transport of net/http repeats a request with a key by itself if a connection that it used
// before breaks. The first of the two is still under way when the second is declined.
func TestDeclineOfARequestThatNetHTTPRepeatedIsNotFinal(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(p *processor, _ *effect.Effect[card, charge]) {
		p.client = &http.Client{Transport: &http.Transport{}}
	})
	warm, err := s.do(t.Context(), "warm", card{"tok", 1})
	if err != nil || warm.ID == "" {
		t.Fatal(warm, err)
	}
	s.does(stalls, refuses)
	s.cutsTheNext()
	result := s.request()
	s.mu.Lock()
	requests := len(s.requests) - 1
	s.mu.Unlock()
	if requests != 2 {
		t.Skipf("%d requests: this net/http does not repeat them", requests)
	}
	s.wantOpen(t, result)
	s.arrives()
	if result := s.resume(t); result.Answer == nil || result.Answer.Status != 201 {
		t.Errorf("%+v", result)
	}
}

// As before, but in a run that comes long after the earlier sends: only its own first request is
// under way when the repeated one is declined, or answered not-executed.
func TestNoToARequestThatNetHTTPRepeatedMuchLaterIsNotFinal(t *testing.T) {
	t.Parallel()
	for name, no := range map[string]behavior{"declined": refuses, "not executed": refusesToRun} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, func(p *processor, _ *effect.Effect[card, charge]) {
				p.client = &http.Client{Transport: &http.Transport{}}
			})
			warm := func() {
				t.Helper()
				if warm, err := s.do(t.Context(), "warm", card{"tok", 1}); err != nil || warm.ID == "" {
					t.Fatal(warm, err)
				}
			}
			s.does(forgets)
			s.wantOpen(t, s.request())
			s.Exec(t, "UPDATE idempotency_effects SET sent_first_at = now() - interval '30 minutes'")
			warm()
			s.mu.Lock()
			before := len(s.requests)
			s.mu.Unlock()
			s.does(stalls, no)
			s.cutsTheNext()
			result := s.resume(t)
			s.mu.Lock()
			requests := len(s.requests) - before
			s.mu.Unlock()
			if requests != 2 {
				t.Skipf("%d requests: this net/http does not repeat them", requests)
			}
			s.wantOpen(t, result)
			s.does(refuses)
			s.wantOpen(t, s.resume(t)) // the first request is still under way
			s.arrives()
			if result := s.resume(t); result.Answer == nil || result.Answer.Status != 201 {
				t.Errorf("%+v", result)
			}
		})
	}
}

func TestDeclineCountsWhenNoEarlierSendIsUnderWay(t *testing.T) {
	t.Parallel()
	const timeout = 10 * time.Second
	const commit = 5 * time.Second
	const lease = timeout + commit + 5*time.Second // and a margin
	for name, c := range map[string]struct {
		keeps    bool
		age      time.Duration
		doubtAge time.Duration // 0: no doubt
		final    bool
	}{
		"it is the first":        {final: true},
		"too early":              {age: time.Minute + lease/2 + timeout - 5*time.Second},
		"late enough":            {age: time.Minute + lease/2 + timeout + commit, final: true},
		"too early, and is kept": {keeps: true, age: time.Second, final: true},
		"old, with a new doubt":  {age: time.Hour / 2, doubtAge: time.Minute},
		"with an old doubt":      {age: time.Hour / 2, doubtAge: 10 * time.Minute, final: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
				e.Timeout, e.KeepsDeclines, p.keepsNo = timeout, c.keeps, c.keeps
			})
			s.alwaysDoes(refuses)
			var result idempotency.Result
			if c.age == 0 {
				result = s.request()
			} else {
				s.does(forgets)
				s.wantOpen(t, s.request())
				s.Exec(t, "UPDATE idempotency_effects SET sent_first_at = now() - $1::interval", c.age.String())
				if c.doubtAge > 0 {
					s.Exec(t, "UPDATE idempotency_effects SET doubt_at = now() - $1::interval", c.doubtAge.String())
				}
				result = s.resume(t)
			}
			if !c.final {
				s.wantOpen(t, result)
				return
			}
			if result.Answer == nil || result.Answer.Status != 402 {
				t.Errorf("%+v", result)
			}
			if state := s.Count(t, "SELECT state FROM idempotency_effects"); state != int(idempotency.EffectDeclined) {
				t.Errorf("state %d", state)
			}
		})
	}
}

// The earlier send was made by a program with a longer Timeout and a shorter Timeouts.Commit. Its
// lease is their sum and does not show the parts, so a send is taken to last for the whole sum.
func TestDeclineIsNotFinalWhileASendOfAnotherDeploymentMayBeUnderWay(t *testing.T) {
	t.Parallel()
	const timeout, commit = time.Minute, time.Second
	const lease = timeout + commit + 5*time.Second
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.Timeout = 10 * time.Second })
	s.does(forgets)
	s.alwaysDoes(refuses)
	s.wantOpen(t, s.request())
	s.Exec(t, "UPDATE idempotency_open SET lease_ms = $1", lease.Milliseconds())
	s.Exec(t, "UPDATE idempotency_effects SET sent_first_at = now() - $1::interval", (time.Minute + lease/2 + timeout - 2*time.Second).String())
	s.wantOpen(t, s.resume(t))
}

// A retry whose handler fails before its call looks at the table before it answers. If the record
// is there and can't be read, the request may have been executed.
func TestFailureBeforeTheCallDoesNotHideARecordThatCanNotBeRead(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.wantPaid(t, s.request(), 900)
	s.Exec(t, `UPDATE idempotency_keys SET headers = '\xff'`)
	for name, handle := range map[string]func(context.Context) (*idempotency.Answer, error){
		"an answer that is not recorded": func(context.Context) (*idempotency.Answer, error) { return &idempotency.Answer{Status: 503}, nil },
		"an error":                       func(context.Context) (*idempotency.Answer, error) { return nil, errors.New("no connection") },
		"a refusal": func(context.Context) (*idempotency.Answer, error) {
			return nil, &idempotency.Refusal{Reason: "quota-exceeded"}
		},
		"its transaction does not begin": func(ctx context.Context) (*idempotency.Answer, error) {
			_, err := postgres.Tx(ctx).Exec(ctx, "SELECT 1")
			return nil, err
		},
		"a phase does not begin": func(ctx context.Context) (*idempotency.Answer, error) {
			_, err := postgres.Phase(ctx, "hold", func(pgx.Tx) (int, error) { return 1, nil })
			return nil, err
		},
	} {
		s.serve(postgres.New(s.Pool, nil), idempotency.Timeouts{}) // another process, which does not know the key
		s.handle = handle
		if result := s.request(); result.Outcome != idempotency.OutcomeUnknown {
			t.Errorf("%s: outcome %q, reason %q: %v", name, result.Outcome, result.Reason, result.Err)
		}
	}
}

// The processor repeats a 500 under the key for ever: the look-up finds the charge. Without a
// look-up there is neither an endless loop nor a new key: when the key's lifetime ends, the request
// is left to a person.
func TestSameErrorForEverIsLookedUp(t *testing.T) {
	t.Parallel()
	s := newShop(t, withLookup)
	s.alwaysDoes(panics500)
	s.wantOpen(t, s.request())
	s.wantPaid(t, s.resume(t), 900)
	s.wantSent(t, 1)

	blind := newShop(t, nil)
	blind.alwaysDoes(panics500)
	blind.wantOpen(t, blind.request())
	blind.wantOpen(t, blind.resume(t))
	blind.older(t, time.Hour)
	blind.wantParked(t, blind.resume(t), "may have forgotten its key")
	if n := blind.sent(t); n != 2 {
		t.Errorf("sent %d times", n)
	}
}

func TestNothingIsSentAfterTheKeysLifetime(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		age    time.Duration
		doubt  bool
		lookup func(p *processor) func(context.Context, string, card) (charge, error)
		lags   bool
		sent   int
		parked bool
		open   bool
	}{
		"before its end, without a look-up": {age: 53 * time.Minute, sent: 2},
		"after nine tenths":                 {age: 54 * time.Minute, sent: 1, parked: true},
		"sent again a minute ago":           {age: 54 * time.Minute, doubt: true, sent: 1, parked: true},
		"found":                             {age: 25 * time.Hour / 2, sent: 1, lookup: func(p *processor) func(context.Context, string, card) (charge, error) { return p.lookup }},
		"not found":                         {age: 54 * time.Minute, sent: 1, parked: true, lags: true, lookup: func(p *processor) func(context.Context, string, card) (charge, error) { return p.lookup }},
		"the look-up fails": {age: 54 * time.Minute, sent: 1, open: true, lookup: func(*processor) func(context.Context, string, card) (charge, error) {
			return func(context.Context, string, card) (out charge, err error) { return out, errors.New("no answer") }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
				if c.lookup != nil {
					e.Lookup = c.lookup(p)
				}
			})
			s.lags = c.lags
			s.does(loses)
			s.wantOpen(t, s.request())
			s.older(t, c.age)
			if c.doubt {
				s.Exec(t, "UPDATE idempotency_effects SET doubt_at = now() - interval '1 minute'")
			}
			switch result := s.resume(t); {
			case c.parked:
				words := "may have forgotten its key, and it was not found"
				if c.lookup == nil {
					words = "may have forgotten its key, and there is no look-up"
				}
				s.wantParked(t, result, words)
				if n := s.Count(t, "SELECT tries FROM idempotency_effects"); n != c.sent {
					t.Errorf("%d tries, and it was sent %d times", n, c.sent)
				}
				if n := s.Count(t, "SELECT count(*) FROM idempotency_open WHERE next_at <= clock_timestamp()"); n != 1 {
					t.Error("the time of a parked request is not that of parking it")
				}
			case c.open:
				s.wantOpen(t, result)
			default:
				s.wantPaid(t, result, 900)
			}
			if n := s.sent(t); n != c.sent {
				t.Errorf("sent %d times, want %d", n, c.sent)
			}
		})
	}
}

func TestAbsenceSettlesNothing(t *testing.T) {
	t.Parallel()
	s := newShop(t, withLookup)
	s.lags = true
	s.does(loses)
	s.wantOpen(t, s.request())
	s.wantPaid(t, s.resume(t), 900) // sent again: the processor knows the key
	if n := s.sent(t); n != 2 || s.lookups != 1 {
		t.Errorf("sent %d times, looked up %d times", n, s.lookups)
	}
}

// An owner gets its result after another one has taken the request over and ended it.
func TestResultOfAReplacedOwnerIsRefused(t *testing.T) {
	t.Parallel()
	slow := newGate()
	s := newShop(t, sending(func(send int64, do func() (charge, error)) (charge, error) {
		if send == 1 {
			slow.pass()
			return charge{}, effect.Declined(errors.New("an old no"), nil)
		}
		return do()
	}))
	first := later(s.request)
	slow.reached(t)
	s.wantPaid(t, s.resume(t), 900)
	slow.open()
	wantNoAnswer(t, <-first)
	if end := s.ends.last(t); end.Result != idempotency.EffectResultFenced {
		t.Errorf("traced: %+v", end)
	}
	if result := s.request(); result.Outcome != idempotency.OutcomeReplayed || result.Answer.Status != 201 {
		t.Errorf("a retry: %+v", result)
	}
}

// An owner that sleeps until somebody else may have taken the request over does not send, wherever
// it slept.
func TestSleeperDoesNotSend(t *testing.T) {
	t.Parallel()
	const sleep = 3 * time.Second // over half of the lease: 100 ms, 100 ms and a margin of 5 s
	timeouts := idempotency.Timeouts{Commit: 100 * time.Millisecond}
	t.Run("between the take-over and the send", func(t *testing.T) {
		t.Parallel()
		s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
			e.Timeout = 100 * time.Millisecond
			e.Lookup = func(context.Context, string, card) (out charge, err error) {
				time.Sleep(sleep)
				return out, effect.ErrAbsent
			}
		})
		s.serve(s.Store, timeouts)
		s.does(forgets)
		s.wantOpen(t, s.request())
		s.wantOpen(t, s.resume(t))
		s.wantSent(t, 1)
		if end := s.ends.last(t); end.Sent || end.Result != idempotency.EffectResultNotSent {
			t.Errorf("traced: %+v", end)
		}
	})
	t.Run("before the reply to the take-over", func(t *testing.T) {
		t.Parallel()
		s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.Timeout = 100 * time.Millisecond })
		s.serve(sleepyStore{s.Store, sleep}, timeouts)
		s.does(forgets)
		s.wantOpen(t, s.request())
		s.wantOpen(t, s.resume(t))
		s.wantSent(t, 1)
	})
}

// sleepyStore is a store with late replies to a take-over.
type sleepyStore struct {
	idempotency.Keeper
	sleep time.Duration
}

func (s sleepyStore) TakeOver(ctx context.Context, claim *idempotency.Claim) (idempotency.OpenAttempt, *idempotency.Open, error) {
	attempt, open, err := s.Keeper.TakeOver(ctx, claim)
	time.Sleep(s.sleep)
	return attempt, open, err
}

// All of the database's connections end while the completer runs the request: the next look goes
// on.
func TestLostConnectionsDuringACompletion(t *testing.T) {
	t.Parallel()
	var s *shop
	var kills atomic.Int64
	s = newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		e.Do = func(ctx context.Context, key string, in card) (charge, error) {
			if kills.Add(1) == 2 {
				s.Exec(t, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
			}
			return p.do(ctx, key, in)
		}
	})
	posts := 0
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := s.charge.Call(ctx, card{"tok", s.price})
		if err != nil {
			return nil, err
		}
		posts++
		if posts == 1 {
			if _, err := postgres.Tx(ctx).Exec(ctx, "SELECT pg_terminate_backend(pg_backend_pid())"); err == nil {
				t.Error("the backend lives")
			}
		}
		return s.post(ctx, paid)
	}
	s.does(loses)
	s.wantOpen(t, s.request())
	completer := idempotency.NewCompleter(s.Engine, nil)
	for deadline := time.Now().Add(20 * time.Second); s.Count(t, "SELECT count(*) FROM idempotency_open") > 0; {
		s.due(t)
		if _, err := completer.Once(t.Context()); err != nil {
			t.Log(err)
		}
		if time.Now().After(deadline) {
			t.Fatal("not completed")
		}
	}
	s.wantPaid(t, s.request(), 900)
	if n := s.sent(t); n != 2 || posts != 2 {
		t.Errorf("sent %d times, posted in %d runs", n, posts)
	}
}

// A later version of the handler does not ask for an effect that was made.
func TestRunThatDoesNotAskForAnEffectIsParked(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.afterCall = once()
	s.request()
	s.handle = func(context.Context) (*idempotency.Answer, error) { return &idempotency.Answer{Status: 201}, nil }
	s.wantParked(t, s.resume(t), "did not ask for effect charge")
}

// Steps are found by name: one that is new, or comes in another order, changes nothing.
func TestStepsAreFoundByName(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	other := effect.New("fee", effect.Effect[string, string]{Do: func(_ context.Context, key, in string) (string, error) { return in + key, nil }})
	s.afterCall = once()
	s.request()
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := other.Call(ctx, "fee of "); err != nil {
			return nil, err
		}
		return s.topUp(ctx)
	}
	s.wantPaid(t, s.resume(t), 900)
	s.wantSent(t, 1)
}

// The handler refuses after the charge.
func (s *shop) refuseAfter(refund *effect.Declared[charge, string]) func(ctx context.Context) (*idempotency.Answer, error) {
	return func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := s.charge.Call(ctx, card{"tok", s.price})
		if err != nil {
			return nil, err
		}
		if refund != nil {
			if _, err := refund.Undo(ctx, s.charge, paid); err != nil && !errors.Is(err, effect.ErrDeclined) {
				return nil, err
			}
		}
		return &idempotency.Answer{Status: 409}, nil
	}
}

func TestRefusalAfterAChargeIsParked(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.handle = s.refuseAfter(nil)
	s.wantParked(t, s.request(), "effect charge was made and not undone")
}

func TestUndoIsNeitherLostNorMadeTwice(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	keys := map[string]int{}
	die := once()
	refund := effect.New("refund", effect.Effect[charge, string]{Do: func(_ context.Context, key string, in charge) (string, error) {
		keys[key] += in.Amount
		if keys[key] == in.Amount {
			return "", errors.New("no answer")
		}
		die()
		return "refunded", nil
	}})
	s.handle = s.refuseAfter(refund)
	s.wantOpen(t, s.request()) // no answer
	if result := s.resume(t); result.Reason != "died" {
		t.Errorf("%+v", result)
	}
	result := s.resume(t)
	if result.Answer == nil || result.Answer.Status != 409 {
		t.Errorf("%+v", result)
	}
	if len(keys) != 1 || s.sent(t) != 1 {
		t.Errorf("refunds by key: %v, charges sent: %d", keys, s.sent(t))
	}
	if n := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE name = 'undo/charge' AND kind = 3 AND state = 2"); n != 1 {
		t.Errorf("%d recorded", n)
	}
}

func TestRefusalAfterAnUndoThatWasDeclinedIsParked(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.handle = s.refuseAfter(effect.New("refund", effect.Effect[charge, string]{Do: func(context.Context, string, charge) (string, error) {
		return "", effect.Declined(errors.New("too late"), nil)
	}}))
	s.wantParked(t, s.request(), "effect charge was made and not undone")
}

func TestAtMostOnceIsNeverSentAgain(t *testing.T) {
	t.Parallel()
	once := func(set func(p *processor, e *effect.Effect[card, charge])) func(p *processor, e *effect.Effect[card, charge]) {
		return func(p *processor, e *effect.Effect[card, charge]) {
			e.AtMostOnce = true
			if set != nil {
				set(p, e)
			}
		}
	}
	dies := func(p *processor, e *effect.Effect[card, charge]) {
		die := e.Do
		e.Do = func(ctx context.Context, key string, in card) (charge, error) {
			_, _ = die(ctx, key, in)
			runtime.Goexit()
			return charge{}, nil
		}
	}
	for name, c := range map[string]struct {
		set    func(p *processor, e *effect.Effect[card, charge])
		does   behavior
		status int // 0: parked
		runs   int
		sent   int
	}{
		"no answer":             {does: loses, status: 202, runs: 1, sent: 1},
		"dies":                  {set: dies, status: 202, runs: 2, sent: 1},
		"dies, money":           {set: func(p *processor, e *effect.Effect[card, charge]) { dies(p, e); e.MaybeParks = true }, runs: 2, sent: 1},
		"no answer, money":      {set: func(_ *processor, e *effect.Effect[card, charge]) { e.MaybeParks = true }, does: loses, runs: 1, sent: 1},
		"no answer, is found":   {set: withLookup, does: loses, status: 201, runs: 2, sent: 1},
		"never arrived, absent": {set: withLookup, does: forgets, status: 202, runs: 3, sent: 1},
		"declined":              {does: refuses, status: 402, runs: 1, sent: 1},
		"could not be sent": {set: func(p *processor, e *effect.Effect[card, charge]) {
			e.Do = func(context.Context, string, card) (out charge, err error) {
				return out, effect.NotSent(errors.New("no route"))
			}
		}, status: 402, runs: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, once(c.set))
			s.does(c.does)
			result := s.request()
			for runs := 1; runs < c.runs; runs++ {
				if result.Outcome == idempotency.OutcomeExecuted {
					t.Fatalf("ended after run %d: %+v", runs, result)
				}
				if runs == 2 {
					s.older(t, 2*time.Minute)
				}
				result = s.resume(t)
			}
			if c.status == 0 {
				s.wantParked(t, result, "never sent twice")
			} else if result.Answer == nil || result.Answer.Status != c.status {
				t.Errorf("%+v", result)
			}
			if n := s.sent(t); n != c.sent {
				t.Errorf("sent %d times, want %d", n, c.sent)
			}
		})
	}
}

func TestMaybeIsRecorded(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.AtMostOnce = true })
	s.does(loses)
	s.afterCall = once()
	s.request()
	if result := s.resume(t); result.Answer == nil || result.Answer.Status != 202 {
		t.Errorf("%+v", result)
	}
	if state := s.Count(t, "SELECT state FROM idempotency_effects"); state != int(idempotency.EffectMaybe) || s.sent(t) != 1 {
		t.Errorf("state %d, sent %d times", state, s.sent(t))
	}
}

func TestDeclinesDetailIsReplayed(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	var seen []string
	die := once()
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := s.charge.Call(ctx, card{"tok", s.price})
		var declined *effect.DeclinedError
		if !errors.As(err, &declined) {
			return nil, err
		}
		seen = append(seen, string(declined.Detail)+" "+err.Error())
		die()
		return &idempotency.Answer{Status: 402}, nil
	}
	s.alwaysDoes(refuses)
	s.request()
	if result := s.resume(t); result.Answer == nil || result.Answer.Status != 402 {
		t.Errorf("%+v", result)
	}
	want := `{"status":402,"body":"{\"code\":\"no_funds\"}"} effect charge: declined`
	if len(seen) != 2 || seen[0] != want || seen[1] != want {
		t.Errorf("seen %q, want twice %q", seen, want)
	}
	s.wantSent(t, 1)
}

// A processor that gives no results is spared: only one call at a time is made.
func TestBreakerLetsOneCallAtATimeTry(t *testing.T) {
	t.Parallel()
	const requests = 14
	var sent atomic.Int64
	var up atomic.Bool
	began, release := make(chan struct{}), make(chan struct{})
	meet := func() {}
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.Do = func(_ context.Context, key string, in card) (charge, error) {
			meet()
			n := sent.Add(1)
			if n == 11 { // the probe
				close(began)
				<-release
			}
			if !up.Load() {
				return charge{}, errors.New("no answer")
			}
			return charge{key, in.Amount}, nil
		}
	})
	request := func(n int) idempotency.Result {
		other := *s
		other.key.Value = fmt.Sprint("key-", n)
		return other.request()
	}
	for n := range 10 {
		request(n)
	}
	var probe sync.WaitGroup
	probe.Go(func() { request(10) })
	<-began
	for n := 11; n < requests; n++ {
		if result := request(n); !result.Accepted {
			t.Errorf("%+v", result)
		}
		if end := s.ends.last(t); end.Sent || end.Result != idempotency.EffectResultNotSent {
			t.Errorf("traced: %+v", end)
		}
	}
	if n := sent.Load(); n != 11 {
		t.Errorf("sent %d times, want 10 and a probe", n)
	}
	close(release)
	probe.Wait()
	up.Store(true)
	for n := range requests {
		s.due(t)
		if result := request(n); result.Answer == nil || result.Answer.Status != 201 {
			t.Errorf("%+v", result)
		}
	}
	if n := sent.Load(); n != 11+requests {
		t.Errorf("sent %d times", n)
	}
	// It gives results again: two at once are sent.
	var both, ended sync.WaitGroup
	both.Add(2)
	met := make(chan struct{})
	meet = func() {
		both.Done()
		select {
		case <-met:
		case <-time.After(10 * time.Second):
			t.Error("only one of two was sent")
		}
	}
	go func() { both.Wait(); close(met) }()
	for n := range 2 {
		ended.Go(func() { request(requests + n) })
	}
	ended.Wait()
}

func TestCallThatPanicsIsLeftToAPersonAfterFiveTries(t *testing.T) {
	t.Parallel()
	panics := 0
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.Do = func(context.Context, string, card) (charge, error) {
			panics++
			panic("a bug in the processor's library")
		}
	})
	s.wantOpen(t, s.request())
	for range effect.PanicsMax - 2 {
		s.wantOpen(t, s.resume(t))
	}
	s.wantParked(t, s.resume(t), "panicked 5 times")
	if panics != effect.PanicsMax {
		t.Errorf("%d tries", panics)
	}
}

func TestSendEndsWithItsTimeoutAndWithTheHandler(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ handler, want time.Duration }{
		"its timeout": {14 * time.Second, 10 * time.Second}, "the handler's": {5 * time.Second, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var left time.Duration
			s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
				do := e.Do
				e.Timeout = 0 // the default
				e.Do = func(ctx context.Context, key string, in card) (charge, error) {
					deadline, _ := ctx.Deadline()
					left = time.Until(deadline)
					return do(ctx, key, in)
				}
			})
			s.serve(s.Store, idempotency.Timeouts{Handler: c.handler})
			s.wantPaid(t, s.request(), 900)
			if left > c.want || left < c.want-3*time.Second {
				t.Errorf("%v were left, want %v", left, c.want)
			}
		})
	}
}

// While the processor is slow the request holds no connection.
func TestNoConnectionIsHeldDuringTheCall(t *testing.T) {
	t.Parallel()
	var s *shop
	var held []int
	look := func() {
		held = append(held, int(s.Pool.Stat().AcquiredConns()),
			s.Count(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"),
			s.Count(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"))
	}
	s = newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		e.Do = func(ctx context.Context, key string, in card) (charge, error) {
			look()
			_, _ = p.do(ctx, key, in)
			return charge{}, errors.New("no answer")
		}
	})
	s.request()
	s.resume(t)
	if fmt.Sprint(held) != "[0 0 0 0 0 0]" {
		t.Errorf("connections, transactions and locks in two calls: %v", held)
	}
}

// The handler returns while its call is under way in another goroutine: the result is recorded, no
// connection is left behind, and a later run ends the request.
func TestHandlerThatDoesNotWaitForItsCall(t *testing.T) {
	t.Parallel()
	release, ended := make(chan struct{}), make(chan error, 1)
	s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		do := e.Do
		e.Do = func(_ context.Context, key string, in card) (charge, error) {
			<-release
			return do(context.Background(), key, in)
		}
	})
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		go func() {
			_, err := s.charge.Call(ctx, card{"tok", s.price})
			ended <- err
		}()
		for s.Count(t, "SELECT count(*) FROM idempotency_open") == 0 {
			time.Sleep(time.Millisecond)
		}
		return &idempotency.Answer{Status: 201}, nil
	}
	s.wantOpen(t, s.request())
	close(release)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := s.Pool.Stat().AcquiredConns(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
	s.handle = nil
	s.wantPaid(t, s.resume(t), 900)
	s.wantSent(t, 1)
}

// A handler that loops sends nothing after a lapse: no record would show the doubt about that send.
func TestNothingIsSentAfterALapseInTheSameRun(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses, refuses)
	s.handle = func(ctx context.Context) (answer *idempotency.Answer, err error) {
		for range 3 {
			if answer, err = s.topUp(ctx); answer.Status != 200 {
				break
			}
		}
		return answer, err
	}
	s.wantOpen(t, s.request())
	s.wantSent(t, 1)
}

func TestLimitsOfInputAndOutput(t *testing.T) {
	t.Parallel()
	quoted := func(n int) string { return strings.Repeat("x", n-2) } // n bytes as JSON
	for name, c := range map[string]struct {
		in, out int
		reason  idempotency.Reason
		done    bool // it is recorded as done
	}{
		"input at its limit":    {in: effect.InputBytesMax, out: 2, done: true},
		"input over its limit":  {in: effect.InputBytesMax + 1, out: 2, reason: idempotency.ReasonHandlerFailed},
		"output at its limit":   {in: 2, out: effect.OutputBytesMax, done: true},
		"output over its limit": {in: 2, out: effect.OutputBytesMax + 1, reason: idempotency.ReasonNeedsAttention, done: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			sent := 0
			echo := effect.New("echo", effect.Effect[string, string]{Do: func(_ context.Context, _, in string) (string, error) {
				sent++
				return quoted(c.out), nil
			}})
			s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
				out, err := echo.Call(ctx, quoted(c.in))
				if err != nil {
					if c.in > effect.InputBytesMax && !errors.Is(err, effect.ErrInputTooLarge) {
						t.Error(err)
					}
					return &idempotency.Answer{Status: 200}, nil // dropped
				}
				return &idempotency.Answer{Status: 201, Body: fmt.Append(nil, len(out)+2)}, nil
			}
			result := s.request()
			if result.Reason != c.reason {
				t.Errorf("reason %q, want %q: %v", result.Reason, c.reason, result.Err)
			}
			if c.reason == "" && string(result.Answer.Body) != fmt.Sprint(c.out) {
				t.Errorf("output of %s bytes", result.Answer.Body)
			}
			done := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE state = 2")
			if (done == 1) != c.done || (sent == 1) != c.done {
				t.Errorf("recorded as done: %d, sent: %d", done, sent)
			}
			if c.reason == idempotency.ReasonNeedsAttention { // a person lets it run again: still nothing is sent
				s.Exec(t, "UPDATE idempotency_open SET parked = NULL")
				s.wantParked(t, s.resume(t), "could not be recorded")
				if sent != 1 {
					t.Errorf("sent %d times", sent)
				}
			}
		})
	}
}

// Another version of the program must not send a part of the recorded input.
func TestInputThatDoesNotFitTheProgramIsNotSent(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	sent := 0
	narrow := effect.New("charge", effect.Effect[struct{ Token string }, charge]{
		Do: func(context.Context, string, struct{ Token string }) (charge, error) { sent++; return charge{}, nil },
	})
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := narrow.Call(ctx, struct{ Token string }{"tok"})
		return &idempotency.Answer{Status: 201}, err
	}
	s.wantOpen(t, s.resume(t))
	if sent != 0 {
		t.Error("it was sent")
	}
	s.handle = nil
	s.wantPaid(t, s.resume(t), 900)
}

// After a wiring mistake the handler's answer is never recorded, and nothing is sent.
func TestMistakesOfWiringArePanics(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		handle func(s *shop) func(ctx context.Context) (*idempotency.Answer, error)
		says   string
	}{
		"after the transaction was used": {func(s *shop) func(ctx context.Context) (*idempotency.Answer, error) {
			return func(ctx context.Context) (*idempotency.Answer, error) {
				if _, err := s.post(ctx, charge{}); err != nil {
					return nil, err
				}
				_, err := s.charge.Call(ctx, card{})
				return &idempotency.Answer{Status: 201}, err
			}
		}, "after the handler has used its transaction"},
		"another context": {func(s *shop) func(ctx context.Context) (*idempotency.Answer, error) {
			return func(context.Context) (*idempotency.Answer, error) {
				_, err := s.charge.Call(context.Background(), card{})
				return &idempotency.Answer{Status: 201}, err
			}
		}, "outside an idempotent handler"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			returned := false
			handle := c.handle(s)
			s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
				answer, err := handle(ctx)
				returned = true
				return answer, err
			}
			result := s.request()
			if returned {
				t.Error("Call returned")
			}
			if result.Reason != idempotency.ReasonHandlerFailed || result.Outcome != idempotency.OutcomeNotExecuted || !strings.Contains(fmt.Sprint(result.Err), c.says) {
				t.Errorf("%+v", result)
			}
			s.wantSent(t, 0)
		})
	}
}

// The second call of one name would get the result of the first.
func TestTwoInputsUnderOneNameAreRefused(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := s.charge.Call(ctx, card{"tok", 1}); err != nil {
			return nil, err
		}
		_, err := s.charge.Call(ctx, card{"tok", 2})
		return &idempotency.Answer{Status: 201}, err
	}
	result := s.request()
	if result.Outcome != idempotency.OutcomeUnknown || !strings.Contains(fmt.Sprint(result.Err), "with different inputs") {
		t.Errorf("%+v", result)
	}
	s.wantSent(t, 1)
}

func TestTwoCallsAtOnceAreNotRecorded(t *testing.T) {
	t.Parallel()
	slow := newGate()
	s := newShop(t, waitingToSend(1, slow))
	other := effect.New("other", effect.Effect[int, int]{Do: func(context.Context, string, int) (int, error) { return 0, nil }})
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		var calls sync.WaitGroup
		calls.Go(func() { _, _ = s.charge.Call(ctx, card{"tok", 1}) })
		<-slow.began
		if _, err := other.Call(ctx, 1); !errors.Is(err, idempotency.ErrEffectBusy) {
			t.Error(err)
		}
		slow.open()
		calls.Wait()
		return &idempotency.Answer{Status: 201}, nil // as if nothing had happened
	}
	s.wantOpen(t, s.request())
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	t.Parallel()
	do := func(context.Context, string, int) (int, error) { return 0, nil }
	for name, c := range map[string]struct {
		name string
		e    effect.Effect[int, int]
		says string // empty: it can work
	}{
		"defaults":           {"charge", effect.Effect[int, int]{Do: do}, ""},
		"longest name":       {strings.Repeat("x", effect.NameBytesMax), effect.Effect[int, int]{Do: do}, ""},
		"no name":            {"", effect.Effect[int, int]{Do: do}, "its name must be"},
		"name too long":      {strings.Repeat("x", effect.NameBytesMax+1), effect.Effect[int, int]{Do: do}, "its name must be"},
		"name with a space":  {"a b", effect.Effect[int, int]{Do: do}, "its name must be"},
		"name of an undo":    {"undo/charge", effect.Effect[int, int]{Do: do}, "undo/"},
		"nothing to do":      {"charge", effect.Effect[int, int]{}, "Do is required"},
		"negative":           {"charge", effect.Effect[int, int]{Do: do, Timeout: -1}, "negative"},
		"shortest lifetime":  {"charge", effect.Effect[int, int]{Do: do, KeyLifetime: 100 * time.Second}, ""},
		"lifetime too short": {"charge", effect.Effect[int, int]{Do: do, KeyLifetime: 99 * time.Second}, "ten times Timeout"},
		"parks what repeats": {"charge", effect.Effect[int, int]{Do: do, MaybeParks: true}, "AtMostOnce"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			defer func() {
				if said := recover(); (said == nil) != (c.says == "") || said != nil && !strings.Contains(fmt.Sprint(said), c.says) {
					t.Errorf("%v, want %q", said, c.says)
				}
			}()
			effect.New(c.name, c.e)
		})
	}
}
