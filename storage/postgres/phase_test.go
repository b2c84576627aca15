package postgres_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	outside "github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

// hold is the output of the phases below.
type hold struct{ ID int }

// insert returns the function of a phase that writes a row with this name.
func insert(ctx context.Context, name string) func(tx pgx.Tx) (hold, error) {
	return func(tx pgx.Tx) (h hold, err error) {
		return h, tx.QueryRow(ctx, "INSERT INTO effects (name) VALUES ($1) RETURNING id", name).Scan(&h.ID)
	}
}

// names returns the names of the rows that handlers wrote.
func (r *resumable) names(t *testing.T) string {
	t.Helper()
	return r.Text(t, "SELECT COALESCE(string_agg(name, ' ' ORDER BY id), '') FROM effects")
}

func (r *resumable) open(t *testing.T) int {
	t.Helper()
	return r.Count(t, "SELECT count(*) FROM idempotency_open")
}

// wantResult fails the test unless the request ended so.
func (r *resumable) want(t *testing.T, outcome idempotency.Outcome, reason idempotency.Reason) idempotency.Result {
	t.Helper()
	result := r.do(t)
	if want(t, result, outcome, reason); t.Failed() {
		t.FailNow()
	}
	return result
}

func said(status int) *idempotency.Answer { return &idempotency.Answer{Status: status} }

// A phase is committed, with its record and the open request, when Phase returns; and a later run
// gets its output without running it.
func TestPhaseIsCommittedAndReplayedByName(t *testing.T) {
	t.Parallel()
	var r *resumable
	runs, fails, held := 0, true, hold{}
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		h, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (hold, error) {
			runs++
			return insert(ctx, "hold")(tx)
		})
		if err != nil {
			return nil, err
		}
		if names := r.names(t); names != "hold" || r.open(t) != 1 {
			t.Errorf("after the phase: %q, %d open", names, r.open(t))
		}
		if fails {
			held = h
			return said(500), nil
		}
		if h != held {
			t.Errorf("%+v, then %+v", held, h)
		}
		return said(201), post(ctx)
	})
	if result := r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown); !result.Accepted {
		t.Errorf("%+v", result)
	}
	fails = false
	r.due(t)
	r.want(t, idempotency.OutcomeExecuted, "")
	r.want(t, idempotency.OutcomeReplayed, "")
	if names := r.names(t); names != "hold posting" || runs != 1 || r.open(t) != 0 {
		t.Errorf("wrote %q in %d runs, %d open", names, runs, r.open(t))
	}
}

// The decision of a phase against its writes is recorded: a later run that would decide otherwise
// gets it too.
func TestDeclinedPhaseIsRecorded(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		before bool // another phase is committed before
		broken bool // the transaction is aborted when the phase decides
	}{"first": {}, "of an open request": {before: true}, "after an error of the database": {broken: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r *resumable
			decided, final := 0, false
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				if c.before {
					if _, err := postgres.Phase(ctx, "before", insert(ctx, "before")); err != nil {
						return nil, err
					}
				}
				_, err := postgres.Phase(ctx, "settle", func(tx pgx.Tx) (hold, error) {
					decided++
					if _, err := insert(ctx, "settle")(tx); err != nil {
						return hold{}, err
					}
					if c.broken {
						_, _ = tx.Exec(ctx, "SELECT 1/0")
					}
					return hold{}, outside.Declined(errors.New("it was closed"), map[string]string{"code": "closed"})
				})
				if errors.Is(err, idempotency.ErrKeyRecorded) { // of a run that has not claimed the key
					return nil, err
				}
				var declined *outside.DeclinedError
				if !errors.Is(err, outside.ErrDeclined) || !errors.As(err, &declined) || declined.Effect != "settle" || string(declined.Detail) != `{"code":"closed"}` || declined.Err != nil {
					t.Errorf("%#v", err)
					return nil, err
				}
				if !final {
					return nil, errors.New("died")
				}
				return said(409), nil
			})
			r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
			final = true
			r.due(t)
			if result := r.want(t, idempotency.OutcomeExecuted, ""); result.Answer.Status != 409 {
				t.Errorf("%+v", result)
			}
			if r.want(t, idempotency.OutcomeReplayed, ""); decided != 1 {
				t.Errorf("decided %d times", decided)
			}
			if names := r.names(t); strings.Contains(names, "settle") || strings.Contains(names, "before") != c.before {
				t.Errorf("wrote %q", names)
			}
		})
	}
}

