package effect_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// Directed schedules of several owners of one request: which is slow, which takes over, and which
// result counts. Random runs meet them rarely.

// gate makes a processor's answer wait until the test lets it through.
type gate struct{ began, release chan struct{} }

func newGate() gate { return gate{make(chan struct{}), make(chan struct{})} }

func (g gate) pass() {
	close(g.began)
	<-g.release
}

// open lets the one that waits through.
func (g gate) open() { close(g.release) }

// reached returns when somebody waits at the gate.
func (g gate) reached(t *testing.T) {
	t.Helper()
	select {
	case <-g.began:
	case <-time.After(time.Minute):
		g.open()
		t.Fatal("nobody came to the gate")
	}
}

// later makes the request in a goroutine of its own.
func later(do func() idempotency.Result) <-chan idempotency.Result {
	result := make(chan idempotency.Result, 1)
	go func() { result <- do() }()
	return result
}

// resumeLater runs the request again, as the completer would, in a goroutine of its own.
func (s *shop) resumeLater(t *testing.T) <-chan idempotency.Result {
	t.Helper()
	s.due(t)
	return later(func() idempotency.Result { return s.Engine.Resume(context.Background(), s.key) })
}

// sending makes an effect send through the function send. That gets the number of the send, from 1,
// and calls do to reach the processor.
func sending(send func(n int64, do func() (charge, error)) (charge, error)) func(*processor, *effect.Effect[card, charge]) {
	return func(_ *processor, e *effect.Effect[card, charge]) {
		var sends atomic.Int64
		do := e.Do
		e.Do = func(ctx context.Context, key string, in card) (charge, error) {
			return send(sends.Add(1), func() (charge, error) { return do(ctx, key, in) })
		}
	}
}

// waitingToSend sets an effect whose n-th send waits at the gate before it reaches the processor.
func waitingToSend(n int64, g gate) func(*processor, *effect.Effect[card, charge]) {
	return sending(func(send int64, do func() (charge, error)) (charge, error) {
		if send == n {
			g.pass()
		}
		return do()
	})
}

// waitingWithReplies sets an effect whose first sends wait with their reply, each at its own gate.
func waitingWithReplies(gates ...gate) func(*processor, *effect.Effect[card, charge]) {
	return sending(func(send int64, do func() (charge, error)) (charge, error) {
		out, err := do()
		if send <= int64(len(gates)) {
			gates[send-1].pass()
		}
		return out, err
	})
}

// wantNoAnswer fails the test if a replaced owner has given its client an answer, or not-executed.
func wantNoAnswer(t *testing.T, result idempotency.Result) {
	t.Helper()
	if result.Outcome == idempotency.OutcomeExecuted || result.Outcome == idempotency.OutcomeNotExecuted {
		t.Errorf("an owner that was replaced: outcome %q, answer %v: %v", result.Outcome, result.Answer, result.Err)
	}
}

// wantOwned fails the test unless a retry and a resume are told that somebody runs the request.
func (s *shop) wantOwned(t *testing.T) {
	t.Helper()
	for name, result := range map[string]idempotency.Result{"a retry": s.request(), "a resume": s.Engine.Resume(context.Background(), s.key)} {
		if result.Outcome != idempotency.OutcomeInProgress || result.RetryAfter <= 0 {
			t.Errorf("%s: %+v", name, result)
		}
	}
}

// wantNotDue fails the test if the completer finds something to run.
func (s *shop) wantNotDue(t *testing.T) {
	t.Helper()
	if found, err := idempotency.NewCompleter(s.Engine, nil).Once(t.Context()); found != 0 || err != nil {
		t.Errorf("the completer found %d: %v", found, err)
	}
}

// The first owner gets a no and is slow to record it. The next one is charging meanwhile: the old
// no must not outweigh the charge.
func TestNoOfAReplacedOwnerIsRefusedWhileTheNextOneSends(t *testing.T) {
	t.Parallel()
	first, second := newGate(), newGate()
	s := newShop(t, waitingWithReplies(first, second))
	s.does(refuses)
	one := later(s.request)
	first.reached(t)
	two := s.resumeLater(t)
	second.reached(t)
	first.open()
	wantNoAnswer(t, <-one)
	if state := s.Count(t, "SELECT state FROM idempotency_effects"); state != int(idempotency.EffectIntended) {
		t.Errorf("state %d: the result of a replaced owner was recorded", state)
	}
	second.open()
	s.wantPaid(t, <-two, 900)
}

// A request is abandoned while an old owner still has it, and its key is used again: the new
// request is another one, although the keys for the processor are the same.
func TestOwnerOfAnAbandonedRequestIsRefused(t *testing.T) {
	t.Parallel()
	first, second := newGate(), newGate()
	s := newShop(t, waitingWithReplies(first, second))
	s.does(refuses)
	one := later(s.request)
	first.reached(t)
	s.abandon(t)
	two := later(s.request)
	second.reached(t)
	first.open()
	wantNoAnswer(t, <-one)
	second.open()
	s.wantPaid(t, <-two, 900)
}

