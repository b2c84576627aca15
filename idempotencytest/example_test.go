package idempotencytest_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/idempotencytest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A processor loses the reply to its first request. The same key gets the same result.
func ExampleProcessor() {
	type Charge struct{ ID string }
	psp := &idempotencytest.Processor[int, Charge]{
		Serve: func(key string, amount int) (Charge, error) { return Charge{fmt.Sprint("ch_", amount)}, nil },
		FaultOf: func(_ string, asked int) idempotencytest.Fault {
			if asked == 1 {
				return idempotencytest.LostReply
			}
			return idempotencytest.NoFault
		},
	}
	for range 2 {
		fmt.Println(psp.Do(context.Background(), "a derived key", 900))
	}
	for _, served := range psp.Served() {
		fmt.Println(served.In, served.Out, "asked", served.Asked, "times")
	}
	// Output:
	// {} there was no reply
	// {ch_900} <nil>
	// 900 {ch_900} asked 2 times
}

// A test of a handler that charges cards: each charge is posted once, whatever crashes.
func ExampleRun() {
	var (
		t     *testing.T      // of your test
		store *postgres.Store // postgres.Open and migrations.Up, on a database of the test
	)
	type Charge struct {
		ID     string
		Amount int
	}
	psp := &idempotencytest.Processor[int, Charge]{
		Serve: func(key string, amount int) (Charge, error) { return Charge{key, amount}, nil },
	}
	charge := effect.New("charge", effect.Effect[int, Charge]{Do: psp.Do})

	var idem *middleware.Middleware
	test := func(t *testing.T) {
		idempotencytest.Run(t, idempotencytest.Config{
			Store: store,
			New: func(store idempotency.Store) http.Handler {
				scope := func(*http.Request) (string, error) { return "acme", nil }
				idem = middleware.New(store, scope, &middleware.Options{Resumable: "topup/1"})
				return idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					paid, err := charge.Call(r.Context(), 900)
					switch {
					case errors.Is(err, effect.ErrDeclined):
						w.WriteHeader(http.StatusPaymentRequired)
						return
					case err != nil:
						return // not settled: the answer is dropped
					}
					if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO postings VALUES ($1, $2)", paid.ID, paid.Amount); err != nil {
						w.WriteHeader(http.StatusInternalServerError)
						return
					}
					w.WriteHeader(http.StatusCreated)
				}))
			},
			Resume: func(ctx context.Context, key idempotency.Key) idempotency.Result { return idem.Resume(ctx, key) },
			Request: func(n int) *http.Request {
				return httptest.NewRequest(http.MethodPost, fmt.Sprint("/topups/", n), nil)
			},
			Invariant: func(ctx context.Context, told idempotencytest.Told) error {
				rows, err := store.Pool().Query(ctx, "SELECT id, amount FROM postings")
				if err != nil {
					return err
				}
				posted, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Charge])
				if charges := psp.Served(); err == nil && (len(posted) != len(charges) || len(charges) != len(told.Acknowledged)) {
					err = fmt.Errorf("%d charges, %d postings, %d acknowledged", len(charges), len(posted), len(told.Acknowledged))
				}
				return err
			},
		})
	}
	_, _ = t, test // func TestTopUpsOutliveCrashes(t *testing.T)
}
