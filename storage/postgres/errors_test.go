package postgres

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
)

func TestClassify(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]error{
		"40001": idempotency.ErrNotSerializable, "40P01": idempotency.ErrNotSerializable,
		"08006": idempotency.ErrUnavailable, "53100": idempotency.ErrUnavailable, "53300": idempotency.ErrUnavailable,
		"57014": idempotency.ErrUnavailable, "57P01": idempotency.ErrUnavailable, "58030": idempotency.ErrUnavailable,
		"55P03": idempotency.ErrUnavailable, "25006": idempotency.ErrAborted,
		"23505": idempotency.ErrAborted, "22012": idempotency.ErrAborted, "55000": idempotency.ErrAborted, "": idempotency.ErrAborted,
	} {
		if got := classify(&pgconn.PgError{Code: code}); !errors.Is(got, want) {
			t.Errorf("%q: %v, want %v", code, got, want)
		}
	}
	if got := classify(&pgconn.PgError{Code: "57014", Routine: "CopyGetData"}); !errors.Is(got, idempotency.ErrAborted) {
		t.Errorf("a COPY that the handler's rows ended: %v", got)
	}
	if got := classify(errors.New("unexpected EOF")); !errors.Is(got, idempotency.ErrUnavailable) {
		t.Errorf("an I/O error: %v", got)
	}
}

// A server's message may quote a client's data; our texts must not.
func TestErrorsQuoteNothing(t *testing.T) {
	t.Parallel()
	err := fail("claim", idempotency.ErrUnavailable, &pgconn.PgError{Code: "22P02", Message: `invalid input syntax: "canary"`, Detail: "canary", ConstraintName: "c"})
	if got, want := err.Error(), "claim: store is unavailable: SQLSTATE 22P02 on constraint c"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
