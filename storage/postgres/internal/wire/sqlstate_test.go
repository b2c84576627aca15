package wire

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// Only an ERROR by PostgreSQL itself, outside of class 08, proves that a COMMIT did not happen.
func TestDefinite(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want bool
	}{
		{&pgconn.PgError{SeverityUnlocalized: "ERROR", Severity: "FEHLER", Code: "23505"}, true},
		{&pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "40001"}, true},
		{&pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "08006"}, false},
		{&pgconn.PgError{SeverityUnlocalized: "FATAL", Code: "57P01"}, false},
		{&pgconn.PgError{SeverityUnlocalized: "PANIC", Code: "53100"}, false},
		{&pgconn.PgError{Severity: "ERROR", Code: "23505"}, false}, // a pooler's
		{&pgconn.PgError{Severity: "FATAL", Code: "08P01"}, false}, // PgBouncer's
		{errors.New("unexpected EOF"), false},
	} {
		if _, got := Definite(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}
