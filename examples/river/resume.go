package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/riverqueue/river"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// resume is the job that ends the request with this key.
type resume struct {
	Scope string `json:"scope"`
	Key   string `json:"key"`
}

func (resume) Kind() string { return "resume" }

// resumer runs the handler of an open request again until the request has ended. It does what a
// completer does, at the times that the queue chooses.
func resumer(idem *middleware.Middleware) river.Worker[resume] {
	return river.WorkFunc(func(ctx context.Context, job *river.Job[resume]) error {
		result := idem.Resume(ctx, idempotency.Key{Scope: job.Args.Scope, Value: job.Args.Key})
		switch {
		case result.Answer != nil, errors.Is(result.Err, idempotency.ErrNotOpen):
			return nil
		case result.Reason == idempotency.ReasonNeedsAttention:
			return river.JobCancel(errors.New("only a person can end the request: see idemctl effect list"))
		}
		return river.JobSnooze(max(result.RetryAfter, time.Second))
	})
}

// resumeAfter is the time from the first run of the handler to the first run of the job.
const resumeAfter = 5 * time.Second

// topUp charges a card and credits the account.
func (b *bank) topUp(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	var p payment
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil || p.Card == "" || p.Amount <= 0 {
		http.Error(w, "send a card and a positive amount", http.StatusBadRequest)
		return
	}
	key, _ := idempotency.KeyFrom(ctx)
	// The job is committed before the card is charged, so that another process ends the request if
	// this one dies.
	if _, err := postgres.Phase(ctx, "job", func(tx pgx.Tx) (int64, error) {
		inserted, err := b.jobs.InsertTx(ctx, tx, resume{key.Scope, key.Value}, &river.InsertOpts{ScheduledAt: time.Now().Add(resumeAfter)})
		if err != nil {
			return 0, err
		}
		return inserted.Job.ID, nil
	}); err != nil {
		http.Error(w, "the top-up failed", http.StatusInternalServerError)
		return
	}
	paid, err := b.charge.Call(ctx, p)
	switch {
	case errors.Is(err, effect.ErrDeclined):
		http.Error(w, "the card was declined", http.StatusPaymentRequired)
		return
	case err != nil:
		return // not settled: the job goes on
	}
	if _, err := postgres.Tx(ctx).Exec(ctx, credit, paid.ID, key.Scope, paid.Amount); err != nil {
		http.Error(w, "the top-up failed", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(paid)
}

const credit = `
	WITH posted AS (INSERT INTO river_example.topups (charge, account, amount) VALUES ($1, $2, $3) RETURNING account, amount)
	UPDATE river_example.accounts SET balance = balance + posted.amount FROM posted WHERE name = posted.account`

type payment struct {
	Card   string `json:"card"`
	Amount int64  `json:"amount"`
}

type charged struct {
	ID     string `json:"id"`
	Amount int64  `json:"amount"`
}

// chargeFunc charges a card at another service, which recognizes a repeated charge by its key.
type chargeFunc = func(ctx context.Context, key string, p payment) (charged, error)

func newCharge(charge chargeFunc) *effect.Declared[payment, charged] {
	return effect.New("charge", effect.Effect[payment, charged]{Do: charge, KeyLifetime: 24 * time.Hour, KeepsDeclines: true})
}

// cards stands in for a service that charges cards. The reply to each charge is lost once.
type cards struct {
	mu   sync.Mutex
	made map[string]charged
}

func (c *cards) charge(_ context.Context, key string, p payment) (charged, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if made, ok := c.made[key]; ok {
		return made, nil
	}
	if c.made == nil {
		c.made = map[string]charged{}
	}
	c.made[key] = charged{fmt.Sprintf("ch_%d", len(c.made)+1), p.Amount}
	return charged{}, errors.New("the reply is lost")
}
