package idempotencytest

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// seeded is a bug, and the check that finds it in a part of the run.
type seeded struct {
	part  string // the name of a point, Storm, Scope, Replay, or Prepare
	check string
	plant func(b *testBundle)
	waits bool // it makes the run wait for its whole patience
}

var bugs = map[string]seeded{
	"handler writes on a connection of its own": {string(crashpoint.AfterHandler), checkInvariant, func(b *testBundle) {
		b.pay = func(w http.ResponseWriter, r *http.Request, n int, amount int64) {
			if amount < 0 {
				pay(w, r, n, amount)
				return
			}
			if err := insert(context.Background(), b.pool, n); err != nil {
				http.Error(w, "the payment failed", http.StatusInternalServerError)
				return
			}
			paid(w, n)
		}
	}, false},
	"handler pays twice": {"Prepare", checkInvariant, func(b *testBundle) {
		b.pay = func(w http.ResponseWriter, r *http.Request, n int, amount int64) {
			_ = insert(r.Context(), postgres.Tx(r.Context()), n)
			pay(w, r, n, amount)
		}
	}, false},
	"handler answers 201 whatever became of its statement": {string(crashpoint.HandlerCanceled), checkInvariant, func(b *testBundle) {
		b.pay = func(w http.ResponseWriter, r *http.Request, n int, amount int64) {
			if amount < 0 {
				pay(w, r, n, amount)
				return
			}
			_ = insert(r.Context(), postgres.Tx(r.Context()), n)
			paid(w, n)
		}
	}, false},
	"handler declines where it was cut off": {string(crashpoint.HandlerCanceled), checkAccepted, func(b *testBundle) {
		b.pay = func(w http.ResponseWriter, r *http.Request, n int, amount int64) {
			if r.Context().Err() != nil {
				http.Error(w, "the payment failed", http.StatusConflict)
				return
			}
			pay(w, r, n, amount)
		}
	}, false},
	"handler notes in memory that it has paid": {string(crashpoint.BeforeCommit), checkInvariant, func(b *testBundle) {
		var done sync.Map
		b.pay = func(w http.ResponseWriter, r *http.Request, n int, amount int64) {
			if _, again := done.LoadOrStore(n, true); again {
				paid(w, n)
				return
			}
			pay(w, r, n, amount)
		}
	}, false},
	"fingerprint without the body": {"Prepare", checkChanged, func(b *testBundle) {
		b.options.Fingerprinters = []middleware.Fingerprinter{{Version: 100, Content: func(r *http.Request, _ []byte) []byte {
			return []byte(r.URL.Path)
		}}}
	}, false},
	"record in a transaction of its own": {string(crashpoint.MidCommit), checkInvariant, func(b *testBundle) {
		b.store = &wrapped{Store: b.store, begin: func(ctx context.Context, s idempotency.Store, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
			kept, record, err := s.Begin(ctx, claim)
			if kept == nil {
				return nil, record, err
			}
			_ = kept.Rollback(ctx)
			keyless := *claim
			keyless.Key.Value = ""
			writes, _, err := s.Begin(ctx, &keyless)
			if err != nil {
				return nil, nil, err
			}
			return &twice{Attempt: writes, store: s, claim: claim}, nil, nil
		}}
	}, false},
	"record kept before COMMIT": {string(crashpoint.MidCommit), checkInvariant, func(b *testBundle) {
		var cache sync.Map
		b.store = &wrapped{Store: b.store, begin: func(ctx context.Context, s idempotency.Store, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
			if record, ok := cache.Load(claim.Key); ok {
				return nil, record.(*idempotency.Record), nil
			}
			a, record, err := s.Begin(ctx, claim)
			if a == nil {
				return nil, record, err
			}
			return &early{Attempt: a, keep: func(answer *idempotency.Answer) {
				cache.Store(claim.Key, &idempotency.Record{Fingerprint: claim.Fingerprint, Attempt: claim.Attempt, Answer: *answer})
			}}, nil, nil
		}}
	}, false},
	"lost COMMIT is taken for none": {string(crashpoint.CommitLost), checkInvariant, func(b *testBundle) {
		b.store = &wrapped{Store: b.store, resolve: func(context.Context, idempotency.Store, *idempotency.Claim) (*idempotency.Record, error) {
			return nil, nil
		}}
	}, false},
	"lost COMMIT is taken for one that happened": {string(crashpoint.CommitNeverArrived), checkPoint, func(b *testBundle) {
		b.store = &wrapped{Store: b.store, resolve: func(_ context.Context, _ idempotency.Store, claim *idempotency.Claim) (*idempotency.Record, error) {
			return &idempotency.Record{Attempt: claim.Attempt, Fingerprint: claim.Fingerprint}, nil
		}}
	}, false},
	"scope left out": {"Scope", checkScope, func(b *testBundle) {
		b.store = &wrapped{
			Store: b.store,
			begin: func(ctx context.Context, s idempotency.Store, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
				all := *claim
				all.Key.Scope = "all"
				return s.Begin(ctx, &all)
			},
		}
	}, false},
	"replay of other bytes": {"Prepare", checkOneAnswer, func(b *testBundle) {
		b.store = &wrapped{Store: b.store, begin: func(ctx context.Context, s idempotency.Store, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
			a, record, err := s.Begin(ctx, claim)
			if record != nil {
				record.Answer.Body = append(record.Answer.Body, '\n')
			}
			return a, record, err
		}}
	}, false},
	"replay without a header": {"Prepare", checkOneAnswer, func(b *testBundle) {
		b.store = &wrapped{Store: b.store, begin: func(ctx context.Context, s idempotency.Store, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
			a, record, err := s.Begin(ctx, claim)
			if record != nil {
				delete(record.Answer.Header, "Location")
			}
			return a, record, err
		}}
	}, false},
	"rollback that keeps the transaction": {string(crashpoint.AfterBegin), checkSettled, func(b *testBundle) {
		b.store = &wrapped{Store: b.store, begin: func(ctx context.Context, s idempotency.Store, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
			a, record, err := s.Begin(ctx, claim)
			if a == nil {
				return nil, record, err
			}
			kept := &keeper{Attempt: a}
			b.left(kept)
			return kept, nil, nil
		}}
	}, true},
	"record is deleted before its time": {"Replay", checkOnce, func(b *testBundle) {
		invariant, asked := b.check, 0
		b.check = func(ctx context.Context, told Told) error {
			if asked++; asked == 2 { // before the first request, and after it
				if _, err := b.pool.Exec(ctx, "DELETE FROM idempotency_keys"); err != nil {
					return err
				}
			}
			return invariant(ctx, told)
		}
	}, false},
	"middleware is not mounted": {"Prepare", checkTable, func(b *testBundle) { b.unmounted = true }, false},
}

