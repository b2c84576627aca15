package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/rivertype"

	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the middleware logs failures
	pgtest.Main(m)
}

const waitMax = 60 * time.Second

type testBundle struct {
	pool  *pgxpool.Pool
	idem  *middleware.Middleware
	store *postgres.Store
	jobs  *river.Client[pgx.Tx]
}

func setup(t *testing.T) *testBundle {
	t.Helper()
	store, err := open(t.Context(), pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	idem := middleware.New(store, accountID, nil)
	jobs, err := newJobs(store.Pool(), idem)
	if err != nil {
		t.Fatal(err)
	}
	return &testBundle{pool: store.Pool(), idem: idem, store: store, jobs: jobs}
}

func (b *testBundle) wantJobs(t *testing.T, when string, want int) {
	t.Helper()
	var n int
	if err := b.pool.QueryRow(t.Context(), "SELECT count(*) FROM river_job").Scan(&n); err != nil {
		t.Fatal(err)
	}
	if n != want {
		t.Errorf("%s: %d jobs, want %d", when, n, want)
	}
}

// post sends a transfer with a key, and wants this answer.
func post(t *testing.T, handler http.Handler, key, body string, status int, outcome string) {
	t.Helper()
	postTo(t, handler, "/transfers", key, body, status, outcome)
}

func postTo(t *testing.T, handler http.Handler, path, key, body string, status int, outcome string) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader(body))
	r.Header.Set("Account", "alice")
	r.Header.Set("Idempotency-Key", key)
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	if got := w.Header().Get("Idempotency-Status"); w.Code != status || got != outcome {
		t.Errorf("%s: %d %s, want %d %s: %s", key, w.Code, got, status, outcome, w.Body)
	}
}

