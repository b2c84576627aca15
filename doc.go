// Package idempotency lets a client retry a request and get one effect and one answer, whatever
// crashes in between.
//
// A client sends an Idempotency-Key. The engine claims the key, runs the handler inside a database
// transaction, and commits the request's fingerprint, the answer and the handler's own writes
// together. A retry finds all of them, or none.
//
// # The life of a key
//
//	               claim                        COMMIT
//	absent ----------------> in progress ----------------> recorded
//	  ^                          |                            |
//	  |   crash, rollback,       |                            |  every retry: a replay
//	  +---- forgotten answer ----+                            |
//	  ^                                                       |
//	  +------------------- expired and deleted ---------------+
//
// A key is claimed; an attempt runs; its answer is recorded; a retry gets a replay. While an
// attempt runs, its claim is an uncommitted transaction and nothing else: no lease to expire, no
// row to clean up. A crash makes the key absent.
//
// # Where to look
//
//   - package middleware mounts the engine on net/http: New and Handler
//   - package storage/postgres keeps the records: Open, and Tx for the handler's own statements
//   - package storage/memory is for a handler's unit tests
//   - [Options] has the features that a route may switch on: Wait instead of 409, for example
//   - [Engine.Do] is the protocol, top to bottom; decide, in decision.go, is the state machine
//   - [Store] has the promises of a store; package storage/storagetest tests them
//   - package effect calls other services, and makes each call count once; [Completer] ends the
//     requests that stay open
//   - [DerivedKey] is for calls that a handler makes by itself, which happen at least once
//   - package idempotencytest runs your own handler through crashes
//
// This package imports the standard library only.
package idempotency
