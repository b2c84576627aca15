package nodeid

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/bwmarrin/snowflake"
	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// open leases a number from the database and keeps the lease until the test ends or end is called.
func open(t *testing.T, database string) (s *Source, end func()) {
	t.Helper()
	config, err := pgx.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	s, err = Open(t.Context(), config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() { s.Run(ctx) })
	end = func() {
		cancel()
		group.Wait()
	}
	t.Cleanup(end)
	return s, end
}

func nodeOf(t *testing.T, s *Source) int64 {
	t.Helper()
	id, err := s.Next()
	if err != nil {
		t.Fatal(err)
	}
	return snowflake.ParseInt64(id).Node()
}

func connect(t *testing.T, database string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// takeAllBut locks every node number but some.
func takeAllBut(t *testing.T, conn *pgx.Conn, free ...int) {
	t.Helper()
	_, err := conn.Exec(t.Context(), `SELECT pg_advisory_lock($1, n) FROM generate_series(0, $2 - 1) AS n WHERE n <> ALL ($3)`, LockNamespace, Nodes, free)
	if err != nil {
		t.Fatal(err)
	}
}

// TestTwoLeasesDiffer: with two numbers left, two sources take one each, and a third finds none. A
// released number goes to the next source.
func TestTwoLeasesDiffer(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	takeAllBut(t, connect(t, database), 17, 1023)
	first, end := open(t, database)
	second, _ := open(t, database)
	one, other := nodeOf(t, first), nodeOf(t, second)
	if one == other || one != 17 && one != 1023 || other != 17 && other != 1023 {
		t.Errorf("the nodes are %d and %d, want 17 and 1023", one, other)
	}
	config, err := pgx.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), config, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a third source leased a number where none was left")
	}
	end()
	if err := first.Check(); !errors.Is(err, ErrNoLease) {
		t.Errorf("a lease that was given back checks as %v", err)
	}
	var third *Source
	eventually(t, "the number that was given back is free", func() bool {
		third, err = Open(t.Context(), config, slog.New(slog.DiscardHandler))
		return err == nil
	})
	if got := nodeOf(t, third); got != one {
		t.Errorf("the third source has node %d, want %d", got, one)
	}
	third.release()
}

// TestALostLeaseMakesNoIDs: when its conn is lost, a source notices at once, makes no id while it
// has no lease, and continues with a new lease.
func TestALostLeaseMakesNoIDs(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	s, _ := open(t, database)
	before := nodeOf(t, s)

	// First it cannot even connect. Then it can, but all numbers are taken.
	elsewhere := connect(t, pgtest.Database(t))
	admin := connect(t, database)
	takeAllBut(t, admin, int(before))
	name := pgx.Identifier{admin.Config().Database}.Sanitize()
	if _, err := elsewhere.Exec(t.Context(), `ALTER DATABASE `+name+` WITH ALLOW_CONNECTIONS false`); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'node id' AND datname = current_database()`); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.Exec(t.Context(), `SELECT pg_advisory_lock($1, $2)`, LockNamespace, before); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the loss is noticed", func() bool {
		_, err := s.Next()
		return errors.Is(err, ErrNoLease) && errors.Is(s.Check(), ErrNoLease)
	})
	if _, err := elsewhere.Exec(t.Context(), `ALTER DATABASE `+name+` WITH ALLOW_CONNECTIONS true`); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * retryInterval) // a source that leased without a free number would have by now
	if _, err := s.Next(); !errors.Is(err, ErrNoLease) {
		t.Errorf("without a free number Next says %v", err)
	}
	const free = 400
	if _, err := admin.Exec(t.Context(), `SELECT pg_advisory_unlock($1, $2)`, LockNamespace, free); err != nil {
		t.Fatal(err)
	}
	eventually(t, "there is a new lease", func() bool { return s.Check() == nil })
	if got := nodeOf(t, s); got != free {
		t.Errorf("the new lease is of node %d, want %d", got, free)
	}
}

// TestIDsAreNew: from many goroutines no id comes twice, and each is greater than those before it
// in its goroutine.
func TestIDsAreNew(t *testing.T) {
	t.Parallel()
	s, _ := open(t, pgtest.Database(t))
	const goroutines, each = 8, 2000
	ids := make([][]int64, goroutines)
	var group sync.WaitGroup
	for i := range ids {
		group.Go(func() {
			for range each {
				id, err := s.Next()
				if err != nil {
					t.Error(err)
					return
				}
				ids[i] = append(ids[i], id)
			}
		})
	}
	group.Wait()
	seen := map[int64]bool{}
	for _, list := range ids {
		for i, id := range list {
			if seen[id] || i > 0 && id <= list[i-1] {
				t.Fatalf("id %d came twice or out of order", id)
			}
			seen[id] = true
		}
	}
}

func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came true: %s", what)
		}
	}
}