// A phase that fails leaves nothing: neither its writes, nor a record, nor an open request.
func TestFailedPhaseLeavesTheRequestAsItWas(t *testing.T) {
	t.Parallel()
	failed := errors.New("no funds")
	for name, fn := range map[string]func(ctx context.Context, tx pgx.Tx) (hold, error){
		"error": func(context.Context, pgx.Tx) (hold, error) { return hold{}, failed },
		"error of the database": func(ctx context.Context, tx pgx.Tx) (hold, error) {
			_, err := tx.Exec(ctx, "SELECT 1/0")
			return hold{}, err
		},
		"aborted": func(ctx context.Context, tx pgx.Tx) (hold, error) {
			_, _ = tx.Exec(ctx, "SELECT 1/0")
			return hold{}, nil
		},
		"nested transaction left open": func(ctx context.Context, tx pgx.Tx) (hold, error) {
			_, err := tx.Begin(ctx)
			return hold{}, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r *resumable
			status, runs := 0, 0
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				_, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (hold, error) {
					runs++
					if _, err := insert(ctx, "hold")(tx); err != nil {
						return hold{}, err
					}
					return fn(ctx, tx)
				})
				if err == nil || errors.Is(err, outside.ErrDeclined) || name == "error" && err != failed {
					t.Errorf("%v", err)
				}
				return said(status), nil
			})
			status = 500
			r.want(t, idempotency.OutcomeNotExecuted, "")
			status = 402
			r.want(t, idempotency.OutcomeExecuted, "")
			r.want(t, idempotency.OutcomeReplayed, "")
			if runs != 2 || r.names(t) != "" || r.open(t) != 0 || r.Count(t, "SELECT count(*) FROM idempotency_effects") != 0 {
				t.Errorf("%d runs wrote %q, %d open", runs, r.names(t), r.open(t))
			}
		})
	}
}

func TestPanicInAPhaseUndoesIt(t *testing.T) {
	t.Parallel()
	var r *resumable
	before, panics := false, true
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if before {
			if _, err := postgres.Phase(ctx, "before", insert(ctx, "before")); err != nil {
				return nil, err
			}
		}
		if _, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (h hold, err error) {
			if h, err = insert(ctx, "hold")(tx); panics {
				panic("died")
			}
			return h, err
		}); err != nil {
			return nil, err
		}
		return said(201), nil
	})
	r.want(t, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	before = true
	r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if names := r.names(t); names != "before" {
		t.Errorf("wrote %q", names)
	}
	panics = false
	r.due(t)
	r.want(t, idempotency.OutcomeExecuted, "")
	if names := r.names(t); names != "before hold" {
		t.Errorf("wrote %q", names)
	}
}

// In an open request a phase that failed runs again in a later run, and one that was committed does
// not.
func TestFailedPhaseOfAnOpenRequestRunsAgain(t *testing.T) {
	t.Parallel()
	// A handler that returns without an answer has answered 200.
	for _, status := range []int{500, 409, 200} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			var r *resumable
			runs := 0
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				if _, err := postgres.Phase(ctx, "hold", insert(ctx, "hold")); err != nil {
					return nil, err
				}
				if _, err := postgres.Phase(ctx, "settle", func(tx pgx.Tx) (hold, error) {
					if runs++; runs == 1 {
						return hold{}, errors.New("not now")
					}
					return insert(ctx, "settle")(tx)
				}); err != nil {
					return said(status), nil
				}
				return said(201), nil
			})
			r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
			r.due(t)
			result := r.want(t, idempotency.OutcomeExecuted, "")
			if names := r.names(t); names != "hold settle" || runs != 2 || result.Answer.Status != 201 {
				t.Errorf("wrote %q in %d runs, and answered %+v", names, runs, result.Answer)
			}
		})
	}
}

