package postgres_test

import (
	"context"
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// With another client_encoding the server reads another scope from the same bytes: the look-up
// misses, the primary key does not conflict, and the handler pays again.
func TestHandlersEncodingCannotHideTheRecord(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	req := request("k", "")
	req.Key.Scope = "café"
	set := func(sql string) func(context.Context, pgx.Tx) int {
		return func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			if _, err := tx.Exec(ctx, sql); err != nil {
				t.Error(err)
			}
			return 201
		}
	}
	t.Run("of this transaction", func(t *testing.T) {
		t.Parallel()
		b := setup(t, nil)
		want(t, b.do(t, req, set("SET LOCAL client_encoding = 'LATIN1'")), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeReplayed, "")
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want 1", n)
		}
	})
	t.Run("left on a connection", func(t *testing.T) {
		t.Parallel()
		b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 2 }})
		if _, err := b.pool.Exec(ctx, "SET client_encoding = 'LATIN1'"); err != nil {
			t.Fatal(err)
		}
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		busy, err := b.pool.Acquire(ctx) // the one that was just used: the retry gets another
		if err != nil {
			t.Fatal(err)
		}
		defer busy.Release()
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeReplayed, "")
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want 1", n)
		}
	})
}

// U+FF0D and U+2212 are one character in EUC_JP: two accounts would share a record.
func TestEncodingThatMakesOneScopeOfTwoIsRefused(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	admin := setup(t, nil)
	name := "euc_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	create := func(name, how string) string {
		admin.exec(t, "CREATE DATABASE "+name+" "+how)
		t.Cleanup(func() { admin.exec(t, "DROP DATABASE "+name+" WITH (FORCE)") })
		address, err := url.Parse(admin.pool.Config().ConnString())
		if err != nil {
			t.Fatal(err)
		}
		address.Path = "/" + name
		return address.String()
	}
	b := setup(t, &setupOptions{database: create(name, "ENCODING 'EUC_JP' LOCALE 'C' TEMPLATE template0")})
	for _, scope := range []string{"\uff0d", "\u2212"} {
		req := request("k", "")
		req.Key.Scope = scope
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	}
	if n := b.effects(t); n != 0 {
		t.Errorf("%d effects, want none", n)
	}
	err := b.store.Check(ctx)
	if !errors.Is(err, postgres.ErrEncodingUnsafe) {
		t.Fatalf("got %v", err)
	}
	_, remedy, _ := strings.Cut(err.Error(), "CREATE DATABASE ... ")
	b = setup(t, &setupOptions{database: create(name+"_2", remedy)})
	if err := b.store.Check(ctx); err != nil {
		t.Errorf("in a database made as it says: %v", err)
	}
	for i, scope := range []string{"\uff0d", "\u2212"} {
		req := request("k", "")
		req.Key.Scope = scope
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		if n := b.effects(t); n != i+1 {
			t.Errorf("%d effects, want %d", n, i+1)
		}
	}
}
