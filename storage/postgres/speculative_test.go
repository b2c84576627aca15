package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// speculate runs a handler before its claim.
func (b *testBundle) speculate(req idempotency.Request, handler func(ctx context.Context, tx pgx.Tx) int) idempotency.Result {
	return idempotency.NewEngine(b.store, &idempotency.Options{Speculative: true}).Do(context.Background(), req,
		func(ctx context.Context) (*idempotency.Answer, error) {
			return answer(handler(ctx, postgres.Tx(ctx))), nil
		})
}

// firstStatements are the ways in which a handler may begin. Each leaves one effect, or returns its error.
var firstStatements = map[string]func(ctx context.Context, tx pgx.Tx) error{
	"exec": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", "transfer")
		return err
	},
	"exec-without-arguments": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('transfer')")
		return err
	},
	"query": func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, "INSERT INTO effects (name) SELECT 'transfer' || g FROM generate_series(1, $1) AS g RETURNING id", 1)
		if err != nil {
			return err
		}
		_, err = pgx.CollectRows(rows, pgx.RowTo[int64])
		return err
	},
	"query-row": func(ctx context.Context, tx pgx.Tx) error {
		var id int64
		return tx.QueryRow(ctx, "INSERT INTO effects (name) VALUES ('transfer') RETURNING id").Scan(&id)
	},
	"batch": func(ctx context.Context, tx pgx.Tx) error {
		var batch pgx.Batch
		batch.Queue("SELECT 1")
		batch.Queue("INSERT INTO effects (name) VALUES ($1)", "transfer")
		return tx.SendBatch(ctx, &batch).Close()
	},
	"nested-transaction": func(ctx context.Context, tx pgx.Tx) error {
		return pgx.BeginFunc(ctx, tx, func(nested pgx.Tx) error {
			_, err := nested.Exec(ctx, "INSERT INTO effects (name) VALUES ('transfer')")
			return err
		})
	},
	"copy": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows([][]any{{"transfer"}}))
		return err
	},
	"prepare": func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Prepare(ctx, "", "SELECT 1"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('transfer')")
		return err
	},
	"long-answer": func(ctx context.Context, tx pgx.Tx) error {
		var text string
		return tx.QueryRow(ctx, "WITH done AS (INSERT INTO effects (name) VALUES ('transfer')) SELECT repeat('x', 300000)").Scan(&text)
	},
	"notice": func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "DO $$ BEGIN RAISE NOTICE 'said'; END $$"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('transfer')")
		return err
	},
}

// However a handler begins, its effect happens once, and every retry gets the first answer.
func TestSpeculativeRetryDoesNotPayTwice(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]*setupOptions{
		"default mode":    {},
		"exec mode":       {configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec }},
		"describe mode":   {configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe }},
		"simple protocol": {configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol }},
		"serializable":    {store: &postgres.Options{Isolation: pgx.Serializable}},
		"pooler":          {store: &postgres.Options{TransactionPooling: true}, configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec }},
		"not configured":  {cold: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, opts)
			done := 0
			for way, first := range firstStatements {
				for try, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeReplayed} {
					var failed error
					result := b.speculate(request(way, ""), func(ctx context.Context, tx pgx.Tx) int {
						if failed = first(ctx, tx); failed != nil {
							return 500 // whatever it answers is dropped
						}
						return 201
					})
					if result.Outcome != outcome || result.Answer == nil || result.Answer.Status != 201 {
						t.Fatalf("%s, try %d: outcome %q, error %v, the handler's %v", way, try, result.Outcome, result.Err, failed)
					}
				}
				if done++; b.effects(t) != done {
					t.Fatalf("%s: %d effects, want %d", way, b.effects(t), done)
				}
			}
			if result := b.speculate(request("exec", "another body"), func(ctx context.Context, tx pgx.Tx) int { return 201 }); result.Outcome != idempotency.OutcomeMismatch {
				t.Errorf("another request under a recorded key: %q", result.Outcome)
			}
		})
	}
}

