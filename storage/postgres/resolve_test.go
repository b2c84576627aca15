package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// resolution is the result of Resolve.
type resolution struct {
	record *idempotency.Record
	err    error
}

func (b *testBundle) resolve(ctx context.Context, key string) resolution {
	record, err := b.store.Resolve(ctx, claimOf(request(key, "")))
	return resolution{record, err}
}

func (b *testBundle) resolveLater(ctx context.Context, key string) <-chan resolution {
	done := make(chan resolution, 1)
	go func() { done <- b.resolve(ctx, key) }()
	return done
}

// wantUnknown fails if Resolve found the outcome.
func (r resolution) wantUnknown(t *testing.T) {
	t.Helper()
	if r.record != nil || !errors.Is(r.err, idempotency.ErrUnknown) {
		t.Errorf("record %v, error %v; want ErrUnknown", r.record != nil, r.err)
	}
}

// wantAbsent fails if Resolve did not prove that there is no record.
func (r resolution) wantAbsent(t *testing.T) {
	t.Helper()
	if r.record != nil || r.err != nil {
		t.Errorf("record %v, error %v; want neither", r.record != nil, r.err)
	}
}

// wantBody fails if Resolve did not find the record with this body.
func (r resolution) wantBody(t *testing.T, body string) {
	t.Helper()
	if r.err != nil || r.record == nil || string(r.record.Answer.Body) != body {
		t.Errorf("record %+v, error %v; want body %q", r.record, r.err, body)
	}
}

// shortly returns a context for a Resolve that can't find the outcome.
func shortly(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// lockNumber returns the lock number of a request's key.
func lockNumber(key string) int64 {
	return idempotency.Key{Scope: "acme", Value: key}.LockNumber("public." + postgres.TableName)
}

// hold opens a transaction that holds the keys, as attempts on half-open connections do.
func (b *testBundle) hold(t *testing.T, keys ...string) pgx.Tx {
	t.Helper()
	tx, err := b.pool.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	for _, key := range keys {
		if _, err := tx.Exec(context.Background(), "SELECT pg_advisory_xact_lock($1)", lockNumber(key)); err != nil {
			t.Fatal(err)
		}
	}
	return tx
}

type execer interface {
	Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error)
}

// record records a key without an attempt.
func record(t *testing.T, db execer, key, requestBody, body string) {
	t.Helper()
	sum := request(key, requestBody).Fingerprint.Sum
	if _, err := db.Exec(context.Background(), `INSERT INTO idempotency_keys
		(created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		VALUES (now(), now() + interval '1 day', 201, 1, gen_random_uuid(), 'acme', $1, $2, '\x0100', $3)`, key, sum[:], []byte(body)); err != nil {
		t.Error(err)
	}
}

const waitingResolvers = `SELECT count(*) FROM pg_stat_activity
	WHERE datname = current_database() AND wait_event = 'advisory'`

// awaitResolvers waits until that many backends wait for a key's lock.
func (b *testBundle) awaitResolvers(t *testing.T, want int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); b.count(t, waitingResolvers) != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d resolvers wait, want %d", b.count(t, waitingResolvers), want)
		}
	}
}

// counted counts the connections that are made, including those of resolvers.
func counted(c *pgxpool.Config, n *atomic.Int64) {
	c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
		n.Add(1)
		return nil
	}
}

