package clientproof

import (
	"context"
	"encoding/json"
	"flag"
	"net/http"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/server"
	"github.com/paidonce/idempotency/internal/pgtest"
)

var operations = flag.Int("operations", 2000, "how many operations go through the proxy")

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(child())
	}
	pgtest.Main(m)
}

const startTimeout = 60 * time.Second

// bundle is a running bank and its books.
type bundle struct {
	t    *testing.T
	url  string
	host string
	db   *pgxpool.Pool
}

// setup runs a bank whose pool is small enough for it to shed now and then.
func setup(t *testing.T) *bundle {
	t.Helper()
	database := pgtest.Database(t)
	s := server.New(server.Config{Addr: "127.0.0.1:0", DatabaseURL: database, PoolSize: 8, AcquireTimeout: 20 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the bank ended with: %v", err)
			}
		case <-time.After(startTimeout):
			t.Error("the bank did not end")
		}
	})
	select {
	case <-s.Serving():
	case err := <-ended:
		ended <- err
		t.Fatalf("the bank did not start: %v", err)
	case <-time.After(startTimeout):
		t.Fatal("the bank did not start in time")
	}
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.RuntimeParams["search_path"] = bank.Schema
	config.ConnConfig.RuntimeParams["application_name"] = lookerName
	db, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	address, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	return &bundle{t: t, url: s.URL(), host: address.Host, db: db}
}

// openIntents returns a store in a database that is not the bank's. The intents of a killed process
// may be taken at once.
func openIntents(ctx context.Context, database string) (*pgintent.Store, *pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		return nil, nil, err
	}
	config.MaxConns = 8
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, nil, err
	}
	return pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond}), pool, pgintent.Create(ctx, pool, nil)
}

// lookerName is the application_name of the test's own connections.
const lookerName = "clientproof"

// audit asks the bank about its own books.
func (b *bundle) audit() *bank.Audit {
	b.t.Helper()
	response, err := http.Get(b.url + "/v1/audit")
	if err != nil {
		b.t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }() // it is read
	var audit bank.Audit
	if err := json.NewDecoder(response.Body).Decode(&audit); err != nil {
		b.t.Fatal(err)
	}
	return &audit
}

// count returns a number that a statement finds in the books.
func (b *bundle) count(sql string, args ...any) (n int) {
	b.t.Helper()
	if err := b.db.QueryRow(b.t.Context(), sql, args...).Scan(&n); err != nil {
		b.t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// authorized adds the credential that an intent must not keep.
type authorized struct{ base http.RoundTripper }

func (a authorized) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer demo-acme")
	return a.base.RoundTrip(r)
}

func (a authorized) CloseIdleConnections() { a.base.(*http.Transport).CloseIdleConnections() }
