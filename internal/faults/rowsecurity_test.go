package faults_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// A client that trusts not-executed pays once, whatever row-level security hides from the service,
// and whether it was switched on before the claim or before the look-up of a lost COMMIT.
func TestRowSecurityNeverTellsAClientToPayAgain(t *testing.T) {
	t.Parallel()
	for name, hidden := range map[string]string{"from the claim": "NOBYPASSRLS", "from the look": "BYPASSRLS"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			database := pgtest.Database(t)
			migrateUp(t, database)
			role := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
			for _, sql := range []string{
				"CREATE ROLE " + role + " LOGIN PASSWORD '" + role + "' " + hidden,
				"GRANT SELECT, INSERT ON idempotency_keys, payments TO " + role, "GRANT USAGE ON SEQUENCE payments_id_seq TO " + role,
				"ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY",
				"CREATE POLICY p ON idempotency_keys FOR INSERT WITH CHECK (true)",
			} {
				execute(t, database, sql)
			}
			t.Cleanup(func() {
				execute(t, database, "DROP OWNED BY "+role)
				execute(t, database, "DROP ROLE "+role)
			})
			network, address, err := pgfault.Upstream(database)
			if err != nil {
				t.Fatal(err)
			}
			var lost, once atomic.Bool
			proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(c pgfault.Commit) pgfault.Fault {
				if bytes.Contains(c.Messages, []byte("acme")) && !once.Swap(true) {
					lost.Store(true)
					return pgfault.Fault{Kind: pgfault.CutAfter}
				}
				return pgfault.Fault{}
			}})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = proxy.Close() })
			s := serveOn(t, proxy.URL(database), &serviceOptions{pool: func(config *pgxpool.Config) {
				config.ConnConfig.User, config.ConnConfig.Password = role, role
				config.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
					if lost.Swap(false) { // it is committed, and the resolver comes
						return tryQuery(database, nil, "ALTER ROLE "+role+" NOBYPASSRLS")
					}
					return nil
				}
			}})
			base := &http.Transport{}
			defer base.CloseIdleConnections()
			transport := client.New(base, &client.Options{Honours: client.Everywhere, AttemptsMax: 2, RetryAfterMax: time.Millisecond})
			pay := func() error {
				request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.front.URL, strings.NewReader(`{"amount":1250}`))
				if err != nil {
					t.Fatal(err)
				}
				response, err := transport.RoundTrip(request)
				if err == nil {
					_ = response.Body.Close()
				}
				return err
			}
			err = pay()
			// It allows a new key.
			if errors.Is(err, client.ErrNotExecuted) {
				t.Errorf("it is told %v", err)
				_ = pay()
			} else if !errors.Is(err, client.ErrUnknown) {
				t.Errorf("it is told %v", err)
			}
			want := map[string]int{"BYPASSRLS": 1}[hidden]
			if n := count(t, database, "SELECT count(*) FROM payments"); n != want {
				t.Errorf("%d payments, want %d", n, want)
			}
		})
	}
}
