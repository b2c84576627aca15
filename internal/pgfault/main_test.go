package pgfault

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// testBundle is a proxy in front of a database with an empty table.
type testBundle struct {
	proxy  *Proxy
	url    string    // through the proxy
	direct *pgx.Conn // around it
}

func setup(t testing.TB, onCommit func(Commit) Fault) *testBundle {
	t.Helper()
	url := pgtest.Database(t)
	network, address, err := Upstream(url)
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := Start(Options{Network: network, Address: address, OnCommit: onCommit})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := proxy.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if n := proxy.Connections(); n != 0 {
			t.Errorf("%d connections after Close", n)
		}
	})
	b := &testBundle{proxy: proxy, url: proxy.URL(url) + "&application_name=proxied", direct: connect(t, url)}
	if _, err := b.direct.Exec(t.Context(), "CREATE TABLE payments (id text PRIMARY KEY)"); err != nil {
		t.Fatal(err)
	}
	return b
}

func connect(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx) // tests break it
		<-conn.PgConn().CleanupDone()
	})
	return conn
}

func (b *testBundle) count(t testing.TB, sql string, arguments ...any) (n int) {
	t.Helper()
	if err := b.direct.QueryRow(context.Background(), sql, arguments...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func (b *testBundle) payments(t testing.TB) int { return b.count(t, "SELECT count(*) FROM payments") }

// backends returns the number of conns through the proxy, in the given state unless that is "".
func (b *testBundle) backends(t testing.TB, state string) int {
	return b.count(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'proxied'"+
		" AND ($1 = '' OR state = $1)", state)
}

// eventually polls until ok returns true, for conditions that cannot signal.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
	}
}
