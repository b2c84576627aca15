// Package pooler detects whether conns lead through a pooler, such as PgBouncer, and how long a
// client keeps its server conn.
package pooler

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Mode says how long a client has a server conn to itself.
type Mode int

// The modes. In mode [Transaction] a pooler passes a session's settings and advisory locks on to
// other clients.
const (
	Direct Mode = iota // no pooler: until the client disconnects
	// A pooler: as far as Find can see, until the client disconnects.
	Session
	Transaction // a pooler: until the transaction or the statement ends
)

// roundsMax is the number of rounds in which two clients are compared, if something in between gave
// them process numbers of its own. One round proves little, because another client may take a
// server conn meanwhile.
const roundsMax = 20

// Find returns the mode of a and b, two idle conns with the same config. It leaves nothing behind:
// it reads, and begins transactions on b that write nothing. It returns only errors of the conns; b
// may then be closed.
//
// A conn without a pooler is never taken for one with a pooler: no other client sees its server
// process, and it sees no other.
func Find(ctx context.Context, a, b *pgx.Conn) (Mode, error) {
	first, err := look(ctx, a)
	if err != nil {
		return Direct, err
	}
	mode, rounds := Direct, 1
	if first.pid != a.PgConn().PID() { // something in between gave a a number of its own
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

// round lets b hold a server conn for a transaction. It reports whether b got a's server conn, or a
// lost its own.
func round(ctx context.Context, a, b *pgx.Conn, first process) (shared bool, err error) {
	if _, err := b.Exec(ctx, "BEGIN", pgx.QueryExecModeExec); err != nil {
		var pgErr *pgconn.PgError
		// PgBouncer in statement mode, which has no transactions. A pooler's own errors have no
		// untranslated severity.
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
	if other != first { // otherwise a, which has no server conn, could wait for b's
		if again, err = look(ctx, a); err != nil {
			return false, err
		}
	}
	if _, err := b.Exec(ctx, "ROLLBACK", pgx.QueryExecModeExec); err != nil {
		return false, err
	}
	return other == first || again != first, nil
}

// process is a server process. Two servers may have processes with the same number, but not with
// the same start to the microsecond.
type process struct {
	pid   uint32
	since string
}

func look(ctx context.Context, conn *pgx.Conn) (p process, err error) {
	err = conn.QueryRow(ctx, `SELECT pg_catalog.pg_backend_pid(), COALESCE((SELECT backend_start::text FROM pg_catalog.pg_stat_activity
		WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()), '')`, pgx.QueryExecModeExec).Scan(&p.pid, &p.since)
	return p, err
}
