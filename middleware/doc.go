// Package middleware makes an http.Handler idempotent: a request with an Idempotency-Key is
// executed once, and every retry gets the same answer.
//
//	idem := middleware.New(store, accountID, nil)
//	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(transfer)))
//
// Mount it inside authentication, rate limits and compression, on the routes that change something.
// In a framework with handlers of its own, use an adapter from the folder contrib. If the framework
// is built on net/http, the middleware may also go around the whole app. Package mwtest tests any
// wiring.
//
// docs/guarantees.md describes the answers that a client sees, and docs/problems.md the problem
// documents.
//
// A handler that calls other services uses package effect on a route with Options.Resumable, and
// every replica runs [Middleware.Completer]. While a call is not settled, the client gets 503
// unknown with "accepted": true. It gets 202 pending instead if the route and the request allow
// that (Options.Accepted and [NewStatus]).
//
// The header is that of draft-ietf-httpapi-idempotency-key-header; problem documents are RFC 9457.
package middleware
