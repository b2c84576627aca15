// Package migrations creates and upgrades the table of the records, and the tables of the operator.
//
// The files are embedded, and can also be used with the migrate program, which needs the name of
// the version table and, for another schema than public, the search_path:
//
//	migrate -path migrations -database 'pgx5://…?x-migrations-table=idempotency_migrations&search_path=public' up
//
// The program waits for a table without a limit, and every request waits behind it. [Up] does not.
//
// Nothing in this package runs by itself: a service calls [Up] at deployment, or its operator runs
// idemctl migrate.
package migrations

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

//go:embed *.sql
var files embed.FS

// Latest is the newest version of this release. A service works from postgres.SchemaVersion on; the
// operator's tools need this version.
const Latest = 5

// Errors for callers to branch on. Their texts name the remedy.
var (
	// ErrDirty: an earlier migration failed midway.
	ErrDirty = errors.New("schema is dirty")
	// ErrPoolerInBetween: the connections lead through a pooler that may switch the server
	// connection after each transaction. Nothing was done.
	ErrPoolerInBetween = errors.New("a pooler is in between")
	// ErrVersionUntrue: the version table does not match the schema: the table of records is
	// missing although a version is recorded, or exists without one. Nothing was done.
	ErrVersionUntrue = errors.New("the table and its version do not fit")
)

// Store is a database and the schema in it that is migrated: a *postgres.Store, which postgres.Open
// and postgres.New return. The schema is created if it is missing.
type Store interface {
	Pool() *pgxpool.Pool
	Schema() string
}

// Options tune a migration. Nil and the zero value are the defaults.
type Options struct {
	// Files and VersionTable let a program run its own migrations in the same way. The defaults are
	// this package's files and "idempotency_migrations"; set both or none.
	//
	// A file runs in one transaction together with its version. If it can't, because it ends the
	// transaction itself or contains a statement such as CREATE INDEX CONCURRENTLY (which must then
	// be the only one in its file), it is sent as it is: if it then fails it is not repeated, and
	// the schema is dirty.
	Files        fs.FS
	VersionTable string

	// LockTimeout is the longest wait of a migration for a lock on a table. While it waits, every
	// later request waits behind it. Then it is rolled back and tried again after a pause of
	// LockTimeout, which grows to eight times as much, until its context ends. Defaults to 1
	// second; at least 1 millisecond.
	LockTimeout time.Duration

	// Waiting is called before each pause, by the goroutine that migrates, with the sessions that
	// it waits for. May be nil.
	Waiting func(Waiting)
}

// Waiting describes a migration that waits.
type Waiting struct {
	What  string        // "migration 2 up", or "another migration": its turn
	Tries int           // so far
	Pause time.Duration // until the next
	// Blockers hold the locks that it needs. Empty if the role is not allowed to see them.
	Blockers []Blocker
}

// Blocker is a session that holds a lock, as far as the role may see it: without the rights of
// pg_monitor, only the process of another role's session is visible.
type Blocker struct {
	PID         int // pg_terminate_backend ends it; 0 is a prepared transaction
	Application string
	State       string        // such as "idle in transaction"
	Age         time.Duration // of its transaction
}

func (b Blocker) String() string {
	text := fmt.Sprintf("process %d", b.PID)
	if b.PID == 0 {
		text = "a prepared transaction"
	}
	for _, part := range []string{b.Application, b.State} {
		if part != "" {
			text += ", " + part
		}
	}
	if b.Age > 0 {
		text += fmt.Sprintf(", its transaction %v old", b.Age.Round(time.Second))
	}
	return text
}

// Up applies every migration that is missing. It is safe to call from several processes at once,
// and beside the migrate program: one works, the others wait. Meanwhile requests are served, see
// [Options.LockTimeout]. A schema of a later release is left as it is, so that a service can start
// after a rollback to an older release.
//
// Up opens two connections of its own with the settings of the store's pool, and calls the pool's
// BeforeConnect for each. They must not lead through a pooler in transaction or statement mode:
// [ErrPoolerInBetween].
//
// If Up changed the schema it resets the pool: a connection that was made before the tables has
// none of the store's statements prepared, and is closed once it is given back. pgxpool fills a
// pool with MinConns again only at its next health check, a minute later by default.
//
// It ends with ctx, within 5 seconds if the server does not answer. The migration under way is
// undone, and another call of Up continues from there.
func Up(ctx context.Context, store Store, opts *Options) error {
	return migrate(ctx, store, opts, func(m *migrator) error {
		for {
			current, err := m.version(ctx)
			if err != nil {
				return err
			}
			if err := m.compare(ctx, current); err != nil {
				return err
			}
			next, ok, err := m.after(current)
			if !ok || err != nil {
				return err
			}
			if err := m.step(ctx, current, next, true); err != nil {
				return err
			}
		}
	})
}

// Down undoes every migration, and with it loses every record: each retry of an executed request
// runs again. It waits and ends as [Up] does.
func Down(ctx context.Context, store Store, opts *Options) error {
	return DownTo(ctx, store, 0, opts)
}

// DownTo undoes the migrations above a version, the newest first, each with all that it created. To
// 0 it is [Down]: every record is lost, and each retry of an executed request runs again. A schema
// that is not above the version is left as it is. It waits and ends as [Up] does.
func DownTo(ctx context.Context, store Store, version uint, opts *Options) error {
	return migrate(ctx, store, opts, func(m *migrator) error {
		for {
			current, err := m.version(ctx)
			if err != nil {
				return err
			}
			if current <= 0 || uint(current) <= version {
				return nil
			}
			before, err := m.before(current)
			if err != nil {
				return err
			}
			if err := m.step(ctx, current, before, false); err != nil {
				return err
			}
		}
	})
}

// Version returns the version of the schema, or 0 if no migration has run yet. A migration that
// failed midway returns [ErrDirty]. Version changes nothing, and works through a pooler in any
// mode.
func Version(ctx context.Context, store Store, opts *Options) (version uint, err error) {
	m, err := newMigrator(store, opts)
	if err != nil {
		return 0, fmt.Errorf("migrate: %w", err)
	}
	defer m.close(ctx)
	if m.conn, err = connect(ctx, store.Pool()); err != nil {
		return 0, fmt.Errorf("migrate: connect: %w", err)
	}
	current, err := m.version(ctx)
	if err != nil {
		err = fmt.Errorf("migrate: %w", err)
	}
	return uint(max(current, 0)), err
}

// migrate waits for its turn, and calls do with a migrator.
func migrate(ctx context.Context, store Store, opts *Options, do func(*migrator) error) error {
	m, err := newMigrator(store, opts)
	if err == nil {
		defer m.close(ctx)
		if err = m.begin(ctx, store.Pool()); err == nil {
			err = do(m)
		}
		if m.changed {
			store.Pool().Reset()
		}
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil && !errors.Is(err, ctx.Err()): // the server only says that it was canceled
		return fmt.Errorf("migrate: %w: %w", ctx.Err(), err)
	}
	return fmt.Errorf("migrate: %w", err)
}
