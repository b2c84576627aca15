package pgintent_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) {
	if arguments := strings.Fields(os.Getenv(childVariable)); len(arguments) == 3 {
		os.Exit(payAsChild(arguments))
	}
	pgtest.Main(m)
}

func setup(t *testing.T, change ...func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	return setupOn(t, pgtest.Database(t), change...)
}

func setupOn(t *testing.T, database string, change ...func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(config)
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if err := pgintent.Create(t.Context(), pool, nil); err != nil {
		t.Fatal(err)
	}
	return pool
}

func TestConformance(t *testing.T) {
	t.Parallel()
	pool := setup(t) // every case has another owner
	intenttest.Run(t, func(t *testing.T) client.IntentStore { return pgintent.New(pool, &pgintent.Options{Owner: t.Name()}) })
}

// TestTakenIntentIsNotItsOldHoldersAnyMore: only the holder of an intent may abandon it, and
// another store may take it only after PendingAfter.
func TestTakenIntentIsNotItsOldHoldersAnyMore(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	ctx := t.Context()
	patient := pgintent.New(pool, nil)
	hasty := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond})
	other := pgintent.New(pool, &pgintent.Options{Owner: "other", PendingAfter: time.Microsecond})
	holder := pgintent.New(pool, nil)
	if _, err := holder.Save(ctx, intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	for name, one := range map[string]struct {
		store *pgintent.Store
		want  int
	}{"its holder": {holder, 1}, "a patient one": {patient, 0}, "another owner": {other, 0}, "a hasty one": {hasty, 1}} {
		if keys, err := one.store.Pending(ctx); err != nil || len(keys) != one.want {
			t.Errorf("for %s %q are pending, %v", name, keys, err)
		}
	}
	for _, store := range []*pgintent.Store{patient, other} {
		if intent, err := store.Take(ctx, "k"); intent != nil || err != nil {
			t.Errorf("it was taken too early, or by another owner: %v, %v", intent, err)
		}
		if err := store.Abandon(ctx, "k"); !errors.Is(err, client.ErrIntentTaken) {
			t.Errorf("it was abandoned by who does not hold it: %v", err)
		}
	}
	if intent, err := hasty.Take(ctx, "k"); intent == nil || err != nil {
		t.Fatalf("it was not taken: %v, %v", intent, err)
	}
	if err := holder.Abandon(ctx, "k"); !errors.Is(err, client.ErrIntentTaken) {
		t.Errorf("it was abandoned by who held it before: %v", err)
	}
	if intent, err := holder.Take(ctx, "k"); intent != nil || err != nil {
		t.Errorf("it was taken back too early: %v, %v", intent, err)
	}
	if err := hasty.Abandon(ctx, "k"); err != nil {
		t.Error(err)
	}
}

// TestOneOfManyTakes: if many stores take an old intent at once, one gets it.
func TestOneOfManyTakes(t *testing.T) {
	t.Parallel()
	pool := setup(t, func(c *pgxpool.Config) { c.MaxConns = 8 })
	if _, err := pgintent.New(pool, nil).Save(t.Context(), intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "UPDATE idempotency_intents SET touched_at = touched_at - interval '6 minutes', saved_at = saved_at - interval '6 minutes'"); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var taken []*client.Intent
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			intent, err := pgintent.New(pool, nil).Take(t.Context(), "k")
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if intent != nil {
				taken = append(taken, intent)
			}
		})
	}
	group.Wait()
	if len(taken) != 1 {
		t.Fatalf("%d took it", len(taken))
	}
	if age := time.Since(taken[0].SavedAt); age < 6*time.Minute || age > 7*time.Minute {
		t.Errorf("its age is %v", age)
	}
}

