package sqldb_test

import (
	"context"
	"database/sql"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/sqldb"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

type testBundle struct {
	*testservice.Service
	db    *sql.DB
	trips *testservice.RoundTrips
}

func setup(t *testing.T, opts *sqldb.Options, poolMax int32) *testBundle {
	t.Helper()
	return setupMode(t, opts, poolMax, pgx.QueryExecModeCacheStatement)
}

// modes are the modes of pgx in which SQL is sent.
var modes = []pgx.QueryExecMode{
	pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
}

func setupMode(t *testing.T, opts *sqldb.Options, poolMax int32, mode pgx.QueryExecMode) *testBundle {
	t.Helper()
	b := &testBundle{}
	b.Service = testservice.New(t, &postgres.Options{PoolConfig: func(config *pgxpool.Config) {
		config.MaxConns, config.ConnConfig.DefaultQueryExecMode = poolMax, mode
		b.trips = testservice.CountRoundTrips(config)
	}})
	b.db = sqldb.Open(b.Store, opts)
	t.Cleanup(func() {
		if err := b.db.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// do runs a handler, which returns its status, for a request with this key.
func (b *testBundle) do(t *testing.T, key string, handler func(ctx context.Context) int) idempotency.Result {
	t.Helper()
	return b.Engine.Do(t.Context(), request(key), func(ctx context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: handler(ctx)}, nil
	})
}

func request(key string) idempotency.Request {
	return idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: strings.NewReplacer(" ", "-", ",", "").Replace(key)},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", nil),
	}
}

func (b *testBundle) want(t *testing.T, result idempotency.Result, outcome idempotency.Outcome) {
	t.Helper()
	if result.Outcome != outcome {
		t.Errorf("outcome %q, want %q: %v", result.Outcome, outcome, result.Err)
	}
}

func (b *testBundle) wantNames(t *testing.T, want string) {
	t.Helper()
	var got string
	if err := b.Pool.QueryRow(t.Context(), "SELECT COALESCE(string_agg(name, ' ' ORDER BY id), '') FROM effects").Scan(&got); err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("effects are %q, want %q", got, want)
	}
}

// waitForEnd blocks until database/sql has ended the sql.Tx whose context has ended.
func (b *testBundle) waitForEnd(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); b.db.Stats().InUse > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the sql.Tx is still open")
		}
	}
}

// cost returns the round trips of a call.
func (b *testBundle) cost(do func()) int {
	before := b.trips.Count()
	do()
	return b.trips.Count() - before
}

const insert = "INSERT INTO effects (name) VALUES ($1)"

type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// write fails the test if the name can't be inserted.
func write(ctx context.Context, t *testing.T, on execer, name string) {
	t.Helper()
	if _, err := on.ExecContext(ctx, insert, name); err != nil {
		t.Errorf("insert %s: %v", name, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
