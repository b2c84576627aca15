package operator_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// testBundle is an operator and its service, on a database of their own.
type testBundle struct {
	*testservice.Service
	operator *operator.Operator
}

func setup(t testing.TB, opts *operator.Options) *testBundle {
	t.Helper()
	return setupIn(t, "public", opts)
}

func setupIn(t testing.TB, schema string, opts *operator.Options) *testBundle {
	t.Helper()
	s := testservice.New(t, &postgres.Options{Schema: schema})
	return &testBundle{s, operator.New(s.Store, opts)}
}

// role returns an operator whose role has the privileges and no others.
func (b *testBundle) role(t testing.TB, grants ...string) *operator.Operator {
	t.Helper()
	store, _ := b.Role(t, grants...)
	return operator.New(store, nil)
}

func key(value string) idempotency.Key { return idempotency.Key{Scope: "acme", Value: value} }

// do makes the service answer a request.
func (b *testBundle) do(t testing.TB, k idempotency.Key, status int) idempotency.Result {
	t.Helper()
	return b.Do(t, k, &idempotency.Answer{
		Status: status, Header: map[string][]string{"Content-Type": {"text/plain"}, "Vary": {"A", "B"}}, Body: []byte("done"),
	})
}

// plant puts n live records of a scope into the table by SQL, with keys like those of clients.
func (b *testBundle) plant(t testing.TB, scope string, n int) {
	t.Helper()
	b.Exec(t, `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT now() - n * interval '1 second', now() + interval '1 hour', CASE WHEN n % 10 = 0 THEN 422 ELSE 201 END, 1, gen_random_uuid(), $1, 'k' || lpad(n::text, 8, '0'), sha256('x'), '\x0100', 'done'
		FROM generate_series(1, $2::int) AS n`, scope, n)
}

// wantError requires that an error wraps another one, and that its text has no part of any key.
func wantError(t testing.TB, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("error is %v, want %v", got, want)
	}
	if got != nil && (strings.Contains(got.Error(), "acme") || strings.Contains(got.Error(), "canary")) {
		t.Errorf("error shows a key: %v", got)
	}
}

// soon reports whether a time is about now.
func soon(at time.Time) bool { return time.Since(at).Abs() < time.Minute }

// effect is a handler that writes a row.
func (b *testBundle) effect(ctx context.Context) (*idempotency.Answer, error) {
	_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects DEFAULT VALUES")
	return &idempotency.Answer{Status: 201}, err
}
