package postgres

import (
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// fail wraps an error of a step in the sentinel for its meaning.
func fail(step string, sentinel, err error) error {
	return fmt.Errorf("%s: %w: %w", step, sentinel, wire.SQLError(err))
}

// classify returns the sentinel for an error that came before COMMIT was sent, or that the database
// returned instead of a commit.
func classify(err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return idempotency.ErrUnavailable // the connection is gone
	}
	switch pgErr.Code {
	case "40001", "40P01":
		return idempotency.ErrNotSerializable
	case "0A000":
		if wire.StalePlan(err) { // another connection makes a new plan
			return idempotency.ErrNotSerializable
		}
	case "55P03": // lock_timeout
		return idempotency.ErrUnavailable
	case "57014":
		if pgErr.Routine == "CopyGetData" { // the handler's own rows ended a COPY: no outage
			return idempotency.ErrAborted
		}
	}
	switch wire.Class(pgErr) {
	case "08", "53", "57", "58": // connection, resources, operator, system
		return idempotency.ErrUnavailable
	}
	return idempotency.ErrAborted
}

// withoutPosition reports whether a server refuses to return the position of its log: the functions
// are missing, not allowed or not supported.
func withoutPosition(err error) bool {
	pgErr, ok := wire.Definite(err)
	return ok && (pgErr.Code == "42883" || pgErr.Code == "42501" || pgErr.Code == "0A000" || pgErr.Code == "55000")
}

// meaning returns the sentinel for PostgreSQL's error in one of the statements of the last flush,
// and the error with a remedy added. It depends on the statement: the handler's own deferred
// constraints and triggers, which run before our INSERT, can raise the same codes.
func (s *statements) meaning(failed *wire.Call, err *pgconn.PgError) (sentinel, explained error) {
	if failed.Meaning != nil {
		return failed.Meaning(err)
	}
	switch failed.Statement {
	case &s.guard:
		if err.Code == "22012" {
			return idempotency.ErrTransactionLost, err
		}
	case &s.insert:
		// A trigger may copy records into a table with the same name in another schema. An error
		// that names no table is taken for ours.
		ours := err.TableName == "" || err.TableName == TableName && err.SchemaName == s.schema
		switch {
		case ours && err.Code == "23502" && err.ColumnName == "created_at":
			return idempotency.ErrTransactionLost, err
		case ours && err.Code == "23505" && err.ConstraintName == primaryKey:
			return idempotency.ErrKeyRecorded, err
		case err.Code == "22012" && err.Where == "", err.Code == "0A000":
			// A trigger's own error would name the trigger's function in its context.
			return idempotency.ErrUnavailable, explain(err, "the record would not be kept as it was written: Store.Check and idemctl doctor name the trigger or rule on the table that must go; if there is none, a deferred statement, or a deferred trigger of another table, sets client_encoding")
		case err.Code == "25006":
			return idempotency.ErrAborted, explain(err, remedyReadOnly)
		case err.Code == "42501":
			return idempotency.ErrAborted, explain(err, "the role in force may not write the record: GRANT SELECT, INSERT ON the table to it, or RESET ROLE before the handler returns")
		}
	}
	return classify(err), err
}

// explain adds a remedy to a database error.
func explain(err error, remedy string) error { return fmt.Errorf("%w: %s", wire.SQLError(err), remedy) }

// remedyReadOnly: the claim began a read-write transaction, so the handler must have changed it.
const remedyReadOnly = "the handler made its transaction read-only: leave SET TRANSACTION READ ONLY and transaction_read_only alone"
