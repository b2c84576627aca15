package pgintent_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// TestNothingIsSentWithoutARow: a statement that succeeds and writes no row, or another one, keeps
// no intent. The request must not be sent, and the error says so.
func TestNothingIsSentWithoutARow(t *testing.T) {
	t.Parallel()
	const returns = `CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN %; END $$;`
	trigger := func(body, when string) string {
		return strings.Replace(returns, "%", body, 1) + `CREATE TRIGGER t BEFORE ` + when + ` ON idempotency_intents FOR EACH ROW EXECUTE FUNCTION f()`
	}
	for name, one := range map[string]struct {
		sql     string
		kept    bool // by an earlier process, before the database became sick
		outcome error
	}{
		"a trigger that drops the row":     {trigger("RETURN NULL", "INSERT"), false, client.ErrNotExecuted},
		"a trigger that changes the body":  {trigger(`NEW.body = 'other'; RETURN NEW`, "INSERT"), false, client.ErrNotExecuted},
		"a trigger that changes the key":   {trigger(`NEW.key = 'other'; RETURN NEW`, "INSERT"), false, client.ErrUnknown}, // it can't be abandoned
		"a rule that drops the row":        {`CREATE RULE r AS ON INSERT TO idempotency_intents DO INSTEAD NOTHING`, false, client.ErrNotExecuted},
		"a rule that puts it elsewhere":    {`CREATE TABLE others (LIKE idempotency_intents); CREATE RULE r AS ON INSERT TO idempotency_intents DO INSTEAD INSERT INTO others VALUES (NEW.*)`, false, client.ErrNotExecuted},
		"a trigger that fails the commit":  {strings.Replace(returns, "%", `RAISE 'no'`, 1) + `CREATE CONSTRAINT TRIGGER t AFTER INSERT ON idempotency_intents DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION f()`, false, client.ErrNotExecuted},
		"kept, and it can't be taken over": {trigger("RETURN NULL", "UPDATE"), true, client.ErrUnknown},
		"kept, and its holder stays":       {trigger("NEW.holder = OLD.holder; RETURN NEW", "UPDATE"), true, client.ErrUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := setup(t)
			var arrived atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { arrived.Add(1) }))
			defer server.Close()
			send := func() error {
				transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: pgintent.New(pool, nil)})
				r, err := http.NewRequestWithContext(client.WithNewKey(t.Context(), "mine"), http.MethodPost, server.URL, strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				response, err := transport.RoundTrip(r)
				if err == nil {
					_ = response.Body.Close()
				}
				return err
			}
			if one.kept {
				_, err := pgintent.New(pool, nil).Save(t.Context(), &client.Intent{
					Key: idempotency.Key{Value: "mine"}, Method: http.MethodPost, URL: server.URL, Body: []byte("body"),
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			if _, err := pool.Exec(t.Context(), one.sql); err != nil {
				t.Fatal(err)
			}
			err := send()
			if !errors.Is(err, one.outcome) || arrived.Load() != 0 {
				t.Errorf("%d requests arrived: %v", arrived.Load(), err)
			}
			if one.outcome == client.ErrNotExecuted {
				if keys, err := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond}).Pending(t.Context()); err != nil || len(keys) > 0 {
					t.Errorf("%q is left, %v", keys, err)
				}
			}
		})
	}
}