// TestPendingHasALimit: the oldest come first, and no more than the maximum.
func TestPendingHasALimit(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	store := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond})
	fill := func(n int) {
		_, err := pool.Exec(t.Context(), `INSERT INTO idempotency_intents (owner, key, holder, method, url, host, header, body, saved_at)
			SELECT '', 'k' || i, gen_random_uuid(), 'POST', '', '', '', '', clock_timestamp() + i * interval '1 second' FROM generate_series(1, $1) AS i
			ON CONFLICT DO NOTHING`, n)
		if err != nil {
			t.Fatal(err)
		}
	}
	for n, want := range map[int]int{pgintent.PendingMax: pgintent.PendingMax, pgintent.PendingMax + 1: pgintent.PendingMax} {
		fill(n)
		keys, err := store.Pending(t.Context())
		if err != nil || len(keys) != want || keys[0] != "k1" || keys[want-1] != "k1000" {
			t.Errorf("of %d intents %d are pending: %v", n, len(keys), err)
		}
	}
}

// TestPendingComesToAll: intents that stay because they are too old to be sent do not block the
// others for ever.
func TestPendingComesToAll(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	_, err := pool.Exec(t.Context(), `INSERT INTO idempotency_intents (owner, key, holder, method, url, host, header, body, saved_at, touched_at)
		SELECT '', 'k' || i, gen_random_uuid(), 'POST', '', '', '', '', at, at
		FROM generate_series(1, $1) AS i, LATERAL (SELECT clock_timestamp() - interval '1 day' + i * interval '1 second' AS at) AS old`, pgintent.PendingMax+1)
	if err != nil {
		t.Fatal(err)
	}
	store := pgintent.New(pool, nil)
	if intent, err := store.Take(t.Context(), "k1"); intent == nil || err != nil {
		t.Fatalf("it was not taken: %v, %v", intent, err)
	}
	keys, err := store.Pending(t.Context())
	if err != nil || len(keys) != pgintent.PendingMax || keys[0] != "k2" || keys[len(keys)-1] != "k1001" {
		t.Errorf("%d are pending, from %s to %s, %v", len(keys), keys[0], keys[len(keys)-1], err)
	}
}

// TestSaveIsDurableWhateverTheSessionSays: with synchronous_commit off a session acknowledges
// commits that a crash may undo. Save, even when it takes over, Take and Abandon switch it on for
// their own transaction, and leave the session as it is.
func TestSaveIsDurableWhateverTheSessionSays(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	// The trigger sees the setting that applies to the commit.
	_, err := setupOn(t, database).Exec(t.Context(), `CREATE TABLE seen (setting text, session text);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			INSERT INTO seen VALUES (current_setting('synchronous_commit'), current_setting('application_name')); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON idempotency_intents DEFERRABLE INITIALLY DEFERRED
			FOR EACH ROW EXECUTE FUNCTION see()`)
	if err != nil {
		t.Fatal(err)
	}
	for session, want := range map[string]string{"off": "on", "local": "on", "on": "on", "remote_apply": "remote_apply"} {
		pool := setupOn(t, database, func(c *pgxpool.Config) {
			c.MaxConns = 1
			c.ConnConfig.RuntimeParams["synchronous_commit"], c.ConnConfig.RuntimeParams["application_name"] = session, session
		})
		store := pgintent.New(pool, nil)
		if _, err := store.Save(t.Context(), intenttest.Intent("k")); err != nil {
			t.Fatal(err)
		}
		if before, err := store.Save(t.Context(), intenttest.Intent("k")); !before || err != nil {
			t.Fatal(before, err)
		}
		if intent, err := store.Take(t.Context(), "k"); intent == nil || err != nil {
			t.Fatal(intent, err)
		}
		if err := store.Abandon(t.Context(), "k"); err != nil {
			t.Fatal(err)
		}
		var n int
		var after string
		if err := pool.QueryRow(t.Context(), "SELECT count(*), current_setting('synchronous_commit') FROM seen WHERE setting = $1 AND session = $2", want, session).Scan(&n, &after); err != nil {
			t.Fatal(err)
		}
		if n != 4 || after != session {
			t.Errorf("with %s %d of 4 commits went by %s, and the session has %s", session, n, want, after)
		}
	}
}

