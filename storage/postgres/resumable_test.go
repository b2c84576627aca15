package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"regexp"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

// resumable is a request for the tests below, and its handler.
type resumable struct {
	*testservice.Service
	key  idempotency.Key
	sent int
	run  idempotency.RunFunc
}

// newResumable returns a service. Its handler is run, or r.paid if that is nil.
func newResumable(t *testing.T, run idempotency.RunFunc) *resumable {
	r := &resumable{Service: testservice.New(t, nil), key: idempotency.Key{Scope: "acme", Value: t.Name()}, run: run}
	if run == nil {
		r.run = r.paid
	}
	r.Engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) {
		return func(ctx context.Context) (*idempotency.Answer, error) { return r.run(ctx) }, nil
	})
	return r
}

func (r *resumable) request() idempotency.Request {
	req := testservice.Request(r.key)
	req.Resumable, req.Stored = "topup/1", func() []byte { return []byte("the request") }
	return req
}

func (r *resumable) do(t *testing.T) idempotency.Result {
	return r.Engine.Do(t.Context(), r.request(), r.run)
}

// through returns another engine for the requests. On its connections the first COMMIT that travels
// with the word meets the fault.
func (r *resumable) through(t *testing.T, word string, fault pgfault.Kind) *idempotency.Engine {
	t.Helper()
	var met atomic.Bool
	store := testservice.Open(t, r.URL, &postgres.Options{PoolConfig: func(c *pgxpool.Config) {
		through(t, c.ConnConfig, func(commit pgfault.Commit) pgfault.Fault {
			if !bytes.Contains(commit.Messages, []byte(word)) || met.Swap(true) {
				return pgfault.Fault{}
			}
			return pgfault.Fault{Kind: fault, Delay: 6 * time.Second}
		})
	}})
	return idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Commit: time.Second, Resolve: 3 * time.Second}})
}

// due ends the lease of the owner, or the pause.
func (r *resumable) due(t *testing.T) {
	t.Helper()
	r.Exec(t, "UPDATE idempotency_open SET next_at = now()")
}

// paid is a handler that makes the call and a posting.
func (r *resumable) paid(ctx context.Context) (*idempotency.Answer, error) {
	if err := r.charge(ctx, true); err != nil {
		return nil, err
	}
	return &idempotency.Answer{Status: 201, Body: []byte("paid")}, post(ctx)
}

// charge makes the one call of the handler.
func (r *resumable) charge(ctx context.Context, settle bool) error {
	effects, err := idempotency.EffectsFrom(ctx)
	if err != nil {
		return err
	}
	effect, _, _, err := effects.Begin(idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Input: []byte("1"), Timeout: time.Second})
	if err != nil || effect.State != idempotency.EffectIntended {
		return err
	}
	r.sent++
	if !settle {
		effects.Lapse(idempotency.Lapse{Pause: time.Millisecond, Reason: "no reply"})
		return idempotency.ErrUnsettled
	}
	effect.State, effect.Output = idempotency.EffectDone, []byte("ch_1")
	return effects.Settle(effect)
}

func post(ctx context.Context) error {
	_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ('posting')")
	return err
}

func TestCallAndPostingAreOnceEach(t *testing.T) {
	t.Parallel()
	r := newResumable(t, nil)
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	if result := r.do(t); result.Outcome != idempotency.OutcomeReplayed || string(result.Answer.Body) != "paid" {
		t.Fatalf("%+v", result)
	}
	if r.sent != 1 || r.Service.Effects(t) != 1 {
		t.Errorf("sent %d, posted %d", r.sent, r.Service.Effects(t))
	}
	if n := r.Count(t, "SELECT count(*) FROM idempotency_open"); n != 0 {
		t.Errorf("%d are open", n)
	}
}