// After a wiring mistake no answer is recorded, and nothing is written.
func TestMistakesWithPhasesArePanics(t *testing.T) {
	t.Parallel()
	phase := func(ctx context.Context, name string) { _, _ = postgres.Phase(ctx, name, insert(ctx, "phase")) }
	for name, c := range map[string]struct {
		run    func(ctx context.Context)
		change func(req *idempotency.Request)
		says   string
		open   int // requests, because a phase before the mistake is committed
	}{
		"outside of a handler":        {run: func(context.Context) { phase(context.Background(), "hold") }, says: "mount the middleware on the route"},
		"on a route that can't go on": {run: func(ctx context.Context) { phase(ctx, "hold") }, change: func(req *idempotency.Request) { req.Resumable = "" }, says: "set Options.Resumable"},
		"without a key":               {run: func(ctx context.Context) { phase(ctx, "hold") }, change: func(req *idempotency.Request) { req.Key.Value = "" }, says: "do not make keys optional"},
		"after a use of Tx": {run: func(ctx context.Context) {
			_ = post(ctx)
			phase(ctx, "hold")
		}, says: "write in a Phase"},
		"after DeferExec": {run: func(ctx context.Context) {
			_ = postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ('deferred')")
			phase(ctx, "hold")
		}, says: "Tx or DeferExec"},
		"call after DeferExec": {run: func(ctx context.Context) {
			_ = postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ('deferred')")
			_, _ = outside.New("charge", outside.Effect[int, int]{Do: func(context.Context, string, int) (int, error) { panic("sent") }}).Call(ctx, 1)
		}, says: "Tx or DeferExec"},
		"no name":             {run: func(ctx context.Context) { phase(ctx, "") }, says: "the name of a phase must be 1 to 100"},
		"a long name":         {run: func(ctx context.Context) { phase(ctx, strings.Repeat("n", 101)) }, says: "the name of a phase must be 1 to 100"},
		"the name of an undo": {run: func(ctx context.Context) { phase(ctx, "undo/charge") }, says: "must not begin with undo/"},
		"one name twice": {run: func(ctx context.Context) {
			phase(ctx, "hold")
			phase(ctx, "hold")
		}, says: "give each phase a name of its own", open: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			returned := false
			r := newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				c.run(ctx)
				returned = true
				return said(201), nil
			})
			req := r.request()
			if c.change != nil {
				c.change(&req)
			}
			result := r.Engine.Do(t.Context(), req, r.run)
			var usage idempotency.UsageError
			if returned || result.Answer != nil || !errors.As(result.Err, &usage) || !strings.Contains(string(usage), c.says) {
				t.Errorf("%+v", result)
			}
			if n := r.open(t); n != c.open || r.Service.Effects(t) != c.open {
				t.Errorf("%d open, wrote %q", n, r.names(t))
			}
			if c.open == 0 && result.Outcome != idempotency.OutcomeNotExecuted {
				t.Errorf("%+v", result)
			}
		})
	}
	t.Run("the longest name", func(t *testing.T) {
		t.Parallel()
		r := newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
			_, err := postgres.Phase(ctx, strings.Repeat("n", 100), insert(ctx, "phase"))
			return said(201), err
		})
		r.want(t, idempotency.OutcomeExecuted, "")
	})
}

// A call or a phase inside a phase, or beside one, is refused before it is sent, and nothing of the
// run is committed, even if the handler drops the error.
func TestNothingIsMadeInsideAPhase(t *testing.T) {
	t.Parallel()
	var r *resumable
	for name, inside := range map[string]func(ctx context.Context) error{
		"call": func(ctx context.Context) error { return r.charge(ctx, true) },
		"phase": func(ctx context.Context) error {
			_, err := postgres.Phase(ctx, "inner", insert(ctx, "inner"))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, status := range []int{201, 402} {
				r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
					if _, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (hold, error) {
						if err := inside(ctx); !errors.Is(err, idempotency.ErrEffectBusy) {
							t.Errorf("inside: %v", err)
						}
						return insert(ctx, "hold")(tx)
					}); !errors.Is(err, idempotency.ErrEffectBusy) {
						t.Errorf("%v", err)
					}
					return said(status), nil
				})
				r.want(t, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				if r.sent != 0 || r.names(t) != "" || r.open(t) != 0 {
					t.Errorf("sent %d, wrote %q, %d open", r.sent, r.names(t), r.open(t))
				}
			}
		})
	}
}