// TestRefusedSavesNothing: an error of the server proves that nothing was changed.
func TestRefusedSavesNothing(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	if _, err := pgintent.New(pool, &pgintent.Options{Schema: "elsewhere"}).Save(t.Context(), intenttest.Intent("k")); !errors.Is(err, client.ErrIntentRefused) {
		t.Errorf("a table that is not there: %v", err)
	}
	bad := intenttest.Intent("k")
	bad.URL = "http://h/\xff"
	if _, err := pgintent.New(pool, nil).Save(t.Context(), bad); !errors.Is(err, client.ErrIntentRefused) {
		t.Errorf("a URL that is no text: %v", err)
	}
	pool.Close()
	if _, err := pgintent.New(pool, nil).Save(t.Context(), intenttest.Intent("k")); err == nil {
		t.Error("a pool that is closed saved")
	}
}

func TestCreateAtOnce(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	if _, err := pool.Exec(t.Context(), "DROP TABLE idempotency_intents"); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if err := pgintent.Create(t.Context(), pool, nil); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

// A service that calls Create at each start does not wait: Create does not lock an existing table,
// and so does not wait for its locks.
func TestCreateOfATableThatIsThereWaitsForNobody(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "LOCK TABLE idempotency_intents IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := pgintent.Create(ctx, pool, nil); err != nil {
		t.Error(err)
	}
}

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(){
		"no DB":                 func() { pgintent.New(nil, nil) },
		"negative PendingAfter": func() { pgintent.New(new(pgxpool.Pool), &pgintent.Options{PendingAfter: -1}) },
		"a transaction":         func() { pgintent.New(new(pgxpool.Tx), nil) },
		"a NUL":                 func() { pgintent.New(new(pgxpool.Pool), &pgintent.Options{Owner: "\x00"}) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s is taken", name)
				}
			}()
			f()
		}()
	}
}

// A service that both sends and receives payments may keep its intents through its store's pool,
// even with channel_binding=require.
func TestIntentsKeepChannelBinding(t *testing.T) {
	t.Parallel()
	pool := setupOn(t, pgtest.TLS(t).TLSURL("postgres")+"&channel_binding=require", func(config *pgxpool.Config) { postgres.Configure(config, nil) })
	intents := pgintent.New(pool, nil)
	if _, err := intents.Save(t.Context(), intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	if keys, err := intents.Pending(t.Context()); err != nil || len(keys) != 1 {
		t.Errorf("pending: %q, %v", keys, err)
	}
	if intent, err := intents.Take(t.Context(), "k"); err != nil || intent == nil {
		t.Errorf("taken: %v, %v", intent, err)
	}
}

// childVariable makes the test binary a client that pays once: "<server's URL> <database>
// <AttemptsMax>". It prints "pays" and, if it is not killed, the result.
const childVariable = "PAIDONCE_PGINTENT_CHILD"

func payAsChild(arguments []string) int {
	ctx := context.Background()
	config, err := pgxpool.ParseConfig(arguments[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	config.ConnConfig.RuntimeParams["application_name"] = childVariable
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	attempts, _ := strconv.Atoi(arguments[2]) // 0: the default
	transport := client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: attempts, Intents: pgintent.New(pool, nil)})
	_, _ = os.Stdout.WriteString("pays\n") // the parent reads until the kill
	r, err := http.NewRequestWithContext(client.WithNewKey(ctx, "order-1"), http.MethodPost, arguments[0], strings.NewReader("body"))
	if err == nil {
		_, err = transport.RoundTrip(r)
	}
	ended := fmt.Sprintf("unknown %t, taken %t, not executed %t\n",
		errors.Is(err, client.ErrUnknown), errors.Is(err, client.ErrIntentTaken), errors.Is(err, client.ErrNotExecuted))
	_, _ = os.Stdout.WriteString(ended)
	return 0
}

// startChild starts a client in a process of its own, and returns it with the lines that it prints.
func startChild(t *testing.T, server, database string, attemptsMax int) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d", childVariable, server, database, attemptsMax))
	command.Stderr = os.Stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill() // it may have ended
		_ = command.Wait()
	})
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() || lines.Text() != "pays" {
		t.Fatalf("the child says %q", lines.Text())
	}
	return command, lines
}

