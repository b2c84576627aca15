// Package effect calls other services from an idempotent handler, and makes each call count once.
//
// A card is charged, the process dies, the client retries: with this package the retry, or the
// completer, continues after the charge. The intent is committed before the call and its result
// after it; no transaction and no connection is held in between. The answer, the handler's writes
// and the end of the request are one transaction, as ever.
//
//	var charge = effect.New("charge", effect.Effect[Card, Charge]{
//		Do:     func(ctx context.Context, key string, in Card) (Charge, error) { return psp.Charge(ctx, key, in) },
//		Lookup: func(ctx context.Context, key string, in Card) (Charge, error) { return psp.Find(ctx, key) },
//		KeyLifetime: 24 * time.Hour, KeepsDeclines: true,
//	})
//
//	func topUp(w http.ResponseWriter, r *http.Request) {
//		paid, err := charge.Call(r.Context(), card)
//		switch {
//		case errors.Is(err, effect.ErrDeclined):
//			http.Error(w, "the card was declined", http.StatusPaymentRequired)
//			return
//		case err != nil:
//			return // not settled: the answer is dropped, and the request stays open
//		}
//		tx := postgres.Tx(r.Context()) // it commits with the answer
//		...
//	}
//
// # The handler
//
// Its route names it for later runs (Options.Resumable of package middleware), its store can keep
// requests open (postgres.Store), and every replica runs an [idempotency.Completer], which
// middleware.Middleware.Completer returns. A run without a client has no values of outer middleware
// in its context: take the caller from [idempotency.KeyFrom], or set Options.ResumeContext.
//
// It may run several times. A call with a recorded result returns it and sends nothing, so the code
// between the calls must only decode and decide: no writes before a call, no clock, no random
// numbers. Trust only the result of a call: post its amount, not one that this run has computed.
// Each run must make all the calls that earlier runs made; if one does not, the request is left to
// a person. Before it answers a refusal (4xx), the handler must undo the effects that were made
// ([Declared.Undo]).
//
// # Phases
//
// Writes before a call, or between two, go into a phase of the store (postgres.Phase): a
// transaction that commits before the handler goes on. A later run finds its recorded output by its
// name. The writes of a phase that returns [Declined] are undone, and the decision is recorded, so
// that every later run decides the same. A payout, for example, holds the amount, sends it, and
// then posts or releases it: see the example Payout.
//
// # When a call is sent
//
//   - Only the recorded input is sent, with the recorded key. If a later run has another input, the
//     recorded one is sent, and the difference is reported ([idempotency.EffectEnd]).
//   - Before a call is sent again, Lookup is called. If it finds nothing, that proves nothing: the
//     call is sent again with the same key.
//   - After nine tenths of KeyLifetime nothing is sent. Lookup finds the result, or the request is
//     left to a person.
//   - A no to the first send is final. A no to a later send is final only if the service keeps it
//     under the key, or if every earlier send was given up at least SettleAfter before.
//   - An owner that is late, because its process was suspended, does not send.
//   - After 10 unknown results in a row only one call at a time is made. The other requests stay
//     open.
//   - A call that panicked in 5 runs is left to a person.
//   - With AtMostOnce there is one send at most.
//
// One gap can't be closed here: a machine that is suspended between the last check and the write to
// its socket may send when it wakes. A service that keeps its keys recognizes that request. For
// other services the real lifetime of the keys and SettleAfter must be longer than the machine's
// sleep.
//
// # Results from outside
//
// A webhook often brings the result before the next run does. [Declared.Settled] turns it into a
// settlement, which postgres.Store.Settle records in the webhook's own transaction; the handler
// then makes the answer. The first result counts, whichever way it came. A no counts only if the
// service keeps it under the key, or if the call is sent once at most. [Declared.Reconcile] compares
// the other service's list with the recorded effects, and finds calls that the database has lost.
//
// A person can state the result too (operator.Settle). What is typed can be wrong, so the next run
// checks it before it does anything else: it must be JSON that Do's output could have been recorded
// as, without a field that is unknown or missing. Otherwise nothing is sent, and the request waits
// for a better statement. A field with omitempty or omitzero is not missed.
//
// # Errors of Do
//
// [Declined], [NotSent] and [Park] say what is certain. Everything else is unknown, which is always
// safe. [FromHTTP] has the rules for HTTP.
//
// # Tests
//
// idempotencytest.Run crashes your handler at each point between its calls, and
// idempotencytest.Processor stands in for the other service. A unit test needs a store on a
// database too: storage/memory can't keep requests open.
package effect