// TestAnUntouchedRowIsNoAbsentRow: if a trigger drops the UPDATE of Take, or the DELETE of Done,
// the call fails. An intent that can't be taken would never be sent, without any error.
func TestAnUntouchedRowIsNoAbsentRow(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	store := pgintent.New(pool, nil)
	if _, err := store.Save(t.Context(), intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	_, err := pool.Exec(t.Context(), `CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
		CREATE TRIGGER t BEFORE UPDATE OR DELETE ON idempotency_intents FOR EACH ROW EXECUTE FUNCTION f()`)
	if err != nil {
		t.Fatal(err)
	}
	if intent, err := store.Take(t.Context(), "k"); intent != nil || err == nil || !strings.Contains(err.Error(), "trigger") {
		t.Errorf("taken: %v, %v", intent, err)
	}
	if err := store.Done(t.Context(), "k"); err == nil || !strings.Contains(err.Error(), "trigger") {
		t.Errorf("done: %v", err)
	}
	if err := store.Abandon(t.Context(), "k"); !errors.Is(err, client.ErrIntentTaken) {
		t.Errorf("abandoned: %v", err)
	}
	if _, err := pool.Exec(t.Context(), "DROP TRIGGER t ON idempotency_intents"); err != nil {
		t.Fatal(err)
	}
	if intent, err := store.Take(t.Context(), "k"); intent == nil || err != nil {
		t.Errorf("after the remedy it is not taken: %v, %v", intent, err)
	}
}

// TestSaveInAnOpenTransactionIsRefused: the intent would not be committed when the request is sent.
// The same holds for the results of Abandon and Take.
func TestSaveInAnOpenTransactionIsRefused(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	pool := setup(t)
	if _, err := pgintent.New(pool, nil).Save(ctx, intenttest.Intent("kept")); err != nil {
		t.Fatal(err)
	}
	pooled, err := pool.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer pooled.Release()
	for name, db := range map[string]pgintent.DB{"a connection": pooled.Conn(), "a pool's connection": pooled} {
		store := pgintent.New(db, &pgintent.Options{PendingAfter: time.Microsecond})
		err := pgx.BeginFunc(ctx, pooled, func(pgx.Tx) error {
			if _, err := store.Save(ctx, intenttest.Intent("k")); !errors.Is(err, client.ErrIntentRefused) {
				t.Errorf("%s: Save: error is %v, want that nothing was changed", name, err)
			}
			if intent, err := store.Take(ctx, "kept"); !errors.Is(err, client.ErrIntentRefused) {
				t.Errorf("%s: Take: %v, %v, want that nothing was changed", name, intent, err)
			}
			if err := store.Abandon(ctx, "kept"); !errors.Is(err, client.ErrIntentRefused) {
				t.Errorf("%s: Abandon: error is %v, want that nothing was changed", name, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		if _, err := store.Save(ctx, intenttest.Intent("k")); err != nil {
			t.Errorf("%s: after the transaction: %v", name, err)
		}
	}
}

// TestSaveTakesOverFromAnotherProcess: two processes send one key. The first must not report
// not-executed, because the second may get it executed.
func TestSaveTakesOverFromAnotherProcess(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	ctx := t.Context()
	first, second := pgintent.New(pool, nil), pgintent.New(pool, nil)
	if _, err := first.Save(ctx, intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	other := intenttest.Intent("k")
	other.Body = []byte("another")
	if before, err := second.Save(ctx, other); !before || !errors.Is(err, client.ErrIntentDifferent) {
		t.Errorf("another request is kept: %t, %v", before, err)
	}
	if keys, err := second.Pending(ctx); err != nil || len(keys) != 0 {
		t.Errorf("with another request it was taken over: %q, %v", keys, err)
	}
	if before, err := second.Save(ctx, intenttest.Intent("k")); !before || err != nil {
		t.Errorf("the same request: %t, %v", before, err)
	}
	if err := first.Abandon(ctx, "k"); !errors.Is(err, client.ErrIntentTaken) {
		t.Errorf("the first abandons what the second sends: %v", err)
	}
	if keys, err := second.Pending(ctx); err != nil || len(keys) != 1 {
		t.Errorf("the second resumes %q, %v", keys, err)
	}
}

// TestTwoProcessesOnOneKeyPayOnce: the first request is refused while the second is on its way. The
// first caller would trust ErrNotExecuted and pay with a new key, so it must be ErrUnknown.
func TestTwoProcessesOnOneKeyPayOnce(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	pool := setupOn(t, database)
	arrived := make(chan int64)
	refuse, execute := make(chan struct{}), make(chan struct{})
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n := requests.Add(1)
		arrived <- n
		if n == 1 {
			<-refuse
			w.Header().Set("Idempotency-Status", "not-executed")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		<-execute
		w.Header().Set("Idempotency-Status", "executed")
		w.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	_, first := startChild(t, server.URL, database, 1)
	<-arrived
	second := make(chan error, 1)
	go func() {
		transport := client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: 1, Intents: pgintent.New(pool, nil)})
		r, err := http.NewRequestWithContext(client.WithKey(t.Context(), "order-1"), http.MethodPost, server.URL, strings.NewReader("body"))
		if err == nil {
			var response *http.Response
			if response, err = transport.RoundTrip(r); err == nil {
				_ = response.Body.Close()
			}
		}
		second <- err
	}()
	<-arrived
	close(refuse)
	if !first.Scan() || first.Text() != "unknown true, taken true, not executed false" {
		t.Errorf("while the second is on its way the first says: %s", first.Text())
	}
	close(execute)
	if err := <-second; err != nil {
		t.Errorf("the second: %v", err)
	}
}

// TestIntentsInsideAHandlerNeedAPoolOfTheirOwn: the error says so, and nothing is sent without one.
func TestIntentsInsideAHandlerNeedAPoolOfTheirOwn(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	own := setupOn(t, database)
	service := setupOn(t, database, func(c *pgxpool.Config) { postgres.Configure(c, nil) })
	if err := migrations.Up(t.Context(), postgres.New(service, nil), nil); err != nil {
		t.Fatal(err)
	}
	var paid atomic.Int64
	processor := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		paid.Add(1)
		w.Header().Set("Idempotency-Status", "executed")
	}))
	defer processor.Close()
	for name, one := range map[string]struct {
		pool *pgxpool.Pool
		paid int64
	}{"the service's": {service, 0}, "its own": {own, 1}} {
		paid.Store(0)
		var failed error
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: pgintent.New(one.pool, nil)})
			call, err := http.NewRequestWithContext(r.Context(), http.MethodPost, processor.URL, strings.NewReader("body"))
			if err != nil {
				t.Error(err)
				return
			}
			response, err := transport.RoundTrip(call)
			if failed = err; err == nil {
				_ = response.Body.Close()
			}
			w.WriteHeader(http.StatusNoContent)
		})
		scope := func(*http.Request) (string, error) { return "acme", nil }
		recorder := httptest.NewRecorder()
		request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
		request.Header.Set(client.HeaderKey, strings.ReplaceAll(name, " ", "-"))
		middleware.New(postgres.New(service, nil), scope, nil).Handler(handler).ServeHTTP(recorder, request)
		if paid.Load() != one.paid {
			t.Errorf("with %s pool %d requests arrived", name, paid.Load())
		}
		if one.paid == 1 && failed != nil {
			t.Errorf("with %s pool: %v", name, failed)
		}
		if one.paid == 0 && (!errors.Is(failed, client.ErrNotExecuted) || !errors.Is(failed, postgres.ErrPoolRefused) || !strings.Contains(failed.Error(), "a pool of its own")) {
			t.Errorf("with %s pool: %v", name, failed)
		}
	}
}

// TestNoConnectionSavesNothing: if the pool has no connection in time it is proven that nothing was
// kept, so the caller gets ErrNotExecuted and not ErrUnknown.
func TestNoConnectionSavesNothing(t *testing.T) {
	t.Parallel()
	pool := setup(t, func(c *pgxpool.Config) { c.MaxConns = 1 })
	conn, err := pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := pgintent.New(pool, nil).Save(ctx, intenttest.Intent("k")); !errors.Is(err, client.ErrIntentRefused) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a pool without a connection: %v", err)
	}
}