// TestKilledInSave: a client is killed with kill -9 while PostgreSQL is busy with its INSERT.
// Nothing was sent. If the row is kept all the same, the next process sends it, once. If not, it is
// never sent, and was never reported as paid.
func TestKilledInSave(t *testing.T) {
	t.Parallel()
	for name, kept := range map[string]bool{"PostgreSQL goes on": true, "PostgreSQL ends the session": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			database := pgtest.Database(t)
			pool := setupOn(t, database)
			var arrived atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				arrived.Add(1)
				w.Header().Set("Idempotency-Status", "executed")
			}))
			defer server.Close()
			lock, err := pool.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = lock.Rollback(context.WithoutCancel(ctx)) }() // it may have been committed
			if _, err := lock.Exec(ctx, "LOCK TABLE idempotency_intents IN EXCLUSIVE MODE"); err != nil {
				t.Fatal(err)
			}
			command, _ := startChild(t, server.URL, database, 0)
			await := func(condition string) {
				t.Helper()
				for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
					var holds bool
					err := pool.QueryRow(ctx, `SELECT `+condition+` FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()`, childVariable).Scan(&holds)
					if err != nil {
						t.Fatal(err)
					}
					if holds {
						return
					}
					if time.Since(begin) > 30*time.Second {
						t.Fatalf("it never came to %s", condition)
					}
				}
			}
			await("count(*) FILTER (WHERE wait_event_type = 'Lock') = 1")
			if err := command.Process.Kill(); err != nil { // kill -9
				t.Fatal(err)
			}
			_ = command.Wait() // it was killed
			if !kept {
				if _, err := pool.Exec(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()", childVariable); err != nil {
					t.Fatal(err)
				}
				await("count(*) = 0")
			}
			if err := lock.Commit(ctx); err != nil {
				t.Fatal(err)
			}
			await("count(*) = 0") // the session has noticed
			if arrived.Load() != 0 {
				t.Errorf("%d requests were sent before the intent was saved", arrived.Load())
			}
			want := 0
			if kept {
				want = 1
			}
			for life := range 2 {
				transport := client.New(nil, &client.Options{
					Honours: client.Everywhere, Intents: pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond}),
				})
				report, err := transport.Resume(ctx, nil)
				if err != nil || report.Settled != want*(1-life) || report.Kept != 0 {
					t.Errorf("life %d: %+v, %v", life, report, err)
				}
			}
			if arrived.Load() != int64(want) {
				t.Errorf("%d requests arrived, want %d", arrived.Load(), want)
			}
		})
	}
}

// TestHiddenIntentIsNotCalledDone: an intent that row-level security hides is never reported as
// gone, taken or not pending, and no intent is saved that would never be resumed. The remedies
// work, even on connections that were open before.
func TestHiddenIntentIsNotCalledDone(t *testing.T) {
	t.Parallel()
	for way, name := range []string{"DISABLE", "BYPASSRLS"} {
		for _, policy := range []string{"", "FOR INSERT WITH CHECK (true)"} {
			t.Run(strings.TrimSpace(name+" "+policy), func(t *testing.T) {
				t.Parallel()
				ctx := t.Context()
				database := pgtest.Database(t)
				owner := setupOn(t, database)
				exec := func(sql string) {
					t.Helper()
					if _, err := owner.Exec(ctx, sql); err != nil {
						t.Fatalf("%s: %v", sql, err)
					}
				}
				role := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
				exec("CREATE ROLE " + role + " LOGIN PASSWORD '" + role + "'")
				exec("GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_intents TO " + role)
				defer func() { exec("DROP OWNED BY " + role); exec("DROP ROLE " + role) }()
				config, err := pgxpool.ParseConfig(database)
				if err != nil {
					t.Fatal(err)
				}
				config.ConnConfig.User, config.ConnConfig.Password, config.MaxConns = role, role, 1
				pool, err := pgxpool.NewWithConfig(ctx, config)
				if err != nil {
					t.Fatal(err)
				}
				defer pool.Close()
				store := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond})
				if _, err := store.Save(ctx, intenttest.Intent("k")); err != nil {
					t.Fatal(err)
				}
				exec("ALTER TABLE idempotency_intents ENABLE ROW LEVEL SECURITY")
				if policy != "" {
					exec("CREATE POLICY p ON idempotency_intents " + policy)
				}
				var text string
				for name, call := range map[string]func() error{
					"save":    func() error { _, err := store.Save(ctx, intenttest.Intent("k")); return err },
					"a new":   func() error { _, err := store.Save(ctx, intenttest.Intent("l")); return err },
					"pending": func() error { _, err := store.Pending(ctx); return err },
					"take":    func() error { _, err := store.Take(ctx, "k"); return err },
					"abandon": func() error { return store.Abandon(ctx, "k") },
					"done":    func() error { return store.Done(ctx, "k") },
				} {
					err := call()
					if !errors.Is(err, pgintent.ErrRowSecurityActive) || errors.Is(err, client.ErrIntentTaken) ||
						errors.Is(err, client.ErrIntentRefused) != (name == "save" || name == "a new") {
						t.Errorf("%s: %v", name, err)
						continue
					}
					text = err.Error()
				}
				_, text, _ = strings.Cut(text, pgintent.ErrRowSecurityActive.Error()+": ")
				remedies := strings.Split(text, ", or ")
				if len(remedies) != 2 {
					t.Fatalf("remedies are %q", remedies)
				}
				remedy, _, _ := strings.Cut(strings.Replace(remedies[way], "...", role, 1), " for ")
				exec(remedy)
				if keys, err := store.Pending(ctx); err != nil || len(keys) != 1 {
					t.Errorf("after %s, %q are pending, %v", remedy, keys, err)
				}
				if intent, err := store.Take(ctx, "k"); err != nil || intent == nil {
					t.Errorf("after %s: %v, %v", remedy, intent, err)
				}
				if before, err := store.Save(ctx, intenttest.Intent("l")); err != nil || before {
					t.Errorf("after %s: %v, %v", remedy, before, err)
				}
			})
		}
	}
}

