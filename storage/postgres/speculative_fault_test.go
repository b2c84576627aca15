package postgres_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/storage/postgres"
)

// F11: a claim that travelled with COMMIT would hold no lock when the COMMIT is late, and who looks for it would find the key
// free: not-executed, and the record appears.
func TestF11LateCommitOfASilentSpeculativeHandler(t *testing.T) {
	t.Parallel()
	b, _ := setupFault(t, pgfault.Fault{Kind: pgfault.LateCommit, Delay: time.Second})
	engine := idempotency.NewEngine(b.store, &idempotency.Options{CommitTimeout: time.Second, Speculative: true})
	result := engine.Do(context.Background(), request("lost", ""), func(context.Context) (*idempotency.Answer, error) { return answer(201), nil })
	want(t, result, idempotency.OutcomeExecuted, "") // the look waits for the lock
	if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
}

// An engine that never restarts still makes the claim that was postponed.
func TestSpeculativeWithoutRestarts(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.speculate(request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	cold := setupAgain(t, b)
	engine := idempotency.NewEngine(cold.store, &idempotency.Options{Speculative: true, Restarts: -1})
	run := func(ctx context.Context) (*idempotency.Answer, error) {
		return answer(payInVain(t)(ctx, postgres.Tx(ctx))), nil
	}
	want(t, engine.Do(context.Background(), request("k", ""), run), idempotency.OutcomeReplayed, "")
	b.do(t, request("busy", ""), func(context.Context, pgx.Tx) int {
		want(t, engine.Do(context.Background(), request("busy", ""), run), idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
		return 201
	})
}

// pgx sends an empty statement by the simple protocol, and behind a claim that failed the server would not hear it.
func TestEmptyStatementIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.speculate(request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	for name, empty := range map[string]func(ctx context.Context, tx pgx.Tx) error{
		"exec": func(ctx context.Context, tx pgx.Tx) error { _, err := tx.Exec(ctx, ""); return err },
		"rewritten": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "SELECT 1", emptyRewriter{})
			return err
		},
	} {
		result := setupAgain(t, b).speculate(request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
			if empty(ctx, tx) == nil {
				t.Errorf("%s: an empty statement went through", name)
			}
			return 201
		})
		want(t, result, idempotency.OutcomeReplayed, "")
	}
}

type emptyRewriter struct{}

func (emptyRewriter) RewriteQuery(context.Context, *pgx.Conn, string, []any) (string, []any, error) {
	return "", nil, nil
}

// lateConn is a socket whose Write returns late, as one does whose process is throttled: pgconn then reads in the background, and
// may still be at it when the next attempt has its claim held.
type lateConn struct {
	net.Conn
	late *atomic.Bool
}

func (c *lateConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if c.late.Load() {
		time.Sleep(80 * time.Millisecond)
	}
	return n, err
}

// A handler is told what its own statement did, whoever began to read: else it would answer 402 to a debit that it made.
func TestSpeculativeClaimBehindABackgroundRead(t *testing.T) {
	t.Parallel()
	var late atomic.Bool
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns, c.MinConns = 1, 1
		dial := c.ConnConfig.DialFunc
		c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return &lateConn{conn, &late}, err
		}
	}})
	b.effects(t)
	b.effects(t)
	late.Store(true)
	b.effects(t)
	late.Store(false)
	result := b.speculate(request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		tag, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('debit')")
		if err != nil || tag.RowsAffected() != 1 {
			t.Errorf("the debit says %q, %v", tag, err)
			return 402
		}
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 || result.Answer.Status != 201 {
		t.Errorf("%d effects, status %d", n, result.Answer.Status)
	}
}
