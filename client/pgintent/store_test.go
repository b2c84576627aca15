package pgintent_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgtest"
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
// commits that a crash may undo. Save, also when it takes over, Take and Abandon switch it on for
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