// What a handler that has seen its statement fail makes of it does not count, and nothing else of it is sent.
func TestSpeculativeHandlerThatGoesOnIsOverruled(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.speculate(request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	for name, end := range map[string]func() int{
		"201":    func() int { return 201 },
		"402":    func() int { return 402 },
		"500":    func() int { return 500 },
		"panics": func() int { panic("the handler") },
	} {
		cold := setupAgain(t, b) // a process that does not know the key
		before := 0
		result := cold.speculate(request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
			if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('again')"); err == nil {
				t.Errorf("%s: the first statement of a retry succeeded", name)
			}
			before = cold.wire.count()
			if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('again')"); !errors.Is(err, idempotency.ErrNotClaimed) {
				t.Errorf("%s: the second statement answers %v, want ErrNotClaimed", name, err)
			}
			if n := cold.wire.count() - before; n != 0 {
				t.Errorf("%s: the second statement was sent", name)
			}
			return end()
		})
		if result.Outcome != idempotency.OutcomeReplayed || result.Answer.Status != 201 {
			t.Errorf("%s: outcome %q, error %v", name, result.Outcome, result.Err)
		}
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// setupAgain returns a bundle on the same database, as another process has it.
func setupAgain(t *testing.T, b *testBundle) *testBundle {
	t.Helper()
	again := &testBundle{wire: b.wire}
	var err error
	if again.pool, err = pgxpool.NewWithConfig(context.Background(), b.pool.Config()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(again.pool.Close)
	again.store = postgres.New(again.pool, nil)
	return again
}

// A handler that sends nothing has its key claimed with the record, or with the rollback: a retry is one all the same.
func TestSpeculativeHandlerWithoutStatements(t *testing.T) {
	t.Parallel()
	for _, retry := range []int{201, 402, 500} {
		t.Run(fmt.Sprint(retry), func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			silent := func(status int) func(context.Context, pgx.Tx) int {
				return func(context.Context, pgx.Tx) int { return status }
			}
			want(t, b.speculate(request("forgotten", ""), silent(500)), idempotency.OutcomeNotExecuted, "")
			want(t, b.speculate(request("declined", ""), silent(402)), idempotency.OutcomeExecuted, "")
			want(t, b.speculate(request("k", ""), silent(201)), idempotency.OutcomeExecuted, "")
			if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 2 {
				t.Errorf("%d records, want 2", n)
			}
			for key, status := range map[string]int{"k": 201, "declined": 402} {
				result := setupAgain(t, b).speculate(request(key, ""), silent(retry))
				if result.Outcome != idempotency.OutcomeReplayed || result.Answer.Status != status {
					t.Errorf("%s: %q, %v", key, result.Outcome, result.Err)
				}
			}
		})
	}
}

func TestSpeculativeDeclineUndoesItsWrites(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.speculate(request("k", ""), pay(t, 402)), idempotency.OutcomeExecuted, "")
	want(t, b.speculate(request("forgotten", ""), pay(t, 503)), idempotency.OutcomeNotExecuted, "")
	if effects, records := b.effects(t), b.count(t, "SELECT count(*) FROM idempotency_keys"); effects != 0 || records != 1 {
		t.Errorf("%d effects and %d records, want 0 and 1", effects, records)
	}
}

// A claim that can't even begin must not let the handler's statement through: outside of a transaction it would be committed at
// once, with no record, and paid again.
func TestSpeculativeClaimThatCannotBeginPaysNothing(t *testing.T) {
	t.Parallel()
	for name, first := range firstStatements {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
			if _, err := b.pool.Exec(context.Background(), "DEALLOCATE ALL"); err != nil { // BEGIN is not prepared any more
				t.Fatal(err)
			}
			runs := 0
			result := b.speculate(request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				if runs++; first(ctx, tx) != nil {
					return 500
				}
				return 201
			})
			if result.Outcome != idempotency.OutcomeExecuted || runs != 2 {
				t.Errorf("outcome %q after %d runs, error %v; want executed after 2", result.Outcome, runs, result.Err)
			}
			if n := b.effects(t); n != 1 {
				t.Errorf("%d effects, want 1", n)
			}
		})
	}
}

// While another attempt runs, a speculative one hears so; once that one has failed, it may run.
func TestSpeculativeAttemptBesideAnother(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for _, ends := range []int{500, 201} {
		first := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
			effect(ctx, t)
			want(t, b.speculate(request("k", ""), payInVain(t)), idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
			return ends
		})
		if ends == 201 {
			want(t, first, idempotency.OutcomeExecuted, "")
		}
	}
	want(t, b.speculate(request("k", ""), payInVain(t)), idempotency.OutcomeReplayed, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// payInVain is a handler that expects to fail.
func payInVain(t *testing.T) func(ctx context.Context, tx pgx.Tx) int {
	return func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('twice')"); err == nil {
			t.Error("a statement went through beside another attempt")
		}
		return 201
	}
}

