package wire

import (
	"errors"

	"github.com/jackc/pgx/v5/pgconn"
)

// stateError shows only the SQLSTATE of a database error: the server's message may quote a client's
// data.
type stateError struct{ err *pgconn.PgError }

func (e *stateError) Error() string {
	if e.err.ConstraintName != "" {
		return "SQLSTATE " + e.err.Code + " on constraint " + e.err.ConstraintName
	}
	return "SQLSTATE " + e.err.Code
}

func (e *stateError) Unwrap() error { return e.err }

// SQLError returns err for a log: a database error shows only its SQLSTATE, any other is unchanged.
func SQLError(err error) error {
	var shown *stateError
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && !errors.As(err, &shown) {
		return &stateError{pgErr}
	}
	return err
}

// StalePlan reports whether a table was changed under a prepared statement. Nothing of the
// statement was executed, and it keeps failing on this connection until it is prepared again. The
// code 0A000 by itself can mean many other things.
func StalePlan(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "0A000" && pgErr.Routine == "RevalidateCachedQuery"
}

// Unprepared reports whether a prepared statement can't be used any more: somebody deallocated it
// on this connection, or the table changed under its plan.
func Unprepared(err error) bool {
	var pgErr *pgconn.PgError
	return StalePlan(err) || errors.As(err, &pgErr) && pgErr.Code == "26000"
}

// IsStandby reports whether a BEGIN was refused because the server is a standby.
func IsStandby(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && (pgErr.Code == "0A000" || pgErr.Code == "25006")
}

// Class returns the first two characters of the SQLSTATE.
func Class(pgErr *pgconn.PgError) string {
	if len(pgErr.Code) < 2 {
		return ""
	}
	return pgErr.Code[:2]
}

// Definite reports whether an error in place of COMMIT's reply proves that nothing was committed:
// only an ERROR by PostgreSQL itself does. A FATAL, a connection error, an error without the
// unlocalized severity (PgBouncer's) and every error of the network prove nothing. It does not use
// pgconn.SafeToRetry, which is true after a COMMIT that happened.
func Definite(err error) (*pgconn.PgError, bool) {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return nil, false
	}
	return pgErr, pgErr.SeverityUnlocalized == "ERROR" && Class(pgErr) != "08"
}