func TestUnsettledCallIsCompletedByTheCompleter(t *testing.T) {
	t.Parallel()
	settle := false
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if err := r.charge(ctx, settle); err != nil {
			return &idempotency.Answer{Status: 200}, nil // dropped
		}
		return &idempotency.Answer{Status: 201}, post(ctx)
	})
	result := r.do(t)
	t.Log(result.Err)
	if result.Reason != idempotency.ReasonOutcomeUnknown {
		t.Fatalf("%+v", result)
	}
	settle = true
	completer := idempotency.NewCompleter(r.Engine, nil)
	for deadline := time.Now().Add(10 * time.Second); r.Count(t, "SELECT count(*) FROM idempotency_open") > 0; {
		if _, err := completer.Once(t.Context()); err != nil || time.Now().After(deadline) {
			t.Fatalf("not completed: %v", err)
		}
	}
	if result := r.do(t); result.Outcome != idempotency.OutcomeReplayed || result.Answer.Status != 201 {
		t.Fatalf("%+v", result)
	}
	if r.sent != 2 || r.Service.Effects(t) != 1 {
		t.Errorf("sent %d, posted %d", r.sent, r.Service.Effects(t))
	}
}

func TestHandlerThatFailsAfterTheCallIsNeverNotExecuted(t *testing.T) {
	t.Parallel()
	failed := errors.New("no posting")
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if err := r.charge(ctx, true); err != nil {
			return nil, err
		}
		return nil, failed
	})
	if result := r.do(t); result.Outcome != idempotency.OutcomeUnknown || !result.Accepted {
		t.Fatalf("%+v", result)
	}
	r.run = func(ctx context.Context) (*idempotency.Answer, error) {
		if err := r.charge(ctx, true); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: 402}, nil
	}
	r.due(t)
	if result := r.do(t); result.Reason != idempotency.ReasonNeedsAttention {
		t.Fatalf("a refusal after a charge: %+v", result)
	}
	if parked := r.Text(t, "SELECT parked FROM idempotency_open"); parked == "" {
		t.Error("it is not parked")
	}
	if r.sent != 1 {
		t.Errorf("sent %d", r.sent)
	}
}

// The reply to the intent's COMMIT is lost: nothing is sent until the intent is proven to be there.
func TestNothingIsSentBeforeTheIntentIsProven(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault   pgfault.Kind
		outcome idempotency.Outcome
		sent    int
	}{
		"committed":     {pgfault.CutAfter, idempotency.OutcomeExecuted, 1},
		"not committed": {pgfault.CutBefore, idempotency.OutcomeUnknown, 0},
		"late":          {pgfault.LateCommit, idempotency.OutcomeUnknown, 0},
		"nobody knows":  {pgfault.HalfOpen, idempotency.OutcomeUnknown, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r *resumable
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				if err := r.charge(ctx, true); err != nil {
					return &idempotency.Answer{Status: 200}, nil
				}
				return &idempotency.Answer{Status: 201}, post(ctx)
			})
			result := r.through(t, "charge", c.fault).Do(t.Context(), r.request(), r.run)
			if result.Outcome != c.outcome || r.sent != c.sent {
				t.Errorf("outcome %q, sent %d: %v", result.Outcome, r.sent, result.Err)
			}
			if n := r.Service.Effects(t); n != c.sent {
				t.Errorf("posted %d", n)
			}
		})
	}
}

// Two processes find the same request due: one of them becomes its owner, and the other's result
// would be refused.
func TestOneOwnerAtATime(t *testing.T) {
	t.Parallel()
	var r *resumable
	began, release := make(chan struct{}), make(chan struct{})
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		effects, err := idempotency.EffectsFrom(ctx)
		if err != nil {
			return nil, err
		}
		effect, resumed, _, err := effects.Begin(idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Input: []byte("1"), Timeout: time.Second})
		if err != nil {
			return nil, err
		}
		if !resumed {
			close(began)
			<-release // it is slow, and is taken over meanwhile
		}
		if effect.State == idempotency.EffectIntended {
			effect.State, effect.Output = idempotency.EffectDone, []byte("ch_1")
			if err := effects.Settle(effect); err != nil {
				return &idempotency.Answer{Status: 200}, nil
			}
		}
		return &idempotency.Answer{Status: 201}, post(ctx)
	})
	first := make(chan idempotency.Result)
	go func() { first <- r.do(t) }()
	<-began
	if result := r.do(t); result.Outcome != idempotency.OutcomeInProgress {
		t.Fatalf("within the lease: %+v", result)
	}
	r.due(t)
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("taken over: %+v", result)
	}
	close(release)
	if result := <-first; result.Outcome == idempotency.OutcomeExecuted || result.Outcome == idempotency.OutcomeNotExecuted {
		t.Errorf("the first owner: %+v", result)
	}
	if n := r.Service.Effects(t); n != 1 {
		t.Errorf("posted %d times", n)
	}
}

