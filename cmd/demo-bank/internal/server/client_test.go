package server

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgtest"
)

const (
	payers         = 64
	terminateEvery = 100                   // operations
	againMax       = 20 * time.Millisecond // from an error to the caller's next try
)

var operations = flag.Int("operations", 2000, "how many operations go through the proxy")

// setupShedding runs a bank with a pool so small that it sheds now and then.
func setupShedding(t *testing.T) *bundle {
	t.Helper()
	return setup(t, func(c *Config) { c.PoolSize, c.AcquireTimeout = 8, 20*time.Millisecond })
}

// options configure a Transport that gives up soon, to test its errors more than its patience.
func options(intents client.IntentStore) *client.Options {
	return &client.Options{
		Honours: client.Everywhere, Intents: intents, BackoffFirst: 2 * time.Millisecond, BackoffMax: 20 * time.Millisecond,
		RetryAfterMax: 10 * time.Millisecond, AttemptTimeout: 2 * time.Second, AttemptsMax: 3, RetryPercent: 60,
	}
}

// openIntents returns a store in a database that is not the bank's. Another process may take the
// intents of a killed one at once.
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

// authorized adds the credential that an intent must not keep.
type authorized struct{ base http.RoundTripper }

func (a authorized) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer demo-acme")
	return a.base.RoundTrip(r)
}

func (a authorized) CloseIdleConnections() { a.base.(*http.Transport).CloseIdleConnections() }

func newBase() authorized {
	return authorized{&http.Transport{MaxIdleConnsPerHost: payers, DisableCompression: true}}
}

func transferBody(i int, reference string) string {
	from := i % 1000
	return fmt.Sprintf(`{"from":"acct-%04d","to":"acct-%04d","amount":1,"currency":"EUR","reference":%q}`, from, (from+1+i%7)%1000, reference)
}

// payer is a caller that trusts the client's errors: after ErrUnknown it repeats the key, and after
// ErrNotExecuted it makes a new request with a new key.
type payer struct {
	http    *http.Client
	url     string
	unknown atomic.Int64
	anew    atomic.Int64
}

// pay pays once, and returns the transfer's id.
func (p *payer) pay(ctx context.Context, body string) (id string, err error) {
	key := ""
	for ctx.Err() == nil {
		requestCtx := ctx
		if key != "" {
			requestCtx = client.WithKey(ctx, key)
		}
		r, err := http.NewRequestWithContext(requestCtx, http.MethodPost, p.url+"/v1/transfers", strings.NewReader(body))
		if err != nil {
			return "", err
		}
		r.Header.Set("Content-Type", "application/json")
		response, err := p.http.Do(r)
		var failed *client.Error
		switch {
		case errors.As(err, &failed) && errors.Is(err, client.ErrUnknown):
			p.unknown.Add(1)
			key = failed.Key.Value
		case errors.Is(err, client.ErrNotExecuted):
			p.anew.Add(1)
			key = ""
		case err != nil:
			return "", err
		default:
			return transferOf(response)
		}
		time.Sleep(rand.N(againMax)) // a caller does other things before it tries again
	}
	return "", ctx.Err()
}

func transferOf(response *http.Response) (id string, err error) {
	defer func() { _ = response.Body.Close() }() // it is in memory
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	outcome := response.Header.Get("Idempotency-Status")
	if response.StatusCode != http.StatusCreated || outcome != "executed" && outcome != "replayed" {
		return "", fmt.Errorf("answer is %d %s %s", response.StatusCode, outcome, content)
	}
	var transfer bank.Transfer
	if err := json.Unmarshal(content, &transfer); err != nil {
		return "", err
	}
	return transfer.ID, nil
}

// TestOperationsThroughTheProxyPayOnce: the network loses, doubles, delays and cuts messages, and
// PostgreSQL terminates the bank's connections. Each operation is paid once and none is lost. The
// client's errors are true, because its caller acts on them.
func TestOperationsThroughTheProxyPayOnce(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "pays while connections break")
	b := setupShedding(t)
	p := startProxy(t, b)
	intents, pool, err := openIntents(t.Context(), pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	var attempts, lost atomic.Int64
	o := options(intents)
	o.Trace = func(_ context.Context, e client.Event) {
		switch e.Kind {
		case client.EventStarted:
			attempts.Add(1)
		case client.EventLost:
			lost.Add(1)
		case client.EventKept:
			t.Errorf("an intent was kept: %v", e.Err)
		}
	}
	transport := client.New(newBase(), o)
	defer transport.CloseIdleConnections()
	payer := &payer{http: &http.Client{Transport: transport}, url: "http://" + p.address}

	due := make(chan struct{}, 1)
	var breaking sync.WaitGroup
	var terminated int64
	breaking.Go(func() { terminated = terminate(t, b, due) })
	started := time.Now()
	ids := make([]string, *operations)
	var next atomic.Int64
	var group sync.WaitGroup
	for range payers {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(ids); i = int(next.Add(1)) - 1 {
				id, err := payer.pay(t.Context(), transferBody(i, fmt.Sprintf("op-%06d", i)))
				if err != nil {
					t.Errorf("operation %d: %v", i, err)
					return
				}
				ids[i] = id
				if i%terminateEvery == 0 {
					select {
					case due <- struct{}{}:
					default: // the last one is still running
					}
				}
			}
		})
	}
	group.Wait()
	took := time.Since(started)
	close(due)
	breaking.Wait()

	t.Logf("%d operations in %v: %d attempts, %d lost, %d ends as unknown, %d as not executed and made anew, %d backends terminated; proxy: %v",
		len(ids), took.Round(time.Millisecond), attempts.Load(), lost.Load(), payer.unknown.Load(), payer.anew.Load(), terminated, p.counts())
	pending, err := intents.Pending(t.Context())
	if err != nil || len(pending) > 0 {
		t.Errorf("%d intents are left (%v)", len(pending), err)
	}
	expectOnce(t, b, ids)
	if payer.unknown.Load() == 0 || payer.anew.Load() == 0 {
		t.Error("the client's errors were not put to the proof")
	}
}

// expectOnce compares the bank's books with the acknowledged ids.
func expectOnce(t *testing.T, b *bundle, ids []string) {
	t.Helper()
	rows, err := b.db.Query(t.Context(), `SELECT reference, id::text FROM transfers WHERE reference LIKE 'op-%' ORDER BY reference`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	found := map[string][]string{}
	for rows.Next() {
		var reference, id string
		if err := rows.Scan(&reference, &id); err != nil {
			t.Fatal(err)
		}
		found[reference] = append(found[reference], id)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	for i, id := range ids {
		if got := found[fmt.Sprintf("op-%06d", i)]; len(got) != 1 || got[0] != id {
			t.Errorf("operation %d: transfers %v are in the books, %s was acknowledged", i, got, id)
		}
	}
	if len(found) != len(ids) {
		t.Errorf("%d operations are in the books, want %d", len(found), len(ids))
	}
	if audit := b.audit(); !audit.OK || audit.KeysWithManyTransfers != 0 {
		t.Errorf("audit is %+v", audit)
	}
}

// terminate terminates one of the bank's connections for each value of due, and returns the number
// terminated.
func terminate(t *testing.T, b *bundle, due <-chan struct{}) (terminated int64) {
	for range due {
		tag, err := b.db.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name <> $1 AND backend_type = 'client backend'
			AND (query LIKE '%transfers%' OR query LIKE '%idempotency_keys%' OR query ILIKE 'commit%') ORDER BY random() LIMIT 1`, testerName)
		if err != nil {
			t.Error(err)
			continue
		}
		terminated += tag.RowsAffected()
	}
	return terminated
}
