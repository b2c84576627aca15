package postgres

import (
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
)

// stateError shows a database error by its SQLSTATE alone: the server's message may quote what a client sent.
type stateError struct{ err *pgconn.PgError }

func (e *stateError) Error() string {
	if e.err.ConstraintName != "" {
		return "SQLSTATE " + e.err.Code + " on constraint " + e.err.ConstraintName
	}
	return "SQLSTATE " + e.err.Code
}

func (e *stateError) Unwrap() error { return e.err }

// sqlError returns err fit for a log: a database error by its SQLSTATE, anything else as it is.
func sqlError(err error) error {
	var shown *stateError
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && !errors.As(err, &shown) {
		return &stateError{pgErr}
	}
	return err
}

// fail wraps an error of a step in the sentinel that says what it means.
func fail(step string, sentinel, err error) error {
	return fmt.Errorf("%s: %w: %w", step, sentinel, sqlError(err))
}

// classify says what an error means that came before COMMIT was sent, or that the database gave instead of a commit.
func classify(err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return idempotency.ErrUnavailable // the connection is gone
	}
	switch pgErr.Code {
	case "40001", "40P01":
		return idempotency.ErrSerialization
	case "55P03", "25006": // lock_timeout; a standby
		return idempotency.ErrUnavailable
	}
	switch class(pgErr) {
	case "08", "53", "57", "58": // connection, resources, operator, system
		return idempotency.ErrUnavailable
	}
	return idempotency.ErrAborted
}

func class(pgErr *pgconn.PgError) string {
	if len(pgErr.Code) < 2 {
		return ""
	}
	return pgErr.Code[:2]
}

// definite reports whether an error in place of COMMIT's reply proves that nothing was committed: an ERROR by
// PostgreSQL itself. A FATAL, a connection error, an error without the unlocalized severity (PgBouncer's) and every
// error of the network prove nothing. pgconn.SafeToRetry is not asked: it is true after a COMMIT that happened.
func definite(err error) (*pgconn.PgError, bool) {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return nil, false
	}
	return pgErr, pgErr.SeverityUnlocalized == "ERROR" && class(pgErr) != "08"
}