// A request with one call costs one round trip more than the same without the call: the intent
// travels with the claim, and the result with the beginning of the last transaction.
func TestCallCostsOneRoundTrip(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
	engine := idempotency.NewEngine(b.store, nil)
	cost := func(key string, call bool) int {
		req := request(key, "")
		req.Resumable, req.Stored = "topup/1", func() []byte { return nil }
		before := b.wire.Count()
		result := engine.Do(t.Context(), req, func(ctx context.Context) (*idempotency.Answer, error) {
			if call {
				effects, err := idempotency.EffectsFrom(ctx)
				if err != nil {
					return nil, err
				}
				effect, _, _, err := effects.Begin(idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Timeout: time.Second})
				if err != nil {
					return nil, err
				}
				effect.State = idempotency.EffectDone
				if err := effects.Settle(effect); err != nil {
					return nil, err
				}
			}
			statements(ctx, t, postgres.Tx(ctx))
			return answer(201), nil
		})
		want(t, result, idempotency.OutcomeExecuted, "")
		return b.wire.Count() - before
	}
	cost("warm", true)
	without, with := cost("without", false), cost("with", true)
	if without != handlerStatements+2 || with != without+1 {
		t.Errorf("%d round trips without the call and %d with it", without, with)
	}
}

// CheckResumable names each right that a role lacks, and with those that it names a request runs
// from its intent to its answer.
func TestCheckResumableNamesTheRightsThatAreMissing(t *testing.T) {
	t.Parallel()
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if err := r.charge(ctx, true); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: 201}, nil
	})
	grants := []string{"SELECT, INSERT ON idempotency_keys", "SELECT ON idempotency_migrations"}
	store, _ := r.Role(t, grants...)
	if err := store.Check(t.Context()); err != nil {
		t.Errorf("a service without effects: %v", err)
	}
	err := store.CheckResumable(t.Context())
	if !errors.Is(err, postgres.ErrRightMissing) {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`GRANT (.* ON \S+) TO `).FindAllStringSubmatch(err.Error(), -1)
	if len(found) != 3 {
		t.Fatalf("%v", err)
	}
	for _, grant := range found {
		grants = append(grants, grant[1])
	}
	store, _ = r.Role(t, grants...)
	if err := store.CheckResumable(t.Context()); err != nil {
		t.Error(err)
	}
	r.Engine = idempotency.NewEngine(store, nil)
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("%+v", result)
	}
	r.Exec(t, "DROP TABLE idempotency_open, idempotency_effects")
	if err := r.Store.CheckResumable(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) {
		t.Errorf("without the tables: %v", err)
	}
	if err := r.Store.Check(t.Context()); err != nil {
		t.Errorf("a service without effects needs no tables: %v", err)
	}
}

// CheckResumable names a missing guard, as in a table that was restored without its triggers, and
// the statement that creates it. A reaper without rights on the table of effects deletes them with
// the record.
func TestCheckResumableNamesTheGuardsThatAreMissing(t *testing.T) {
	t.Parallel()
	r := newResumable(t, nil)
	for _, sick := range []string{
		"ALTER TABLE idempotency_keys DISABLE TRIGGER USER",
		"DROP TRIGGER idempotency_keys_delete_guard ON idempotency_keys; DROP TRIGGER idempotency_keys_expire_guard ON idempotency_keys; DROP TRIGGER idempotency_keys_truncate_guard ON idempotency_keys",
	} {
		r.Exec(t, sick)
		if err := r.Store.Check(t.Context()); err != nil {
			t.Errorf("a service without effects needs no guards: %v", err)
		}
		err := r.Store.CheckResumable(t.Context())
		if !errors.Is(err, postgres.ErrTableUnsafe) {
			t.Fatal(err)
		}
		remedies := regexp.MustCompile(`(?m)(CREATE|ALTER) .*$`).FindAllString(err.Error(), -1)
		if len(remedies) != 3 {
			t.Fatalf("%v", err)
		}
		for _, remedy := range remedies {
			r.Exec(t, remedy)
		}
		if err := r.Store.CheckResumable(t.Context()); err != nil {
			t.Errorf("after the remedies: %v", err)
		}
	}
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	r.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 hour'")
	reaper, _ := r.Role(t, "SELECT, DELETE ON idempotency_keys")
	if n, err := reaper.DeleteExpired(t.Context()); err != nil || n != 1 {
		t.Errorf("%d, %v", n, err)
	}
	if n := r.Count(t, "SELECT count(*) FROM idempotency_effects"); n != 0 {
		t.Errorf("%d effects are left", n)
	}
}