// A handler that returns while a goroutine of its own is in a phase commits nothing of it.
func TestHandlerThatDoesNotWaitForItsPhase(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402} {
		began, over, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
		r := newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
			go func() {
				_, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (h hold, err error) {
					h, err = insert(ctx, "hold")(tx)
					close(began)
					<-over
					return h, err
				})
				ended <- err
			}()
			<-began
			return said(status), nil
		})
		r.want(t, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
		close(over)
		if err := <-ended; err == nil {
			t.Error("the phase was committed")
		}
		if r.names(t) != "" || r.open(t) != 0 {
			t.Errorf("wrote %q, %d open", r.names(t), r.open(t))
		}
	}
}

// Deferred statements of a phase travel with its COMMIT. If one of them fails, the COMMIT fails.
func TestDeferExecTravelsWithThePhase(t *testing.T) {
	t.Parallel()
	var r *resumable
	wrong := true
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (hold, error) {
			if err := postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ($1)", "deferred"); err != nil {
				return hold{}, err
			}
			if wrong { // it finds nothing
				if err := postgres.DeferExec(ctx, "UPDATE effects SET name = 'x' WHERE id = -1"); err != nil {
					return hold{}, err
				}
			}
			_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ('by Tx')") // the phase's own
			return hold{}, err
		}); err != nil {
			return said(402), nil // dropped
		}
		if names := r.names(t); names != "by Tx deferred" {
			t.Errorf("after the phase: %q", names)
		}
		return said(201), nil
	})
	result := r.want(t, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if !strings.Contains(fmt.Sprint(result.Err), "deferred statement 2") || r.names(t) != "" || r.open(t) != 0 {
		t.Errorf("%v; wrote %q, %d open", result.Err, r.names(t), r.open(t))
	}
	wrong = false
	r.want(t, idempotency.OutcomeExecuted, "")
}

// After the last call or phase, deferred statements belong to the last transaction: they travel
// with the answer, and if they fail the request stays open.
func TestDeferExecAfterACallTravelsWithTheAnswer(t *testing.T) {
	t.Parallel()
	var r *resumable
	id := -1
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		h, err := postgres.Phase(ctx, "hold", insert(ctx, "hold"))
		if err != nil {
			return nil, err
		}
		if err := r.charge(ctx, true); err != nil {
			return nil, err
		}
		if id != -1 {
			id = h.ID
		}
		return said(201), postgres.DeferExec(ctx, "UPDATE effects SET name = 'posted' WHERE id = $1", id)
	})
	r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if names := r.names(t); names != "hold" {
		t.Errorf("wrote %q", names)
	}
	id = 0
	r.due(t)
	r.want(t, idempotency.OutcomeExecuted, "")
	if names := r.names(t); names != "posted" || r.sent != 1 {
		t.Errorf("wrote %q, sent %d", names, r.sent)
	}
}

// A 4xx may follow a phase, and the phase's writes stay. It may not follow a call that was made.
func TestRefusalAfterAPhaseIsAnswered(t *testing.T) {
	t.Parallel()
	var r *resumable
	calls := false
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := postgres.Phase(ctx, "hold", insert(ctx, "hold")); err != nil {
			return nil, err
		}
		if calls {
			if err := r.charge(ctx, true); err != nil {
				return nil, err
			}
		}
		return said(402), nil
	})
	r.want(t, idempotency.OutcomeExecuted, "")
	if names := r.names(t); names != "hold" || r.open(t) != 0 {
		t.Errorf("wrote %q, %d open", names, r.open(t))
	}
	calls, r.key.Value = true, "another"
	r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonNeedsAttention)
}

