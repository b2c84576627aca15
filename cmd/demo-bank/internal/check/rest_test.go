package check

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/internal/nodeid"
)

func (b *bundle) live(limit Bounds, planted ...Key) []Result {
	b.t.Helper()
	r, err := Live(b.t.Context(), b.conn, append(Acknowledged(b.ops), planted...), limit)
	if err != nil {
		b.t.Fatal(err)
	}
	return []Result{r}
}

// The store's own reaper deletes only expired records; one that deletes more is caught.
func TestDeletedLiveRecordIsCaught(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.work()
	plant := func(key, expires string) Key {
		b.exec(`INSERT INTO demo_bank.idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now() - interval '1 day', now() + $2::text::interval, 402, 1, gen_random_uuid(), 'planted', $1, '', '', '')`, key, expires)
		return Key{"planted", key}
	}
	young := plant("young", "1 hour")
	plant("old 1", "-1 second")
	plant("old 2", "-1 hour")
	bounds := Bounds{Live: 7, Expired: 2}
	wantWrong(t, b.live(bounds, young))
	wantWrong(t, b.live(Bounds{Live: 6, Expired: 2}, young), LiveRecordsKept)
	wantWrong(t, b.live(Bounds{Live: 7, Expired: 1}, young), LiveRecordsKept)
	if deleted, err := b.store.DeleteExpired(t.Context()); deleted != 2 || err != nil {
		t.Fatalf("the reaper deleted %d, %v", deleted, err)
	}
	bounds.Expired = 0
	wantWrong(t, b.live(bounds, young))

	b.exec("DELETE FROM demo_bank.idempotency_keys WHERE scope = 'planted'")
	wantWrong(t, b.live(bounds, young), LiveRecordsKept)
	wantWrong(t, b.live(bounds))
	b.exec("DELETE FROM demo_bank.idempotency_keys WHERE scope = 'globex' AND key = 'k1'")
	wantWrong(t, b.live(bounds), LiveRecordsKept)
	if got := b.live(bounds)[0]; got.Seen != 6 || got.Count != 1 {
		t.Errorf("live is %+v", got)
	}
}

func (b *bundle) quiet() []Result {
	b.t.Helper()
	r, err := Quiet(b.t.Context(), b.conn)
	if err != nil {
		b.t.Fatal(err)
	}
	return []Result{r}
}

func TestWhatAFaultLeavesBehindIsCaught(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql   []string
		noisy bool
	}{
		"nothing":                {nil, false},
		"a session":              {[]string{"SELECT 1"}, false},
		"a key's lock":           {[]string{"SELECT pg_advisory_lock(-12345678901)"}, true},
		"another kind of lock":   {[]string{"SELECT pg_advisory_lock(1, 2)"}, true},
		"a bank's lease":         {[]string{fmt.Sprintf("SELECT pg_advisory_lock(%d, 2)", nodeid.LockNamespace)}, false},
		"an open transaction":    {[]string{"BEGIN"}, true},
		"an aborted transaction": {[]string{"BEGIN", "SELECT 1/0"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			other := b.connect()
			b.await(func() bool { return b.quiet()[0].OK() }) // the session that migrated is gone
			for _, sql := range c.sql {
				if _, err := other.Exec(t.Context(), sql); err != nil && sql != "SELECT 1/0" {
					t.Fatal(err)
				}
			}
			if c.noisy {
				wantWrong(t, b.quiet(), Quieted)
			} else {
				wantWrong(t, b.quiet())
			}
			if b.quiet()[0].Seen == 0 {
				t.Error("it saw no session")
			}
			// Another database's sessions do not count.
			apart := setup(t)
			apart.await(func() bool { return apart.quiet()[0].OK() })
			// When its session ends, its locks end.
			if err := other.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.await(func() bool { return b.quiet()[0].OK() })
		})
	}
}

// await polls until so returns true: another session's state is visible a moment later.
func (b *bundle) await(so func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatal("it did not become so in time")
		}
	}
}

// A session that waits for a lock is counted besides the one that holds it.
func TestWaitingSessionIsCaught(t *testing.T) {
	t.Parallel()
	b := setup(t)
	holder, waiter := b.connect(), b.connect()
	for _, sql := range []string{"BEGIN", "LOCK demo_bank.accounts"} {
		if _, err := holder.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := waiter.Exec(t.Context(), "SELECT 1 FROM demo_bank.accounts LIMIT 1")
		done <- err
	}()
	b.await(func() bool { return b.quiet()[0].Count == 2 })
	if _, err := holder.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	b.await(func() bool { return b.quiet()[0].OK() })
}

// A role that cannot see the others' sessions cannot report that they are quiet.
func TestQuietNeedsToSeeTheSessions(t *testing.T) {
	t.Parallel()
	b := setup(t)
	role := "blind_" + b.conn.Config().Database
	b.exec("CREATE ROLE " + pgx.Identifier{role}.Sanitize() + " LOGIN PASSWORD 'blind'")
	t.Cleanup(func() { b.dropRole(role) })
	config := b.conn.Config().Copy()
	config.User, config.Password = role, "blind"
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := Quiet(t.Context(), conn); err == nil {
		t.Errorf("a blind role says %+v", r)
	}
	b.exec("GRANT pg_read_all_stats TO " + pgx.Identifier{role}.Sanitize())
	b.await(func() bool { return b.quiet()[0].OK() })
	if r, err := Quiet(t.Context(), conn); err != nil || !r.OK() || r.Seen == 0 {
		t.Errorf("a role that sees says %+v, %v", r, err)
	}
	if err := conn.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func (b *bundle) dropRole(role string) {
	b.t.Helper()
	config, err := pgconn.ParseConfig(b.url)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx := context.WithoutCancel(b.t.Context())
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, "DROP ROLE "+pgx.Identifier{role}.Sanitize()).ReadAll(); err != nil {
		b.t.Error(err)
	}
	if err := conn.Close(ctx); err != nil {
		b.t.Error(err)
	}
}

func TestLeakedResourcesAreCaught(t *testing.T) {
	t.Parallel()
	before := Resources{Goroutines: 20, FileDescriptors: 30, Connections: 8}
	for name, c := range map[string]struct {
		change func(*Resources)
		wrong  []string
	}{
		"nothing more": {func(*Resources) {}, nil},
		"less":         {func(r *Resources) { *r = Resources{10, 10, 0} }, nil},
		"as many more as are allowed": {func(r *Resources) {
			*r = Resources{20 + GoroutinesMore, 30 + FileDescriptorsMore, 8 + ConnectionsMore}
		}, nil},
		"a goroutine too many":       {func(r *Resources) { r.Goroutines += GoroutinesMore + 1 }, []string{BackAtBaseline}},
		"a file too many":            {func(r *Resources) { r.FileDescriptors += FileDescriptorsMore + 1 }, []string{BackAtBaseline}},
		"a connection too many":      {func(r *Resources) { r.Connections += ConnectionsMore + 1 }, []string{BackAtBaseline}},
		"goroutines nobody measured": {func(r *Resources) { r.Goroutines = 0 }, []string{BackAtBaseline}},
		"files nobody measured":      {func(r *Resources) { r.FileDescriptors = 0 }, []string{BackAtBaseline}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			after := before
			c.change(&after)
			wantWrong(t, []Result{Baseline(before, after)}, c.wrong...)
		})
	}
	wantWrong(t, []Result{Baseline(Resources{}, before)}, BackAtBaseline)
}