// A record wins over the lock, which a replay holds for a moment, even if the claim travels with
// the intent: a duplicate in another process gets the answer, not in-progress.
func TestRecordWinsOverTheLockOfTheIntent(t *testing.T) {
	t.Parallel()
	r := newResumable(t, nil)
	runs := 0
	r.run = func(ctx context.Context) (*idempotency.Answer, error) {
		runs++
		return r.paid(ctx)
	}
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	reader, err := r.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := reader.Exec(t.Context(), "SELECT pg_advisory_xact_lock($1)", r.key.LockNumber("public."+postgres.TableName)); err != nil {
		t.Fatal(err)
	}
	other := testservice.On(t, r.URL, nil)
	result := other.Engine.Do(t.Context(), r.request(), r.run)
	if result.Outcome != idempotency.OutcomeReplayed || runs != 2 {
		t.Errorf("after %d runs: %+v", runs, result)
	}
}

// A list of due requests may be old when its keys are run: requests that have since ended, or were
// taken over, parked or made again, are left alone.
func TestOldListOfDueRequestsRunsNothing(t *testing.T) {
	t.Parallel()
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if err := r.charge(ctx, false); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: 201}, post(ctx)
	})
	names := []string{"ended", "taken-over", "parked", "left-for-later", "made-anew"}
	for _, name := range names {
		r.key.Value = name
		if result := r.do(t); !result.Accepted {
			t.Fatalf("%+v", result)
		}
	}
	r.due(t)
	due, err := r.Store.FindDue(t.Context(), []string{"topup/1"}, 100)
	if err != nil || len(due) != len(names) {
		t.Fatalf("%v, %v", due, err)
	}
	const of = " WHERE key = $1"
	r.Exec(t, "UPDATE idempotency_effects SET state = 2, output = '1'"+of, "ended")
	r.key.Value = "ended"
	if result := r.Engine.Resume(t.Context(), r.key); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	r.Exec(t, "UPDATE idempotency_open SET epoch = epoch + 1, owned = true, next_at = now() + interval '1 hour'"+of, "taken-over")
	r.Exec(t, "UPDATE idempotency_open SET parked = 'a reason'"+of, "parked")
	r.Exec(t, "UPDATE idempotency_open SET next_at = now() + interval '1 hour'"+of, "left-for-later")
	r.Exec(t, "DELETE FROM idempotency_open"+of, "made-anew")
	r.Exec(t, "DELETE FROM idempotency_keys"+of, "made-anew")
	r.key.Value = "made-anew"
	if result := r.do(t); !result.Accepted {
		t.Fatalf("%+v", result)
	}
	r.Exec(t, "UPDATE idempotency_open SET next_at = now() + interval '1 hour'"+of, "made-anew")

	const state = "SELECT string_agg(concat_ws(' ', key, o.epoch, e.epoch, runs, next_at, owned, parked, tries, doubt_at, status, attempt_id), E'\\n' ORDER BY key)" +
		" FROM idempotency_keys LEFT JOIN idempotency_open AS o USING (scope, key) LEFT JOIN idempotency_effects AS e USING (scope, key)"
	before, sent, posted := r.Text(t, state), r.sent, r.Service.Effects(t)
	for _, key := range due {
		result := r.Engine.Resume(t.Context(), key)
		if result.Answer != nil && result.Outcome != idempotency.OutcomeReplayed {
			t.Errorf("%s: %+v", key.Value, result)
		}
	}
	if after := r.Text(t, state); after != before {
		t.Errorf("an old list changed\n%s\nto\n%s", before, after)
	}
	if r.sent != sent || r.Service.Effects(t) != posted {
		t.Errorf("an old list sent %d and posted %d", r.sent-sent, r.Service.Effects(t)-posted)
	}
}

