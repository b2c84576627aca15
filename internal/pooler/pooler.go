// Package pooler finds out whether connections lead through a pooler, such as PgBouncer, and how long it leaves a client its server
// connection.
package pooler

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Mode says for how long a client has a server connection to itself.
type Mode int

// The modes. A pooler that is [Transaction] hands a session's settings and advisory locks on to other clients.
const (
	Direct      Mode = iota // no pooler: until it disconnects
	Session                 // a pooler, and as far as can be seen until the client disconnects
	Transaction             // a pooler, and until the transaction or the statement ends
)

// roundsMax is how often two clients are compared behind something that gave them numbers of its own. Other clients may take a
// server connection in between, which hides one round.
const roundsMax = 20

// Find returns the mode of a and b, two idle connections that were made alike. It leaves nothing behind: it reads, and
// begins transactions on b that write nothing. An error is of the connections; b may be closed then.
//
// A connection without a pooler is never taken for one with it: nobody else gets to see its server process, and it sees no
// other.
func Find(ctx context.Context, a, b *pgx.Conn) (Mode, error) {
	first, err := look(ctx, a)
	if err != nil {
		return Direct, err
	}
	mode, rounds := Direct, 1
	if first.pid != a.PgConn().PID() { // whoever answered gave a a number of its own
		mode, rounds = Session, roundsMax
	}
	for range rounds {
		shared, err := round(ctx, a, b, first)
		if shared || err != nil {
			return Transaction, err
		}
	}
	return mode, nil
}

// round has b hold a server connection for a transaction, and reports whether it was that of a, or a lost its own.
func round(ctx context.Context, a, b *pgx.Conn, first process) (shared bool, err error) {
	if _, err := b.Exec(ctx, "BEGIN", pgx.QueryExecModeExec); err != nil {
		var pgErr *pgconn.PgError
		// PgBouncer in statement mode, which has no transactions. A pooler's own error has no untranslated severity.
		if errors.As(err, &pgErr) && pgErr.SeverityUnlocalized == "" {
			return true, nil
		}
		return false, err
	}
	other, err := look(ctx, b)
	if err != nil {
		return false, err
	}
	again := first
	if other != first { // else a, which has none, could wait for the one that b holds
		if again, err = look(ctx, a); err != nil {
			return false, err
		}
	}
	if _, err := b.Exec(ctx, "ROLLBACK", pgx.QueryExecModeExec); err != nil {
		return false, err
	}
	return other == first || again != first, nil
}

// process is a server process. Two servers may have processes of one number, but not since the same microsecond.
type process struct {
	pid   uint32
	since string
}

func look(ctx context.Context, conn *pgx.Conn) (p process, err error) {
	err = conn.QueryRow(ctx, `SELECT pg_catalog.pg_backend_pid(), COALESCE((SELECT backend_start::text FROM pg_catalog.pg_stat_activity
		WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()), '')`, pgx.QueryExecModeExec).Scan(&p.pid, &p.since)
	return p, err
}
