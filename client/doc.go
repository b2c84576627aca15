// Package client is the client's side of the Idempotency-Key protocol: an [http.RoundTripper] that gives every request
// which changes something a key, and sends it until what became of it is known.
//
//	httpClient := &http.Client{Transport: client.New(nil, &client.Options{Honours: client.Everywhere})}
//	response, err := httpClient.Post(url, "application/json", body)
//
// # The life of a request
//
//	              +--------- pause: full jitter, Retry-After, a budget of retries --------+
//	              |                                                                      |
//	              v                                                                      |
//	key --> intent saved --> attempt --+-- executed, replayed, mismatch ---> the answer  |
//	                                   |                                                 |
//	                                   +-- not-executed, about the request               |
//	                                   |   (400, 401, 413), nothing lost ---> the answer |
//	                                   |                                                 |
//	                                   +-- not-executed, passing (503, 429) -------------+
//	                                   |                                                 |
//	                                   +-- in-progress, unknown, no answer: -------------+
//	                                       it may have been executed
//
//	time, attempts or retries are spent:   it may have been executed --> ErrUnknown: keep the key
//	                                       else                      --> ErrNotExecuted: it is proven
//
// # Where to look
//
//   - [New] and [Options]: what gets a key, how long it asks, and whether a server is trusted to honour keys
//   - [Error], [ErrNotExecuted], [ErrUnknown]: what is true where there is no answer
//   - [WithKey], [WithNewKey], [KeyFrom]: keys of the caller's own
//   - [IntentStore] and [Transport.Resume]: continuing after the process died; client/boltintent (a
//     module of its own) and client/pgintent keep intents
//   - [Options.Trace]: every attempt, as it happens
//
// # What to know
//
// A call that ended with [ErrUnknown] must not simply be made again: that mints a new key, and may pay twice. Go on with
// the key of the [Error], by [WithKey].
//
// An [http.Client] with a Timeout may replace the [Error] by one of its own when that is over, and then the key is lost. Bound
// requests by [Options.TotalMax] or by their context.
//
// [ErrNotExecuted] speaks of what this Transport has sent. A gateway that sends requests again by itself takes the proof away.
//
// Answers are read whole before the caller gets them. Streams don't belong here.
//
// A redirect that repeats the body (307, 308) is a request of its own, with a key of its own: set CheckRedirect to return
// [http.ErrUseLastResponse] where the server may answer with one. Once an attempt may have been executed none is returned.
//
// The package imports the standard library, the root package and google/uuid.
package client