// TestNothingIsSentWithoutARow: a statement that succeeds and writes no row, or a different row,
// keeps no intent. The request must not be sent, and the error says so.
func TestNothingIsSentWithoutARow(t *testing.T) {
	t.Parallel()
	const returns = `CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN %; END $$;`
	trigger := func(body, when string) string {
		return strings.Replace(returns, "%", body, 1) + `CREATE TRIGGER t BEFORE ` + when + ` ON idempotency_intents FOR EACH ROW EXECUTE FUNCTION f()`
	}
	for name, one := range map[string]struct {
		sql     string
		kept    bool // by an earlier process, while the database was still in order
		outcome error
	}{
		"a trigger that drops the row":    {trigger("RETURN NULL", "INSERT"), false, client.ErrNotExecuted},
		"a trigger that changes the body": {trigger(`NEW.body = 'other'; RETURN NEW`, "INSERT"), false, client.ErrNotExecuted},
		// The row has another key, so this intent can't be abandoned.
		"a trigger that changes the key":   {trigger(`NEW.key = 'other'; RETURN NEW`, "INSERT"), false, client.ErrUnknown},
		"a rule that drops the row":        {`CREATE RULE r AS ON INSERT TO idempotency_intents DO INSTEAD NOTHING`, false, client.ErrNotExecuted},
		"a rule that puts it elsewhere":    {`CREATE TABLE others (LIKE idempotency_intents); CREATE RULE r AS ON INSERT TO idempotency_intents DO INSTEAD INSERT INTO others VALUES (NEW.*)`, false, client.ErrNotExecuted},
		"a trigger that fails the commit":  {strings.Replace(returns, "%", `RAISE 'no'`, 1) + `CREATE CONSTRAINT TRIGGER t AFTER INSERT ON idempotency_intents DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION f()`, false, client.ErrNotExecuted},
		"kept, and it can't be taken over": {trigger("RETURN NULL", "UPDATE"), true, client.ErrUnknown},
		"kept, and its holder stays":       {trigger("NEW.holder = OLD.holder; RETURN NEW", "UPDATE"), true, client.ErrUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := setup(t)
			var arrived atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { arrived.Add(1) }))
			defer server.Close()
			send := func() error {
				transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: pgintent.New(pool, nil)})
				r, err := http.NewRequestWithContext(client.WithNewKey(t.Context(), "mine"), http.MethodPost, server.URL, strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				response, err := transport.RoundTrip(r)
				if err == nil {
					_ = response.Body.Close()
				}
				return err
			}
			if one.kept {
				_, err := pgintent.New(pool, nil).Save(t.Context(), &client.Intent{
					Key: idempotency.Key{Value: "mine"}, Method: http.MethodPost, URL: server.URL, Body: []byte("body"),
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			if _, err := pool.Exec(t.Context(), one.sql); err != nil {
				t.Fatal(err)
			}
			err := send()
			if !errors.Is(err, one.outcome) || arrived.Load() != 0 {
				t.Errorf("%d requests arrived: %v", arrived.Load(), err)
			}
			if one.outcome == client.ErrNotExecuted {
				if keys, err := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond}).Pending(t.Context()); err != nil || len(keys) > 0 {
					t.Errorf("%q is left, %v", keys, err)
				}
			}
		})
	}
}

