// Package sqldb is a *sql.DB on the transactions of idempotent handlers: GORM, sqlx, ent, bun,
// go-jet, sqlc and plain database/sql write in the transaction that commits with the answer.
//
//	store, err := postgres.Open(ctx, databaseURL, nil)
//	db := sqldb.Open(store, nil) // once
//	orm, err := gorm.Open(gormpostgres.New(gormpostgres.Config{Conn: db}))
//
//	func (b *bank) transfer(w http.ResponseWriter, r *http.Request) {
//		err := orm.WithContext(r.Context()).Create(&transfer).Error
//		...
//
// There is no connection behind it. Each call goes to the transaction that [postgres.Tx] returns for
// the call's context: that of the handler of a request or of a message, or of the [postgres.Phase]
// that runs. So pass the handler's context to every call. Calls cost the round trips that they cost
// on postgres.Tx.
//
// # Nested transactions
//
// BeginTx opens a savepoint: its Commit keeps the writes for the handler's transaction, its Rollback
// undoes them. SAVEPOINT, RELEASE and ROLLBACK TO as SQL text work too, as the libraries use them.
// SAVEPOINT travels with the first statement after it, and RELEASE with the next one or not at all,
// so a transaction that a library opens around each write costs no round trip. The exceptions are a
// text that has not run behind a SAVEPOINT before in this process, a text of more than 4096 bytes,
// and a query that returns a numeric, an array or another type that pgx reads in binary format:
// SAVEPOINT is then a round trip of its own. The first run of a text with arguments behind a
// SAVEPOINT may cost one more, to ask for the types of its parameters.
//
// # What differs from another *sql.DB
//
// A handler has one connection, for one goroutine at a time. A call on the *sql.DB while a sql.Tx of
// the handler is open, and any call while rows are open, gets [postgres.ErrBusy]. A sql.Tx or rows
// that are open when the handler returns fail the request. If a context ends, database/sql undoes
// its sql.Tx later, at a time of its own. If calls on postgres.Tx or messages are part of it by then,
// it is not undone, and the request fails.
//
// COMMIT, ROLLBACK and several statements in one string are refused, with [postgres.ErrSealed].
// BeginTx refuses ReadOnly, and a level above the store's. PrepareContext sends nothing: an error in
// the SQL comes with the first execution. Errors are those of pgx: *pgconn.PgError.
// LastInsertId does not exist in PostgreSQL: use RETURNING.
//
// SetMaxOpenConns and the like are not needed: the store's pool has the limits.
package sqldb

import (
	"database/sql"
	"errors"

	"github.com/jackc/pgx/v5/stdlib"

	"github.com/paidonce/idempotency/storage/postgres"
)

// ErrTransactionMissing is returned to a call if no idempotent handler of the store runs with its
// context.
var ErrTransactionMissing = errors.New("idempotency/sqldb: no idempotent handler of this store runs with this context:" +
	" pass the request's context on (QueryContext, WithContext; in gin c.Request.Context(), not c), or set Options.Pool for calls outside of handlers")

// Options are the options of [Open].
type Options struct {
	// Pool lets calls outside of handlers use the store's pool, each on a connection of its own, as
	// any *sql.DB does: for requests that only read, for jobs and migrations. Defaults to false: such
	// a call gets [ErrTransactionMissing].
	//
	// Only the context tells the calls of a handler from others. With Pool, a call in a handler
	// without the handler's context, such as db.Exec or one with context.Background, is committed at
	// once, and stays even if the handler's writes are undone.
	Pool bool
}

// Open returns a *sql.DB for the handlers of a store. It sends nothing. Open one per program. It is
// safe for concurrent use, as any *sql.DB. It holds no connection while it is not used, so Close is
// optional; call it before the store is closed. opts may be nil.
func Open(store *postgres.Store, opts *Options) *sql.DB {
	if store == nil {
		panic("idempotency/sqldb: Open needs a store")
	}
	c := &connector{store: store}
	if opts != nil && opts.Pool {
		c.outside = stdlib.GetPoolConnector(store.Pool())
	}
	return sql.OpenDB(c)
}