// The lock comes first, in a statement of its own, whatever the store's isolation: a look-up from
// before the lock, or with the lock's snapshot, misses the record, and an executed payment is
// reported as not executed.
func TestResolveLooksOnceTheLockIsFree(t *testing.T) {
	t.Parallel()
	pooler := &setupOptions{store: &postgres.Options{TransactionPooling: true}, configure: func(c *pgxpool.Config) {
		c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	}}
	for name, opts := range map[string]*setupOptions{
		"read committed": nil,
		"serializable":   {store: &postgres.Options{Isolation: pgx.Serializable}},
		"serializable by default": {configure: func(c *pgxpool.Config) {
			c.ConnConfig.RuntimeParams["default_transaction_isolation"] = "serializable"
		}},
		"read only by default": {configure: func(c *pgxpool.Config) {
			c.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on"
		}},
		"short statements": {store: &postgres.Options{StatementTimeout: 100 * time.Millisecond, LockTimeout: 50 * time.Millisecond}},
		"pooler":           pooler,
		"not configured":   {cold: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var connections atomic.Int64
			o := setupOptions{}
			if opts != nil {
				o = *opts
			}
			inner := o.configure
			o.configure = func(c *pgxpool.Config) {
				counted(c, &connections)
				if inner != nil {
					inner(c)
				}
			}
			b := setup(t, &o)
			for key, end := range map[string]func(pgx.Tx) error{
				"committed":   func(tx pgx.Tx) error { return tx.Commit(context.Background()) },
				"rolled-back": func(tx pgx.Tx) error { return tx.Rollback(context.Background()) },
			} {
				holder := b.hold(t)
				if _, err := holder.Exec(context.Background(), "SET TRANSACTION READ WRITE"); err != nil {
					t.Fatal(err)
				}
				if _, err := holder.Exec(context.Background(), "SELECT pg_advisory_xact_lock($1)", lockNumber(key)); err != nil {
					t.Fatal(err)
				}
				record(t, holder, key, "", "theirs")
				b.awaitResolvers(t, 0)
				before := connections.Load()
				resolved := b.resolveLater(context.Background(), key)
				b.awaitResolvers(t, 1)
				// The wait is longer than the store's own timeouts, which must not cut it off.
				time.Sleep(500 * time.Millisecond)
				if n := connections.Load() - before; n > 2 {
					t.Errorf("%d connections were made for one look", n)
				}
				select {
				case got := <-resolved:
					t.Fatalf("it did not wait: record %v, error %v", got.record != nil, got.err)
				default:
				}
				if err := end(holder); err != nil {
					t.Fatal(err)
				}
				if key == "committed" {
					(<-resolved).wantBody(t, "theirs")
				} else {
					(<-resolved).wantAbsent(t)
				}
			}
		})
	}
}

// A resolver that does not get the lock gives up after a while, so that others get its place, and
// tries again. When its time has elapsed the outcome is unknown.
func TestResolveGivesItsPlaceToOthers(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	b := setup(t, &setupOptions{store: &postgres.Options{ResolversMax: 2}, configure: func(c *pgxpool.Config) { counted(c, &connections) }})
	holder := b.hold(t, "a", "b", "c")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	a, second := b.resolveLater(ctx, "a"), b.resolveLater(ctx, "b")
	b.awaitResolvers(t, 2)
	before := connections.Load()

	b.resolve(shortly(t), "free").wantUnknown(t) // no place, although the key is free
	if n := connections.Load() - before; n != 0 {
		t.Errorf("%d connections were made without a place", n)
	}
	// This one gets its turn while the others still have no result.
	b.resolve(context.Background(), "free").wantAbsent(t)
	select {
	case <-a:
		t.Error("a is over")
	case <-second:
		t.Error("b is over")
	default:
	}
	third := b.resolveLater(ctx, "c")
	for deadline := time.Now().Add(500 * time.Millisecond); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if n := b.count(t, waitingResolvers); n > 2 {
			t.Fatalf("%d resolvers at once, want 2 at most", n)
		}
	}
	record(t, holder, "c", "", "theirs")
	if err := holder.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	(<-a).wantAbsent(t)
	(<-second).wantAbsent(t)
	(<-third).wantBody(t, "theirs")
}

func TestResolveOfAKeyThatStaysHeldIsUnknown(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	holder := b.hold(t, "k")
	// Longer than one wait for the lock.
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	b.resolve(ctx, "k").wantUnknown(t)
	if ctx.Err() == nil {
		t.Error("it gave up early")
	}
	if err := holder.Rollback(context.Background()); err != nil {
		t.Fatal(err)
	}
	b.resolve(context.Background(), "k").wantAbsent(t)
}

// A resolver takes nothing from the pool, and leaves nothing behind: no session, no lock, no
// connection.
func TestResolveNeedsNoRoomInThePool(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	busy, err := b.pool.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for range 8 {
		b.resolve(ctx, "k").wantBody(t, "done")
		b.resolve(ctx, "absent").wantAbsent(t)
	}
	busy.Release()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		n := b.count(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d sessions are left", n)
		}
	}
	if n := b.pool.Stat().TotalConns(); n != 1 {
		t.Errorf("%d connections in the pool, want 1", n)
	}
}

