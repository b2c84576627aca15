// Package postgres keeps idempotency records in PostgreSQL, each in the same transaction as the
// writes of its handler.
//
//	store, err := postgres.Open(ctx, databaseURL, nil)
//	if err != nil {
//		return err
//	}
//	defer store.Close()
//	if err := migrations.Up(ctx, store, nil); err != nil {
//		return err
//	}
//
// [Open] makes the pool. [New] takes a pool of the caller's, if its config went through
// [Configure].
//
// The handler's statements go through [Tx]. BEGIN, the lock and the look-up are one round trip; the
// record and COMMIT are another. So a request costs as many round trips as its handler would in a
// plain transaction. A replay costs one if this store knows the key, and two if it does not.
// Statements that end a handler can travel with the record: see [DeferExec]. docs/architecture.md
// shows the messages, docs/guarantees.md the promises that depend on them.
//
// Package sqldb is a *sql.DB on the same transactions, for GORM, sqlx, ent, bun and others.
//
// On a resumable route a handler may call other services (package effect) before it uses [Tx].
// Writes before a call, or between two, go into a [Phase]: a transaction that commits before the
// handler goes on, with an output that later runs find by its name.
//
// The package makes no table, starts no goroutine and keeps no state outside its values.
package postgres
