// Package operator is what people who run a service do with its records: look one up, page through them, see what became
// of a key, end its time or delete it, count, and find out what is wrong with the database. The command idemctl and the
// admin page are built on it.
//
//	o := operator.New(store, nil)
//	state, err := o.Get(ctx, idempotency.Key{Scope: "acme", Value: key})
//
// Nothing here is on the path of a request, and nothing here slows one down: there is no index beside the table's primary
// key, so each look is bounded instead, in rows, in pages and in time, and says how far it came.
//
// Everything but [Operator.Expire], [Operator.Delete] and [Operator.GC] reads. Expire and Delete are the only acts by hand on
// a record that are safe while the service runs; each leaves a row in the table idempotency_audit, in the same transaction.
//
// What is returned holds scopes, keys and answers, as the table does: it is for the eyes of operators. Errors hold none of it.
//
// A role that may do all of it, and no more:
//
//	GRANT SELECT, DELETE, UPDATE (expires_at) ON idempotency_keys TO operator;  -- DELETE: Delete, GC; UPDATE: Expire
//	GRANT SELECT, INSERT ON idempotency_audit TO operator;
//	GRANT SELECT, DELETE ON idempotency_events TO operator;                    -- DELETE: GC
//	GRANT SELECT ON idempotency_migrations TO operator;
//	GRANT pg_monitor TO operator;                                              -- what other sessions do; Doctor
//
// SELECT alone is enough for looking.
package operator
