package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// plantMillion inserts a million records of a thousand accounts, in the order of time, like
// clients' UUIDv7 keys. Every hundredth expired a minute ago.
func (b *testBundle) plantMillion(t testing.TB) {
	t.Helper()
	started := time.Now()
	slow := testservice.Open(t, b.URL, &postgres.Options{PoolConfig: func(config *pgxpool.Config) {
		config.ConnConfig.RuntimeParams["statement_timeout"] = "0" // inserting may take long
	}}).Pool()
	exec := func(sql string) {
		t.Helper()
		if _, err := slow.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	// Recreated in one go at the end.
	exec("ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey")
	exec(`INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body, trace_id)
		SELECT now() - (1000000 - n) * interval '10 milliseconds', now() + CASE WHEN n % 100 = 0 THEN interval '-1 minute' ELSE interval '1 hour' END,
		       CASE WHEN n % 1000 = 7 THEN 409 ELSE 201 END, 1, md5(n::text)::uuid, 'account-' || lpad((n % 1000)::text, 4, '0'),
		       '0198c0de-' || lpad(to_hex(n / 65536), 4, '0') || '-7' || lpad(to_hex(n % 4096), 3, '0') || '-8000-' || lpad(to_hex(n), 12, '0'),
		       '\x0000000000000000000000000000000000000000000000000000000000000000', '\x0100', '\x7b7d', CASE WHEN n % 10 = 0 THEN 'trace-' || n END
		FROM generate_series(1, 1000000) AS n`)
	exec("ALTER TABLE idempotency_keys ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key)")
	exec("ANALYZE idempotency_keys")
	t.Logf("a million records in %v", time.Since(started).Round(time.Millisecond))
}

// answerMax is the maximum time that an operator waits, from the program's start to its end.
const answerMax = time.Second

// Every command answers in under a second on a million records.
func TestOnAMillionRecords(t *testing.T) {
	if testing.Short() {
		t.Skip("a million records")
	}
	t.Parallel()
	b := setup(t)
	b.plantMillion(t)
	const account = "account-0007"
	var key string
	if err := b.Pool.QueryRow(t.Context(), "SELECT key FROM idempotency_keys WHERE scope = $1 ORDER BY key OFFSET 700 LIMIT 1", account).Scan(&key); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		args []string
		want []string // texts in the output
	}{
		{"status", []string{"migrate", "status"}, []string{"version 5 of 5"}},
		{"up", []string{"migrate", "up"}, []string{"version 5 of 5"}},
		{"get", []string{"key", "get", account, key}, []string{"recorded", "status       409", "2 bytes"}},
		{"list", []string{"key", "list"}, []string{"account-0000", "50 records, 50 rows examined"}},
		{"list backwards", []string{"key", "list", "--desc", "--rows", "1000"}, []string{"account-0999", "1000 records, 1000 rows examined"}},
		{"list of an account", []string{"key", "list", "--scope", account, "--rows", "1000"}, []string{key, "1000 records, 1000 rows examined; that is all"}},
		{"list by prefix", []string{"key", "list", "--scope", account, "--key-prefix", key[:18]}, []string{key, "that is all"}},
		{"list of a status that most lack", []string{"key", "list", "--status", "4"}, []string{"409"}},
		{"list of a status that all lack", []string{"key", "list", "--status", "5"}, []string{"0 records", "rows examined; more with --after"}},
		{"list of a trace", []string{"key", "list", "--trace-id", "trace-1000"}, []string{"trace", "account-0000"}},
		{"list of an attempt that is not there", []string{"key", "list", "--attempt", "00000000-0000-4000-8000-000000000001"}, []string{"0 records"}},
		{"list of what is expired", []string{"key", "list", "--expired"}, []string{"(over)", "50 records"}},
		{"list of an hour", []string{"key", "list", "--since", "1h", "--live"}, []string{"50 records"}},
		{"recent", []string{"key", "list", "--recent"}, []string{"50 records", "account-0999"}},
		{"stats", []string{"stats"}, []string{"about", "(estimated)", "live", "expired"}},
		{"top", []string{"top", "--count", "1"}, []string{"in flight 0"}},
		{"doctor", []string{"doctor"}, []string{"version 5", "the primary key is valid"}},
		{"watch", []string{"key", "watch", account, key, "--until", "recorded"}, []string{"is recorded"}},
		{"expire", []string{"key", "expire", account, key, "--reason", "test", "--yes"}, []string{"expired: the record of attempt"}},
		{"delete", []string{"key", "delete", account, key, "--reason", "test", "--yes"}, []string{"deleted: the record of attempt"}},
	} {
		var took []time.Duration
		for range 3 {
			r := b.idemctl(t, test.args...)
			took = append(took, r.took)
			if len(took) == 1 {
				if test.name == "list of a trace" {
					test.want = []string{"record"} // it may be on a later page
				}
				wantText(t, r.stdout+r.stderr, test.want...)
			}
			if took[0] <= answerMax || len(took) > 1 && slices.Min(took) <= answerMax {
				break // the machine may be loaded: the best of three counts
			}
		}
		t.Logf("%-40s %v", test.name, slices.Min(took).Round(time.Millisecond))
		if slices.Min(took) > answerMax {
			t.Errorf("%s took %v", test.name, took)
		}
	}
	// Counts from a sample are near the true ones.
	s, err := operator.New(postgres.New(b.Pool, nil), nil).Stats(context.Background())
	if err != nil || !s.Live.Estimated {
		t.Fatalf("%+v, %v", s.Live, err)
	}
	live, expired := int64(b.Count(t, "SELECT count(*) FROM idempotency_keys WHERE expires_at >= now()")), int64(b.Count(t, "SELECT count(*) FROM idempotency_keys WHERE expires_at < now()"))
	if s.Live.Rows < live*8/10 || s.Live.Rows > live*12/10 || s.Expired.Rows < expired*5/10 || s.Expired.Rows > expired*15/10 {
		t.Errorf("%d live and %d expired by the sample, %d and %d by counting", s.Live.Rows, s.Expired.Rows, live, expired)
	}
	// The pages of a walk together contain each record once.
	r := b.want(t, 0, "--json", "key", "list", "--status", "4", "--rows", "1000", "--all")
	if n := strings.Count(r.stdout, `"status":409`); n != 999 { // of a thousand, one was deleted
		t.Errorf("%d declined records, want 999", n)
	}
	// The reaper walks the whole table, without a time limit.
	r = b.want(t, 0, "gc")
	wantText(t, r.stdout, fmt.Sprintf("deleted %d records", expired))
	t.Logf("gc %v", r.took.Round(time.Millisecond))
}
