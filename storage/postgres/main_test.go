package postgres_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) {
	if os.Getenv(payoutVariable) != "" {
		os.Exit(payoutChild())
	}
	pgtest.Main(m)
}

// testBundle is a store on a database of its own, with a table for handlers to write to.
type testBundle struct {
	pool  *pgxpool.Pool
	store *postgres.Store
	wire  *testservice.RoundTrips
}

type setupOptions struct {
	database  string // its URL; default: a new one
	store     *postgres.Options
	before    func(*pgxpool.Config) // before postgres.Configure
	configure func(*pgxpool.Config) // after postgres.Configure
	cold      bool                  // leave postgres.Configure out
}

func setup(t testing.TB, opts *setupOptions) *testBundle {
	t.Helper()
	if opts == nil {
		opts = &setupOptions{}
	}
	ctx := context.Background()
	schema := ""
	if opts.store != nil {
		schema = opts.store.Schema
	}
	database := opts.database
	if database == "" {
		database = testservice.Database(t, schema)
	} else if err := testservice.Prepare(ctx, database, schema); err != nil {
		t.Fatal(err)
	}
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}

	b := &testBundle{wire: testservice.CountRoundTrips(config)}
	if opts.before != nil {
		opts.before(config)
	}
	if !opts.cold {
		postgres.Configure(config, opts.store)
	}
	if opts.configure != nil {
		opts.configure(config)
	}
	b.pool, err = pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.pool.Close)
	b.store = postgres.New(b.pool, opts.store)
	return b
}

// effects returns the number of rows that handlers wrote.
func (b *testBundle) effects(t *testing.T) int { return b.count(t, "SELECT count(*) FROM effects") }

func (b *testBundle) count(t *testing.T, sql string, arguments ...any) (n int) {
	t.Helper()
	if err := b.pool.QueryRow(context.Background(), sql, arguments...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func (b *testBundle) text(t *testing.T, sql string, arguments ...any) (text string) {
	t.Helper()
	if err := b.pool.QueryRow(context.Background(), sql, arguments...).Scan(&text); err != nil {
		t.Fatal(err)
	}
	return text
}

// request returns a request with the fingerprint of the body.
func request(value, body string) idempotency.Request {
	return idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: value},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(body)),
	}
}

// claimOf returns a new attempt's claim on a request's key.
func claimOf(req idempotency.Request) *idempotency.Claim {
	return &idempotency.Claim{Key: req.Key, Fingerprint: req.Fingerprint, TTL: time.Hour, Attempt: idempotency.NewAttemptID()}
}

// answer returns an answer with a status.
func answer(status int) *idempotency.Answer {
	return &idempotency.Answer{Status: status, Header: map[string][]string{"Content-Type": {"text/plain"}}, Body: []byte("done")}
}

// effect does the write that must happen once.
func effect(ctx context.Context, t *testing.T) {
	t.Helper()
	attempt, _ := idempotency.AttemptIDFrom(ctx)
	if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name, attempt_id) VALUES ('transfer', $1)", attempt.String()); err != nil {
		t.Errorf("effect: %v", err)
	}
}
