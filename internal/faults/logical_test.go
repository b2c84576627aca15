package faults_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// logical is a publisher and its subscriber. Both have the tables: logical replication does not
// create them.
type logical struct{ publisher, subscriber *pgserver.Server }

func startLogical(t *testing.T) *logical {
	t.Helper()
	pgtest.Slow(t, "starts a primary and a subscriber of its own")
	l := &logical{}
	for _, server := range []**pgserver.Server{&l.publisher, &l.subscriber} {
		started, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: map[string]string{
			"fsync": "off", "full_page_writes": "off", "wal_level": "logical", "wal_retrieve_retry_interval": "10ms",
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			started.Kill()
			_ = started.Stop()
		})
		migrateUp(t, started.URL())
		*server = started
	}
	return l
}

// subscribe lets the subscriber follow a publication of the tables, and waits until their first
// copy is complete.
func (l *logical) subscribe(t *testing.T, name string, tables ...string) {
	t.Helper()
	execute(t, l.publisher.URL(), "CREATE PUBLICATION "+name+" FOR TABLE "+strings.Join(tables, ", "))
	execute(t, l.subscriber.URL(), fmt.Sprintf("CREATE SUBSCRIPTION %[1]s CONNECTION '%[2]s' PUBLICATION %[1]s WITH (synchronous_commit = on)", name, l.publisher.URL()))
	await(t, l.subscriber.URL(), "the first copy is through", "NOT EXISTS (SELECT FROM pg_subscription_rel WHERE srsubstate <> 'r')")
}

// promote ends the publisher for good and then the subscriptions.
func (l *logical) promote(t *testing.T, subscriptions ...string) {
	t.Helper()
	l.publisher.Kill()
	for _, name := range subscriptions {
		execute(t, l.subscriber.URL(), "ALTER SUBSCRIPTION "+name+" DISABLE")
	}
}

// With one subscription for the handler's tables and ours, each payment arrives together with its
// record, and a retry on the promoted replica is a replay. The subscription is named in
// synchronous_standby_names here, so nothing that was acknowledged is lost.
func TestF35PromotedLogicalReplicaReplays(t *testing.T) {
	t.Parallel()
	l := startLogical(t)
	l.subscribe(t, "everything", "payments", "idempotency_keys", "idempotency_audit", "idempotency_events")
	execute(t, l.publisher.URL(), "ALTER SYSTEM SET synchronous_standby_names = 'everything'")
	execute(t, l.publisher.URL(), "SELECT pg_reload_conf()")
	await(t, l.publisher.URL(), "the subscriber is synchronous",
		"EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync') AND current_setting('synchronous_standby_names') = 'everything'")
	s := serveOn(t, l.publisher.URL(), nil)
	paid := map[string]reply{}
	for n := range 10 {
		key := fmt.Sprintf("key-%d", n)
		paid[key] = s.mustPay(t, key, 201, "executed")
	}
	expire(t, l.publisher.URL(), "key-9")

	// Until it is promoted the replica looks like a primary: it takes writes.
	after := serveOn(t, l.subscriber.URL(), nil)
	if err := after.store.Check(t.Context()); !errors.Is(err, postgres.ErrNotPrimary) || !strings.Contains(err.Error(), "ALTER SUBSCRIPTION everything DISABLE") {
		t.Errorf("Check of a logical replica says %v", err)
	}
	if level, text := doctorOf(t, after.pool, "primary"); level != operator.LevelFail || !strings.Contains(text, "ALTER SUBSCRIPTION everything DISABLE") {
		t.Errorf("the doctor says of a logical replica: %s %s", level, text)
	}

	l.promote(t, "everything")
	if err := after.store.Check(t.Context()); err != nil {
		t.Errorf("Check of the promoted replica says %v", err)
	}
	if level, text := doctorOf(t, after.pool, "primary"); level != operator.LevelOK {
		t.Errorf("the doctor says of the promoted replica: %s %s", level, text)
	}
	if n := count(t, l.subscriber.URL(), parted); n != 0 {
		t.Errorf("%d payments without a record, or records without a payment", n)
	}
	s.upstream.set(l.subscriber.URL()) // the service follows
	for key, first := range paid {
		if got := s.mustPay(t, key, 201, "replayed"); got.body != first.body {
			t.Errorf("%s: %s, first %s", key, got.body, first.body)
		}
		s.onePayment(t, key)
	}

	// Sequences are not replicated: the handler's ids begin at 1 again, and collide. That pays
	// nothing and records nothing.
	s.mustPay(t, "new", 500, "not-executed")
	execute(t, l.subscriber.URL(), "SELECT setval('payments_id_seq', max(id)) FROM payments")
	s.mustPay(t, "new", 201, "executed")

	// The ids of the operator's tables collide as well, and an act that can't be audited is not
	// done.
	o := operator.New(postgres.New(after.pool, nil), nil)
	act := operator.Act{Actor: "tester", Reason: "a test"}
	if _, err := o.Delete(t.Context(), idempotency.Key{Scope: "acme", Value: "new"}, act); err == nil || s.records(t, "new") != 1 {
		t.Errorf("an act whose audit row has a number that is taken: %v", err)
	}
	execute(t, l.subscriber.URL(), `SELECT setval(pg_get_serial_sequence(t, 'id'), max) FROM (SELECT 'idempotency_audit' AS t, max(id) FROM idempotency_audit
		UNION ALL SELECT 'idempotency_events', max(id) FROM idempotency_events) AS ours WHERE max IS NOT NULL`)
	if _, err := o.Delete(t.Context(), idempotency.Key{Scope: "acme", Value: "new"}, act); err != nil {
		t.Error(err)
	}
}