// A later version of the handler does not ask for a phase that was committed, has inserted one, or
// makes a call with the name of a phase.
func TestPhasesAreFoundByName(t *testing.T) {
	t.Parallel()
	phases := func(names ...string) idempotency.RunFunc {
		return func(ctx context.Context) (*idempotency.Answer, error) {
			for _, name := range names {
				if _, err := postgres.Phase(ctx, name, insert(ctx, name)); err != nil {
					return nil, err
				}
			}
			return said(201), nil
		}
	}
	var r *resumable
	for name, c := range map[string]struct {
		later  idempotency.RunFunc
		parked string // words
		names  string
	}{
		"inserted": {later: phases("fee", "hold", "settle"), names: "hold fee settle"},
		"removed":  {later: phases("settle"), parked: "did not ask for effect hold", names: "hold"},
		"renamed":  {later: phases("reserve"), parked: "did not ask for effect hold", names: "hold reserve"},
		"a call of its name": {later: func(ctx context.Context) (*idempotency.Answer, error) {
			_, err := outside.New("hold", outside.Effect[int, int]{Do: func(context.Context, string, int) (int, error) { panic("sent") }}).Call(ctx, 1)
			return said(201), err
		}, parked: "a phase is recorded under the name", names: "hold"},
	} {
		t.Run(name, func(t *testing.T) {
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				_, err := postgres.Phase(ctx, "hold", insert(ctx, "hold"))
				return nil, errors.Join(err, errors.New("died"))
			})
			r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
			r.run = c.later
			r.due(t)
			if c.parked == "" {
				r.want(t, idempotency.OutcomeExecuted, "")
			} else {
				r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonNeedsAttention)
				if parked := r.Text(t, "SELECT COALESCE(parked, '') FROM idempotency_open"); !strings.Contains(parked, c.parked) {
					t.Errorf("parked: %q", parked)
				}
			}
			if names := r.names(t); name != "removed" && name != "renamed" && names != c.names {
				t.Errorf("wrote %q", names)
			}
		})
	}
	t.Run("a phase of a call's name", func(t *testing.T) {
		r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) { return nil, r.charge(ctx, false) })
		r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
		r.run = phases("charge")
		r.due(t)
		r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonNeedsAttention)
		if names := r.names(t); names != "" {
			t.Errorf("wrote %q", names)
		}
	})
}

// The reply to a phase's COMMIT is lost: nothing after it runs in this attempt until the phase is
// proven to be there, and a later run neither loses it nor makes it twice.
func TestLostCommitOfAPhase(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault   pgfault.Kind
		second  bool // the phase comes after another one
		outcome idempotency.Outcome
		sent    int
	}{
		"committed":            {fault: pgfault.CutAfter, outcome: idempotency.OutcomeExecuted, sent: 1},
		"not committed":        {fault: pgfault.CutBefore, outcome: idempotency.OutcomeNotExecuted},
		"late":                 {fault: pgfault.LateCommit, outcome: idempotency.OutcomeUnknown},
		"nobody knows":         {fault: pgfault.HalfOpen, outcome: idempotency.OutcomeUnknown},
		"second committed":     {fault: pgfault.CutAfter, second: true, outcome: idempotency.OutcomeUnknown},
		"second not committed": {fault: pgfault.CutBefore, second: true, outcome: idempotency.OutcomeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r *resumable
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				if c.second {
					if _, err := postgres.Phase(ctx, "before", insert(ctx, "before")); err != nil {
						return nil, err
					}
				}
				if _, err := postgres.Phase(ctx, "lost", insert(ctx, "lost")); err != nil {
					return said(201), nil // dropped
				}
				if err := r.charge(ctx, true); err != nil {
					return nil, err
				}
				return said(201), nil
			})
			result := r.through(t, "lost", c.fault).Do(t.Context(), r.request(), r.run)
			if result.Outcome != c.outcome || r.sent != c.sent {
				t.Errorf("outcome %q, sent %d: %v", result.Outcome, r.sent, result.Err)
			}
			for deadline := time.Now().Add(patience); ; {
				if r.open(t) > 0 {
					r.due(t)
				}
				result := r.do(t)
				if result.Answer != nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("not ended: %+v", result)
				}
				time.Sleep(100 * time.Millisecond)
			}
			if names := r.names(t); strings.Count(names, "lost") != 1 || r.sent != 1 {
				t.Errorf("sent %d, wrote %q", r.sent, names)
			}
		})
	}
}