// A look at a key shows its record, and claims nothing: a retry that comes meanwhile is never
// in-progress because of it, and a request that runs does not delay it.
func TestLookUpClaimsNothing(t *testing.T) {
	t.Parallel()
	settle := false
	var during idempotency.Result
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if err := r.charge(ctx, settle); err != nil {
			return nil, err
		}
		if err := post(ctx); err != nil { // its transaction holds the row
			return nil, err
		}
		during = r.Engine.LookUp(context.Background(), r.request())
		return &idempotency.Answer{Status: 201, Body: []byte("paid")}, nil
	})
	lookUp := func() idempotency.Result { return r.Engine.LookUp(t.Context(), r.request()) }
	if result := lookUp(); !errors.Is(result.Err, idempotency.ErrNotFound) || result.Outcome != idempotency.OutcomeUnknown {
		t.Errorf("absent: %+v", result)
	}
	running := idempotency.Key{Scope: "acme", Value: "running"}
	finish := r.Running(t, running)
	if result := r.Engine.LookUp(t.Context(), testservice.Request(running)); !errors.Is(result.Err, idempotency.ErrNotFound) {
		t.Errorf("running: %+v", result)
	}
	if result := finish(); result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("%+v", result)
	}

	if result := r.do(t); !result.Accepted {
		t.Fatalf("%+v", result)
	}
	r.Exec(t, "UPDATE idempotency_open SET next_at = now() + interval '1 hour'")
	if result := lookUp(); !result.Accepted || result.Reason != idempotency.ReasonOutcomeUnknown || result.Err != nil || result.RetryAfter < 59*time.Minute {
		t.Errorf("open: %+v", result)
	}
	r.Exec(t, "UPDATE idempotency_open SET parked = 'a rule'")
	if result := lookUp(); !result.Accepted || result.Reason != idempotency.ReasonNeedsAttention {
		t.Errorf("parked: %+v", result)
	}
	r.Exec(t, "UPDATE idempotency_open SET parked = NULL, next_at = now()")
	settle = true
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	if !during.Accepted || during.RetryAfter != 0 || during.Err != nil {
		t.Errorf("in its last transaction: %+v", during)
	}
	if result := lookUp(); result.Outcome != idempotency.OutcomeReplayed || string(result.Answer.Body) != "paid" {
		t.Errorf("recorded: %+v", result)
	}
	other := r.request()
	other.Fingerprint = idempotency.NewFingerprintV1("POST", "/other", "", "", nil)
	if result := r.Engine.LookUp(t.Context(), other); result.Outcome != idempotency.OutcomeMismatch || result.Answer != nil {
		t.Errorf("another request's: %+v", result)
	}
	// A connection that lost its statements, or itself, is no outage.
	for _, sql := range []string{"DEALLOCATE ALL", "SELECT pg_terminate_backend(pg_backend_pid())"} {
		_, _ = r.Pool.Exec(context.Background(), sql, pgx.QueryExecModeSimpleProtocol)
		if result := lookUp(); result.Outcome != idempotency.OutcomeReplayed {
			t.Errorf("after %s: %+v", sql, result)
		}
	}
	r.Pool.Close()
	if result := lookUp(); !errors.Is(result.Err, idempotency.ErrUnavailable) || result.Outcome != idempotency.OutcomeUnknown {
		t.Errorf("an outage: %+v", result)
	}
}

// A record that row-level security may hide is never reported as absent, whichever call looks for
// it.
func TestLookUpThatMayNotSeeIsUnknown(t *testing.T) {
	t.Parallel()
	r := newResumable(t, nil)
	store, _ := r.Role(t, "SELECT, INSERT ON idempotency_keys")
	r.Exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
	engine := idempotency.NewEngine(store, nil)
	for range 2 {
		if result := engine.LookUp(t.Context(), r.request()); !errors.Is(result.Err, postgres.ErrRowSecurityActive) || errors.Is(result.Err, idempotency.ErrNotFound) {
			t.Errorf("%+v", result)
		}
	}
	r.Exec(t, "ALTER TABLE idempotency_keys DISABLE ROW LEVEL SECURITY")
	if result := engine.LookUp(t.Context(), r.request()); !errors.Is(result.Err, idempotency.ErrNotFound) {
		t.Errorf("%+v", result)
	}
}