// One connection, made like the pool's, and one look-up: nothing is prepared on it.
func TestResolverConnectsAsThePoolDoes(t *testing.T) {
	t.Parallel()
	var hooks []string
	password := "wrong"
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		inner := c.AfterConnect
		c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			hooks = append(hooks, "after")
			if password == "failing" {
				return errors.New("not today")
			}
			return inner(ctx, conn)
		}
		c.BeforeConnect = func(_ context.Context, config *pgx.ConnConfig) error {
			hooks = append(hooks, "before")
			if password == "none" {
				return errors.New("no password")
			}
			config.Host = strings.TrimSuffix(config.Host, "/nowhere") // as a rotated password
			return nil
		}
		c.ConnConfig.Host += "/nowhere"
	}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	hooks = nil
	before := b.wire.Count()
	b.resolve(context.Background(), "k").wantBody(t, "done")
	if n := b.wire.Count() - before; n != 4 { // connect, look up, roll back, terminate
		t.Errorf("%d round trips, want 4", n)
	}
	if !slices.Equal(hooks, []string{"before", "after"}) {
		t.Errorf("hooks called: %q", hooks)
	}
	for _, fault := range []string{"none", "failing"} {
		password = fault
		b.resolve(shortly(t), "k").wantUnknown(t)
	}
	password = ""
	b.resolve(context.Background(), "k").wantBody(t, "done")
}

// With another client_encoding our bytes are another scope, which has no record.
func TestResolverRefusesAnotherEncoding(t *testing.T) {
	t.Parallel()
	var encoding atomic.Value
	encoding.Store("UTF8")
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.BeforeConnect = func(_ context.Context, config *pgx.ConnConfig) error {
			config.RuntimeParams["client_encoding"] = encoding.Load().(string)
			return nil
		}
	}})
	req := request("k", "")
	req.Key.Scope = "Zoë"
	want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
	encoding.Store("LATIN1")
	record, err := b.store.Resolve(shortly(t), claimOf(req))
	resolution{record, err}.wantUnknown(t)
	encoding.Store("UTF8")
	record, err = b.store.Resolve(context.Background(), claimOf(req))
	resolution{record, err}.wantBody(t, "done")
}

// A record that can't be read stays unreadable: it is read once, and the outcome is unknown.
func TestResolveOfAnUnreadableRecordIsUnknown(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { counted(c, &connections) }})
	record(t, b.pool, "k", "", "done")
	if _, err := b.pool.Exec(context.Background(), `UPDATE idempotency_keys SET headers = '\x01ff'`); err != nil {
		t.Fatal(err)
	}
	before := connections.Load()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	b.resolve(ctx, "k").wantUnknown(t)
	if n := connections.Load() - before; n != 1 {
		t.Errorf("it was looked at %d times, want once", n)
	}
}

// An error on the way proves nothing.
func TestResolveWithoutATableIsUnknown(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for _, sql := range []string{"ALTER TABLE idempotency_keys RENAME TO gone", "ALTER TABLE gone RENAME COLUMN key TO k"} {
		if _, err := b.pool.Exec(context.Background(), sql); err != nil {
			t.Fatal(err)
		}
		b.resolve(shortly(t), "k").wantUnknown(t)
	}
	dead, cancel := context.WithCancel(context.Background())
	cancel()
	b.resolve(dead, "k").wantUnknown(t)
}

func TestOptionsOfResolvers(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for given, want := range map[int]int{0: 8, 1: 1, 100: 100} {
		if got := postgres.ResolversOf(postgres.New(b.pool, &postgres.Options{ResolversMax: given})); got != want {
			t.Errorf("ResolversMax %d: %d places, want %d", given, got, want)
		}
	}
	defer func() {
		if text := fmt.Sprint(recover()); !strings.Contains(text, "ResolversMax") {
			t.Errorf("panic %q, want one that names ResolversMax", text)
		}
	}()
	postgres.New(b.pool, &postgres.Options{ResolversMax: -1})
}

