package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"os"
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

// Without a key there is nothing to look for: unknown at once, and no connection is made for it.
func TestLostReplyOfAKeylessCommitIsUnknown(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 1
		counted(c, &connections)
		through(t, c.ConnConfig, func(pgfault.Commit) pgfault.Fault { return pgfault.Fault{Kind: pgfault.CutAfter} })
	}})
	want(t, b.do(t, request("", ""), pay(t, 201)), idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections were made, want the pool's alone", n)
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
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