// TestAnUntouchedRowIsNoAbsentRow: if a trigger drops the UPDATE of Take, or the DELETE of Done,
// the call fails. An intent that can't be taken would never be sent, without any error.
func TestAnUntouchedRowIsNoAbsentRow(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	store := pgintent.New(pool, nil)
	if _, err := store.Save(t.Context(), intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	_, err := pool.Exec(t.Context(), `CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
		CREATE TRIGGER t BEFORE UPDATE OR DELETE ON idempotency_intents FOR EACH ROW EXECUTE FUNCTION f()`)
	if err != nil {
		t.Fatal(err)
	}
	if intent, err := store.Take(t.Context(), "k"); intent != nil || err == nil || !strings.Contains(err.Error(), "trigger") {
		t.Errorf("taken: %v, %v", intent, err)
	}
	if err := store.Done(t.Context(), "k"); err == nil || !strings.Contains(err.Error(), "trigger") {
		t.Errorf("done: %v", err)
	}
	if err := store.Abandon(t.Context(), "k"); !errors.Is(err, client.ErrIntentTaken) {
		t.Errorf("abandoned: %v", err)
	}
	if _, err := pool.Exec(t.Context(), "DROP TRIGGER t ON idempotency_intents"); err != nil {
		t.Fatal(err)
	}
	if intent, err := store.Take(t.Context(), "k"); intent == nil || err != nil {
		t.Errorf("after the remedy it is not taken: %v, %v", intent, err)
	}
}

// TestSaveInAnOpenTransactionIsRefused: the intent would not be committed when the request is sent.
// The same holds for the results of Abandon and Take.
func TestSaveInAnOpenTransactionIsRefused(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	pool := setup(t)
	if _, err := pgintent.New(pool, nil).Save(ctx, intenttest.Intent("kept")); err != nil {
		t.Fatal(err)
	}
	pooled, err := pool.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer pooled.Release()
	for name, db := range map[string]pgintent.DB{"a connection": pooled.Conn(), "a pool's connection": pooled} {
		store := pgintent.New(db, &pgintent.Options{PendingAfter: time.Microsecond})
		err := pgx.BeginFunc(ctx, pooled, func(pgx.Tx) error {
			if _, err := store.Save(ctx, intenttest.Intent("k")); !errors.Is(err, client.ErrIntentRefused) {
				t.Errorf("%s: Save: error is %v, want that nothing was changed", name, err)
			}
			if intent, err := store.Take(ctx, "kept"); !errors.Is(err, client.ErrIntentRefused) {
				t.Errorf("%s: Take: %v, %v, want that nothing was changed", name, intent, err)
			}
			if err := store.Abandon(ctx, "kept"); !errors.Is(err, client.ErrIntentRefused) {
				t.Errorf("%s: Abandon: error is %v, want that nothing was changed", name, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		if _, err := store.Save(ctx, intenttest.Intent("k")); err != nil {
			t.Errorf("%s: after the transaction: %v", name, err)
		}
	}
}

// TestSaveTakesOverFromAnotherProcess: two processes send one key. The first must not report
// not-executed, because the second may get it executed.
func TestSaveTakesOverFromAnotherProcess(t *testing.T) {
	t.Parallel()
	pool := setup(t)
	ctx := t.Context()
	first, second := pgintent.New(pool, nil), pgintent.New(pool, nil)
	if _, err := first.Save(ctx, intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	other := intenttest.Intent("k")
	other.Body = []byte("another")
	if before, err := second.Save(ctx, other); !before || !errors.Is(err, client.ErrIntentDifferent) {
		t.Errorf("another request is kept: %t, %v", before, err)
	}
	if keys, err := second.Pending(ctx); err != nil || len(keys) != 0 {
		t.Errorf("with another request it was taken over: %q, %v", keys, err)
	}
	if before, err := second.Save(ctx, intenttest.Intent("k")); !before || err != nil {
		t.Errorf("the same request: %t, %v", before, err)
	}
	if err := first.Abandon(ctx, "k"); !errors.Is(err, client.ErrIntentTaken) {
		t.Errorf("the first abandons what the second sends: %v", err)
	}
	if keys, err := second.Pending(ctx); err != nil || len(keys) != 1 {
		t.Errorf("the second resumes %q, %v", keys, err)
	}
}

// TestTwoProcessesOnOneKeyPayOnce: the first request is refused while the second is on its way. The
// first caller would trust ErrNotExecuted and pay with a new key, so it must be ErrUnknown.
func TestTwoProcessesOnOneKeyPayOnce(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	pool := setupOn(t, database)
	arrived := make(chan int64)
	refuse, execute := make(chan struct{}), make(chan struct{})
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n := requests.Add(1)
		arrived <- n
		if n == 1 {
			<-refuse
			w.Header().Set("Idempotency-Status", "not-executed")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		<-execute
		w.Header().Set("Idempotency-Status", "executed")
		w.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	_, first := startChild(t, server.URL, database, 1)
	<-arrived
	second := make(chan error, 1)
	go func() {
		transport := client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: 1, Intents: pgintent.New(pool, nil)})
		r, err := http.NewRequestWithContext(client.WithKey(t.Context(), "order-1"), http.MethodPost, server.URL, strings.NewReader("body"))
		if err == nil {
			var response *http.Response
			if response, err = transport.RoundTrip(r); err == nil {
				_ = response.Body.Close()
			}
		}
		second <- err
	}()
	<-arrived
	close(refuse)
	if !first.Scan() || first.Text() != "unknown true, taken true, not executed false" {
		t.Errorf("while the second is on its way the first says: %s", first.Text())
	}
	close(execute)
	if err := <-second; err != nil {
		t.Errorf("the second: %v", err)
	}
}

// TestIntentsInsideAHandlerNeedAPoolOfTheirOwn: the error says so, and nothing is sent without one.
func TestIntentsInsideAHandlerNeedAPoolOfTheirOwn(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	own := setupOn(t, database)
	service := setupOn(t, database, func(c *pgxpool.Config) { postgres.Configure(c, nil) })
	if err := migrations.Up(t.Context(), postgres.New(service, nil), nil); err != nil {
		t.Fatal(err)
	}
	var paid atomic.Int64
	processor := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		paid.Add(1)
		w.Header().Set("Idempotency-Status", "executed")
	}))
	defer processor.Close()
	for name, one := range map[string]struct {
		pool *pgxpool.Pool
		paid int64
	}{"the service's": {service, 0}, "its own": {own, 1}} {
		paid.Store(0)
		var failed error
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: pgintent.New(one.pool, nil)})
			call, err := http.NewRequestWithContext(r.Context(), http.MethodPost, processor.URL, strings.NewReader("body"))
			if err != nil {
				t.Error(err)
				return
			}
			response, err := transport.RoundTrip(call)
			if failed = err; err == nil {
				_ = response.Body.Close()
			}
			w.WriteHeader(http.StatusNoContent)
		})
		scope := func(*http.Request) (string, error) { return "acme", nil }
		recorder := httptest.NewRecorder()
		request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
		request.Header.Set(client.HeaderKey, strings.ReplaceAll(name, " ", "-"))
		middleware.New(postgres.New(service, nil), scope, nil).Handler(handler).ServeHTTP(recorder, request)
		if paid.Load() != one.paid {
			t.Errorf("with %s pool %d requests arrived", name, paid.Load())
		}
		if one.paid == 1 && failed != nil {
			t.Errorf("with %s pool: %v", name, failed)
		}
		if one.paid == 0 && (!errors.Is(failed, client.ErrNotExecuted) || !errors.Is(failed, postgres.ErrPoolRefused) || !strings.Contains(failed.Error(), "a pool of its own")) {
			t.Errorf("with %s pool: %v", name, failed)
		}
	}
}

