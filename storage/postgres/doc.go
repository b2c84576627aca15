// Package postgres keeps idempotency records in PostgreSQL, in the same transaction as the writes of the handler that
// they report.
//
//	config, err := pgxpool.ParseConfig(databaseURL)
//	postgres.Configure(config, nil)
//	pool, err := pgxpool.NewWithConfig(ctx, config)
//	store := postgres.New(pool, nil)
//
// The handler's statements go through [Tx]. BEGIN, the lock and the look-up are one round trip; the
// record and COMMIT are another; so a request costs as many as its handler would in a plain
// transaction. A replay costs one if this store knows the key, two if it does not.
// docs/architecture.md shows the messages, docs/guarantees.md the promises that rest on them.
//
// The package makes no table, starts no goroutine and keeps no state outside its values.
package postgres
