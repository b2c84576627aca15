// Package effect calls other services from an idempotent handler, and makes each call count once.
//
// A card is charged, the process dies, the client retries: with this package the retry, or the
// completer, goes on after the charge. The intent is committed before the call and its result after
// it; neither a transaction nor a connection is held in between. The answer, the handler's writes
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
// Its route names it for later runs (Options.Resumable of package middleware), its store keeps
// requests open (postgres.Store), and every replica runs an [idempotency.Completer], which
// middleware.Middleware.Completer returns. A run without a client has no values of outer middleware
// in its context: take the caller from [idempotency.KeyFrom], or set Options.ResumeContext.
//
// It may run several times. A call whose result is recorded returns it without sending, so the code
// between the calls must only decode and decide: no writes before a call, no clock, no random
// numbers. What a call returns is what counts: post the amount of its result, not one that this run
// has computed. Each run must ask for the effects that were made; if one does not, the request is
// left to a person. A refusal (4xx) after an effect that was made needs [Declared.Undo] first.
//
// # Phases
//
// Writes before a call, or between two, go into a phase of the store (postgres.Phase): a transaction
// that commits before the handler goes on. A later run gets its recorded output by its name. A phase
// that returns [Declined] is undone, and that decision is recorded as a result is: every later run
// takes the same way. A payout holds the amount, sends it, and then posts what it held or releases
// it: see the example Payout.
//
// # When a call is sent
//
//   - Only the recorded input is sent, with the recorded key. If a later run has another input, the
//     recorded one counts, and the difference is reported ([idempotency.EffectEnd]).
//   - Before a repetition Lookup is asked. If it finds nothing, that settles nothing: the call is
//     sent again with the same key.
//   - After nine tenths of KeyLifetime nothing is sent. Lookup finds the result, or the request is
//     left to a person.
//   - A no to the first send is final. A no to a repetition is final only if the service keeps it
//     under the key, or SettleAfter has passed since every earlier send was given up at the latest.
//   - An owner that is late, because its process slept, does not send.
//   - After 10 unknown results in a row one call at a time tries again. The others stay open.
//   - A call that panicked in 5 runs is left to a person.
//   - With AtMostOnce there is one send, and no repetition.
//
// One gap can't be closed here: a machine that sleeps between the last check and its socket may send
// when it wakes. A service that keeps its keys recognizes that request; for the others KeyLifetime
// and SettleAfter must be long enough.
//
// # Results from outside
//
// A webhook often knows before the next run does. [Declared.Settled] makes of it what
// postgres.Store.Settle records in the webhook's own transaction; the handler then makes the answer.
// The first result counts, whichever way it came. [Declared.Reconcile] compares the other service's
// list with the recorded effects, and finds what a database has forgotten.
//
// # Errors of Do
//
// [Declined], [NotSent] and [Park] say what is certain. Everything else is unknown, which is always
// safe. [FromHTTP] has the rules for HTTP.
//
// # Tests
//
// idempotencytest.Run crashes your handler at each point between its calls, and
// idempotencytest.Processor stands in for the other service. In a unit test call the handler with
// the store of a database: storage/memory keeps no requests open.
package effect