// A server that accepts connections and never answers costs a resolver two seconds, not all of its
// time.
func TestResolverConnectsToTheNextServer(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	port := uint16(silent.Addr().(*net.TCPAddr).Port)
	var resolving atomic.Bool
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.BeforeConnect = func(_ context.Context, config *pgx.ConnConfig) error {
			if resolving.Load() { // the pool leads to the first of two hosts
				config.Fallbacks = []*pgconn.FallbackConfig{{Host: config.Host, Port: config.Port}}
				config.Host, config.Port = "127.0.0.1", port
			}
			return nil
		}
	}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	resolving.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), 7*time.Second)
	defer cancel()
	b.resolve(ctx, "k").wantBody(t, "done")
}

// The resolver trusts a server only if its log is at least as far as at the claim: any position on
// a later timeline, the claim's position or later on the same one, never an earlier timeline. From
// any other server it does not even believe a record.
func TestResolveAsksNoServerThatIsBehindTheClaim(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for _, recorded := range []bool{false, true} {
		claim := claimOf(request(fmt.Sprint("k", recorded), ""))
		attempt, record, err := b.store.Begin(t.Context(), claim)
		if err != nil || record != nil {
			t.Fatal(record, err)
		}
		if recorded {
			err = attempt.Commit(t.Context(), answer(201))
		} else {
			err = attempt.Rollback(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		if claim.Timeline == 0 || claim.Position == 0 || claim.At.IsZero() {
			t.Fatalf("the claim was made at %+v", claim)
		}
		for _, c := range []struct {
			name   string
			change func(*idempotency.Claim)
			counts bool
		}{
			{"as it is", func(*idempotency.Claim) {}, true},
			{"a later timeline", func(c *idempotency.Claim) { c.Timeline--; c.Position = math.MaxUint64 }, true},
			{"an earlier timeline", func(c *idempotency.Claim) { c.Timeline++; c.Position = 0 }, false},
			{"the same, earlier", func(c *idempotency.Claim) { c.Position += 1 << 40 }, false},
			{"not told", func(c *idempotency.Claim) { c.Timeline = 0; c.Position = math.MaxUint64 }, true},
		} {
			asked := *claim
			c.change(&asked)
			const old = "old one that was not stopped"
			timeout := 10 * time.Second
			if !c.counts {
				timeout = 300 * time.Millisecond // Resolve uses all of it: another server might come
			}
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			record, err := b.store.Resolve(ctx, &asked)
			cancel()
			for !c.counts && err != nil && !strings.Contains(err.Error(), old) && timeout < 20*time.Second {
				timeout *= 2 // a busy machine could not even connect
				ctx, cancel = context.WithTimeout(t.Context(), timeout)
				record, err = b.store.Resolve(ctx, &asked)
				cancel()
			}
			if c.counts && (err != nil || (record != nil) != recorded) || !c.counts && (record != nil || !errors.Is(err, idempotency.ErrUnknown) || !strings.Contains(err.Error(), old)) {
				t.Errorf("%s, recorded %t: record %t, %v", c.name, recorded, record != nil, err)
			}
		}
	}
}

// Some services that speak PostgreSQL's protocol don't return the position of their log. The store
// works with them all the same, and asks once.
func TestServerThatDoesNotTellItsPositionIsServed(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"not allowed":   "REVOKE EXECUTE ON FUNCTION pg_catalog.pg_current_wal_flush_lsn() FROM PUBLIC",
		"not there":     "ALTER FUNCTION pg_catalog.pg_walfile_name(pg_lsn) RENAME TO pg_walfile_name_gone",
		"not supported": "ALTER FUNCTION pg_catalog.pg_current_wal_flush_lsn() RENAME TO pg_current_wal_flush_lsn_gone; CREATE FUNCTION pg_catalog.pg_current_wal_flush_lsn() RETURNS pg_lsn LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = '55000'; END $$",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			owner := setup(t, nil)
			role := owner.role(t, rightsOfAService...)
			owner.exec(t, "SET allow_system_table_mods = on; "+sql) // only in this database
			b := owner.as(t, role, nil, func(c *pgxpool.Config) { c.MaxConns = 1 })
			for _, key := range []string{"first", "second"} {
				want(t, b.do(t, request(key, ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
				want(t, b.do(t, request(key, ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
			}
			claim := claimOf(request("claimed", ""))
			attempt, _, err := b.store.Begin(t.Context(), claim)
			if err != nil {
				t.Fatal(err)
			}
			if err := attempt.Rollback(t.Context()); err != nil || claim.Timeline != 0 || claim.At.IsZero() {
				t.Errorf("%+v, %v", claim, err)
			}
			if record, err := b.store.Resolve(t.Context(), claim); record != nil || err != nil {
				t.Errorf("%v, %v", record, err)
			}
		})
	}
}

// through makes a pool connect through a proxy that injects the faults that onCommit returns.
func through(t *testing.T, config *pgx.ConnConfig, onCommit func(pgfault.Commit) pgfault.Fault) *pgfault.Proxy {
	t.Helper()
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: onCommit})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proxy.Close() })
	viaProxy, err := pgx.ParseConfig(proxy.URL("postgres:///"))
	if err != nil {
		t.Fatal(err)
	}
	config.Host, config.Port = viaProxy.Host, viaProxy.Port
	return proxy
}

// onLost injects a fault into the flushes that contain the key "lost".
func onLost(fault pgfault.Fault) func(pgfault.Commit) pgfault.Fault {
	return func(c pgfault.Commit) pgfault.Fault {
		if bytes.Contains(c.Messages, []byte("lost")) {
			return fault
		}
		return pgfault.Fault{}
	}
}

func setupFault(t *testing.T, fault pgfault.Fault) (*testBundle, *pgfault.Proxy) {
	t.Helper()
	var proxy *pgfault.Proxy
	return setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		proxy = through(t, c.ConnConfig, onLost(fault))
	}}), proxy
}

