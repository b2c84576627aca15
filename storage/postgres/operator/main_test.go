package operator_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// testBundle is an operator, and a service that it operates, on a database of their own.
type testBundle struct {
	url      string
	pool     *pgxpool.Pool // as the owner of everything
	engine   *idempotency.Engine
	operator *operator.Operator
}

func setup(t testing.TB, opts *operator.Options) *testBundle {
	t.Helper()
	return setupIn(t, "public", opts)
}

func setupIn(t testing.TB, schema string, opts *operator.Options) *testBundle {
	t.Helper()
	b := &testBundle{url: pgtest.Database(t)}
	b.pool = b.open(t, nil)
	store := postgres.New(b.pool, &postgres.Options{Schema: schema})
	if err := migrations.Up(t.Context(), store, nil); err != nil {
		t.Fatal(err)
	}
	b.engine = idempotency.NewEngine(store, nil)
	b.operator = operator.New(store, opts)
	return b
}

func (b *testBundle) open(t testing.TB, change func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(b.url)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(config)
	}
	postgres.Configure(config, nil)
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// role returns an operator whose role has the privileges and no others.
func (b *testBundle) role(t testing.TB, grants ...string) *operator.Operator {
	t.Helper()
	name := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	b.exec(t, "CREATE ROLE "+name+" LOGIN PASSWORD '"+name+"'")
	t.Cleanup(func() {
		for _, sql := range []string{"DROP OWNED BY " + name, "DROP ROLE " + name} {
			if _, err := b.pool.Exec(context.Background(), sql); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
	})
	for _, grant := range grants {
		b.exec(t, "GRANT "+grant+" TO "+name)
	}
	pool := b.open(t, func(config *pgxpool.Config) { config.ConnConfig.User, config.ConnConfig.Password = name, name })
	return operator.New(postgres.New(pool, nil), nil)
}

func (b *testBundle) exec(t testing.TB, sql string, arguments ...any) {
	t.Helper()
	if _, err := b.pool.Exec(context.Background(), sql, arguments...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func (b *testBundle) count(t testing.TB, sql string, arguments ...any) (n int) {
	t.Helper()
	if err := b.pool.QueryRow(context.Background(), sql, arguments...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

func key(value string) idempotency.Key { return idempotency.Key{Scope: "acme", Value: value} }

func request(k idempotency.Key) idempotency.Request {
	return idempotency.Request{
		Key: k, Fingerprint: idempotency.FingerprintV1("POST", "/transfers", "", "application/json", []byte(k.Value)),
		TraceID: "trace-" + k.Value,
	}
}

// do has the service answer a request.
func (b *testBundle) do(t testing.TB, k idempotency.Key, status int) idempotency.Result {
	t.Helper()
	result := b.engine.Do(context.Background(), request(k), func(context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: status, Header: map[string][]string{"Content-Type": {"text/plain"}, "Vary": {"A", "B"}}, Body: []byte("done")}, nil
	})
	if result.Err != nil {
		t.Fatal(result.Err)
	}
	return result
}

// running starts a request whose handler runs until the returned function is called, which returns when it has ended.
func (b *testBundle) running(t testing.TB, k idempotency.Key) (finish func() idempotency.Result) {
	t.Helper()
	begun, release := make(chan struct{}), make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	t.Cleanup(let) // a pool is closed after that
	ended := make(chan idempotency.Result, 1)
	go func() {
		ended <- b.engine.Do(context.Background(), request(k), func(context.Context) (*idempotency.Answer, error) {
			close(begun)
			<-release
			return &idempotency.Answer{Status: 201}, nil
		})
	}()
	select {
	case <-begun:
	case result := <-ended:
		t.Fatalf("it did not run: %v", result.Err)
	}
	return func() idempotency.Result {
		let()
		return <-ended
	}
}

// plant puts n live records of a scope into the table by SQL, with keys like those of clients.
func (b *testBundle) plant(t testing.TB, scope string, n int) {
	t.Helper()
	b.exec(t, `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT now() - n * interval '1 second', now() + interval '1 hour', CASE WHEN n % 10 = 0 THEN 422 ELSE 201 END, 1, gen_random_uuid(), $1, 'k' || lpad(n::text, 8, '0'), sha256('x'), '\x0100', 'done'
		FROM generate_series(1, $2::int) AS n`, scope, n)
}

// wantError has an error wrap another one and show nothing of any key.
func wantError(t testing.TB, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("error is %v, want %v", got, want)
	}
	if got != nil && (strings.Contains(got.Error(), "acme") || strings.Contains(got.Error(), "canary")) {
		t.Errorf("error shows a key: %v", got)
	}
}

// soon is about now, by whatever clock.
func soon(at time.Time) bool { return time.Since(at).Abs() < time.Minute }

// effect is a handler that leaves a row behind.
func (b *testBundle) effect(ctx context.Context) (*idempotency.Answer, error) {
	_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects DEFAULT VALUES")
	return &idempotency.Answer{Status: 201}, err
}
