// Package pgintent keeps a client's intents in PostgreSQL, so that when a process dies another one
// continues with the same keys.
//
//	err := pgintent.Create(ctx, pool, nil) // at deployment
//	transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: pgintent.New(pool, nil)})
//	report, err := transport.Resume(ctx, handle) // at the start, and every few minutes
//
// The table, idempotency_intents, is the client's own, in the client's own database: it is
// unrelated to the records of a server. It stores the bodies and URLs of requests unchanged, so
// keep it only where those may be kept.
//
// Any number of processes share it. Each intent has a holder, the [Store] that saved it or took it
// last. A store may take an intent that another has held for longer than [Options.PendingAfter], or
// that it saves again because it sends the key too. From then on the former holder can no longer
// report not-executed, and reports unknown. So a process that was only slow does no harm.
//
// [Store.Save] reads the written row back. If a trigger, a rule or row-level security keeps the row
// out or changes it, Save fails and nothing is sent.
//
// If the database has synchronous standbys, call [Configure] on the config of the pool before the
// pool is made. Then a commit that did not wait for the standbys is an error.
//
// Inside an idempotent handler a [Store] needs a pool of its own: the handler's store refuses a
// second connection from its pool. It does not accept a transaction either, because an intent must
// be committed before its request is sent.
//
// A process needs SELECT, INSERT, UPDATE and DELETE on the table.
package pgintent