// What happens to a handler that does before its first statement what it must not: it happens for the retry too. Its
// writes don't.
func TestSpeculativeHandlerMustNotActBeforeItsFirstStatement(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	called := 0
	handler := func(ctx context.Context, tx pgx.Tx) int {
		called++ // a call to another service, say
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('transfer')"); err != nil {
			return 500
		}
		return 201
	}
	want(t, b.speculate(request("k", ""), handler), idempotency.OutcomeExecuted, "")
	want(t, setupAgain(t, b).speculate(request("k", ""), handler), idempotency.OutcomeReplayed, "")
	if called != 2 || b.effects(t) != 1 {
		t.Errorf("%d calls and %d effects, want 2 and 1: the doc comment of Options.Speculative says so", called, b.effects(t))
	}
}

// A connection that was dead when it was taken costs the client nothing.
func TestSpeculativeClaimOnADeadConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
	other, err := pgx.Connect(context.Background(), b.pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close(context.Background()) }()
	b.effects(t) // makes the connection
	if _, err := other.Exec(context.Background(), "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"); err != nil {
		t.Fatal(err)
	}
	result := b.speculate(request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('transfer')"); err != nil {
			return 500
		}
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// One round trip less than a plain transaction.
func TestSpeculativeRoundTrips(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
	handler := func(status int) func(ctx context.Context, tx pgx.Tx) int {
		return func(ctx context.Context, tx pgx.Tx) int {
			statements(ctx, t, tx)
			return status
		}
	}
	cost := func(do func()) int {
		before := b.wire.count()
		do()
		return b.wire.count() - before
	}
	plain := func() {
		if err := pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error { statements(ctx, t, tx); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	plain()
	bare := cost(plain)
	if bare != handlerStatements+2 {
		t.Fatalf("a plain transaction costs %d round trips: the count is wrong", bare)
	}
	for _, status := range []int{201, 402, 500} {
		if got := cost(func() { b.speculate(request(fmt.Sprint(status), ""), handler(status)) }); got != bare-1 {
			t.Errorf("status %d: %d round trips, want %d", status, got, bare-1)
		}
	}
	if got := cost(func() { b.speculate(request("silent", ""), func(context.Context, pgx.Tx) int { return 201 }) }); got != 2 {
		t.Errorf("a handler without statements: %d round trips, want 2", got)
	}
	// A retry: refused, then rolled back and looked up at once. The process that ran it looks it up at once.
	again := setupAgain(t, b)
	again.effects(t)
	retry := func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", "transfer"); err == nil {
			t.Error("a retry went through")
		}
		return 500
	}
	again.speculate(request("other", ""), func(ctx context.Context, tx pgx.Tx) int { // pgx prepares the statement
		_, _ = tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", "transfer")
		return 500
	})
	if got := cost(func() { want(t, again.speculate(request("201", ""), retry), idempotency.OutcomeReplayed, "") }); got != 2 {
		t.Errorf("a retry in a process that does not know the key: %d round trips, want 2", got)
	}
	if got := cost(func() { want(t, b.speculate(request("201", ""), retry), idempotency.OutcomeReplayed, "") }); got != 1 {
		t.Errorf("a retry in the process that knows the key: %d round trips, want 1", got)
	}
}

// Many copies of many requests at once: each effect once, each answer the same.
func TestSpeculativeStorm(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{store: &postgres.Options{AcquireTimeout: 20 * time.Second}, configure: func(c *pgxpool.Config) { c.MaxConns = 8 }})
	const keys, copies = 12, 16
	var executed atomic.Int64
	var group sync.WaitGroup
	for i := range keys * copies {
		group.Go(func() {
			for {
				result := b.speculate(request(fmt.Sprint(i%keys), ""), func(ctx context.Context, tx pgx.Tx) int {
					if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", fmt.Sprint(i%keys)); err != nil {
						return 503
					}
					return 201
				})
				switch result.Outcome {
				case idempotency.OutcomeExecuted:
					executed.Add(1)
					return
				case idempotency.OutcomeReplayed:
					return
				case idempotency.OutcomeInProgress:
				default:
					t.Errorf("outcome %q, error %v", result.Outcome, result.Err)
					return
				}
			}
		})
	}
	group.Wait()
	if n := b.effects(t); n != keys || executed.Load() != keys {
		t.Errorf("%d effects, %d executed, want %d", n, executed.Load(), keys)
	}
}