// However the reply to COMMIT is lost, the client gets the true outcome, or unknown.
func TestF08ToF12LostReplyToCommitIsLookedUp(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault   pgfault.Fault
		outcome idempotency.Outcome
		reason  idempotency.Reason
		effects int
		retry   idempotency.Outcome
	}{
		"cut before":  {pgfault.Fault{Kind: pgfault.CutBefore}, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable, 0, ""},
		"cut after":   {pgfault.Fault{Kind: pgfault.CutAfter}, idempotency.OutcomeExecuted, "", 1, idempotency.OutcomeReplayed},
		"silence":     {pgfault.Fault{Kind: pgfault.Silence}, idempotency.OutcomeExecuted, "", 1, idempotency.OutcomeReplayed},
		"late commit": {pgfault.Fault{Kind: pgfault.LateCommit, Delay: time.Second}, idempotency.OutcomeExecuted, "", 1, idempotency.OutcomeReplayed},
		"half open":   {pgfault.Fault{Kind: pgfault.HalfOpen}, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown, 0, idempotency.OutcomeInProgress},
	} {
		for _, status := range []int{201, 402} {
			t.Run(name+map[int]string{201: ", commit", 402: ", decline"}[status], func(t *testing.T) {
				t.Parallel()
				b, proxy := setupFault(t, c.fault)
				options := &idempotency.Options{Timeouts: idempotency.Timeouts{Commit: time.Second}}
				if c.outcome == idempotency.OutcomeUnknown {
					options.Timeouts.Resolve = time.Second
				}
				engine := idempotency.NewEngine(b.store, options)
				runs := 0
				result := engine.Do(context.Background(), request("lost", ""), func(ctx context.Context) (*idempotency.Answer, error) {
					runs++
					effect(ctx, t)
					return answer(status), nil
				})
				// A decline undoes the writes in any case. It does not hold the key between its
				// ROLLBACK and its INSERT, so an absent record proves nothing, and a late one may
				// be missed.
				effects, outcome, reason := c.effects, c.outcome, c.reason
				if status == 402 {
					effects = 0
					if outcome == idempotency.OutcomeNotExecuted || name == "late commit" && result.Outcome != c.outcome {
						outcome, reason = idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown
					}
				}
				want(t, result, outcome, reason)
				if runs != 1 {
					t.Errorf("%d runs, want 1", runs)
				}
				if hits := proxy.Hits()[c.fault.Kind]; hits != 1 {
					t.Errorf("%d COMMITs were spoiled, want 1", hits)
				}
				if n := b.effects(t); n != effects {
					t.Errorf("%d effects, want %d", n, effects)
				}
				if c.retry != "" && outcome == c.outcome {
					want(t, engine.Do(context.Background(), request("lost", ""), func(context.Context) (*idempotency.Answer, error) {
						t.Error("the handler ran again")
						return nil, errors.New("again")
					}), c.retry, map[bool]idempotency.Reason{true: idempotency.ReasonInProgress}[c.retry == idempotency.OutcomeInProgress])
				}
				// Once PostgreSQL has ended the half-open session.
				if c.outcome == idempotency.OutcomeUnknown {
					b.count(t, "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'")
					b.resolve(context.Background(), "lost").wantAbsent(t)
				}
			})
		}
	}
}