// TestSeededBugsAreFound: a check that cannot fail guards nothing.
func TestSeededBugsAreFound(t *testing.T) {
	t.Parallel()
	for name, bug := range bugs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			bug.plant(b)
			found := prove(t, b.config(), bug.part, bug.patience())
			if !slices.ContainsFunc(found, func(f finding) bool { return f.check == bug.check }) {
				t.Errorf("%s does not find it by %q: %q", bug.part, bug.check, found)
			}
		})
	}
}

// TestEveryCheckIsSeenToFail: each check has a bug that only it finds.
func TestEveryCheckIsSeenToFail(t *testing.T) {
	t.Parallel()
	// These fail below, and in idempotencytest_test.go.
	elsewhere := []string{checkHits, checkConfig, checkRest, checkRecord}
	for _, check := range []string{
		checkTable, checkSettled, checkOnce, checkOneAnswer, checkAccepted, checkChanged, checkPoint, checkHits, checkRest,
		checkRecord, checkScope, checkInvariant, checkConfig, checkParked,
	} {
		found := slices.Contains(elsewhere, check)
		for _, bug := range callBugs {
			found = found || bug.check == check
		}
		for _, bug := range bugs {
			found = found || bug.check == check
		}
		if !found {
			t.Errorf("no bug is found by %q", check)
		}
	}
}

