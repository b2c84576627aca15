// Package operator lets the people who run a service look a record up, page through records, see
// the history of a key, expire or delete a record, count, and find faults of the database. The
// command idemctl and the admin page are built on it.
//
//	o := operator.New(store, nil)
//	state, err := o.Get(ctx, idempotency.Key{Scope: "acme", Value: key})
//
// None of it runs in a request, and none of it slows a request down: there is no index beside the
// table's primary key. Instead each call is bounded in rows, pages and time, and returns how far it
// came.
//
// All methods only read, except [Operator.Expire], [Operator.Delete], [Operator.GC], the acts on open
// requests: [Operator.Settle], [Operator.Resume], [Operator.Park] and [Operator.Abandon], and those
// on messages: [Operator.Redrive], [Operator.Drop], [Operator.RetryOutbox] and [Operator.DropOutbox].
// These acts are the only manual changes that are safe while the service runs. Each adds a row to
// the table idempotency_audit in the same transaction.
//
// Results contain scopes, keys and answers, as the table does: show them only to operators. Errors
// contain none of them.
//
// These rights suffice for all of it:
//
//	GRANT SELECT, DELETE, UPDATE (expires_at) ON idempotency_keys TO operator;  -- DELETE: Delete, GC; UPDATE: Expire
//	GRANT SELECT, INSERT ON idempotency_audit TO operator;
//	GRANT SELECT, DELETE ON idempotency_events TO operator;                    -- DELETE: GC
//	GRANT SELECT, UPDATE, DELETE ON idempotency_open, idempotency_effects TO operator; -- acts on open requests
//	GRANT SELECT, UPDATE, DELETE ON message_outbox, message_parked TO operator; -- acts on messages
//	GRANT SELECT ON message_offsets TO operator;
//	GRANT SELECT ON idempotency_migrations TO operator;
//	GRANT pg_monitor TO operator;                                              -- what other sessions do; Doctor
//
// SELECT suffices for the calls that only read.
package operator