// abandon removes the request, as an operator may.
func (s *shop) abandon(t *testing.T) {
	t.Helper()
	s.Exec(t, "DELETE FROM idempotency_open")
	s.Exec(t, "DELETE FROM idempotency_keys WHERE status = 0")
}

// A fail-over loses the commit of a take-over, and the next owner takes the request over from the
// same state: the two are different owners all the same.
func TestOwnerWhoseTakeOverWasLostIsRefused(t *testing.T) {
	t.Parallel()
	first, second := newGate(), newGate()
	s := newShop(t, waitingWithReplies(first, second))
	die := once()
	lost := effect.New("charge", effect.Effect[card, charge]{Do: func(context.Context, string, card) (charge, error) {
		die()
		return charge{}, errors.New("not reached")
	}})
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := lost.Call(ctx, card{"tok", s.price})
		return nil, err
	}
	s.request() // dies before its send
	s.handle = nil
	s.does(refuses)
	s.Exec(t, "UPDATE idempotency_effects SET sent_first_at = sent_first_at - interval '30 minutes'") // so a no is final
	s.Exec(t, "CREATE TABLE before AS SELECT o.epoch AS open, e.epoch AS effect FROM idempotency_open o, idempotency_effects e")
	one := s.resumeLater(t)
	first.reached(t)
	s.Exec(t, "UPDATE idempotency_open SET epoch = (SELECT open FROM before), runs = 1")
	s.Exec(t, "UPDATE idempotency_effects SET epoch = (SELECT effect FROM before), tries = 1, doubt_at = NULL")
	two := s.resumeLater(t)
	second.reached(t)
	first.open()
	wantNoAnswer(t, <-one)
	second.open()
	s.wantPaid(t, <-two, 900)
}

// The owner has the result, and is slow before its last transaction. The next one posts meanwhile.
func TestReplacedOwnerPostsNothing(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.afterCall = once()
	s.request() // the result is recorded
	slow := newGate()
	var runs atomic.Int64
	s.afterCall = func() {
		if runs.Add(1) == 1 {
			slow.pass()
		}
	}
	one := s.resumeLater(t)
	slow.reached(t)
	s.wantPaid(t, s.resume(t), 900)
	slow.open()
	wantNoAnswer(t, <-one)
	if n := s.Effects(t); n != 1 {
		t.Errorf("%d postings", n)
	}
}

// An owner in its last transaction keeps the request, however long that takes: nobody runs the
// handler beside it.
func TestOwnerInItsLastTransactionIsNotReplaced(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	slow := newGate()
	var runs atomic.Int64
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		n := runs.Add(1)
		paid, err := s.charge.Call(ctx, card{"tok", s.price})
		if err != nil {
			return nil, err
		}
		answer, err := s.post(ctx, paid)
		if n == 1 {
			slow.pass()
		}
		return answer, err
	}
	one := later(s.request)
	slow.reached(t)
	if result := s.Engine.Resume(context.Background(), s.key); result.Answer != nil || runs.Load() != 1 {
		t.Errorf("before its lease is over: %+v", result)
	}
	// The row is locked by the owner, so that the request could only be taken over by waiting, even
	// after its lease.
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := s.Pool.Exec(ctx, "UPDATE idempotency_open SET next_at = now()"); err == nil {
		t.Error("the row of the request is not locked")
	}
	slow.open()
	s.wantPaid(t, <-one, 900)
	if n := runs.Load(); n != 1 {
		t.Errorf("%d runs", n)
	}
}

// A request that comes while a call is under way that is sent once at most must not give the call
// up.
func TestCallThatIsSentOnceIsNotGivenUpWhileItIsUnderWay(t *testing.T) {
	t.Parallel()
	slow := newGate()
	s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		waitingWithReplies(slow)(p, e)
		e.AtMostOnce = true
	})
	one := later(s.request)
	slow.reached(t)
	s.wantOwned(t)
	s.wantNotDue(t)
	slow.open()
	s.wantPaid(t, <-one, 900)
	s.wantSent(t, 1)
}

// stagedStore is a store in which something happens between two steps of one request.
type stagedStore struct {
	idempotency.Keeper
	beforeTakeOver, afterTakeOver, afterReadOpen, beforeResolve func()
}

func (s stagedStore) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	if s.beforeResolve != nil {
		s.beforeResolve()
	}
	return s.Keeper.Resolve(ctx, claim)
}

func (s stagedStore) TakeOver(ctx context.Context, claim *idempotency.Claim) (idempotency.OpenAttempt, *idempotency.Open, error) {
	if s.beforeTakeOver != nil {
		s.beforeTakeOver()
	}
	attempt, open, err := s.Keeper.TakeOver(ctx, claim)
	if s.afterTakeOver != nil {
		s.afterTakeOver()
	}
	return attempt, open, err
}