// A serialization failure in a phase, or at its COMMIT, starts the handler again at once.
func TestSerializationFailureInAPhaseStartsAgain(t *testing.T) {
	t.Parallel()
	const fails = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"
	for name, c := range map[string]struct{ second, atCommit, swallowed bool }{
		"first": {}, "of an open request": {second: true}, "swallowed": {swallowed: true},
		"at COMMIT": {atCommit: true}, "at COMMIT of an open request": {second: true, atCommit: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r *resumable
			runs := 0
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				if c.second {
					if _, err := postgres.Phase(ctx, "before", insert(ctx, "before")); err != nil {
						return nil, err
					}
				}
				if _, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (h hold, err error) {
					if runs++; runs == 1 && c.atCommit {
						return h, postgres.DeferExec(ctx, "SELECT fail_once()", postgres.AnyRowsUnchecked)
					}
					if runs == 1 {
						if _, err = tx.Exec(ctx, fails); !c.swallowed {
							return h, err
						}
						return h, outside.Declined(errors.New("of a broken transaction"), nil)
					}
					return insert(ctx, "hold")(tx)
				}); err != nil {
					return said(402), nil
				}
				return said(201), nil
			})
			r.Exec(t, "CREATE FUNCTION fail_once() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")
			if result := r.want(t, idempotency.OutcomeExecuted, ""); result.Answer.Status != 201 || runs != 2 {
				t.Errorf("%+v in %d runs", result, runs)
			}
			if names := r.names(t); names != map[bool]string{true: "before hold", false: "hold"}[c.second] {
				t.Errorf("wrote %q", names)
			}
		})
	}
}

// The isolation level of the store is that of a phase, too; and the look-up after a failure does
// not take the open request's own row for another attempt's record.
func TestPhasesHaveTheStoresIsolation(t *testing.T) {
	t.Parallel()
	for _, set := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		var r *resumable
		runs, fails := 0, true
		level := func(ctx context.Context) func(tx pgx.Tx) (string, error) {
			return func(tx pgx.Tx) (now string, err error) {
				if err := tx.QueryRow(ctx, "SHOW transaction_isolation").Scan(&now); err != nil || now != string(set) {
					t.Errorf("%q, %v", now, err)
				}
				return now, nil
			}
		}
		r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
			if _, err := postgres.Phase(ctx, "first", level(ctx)); err != nil {
				return nil, err
			}
			if _, err := postgres.Phase(ctx, "second", func(tx pgx.Tx) (string, error) {
				if runs++; runs == 1 {
					_, err := tx.Exec(ctx, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")
					return "", err
				}
				return level(ctx)(tx)
			}); err != nil {
				return nil, err
			}
			if fails {
				_, err := postgres.Phase(ctx, "fails", func(pgx.Tx) (string, error) { return "", pgx.ErrNoRows })
				return nil, err
			}
			_, err := level(ctx)(postgres.Tx(ctx))
			return said(201), err
		})
		r.Engine = idempotency.NewEngine(testservice.Open(t, r.URL, &postgres.Options{Isolation: set}), nil)
		if result := r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown); errors.Is(result.Err, idempotency.ErrKeyRecorded) {
			t.Errorf("%v", result.Err)
		}
		fails = false
		r.due(t)
		r.want(t, idempotency.OutcomeExecuted, "")
		if runs != 2 {
			t.Errorf("%d runs", runs)
		}
	}
}

// Between phases no connection is held: a pool of one serves another use.
func TestNoConnectionIsHeldBetweenPhases(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	engine := idempotency.NewEngine(b.store, nil)
	req := request("k", "")
	req.Resumable, req.Stored = "topup/1", func() []byte { return nil }
	free := func(when string) {
		if n := b.pool.Stat().AcquiredConns(); n != 0 {
			t.Errorf("%s: %d connections are held", when, n)
		}
		if n := b.count(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"); n != 0 {
			t.Errorf("%s: %d locks are held", when, n)
		}
	}
	result := engine.Do(t.Context(), req, func(ctx context.Context) (*idempotency.Answer, error) {
		for _, name := range []string{"first", "second"} {
			if _, err := postgres.Phase(ctx, name, insert(ctx, name)); err != nil {
				return nil, err
			}
			free("after the " + name)
		}
		if _, err := postgres.Phase(ctx, "declined", func(tx pgx.Tx) (hold, error) { return hold{}, outside.Declined(errors.New("no"), nil) }); !errors.Is(err, outside.ErrDeclined) {
			return nil, err
		}
		free("after the declined")
		if _, err := postgres.Phase(ctx, "failed", func(tx pgx.Tx) (hold, error) { return hold{}, pgx.ErrNoRows }); err != pgx.ErrNoRows {
			return nil, err
		}
		free("after the failed")
		return said(201), nil
	})
	want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown) // the failed one is to run again
}

