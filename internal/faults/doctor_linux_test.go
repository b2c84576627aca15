package faults_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// operate returns an operator on a pool that may lead to a pooler.
func operate(t *testing.T, databaseURL string) *operator.Operator {
	t.Helper()
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return operator.New(postgres.New(pool, nil), nil)
}

// finding returns the doctor's first finding of a check.
func finding(t *testing.T, o *operator.Operator, check string) operator.Finding {
	t.Helper()
	for _, f := range o.Doctor(t.Context()) {
		if f.Check == check {
			return f
		}
	}
	t.Fatalf("nothing of %s", check)
	panic("unreachable")
}

// The doctor detects PgBouncer, and its mode. An operator's acts work through it.
func TestDoctorKnowsPgBouncer(t *testing.T) {
	t.Parallel()
	b := startBouncer(t, nil)
	o := operate(t, b.url)
	if f := finding(t, o, "pooler"); f.Level != operator.LevelWarn || !strings.Contains(f.What, "per transaction") || !strings.Contains(f.Remedy, "TransactionPooling") {
		t.Errorf("through PgBouncer: %+v", f)
	}
	if f := finding(t, operate(t, b.direct), "pooler"); f.Level != operator.LevelOK || f.What != "none in between" {
		t.Errorf("without it: %+v", f)
	}
	s := b.serve(t, pgx.QueryExecModeExec, nil)
	if got, err := s.pay("canary"); err != nil || !got.is(201, "executed") {
		t.Fatalf("%+v, %v", got, err)
	}
	list, err := o.List(t.Context(), operator.Filter{}, operator.Page{})
	if err != nil || len(list.Records) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	key := list.Records[0].Key
	act := operator.Act{Actor: "alice", Reason: "test"}
	if _, err := o.Expire(t.Context(), key, act); err != nil {
		t.Error(err)
	}
	if _, err := o.Delete(t.Context(), key, act); err != nil {
		t.Error(err)
	}
	if events, err := o.Timeline(t.Context(), key); err != nil || len(events) != 2 {
		t.Errorf("%+v, %v", events, err)
	}
	b.settingsAreUntouched(t)
}

// An asynchronous standby can lose commits that its primary confirmed, and is itself no place for a
// service.
func TestDoctorKnowsStandbys(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	if f := finding(t, operate(t, p.primary.URL()), "replication"); f.Level != operator.LevelWarn || !strings.Contains(f.What, "none of them synchronous") {
		t.Errorf("an asynchronous standby: %+v", f)
	}
	standby := operate(t, p.standby.URL())
	if f := finding(t, standby, "primary"); f.Level != operator.LevelFail || !strings.Contains(f.Remedy, "primary") {
		t.Errorf("the standby: %+v", f)
	}
	if _, err := standby.List(t.Context(), operator.Filter{}, operator.Page{}); err != nil {
		t.Errorf("a standby can be looked at: %v", err)
	}
	if _, err := standby.Delete(t.Context(), idempotency.Key{Scope: "acme", Value: "canary"}, operator.Act{Actor: "alice", Reason: "test"}); err == nil || !strings.Contains(err.Error(), "connect to the primary") {
		t.Errorf("an act on a standby: %v", err)
	}
}
