// Package pgintent keeps a client's intents in PostgreSQL, so that another process goes on with the same keys where one has
// died.
//
//	err := pgintent.Create(ctx, pool, nil) // at deployment
//	transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: pgintent.New(pool, nil)})
//	report, err := transport.Resume(ctx, handle) // at the start, and every few minutes
//
// The table, idempotency_intents, is the client's own, in the client's own database: it has nothing to do with the records of
// a server. It holds the bodies and URLs of requests as they are, and belongs where those may be.
//
// Any number of processes share it. Each intent has a holder, the [Store] that saved it or took it last. What another store
// has held for longer than [Options.PendingAfter] may be taken; from then on the one that held it can't say any more that it was
// not executed, and says unknown. So a process that was only slow does no harm.
//
// A process needs SELECT, INSERT, UPDATE and DELETE on the table.
package pgintent