// The checks that look into the store find the same bugs, even if the user's invariant is weak.
func TestStoreIsLookedAtToo(t *testing.T) {
	t.Parallel()
	blind := func(context.Context, Told) error { return nil }
	t.Run("given up and recorded", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		bugs["lost COMMIT is taken for none"].plant(b)
		b.check = blind
		wantFinding(t, prove(t, b.config(), string(crashpoint.CommitLost), 0), checkRecord)
	})
	t.Run("left open", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		bugs["lost COMMIT is taken for none"].plant(b)
		bugs["rollback that keeps the transaction"].plant(b)
		b.check = blind
		wantFinding(t, prove(t, b.config(), string(crashpoint.CommitNeverArrived), impatient), checkRest)
	})
}

// impatient is the patience of a run that will wait in vain.
const impatient = 1500 * time.Millisecond

func (s seeded) patience() time.Duration {
	if s.waits {
		return impatient
	}
	return 20 * time.Second
}

// prove runs the named part, after the preparation of every run.
func prove(t *testing.T, config Config, part string, patience time.Duration) []finding {
	t.Helper()
	config.Patience = patience
	full, err := config.full()
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(full)
	defer l.close()
	found := l.prepare(t.Context())
	if part == "Prepare" {
		return found
	}
	if len(found) > 0 {
		t.Fatalf("it is found before %s: %q", part, found)
	}
	switch part {
	case "Storm":
		return l.storm(t.Context())
	case "Scope":
		return l.scope(t.Context())
	case "Replay":
		return l.replay(t.Context())
	}
	for _, p := range plans() {
		if string(p.point) == part {
			return l.crash(t.Context(), p)
		}
	}
	t.Fatalf("there is no part %s", part)
	return nil
}

func wantFinding(t *testing.T, found []finding, check string) {
	t.Helper()
	if !slices.ContainsFunc(found, func(f finding) bool { return f.check == check }) {
		t.Errorf("found %q, want %q among it", found, check)
	}
}

// wrapped is a store with a bug.
type wrapped struct {
	idempotency.Store
	begin   func(context.Context, idempotency.Store, *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error)
	resolve func(context.Context, idempotency.Store, *idempotency.Claim) (*idempotency.Record, error)
}

func (w *wrapped) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	if w.begin == nil {
		return w.Store.Begin(ctx, claim)
	}
	return w.begin(ctx, w.Store, claim)
}

func (w *wrapped) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	if w.resolve == nil {
		return w.Store.Resolve(ctx, claim)
	}
	return w.resolve(ctx, w.Store, claim)
}

// twice commits the writes, and then the record.
type twice struct {
	idempotency.Attempt
	store idempotency.Store
	claim *idempotency.Claim
}

func (a *twice) Commit(ctx context.Context, answer *idempotency.Answer) error {
	if err := a.Attempt.Commit(ctx, answer); err != nil {
		return err
	}
	record, _, err := a.store.Begin(ctx, a.claim)
	if record == nil {
		return errors.Join(idempotency.ErrUnknown, err)
	}
	return record.Commit(ctx, answer)
}

func (a *twice) Decline(ctx context.Context, answer *idempotency.Answer) error {
	if err := a.Rollback(ctx); err != nil {
		return err
	}
	record, _, err := a.store.Begin(ctx, a.claim)
	if record == nil {
		return errors.Join(idempotency.ErrUnknown, err)
	}
	return record.Decline(ctx, answer)
}

// early keeps the answer before it commits it.
type early struct {
	idempotency.Attempt
	keep func(*idempotency.Answer)
}

func (a *early) Commit(ctx context.Context, answer *idempotency.Answer) error {
	a.keep(answer)
	return a.Attempt.Commit(ctx, answer)
}

// keeper does not roll back.
type keeper struct {
	idempotency.Attempt
	committed bool
}

func (k *keeper) Commit(ctx context.Context, answer *idempotency.Answer) error {
	k.committed = true
	return k.Attempt.Commit(ctx, answer)
}

func (k *keeper) Decline(ctx context.Context, answer *idempotency.Answer) error {
	k.committed = true
	return k.Attempt.Decline(ctx, answer)
}

func (*keeper) Rollback(context.Context) error { return nil }
