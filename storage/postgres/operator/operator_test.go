package operator_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// The rights of the package's documentation suffice, and each is needed for the calls that the
// documentation names.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	looks := []string{"SELECT ON idempotency_keys", "SELECT ON idempotency_audit", "SELECT ON idempotency_events", "SELECT ON idempotency_migrations"}
	full := append([]string{"DELETE ON idempotency_keys", "UPDATE (expires_at) ON idempotency_keys", "INSERT ON idempotency_audit", "DELETE ON idempotency_events", "pg_monitor"}, looks...)
	finish := b.Running(t, key("running"))
	defer finish()
	for _, name := range []string{"who looks", "an operator"} {
		b.do(t, key("canary"), 201)
		o := b.role(t, looks...)
		if name == "an operator" {
			o = b.role(t, full...)
		}
		ctx := context.Background()
		for what, do := range map[string]func() error{
			"get":      func() error { _, err := o.Get(ctx, key("canary")); return err },
			"body":     func() error { _, err := o.Body(ctx, key("canary")); return err },
			"list":     func() error { _, err := o.List(ctx, operator.Filter{}, operator.Page{}); return err },
			"recent":   func() error { _, err := o.Recent(ctx, 0); return err },
			"timeline": func() error { _, err := o.Timeline(ctx, key("canary")); return err },
			"stats":    func() error { _, err := o.Stats(ctx); return err },
			"version":  func() error { _, _, err := o.Version(ctx); return err },
		} {
			if err := do(); err != nil {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		state, err := o.Get(ctx, key("running"))
		if err != nil || state.Holder == nil || state.Holder.PID == 0 || (state.Holder.State != "") != (name == "an operator") {
			t.Errorf("%s sees of another session: %+v, %v", name, state.Holder, err)
		}
		for _, what := range []struct {
			name string
			do   func() error
		}{
			{"gc", func() error { _, err := o.GC(ctx, nil); return err }},
			{"expire", func() error { _, err := o.Expire(ctx, key("canary"), act); return err }},
			{"delete", func() error { _, err := o.Delete(ctx, key("canary"), act); return err }},
		} {
			err := what.do()
			if (err == nil) != (name == "an operator") || err != nil && !strings.Contains(err.Error(), "42501") {
				t.Errorf("%s, %s: %v", name, what.name, err)
			}
		}
	}
	if got := strings.Count(b.audits(t), ";"); got != 1 {
		t.Errorf("audit: %s", b.audits(t))
	}
}

// A statement that takes too long is cut off, and its error says so without naming the key.
func TestStatementsAreBounded(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("canary"), 201)
	// A new connection of the other pool would prepare statements, and wait for the lock.
	pool, err := pgxpool.New(t.Context(), b.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	o := operator.New(postgres.New(pool, nil), &operator.Options{StatementTimeout: 50 * time.Millisecond})
	tx, err := b.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	for what, do := range map[string]func() error{
		"get": func() error { _, err := o.Get(t.Context(), key("canary")); return err },
		"list": func() error {
			_, err := o.List(t.Context(), operator.Filter{Scope: "acme"}, operator.Page{})
			return err
		},
		"stats":  func() error { _, err := o.Stats(t.Context()); return err },
		"delete": func() error { _, err := o.Delete(t.Context(), key("canary"), act); return err },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), "57014") || !strings.Contains(err.Error(), "took longer") {
			t.Errorf("%s: %v", what, err)
		} else {
			wantError(t, err, err)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	b := testservice.On(t, pgtest.Database(t), nil)
	o := operator.New(b.Store, nil)
	want := func(version uint, dirty bool) {
		t.Helper()
		if got, gotDirty, err := o.Version(t.Context()); got != version || gotDirty != dirty || err != nil {
			t.Errorf("version %d, %t, %v; want %d, %t", got, gotDirty, err, version, dirty)
		}
	}
	want(0, false)
	if n := b.Count(t, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"); n != 0 {
		t.Errorf("it made %d tables", n)
	}
	if err := migrations.Up(t.Context(), b.Store, nil); err != nil {
		t.Fatal(err)
	}
	want(migrations.Latest, false)
	b.Exec(t, "UPDATE idempotency_migrations SET dirty = true")
	want(migrations.Latest, true)
	b.Exec(t, "DELETE FROM idempotency_migrations")
	want(0, false)
}

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), "postgres://nobody@127.0.0.1:1/x")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	for name, make := range map[string]func(){
		"no store":      func() { operator.New(nil, nil) },
		"statement":     func() { operator.New(postgres.New(pool, nil), &operator.Options{StatementTimeout: time.Microsecond}) },
		"call":          func() { operator.New(postgres.New(pool, nil), &operator.Options{CallTimeout: 5*time.Second - 1}) },
		"rows examined": func() { operator.New(postgres.New(pool, nil), &operator.Options{RowsExaminedMax: -1}) },
		"scan time":     func() { operator.New(postgres.New(pool, nil), &operator.Options{ScanTimeMax: -1}) },
	} {
		func() {
			defer func() {
				if text, _ := recover().(string); !strings.HasPrefix(text, "idempotency/") {
					t.Errorf("%s: panic %q", name, text)
				}
			}()
			make()
		}()
	}
}
