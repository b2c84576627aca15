// Package client is the client's side of the Idempotency-Key protocol: an [http.RoundTripper] that
// gives a key to every request that changes something, and sends it until its outcome is known.
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
//	                                   |   it may have been executed                     |
//	                                   |                                                 |
//	                                   +-- pending: polls of the status resource --------+
//
//	time, attempts or retries are spent:   it may have been executed --> ErrUnknown: keep the key
//	                                       else                      --> ErrNotExecuted: it is proven
//
// # Where to look
//
//   - [New] and [Options]: the requests that get a key, the limits of retries, and the servers that
//     are trusted to honour keys
//   - [Error], [ErrNotExecuted], [ErrUnknown]: the proven state of a request without an answer
//   - [WithKey], [WithNewKey], [KeyFrom]: keys that the caller chooses
//   - [IntentStore] and [Transport.Resume]: continuing after the process died; client/boltintent (a
//     module of its own) and client/pgintent keep intents
//   - [Options.Trace]: every attempt, as it happens
//
// # What to know
//
// A call that ended with [ErrUnknown] must not simply be made again: that would mint a new key, and
// may pay twice. Continue with the key of the [Error], through [WithKey].
//
// When the Timeout of an [http.Client] elapses, the client may replace the [Error] by one of its
// own, and then the key is lost. Bound requests by [Options.TotalMax] or by their context.
//
// [ErrNotExecuted] covers only the attempts of this Transport. Behind a gateway that retries by
// itself it proves nothing.
//
// The caller gets an answer after all of it was read, so do not use a Transport for streams.
//
// A redirect that repeats the body (307, 308) is another request, with another key. If the server
// may answer with one, set CheckRedirect to return [http.ErrUseLastResponse]. Once an attempt may
// have been executed, no redirect is returned.
//
// The package imports the standard library, the root package and google/uuid.
package client
