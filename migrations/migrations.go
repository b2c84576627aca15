// Package migrations creates and upgrades the table of the records.
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
	migratepgx "github.com/golang-migrate/migrate/v4/database/pgx/v5"
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

// Latest is the version that this release of the module needs.
const Latest = 1

// ErrDirty means that an earlier migration failed in the middle; its remedy is in the error's text.
var ErrDirty = errors.New("schema is dirty")

// Options tell where the migrations go. Nil and the zero value are the defaults.
type Options struct {
	// Schema holds the table, and the table of versions. It is created where it is missing. The default is
	// [SchemaDefault].
	Schema string

	// Files and VersionTable let a program run migrations of its own by the same means. The defaults are this package's
	// files and [VersionTableDefault]; set both or none.
	Files        fs.FS
	VersionTable string
}

// Up applies every migration that is missing. It is safe to call from several processes at once: one works, the others
// wait. It opens a connection of its own with the pool's settings, because it changes the search_path. Where ctx ends
// it stops before the next migration.
func Up(ctx context.Context, pool *pgxpool.Pool, opts *Options) error {
	return with(ctx, pool, opts, func(m *migrate.Migrate) error { return m.Up() })
}

// Down undoes every migration, and with it loses every record: each retry of an executed request runs again.
func Down(ctx context.Context, pool *pgxpool.Pool, opts *Options) error {
	return with(ctx, pool, opts, func(m *migrate.Migrate) error { return m.Down() })
}

// Version returns the version of the schema, 0 where nothing was migrated yet. A migration that failed in the middle is
// [ErrDirty].
func Version(ctx context.Context, pool *pgxpool.Pool, opts *Options) (version uint, err error) {
	err = with(ctx, pool, opts, func(m *migrate.Migrate) error {
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

func with(ctx context.Context, pool *pgxpool.Pool, opts *Options, do func(*migrate.Migrate) error) (err error) {
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
	source, err := iofs.New(o.Files, ".")
	if err != nil {
		return fmt.Errorf("migrate: read files: %w", err)
	}

	schema := pgx.Identifier{o.Schema}.Sanitize()
	db := stdlib.OpenDB(*pool.Config().ConnConfig, stdlib.OptionAfterConnect(func(ctx context.Context, conn *pgx.Conn) error {
		// A migration may take as long as it needs. The look before CREATE: it needs a right that the look does not.
		var exists bool
		err := conn.QueryRow(ctx, "SELECT set_config('search_path', $1, false) IS NOT NULL AND set_config('statement_timeout', '0', false) IS NOT NULL AND to_regnamespace($1) IS NOT NULL", schema).Scan(&exists)
		if err == nil && !exists {
			_, err = conn.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS "+schema)
		}
		return err
	}))
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := db.PingContext(ctx); err != nil { // the driver below takes no context
		return fmt.Errorf("migrate: connect: %w", err)
	}
	driver, err := migratepgx.WithInstance(db, &migratepgx.Config{MigrationsTable: o.VersionTable, SchemaName: o.Schema})
	if err != nil {
		return fmt.Errorf("migrate: open the table of versions: %w", err)
	}
	m, err := migrate.NewWithInstance("embedded", source, "pgx5", driver)
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { m.GracefulStop <- true })
	defer stop()
	defer func() {
		sourceErr, driverErr := m.Close()
		err = errors.Join(err, sourceErr, driverErr)
	}()

	err = do(m)
	var dirty migrate.ErrDirty
	switch {
	case errors.Is(err, migrate.ErrNoChange):
		return ctx.Err()
	case errors.As(err, &dirty):
		return fmt.Errorf("migrate: %w: version %d failed in the middle: undo what it left, then run `migrate force %d`", ErrDirty, dirty.Version, max(dirty.Version-1, 0))
	case err != nil:
		return fmt.Errorf("migrate: %w", err)
	}
	return ctx.Err()
}
