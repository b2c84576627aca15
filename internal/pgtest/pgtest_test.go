package pgtest_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func TestDatabasesAreEmptyAndApart(t *testing.T) {
	t.Parallel()
	for range 2 { // the second fails if it gets the first's database
		conn := connect(t, pgtest.Database(t))
		if _, err := conn.Exec(t.Context(), "CREATE TABLE account (id int)"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCopiesBeginAlikeAndAreApart(t *testing.T) {
	t.Parallel()
	var prepared atomic.Int32
	for range 3 {
		database := pgtest.Copy(t, t.Name(), func(databaseURL string) error {
			prepared.Add(1)
			conn, err := pgx.Connect(t.Context(), databaseURL)
			if err != nil {
				return err
			}
			_, err = conn.Exec(t.Context(), "CREATE TABLE account (id int); INSERT INTO account VALUES (1)")
			return errors.Join(err, conn.Close(t.Context()))
		})
		var rows int
		const add = "WITH one AS (INSERT INTO account VALUES (2)) SELECT count(*) FROM account"
		if err := connect(t, database).QueryRow(t.Context(), add).Scan(&rows); err != nil || rows != 1 {
			t.Errorf("a copy begins with %d rows, %v; want 1", rows, err)
		}
	}
	if n := prepared.Load(); n != 1 {
		t.Errorf("prepared %d times, want once", n)
	}
}

func TestDatabaseIsDroppedWithItsConnections(t *testing.T) {
	t.Parallel()
	var name string
	t.Run("a test that leaves a connection open", func(t *testing.T) {
		conn, err := pgx.Connect(t.Context(), pgtest.Database(t))
		if err != nil {
			t.Fatal(err)
		}
		name = conn.Config().Database
	})
	var left int
	conn := connect(t, pgtest.Database(t))
	err := conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_database WHERE datname = $1", name).Scan(&left)
	if err != nil || left != 0 {
		t.Fatalf("database %s: %d left, %v", name, left, err)
	}
}

func TestServerHasRoomForManyConnections(t *testing.T) {
	t.Parallel()
	conn := connect(t, pgtest.Server(t).URL())
	for name, want := range map[string]string{"max_connections": "300", "fsync": "off", "synchronous_commit": "on"} {
		var got string
		if err := conn.QueryRow(t.Context(), "SELECT current_setting($1)", name).Scan(&got); err != nil || got != want {
			t.Errorf("%s = %q, %v; want %q", name, got, err, want)
		}
	}
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}
