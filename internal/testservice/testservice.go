// Package testservice gives a test a service on a PostgreSQL database of its own: the tables, a
// pool, a store and an engine, and a table effects for handlers to write to.
package testservice

import (
	"context"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Service answers requests on a database of its own.
type Service struct {
	URL    string
	Pool   *pgxpool.Pool // as the owner of everything
	Store  *postgres.Store
	Engine *idempotency.Engine
}

// New opens a service on a new database. It ends with the test.
func New(t testing.TB, opts *postgres.Options) *Service {
	t.Helper()
	schema := ""
	if opts != nil {
		schema = opts.Schema
	}
	return On(t, Database(t, schema), opts)
}

// On opens a service on a database that has the tables.
func On(t testing.TB, databaseURL string, opts *postgres.Options) *Service {
	t.Helper()
	store, err := postgres.Open(context.Background(), databaseURL, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	return &Service{URL: databaseURL, Pool: store.Pool(), Store: store, Engine: idempotency.NewEngine(store, nil)}
}

// Database returns the URL of a new database that has the tables in the schema (default: public),
// and effects. The tables are made once and copied for each test.
func Database(t testing.TB, schema string) string {
	t.Helper()
	return pgtest.Copy(t, "testservice in schema "+schema, func(databaseURL string) error {
		return Prepare(context.Background(), databaseURL, schema)
	})
}

// Prepare makes the tables of [Database], for a test with a PostgreSQL of its own.
func Prepare(ctx context.Context, databaseURL, schema string) error {
	store, err := newStore(databaseURL, &postgres.Options{Schema: schema})
	if err != nil {
		return err
	}
	defer store.Pool().Close()
	if err := migrations.Up(ctx, store, nil); err != nil {
		return err
	}
	_, err = store.Pool().Exec(ctx, "CREATE TABLE effects (id bigserial PRIMARY KEY, name text NOT NULL DEFAULT '', attempt_id uuid)")
	return err
}

// Example returns a store on a PostgreSQL of its own, in which sql was executed, for an example: it
// has no [testing.TB].
func Example(ctx context.Context, sql string) (_ *postgres.Store, closeStore func()) {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	server, err := pgserver.Start(ctx, &pgserver.Options{Settings: map[string]string{"fsync": "off"}})
	must(err)
	store, err := postgres.Open(ctx, server.URL(), nil)
	must(err)
	must(migrations.Up(ctx, store, nil))
	_, err = store.Pool().Exec(ctx, sql)
	must(err)
	return store, func() {
		store.Close()
		must(server.Stop())
	}
}

// Open opens another store on a database. It checks nothing.
func Open(t testing.TB, databaseURL string, opts *postgres.Options) *postgres.Store {
	t.Helper()
	store, err := newStore(databaseURL, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Pool().Close)
	return store
}

// newStore is postgres.Open without its checks, which may fail for a test's role or database.
func newStore(databaseURL string, opts *postgres.Options) (*postgres.Store, error) {
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	if opts != nil && opts.PoolConfig != nil {
		opts.PoolConfig(config)
	}
	postgres.Configure(config, opts)
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		return nil, err
	}
	return postgres.New(pool, opts), nil
}

// Role makes a role that has only the given privileges. It returns a store for the role, and the
// database's URL with the role's name. The role is dropped when the test ends.
func (s *Service) Role(t testing.TB, grants ...string) (store *postgres.Store, databaseURL string) {
	t.Helper()
	name := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	s.Exec(t, "CREATE ROLE "+name+" LOGIN PASSWORD 'canary-password'")
	t.Cleanup(func() {
		for _, sql := range []string{"DROP OWNED BY " + name, "DROP ROLE " + name} {
			if _, err := s.Pool.Exec(context.Background(), sql); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
	})
	for _, grant := range grants {
		s.Exec(t, "GRANT "+grant+" TO "+name)
	}
	address, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	address.User = url.UserPassword(name, "canary-password")
	return Open(t, address.String(), nil), address.String()
}

// Exec executes a statement.
func (s *Service) Exec(t testing.TB, sql string, arguments ...any) {
	t.Helper()
	if _, err := s.Pool.Exec(context.Background(), sql, arguments...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// Count returns the number that a query returns.
func (s *Service) Count(t testing.TB, sql string, arguments ...any) (n int) {
	t.Helper()
	if err := s.Pool.QueryRow(context.Background(), sql, arguments...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// Text returns the text that a query returns.
func (s *Service) Text(t testing.TB, sql string, arguments ...any) (text string) {
	t.Helper()
	if err := s.Pool.QueryRow(context.Background(), sql, arguments...).Scan(&text); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return text
}

// Strings returns the texts of a query's one column.
func (s *Service) Strings(t testing.TB, sql string, arguments ...any) []string {
	t.Helper()
	rows, err := s.Pool.Query(context.Background(), sql, arguments...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	all, err := pgx.AppendRows([]string(nil), rows, pgx.RowTo[string]) // nil if there are none
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return all
}

// Effects returns the number of rows that handlers left behind.
func (s *Service) Effects(t testing.TB) int {
	t.Helper()
	return s.Count(t, "SELECT count(*) FROM effects")
}

// Request returns a request with the key's value as its body.
func Request(key idempotency.Key) idempotency.Request {
	return idempotency.Request{
		Key: key, Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(key.Value)),
		TraceID: "trace-" + key.Value,
	}
}

// Do makes the service answer a request. It fails the test on an error.
func (s *Service) Do(t testing.TB, key idempotency.Key, answer *idempotency.Answer) idempotency.Result {
	t.Helper()
	result := s.Engine.Do(context.Background(), Request(key), func(context.Context) (*idempotency.Answer, error) { return answer, nil })
	if result.Err != nil {
		t.Fatal(result.Err)
	}
	return result
}

// Call makes a call in a handler and gets no reply. If an operator has settled it since, Call returns
// the effect, and takes what was stated as its result as it is. Otherwise the request stays open with
// the lapse, and the error is [idempotency.ErrUnsettled].
func Call(ctx context.Context, intent idempotency.Intent, lapse idempotency.Lapse) (*idempotency.Effect, error) {
	effects, err := idempotency.EffectsFrom(ctx)
	if err != nil {
		return nil, err
	}
	effect, _, _, err := effects.Begin(intent)
	switch {
	case err != nil || effect.State != idempotency.EffectIntended:
		return effect, err
	case effect.Output != nil: // package effect would check it
		effect.State = idempotency.EffectDone
		return effect, effects.Settle(effect)
	}
	effects.Lapse(lapse)
	return effect, idempotency.ErrUnsettled
}

// Running starts a request with a handler that runs until finish is called or the test ends. It
// returns when the handler runs. finish returns when the request has ended.
func (s *Service) Running(t testing.TB, key idempotency.Key) (finish func() idempotency.Result) {
	t.Helper()
	began, release := make(chan struct{}), make(chan struct{})
	ended := make(chan idempotency.Result, 1)
	go func() {
		ended <- s.Engine.Do(context.Background(), Request(key), func(context.Context) (*idempotency.Answer, error) {
			close(began)
			<-release
			return &idempotency.Answer{Status: 201}, nil
		})
	}()
	finish = sync.OnceValue(func() idempotency.Result {
		close(release)
		return <-ended
	})
	select {
	case <-began:
	case result := <-ended:
		t.Fatalf("it did not run: %v", result.Err)
	}
	t.Cleanup(func() { finish() }) // before the pool is closed
	return finish
}