func (s stagedStore) ReadOpen(ctx context.Context, key idempotency.Key) (*idempotency.Open, error) {
	open, err := s.Keeper.ReadOpen(ctx, key)
	if s.afterReadOpen != nil {
		s.afterReadOpen()
	}
	return open, err
}

// Between the look-up and the take-over somebody else ends the request: that is a replay.
func TestRequestThatEndsBeforeItsTakeOverIsReplayed(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	other := s.Engine
	s.serve(stagedStore{Keeper: s.Store, beforeTakeOver: func() {
		s.due(t)
		s.wantPaid(t, other.Resume(context.Background(), s.key), 900)
	}}, idempotency.Timeouts{})
	if result := s.request(); result.Outcome != idempotency.OutcomeReplayed || result.Answer == nil || result.Answer.Status != 201 {
		t.Errorf("%+v", result)
	}
}

// An operator abandons the request while the completer is on its way to it: it must not become a
// new request, which only a client may make.
func TestAbandonedRequestIsNotRunByTheCompleter(t *testing.T) {
	t.Parallel()
	for name, store := range map[string]func(s *shop) stagedStore{
		"before the claim": func(s *shop) stagedStore { return stagedStore{Keeper: s.Store, afterReadOpen: func() { s.abandon(t) }} },
		"before the take-over": func(s *shop) stagedStore {
			return stagedStore{Keeper: s.Store, beforeTakeOver: func() { s.abandon(t) }}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			s.does(loses)
			s.wantOpen(t, s.request())
			s.serve(store(s), idempotency.Timeouts{})
			if result := s.resume(t); !errors.Is(result.Err, idempotency.ErrNotOpen) || result.Outcome != idempotency.OutcomeUnknown {
				t.Errorf("%+v", result)
			}
			if n := s.sent(t); n != 1 || s.Effects(t) != 0 || s.Count(t, "SELECT count(*) FROM idempotency_keys") != 0 {
				t.Errorf("sent %d times, %d postings", n, s.Effects(t))
			}
		})
	}
}

// A later version of the route has other effects. Its handler must not run what an earlier version
// began: a call under another name would be another charge.
func TestRouteOfAnotherNameDoesNotTakeOver(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.afterCall = once()
	s.request()
	s.afterCall = nil
	s.due(t)
	renamed := effect.New("charge2", effect.Effect[card, charge]{Do: s.do})
	req := s.newRequest()
	req.Resumable = "topup/2"
	result := s.Engine.Do(t.Context(), req, func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := renamed.Call(ctx, card{"tok", s.price})
		if err != nil {
			return nil, err
		}
		return s.post(ctx, paid)
	})
	s.wantOpen(t, result)
	s.wantSent(t, 1)
	if open := s.Count(t, "SELECT count(*) FROM idempotency_open WHERE runs = 1"); open != 1 {
		t.Error("it was taken over")
	}
	s.wantPaid(t, s.resume(t), 900)
	if result := s.Engine.Do(t.Context(), req, s.run); result.Outcome != idempotency.OutcomeReplayed {
		t.Errorf("the later version, when it has ended: %+v", result)
	}
}

// A refusal tells the client that nothing was done. So it may not follow a call that was made, or
// may have been, even if the call is sent at most once.
func TestRefusalAfterACallThatIsSentOnceIsParked(t *testing.T) {
	t.Parallel()
	for name, does := range map[string]behavior{"done": answers, "maybe": loses} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.AtMostOnce = true })
			s.does(does)
			s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
				if _, err := s.charge.Call(ctx, card{"tok", s.price}); err != nil && !errors.Is(err, effect.ErrMaybe) {
					return nil, err
				}
				return &idempotency.Answer{Status: 409}, nil
			}
			s.wantParked(t, s.request(), "not undone")
		})
	}
}

