package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// errAddress hides the parser's error: it quotes the address, and can't always tell the password in
// it.
var errAddress = errors.New("the address can't be parsed, and is not shown because it may hold a password:" +
	" write postgres://user:password@host:5432/database?sslmode=verify-full, with %40 for @ and %2F for / in a password, or keywords as in \"host=... dbname=...\"")

// Open connects to a database, and returns a store on a pool of its own. The address is a URL or a
// list of keywords, as libpq and pgxpool read it ("postgres://db/payments?pool_max_conns=20"); an
// empty one stands for the variables of libpq (PGHOST and so on). [Options.PoolConfig] sets what
// an address can't.
//
// Open returns the errors of [Store.Check], but not [ErrSchemaOutdated]: it must succeed before the
// first migration. Until the table is there each request with a key gets 503 not-executed, and its
// handler does not run. Open sends nothing else to the database, and does not wait for one that is
// down. Its errors name the remedy and never contain the address. It panics if the options can't
// work.
//
// [Store.Close] closes the pool.
func Open(ctx context.Context, address string, opts *Options) (*Store, error) {
	full := opts.full()
	config, err := pgxpool.ParseConfig(address)
	if err != nil {
		return nil, fmt.Errorf("open: %w", errAddress)
	}
	if full.PoolConfig != nil {
		full.PoolConfig(config)
	}
	Configure(config, full)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("open: %w", reachError(err))
	}
	s := New(pool, full)
	s.owned = true
	wrong := slices.DeleteFunc(s.check(ctx), func(err error) bool { return errors.Is(err, ErrSchemaOutdated) })
	if err := errors.Join(wrong...); err != nil {
		pool.Close()
		return nil, fmt.Errorf("open: %w", err)
	}
	return s, nil
}

// Pool returns the pool, for the rest of the program: queries outside of requests, its statistics.
// A handler that uses it with its own context gets [ErrPoolRefused].
func (s *Store) Pool() *pgxpool.Pool { return s.pool }

// Schema returns the name of the schema that holds the tables.
func (s *Store) Schema() string { return s.options.Schema }

// Close closes the pool that [Open] made, and waits until its connections are given back. Call it
// after the server has stopped; a second call does nothing. The pool of a store that [New] returned
// is the caller's: Close leaves it open.
func (s *Store) Close() {
	if s.owned {
		s.pool.Close()
	}
}

// reachError is like [wire.SQLError]. If no connection was made, it also adds the remedy to the
// error, and removes the role, the database's name and the server's text.
func reachError(err error) error {
	const unreachable = "see that the server runs, that host, port and sslmode of the address are right, and that no firewall is in between"
	var connect *pgconn.ConnectError
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && errors.As(err, &connect):
		return &connectError{err: err, text: "SQLSTATE " + pgErr.Code + ": " + connectRemedy(pgErr)}
	case errors.As(err, &connect):
		hosts := strings.Split(connect.Unwrap().Error(), "\n") // with and without TLS
		return &connectError{err: err, text: strings.Join(slices.Compact(hosts), ", ") + ": " + unreachable}
	case errors.Is(err, context.DeadlineExceeded):
		return &connectError{err: err, text: "there was no answer in time: " + unreachable}
	}
	return wire.SQLError(err)
}

func connectRemedy(err *pgconn.PgError) string {
	switch err.Code {
	case "28P01", "28000":
		return "the server refuses the role or its password: see the address, the password file and pg_hba.conf"
	case "3D000":
		return "the server has no such database: see the address, or CREATE DATABASE"
	case "53300":
		return "the server has no connection left: raise max_connections, or make the pools smaller"
	case "57P03":
		return "the server is starting or stopping: try again"
	case "08P01", "22023", "42704":
		return "the server, or a pooler in front of it, refuses the settings: see the address, and set Options.TransactionPooling for a pooler"
	}
	return "the server's log says more"
}

// connectError is a connection that was not made.
type connectError struct {
	err  error
	text string
}

func (e *connectError) Error() string { return "connect: " + e.text }

func (e *connectError) Unwrap() error { return e.err }