// A payment has one job and one receipt, however often it is sent. A declined or failed one has
// none.
func TestOneReceiptForEachPayment(t *testing.T) {
	t.Parallel()
	b := setup(t)
	handler := newHandler(b.store, b.idem, b.jobs, new(cards).charge)
	const paid = `{"to":"bob","amount":1250}`
	post(t, handler, "paid", paid, http.StatusCreated, "executed")
	b.wantJobs(t, "paid", 1)
	post(t, handler, "paid", paid, http.StatusCreated, "replayed")
	b.wantJobs(t, "sent again", 1)
	post(t, handler, "paid", `{"to":"bob","amount":1}`, http.StatusUnprocessableEntity, "mismatch")
	b.wantJobs(t, "another request with the key", 1)
	post(t, handler, "too-much", `{"to":"bob","amount":20000}`, http.StatusPaymentRequired, "executed")
	post(t, handler, "too-much", `{"to":"bob","amount":20000}`, http.StatusPaymentRequired, "replayed")
	b.wantJobs(t, "declined", 1)
	post(t, handler, "nobody", `{"to":"nobody","amount":1}`, http.StatusInternalServerError, "not-executed")
	b.wantJobs(t, "failed", 1)

	done, stop := b.jobs.Subscribe(river.EventKindJobCompleted, river.EventKindJobFailed)
	defer stop()
	if err := b.jobs.Start(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.jobs.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	select {
	case event := <-done:
		if event.Kind != river.EventKindJobCompleted || event.Job.State != rivertype.JobStateCompleted {
			t.Errorf("the job is %s: %v", event.Job.State, event.Job.Errors)
		}
	case <-time.After(waitMax):
		t.Fatal("the job is not done")
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/receipts", nil))
	if got, want := w.Body.String(), `[{"transfer":1,"sent_to":"bob","amount":1250}]`+"\n"; got != want {
		t.Errorf("the receipts are %s, want %s", got, want)
	}
}

// If the reply to a charge is lost, the job ends the top-up, with one charge and one posting. If
// the first run dies before the charge and leaves nothing but the job, the job makes the charge.
func TestJobEndsAnOpenRequest(t *testing.T) {
	t.Parallel()
	b := setup(t)
	service := new(cards)
	dies := true
	handler := newHandler(b.store, b.idem, b.jobs, func(ctx context.Context, key string, p payment) (charged, error) {
		if dies && p.Amount == 700 {
			dies = false
			panic(http.ErrAbortHandler)
		}
		return service.charge(ctx, key, p)
	})
	const lost, died = `{"card":"card-1","amount":500}`, `{"card":"card-1","amount":700}`
	postTo(t, handler, "/topups", "lost", lost, http.StatusServiceUnavailable, "unknown")
	postTo(t, handler, "/topups", "died", died, http.StatusServiceUnavailable, "unknown")
	b.wantJobs(t, "two top-ups are open", 2)

	done, stop := b.jobs.Subscribe(river.EventKindJobCompleted, river.EventKindJobFailed, river.EventKindJobCancelled)
	defer stop()
	if err := b.jobs.Start(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.jobs.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	for range 2 {
		select {
		case event := <-done:
			if event.Kind != river.EventKindJobCompleted || event.Job.State != rivertype.JobStateCompleted {
				t.Errorf("the job is %s: %v", event.Job.State, event.Job.Errors)
			}
		case <-time.After(waitMax):
			t.Fatal("the jobs are not done")
		}
	}
	postTo(t, handler, "/topups", "lost", lost, http.StatusCreated, "replayed")
	postTo(t, handler, "/topups", "died", died, http.StatusCreated, "replayed")
	var balance int64
	if err := b.pool.QueryRow(t.Context(), "SELECT balance FROM river_example.accounts WHERE name = 'alice'").Scan(&balance); err != nil {
		t.Fatal(err)
	}
	if balance != 11200 || len(service.made) != 2 {
		t.Errorf("the balance is %d after %d charges, want 11200 after 2", balance, len(service.made))
	}
}

// A card that is declined gets a 402 for good, and its job finds nothing to do.
func TestDeclinedTopUpIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	handler := newHandler(b.store, b.idem, b.jobs, func(context.Context, string, payment) (charged, error) {
		return charged{}, effect.Declined(errors.New("no money"), nil)
	})
	for _, outcome := range []string{"executed", "replayed"} {
		postTo(t, handler, "/topups", "k", `{"card":"empty","amount":500}`, http.StatusPaymentRequired, outcome)
	}
	b.wantJobs(t, "declined", 1)
}

// Jobs that are enqueued within the transaction are committed or undone with it, in each of River's
// ways. In a handler the pool's own way is refused.
func TestJobsEndAsTheirRequestDoes(t *testing.T) {
	t.Parallel()
	many := func(n int) (params []river.InsertManyParams) {
		for i := range n {
			params = append(params, river.InsertManyParams{Args: receipt{Transfer: int64(i)}})
		}
		return params
	}
	for name, test := range map[string]struct {
		enqueue func(ctx context.Context, jobs *river.Client[pgx.Tx], tx pgx.Tx) error
		jobs    int
	}{
		"InsertTx": {func(ctx context.Context, jobs *river.Client[pgx.Tx], tx pgx.Tx) error {
			_, err := jobs.InsertTx(ctx, tx, receipt{}, nil)
			return err
		}, 1},
		"InsertTx, unique": {func(ctx context.Context, jobs *river.Client[pgx.Tx], tx pgx.Tx) error {
			unique := &river.InsertOpts{UniqueOpts: river.UniqueOpts{ByArgs: true}}
			_, err := jobs.InsertTx(ctx, tx, receipt{}, unique)
			if err == nil {
				_, err = jobs.InsertTx(ctx, tx, receipt{}, unique)
			}
			return err
		}, 1},
		"InsertManyTx": {func(ctx context.Context, jobs *river.Client[pgx.Tx], tx pgx.Tx) error {
			_, err := jobs.InsertManyTx(ctx, tx, many(2))
			return err
		}, 2},
		"InsertManyFastTx": {func(ctx context.Context, jobs *river.Client[pgx.Tx], tx pgx.Tx) error {
			_, err := jobs.InsertManyFastTx(ctx, tx, many(3))
			return err
		}, 3},
		"within a savepoint": {func(ctx context.Context, jobs *river.Client[pgx.Tx], tx pgx.Tx) error {
			return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
				_, err := jobs.InsertTx(ctx, tx, receipt{}, nil)
				return err
			})
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			status := 0
			handler := middleware.New(b.store, accountID, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if err := test.enqueue(r.Context(), b.jobs, postgres.Tx(r.Context())); err != nil {
					t.Error(err)
				}
				w.WriteHeader(status)
			}))
			for _, step := range []struct {
				key     string
				status  int
				outcome string
				jobs    int
			}{
				{"declined", http.StatusPaymentRequired, "executed", 0},
				{"declined", http.StatusPaymentRequired, "replayed", 0},
				{"failed", http.StatusServiceUnavailable, "not-executed", 0},
				{"paid", http.StatusCreated, "executed", test.jobs},
				{"paid", http.StatusCreated, "replayed", test.jobs},
				{"failed", http.StatusCreated, "executed", 2 * test.jobs},
			} {
				status = step.status
				post(t, handler, step.key, "{}", step.status, step.outcome)
				jobs := step.jobs
				if name == "InsertTx, unique" && jobs > 0 {
					jobs = 1 // of all requests: the first is still running
				}
				b.wantJobs(t, step.key+" "+step.outcome, jobs)
			}
		})
	}
	t.Run("Insert", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		handler := middleware.New(b.store, accountID, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := b.jobs.Insert(r.Context(), receipt{}, nil); err == nil {
				t.Error("a handler enqueued a job that no rollback undoes")
			}
			w.WriteHeader(http.StatusPaymentRequired)
		}))
		post(t, handler, "k", "{}", http.StatusPaymentRequired, "executed")
		b.wantJobs(t, "declined", 0)
	})
}
