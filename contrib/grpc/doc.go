// Package grpcidem makes the unary methods of a gRPC server idempotent, as package middleware does
// for HTTP, and has the interceptor of a client that retries.
//
//	idem := grpcidem.New(store, account, nil)
//	server := grpc.NewServer(
//		grpc.ChainUnaryInterceptor(authenticate, idem.Unary),
//		grpc.ChainStreamInterceptor(authenticateStream, idem.Stream),
//	)
//
// A method's handler finds its transaction by [postgres.Tx] in its context. Its reply, or its error
// with all details, is recorded in the same commit, and a retry gets it without running the
// handler.
//
//	             | metadata idempotency-status | code
//	-------------+-----------------------------+----------------------------------------------
//	it ran       | executed                    | the handler's
//	it ran before| replayed                    | the same, with the same details
//	it runs now  | in-progress                 | Aborted
//	other message| mismatch                    | InvalidArgument
//	nothing left | not-executed                | the handler's; Internal, Unavailable and others
//	not known    | unknown                     | Unavailable, Unknown or DataLoss: keep the key
//
// Branch on the metadata, not on the code: a handler has codes of its own. A refusal has an
// ErrorInfo with the reason, and a RetryInfo if a retry may end otherwise.
//
// # What to know
//
// Metadata that a handler sets by grpc.SetHeader or grpc.SetTrailer goes out with the first reply,
// and is not recorded: a replay is without it. grpc.SendHeader fails, because the client would
// learn of a payment before its commit.
//
// Interceptors that change the request or authenticate belong outside, in front of
// [Interceptor.Unary] in the chain; those that recover from panics or make errors belong inside. An
// interceptor inside runs once for each run of the handler.
//
// The handler's context outlives the client and its deadline: once begun, the work is finished, and
// a retry finds it.
//
// [postgres.Tx]: https://pkg.go.dev/github.com/paidonce/idempotency/storage/postgres#Tx
package grpcidem