// While a phase runs nobody takes the request over, even if its lease has run out.
func TestKeyIsInProgressDuringAPhase(t *testing.T) {
	t.Parallel()
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		for _, name := range []string{"first", "second"} {
			if name == "second" { // even if its lease has run out
				r.due(t)
			}
			if _, err := postgres.Phase(ctx, name, func(tx pgx.Tx) (h hold, err error) {
				if h, err = insert(ctx, name)(tx); err != nil {
					return h, err
				}
				other := r.Engine.Do(t.Context(), r.request(), func(context.Context) (*idempotency.Answer, error) { return said(201), errors.New("ran") })
				if other.Outcome == idempotency.OutcomeExecuted || other.Outcome == idempotency.OutcomeNotExecuted {
					t.Errorf("during the %s: %+v", name, other)
				}
				return h, nil
			}); err != nil {
				return nil, err
			}
		}
		return said(201), nil
	})
	r.want(t, idempotency.OutcomeExecuted, "")
	if names := r.names(t); names != "first second" {
		t.Errorf("wrote %q", names)
	}
}

// An error of the database gives up the locks of a phase's transaction at once, so another owner
// may take the request over while the phase is slow. Its decision is refused then.
func TestDecisionOfAReplacedOwnerIsRefused(t *testing.T) {
	t.Parallel()
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := postgres.Phase(ctx, "hold", insert(ctx, "hold")); err != nil {
			return nil, err
		}
		_, err := postgres.Phase(ctx, "settle", func(tx pgx.Tx) (hold, error) {
			if _, err := tx.Exec(ctx, "SELECT 1/0"); err == nil {
				t.Error("no error")
			}
			r.due(t)
			other := r.Engine.Do(t.Context(), r.request(), func(ctx context.Context) (*idempotency.Answer, error) {
				_, err := postgres.Phase(ctx, "hold", insert(ctx, "hold"))
				return said(500), err
			})
			want(t, other, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
			return hold{}, outside.Declined(errors.New("it was closed"), nil)
		})
		if errors.Is(err, outside.ErrDeclined) || !errors.Is(err, idempotency.ErrFenced) {
			t.Errorf("%v", err)
		}
		return said(409), nil
	})
	if result := r.do(t); result.Outcome == idempotency.OutcomeExecuted || result.Outcome == idempotency.OutcomeNotExecuted {
		t.Errorf("%+v", result)
	}
	if n := r.Count(t, "SELECT count(*) FROM idempotency_effects WHERE name = 'settle'"); n != 0 || r.open(t) != 1 {
		t.Errorf("%d recorded, %d open", n, r.open(t))
	}
}

// Each phase begins a new lease.
func TestPhaseBeginsALease(t *testing.T) {
	t.Parallel()
	var r *resumable
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		for _, name := range []string{"first", "second"} {
			if _, err := postgres.Phase(ctx, name, insert(ctx, name)); err != nil {
				return nil, err
			}
			if n := r.Count(t, "SELECT count(*) FROM idempotency_open WHERE owned AND next_at > now()"); n != 1 {
				t.Errorf("after the %s: %d within a lease", name, n)
			}
			r.due(t)
		}
		return said(201), nil
	})
	r.want(t, idempotency.OutcomeExecuted, "")
}

// The limit of an output, from both sides, and outputs that can't be recorded.
func TestLimitOfAPhasesOutput(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		output any
		ok     bool
	}{
		"the largest":  {strings.Repeat("x", postgres.PhaseOutputBytesMax-2), true},
		"a larger one": {strings.Repeat("x", postgres.PhaseOutputBytesMax-1), false},
		"not JSON":     {func() {}, false},
		"nil":          {nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				out, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (any, error) {
					if _, err := insert(ctx, "hold")(tx); err != nil {
						return nil, err
					}
					return c.output, nil
				})
				if (err == nil) != c.ok || c.ok && out != c.output {
					t.Errorf("%v, %v", out, err)
				}
				if err != nil {
					return said(500), nil
				}
				return said(201), nil
			})
			if result := r.do(t); (result.Outcome == idempotency.OutcomeExecuted) != c.ok {
				t.Errorf("%+v", result)
			}
			if names := r.names(t); (names == "hold") != c.ok {
				t.Errorf("wrote %q", names)
			}
		})
	}
}

