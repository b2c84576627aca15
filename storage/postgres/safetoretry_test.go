package postgres_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestSafeToRetryIsTrueAfterACommittedCommit is the reason for never using pgconn.SafeToRetry. The
// COMMIT is committed, its reply is lost, and pgx reports that nothing was sent: the failed read
// closes the connection, the next read fails with "conn closed", and that counts as safe, whatever
// was sent while the connection was open.
func TestSafeToRetryIsTrueAfterACommittedCommit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		// Pays and commits; returns pgx's error for the COMMIT.
		commit func(ctx context.Context, tx pgx.Tx) error
	}{
		{"Tx.Commit", func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "INSERT INTO payments VALUES (1)"); err != nil {
				return err
			}
			return tx.Commit(ctx)
		}},
		{"a string of statements", func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO payments VALUES (1); COMMIT")
			return err
		}},
		{"a pipeline's second result", func(ctx context.Context, tx pgx.Tx) error {
			pipeline := tx.Conn().PgConn().StartPipeline(ctx)
			pipeline.SendQueryParams("INSERT INTO payments VALUES (1)", nil, nil, nil, nil)
			pipeline.SendQueryParams("COMMIT", nil, nil, nil, nil)
			if err := pipeline.Sync(); err != nil {
				return err
			}
			if _, err := pipeline.GetResults(); err == nil || pgconn.SafeToRetry(err) {
				return errors.Join(errors.New("the INSERT's own error is another than it was"), err)
			}
			_, err := pipeline.GetResults()
			_ = pipeline.Close() // says the same
			return err
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			network, address, err := pgfault.Upstream(url)
			if err != nil {
				t.Fatal(err)
			}
			proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(pgfault.Commit) pgfault.Fault {
				return pgfault.Fault{Kind: pgfault.CutAfter}
			}})
			if err != nil {
				t.Fatal(err)
			}
			defer proxy.Close()
			direct := connectTo(t, url)
			if _, err := direct.Exec(t.Context(), "CREATE TABLE payments (amount int)"); err != nil {
				t.Fatal(err)
			}
			tx, err := connectTo(t, proxy.URL(url)).Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}

			commitErr := test.commit(t.Context(), tx)

			if n := proxy.Hits()[pgfault.CutAfter]; n != 1 {
				t.Fatalf("%d COMMITs were sent, want 1: %v", n, commitErr)
			}
			var payments int
			if err := direct.QueryRow(t.Context(), "SELECT count(*) FROM payments").Scan(&payments); err != nil || payments != 1 {
				t.Fatalf("%d payments (%v), want the one that was committed", payments, err)
			}
			if commitErr == nil || !pgconn.SafeToRetry(commitErr) {
				t.Fatalf("pgconn.SafeToRetry is false of %q, after a COMMIT that was committed: pgx has changed. The store does not ask it "+
					"and stays right (definite in sqlstate.go); read docs/decisions/0008-resolve.md and docs/architecture.md again, which say why", commitErr)
			}
		})
	}
}

func connectTo(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx) // the test breaks it
		<-conn.PgConn().CleanupDone()
	})
	return conn
}