// TestNoConnectionSavesNothing: if the pool has no connection in time it is proven that nothing was
// kept, so the caller gets ErrNotExecuted and not ErrUnknown.
func TestNoConnectionSavesNothing(t *testing.T) {
	t.Parallel()
	pool := setup(t, func(c *pgxpool.Config) { c.MaxConns = 1 })
	conn, err := pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := pgintent.New(pool, nil).Save(ctx, intenttest.Intent("k")); !errors.Is(err, client.ErrIntentRefused) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a pool without a connection: %v", err)
	}
}

// TestCanceledWaitForTheStandbyIsAnError: a failover could undo a write if its COMMIT did not wait.
// An abandoned intent would be sent after its caller got not-executed, and each of two holders
// would believe that it is the only one.
func TestCanceledWaitForTheStandbyIsAnError(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own")
	ctx := t.Context()
	server, err := pgserver.Start(ctx, &pgserver.Options{Settings: map[string]string{"fsync": "off", "synchronous_standby_names": "nobody"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	pool := setupOn(t, server.URL(), func(c *pgxpool.Config) {
		// These settings are for Create; the store itself demands more.
		c.ConnConfig.RuntimeParams["synchronous_commit"] = "local"
		c.ConnConfig.RuntimeParams["client_min_messages"] = "error"
		pgintent.Configure(c.ConnConfig)
	})
	holder := pgintent.New(pool, nil)
	hasty := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond})
	for _, step := range []struct {
		name string
		do   func(ctx context.Context) error
	}{
		{"Save", func(ctx context.Context) error { _, err := holder.Save(ctx, intenttest.Intent("k")); return err }},
		{"Save that takes over", func(ctx context.Context) error { _, err := hasty.Save(ctx, intenttest.Intent("k")); return err }},
		{"Take", func(ctx context.Context) error { _, err := hasty.Take(ctx, "k"); return err }},
		{"Abandon", func(ctx context.Context) error { return hasty.Abandon(ctx, "k") }},
	} {
		done := make(chan error, 1)
		go func() { done <- step.do(ctx) }()
		cancelWaiting(t, pool)
		if err := <-done; err == nil || errors.Is(err, client.ErrIntentRefused) || errors.Is(err, client.ErrIntentTaken) {
			t.Errorf("%s: error is %v, want one of which nothing is known", step.name, err)
		}
	}
}

// TestWarningOfATriggerIsItsOwn: only the server's own warning means that a commit did not wait.
// Take and Abandon need no second connection to find out that a key is not kept: the pool may have
// only one.
func TestWarningOfATriggerIsItsOwn(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	pool := setup(t, func(c *pgxpool.Config) {
		c.MaxConns = 1
		pgintent.Configure(c.ConnConfig)
	})
	if _, err := pool.Exec(ctx, `CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'low funds'; RETURN NULL; END $$;
		CREATE TRIGGER warn AFTER INSERT OR UPDATE OR DELETE ON idempotency_intents FOR EACH ROW EXECUTE FUNCTION warn()`); err != nil {
		t.Fatal(err)
	}
	store := pgintent.New(pool, nil)
	if _, err := store.Save(ctx, intenttest.Intent("k")); err != nil {
		t.Error(err)
	}
	if intent, err := store.Take(ctx, "k"); intent == nil || err != nil {
		t.Error(err)
	}
	if err := store.Abandon(ctx, "k"); err != nil {
		t.Error(err)
	}
	if intent, err := store.Take(ctx, "k"); intent != nil || err != nil {
		t.Error(err)
	}
	if err := store.Abandon(ctx, "k"); !errors.Is(err, client.ErrIntentTaken) {
		t.Error(err)
	}
}

// cancelWaiting cancels the next wait for a standby.
func cancelWaiting(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		var n int
		err := pool.QueryRow(context.Background(), "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'").Scan(&n)
		switch {
		case err != nil:
			t.Fatal(err)
		case n > 0:
			return
		case time.Now().After(deadline):
			t.Fatal("no COMMIT waits for a standby")
		}
	}
}