// With one subscription per table the tables are applied separately: a payment can be there without
// its record, and its retry pays again. So one subscription must have all tables of a transaction.
func TestF35SubscriptionPerTableTearsPaymentsFromRecords(t *testing.T) {
	t.Parallel()
	l := startLogical(t)
	l.subscribe(t, "money", "payments")
	l.subscribe(t, "records", "idempotency_keys")
	s := serveOn(t, l.publisher.URL(), nil)
	s.mustPay(t, "together", 201, "executed")
	await(t, l.subscriber.URL(), "the record arrives", "EXISTS (SELECT FROM idempotency_keys WHERE key = 'together')")
	execute(t, l.subscriber.URL(), "ALTER SUBSCRIPTION records DISABLE") // it lags behind
	await(t, l.publisher.URL(), "it is disabled", "NOT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = 'records')")
	s.mustPay(t, "torn", 201, "executed")
	await(t, l.subscriber.URL(), "the payment arrives", "EXISTS (SELECT FROM payments WHERE key = 'torn')")
	l.promote(t, "money")
	if n := count(t, l.subscriber.URL(), parted); n != 1 {
		t.Errorf("%d payments without a record; this test is there to show one", n)
	}
	execute(t, l.subscriber.URL(), "SELECT setval('payments_id_seq', max(id)) FROM payments")
	s.upstream.set(l.subscriber.URL())
	s.mustPay(t, "together", 201, "replayed")
	s.mustPay(t, "torn", 201, "executed") // paid twice
	if n := s.payments(t, "torn"); n != 2 {
		t.Errorf("%d payments", n)
	}
}

func doctorOf(t *testing.T, pool *pgxpool.Pool, check string) (level operator.Level, text string) {
	t.Helper()
	for _, f := range operator.New(postgres.New(pool, nil), nil).Doctor(t.Context()) {
		if f.Check == check {
			return f.Level, f.What + " -> " + f.Remedy
		}
	}
	t.Fatalf("there is no check %s", check)
	return "", ""
}

// expire leaves a row in the audit table.
func expire(t *testing.T, databaseURL, key string) {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	if _, err := operator.New(postgres.New(pool, nil), nil).Expire(t.Context(), idempotency.Key{Scope: "acme", Value: key}, operator.Act{Actor: "tester", Reason: "a test"}); err != nil {
		t.Fatal(err)
	}
}
