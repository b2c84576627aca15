// Package migrations creates and upgrades the table of the records, and the tables of the operator.
//
// The files are embedded, and are also usable as they are with the migrate program, which must be told the table of
// versions and, for another schema than public, the search_path:
//
//	migrate -path migrations -database 'pgx5://…?x-migrations-table=idempotency_migrations&search_path=public' up
//
// Nothing here runs by itself: a service calls [Up] at deployment, or its operator runs migrate.
package migrations

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"

	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/database"
	migratepgx "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
)

//go:embed *.sql
var files embed.FS

// Defaults of [Options].
const (
	SchemaDefault       = "public"
	VersionTableDefault = "idempotency_migrations"
)

// Latest is the newest version of this release. A service serves from postgres.SchemaVersion on; the operator's tools
// need this one.
const Latest = 3

// ErrDirty means that an earlier migration failed in the middle; its remedy is in the error's text.
var ErrDirty = errors.New("schema is dirty")

// Options tell where the migrations go. Nil and the zero value are the defaults.
type Options struct {
	// Schema holds the table, and the table of versions. It is created where it is missing. The store is told the same
	// in its own options. The default is [SchemaDefault].
	Schema string

	// Files and VersionTable let a program run migrations of its own by the same means. The defaults are this package's
	// files and [VersionTableDefault]; set both or none.
	Files        fs.FS
	VersionTable string
}

// Up applies every migration that is missing. It is safe to call from several processes at once: one works, the others
// wait. It opens connections of its own with the pool's settings, because it changes the search_path. Where ctx ends
// it stops waiting, or before the next migration. A schema of a later release is left as it is: a service that is
// rolled back must start.
func Up(ctx context.Context, pool *pgxpool.Pool, opts *Options) error {
	return with(ctx, pool, opts, func(m *migrate.Migrate, numbered source.Driver) error {
		last, err := newest(numbered)
		// One by one: Migrate.Up reads ahead, and where it stops in the middle it leaves goroutines behind.
		for err == nil && ctx.Err() == nil {
			current, dirty, versionErr := m.Version()
			switch {
			case errors.Is(versionErr, migrate.ErrNilVersion):
			case versionErr != nil:
				return versionErr
			case dirty:
				return migrate.ErrDirty{Version: int(current)}
			case current >= last:
				return nil
			}
			err = m.Steps(1)
		}
		return err
	})
}

// Down undoes every migration, and with it loses every record: each retry of an executed request runs again.
func Down(ctx context.Context, pool *pgxpool.Pool, opts *Options) error {
	return with(ctx, pool, opts, func(m *migrate.Migrate, _ source.Driver) error { return m.Down() })
}

// DownTo undoes the migrations above a version, the newest first, each with what it made. To 0 it is [Down]: every
// record is lost, and each retry of an executed request runs again. A schema that is not above the version is left as it is.
func DownTo(ctx context.Context, pool *pgxpool.Pool, version uint, opts *Options) error {
	return with(ctx, pool, opts, func(m *migrate.Migrate, _ source.Driver) error {
		for ctx.Err() == nil {
			current, dirty, err := m.Version()
			switch {
			case errors.Is(err, migrate.ErrNilVersion):
				return nil
			case err != nil:
				return err
			case dirty:
				return migrate.ErrDirty{Version: int(current)}
			case current <= version:
				return nil
			}
			if err := m.Steps(-1); err != nil {
				return err
			}
		}
		return nil
	})
}

// Version returns the version of the schema, 0 where nothing was migrated yet. A migration that failed in the middle is
// [ErrDirty]. Where the table of versions is missing it is made, as by [Up].
func Version(ctx context.Context, pool *pgxpool.Pool, opts *Options) (version uint, err error) {
	err = with(ctx, pool, opts, func(m *migrate.Migrate, _ source.Driver) error {
		current, dirty, err := m.Version()
		version = current
		switch {
		case errors.Is(err, migrate.ErrNilVersion):
			return nil
		case err != nil:
			return err
		case dirty:
			return migrate.ErrDirty{Version: int(current)}
		}
		return nil
	})
	return version, err
}

