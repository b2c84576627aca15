// Package middleware makes an http.Handler idempotent: a request with an Idempotency-Key is
// executed once, and every retry gets the same answer.
//
//	idem := middleware.New(store, accountID, nil)
//	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(transfer)))
//
// Mount it inside authentication, rate limits and compression, on the routes that change something.
// docs/guarantees.md describes the answers that a client sees, and docs/problems.md the problem
// documents.
//
// The header is that of draft-ietf-httpapi-idempotency-key-header; problem documents are RFC 9457.
package middleware