// COMMIT of the last transaction is refused: the client does not get the answer, and another run
// posts.
func TestRefusedCommitAfterTheCallIsNeverNotExecuted(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.Exec(t, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
		CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`)
	s.wantOpen(t, s.request())
	s.Exec(t, "DROP TRIGGER refuse ON effects")
	s.wantPaid(t, s.resume(t), 900)
	s.wantSent(t, 1)
}

// The database fails while the completer looks for work: the next look goes on.
func TestCompleterOutlivesAFailedLook(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	var looks atomic.Int64
	s.serve(failingLooks{s.Store, &looks}, idempotency.Timeouts{})
	s.due(t)
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	results := make(chan idempotency.Result, 1)
	completer := idempotency.NewCompleter(s.Engine, &idempotency.CompleterOptions{
		Interval: 10 * time.Millisecond,
		OnResume: func(_ idempotency.Key, result idempotency.Result) { results <- result },
		Logger:   slog.New(slog.DiscardHandler),
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		completer.Run(ctx)
	}()
	select {
	case result := <-results:
		s.wantPaid(t, result, 900)
	case <-ended:
		t.Errorf("it stopped after %d looks", looks.Load())
	}
	stop()
	<-ended
}

// failingLooks is a store that fails the first looks for work.
type failingLooks struct {
	idempotency.Keeper
	looks *atomic.Int64
}

func (s failingLooks) FindDue(ctx context.Context, routes []string, max int) ([]idempotency.Key, error) {
	if s.looks.Add(1) < 3 {
		return nil, errors.New("the database is away")
	}
	return s.Keeper.FindDue(ctx, routes, max)
}

// A new version of the handler has a slow phase before a call that is in doubt. The time to send
// still counts from the take-over, because the next owner judges a no by that.
func TestPhaseDoesNotExtendTheTimeToSend(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.Timeout = 100 * time.Millisecond })
	s.serve(s.Store, idempotency.Timeouts{Commit: time.Second})
	s.does(forgets)
	s.wantOpen(t, s.request())
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := postgres.Phase(ctx, "check", func(pgx.Tx) (bool, error) {
			time.Sleep(3500 * time.Millisecond) // over half of the lease: 100 ms, 1 s and a margin of 5 s
			return true, nil
		}); err != nil {
			return nil, err
		}
		return s.topUp(ctx)
	}
	s.wantOpen(t, s.resume(t))
	s.wantSent(t, 1)
	if n := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE kind = 4"); n != 1 {
		t.Errorf("%d phases are recorded", n)
	}
	s.handle = nil
	s.wantParked(t, s.resume(t), "did not ask for effect check")
}

// The webhook of a send that was declined comes while another send of the same call is under way,
// at a processor that does not keep a no: it must not outweigh the charge.
func TestWebhookOfAnEarlierNoIsNotFinal(t *testing.T) {
	t.Parallel()
	for name, keeps := range map[string]bool{"it does not keep a no": false, "it keeps a no": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			slow := newGate()
			s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
				waitingToSend(2, slow)(p, e)
				e.KeepsDeclines = keeps
			})
			s.does(forgets)
			s.wantOpen(t, s.request())
			two := s.resumeLater(t)
			slow.reached(t)
			if err := s.webhook(t, false, "", nil); err != nil {
				t.Error(err)
			}
			state := s.Count(t, "SELECT state FROM idempotency_effects")
			if keeps { // then no later send can succeed
				s.alwaysDoes(refuses)
			}
			slow.open()
			if result := <-two; keeps {
				if state != int(idempotency.EffectDeclined) || result.Answer == nil || result.Answer.Status != 402 {
					t.Errorf("state %d, %+v", state, result)
				}
				return
			} else {
				s.wantPaid(t, result, 900)
			}
			if state != int(idempotency.EffectIntended) {
				t.Errorf("state %d", state)
			}
		})
	}
}

// A webhook says that the call was declined, and the call itself that it was made: money may have
// moved, so no answer is given.
func TestContradictionOfWebhookAndReplyIsParked(t *testing.T) {
	t.Parallel()
	slow := newGate()
	s := newShop(t, func(p *processor, e *effect.Effect[card, charge]) {
		waitingWithReplies(slow)(p, e)
		e.KeepsDeclines = true
	})
	one := later(s.request)
	slow.reached(t)
	if err := s.webhook(t, false, "", nil); err != nil {
		t.Error(err)
	}
	slow.open()
	s.wantParked(t, <-one, "it was made, and another result")
}

// Only a person can end a parked request, however long it has been due.
func TestParkedRequestIsRunByNobody(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.handle = s.refuseAfter(nil)
	s.wantParked(t, s.request(), "not undone")
	s.handle = nil
	s.due(t)
	for name, result := range map[string]idempotency.Result{"a retry": s.request(), "a resume": s.Engine.Resume(context.Background(), s.key)} {
		if result.Reason != idempotency.ReasonNeedsAttention || !result.Accepted {
			t.Errorf("%s: %+v", name, result)
		}
	}
	s.wantNotDue(t)
	if runs := s.Count(t, "SELECT runs FROM idempotency_open"); runs != 1 {
		t.Errorf("%d runs", runs)
	}
}

// inTheLastTransaction returns a shop whose owner is in its last transaction, past its lease, until
// slow is opened. The owner's result is sent to one.
func inTheLastTransaction(t *testing.T) (s *shop, slow gate, one <-chan idempotency.Result) {
	t.Helper()
	s = newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.Timeout = 100 * time.Millisecond })
	s.serve(s.Store, idempotency.Timeouts{Commit: 200 * time.Millisecond}) // and 5 s
	slow = newGate()
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := s.charge.Call(ctx, card{"tok", s.price})
		if err != nil {
			return nil, err
		}
		answer, err := s.post(ctx, paid)
		slow.pass()
		return answer, err
	}
	one = later(s.request)
	slow.reached(t)
	for s.Count(t, "SELECT count(*) FROM idempotency_open WHERE next_at > clock_timestamp()") > 0 {
		time.Sleep(20 * time.Millisecond)
	}
	return s, slow, one
}

// The lease of an owner in its last transaction runs out. A request that comes meanwhile is
// answered at once, and does not wait for the owner.
func TestRetryDoesNotWaitForAnOwnerInItsLastTransaction(t *testing.T) {
	t.Parallel()
	s, slow, one := inTheLastTransaction(t)
	two := later(func() idempotency.Result { return s.Engine.Resume(context.Background(), s.key) })
	select {
	case result := <-two:
		if result.Outcome != idempotency.OutcomeUnknown || !result.Accepted || result.Err != nil { // the error of a wait that was cut off
			t.Errorf("%+v", result)
		}
	case <-time.After(time.Minute):
		t.Error("it waits for the owner")
	}
	slow.open()
	s.wantPaid(t, <-one, 900)
}

// Each take-over counts as a send from the moment it is made: a no to the next one is not final.
func TestDeclineIsNotFinalAfterARepeatedSendWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(forgets, forgets, refuses)
	s.wantOpen(t, s.request())
	s.older(t, 30*time.Minute)
	s.wantOpen(t, s.resume(t))
	if n := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE doubt_at > sent_first_at AND tries = 2"); n != 1 {
		t.Error("the second send left no doubt")
	}
	s.wantOpen(t, s.resume(t)) // 402
	s.wantPaid(t, s.resume(t), 900)
}

// A take-over is as good as a first claim: within its lease others get in-progress, and nobody
// takes the request away. It changes nothing about a settled effect.
func TestOwnerByTakeOverHasItsLease(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.afterCall = once()
	s.request()
	settled := s.Text(t, "SELECT row(doubt_at, tries, epoch, settled_at)::text FROM idempotency_effects")
	slow := newGate()
	s.afterCall = slow.pass
	one := s.resumeLater(t)
	slow.reached(t)
	s.wantOwned(t)
	if runs := s.Count(t, "SELECT runs FROM idempotency_open"); runs != 2 {
		t.Errorf("%d runs", runs)
	}
	if now := s.Text(t, "SELECT row(doubt_at, tries, epoch, settled_at)::text FROM idempotency_effects"); now != settled {
		t.Errorf("the settled effect was %s and is %s", settled, now)
	}
	slow.open()
	s.wantPaid(t, <-one, 900)
}

// An owner that was replaced changes neither the next owner's lease nor the doubt by which a no is
// judged.
func TestReplacedOwnerChangesNothing(t *testing.T) {
	t.Parallel()
	first, second := newGate(), newGate()
	s := newShop(t, sending(func(send int64, do func() (charge, error)) (charge, error) {
		if send == 1 {
			first.pass()
			return charge{}, effect.NotSent(errors.New("no route"))
		}
		second.pass()
		return do()
	}))
	one := later(s.request)
	first.reached(t)
	two := s.resumeLater(t)
	second.reached(t)
	const rows = "SELECT row(o.next_at, o.owned, o.epoch, o.parked, o.last_reason, e.doubt_at, e.epoch, e.tries)::text FROM idempotency_open o, idempotency_effects e"
	before := s.Text(t, rows)
	first.open()
	wantNoAnswer(t, <-one)
	if after := s.Text(t, rows); after != before {
		t.Errorf("it was %s and is %s", before, after)
	}
	second.open()
	s.wantPaid(t, <-two, 900)
}

// An owner that was replaced between two calls does not make the second.
func TestReplacedOwnerMakesNoFurtherCall(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	var fees atomic.Int64
	fee := effect.New("fee", effect.Effect[int, int]{AtMostOnce: true, Do: func(context.Context, string, int) (int, error) {
		fees.Add(1)
		return 1, nil
	}})
	slow := [2]gate{newGate(), newGate()}
	var runs atomic.Int64
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := s.charge.Call(ctx, card{"tok", s.price})
		if err != nil {
			return nil, err
		}
		if n := runs.Add(1); n <= 2 {
			slow[n-1].pass()
		}
		if _, err := fee.Call(ctx, 1); err != nil {
			return nil, err
		}
		return s.post(ctx, paid)
	}
	die := once()
	handle := s.handle
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := s.charge.Call(ctx, card{"tok", s.price}); err != nil {
			return nil, err
		}
		die()
		return nil, errors.New("not reached")
	}
	s.request()
	s.handle = handle
	one := s.resumeLater(t)
	slow[0].reached(t)
	two := s.resumeLater(t)
	slow[1].reached(t)
	slow[0].open()
	wantNoAnswer(t, <-one)
	if n := fees.Load(); n != 0 {
		t.Errorf("it was sent %d times", n)
	}
	slow[1].open()
	s.wantPaid(t, <-two, 900)
	if n := fees.Load(); n != 1 {
		t.Errorf("sent %d times", n)
	}
}

// The doubt of a send that was not made is taken back before anybody else may take the request
// over.
func TestDoubtIsTakenBackBeforeTheRequestIsLeft(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(forgets)
	s.wantOpen(t, s.request())
	s.Exec(t, `CREATE TABLE seen (id serial, what text);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen (what) VALUES (TG_ARGV[0]); RETURN NULL; END $$;
		CREATE TRIGGER doubt AFTER UPDATE OF doubt_at ON idempotency_effects FOR EACH ROW WHEN (NEW.doubt_at IS NULL) EXECUTE FUNCTION see('doubt');
		CREATE TRIGGER leave AFTER UPDATE OF owned ON idempotency_open FOR EACH ROW WHEN (NOT NEW.owned) EXECUTE FUNCTION see('leave')`)
	s.does(refuses)
	s.wantOpen(t, s.resume(t))
	if got := s.Text(t, "SELECT string_agg(what, ', ' ORDER BY id) FROM seen"); got != "doubt, leave" {
		t.Errorf("seen: %s", got)
	}
	if n := s.Count(t, "SELECT tries FROM idempotency_effects"); n != 2 {
		t.Errorf("%d tries, want 2: each of them was sent", n)
	}
}

// The reply to the last COMMIT is lost: the answer is found if it was recorded, and never called
// not executed.
func TestLostReplyToTheLastCommit(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]pgfault.Kind{"committed": pgfault.CutAfter, "not committed": pgfault.CutBefore} {
		for _, status := range []int{201, 402} {
			t.Run(fmt.Sprint(name, " ", status), func(t *testing.T) {
				t.Parallel()
				s := newShop(t, nil)
				if status == 402 {
					s.alwaysDoes(refuses)
				}
				var cut atomic.Bool
				store := s.through(t, func(commit pgfault.Commit) pgfault.Fault {
					if !bytes.Contains(commit.Messages, []byte("DELETE FROM")) || cut.Swap(true) { // the end of the open request
						return pgfault.Fault{}
					}
					return pgfault.Fault{Kind: fault}
				})
				s.serve(store, idempotency.Timeouts{})
				result := s.request()
				switch {
				case fault == pgfault.CutBefore:
					s.wantOpen(t, result)
					result = s.resume(t)
				case result.Outcome != idempotency.OutcomeReplayed && result.Outcome != idempotency.OutcomeExecuted:
					t.Errorf("it is not found: %+v", result)
				}
				if status == 201 {
					s.wantPaid(t, result, 900)
				} else if result.Answer == nil || result.Answer.Status != 402 || len(s.charged()) != 0 {
					t.Errorf("%+v, charged %v", result, s.charged())
				}
				if n := s.sent(t); n != 1 || !cut.Load() {
					t.Errorf("sent %d times, cut: %v", n, cut.Load())
				}
			})
		}
	}
}

// The completer looks only for requests of its own routes, the one that has waited longest first.
func TestCompleterLooksForItsOwnAndTheOldestFirst(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.alwaysDoes(forgets)
	for _, value := range []string{"old", "older", "young"} {
		s.key.Value = value
		s.wantAccepted(t, s.request())
	}
	s.Exec(t, `UPDATE idempotency_open SET next_at = now() - CASE key WHEN 'older' THEN interval '3 hours' WHEN 'old' THEN interval '2 hours' ELSE interval '1 hour' END`)
	due, err := s.Store.FindDue(t.Context(), []string{"topup/1"}, 2)
	if err != nil || len(due) != 2 || due[0].Value != "older" || due[1].Value != "old" {
		t.Errorf("%v, %v", due, err)
	}
	if due, err := s.Store.FindDue(t.Context(), []string{"topup/2"}, 2); err != nil || len(due) != 0 {
		t.Errorf("of another route: %v, %v", due, err)
	}
}

func (s *shop) wantAccepted(t *testing.T, result idempotency.Result) {
	t.Helper()
	if !result.Accepted {
		t.Errorf("%+v", result)
	}
}

// The last transaction fails to serialize: the handler runs again within the same request, and a
// settled call is not sent again.
func TestSerializationFailureAfterTheCallAsksNobody(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.Exec(t, `CREATE SEQUENCE posts;
		CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF nextval('posts') = 1 THEN RAISE EXCEPTION 'conflict' USING ERRCODE = 'serialization_failure'; END IF; RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER conflict AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION conflict()`)
	runs := 0
	s.beforeCall = func() { runs++ }
	s.wantPaid(t, s.request(), 900)
	if n := s.sent(t); n != 1 || runs != 2 {
		t.Errorf("sent %d times in %d runs", n, runs)
	}
}

// A request that stays open for longer than ParkAfter is left to a person, and not before.
func TestRequestThatStaysOpenIsParked(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := s.charge.Call(ctx, card{"tok", s.price}); err != nil {
			return nil, err
		}
		return nil, errors.New("it never posts")
	}
	s.wantOpen(t, s.request())
	s.older(t, 23*time.Hour)
	s.wantOpen(t, s.resume(t))
	s.older(t, 2*time.Hour)
	s.resume(t)
	s.wantParked(t, s.request(), "still open after 24h")
	s.wantSent(t, 1)
}

// A process without a handler of the request's name runs nothing, and says so.
func TestResumeOfAnUnknownRouteIsNotServed(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	s.due(t)
	result := idempotency.NewEngine(s.Store, nil).Resume(t.Context(), s.key)
	if !errors.Is(result.Err, idempotency.ErrNotServed) || result.Outcome != idempotency.OutcomeUnknown {
		t.Errorf("%+v", result)
	}
	other := s.key
	other.Value = "another"
	if result := s.Engine.Resume(t.Context(), other); !errors.Is(result.Err, idempotency.ErrNotOpen) || result.Outcome != idempotency.OutcomeUnknown {
		t.Errorf("%+v", result)
	}
	s.wantPaid(t, s.resume(t), 900)
}

// A no from the look-up is no more final than one from a send. A look-up that returns Park parks
// the request.
func TestNoOfALookupIsNotFinalWhileASendIsUnderWay(t *testing.T) {
	t.Parallel()
	var says error
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.Lookup = func(context.Context, string, card) (charge, error) { return charge{}, says }
	})
	s.does(loses)
	s.wantOpen(t, s.request())
	says = effect.Declined(errors.New("no"), nil)
	s.wantOpen(t, s.resume(t))
	says = effect.Park("it was made with another amount", errors.New("canary"))
	s.wantParked(t, s.resume(t), "effect charge: by its look-up: it was made with another amount")
	says = effect.Declined(errors.New("no"), nil)
	s.Exec(t, "UPDATE idempotency_open SET parked = NULL")
	s.older(t, 30*time.Minute)
	if result := s.resume(t); result.Answer == nil || result.Answer.Status != 402 {
		t.Errorf("%+v", result)
	}
	s.wantSent(t, 1)
}

// While a call is repeated, others get in-progress, as during the first send.
func TestRetryDuringARepeatedSendIsInProgress(t *testing.T) {
	t.Parallel()
	slow := newGate()
	s := newShop(t, waitingToSend(2, slow))
	s.does(loses)
	s.wantOpen(t, s.request())
	two := s.resumeLater(t)
	slow.reached(t)
	if result := s.request(); result.Outcome != idempotency.OutcomeInProgress || result.RetryAfter <= 0 {
		t.Errorf("%+v", result)
	}
	slow.open()
	s.wantPaid(t, <-two, 900)
}

// A call that one version of the program sends once at most is not repeated by another, whichever
// of the two began it.
func TestCallThatOneVersionSendsOnceIsNotRepeated(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]bool{"the first": true, "the second": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			die := once()
			version := func(once bool) *effect.Declared[card, charge] {
				return effect.New("charge", effect.Effect[card, charge]{AtMostOnce: once, Do: func(ctx context.Context, key string, in card) (charge, error) {
					out, err := s.do(ctx, key, in)
					die()
					return out, err
				}})
			}
			s.charge = version(first)
			s.request()
			s.charge = version(!first)
			if result := s.resume(t); result.Answer == nil || result.Answer.Status != 202 {
				t.Errorf("%+v", result)
			}
			s.wantSent(t, 1)
		})
	}
}

// A repeated call that could not be sent leaves no doubt of its own; one that returns Park parks
// the request.
func TestRepeatedCallThatIsNotSentOrParks(t *testing.T) {
	t.Parallel()
	says := effect.NotSent(errors.New("no route"))
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.Do = func(context.Context, string, card) (charge, error) { return charge{}, says }
	})
	s.wantOpen(t, s.request())
	s.wantOpen(t, s.resume(t))
	if n := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE doubt_at IS NULL AND tries = 0"); n != 1 {
		t.Error("a send that was not made left a doubt, or counts as a try")
	}
	says = effect.Park("the key was used\x00with other parameters", errors.New("canary"))
	s.wantParked(t, s.resume(t), "effect charge: the key was used with other parameters")
	s.Exec(t, "UPDATE idempotency_open SET parked = NULL")
	says = effect.Park(strings.Repeat("x", effect.ParkBytesMax), nil)
	s.wantParked(t, s.resume(t), "effect charge: "+strings.Repeat("x", effect.ParkBytesMax))
	s.Exec(t, "UPDATE idempotency_open SET parked = NULL")
	says = effect.Park(strings.Repeat("é", effect.ParkBytesMax), nil)
	s.wantParked(t, s.resume(t), "effect charge: "+strings.Repeat("é", effect.ParkBytesMax/2))
	if n := s.Count(t, "SELECT count(*) FROM idempotency_open WHERE parked LIKE '%canary%' OR length(parked) > $1", len("effect charge: ")+effect.ParkBytesMax/2); n != 0 {
		t.Error("the error is recorded, or a reason over the limit")
	}
}

// The reply to the intent's COMMIT is lost, and it takes half of the lease to find the intent. The
// lease has run since the COMMIT, so this owner does not send any more.
func TestIntentThatIsFoundLateIsNotSent(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.Timeout = 100 * time.Millisecond })
	s.serve(stagedStore{Keeper: s.cutIntent(t), beforeResolve: func() {
		time.Sleep(3500 * time.Millisecond) // over half of the lease: 100 ms, 1 s and a margin of 5 s
	}}, idempotency.Timeouts{Commit: time.Second})
	s.wantOpen(t, s.request())
	s.wantSent(t, 0)
	s.serve(s.Store, idempotency.Timeouts{})
	s.wantPaid(t, s.resume(t), 900)
}

// The age of an intent that was found after its reply was lost counts from its commit or earlier,
// and never from the moment at which it was found.
func TestIntentThatIsFoundIsNoYoungerThanItsCommit(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.serve(stagedStore{Keeper: s.cutIntent(t), beforeResolve: func() { time.Sleep(50 * time.Millisecond) }}, idempotency.Timeouts{})
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		effects, err := idempotency.EffectsFrom(ctx)
		if err != nil {
			return nil, err
		}
		found, _, _, err := effects.Begin(idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Input: []byte("1"), Timeout: time.Second})
		if err != nil {
			return nil, err
		}
		now := effects.Now()
		var committed, clock time.Time
		if err := s.Pool.QueryRow(context.Background(), "SELECT sent_first_at, clock_timestamp() FROM idempotency_effects").Scan(&committed, &clock); err != nil {
			return nil, err
		}
		if found.SentFirst.IsZero() || found.SentFirst.After(committed) {
			t.Errorf("sent first at %v, and committed at %v", found.SentFirst, committed)
		}
		if now.After(clock) || now.Before(found.SentFirst) {
			t.Errorf("now is %v, and the store's clock shows %v", now, clock)
		}
		effects.Lapse(idempotency.Lapse{Reason: "a test"})
		return nil, idempotency.ErrUnsettled
	}
	s.wantOpen(t, s.request())
}

// cutIntent returns a store that loses the reply to the COMMIT of the first intent.
func (s *shop) cutIntent(t *testing.T) *postgres.Store {
	t.Helper()
	var cut atomic.Bool
	return s.through(t, func(commit pgfault.Commit) pgfault.Fault {
		if !bytes.Contains(commit.Messages, []byte("INSERT INTO")) || cut.Swap(true) {
			return pgfault.Fault{}
		}
		return pgfault.Fault{Kind: pgfault.CutAfter}
	})
}

// The reply to a take-over is slow, and the age of the key passes nine tenths of its lifetime
// meanwhile: the call is not sent.
func TestKeyThatAgesDuringTheTakeOverIsNotSent(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.Timeout, e.KeyLifetime = time.Second, 10*time.Second
	})
	s.does(forgets)
	s.wantOpen(t, s.request())
	s.serve(stagedStore{
		Keeper: s.Store,
		beforeTakeOver: func() {
			s.Exec(t, "UPDATE idempotency_effects SET sent_first_at = clock_timestamp() - interval '8 seconds'")
		},
		afterTakeOver: func() { time.Sleep(1100 * time.Millisecond) },
	}, idempotency.Timeouts{})
	s.wantParked(t, s.resume(t), "may have forgotten its key")
	s.wantSent(t, 1)
}

// An undo is sent once at most, is lost with its process, and an operator finds that the other
// service never got it: the next run sends it.
func TestUndoThatWasNeverSentIsSent(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	die := once()
	var refunds atomic.Int64
	refund := effect.New("refund", effect.Effect[charge, int]{AtMostOnce: true, Do: func(context.Context, string, charge) (int, error) {
		die()
		refunds.Add(1)
		return 1, nil
	}})
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := s.charge.Call(ctx, card{"tok", s.price})
		if err != nil {
			return nil, err
		}
		if _, err := refund.Undo(ctx, s.charge, paid); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: 409}, nil
	}
	s.request() // dies before the refund
	s.older(t, time.Minute)
	s.state(t, "undo/charge", operator.SettleNotSent, nil)
	if result := s.resume(t); result.Answer == nil || result.Answer.Status != 409 || refunds.Load() != 1 {
		t.Errorf("%d refunds: %+v", refunds.Load(), result)
	}
}

// The lease of an owner in its last transaction runs out, so its request is due, and nobody can take
// it over. The completer pauses before it looks for it again.
func TestCompleterPausesIfNothingCanBeTakenOver(t *testing.T) {
	t.Parallel()
	s, slow, one := inTheLastTransaction(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var looks atomic.Int64
	completer := idempotency.NewCompleter(s.Engine, &idempotency.CompleterOptions{
		Interval: time.Hour, AtOnce: 1,
		OnResume: func(idempotency.Key, idempotency.Result) {
			if looks.Add(1) == 1 {
				time.AfterFunc(200*time.Millisecond, stop)
			}
		},
	})
	completer.Run(ctx)
	if n := looks.Load(); n != 1 {
		t.Errorf("%d looks without a pause", n)
	}
	close(slow.release)
	s.wantPaid(t, <-one, 900)
}