// newest returns the highest version of the files.
func newest(numbered source.Driver) (version uint, err error) {
	next, err := numbered.First()
	for ; err == nil; next, err = numbered.Next(next) {
		version = next
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	return version, nil
}

func with(ctx context.Context, pool *pgxpool.Pool, opts *Options, do func(*migrate.Migrate, source.Driver) error) (err error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if (o.Files == nil) != (o.VersionTable == "") {
		return errors.New("migrate: Options.Files and Options.VersionTable belong together: set both or none")
	}
	if o.Files == nil {
		o.Files, o.VersionTable = files, VersionTableDefault
	}
	if o.Schema == "" {
		o.Schema = SchemaDefault
	}
	numbered, err := iofs.New(o.Files, ".")
	if err != nil {
		return fmt.Errorf("migrate: read files: %w", err)
	}

	schema := pgx.Identifier{o.Schema}.Sanitize()
	var conns []*pgx.Conn // the driver forgets its own where the table of versions can't be opened
	defer func() {
		for _, conn := range conns {
			err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) // of a closed one: nothing
		}
	}()
	db := stdlib.OpenDB(*pool.Config().ConnConfig, stdlib.OptionAfterConnect(func(ctx context.Context, conn *pgx.Conn) error {
		conns = append(conns, conn)
		// A migration may take as long as it needs, and those that wait for it too.
		_, err := conn.Exec(ctx, "SELECT set_config('search_path', $1, false), set_config('statement_timeout', '0', false), set_config('lock_timeout', '0', false)", schema)
		return err
	}))
	defer func() { err = errors.Join(err, db.Close()) }()
	// The driver below takes no context, and waits 15 s for its lock. So the wait is here, on a lock of ours.
	turn, err := db.Conn(ctx)
	if err != nil {
		return fmt.Errorf("migrate: connect: %w", err)
	}
	defer func() { err = errors.Join(err, turn.Close()) }()
	if _, err := turn.ExecContext(ctx, "SELECT pg_advisory_lock(hashtext($1), hashtext($2))", "paidonce migrations", schema+"."+o.VersionTable); err != nil {
		return fmt.Errorf("migrate: wait for another migration: %w", err)
	}
	// The look before CREATE: it needs a right that the look does not. And after the lock: IF NOT EXISTS fails where two
	// create at once.
	var exists bool
	err = turn.QueryRowContext(ctx, "SELECT to_regnamespace($1) IS NOT NULL", schema).Scan(&exists)
	if err == nil && !exists {
		_, err = turn.ExecContext(ctx, "CREATE SCHEMA IF NOT EXISTS "+schema)
	}
	if err != nil {
		return fmt.Errorf("migrate: create the schema: %w", err)
	}
	driver, err := migratepgx.WithInstance(db, &migratepgx.Config{MigrationsTable: o.VersionTable, SchemaName: o.Schema})
	if err != nil {
		return fmt.Errorf("migrate: open the table of versions: %w", err)
	}
	m, err := migrate.NewWithInstance("embedded", numbered, "pgx5", driver)
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	defer func() {
		sourceErr, driverErr := m.Close()
		err = errors.Join(err, sourceErr, driverErr)
	}()

	err = do(m, numbered)
	var dirty migrate.ErrDirty
	switch {
	case errors.Is(err, migrate.ErrNoChange):
		return ctx.Err()
	case errors.As(err, &dirty):
		before := database.NilVersion
		if version, err := numbered.Prev(uint(max(dirty.Version, 0))); err == nil {
			before = int(version)
		}
		return fmt.Errorf("migrate: %w: version %d failed in the middle: undo what it left, then run `migrate force -- %d`", ErrDirty, dirty.Version, before)
	case err != nil:
		return fmt.Errorf("migrate: %w", err)
	}
	return ctx.Err()
}
