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
//	the call              | metadata idempotency-status | code
//	----------------------+-----------------------------+-------------------------------------
//	was executed now      | executed                    | the handler's
//	was executed before   | replayed                    | the same, with the same details
//	is running            | in-progress                 | Aborted
//	has another message   | mismatch                    | InvalidArgument
//	left no writes        | not-executed                | the handler's; Internal, Unavailable
//	                      |                             | and others
//	may have been executed| unknown                     | Unavailable, Unknown, DataLoss and
//	                      |                             | others: keep the key
//
// Branch on the metadata, not on the code: a handler has codes of its own. A refusal has an
// ErrorInfo with the reason, and a RetryInfo if a retry may get another answer.
//
// # What to know
//
// Metadata that a handler sets by grpc.SetHeader or grpc.SetTrailer goes out with the first reply,
// and is not recorded: a replay is without it. grpc.SendHeader fails, because the client would
// learn of a payment before its commit.
//
// Interceptors that change the request or authenticate belong outside, in front of
// [Interceptor.Unary] in the chain. Those that recover from panics or convert errors belong inside:
// outside, one that changes codes can give a forgotten answer the code of a recorded one, and the
// client believes that it is final. Only idempotency-status and idempotency-code still tell. An
// interceptor inside runs once for each run of the handler.
//
// The handler's context outlives the client and its deadline: a handler that has begun is not
// interrupted, and a retry gets its answer.
//
// [postgres.Tx]: https://pkg.go.dev/github.com/paidonce/idempotency/storage/postgres#Tx
package grpcidem