// An output that this version of the program can't read waits for one that can.
func TestOutputThatDoesNotFitTheProgramIsLeft(t *testing.T) {
	t.Parallel()
	r := newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := postgres.Phase(ctx, "hold", insert(ctx, "hold"))
		return nil, errors.Join(err, errors.New("died"))
	})
	r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	r.run = func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := postgres.Phase(ctx, "hold", func(pgx.Tx) (string, error) { panic("it ran") })
		if errors.Is(err, idempotency.ErrKeyRecorded) { // of a run that has not claimed the key
			return nil, err
		}
		if !errors.Is(err, idempotency.ErrUnsettled) || !errors.As(err, new(*json.UnmarshalTypeError)) {
			t.Errorf("%v", err)
		}
		return said(201), nil
	}
	r.due(t)
	r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	r.run = func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := postgres.Phase(ctx, "hold", insert(ctx, "hold"))
		return said(201), err
	}
	r.due(t)
	r.want(t, idempotency.OutcomeExecuted, "")
	if names := r.names(t); names != "hold" {
		t.Errorf("wrote %q", names)
	}
}

// A phase costs the claim or a BEGIN, its statements, and its COMMIT. The steps after it cost the
// same as without the phase, except that a last transaction has to begin once more.
func TestGateRoundTripsOfAPhase(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
	engine := idempotency.NewEngine(b.store, nil)
	charge := outside.New("charge", outside.Effect[int, int]{Do: func(_ context.Context, _ string, in int) (int, error) { return in, nil }})
	phase := func(ctx context.Context, name string, end error) error {
		_, err := postgres.Phase(ctx, name, func(tx pgx.Tx) (hold, error) {
			if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", name); err != nil {
				return hold{}, err
			}
			return hold{}, end
		})
		if end != nil && errors.Is(err, outside.ErrDeclined) {
			return nil
		}
		return err
	}
	call := func(ctx context.Context) error { _, err := charge.Call(ctx, 1); return err }
	two := func(ctx context.Context) error {
		for range 2 {
			if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", "last"); err != nil {
				return err
			}
		}
		return nil
	}
	cost := func(key string, status int, steps ...func(ctx context.Context) error) int {
		req := request(key, "")
		req.Resumable, req.Stored = "payout/1", func() []byte { return nil }
		before := b.wire.Count()
		result := engine.Do(t.Context(), req, func(ctx context.Context) (*idempotency.Answer, error) {
			for _, step := range steps {
				if err := step(ctx); err != nil {
					return nil, err
				}
			}
			return said(status), nil
		})
		want(t, result, idempotency.OutcomeExecuted, "")
		return b.wire.Count() - before
	}
	before := func(ctx context.Context) error { return phase(ctx, "hold", nil) }
	after := func(ctx context.Context) error { return phase(ctx, "settle", nil) }
	declined := func(ctx context.Context) error { return phase(ctx, "settle", outside.Declined(errors.New("no"), nil)) }
	cost("warm", 201, before, call, two)
	for name, c := range map[string]struct{ got, want int }{
		"two statements":                   {cost("a", 201, two), 4},                 // as a plain transaction
		"call, two statements":             {cost("b", 201, call, two), 5},           // intent; result and begin; 2; end
		"phase, call, two statements":      {cost("c", 201, before, call, two), 8},   // claim, 1, commit; intent; result and begin; 2; end
		"phase, two statements":            {cost("d", 201, before, two), 7},         // claim, 1, commit; begin; 2; end
		"phase":                            {cost("e", 201, before), 4},              // claim, 1, commit; end
		"phase, refused":                   {cost("f", 402, before), 4},              // the same
		"phase, call, phase":               {cost("g", 201, before, call, after), 8}, // claim, 1, commit; intent; result and begin; 1, commit; end
		"phase, declined phase":            {cost("h", 201, before, declined), 7},    // claim, 1, commit; begin, 1, commit; end
		"declined phase":                   {cost("i", 402, declined), 4},            // claim, 1, commit; end
		"call, phase":                      {cost("j", 201, call, after), 5},         // intent; result and begin; 1, commit; end
		"phase, phase, without a last one": {cost("k", 201, before, after), 7},       // claim, 1, commit; begin, 1, commit; end
	} {
		if c.got != c.want {
			t.Errorf("%s: %d round trips, want %d", name, c.got, c.want)
		}
	}
}