// The record that is found may be another attempt's: it is compared like any other.
func TestLostReplyMayFindAnothersRecord(t *testing.T) {
	t.Parallel()
	for body, c := range map[string]struct {
		outcome idempotency.Outcome
		reason  idempotency.Reason
	}{"": {idempotency.OutcomeReplayed, ""}, "another": {idempotency.OutcomeMismatch, idempotency.ReasonKeyReused}} {
		b, _ := setupFault(t, pgfault.Fault{Kind: pgfault.CutBefore})
		result := b.do(t, request("lost", ""), func(ctx context.Context, _ pgx.Tx) int {
			effect(ctx, t)
			record(t, b.pool, "lost", body, "theirs")
			return 201
		})
		want(t, result, c.outcome, c.reason)
		if c.outcome == idempotency.OutcomeReplayed && (result.Answer == nil || string(result.Answer.Body) != "theirs") {
			t.Errorf("answer %+v, want theirs", result.Answer)
		}
		if n := b.effects(t); n != 0 {
			t.Errorf("%d effects, want none", n)
		}
	}
}

// An outage begins with the loss of the reply: a client that retries until the database is back
// gets the true outcome.
func TestResolveOutlivesARestart(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own, and restarts it")
	ctx := context.Background()
	if os.Getenv("PAIDONCE_TEST_DATABASE_URL") != "" {
		t.Skip("it stops a server of its own")
	}
	folder := pgtest.Folder(t)
	start := func() *pgserver.Server {
		server, err := pgserver.Start(ctx, &pgserver.Options{DataDir: folder})
		if err != nil {
			t.Error(err)
		}
		return server
	}
	server := start()
	if server == nil {
		return
	}
	defer func() { _ = server.Stop() }()
	config, err := pgxpool.ParseConfig(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	var proxy *pgfault.Proxy
	lost := make(chan struct{})
	var looks atomic.Int64
	counted(config, &looks)
	proxy = through(t, config.ConnConfig, func(c pgfault.Commit) pgfault.Fault {
		if !bytes.Contains(c.Messages, []byte("lost")) {
			return pgfault.Fault{}
		}
		proxy.SetRefuse(true)
		looks.Store(0)
		close(lost)
		return pgfault.Fault{Kind: pgfault.CutAfter}
	})
	postgres.Configure(config, nil)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	if err := migrations.Up(ctx, postgres.New(pool, nil), nil); err != nil {
		t.Fatal(err)
	}
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		<-lost
		for looks.Load() < 3 { // it asks, and is refused
			time.Sleep(time.Millisecond)
		}
		server.Kill() // no checkpoint: the record is there because COMMIT waited for the disk
		_ = server.Stop()
		if server = start(); server == nil {
			return
		}
		network, address, err := pgfault.Upstream(server.URL())
		if err != nil {
			t.Error(err)
		}
		proxy.SetUpstream(network, address)
		proxy.SetRefuse(false)
	}()
	engine := idempotency.NewEngine(postgres.New(pool, nil), &idempotency.Options{Timeouts: idempotency.Timeouts{Resolve: time.Minute}})
	run := func(context.Context) (*idempotency.Answer, error) { return answer(201), nil }
	want(t, engine.Do(ctx, request("lost", ""), run), idempotency.OutcomeExecuted, "")
	<-restarted
	want(t, engine.Do(ctx, request("lost", ""), run), idempotency.OutcomeReplayed, "")
}
